"""A language model in Equinox that calls ``ringjax.ring_attention``, trained on sequences that are sharded.

Run ``python examples/equinox_model.py``: on all devices there are, or four that a CPU simulates. The model takes its
attention as an argument, and for RoPE the positions of tokens in ring order. All else acts on each token by itself.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import NamedSharding, P

import ringjax

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 32, 1, 4, 2, 8
BATCH, TOKENS_PER_DEVICE, STEPS, LEARNING_RATE = 4, 32, 5, 0.2


def rope(x, positions):
    angle = positions[:, None, None] * 10000.0 ** -np.linspace(0, 1, HEAD_SIZE // 2, endpoint=False, dtype=np.float32)
    (first, second), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Block(eqx.Module):
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.qkv = eqx.nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, key=keys[0])
        self.out = eqx.nn.Linear(HEADS * HEAD_SIZE, WIDTH, key=keys[1])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.gelu, key=keys[2])

    def __call__(self, x, positions, attention):
        qkv, out, mlp = (jax.vmap(jax.vmap(layer)) for layer in (self.qkv, self.out, self.mlp))  # on [B, T, features]
        heads = qkv(jax.nn.standardize(x)).reshape(*x.shape[:2], -1, HEAD_SIZE)
        q, k, v = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2)
        x = x + out(attention(rope(q, positions), rope(k, positions), v, is_causal=True).reshape(*x.shape[:2], -1))
        return x + mlp(jax.nn.standardize(x))


@eqx.filter_jit
def train_step(model, tokens, targets, weights, positions, attention):
    @eqx.filter_value_and_grad
    def loss_and_gradients(model):
        embedding, blocks = model
        x = embedding[tokens]
        for block in blocks:
            x = block(x, positions, attention)
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(x @ embedding.T, targets))

    loss, gradients = loss_and_gradients(model)
    return eqx.apply_updates(model, jax.tree.map(lambda x: -LEARNING_RATE * x, gradients)), loss


def main():
    rings = 2 if jax.device_count() % 2 == 0 else 1
    mesh = ringjax.ring_mesh((rings, jax.device_count() // rings), ("data", "sp"))
    ring, length = {"layout": "zigzag", "num_shards": mesh.shape["sp"]}, TOKENS_PER_DEVICE * mesh.shape["sp"]
    attention = eqx.Partial(ringjax.ring_attention, layout="zigzag", mesh=mesh, batch_axis_name="data")
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    model = 0.1 * jax.random.normal(keys[0], (256, WIDTH)), [Block(key) for key in keys[1:]]  # tokens are bytes
    model = eqx.filter_shard(model, NamedSharding(mesh, P()))  # whole on every device
    for step, rows in enumerate(np.resize(np.fromfile(__file__, np.uint8), (STEPS, BATCH, length))):
        tokens = ringjax.to_ring_order(rows, **ring)  # in the data pipeline: no activation is ever permuted
        targets, has_target = ringjax.shift_targets(tokens, **ring)  # the next token, wherever it lies
        weights = has_target / np.float32(has_target.sum())  # so that the mean over all tokens is a plain sum
        batch = jax.device_put((tokens, targets, weights), NamedSharding(mesh, P("data", "sp")))
        positions = ringjax.ring_positions(length, **ring)
        model, loss = train_step(model, *batch, positions=positions, attention=attention)
        print(f"step {step}: loss {loss:.5f}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # of no effect where there are GPUs or TPUs
    main()
