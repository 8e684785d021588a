"""RMSNorm, and the products that it goes into."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import partial
from .placement import FEATURES, ROWS, SEQUENCE, TENSOR, Placement


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 or better (arXiv:1910.07467)."""
    wide = x.astype(partial.wide(x.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * spread(scale.astype(wide.dtype), wide.ndim)).astype(x.dtype)


def spread(x: jax.Array, ndim: int) -> jax.Array:
    """Leading dimensions of size 1 until the rank is ndim (rank promotion may be an error)."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normed:
    """rms_norm(x, scale, eps) that waits for the products it goes into.

    x * scale goes into them, and their results are divided by sqrt(mean(x^2) + eps). So devices that share the features
    add the squares together with the products, in one sum where there were two.
    """

    x: Float[Array, "B T E"]
    scale: Float[Array, " E"]
    eps: float

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> "Normed":
        return dataclasses.replace(self, x=self.x.astype(dtype))

    def value(self) -> Float[Array, "B T E"]:
        """The norm at once."""
        return rms_norm(self.x, self.scale, self.eps)


def normed(placement: Placement, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array | Normed:
    """rms_norm of x [B, T, E], for :func:`products`: it waits for them while a token's features are dealt."""
    dealt = placement.whole and placement.count(x.shape[-1], FEATURES) > 1
    # Squares and products with x fit into bfloat16 and wider types; float16 has no room for them.
    roomy = jnp.finfo(x.dtype).maxexp >= jnp.finfo(jnp.bfloat16).maxexp
    return Normed(x=x, scale=scale, eps=eps) if dealt and roomy else rms_norm(x, scale, eps)


def products(placement: Placement, x: jax.Array | Normed, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """x W, [B, T, F, ...], of x [B, T, E] and each kernel W [E, F, ...], gathered, of roles FSDP and TENSOR."""
    if isinstance(x, Normed):
        shards = {placement.count(kernel.shape[1], TENSOR) for kernel in kernels}
        if len(shards) == 1:
            return _summed_at_once(placement, x, kernels, *shards)
        x = x.value()
    return [placement.product("bte,e...->bt...", x, kernel) for kernel in kernels]


def _summed_at_once(placement: Placement, x: Normed, kernels: Sequence[jax.Array], shards: int) -> list[jax.Array]:
    """The sum over devices is one over a dimension: of the part of E that each has. ``shards``: of F."""
    batch, length, embed = x.x.shape
    parts = placement.count(embed, FEATURES)
    split = (batch, length, parts, embed // parts)
    wide = x.x.astype(partial.wide(x.dtype))
    scaled = (wide * spread(x.scale.astype(wide.dtype), 3)).astype(x.dtype)

    def of_parts(kernel: jax.Array) -> jax.Array:
        there = kernel.reshape(parts, embed // parts, *kernel.shape[1:])
        there = placement.constrain(there, FEATURES, None, TENSOR, *[None] * (kernel.ndim - 2))

        def multiply(x: jax.Array) -> jax.Array:
            # To "btp..." einsum would multiply the kernel with x, for which XLA for CPUs transposes kernels.
            y = jnp.einsum("btpe,pe...->pbt...", x, there, preferred_element_type=wide.dtype)
            return jnp.moveaxis(y, 0, 2)

        # Of one row, in another dtype, XLA for GPUs converts kernels of any size first, to memory.
        y = placement.never_alone(multiply, scaled.reshape(split))
        return placement.constrain(y.reshape(batch, length, parts, shards, -1), ROWS, SEQUENCE, FEATURES, TENSOR, None)

    there = [of_parts(kernel) for kernel in kernels]
    squares = jnp.sum(jnp.square(wide).reshape(split), axis=-1)[..., None, None]
    # Otherwise XLA for GPUs has one thread sum them while the others concatenate: 80 us each time on an H200.
    squares = jax.lax.optimization_barrier(squares)
    squares = jnp.broadcast_to(squares, (batch, length, parts, shards, 1))
    total = jnp.sum(jnp.concatenate([*there, squares], axis=-1), axis=2)
    total = placement.constrain(total, ROWS, SEQUENCE, TENSOR, None)
    factor = jax.lax.rsqrt(total[..., -1:] / embed + x.eps)
    found, start = [], 0
    for kernel, y in zip(kernels, there, strict=True):
        y = (total[..., start : start + y.shape[-1]] * factor).astype(x.dtype)
        found.append(y.reshape(batch, length, *kernel.shape[1:]))
        start += y.shape[-1]
    return found
