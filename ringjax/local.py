"""A shard's work: how each axis shares the sequence, positions and mask, the schedule, then the ring."""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from . import _compat
from .arguments import Arrays, check_fits_shard, within_segments
from .config import AUTO, RingConfig
from .deal import Deal
from .exchange import Gather, HeadExchange
from .kernels.base import Kernel, KernelParams
from .layout import Layout, Runs
from .mask import Mask, Tokens, Vectors
from .planner import choose_strategy
from .ring import RingSpec, ring
from .schedule import Keys, Route, Schedule
from .sharing import Sharing, share

_INT32_MAX = 2**31 - 1
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call at trace time, complete: nothing below fills in a default."""

    axis_names: tuple[str, ...]  # of the sequence, outermost first
    strategies: tuple[str, ...]  # one word for each
    layout: Layout
    left: int | None
    right: int | None
    scale: float
    logits_soft_cap: float | None
    config: RingConfig
    kernel: Kernel
    unroll: int
    platform: str
    device_kind: str
    one_operation: bool  # what travels at the same time is sent in one
    interpreted: bool  # the kernel runs in Pallas' interpreter
    cycles: tuple[tuple[int, ...], ...] = ()  # of ranks, for config.rings of more than one
    # Of the whole sequences, where they were padded: what lies beyond is absent.
    query_length: int | None = None
    key_length: int | None = None
    # Promises about segments, see ring_attention: they leave out what travels and mask nothing.
    max_segment_length: int | None = None
    shared_length: tuple[int, ...] | None = None  # for each axis


def hops_per_iteration(config: RingConfig, axes: tuple[str, ...], inside: bool, platform: str) -> int:
    """Of the compiled loop, see RingConfig.unroll."""
    if config.unroll is not None:
        return config.unroll
    if inside and not set(axes) <= set(_compat.manual_axes()):
        # An axis of vmap. JAX cannot differentiate, outside the vmap, a custom_vjp rule with a collective in a loop.
        return max(jax.lax.axis_size(axis) for axis in axes)
    return 1 if platform == "cpu" else 2


def refuse_interpreter(call: Call) -> None:
    """Inside a shard_map: Pallas' interpreter mixes types, JAX 0.10 to 0.12."""
    if call.interpreted and _compat.checks_varying_axes():
        raise NotImplementedError(
            "config.implementation: Pallas' interpreter needs jax.shard_map(..., check_vma=False), or a call "
            f"outside shard_map. Got {call.config.implementation!r} interpreted under check_vma=True."
        )


def attend(call: Call, arrays: Arrays) -> tuple[Array, Array]:
    """Attention of this rank's queries to the whole sequence: output and log-sum-exp."""
    sizes = tuple(jax.lax.axis_size(name) for name in call.axis_names)
    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    _check_lengths(call, math.prod(sizes), q_length, k_length)
    arrays, axes = vary_alike(call, arrays)
    # Positions that only the run time knows say nothing of which keys are needed. What is promised of segments does: it
    # speaks of places in the order of the layout.
    left, right = (call.left, call.right) if arrays.q_positions is None else (None, None)
    left, right = within_segments(left, right, call.max_segment_length)
    words = _words(call, sizes, arrays)
    sharing = share(call.layout, sizes, words, q_length, k_length, left, right, call.shared_length)
    heads = _head_exchange(call, sharing, arrays)
    here = _exchanged(heads, arrays)
    named = zip(call.axis_names, sharing.words, strict=True)
    spec = ring_spec(
        call,
        sharing.schedule,
        axis_names=tuple(name for name, word in named if word == "ring"),
        gather=Gather(call.axis_names, tuple(word == "all_gather" for word in sharing.words), sharing.keys),
        routes=_routes(call) if sharing.several_ways else (Route(),),
    )
    mask = _shard_mask(call, sharing, here, axes)
    query = sharing.queries.merge(_by_shard(here.query, sharing.queries))
    result: Any = ring(spec, query, here.key, here.value, here.sinks, mask)
    out, lse = result
    if mask.queries.length is not None and here.q_lengths is not None:
        out = without_absent(out, mask.queries.length)
    if heads is None:
        return out, lse
    split = lambda x: sharing.queries.split(x).reshape(x.shape)  # noqa: E731
    return heads.back(split(out)), heads.back(split(lse)[..., None])[..., 0]


def _words(call: Call, sizes: tuple[int, ...], arrays: Arrays) -> tuple[str, ...]:
    """The strategy of each axis, as far as JAX can carry it out here."""
    # JAX cannot gather in the backward rule of a custom_vjp over an axis of vmap; there nothing is sent anyway.
    simulated = set(call.axis_names) - set(_compat.manual_axes())
    return tuple(
        "ring" if word == "all_gather" and name in simulated else word
        for word, name in zip(_chosen(call, sizes, arrays), call.axis_names, strict=True)
    )


def _routes(call: Call) -> tuple[Route, ...]:
    """All that a part of a block may take."""
    signs = (1, -1) if call.config.direction == "both" else (1,)
    return tuple(Route(sign, cycle) for cycle in call.cycles or (None,) for sign in signs)


def _head_exchange(call: Call, sharing: Sharing, arrays: Arrays) -> HeadExchange | None:
    found = [n for n, word in enumerate(sharing.words) if word == "all_to_all"]
    if not found:
        return None
    sizes, heads = tuple(sharing.queries.sizes[n] for n in found), arrays.query.shape[2]
    names = tuple(call.axis_names[n] for n in found)
    if heads % math.prod(sizes):
        raise ValueError(
            f"query: strategy 'all_to_all' over {', '.join(map(repr, names))} needs a number of heads that is a "
            f"multiple of {math.prod(sizes)}, the devices on these axes. Got N = {heads}."
        )
    return HeadExchange(names, sizes, heads, arrays.key.shape[2])


def _chosen(call: Call, sizes: tuple[int, ...], arrays: Arrays) -> tuple[str, ...]:
    """The words of the call, or those that the planner would take."""
    if AUTO not in call.strategies:
        return call.strategies
    (batch, query_length, num_heads, head_size), (key_length, num_kv_heads, value_size) = (
        arrays.query.shape,
        arrays.value.shape[1:],
    )
    return choose_strategy(
        axis_sizes=sizes,
        platform=call.platform,
        device_kind=call.device_kind,
        query_length=query_length,
        key_length=key_length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        value_size=value_size,
        itemsize=arrays.query.dtype.itemsize,
        batch=batch,
        is_causal=False,
        window=within_segments(call.left, call.right, call.max_segment_length),
        layout=call.layout,
        direction=call.config.direction,
    )


def _exchanged(heads: HeadExchange | None, arrays: Arrays) -> Arrays:
    """What this device has once tokens are exchanged for heads; the keys not yet in order."""
    if heads is None:
        return arrays
    tokens = lambda x: None if x is None else heads.tokens(x)  # noqa: E731
    return arrays._replace(
        query=heads.queries(arrays.query),
        key=heads.keys(arrays.key),
        value=heads.keys(arrays.value),
        sinks=None if arrays.sinks is None else heads.sinks(arrays.sinks),
        q_positions=tokens(arrays.q_positions),
        kv_positions=tokens(arrays.kv_positions),
        q_segments=tokens(arrays.q_segments),
        kv_segments=tokens(arrays.kv_segments),
    )


def without_absent(out: Array, present: Array) -> Array:
    """The output of an absent query is 0 whatever the arrays are: its cotangent, even NaN, reaches nothing."""
    there = jnp.arange(out.shape[1], dtype=jnp.int32)[None] < present[:, None]
    return jnp.where(there[:, :, None, None], out, jax.lax.stop_gradient(out))


def vary_alike(call: Call, tree: T) -> tuple[T, frozenset[str]]:
    """One type for all under check_vma: the gradient of what is replicated is then summed by JAX itself."""
    # An axis of vmap is no mesh axis, and nothing is typed by it.
    axes = frozenset(call.axis_names).intersection(_compat.manual_axes() if _compat.checks_varying_axes() else ())
    axes = axes.union(*(_compat.varying_axes(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _compat.vary_over(x, axes), tree), axes


def _is_one_hop(schedule: Schedule | None) -> bool:
    return schedule is None or (len(schedule.hops) == 1 and _is_one_hop(schedule.hops[0].inner))


def ring_spec(
    call: Call, schedule: Schedule | None, *, axis_names: tuple[str, ...], gather: Gather, routes: tuple[Route, ...]
) -> RingSpec:
    config = call.config
    return RingSpec(
        axis_names=axis_names,
        schedule=schedule,
        gather=gather,
        routes=routes,
        kernel=call.kernel,
        params=KernelParams(
            scale=call.scale,
            logits_soft_cap=call.logits_soft_cap,
            block_q=config.block_q,
            block_kv=config.block_kv,
            device_kind=call.device_kind,
            interpret=config.interpret,
            deterministic=config.deterministic,
            dkv_final=not any(gather.gathered) and _is_one_hop(schedule),
        ),
        unroll=call.unroll,
        dkv_dtype=config.dkv_dtype,
        # An axis of vmap sends nothing.
        one_operation=call.one_operation and set(axis_names) <= set(_compat.manual_axes()),
    )


def _check_lengths(call: Call, num_shards: int, q_length: int, k_length: int) -> None:
    unit = call.layout.shard_unit()
    for name, length in (("query", q_length), ("key", k_length)):
        if length % unit:
            raise ValueError(
                f"{name}: the length of a shard must be a multiple of {unit} for {call.layout}. Got {length}."
            )
        if length * num_shards > _INT32_MAX:
            raise NotImplementedError(
                f"{name}: the whole sequence must be shorter than 2^31 tokens, whose positions are int32. "
                f"Got {num_shards} shards of {length}."
            )
    check_fits_shard(call.shared_length, max(q_length, k_length))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "travels", "key_lengths"),
    meta_fields=("deal", "left", "right", "axes"),
)
@dataclasses.dataclass(frozen=True)
class ShardMask:
    """The mask of this rank's queries. That of a block follows from whose block it is."""

    queries: Tokens
    travels: Vectors  # positions that the user gave, and segments, of the keys
    key_lengths: Int32[Array, " B1"] | None  # of the whole sequences; None: every key is present
    deal: Deal  # of the keys
    left: int | None
    right: int | None
    axes: frozenset[str]  # that everything varies over under check_vma

    def between(self, owner: tuple[Any, ...], arrived: Vectors, keys: Keys | None) -> Mask:
        """The mask between the own queries and the block of the device at ``owner``, or these of its keys."""
        bounded = self.left is not None or self.right is not None
        where = _where(self.deal, owner)
        if keys is not None:
            where = where.part(*keys) if isinstance(where, Runs) else where[:, keys[0] : keys[1]]
        return Mask(
            queries=self.queries,
            keys=_typed(
                Tokens(
                    positions=arrived.positions if arrived.positions is not None or not bounded else where,
                    segments=arrived.segments,
                    length=None if self.key_lengths is None else _count_below(where, self.key_lengths),
                ),
                self.axes,
            ),
            left=self.left,
            right=self.right,
        )


def _where(deal: Deal, place: tuple[Any, ...]) -> Runs | Array:
    """Positions of the tokens of the device at ``place``; ascending, so that absent ones are the last."""
    runs = deal.runs(place)
    return deal.positions(place) if runs is None else runs


def _count_below(where: Runs | Array, lengths: Array) -> Array:
    """How many of the tokens are present."""
    if isinstance(where, Runs):
        return where.count_below(lengths)
    return jnp.sum(where < lengths[:, None], axis=1, dtype=jnp.int32)


def _typed(tree: T, axes: frozenset[str]) -> T:
    return jax.tree.map(lambda x: _compat.vary_over(jnp.asarray(x, jnp.int32), axes), tree)


def _shard_mask(call: Call, sharing: Sharing, arrays: Arrays, axes: frozenset[str]) -> ShardMask:
    left, right = call.left, call.right
    queries, keys = sharing.queries, sharing.keys
    if arrays.q_positions is None:  # a bound that no distance can exceed is no bound
        total = queries.num_ranks * max(queries.shard_length, keys.shard_length)
        left, right = (None if bound is None or bound >= total else bound for bound in (left, right))
    place = tuple(
        jax.lax.axis_index(name) for name, merged in zip(call.axis_names, queries.merged, strict=True) if not merged
    )
    where = _where(queries, place)
    bounded = left is not None or right is not None
    q_lengths = _shorter(arrays.q_lengths, call.query_length)
    in_order = lambda x: None if x is None else queries.merge(_by_shard(x, queries))  # noqa: E731
    mask = ShardMask(
        queries=Tokens(
            positions=None if not bounded else where if arrays.q_positions is None else in_order(arrays.q_positions),
            segments=in_order(arrays.q_segments),
            length=None if q_lengths is None else _count_below(where, q_lengths),
        ),
        travels=Vectors(arrays.kv_positions if bounded else None, arrays.kv_segments),
        key_lengths=_shorter(arrays.kv_lengths, call.key_length),
        deal=keys,
        left=left,
        right=right,
        axes=axes,
    )
    return _typed(mask, axes)


def _by_shard(x: Array, deal: Deal) -> Array:
    """[B, L', ...], shard after shard, to [B, shards, L, ...]."""
    return x.reshape(x.shape[0], deal.num_merged, deal.shard_length, *x.shape[2:])


def _shorter(lengths: Int32[Array, " B"] | None, length: int | None) -> Int32[Array, " B1"] | None:
    """The lengths given, and at most that before padding. None: nothing is absent."""
    if length is None:
        return lengths
    return jnp.full((1,), length, jnp.int32) if lengths is None else jnp.minimum(lengths, length)
