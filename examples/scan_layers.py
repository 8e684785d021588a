"""Layers that are scanned, as in MaxText, on a mesh of data x sequence x tensor, with ring attention in each.

Run ``python examples/scan_layers.py``: on all devices there are, or eight that a CPU simulates. Arrays are whole, and
``jit`` shards all but the attention after its inputs. The backward pass recomputes each layer, but keeps the result and
the log-sum-exp of its attention, so that keys and values do not go round the ring once more for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P

import ringjax

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_SIZE, BATCH, TOKENS_PER_DEVICE = 4, 32, 4, 2, 8, 2, 32
SHAPES = {  # of all layers together; "tensor" shards heads and features, "data" may shard another dimension (FSDP)
    "query": ((LAYERS, WIDTH, HEADS, HEAD_SIZE), P(None, None, "tensor", None)),
    "key": ((LAYERS, WIDTH, KV_HEADS, HEAD_SIZE), P(None, None, "tensor", None)),
    "value": ((LAYERS, WIDTH, KV_HEADS, HEAD_SIZE), P(None, None, "tensor", None)),
    "out": ((LAYERS, HEADS, HEAD_SIZE, WIDTH), P(None, "tensor", None, None)),
    "up": ((LAYERS, WIDTH, 4 * WIDTH), P(None, None, "tensor")),
    "down": ((LAYERS, 4 * WIDTH, WIDTH), P(None, "tensor", None)),
}


def rope(x, positions):
    angle = positions[:, None, None] * 10000.0 ** -np.linspace(0, 1, HEAD_SIZE // 2, endpoint=False, dtype=np.float32)
    (first, second), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def mean_loss(params, tokens, targets, weights, positions, attention):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("ring_out", "ring_lse"))
    def apply(x, layer):
        y = jax.nn.standardize(x)
        query, key, value = (jnp.einsum("bte,enh->btnh", y, layer[name]) for name in ("query", "key", "value"))
        attended = attention(rope(query, positions), rope(key, positions), value, is_causal=True)
        x = x + jnp.einsum("btnh,nhe->bte", attended, layer["out"])
        return x + jax.nn.gelu(jax.nn.standardize(x) @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(apply, params["embedding"][tokens], params["layers"])
    log_probs = jax.nn.log_softmax(x @ params["embedding"].T)
    return -jnp.sum(weights * jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0])


def batch_of(rows, **ring):
    tokens = ringjax.to_ring_order(rows, **ring)
    targets, has_target = ringjax.shift_targets(tokens, **ring)
    return tokens, targets, has_target / np.float32(has_target.sum())  # so that the mean over all tokens is a plain sum


def main():
    data = tensor = 2 if jax.device_count() % 8 == 0 else 1
    sequence = jax.device_count() // (data * tensor)
    mesh = ringjax.ring_mesh((data, sequence, tensor), ("data", "sequence", "tensor"), ring_axis="sequence")
    ring, length = {"layout": "zigzag", "num_shards": sequence}, TOKENS_PER_DEVICE * sequence
    attention = functools.partial(ringjax.ring_attention, mesh=mesh, layout="zigzag", axis_name="sequence",
                                  batch_axis_name="data", head_axis_name="tensor")  # fmt: skip
    rng, rows = np.random.default_rng(0), np.resize(np.fromfile(__file__, np.uint8), (BATCH, length))
    normal = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    params = {"embedding": normal((256, WIDTH)), "layers": {name: normal(shape) for name, (shape, _) in SHAPES.items()}}
    step = jax.jit(jax.value_and_grad(mean_loss), static_argnames="attention")
    dense = step(params, *batch_of(rows, num_shards=1), np.arange(length), attention=jax.nn.dot_product_attention)
    specs = {"embedding": P(), "layers": {name: spec for name, (_, spec) in SHAPES.items()}}
    placed = jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
    batch = jax.device_put(batch_of(rows, **ring), NamedSharding(mesh, P("data", "sequence")))
    batch = *batch, ringjax.ring_positions(length, **ring)
    loss, gradients = step(placed, *batch, attention=attention)
    error = jax.tree.map(lambda x, y: abs(np.asarray(x) - np.asarray(y)).max(), gradients, dense[1])
    print(f"loss {loss:.5f}, dense on one device {dense[0]:.5f}; gradients differ by {max(jax.tree.leaves(error)):.1e}")
    placed = jax.tree.map(lambda weight, gradient: weight - 0.2 * gradient, placed, gradients)
    print(f"after a step of gradient descent {step(placed, *batch, attention=attention)[0]:.5f}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # of no effect where there are GPUs or TPUs
    main()
