"""A shard's work: its positions and mask, the schedule, then the ring."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from . import _compat
from .arguments import Arrays
from .config import RingConfig
from .kernels.base import Kernel, KernelParams
from .layout import Layout
from .mask import Mask, Tokens, Vectors
from .ring import RingSpec, ring
from .schedule import Schedule, plan

_INT32_MAX = 2**31 - 1
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call at trace time, complete: nothing below fills in a default."""

    axis_name: str
    layout: Layout
    left: int | None
    right: int | None
    scale: float
    logits_soft_cap: float | None
    config: RingConfig
    kernel: Kernel
    unroll: int
    device_kind: str
    interpreted: bool  # the kernel runs in Pallas' interpreter
    # Of the whole sequences, where they were padded: what lies beyond is absent.
    query_length: int | None = None
    key_length: int | None = None


def hops_per_iteration(config: RingConfig, axis: str, inside: bool, platform: str) -> int:
    """Of the compiled loop, see RingConfig.unroll."""
    if config.unroll is not None:
        return config.unroll
    if inside and axis not in _compat.manual_axes():
        # An axis of vmap. JAX cannot differentiate, outside the vmap, a custom_vjp rule with a collective in a loop.
        return jax.lax.axis_size(axis)
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
    num_shards = jax.lax.axis_size(call.axis_name)
    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    _check_lengths(call.layout, num_shards, q_length, k_length)
    arrays, axes = vary_alike(call, arrays)
    # Positions that only the run time knows say nothing of which hops are needed.
    static = call.layout if arrays.q_positions is None else None
    schedule = plan(
        num_shards, static, q_length, k_length, left=call.left, right=call.right, direction=call.config.direction
    )
    spec = ring_spec(call, schedule)
    mask = _shard_mask(call, arrays, num_shards, axes)
    result: Any = ring(spec, arrays.query, arrays.key, arrays.value, arrays.sinks, mask)
    out, lse = result
    if mask.queries.length is None or arrays.q_lengths is None:
        return out, lse
    return without_absent(out, mask.queries.length), lse


def without_absent(out: Array, present: Array) -> Array:
    """The output of an absent query is 0 whatever the arrays are: its cotangent, even NaN, reaches nothing."""
    there = jnp.arange(out.shape[1], dtype=jnp.int32)[None] < present[:, None]
    return jnp.where(there[:, :, None, None], out, jax.lax.stop_gradient(out))


def vary_alike(call: Call, tree: T) -> tuple[T, frozenset[str]]:
    """One type for all under check_vma: the gradient of what is replicated is then summed by JAX itself."""
    # An axis of vmap is no mesh axis, and nothing is typed by it.
    axes = frozenset({call.axis_name}).intersection(_compat.manual_axes() if _compat.checks_varying_axes() else ())
    axes = axes.union(*(_compat.varying_axes(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _compat.vary_over(x, axes), tree), axes


def ring_spec(call: Call, schedule: Schedule) -> RingSpec:
    config = call.config
    return RingSpec(
        axis_name=call.axis_name,
        schedule=schedule,
        kernel=call.kernel,
        params=KernelParams(
            scale=call.scale,
            logits_soft_cap=call.logits_soft_cap,
            block_q=config.block_q,
            block_kv=config.block_kv,
            device_kind=call.device_kind,
            interpret=config.interpret,
            deterministic=config.deterministic,
        ),
        unroll=call.unroll,
        dkv_dtype=config.dkv_dtype,
    )


def _check_lengths(layout: Layout, num_shards: int, q_length: int, k_length: int) -> None:
    unit = layout.shard_unit()
    for name, length in (("query", q_length), ("key", k_length)):
        if length % unit:
            raise ValueError(f"{name}: the length of a shard must be a multiple of {unit} for {layout}. Got {length}.")
        if length * num_shards > _INT32_MAX:
            raise NotImplementedError(
                f"{name}: the whole sequence must be shorter than 2^31 tokens, whose positions are int32. "
                f"Got {num_shards} shards of {length}."
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "travels", "key_lengths"),
    meta_fields=("layout", "num_shards", "shard_length", "left", "right", "axes"),
)
@dataclasses.dataclass(frozen=True)
class ShardMask:
    """The mask of this rank's queries. That of a block follows from whose block it is."""

    queries: Tokens
    travels: Vectors  # positions that the user gave, and segments, of the keys
    key_lengths: Int32[Array, " B1"] | None  # of the whole sequences; None: every key is present
    layout: Layout
    num_shards: int
    shard_length: int  # of the keys
    left: int | None
    right: int | None
    axes: frozenset[str]  # that everything varies over under check_vma

    def between(self, owner: Array, arrived: Vectors) -> Mask:
        """The mask between the own queries and the block of rank ``owner``."""
        runs = self.layout.runs(owner, self.shard_length, self.num_shards)
        bounded = self.left is not None or self.right is not None
        keys = Tokens(
            positions=arrived.positions if arrived.positions is not None or not bounded else runs,
            segments=arrived.segments,
            length=None if self.key_lengths is None else runs.count_below(self.key_lengths),
        )
        return Mask(queries=self.queries, keys=self._typed(keys), left=self.left, right=self.right)

    def _typed(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: _compat.vary_over(jnp.asarray(x, jnp.int32), self.axes), tree)


def _shard_mask(call: Call, arrays: Arrays, num_shards: int, axes: frozenset[str]) -> ShardMask:
    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    left, right = call.left, call.right
    if arrays.q_positions is None:  # a bound that no distance can exceed is no bound
        total = num_shards * max(q_length, k_length)
        left, right = (None if bound is None or bound >= total else bound for bound in (left, right))
    runs = call.layout.runs(jax.lax.axis_index(call.axis_name), q_length, num_shards)
    bounded = left is not None or right is not None
    q_lengths = _shorter(arrays.q_lengths, call.query_length)
    queries = Tokens(
        positions=None if not bounded else runs if arrays.q_positions is None else arrays.q_positions,
        segments=arrays.q_segments,
        length=None if q_lengths is None else runs.count_below(q_lengths),
    )
    mask = ShardMask(
        queries=queries,
        travels=Vectors(arrays.kv_positions if bounded else None, arrays.kv_segments),
        key_lengths=_shorter(arrays.kv_lengths, call.key_length),
        layout=call.layout,
        num_shards=num_shards,
        shard_length=k_length,
        left=left,
        right=right,
        axes=axes,
    )
    return mask._typed(mask)


def _shorter(lengths: Int32[Array, " B"] | None, length: int | None) -> Int32[Array, " B1"] | None:
    """The lengths given, and at most that before padding. None: nothing is absent."""
    if length is None:
        return lengths
    return jnp.full((1,), length, jnp.int32) if lengths is None else jnp.minimum(lengths, length)
