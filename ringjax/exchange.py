"""Collectives around a shard's attention: keys are gathered, tokens exchanged for heads, results merged. No kernels.

Gathering the keys of an axis brings those of all its ranks to each (:class:`Gather`); their gradients are summed and go
home in one reduce-scatter, as wide as they were computed. Exchanging tokens for heads gives each rank of an axis the
tokens of all and its share of the heads (:class:`HeadExchange`; Jacobs et al. 2023, arXiv:2309.14509).

In decoding each rank attends to its own keys. The results over all keys follow from these and their log-sum-exps, by
one maximum and one sum over the axis, or if they are few by one sum; see :mod:`ringjax.partial`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._compat import axis_is_bound, take
from .deal import Deal
from .layout import Layout, ring_order
from .partial import combine, finite_lse, normalise, weigh, wide


@dataclasses.dataclass(frozen=True)
class Gather:
    """Brings the keys of some axes together.

    Attributes:
      axis_names: of the sequence, outermost first.
      gathered: for each, whether keys are gathered over it.
      deal: of the keys afterwards; None: there is nothing to gather or to merge, and nothing is done.
    """

    axis_names: tuple[str, ...] = ()
    gathered: tuple[bool, ...] = ()
    deal: Deal | None = None

    def collect(self, tree: Any) -> Any:
        """Every array [B, L', ...] with the keys of all ranks of these axes, in the order of their positions.

        L' has already the shards of other axes that :class:`HeadExchange` has brought here, rank after rank.
        """
        if self.deal is None:
            return tree
        return jax.tree.map(self._collect, tree)

    def scatter(self, tree: Any) -> Any:
        """The transpose of collect: sums over the ranks, and each gets those of its own keys."""
        if self.deal is None:
            return tree
        return jax.tree.map(self._scatter, tree)

    def cuts(self, length: int, parts: int) -> list[tuple[int, int]]:
        """A block of so many keys in parts: each within one run of positions, or of whole runs."""
        runs = None if self.deal is None else self.deal.runs((0,) * len(self.deal.ring_sizes))
        run = length if runs is None else runs.run
        count = -(-length // run)
        if count >= parts:
            edges = [part * count // parts * run for part in range(parts)]
        else:
            edges = []
            for number in range(count):  # so many parts of this run
                start, size = number * run, min(run, length - number * run)
                pieces = (number + 1) * parts // count - number * parts // count
                tile = 128 if size >= 128 * pieces else 1
                edges += [start + piece * size // pieces // tile * tile for piece in range(pieces)]
        return list(zip(edges, [*edges[1:], length], strict=True))

    def _collect(self, x: Array) -> Array:
        assert self.deal is not None
        x = x.reshape(x.shape[0], *self._sizes(brought=True), self.deal.shard_length, *x.shape[2:])
        for place, name in self._places():
            x = jax.lax.all_gather(x, name, axis=place)
        x = x.reshape(x.shape[0], self.deal.num_merged, *x.shape[1 + len(self._sizes()) :])
        return self.deal.merge(x)

    def _scatter(self, x: Array) -> Array:
        assert self.deal is not None
        x = self.deal.split(x)
        x = x.reshape(x.shape[0], *self._sizes(), *x.shape[2:])
        for place, name in reversed(self._places()):
            x = jax.lax.psum_scatter(x, name, scatter_dimension=place)
        return x.reshape(x.shape[0], -1, *x.shape[2 + len(self._sizes(brought=True)) :])

    def _sizes(self, *, brought: bool = False) -> tuple[int, ...]:
        """Of the axes whose shards are merged; or of those only whose shards are here already."""
        assert self.deal is not None
        each = zip(self.deal.sizes, self.deal.merged, self.gathered, strict=True)
        return tuple(size for size, merged, gathered in each if merged and not (brought and gathered))

    def _places(self) -> list[tuple[int, str]]:
        """Dimension and name of the gathered axes, in order."""
        assert self.deal is not None
        merged = [n for n, merged in enumerate(self.deal.merged) if merged]
        return [(1 + place, self.axis_names[n]) for place, n in enumerate(merged) if self.gathered[n]]


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """Exchanges the tokens of some axes for heads.

    A rank of an axis of c gets N / c of the query heads and the K/V heads that these use: K / c of them, or fewer
    different ones where c does not divide K. With g = gcd(K, c) the heads are g groups, each of c / g ranks, which
    share its K / g K/V heads and have a part each of the query heads of every one.

    Attributes:
      axis_names: of the exchanged axes, outermost first.
      sizes: of these axes.
      num_heads, num_kv_heads: N and K before the exchange; N is a multiple of the product of the sizes.
    """

    axis_names: tuple[str, ...]
    sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int

    def queries(self, x: Float[Array, "B L N H"]) -> Float[Array, "B ranks*L n H"]:
        """This rank's heads of the tokens of all ranks, rank after rank."""
        return self._by_head(x, lambda heads, x: heads.queries_by_rank(x, axis=-2))

    def keys(self, x: Float[Array, "B L K H"]) -> Float[Array, "B ranks*L k H"]:
        """The K/V heads that they use."""
        return self._by_head(x, lambda heads, x: heads.keys_by_rank(x))

    def back(self, x: Float[Array, "B ranks*L n H"]) -> Float[Array, "B L N H"]:
        """The inverse of queries: all heads of this rank's tokens."""
        x = x.reshape(x.shape[0], *self.sizes, x.shape[1] // math.prod(self.sizes), *x.shape[2:])
        for place, (name, heads) in reversed(
            list(enumerate(zip(self.axis_names, self._heads(), strict=True), start=1))
        ):
            x = jax.lax.all_to_all(x, name, split_axis=place, concat_axis=x.ndim - 2, tiled=True)
            x = heads.queries_together(jnp.squeeze(x, place))
        return x

    def _by_head(self, x: Array, by_rank: Callable[["_Heads", Array], Array]) -> Array:
        for place, (name, heads) in enumerate(zip(self.axis_names, self._heads(), strict=True), start=1):
            x = jnp.expand_dims(by_rank(heads, x), place)
            # Tiled: the transpose of the other form mixes up its axes, JAX 0.10 to 0.12.
            x = jax.lax.all_to_all(x, name, split_axis=x.ndim - 2, concat_axis=place, tiled=True)
        return x.reshape(x.shape[0], -1, *x.shape[-2:])

    def sinks(self, x: Float[Array, " N"]) -> Float[Array, " n"]:
        """Those of this rank's heads."""
        for name, heads in zip(self.axis_names, self._heads(), strict=True):
            x = heads.queries_by_rank(x, axis=0)
            here = x.shape[0] // heads.num_ranks
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * here, here)
        return x

    def tokens(self, x: Array) -> Array:
        """[B, L], the same for all heads, to [B, ranks*L]."""
        for place, name in enumerate(self.axis_names):
            x = jax.lax.all_gather(x, name, axis=1 + place)
        return x.reshape(x.shape[0], -1)

    def _heads(self) -> list["_Heads"]:
        """The split over each axis in turn."""
        found, num_heads, num_kv_heads = [], self.num_heads, self.num_kv_heads
        for size in self.sizes:
            shared = math.gcd(num_kv_heads, size)
            found.append(_Heads(shared, size // shared, num_kv_heads // shared, num_heads // num_kv_heads))
            num_heads, num_kv_heads = num_heads // size, num_kv_heads // shared
        return found


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Heads as they are dealt to the ranks of one axis; see :class:`HeadExchange`."""

    groups: int  # g
    ranks: int  # c / g of a group, which need the same K/V heads
    kv_heads: int  # K / g of a group
    per_kv_head: int  # query heads N / K of a K/V head

    @property
    def num_ranks(self) -> int:
        """c."""
        return self.groups * self.ranks

    def queries_by_rank(self, x: Array, axis: int) -> Array:
        """Query heads along ``axis``, N / c of each rank after those of the one before."""
        axis %= x.ndim
        before, after, part = x.shape[:axis], x.shape[axis + 1 :], self.per_kv_head // self.ranks
        x = x.reshape(*before, self.groups, self.kv_heads, self.ranks, part, *after)
        return jnp.swapaxes(x, axis + 1, axis + 2).reshape(*before, -1, *after)

    def queries_together(self, x: Array) -> Array:
        """The inverse, of [..., N, H]."""
        before, size, part = x.shape[:-2], x.shape[-1], self.per_kv_head // self.ranks
        x = x.reshape(*before, self.groups, self.ranks, self.kv_heads, part, size)
        return jnp.swapaxes(x, -4, -3).reshape(*before, -1, size)

    def keys_by_rank(self, x: Array) -> Array:
        """[..., K, H] to [..., c K / g, H]: those that each rank needs after those of the one before."""
        before, size = x.shape[:-2], x.shape[-1]
        x = x.reshape(*before, self.groups, self.kv_heads, size)
        if self.ranks > 1:
            x = _copies(x, x.ndim - 2, self.ranks)
        return x.reshape(*before, -1, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(x: Array, axis: int, count: int) -> Array:
    """``count`` times the same along a new axis. Its gradient is summed in float32."""
    return jnp.repeat(jnp.expand_dims(x, axis), count, axis=axis)


def _copies_fwd(x: Array, axis: int, count: int) -> tuple[Array, None]:
    return _copies(x, axis, count), None


def _copies_bwd(axis: int, count: int, residuals: None, cotangent: Array) -> tuple[Array]:
    del count, residuals  # Unused.
    return (jnp.sum(cotangent.astype(wide(cotangent.dtype)), axis=axis).astype(cotangent.dtype),)


_copies.defvjp(_copies_fwd, _copies_bwd)


def merge_over_axis(
    out: Float[Array, "*b H"], lse: Float[Array, "*b"], axis_name: str
) -> tuple[Float[Array, "*b H"], Float[Array, "*b"]]:
    r"""Combine attention over disjoint sets of keys, one on each rank of a mesh axis, inside ``shard_map``.

    .. math::  lse = \log \sum_r \exp(lse_r), \quad out = \sum_r \exp(lse_r - lse) \, out_r

    Differentiable in both. Rows that attend to nothing on any rank (all lse -inf) give 0 and -inf, with zero gradients.
    One maximum of b float32 numbers and one sum of b (H + 1) go over the axis; or, if all ranks have at most 131,072 of
    these together, one sum with a place for each rank's. The result is the same on every rank, and so typed under
    ``check_vma``.

    Args:
      out, lse: [..., H] and [...] of this rank, as ``ring_attention(..., return_residual=True)`` returns.
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


# Numbers of all ranks, in the wide dtype, up to which one collective is taken to be faster than two. Timed with 8,256.
_FEW = 2**17


def merge_ranks(
    out: Array, lse: Array, axis_name: str, *, sinks: Array | None = None, scatter: bool = False
) -> tuple[Array, Array]:
    """The same with sinks, one more logit for each entry of the last axis of lse, which counts once.

    ``scatter``: each rank gets its part of the tokens (axis 1) only, and less goes over the wire.
    """
    dtype = wide(lse.dtype)
    lse = lse.astype(dtype)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype).reshape((1,) * (lse.ndim - 1) + (-1,)), lse.shape)
    ranks = jax.lax.axis_size(axis_name)
    if not scatter and ranks * (out.size + lse.size) <= _FEW:
        both = jnp.concatenate([out.astype(dtype), lse[..., None]], axis=-1)
        here = jnp.arange(ranks).reshape(-1, *(1,) * both.ndim) == jax.lax.axis_index(axis_name)
        # Not an all_gather: one whose result is the same on every rank cannot be vmapped before JAX 0.12.
        every = jax.lax.psum(jnp.where(here, both[None], 0), axis_name)
        merged, lse = combine(every[..., :-1], every[..., -1], sinks)
        return merged.astype(out.dtype), lse
    top = jax.lax.pmax(finite_lse(lse), axis_name)
    if sinks is not None:
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
