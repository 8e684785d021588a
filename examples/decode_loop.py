"""Greedy decoding with keys and values that are sharded over a ring: prompts at once, then token by token.

Run ``python examples/decode_loop.py``: on all devices there are, or four that a CPU simulates. A prompt is dealt over
the devices. A new token is on all of them: each attends to its part of the cache, then the results are merged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import ringjax

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, SIZE, STOP, LONGEST = 32, 32, 2, 4, 2, 8, 12, 20
PROMPTS, LENGTHS = np.array([[5, 3, 8, 1, 9, 2, 7, 0], [4, 4, 1, 0, 0, 0, 0, 0], [6] * 8]), np.array([7, 3, 8])


def forward(params, tokens, positions, caches, attend):
    """Logits [B, T, V] and the caches, of which ``attend(q, k, v, cache)`` reads and writes one."""
    x, caches = params["token"][tokens] + params["position"][positions], list(caches)
    for number, layer in enumerate(params["layers"]):
        heads = jnp.einsum("bte,enh->btnh", jax.nn.standardize(x), layer["qkv"])
        attended, caches[number] = attend(*jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2), caches[number])
        x = x + jnp.einsum("btnh,nhe->bte", attended, layer["out"])
    return x @ params["token"].T, caches


@functools.partial(jax.jit, donate_argnames="caches")
def prefill(params, tokens, lengths, caches):
    """The token after each prompt [B]. Prompts [B, T] are in ring order, their padding is at the end."""

    def attend(q, k, v, cache):
        return ringjax.ring_attention(q, k, v, is_causal=True, layout="striped"), cache.fill(k, v, lengths=lengths)

    positions = ringjax.ring_positions(tokens.shape[1], layout="striped", num_shards=caches[0].num_shards)
    logits, caches = forward(params, tokens, positions, caches, attend)
    last = jnp.argsort(positions)[lengths - 1]  # where the last token of each prompt lies
    return jnp.argmax(logits, axis=-1)[jnp.arange(len(lengths)), last], caches


@functools.partial(jax.jit, donate_argnames="caches")
def decode(params, tokens, counts, caches):
    """The token after these [B]. Rows whose count is 0 have ended, and take no room in the caches."""

    def attend(q, k, v, cache):
        cache = cache.append(k, v, counts=counts)
        return ringjax.cached_attention(q, cache, counts=counts), cache

    logits, caches = forward(params, tokens[:, None], caches[0].lengths[:, None], caches, attend)
    return jnp.argmax(logits[:, 0], axis=-1), caches


def main():
    mesh, rng = ringjax.ring_mesh(jax.device_count(), "sp"), np.random.default_rng(0)
    normal = lambda shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    qkv, out = (WIDTH, HEADS + 2 * KV_HEADS, SIZE), (HEADS, SIZE, WIDTH)
    layers = [{"qkv": normal(qkv), "out": normal(out)} for _ in range(LAYERS)]
    params = {"token": normal((VOCABULARY, WIDTH)), "position": normal((LONGEST, WIDTH)), "layers": layers}
    rows = [prompt[:length].tolist() for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    with jax.set_mesh(mesh):
        caches = [ringjax.KVCache.empty(len(rows), LONGEST, KV_HEADS, SIZE, dtype="float32", mesh=mesh) for _ in layers]
        tokens = ringjax.to_ring_order(PROMPTS, layout="striped", num_shards=mesh.size, pad_value=0)
        (new, caches), going = prefill(params, tokens, LENGTHS, caches), np.ones(len(rows), bool)
        while going.any():
            for number in np.flatnonzero(going):
                rows[number].append(int(new[number]))
                going[number] = rows[number][-1] != STOP and len(rows[number]) < LONGEST
            new, caches = decode(params, new, going.astype(np.int32), caches)
    dense = lambda q, k, v, _: (jax.nn.dot_product_attention(q, k, v, is_causal=True), None)  # noqa: E731
    for length, row in zip(LENGTHS, rows, strict=True):  # the same, from the whole row at once and without a cache
        logits, _ = forward(params, np.resize(row, (1, LONGEST)), np.arange(LONGEST), [None] * LAYERS, dense)
        assert row[length:] == jnp.argmax(logits[0, length - 1 : len(row) - 1], axis=-1).tolist()
        print(f"{row[:length]} -> {row[length:]}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # of no effect where there are GPUs or TPUs
    main()
