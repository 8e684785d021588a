"""A sequence a chunk of every shard at a time, so that what is made of its tokens never exists whole."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .placement import BATCH, SEQUENCE, Placement


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How [B, T, ...] is cut: every shard into chunks, of which a scan takes one of every shard at a time."""

    placement: Placement
    batch: int
    length: int
    groups: int  # shards of the batch
    shards: int  # of the sequence
    chunk: int

    @classmethod
    def of(cls, placement: Placement, shape: tuple[int, ...], chunk: int) -> "Chunks":
        batch, length = shape
        # A length that does not divide has no local parts (one shard): its chunks are whole on every device.
        groups, shards = placement.count(batch, BATCH), placement.count(length, SEQUENCE)
        return cls(placement, batch, length, groups, shards, min(chunk, length // shards))

    def cut(self, a: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, batch shards, B / batch shards, C, chunk, ...]; only local dimensions are cut."""
        per_shard, rest = self.length // self.shards, a.shape[2:]
        a = a.reshape(self.groups, self.batch // self.groups, self.shards, per_shard, *rest)
        a = _pad(a, 3, -(-per_shard // self.chunk) * self.chunk)
        a = jnp.moveaxis(a.reshape(*a.shape[:3], -1, self.chunk, *rest), 3, 0)
        return self.placement.constrain(a, None, BATCH, None, SEQUENCE, *(None for _ in a.shape[4:]))

    def joined(self, a: jax.Array) -> jax.Array:
        """The inverse of cut."""
        rest = a.shape[5:]
        a = jnp.moveaxis(a, 0, 3).reshape(self.groups, self.batch // self.groups, self.shards, -1, *rest)
        return a[:, :, :, : self.length // self.shards].reshape(self.batch, self.length, *rest)


def in_chunks(
    placement: Placement, run: Callable[[jax.Array], jax.Array], x: Float[Array, "B T E"], tokens: int
) -> Float[Array, "B T E"]:
    """run(x), where run maps [B, t, E] to the same shape token by token: at most so many per device at a time.

    Results replace what they are of. XLA would make room for those of a scan for all layers at once, when they begin.
    """
    batch, length, embed = x.shape
    whole = Chunks.of(placement, (batch, length), length)
    number = -(-(batch // whole.groups * whole.chunk) // tokens)
    if number == 1:
        return run(x)
    chunks = dataclasses.replace(whole, chunk=-(-whole.chunk // number))
    parts = chunks.cut(x)

    def replace(n: jax.Array, parts: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_index_in_dim(parts, n, keepdims=False)
        result = run(part.reshape(batch, -1, embed)).reshape(part.shape)
        return jax.lax.dynamic_update_index_in_dim(parts, result, n, axis=0)

    return placement.stream(chunks.joined(jax.lax.fori_loop(0, len(parts), replace, parts)))


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros at the end of an axis: tokens of weight 0."""
    extra = size - x.shape[axis]
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x
