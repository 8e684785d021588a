"""A language model of your own in Flax NNX, trained on sequences that are sharded over a ring of devices.

Run ``python examples/nnx_model.py``: on all devices there are, or four that a CPU simulates. Tokens meet in
``ringjax.nnx.RingAttention`` alone, which gives RoPE their positions. All other layers act on each token by itself, so
they are Flax's own and know nothing of the ring. Tokens are brought into ring order once, in the data pipeline.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import NamedSharding, P

import ringjax

WIDTH, LAYERS, BATCH, TOKENS_PER_DEVICE, STEPS = 32, 1, 4, 32, 5


class Block(nnx.Module):
    def __init__(self, mesh, rngs):
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        options = {"is_causal": True, "layout": "zigzag", "mesh": mesh, "axis_name": "sp", "batch_axis_name": "data"}
        self.attention = ringjax.nnx.RingAttention(4, WIDTH, num_kv_heads=2, **options, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Model(nnx.Module):
    def __init__(self, mesh, rngs):
        self.embed, self.norm = nnx.Embed(256, WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)  # tokens are bytes
        self.blocks = nnx.Sequential(*(Block(mesh, rngs) for _ in range(LAYERS)))

    def __call__(self, tokens):
        return self.embed.attend(self.norm(self.blocks(self.embed(tokens))))


def batches(mesh):
    """(tokens, targets, weights) [B, T] in ring order. The host permutes tokens; no activation ever is."""
    ring = {"layout": "zigzag", "num_shards": mesh.shape["sp"]}
    for rows in np.resize(np.fromfile(__file__, np.uint8), (STEPS, BATCH, TOKENS_PER_DEVICE * mesh.shape["sp"])):
        tokens = ringjax.to_ring_order(rows, **ring)
        targets, has_target = ringjax.shift_targets(tokens, **ring)  # the next token, wherever it lies
        weights = has_target / np.float32(has_target.sum())  # so that the mean over all tokens is a plain sum
        yield jax.device_put((tokens, targets, weights), NamedSharding(mesh, P("data", "sp")))


@nnx.jit
def train_step(model, optimizer, tokens, targets, weights):
    def mean_loss(model):
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets))

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


def main():
    rings = 2 if jax.device_count() % 2 == 0 else 1
    mesh = ringjax.ring_mesh((rings, jax.device_count() // rings), ("data", "sp"))
    model = Model(mesh, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for module in (model, optimizer):  # RingAttention's weights name the axes that shard them, all others are copied
        state = nnx.state(module)
        nnx.update(module, jax.device_put(state, ringjax.nnx.partition_shardings(state, mesh)))
    for step, batch in enumerate(batches(mesh)):
        print(f"step {step}: loss {train_step(model, optimizer, *batch):.5f}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # of no effect where there are GPUs or TPUs
    main()
