"""A shard's work with a cache: writes the new tokens that it owns, attends to its part of what is cached.

The cache lies over the ring as a sequence does, in a layout. Queries stand at the end of what is cached: query t of a
row of n tokens, the last m of which are its queries, has position n - m + t. A cache that rolls has S slots for a
window: the token at p lies in slot p mod S, where the one S before it lay.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from . import _compat
from .exchange import Gather, gather_tokens, merge_ranks, to_ranks_order
from .layout import Layout, Runs
from .local import Call, ring_spec, vary_alike, without_absent
from .mask import Mask, Tokens
from .ring import ring
from .schedule import Route, Schedule

# How the queries meet the cache, see ringjax.cached_attention.
Way = Literal["merge", "queries", "keys"]
_NOWHERE = 2**31 - 1  # a position that no query reaches


class Cached(NamedTuple):
    """The arrays of one call, on one rank."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K Hv"]
    lengths: Int32[Array, " B"]  # tokens that each row has, the new ones included
    counts: Int32[Array, " B"] | None  # how many of them are queries; None: all T
    sinks: Float[Array, " N"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "lengths"),
    meta_fields=("layout", "num_shards", "shard_length", "left", "bounded", "rolls", "axes"),
)
@dataclasses.dataclass(frozen=True)
class CacheMask:
    """The mask of this rank's queries; see :class:`ringjax.ring.ShardMask`. Nothing of it travels."""

    queries: Tokens
    lengths: Int32[Array, " B"]
    layout: Layout
    num_shards: int
    shard_length: int
    left: int | None
    bounded: bool  # some query does not attend to all that is cached
    rolls: bool
    axes: frozenset[str]

    @property
    def travels(self) -> None:
        return None

    def between(self, owner: tuple[Array, ...], arrived: None, keys: None) -> Mask:
        del arrived, keys  # Unused: blocks travel whole.
        (rank,) = owner
        runs = self.layout.runs(rank, self.shard_length, self.num_shards)
        if self.rolls:
            slots = runs.at(jnp.arange(self.shard_length, dtype=jnp.int32))[None]
            there = Tokens(positions=_last_in_slot(slots, self.lengths[:, None], self.shard_length * self.num_shards))
        else:
            there = Tokens(positions=runs if self.bounded else None, length=runs.count_below(self.lengths))
        right = 0 if self.bounded else None
        return Mask(queries=self.queries, keys=_typed(there, self.axes), left=self.left, right=right)


def _last_in_slot(slots: Array, lengths: Array, capacity: int) -> Array:
    """Position of the token that a slot of a cache that rolls holds."""
    last = lengths - 1
    position = last - jnp.mod(last - slots, capacity)
    return jnp.where(position < 0, jnp.int32(_NOWHERE), position)


def _typed(tree: Any, axes: frozenset[str]) -> Any:
    return jax.tree.map(lambda x: _compat.vary_over(jnp.asarray(x, jnp.int32), axes), tree)


def attend_cached(call: Call, way: Way, cached: Cached, *, rolls: bool) -> tuple[Array, Array]:
    """Attention to all that is cached, and its log-sum-exp; of this rank's queries, or of all if they are merged."""
    (axis,) = call.axis_names
    layout, num_shards = call.layout, jax.lax.axis_size(axis)
    # Tokens beyond the capacity were written nowhere: their rows must show it.
    lost = cached.lengths > cached.key.shape[1] * num_shards
    sinks = cached.sinks  # of the ring's kernels on a rank of its own, of the merge on all alike
    cached, axes = vary_alike(call, cached)
    query, key, value, lengths, counts, _ = cached
    if way == "queries":
        query = gather_tokens(query, axis, layout)
    total = query.shape[1] * (num_shards if way == "keys" else 1)
    if counts is None:
        counts = jnp.full_like(lengths, total)
    # Of the queries among themselves; they stand in a row where they are whole.
    runs = Runs(base=0, step=total, run=total, length=total)
    if way == "keys":
        runs = layout.runs(jax.lax.axis_index(axis), query.shape[1], num_shards)
    present = runs.count_below(counts)
    bounded = total > 1 or call.left is not None or rolls
    positions = dataclasses.replace(runs, base=(lengths - counts)[:, None] + runs.base) if bounded else None
    mask = CacheMask(
        queries=_typed(Tokens(positions=positions, length=present), axes),
        lengths=lengths,
        layout=layout,
        num_shards=num_shards,
        shard_length=key.shape[1],
        left=call.left,
        bounded=bounded,
        rolls=rolls,
        axes=axes,
    )
    offsets = tuple(range(num_shards)) if way == "keys" else (0,)
    spec = ring_spec(call, Schedule(num_shards, (offsets,)), axis_names=(axis,), gather=Gather(), routes=(Route(),))
    result: Any = ring(spec, query, key, value, cached.sinks if way == "keys" else None, mask)
    out, lse = result
    out = without_absent(out, present)
    if way == "queries":
        out, lse = (to_ranks_order(x, axis, layout) for x in (out, lse))
    if way != "keys":
        out, lse = merge_ranks(out, lse, axis, sinks=sinks, scatter=way == "queries")
    if rolls:
        return out, lse
    lost = lost[:, None, None]
    return jnp.where(lost[..., None], jnp.nan, out), jnp.where(lost, jnp.nan, lse)


class Shards(NamedTuple):
    """Keys and values of one rank's part of a cache, or new ones."""

    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K Hv"]


def append_shard(
    here: Shards,
    new: Shards,
    lengths: Int32[Array, " B"],
    counts: Int32[Array, " B"] | None,
    *,
    axis_name: str,
    layout: Layout,
    rolls: bool,
    dealt: bool,
) -> Shards:
    """Writes those of the new tokens that this rank owns behind the ``lengths`` that there are.

    Args:
      new: the same on every rank; or with ``dealt`` this rank's part, dealt as the layout deals a sequence.
      counts: how many of them each row takes; None: all.
    """
    if dealt:
        new = gather_tokens(new, axis_name, layout)
    num_shards, length = jax.lax.axis_size(axis_name), here.key.shape[1]
    offset = jnp.arange(new.key.shape[1], dtype=jnp.int32)[None]
    position = lengths[:, None] + offset
    slot = jnp.mod(position, num_shards * length) if rolls else position
    index = layout.runs(jax.lax.axis_index(axis_name), length, num_shards).find(slot)
    if counts is not None:
        index = jnp.where(offset < counts[:, None], index, length)
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    write = lambda x, y: x.at[rows, index].set(y.astype(x.dtype), mode="drop")  # noqa: E731  at ``length``: nowhere
    return jax.tree.map(write, here, new)


def fill_shard(
    here: Shards, new: Shards, lengths: Int32[Array, " B"], *, axis_name: str, layout: Layout, rolls: bool
) -> Shards:
    """Writes a prompt into an empty cache: each rank its own part, in place, since both are dealt alike."""
    length, given = here.key.shape[1], new.key.shape[1]
    if not rolls:
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), 0, axis=1)  # noqa: E731
        return jax.tree.map(put, here, new)
    # Slot j takes the last token of the row whose index is j modulo the slots.
    runs = layout.runs(jax.lax.axis_index(axis_name), given, jax.lax.axis_size(axis_name))
    last = runs.count_below(lengths)[:, None] - 1
    index = last - jnp.mod(last - jnp.arange(length, dtype=jnp.int32)[None], length)
    index = jnp.where(index < 0, 0, index)[:, :, None, None]
    return jax.tree.map(lambda x, y: jnp.take_along_axis(y, index, axis=1).astype(x.dtype), here, new)
