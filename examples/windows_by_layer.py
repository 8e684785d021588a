"""Packed documents through layers of which one attends to a window and the next to whole documents.

Run ``python examples/windows_by_layer.py``: on all devices there are, or four that a CPU simulates. ``ringjax.pack``
puts whole documents into sequences so that all devices work equally; most are whole on one device. Those that are not
take the first ``shared_length`` places of each shard: with this promise only their keys travel, in each kind of layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P

import ringjax

WINDOWS = (24, None)  # of each layer: a token attends to so many before it; None: to all of its document
WIDTH, HEADS, KV_HEADS, HEAD_SIZE, BATCH, TOKENS_PER_DEVICE = 32, 4, 2, 8, 2, 256


def rope(x, positions):
    angle = positions[..., None, None] * 10000.0 ** -np.linspace(0, 1, HEAD_SIZE // 2, endpoint=False, dtype=np.float32)
    (first, second), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.partial(jax.jit, static_argnames="attention")
def mean_loss(params, batch, attention):
    documents = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    x = params["embedding"][batch["inputs"]]
    for weights, window in zip(params["layers"], WINDOWS, strict=True):
        heads = jnp.einsum("bte,enh->btnh", jax.nn.standardize(x), weights["qkv"])
        query, key, value = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2)
        query, key = (rope(x, batch["positions"]) for x in (query, key))  # which count from each document's beginning
        attended = attention(query, key, value, is_causal=True, local_window_size=window, **documents)
        x = x + jnp.einsum("btnh,nhe->bte", attended, weights["out"])
    log_probs = jax.nn.log_softmax(x @ params["embedding"].T)
    return -jnp.sum(batch["weights"] * jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0])


def dense(query, key, value, *, is_causal, local_window_size, positions, segment_ids):
    """The same attention by a mask of all pairs, to check the ring's."""
    apart = positions[:, :, None] - positions[:, None, :]
    attends = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (apart >= 0)
    if local_window_size is not None:
        attends &= apart <= local_window_size
    return jax.nn.dot_product_attention(query, key, value, mask=attends[:, None])


def main():
    mesh, devices, rng = ringjax.ring_mesh(jax.device_count(), "sp"), jax.device_count(), np.random.default_rng(3)
    lengths = rng.lognormal(np.log(24), 0.8, BATCH * devices * TOKENS_PER_DEVICE // 24).astype(int) + 1
    lengths = np.minimum(lengths, devices * TOKENS_PER_DEVICE)  # a document that no sequence holds has to be cut
    text, starts = np.resize(np.fromfile(__file__, np.uint8), lengths.sum()), np.cumsum(lengths) - lengths
    packing = ringjax.pack(lengths, num_shards=devices, shard_length=TOKENS_PER_DEVICE)
    rows = []
    for sequence in (packing[number] for number in range(BATCH)):
        inputs, targets = sequence.take(text, starts)
        rows.append({"inputs": inputs, "targets": targets, "weights": sequence.loss_mask,
                     "positions": sequence.positions, "segment_ids": sequence.segment_ids})  # fmt: skip
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["weights"] = batch["weights"] / np.float32(batch["weights"].sum())  # a token with no target has none
    # The promise is checked here, on the host: under jit it cannot be.
    ringjax.check_segments(batch["segment_ids"], num_shards=devices, shared_length=packing.shared_length)

    normal = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    shapes = {"qkv": (WIDTH, HEADS + 2 * KV_HEADS, HEAD_SIZE), "out": (HEADS, HEAD_SIZE, WIDTH)}
    layers = [{name: normal(*shape) for name, shape in shapes.items()} for _ in WINDOWS]
    params = {"embedding": normal(256, WIDTH), "layers": layers}
    attention = functools.partial(ringjax.ring_attention, mesh=mesh, shared_length=packing.shared_length)
    placed = jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(batch, NamedSharding(mesh, P(None, "sp")))
    print(f"{len(lengths)} documents, of each {TOKENS_PER_DEVICE} keys {packing.shared_length} travel")
    print(f"loss {mean_loss(*placed, attention):.5f}, with dense attention {mean_loss(params, batch, dense):.5f}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # of no effect where there are GPUs or TPUs
    main()
