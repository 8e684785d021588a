"""Collectives around a shard's attention: partial results of the ranks become one, queries are gathered. No kernels.

Each rank has attended to its own keys. The results over all keys follow from these and their log-sum-exps, by one
maximum and one sum over the axis; see :mod:`ringjax.partial`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._compat import axis_is_bound, take
from .layout import Layout, ring_order
from .partial import finite_lse, normalise, weigh, wide


def merge_over_axis(
    out: Float[Array, "*b H"], lse: Float[Array, "*b"], axis_name: str
) -> tuple[Float[Array, "*b H"], Float[Array, "*b"]]:
    """Combine attention over disjoint sets of keys, one on each rank of a mesh axis, inside ``shard_map``.

        lse = log sum_r exp(lse_r),    out = sum_r exp(lse_r - lse) out_r

    Differentiable in both. Rows that attend to nothing on any rank (all lse -inf) give 0 and -inf, with zero gradients.
    One maximum of b float32 numbers and one sum of b (H + 1) go over the axis. The result is the same on every rank,
    and so typed under ``check_vma``.

    Args:
      out, lse: of this rank, as ``ring_attention(..., return_residual=True)`` returns.
      axis_name: the mesh axis, or the axis of a vmap.

    Returns:
      (out, lse): out in its own dtype, lse in float32 (float64 for float64).

    Raises:
      ValueError: if the shapes do not fit, or the axis is not one inside of which this is called.
    """
    out, lse = jnp.asarray(out), jnp.asarray(lse)
    if lse.shape != out.shape[:-1]:
        raise ValueError(f"lse must have the shape of out without its last axis. Got out {out.shape}, lse {lse.shape}.")
    if not isinstance(axis_name, str) or not axis_is_bound(axis_name):
        raise ValueError(f"axis_name must be an axis of the shard_map or vmap around this call. Got {axis_name!r}.")
    return merge_ranks(out, lse, axis_name)


def merge_ranks(
    out: Array, lse: Array, axis_name: str, *, sinks: Array | None = None, scatter: bool = False
) -> tuple[Array, Array]:
    """The same with sinks, one more logit for each entry of the last axis of lse, which counts once.

    ``scatter``: each rank gets its part of the tokens (axis 1) only, and less goes over the wire.
    """
    dtype = wide(lse.dtype)
    lse = lse.astype(dtype)
    top = jax.lax.pmax(finite_lse(lse), axis_name)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype).reshape((1,) * (lse.ndim - 1) + (-1,)), lse.shape)
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    weighed, weight = weigh(out, lse, top)
    both = jnp.concatenate([weighed, weight[..., None]], axis=-1)
    if scatter:
        both = jax.lax.psum_scatter(both, axis_name, scatter_dimension=1, tiled=True)
        start = jax.lax.axis_index(axis_name) * both.shape[1]
        top = jax.lax.dynamic_slice_in_dim(top, start, both.shape[1], axis=1)
    else:
        both = jax.lax.psum(both, axis_name)
    acc, total = both[..., :-1], both[..., -1]
    if sinks is not None:
        total = total + jnp.exp(sinks[:, : top.shape[1]] - top)  # the same for all tokens
    merged, lse = normalise(acc, total, top)
    return merged.astype(out.dtype), lse


def gather_tokens(tree: Any, axis_name: str, layout: Layout) -> Any:
    """Shards [B, L, ...] of all ranks as one sequence [B, C L, ...] in natural order, on every rank."""
    num_shards = jax.lax.axis_size(axis_name)

    def gather(x: Array) -> Array:
        whole = jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
        return take(whole, np.argsort(ring_order(whole.shape[1], layout, num_shards)), 1)

    return jax.tree.map(gather, tree)


def to_ranks_order(x: Array, axis_name: str, layout: Layout) -> Array:
    """A sequence [B, C L, ...] in natural order as the shards of rank 0, 1, ..., C-1 end to end."""
    return take(x, ring_order(x.shape[1], layout, jax.lax.axis_size(axis_name)), 1)
