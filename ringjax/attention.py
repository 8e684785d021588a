"""ring_attention: checks the call, fills in defaults, pads, wraps in shard_map and picks the block kernel."""

from typing import Any, Literal, TypedDict, Unpack, overload

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import _compat
from .arguments import (
    Arrays,
    axes_are_manual,
    check_arrays,
    check_axis_names,
    check_max_segment_length,
    check_scale,
    check_shared_length,
    check_soft_cap,
    check_strategies,
    check_window,
)
from .config import RingConfig
from .kernels.choose import choose, interprets, wants_one_operation
from .layout import Layout, as_layout
from .local import Call, attend, hops_per_iteration, refuse_interpreter
from .promises import Promise, hold_against
from .sharded import AxisNames, find_mesh, ring_cycles, sharded, target_of

IntPair = Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]]


class RingOptions(TypedDict, total=False):
    """Options of a call, as :func:`ringjax.ring_attention` documents them; the result's type depends on none of them.

    For functions that pass them on: ``def attend(q, k, v, **options: Unpack[RingOptions])``.
    """

    axis_name: str | tuple[str, ...]
    mesh: Mesh | AbstractMesh | None
    batch_axis_name: AxisNames | None
    head_axis_name: AxisNames | None
    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None
    query_seq_lengths: Int[Array, " B"] | None
    key_value_seq_lengths: Int[Array, " B"] | None
    segment_ids: IntPair | None
    max_segment_length: int | None
    shared_length: int | tuple[int, ...] | None
    positions: IntPair | None
    layout: str | Layout
    logits_soft_cap: float | None
    sinks: Float[Array, " N"] | None
    config: RingConfig


@overload
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[RingOptions],
) -> Float[Array, "B T N Hv"]: ...


@overload
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    return_residual: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]: ...


@overload
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    return_residual: bool,
    **options: Unpack[RingOptions],
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]: ...


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    axis_name: str | tuple[str, ...] = "sp",
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis_name: AxisNames | None = None,
    head_axis_name: AxisNames | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    segment_ids: IntPair | None = None,
    max_segment_length: int | None = None,
    shared_length: int | tuple[int, ...] | None = None,
    positions: IntPair | None = None,
    layout: str | Layout = "contiguous",
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_residual: bool = False,
    config: RingConfig = RingConfig(),  # noqa: B008  frozen
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    r"""Exact attention over a sequence that is sharded over the devices of a ring.

    .. math::  out = softmax(mask(cap(scale \cdot Q K^T))) V,   cap(x) = c \tanh(x / c) \text{ if a soft cap is given}

    One function inside and outside ``shard_map``. Inside (or under ``vmap(axis_name=...)``) the arrays are this
    device's shards; outside they are whole, of any length, and the call pads and shards them itself (padding gathers
    them: a length that the layout divides evenly needs none and less memory). Arrays are in the ring order of
    ``layout`` and nothing is permuted: bring tokens into it once with :func:`to_ring_order`.

    Shapes: B batch, T query length, S key length, N query heads, K key/value heads (N a multiple of K; query head n
    uses K/V head n // (N / K)), H head size, Hv value head size.

    Args:
      query, key, value: float32, bfloat16, float16 or float64, all the same. Sums are in float32 (float64 for float64).
        The error is at most about twice that of dense attention in the same dtype, also where all logits share an
        offset; but the fused kernels round the gradient of 16-bit logits to 16 bits, as FlashAttention does, and what
        keys have in common is multiplied by that.
      axis_name: mesh axis of the sequence, or several, outermost first: the layout deals tokens over all their devices,
        row-major. What each axis does with its part is ``config.strategy``.
      mesh: the mesh, outside ``shard_map``; None takes that of the context (``jax.set_mesh``).
      batch_axis_name, head_axis_name: mesh axes that shard batch and heads, outside ``shard_map`` only. On Explicit
        axes they are read off the sharding of the inputs. One K/V head is kept whole where heads are sharded.
      scale: factor on q.k; None is 1 / sqrt(H).
      is_causal: a query attends to keys at its own position and before. Both sides count from 0, as in
        :func:`jax.nn.dot_product_attention`: with T < S the first query stands at position 0, not at S - T. To align
        the queries with the end of the keys give ``positions``, see below.
      local_window_size: a sliding window, w or (left, right): a query at p attends to keys in [p - left, p + right];
        int w is (w, w), None in a pair is unbounded. As in :func:`jax.nn.dot_product_attention`.
      query_seq_lengths, key_value_seq_lengths: int [B], lengths of the whole sequences: tokens whose index in the
        natural order of the sequence is not below the length are absent: they attend to nothing, and nothing attends
        to them.
      segment_ids: int [B, T], or a pair ([B, T], [B, S]): a query attends to keys with its own id only.
      max_segment_length: M, a promise about segments, not a mask: no two tokens of one segment lie M or more places
        apart in the natural order of the sequence, be they of query or key. The results are those without it, but what
        no segment can need does not travel, forward or backward, as under a window. It holds beside ``positions``
        too, since places are not positions.
      shared_length: G, another promise about segments: of each shard only the first G tokens, as the shard holds them,
        belong to segments that have tokens in other shards; all others attend, and are attended to, within their
        shard. Then only keys of these travel on axes of strategy "ring", and nothing does with 0. One number, or one
        for each axis of ``axis_name``, outermost first and never growing smaller: that of an axis is for segments with
        tokens at several places of it, or of axes outside it. Where keys are gathered with others, or tokens exchanged
        for heads, they travel whole, unless G is 0; an axis of strategy "all_gather" is a ring instead.
        Where a promise does not hold, results would be wrong. Concrete whole arrays are checked at every call. Under
        ``jit`` and inside ``shard_map`` nothing is: give host batches to :func:`check_segments`, which asks the
        same; or set ``jax_enable_checks``, and whole arrays are checked while the program runs. Tokens beyond
        ``query_seq_lengths`` and ``key_value_seq_lengths`` do not count. Other padding does: many tokens of one id are
        a long segment, so give each an id of its own.
      positions: int [T] or [B, T], or a pair for query and key: used by is_causal and local_window_size in place of the
        layout's positions. No hop can be left out then, since nothing is known of them before run time.
        Recipes, with ``at = ring_positions(...)`` of each side: queries at the end of the keys, as in decoding,
        ``is_causal=True, positions=(at_q + S - T, at_k)``; a prefix of P tokens that all attend to (prefix-LM),
        ``is_causal=True, positions=(jnp.maximum(at, P - 1), at)``; chunks of W tokens that attend to themselves,
        ``segment_ids=at // W`` (repeated to [B, T]), with ``is_causal`` or without.
      layout: "contiguous", "zigzag", "striped" or a Layout object: where each token of the sequence lies.
      logits_soft_cap: c in the equation, positive.
      sinks: float [N]: one more logit per head, in the denominator only; neither scaled nor capped.
      return_residual: also return the log-sum-exp, differentiable.
      config: tuning, see :class:`RingConfig`.

    Returns:
      out [B, T, N, Hv] in the dtype of query; with return_residual also lse [B, T, N], the natural log of the softmax
      denominator in float32 (float64 for float64). A query that attends to nothing gives 0, lse -inf (with sinks:
      the sink) and zero gradients. NaN or Inf in a key or value reaches only queries that attend to it.

      Inside ``shard_map`` both vary over ``axis_name``, also where query does not: a rank's queries stand at its own
      positions, and each rank sums in its own order, so that ranks agree up to rounding at most. To return one
      result from such a query (a mask that does not depend on the rank: none, segments or ``positions``) take
      ``jax.lax.pmean(out, axis_name)``, which ``out_specs=P()`` accepts and whose gradients are right.

    Raises:
      ValueError: for arguments that do not fit, naming the argument, what is required and what was given.
      NotImplementedError: for what this path cannot do yet.

    Source: Liu, Zaharia, Abbeel 2023, arXiv:2310.01889; layouts: Brandon et al. 2023, arXiv:2311.09431.
    """
    arrays = check_arrays(
        query, key, value, sinks=sinks, positions=positions, segment_ids=segment_ids,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
    )  # fmt: skip
    if not isinstance(config, RingConfig):
        raise ValueError(f"config must be a RingConfig. Got {type(config).__name__}.")
    if not isinstance(return_residual, bool):
        raise ValueError(f"return_residual must be True or False. Got {return_residual!r}.")
    left, right = check_window(local_window_size, is_causal)
    axes = check_axis_names(axis_name)
    max_segment_length = check_max_segment_length(max_segment_length, segment_ids)
    shared = check_shared_length(shared_length, segment_ids, len(axes))
    strategies = check_strategies(config.strategy, axes)
    inside = axes_are_manual(axes)
    if inside:
        _refuse_outside_arguments(axes, mesh, batch_axis_name, head_axis_name)
    whole_mesh = None if inside else find_mesh(axes, mesh)
    _refuse_symbolic_sizes(arrays, _compat.mesh_size_inside() if whole_mesh is None else whole_mesh.size)
    target = target_of(mesh)
    largest_head = max(arrays.query.shape[3], arrays.value.shape[3])
    backend = choose(config, target, arrays.query.dtype, largest_head)
    interpreted = backend.interpretable and interprets(config)
    call = Call(
        axis_names=axes,
        strategies=strategies,
        cycles=ring_cycles(config, axes, strategies, whole_mesh),
        layout=as_layout(layout),
        left=left,
        right=right,
        scale=check_scale(scale, arrays.query.shape[3]),
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        config=config,
        kernel=backend.load(),
        unroll=hops_per_iteration(config, axes, inside, target.platform),
        platform=target.platform,
        device_kind=target.device_kind,
        one_operation=wants_one_operation(target),
        interpreted=interpreted,
        max_segment_length=max_segment_length,
        shared_length=shared,
    )
    if whole_mesh is None:
        refuse_interpreter(call)
        out, lse = attend(call, arrays)
    else:
        sizes = tuple(whole_mesh.shape[axis] for axis in axes)
        promise = Promise(call.layout, sizes, max_segment_length, shared)
        hold_against(promise, segment_ids, arrays.q_lengths, arrays.kv_lengths)
        out, lse = sharded(call, arrays, whole_mesh, batch_axis_name, head_axis_name)
    return (out, lse) if return_residual else out


def _refuse_symbolic_sizes(arrays: Arrays, num_devices: int) -> None:
    """A program exported with a symbolic size that something in a shard_map needs kills the process that calls it.

    XLA fills in such sizes everywhere but there (JAX 0.10 to 0.12). On one device, or under vmap alone, all is well.
    """
    for name, x in arrays._asdict().items():
        if x is not None and num_devices > 1 and not all(isinstance(n, int) for n in x.shape):
            raise NotImplementedError(
                f"{name}: the sizes must be known where there are several devices, also for jax.export: export once "
                f"for every batch size. Got shape {x.shape}."
            )


def _refuse_outside_arguments(axes: tuple[str, ...], mesh: Any, batch_axis_name: Any, head_axis_name: Any) -> None:
    given = {"mesh": mesh, "batch_axis_name": batch_axis_name, "head_axis_name": head_axis_name}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None where axis {axes[0]!r} is already manual (inside shard_map or vmap): the arrays "
                f"are local shards there. Got {value!r}."
            )
