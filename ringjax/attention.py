"""ring_attention: checks the call, fills in defaults, pads, wraps in shard_map and picks the block kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from . import _compat
from .arguments import Arrays, check_arrays, check_scale, check_soft_cap, check_window
from .config import RingConfig
from .kernels import xla
from .kernels.base import Kernel, KernelParams
from .layout import Layout, as_layout, padded_length, ring_slots
from .mask import NO_KEY, NO_QUERY, Mask, exclude
from .ring import RingSpec, ring
from .schedule import plan

_KERNELS: dict[str, Kernel] = {"xla": xla}
AxisNames = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call at trace time, complete: nothing below this file fills in a default."""

    axis_name: str
    layout: Layout
    left: int | None
    right: int | None
    scale: float
    logits_soft_cap: float | None
    config: RingConfig
    kernel: Kernel
    unroll: int
    key_length: int | None  # of the whole sequence, where it was padded: what lies beyond is nobody's key


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
    segment_ids: Any = None,
    positions: Any = None,
    layout: str | Layout = "contiguous",
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_residual: bool = False,
    config: RingConfig = RingConfig(),  # noqa: B008  frozen
) -> Any:
    r"""Exact attention over a sequence that is sharded over the devices of a ring.

    .. math::  out = softmax(mask(cap(scale \cdot Q K^T))) V,   cap(x) = c \tanh(x / c) \text{ if a soft cap is given}

    One function inside and outside ``shard_map``. Inside (or under ``vmap(axis_name=...)``) the arrays are this
    device's shards; outside they are whole, of any length, and the call pads and shards them itself. Arrays are in the
    ring order of ``layout`` and nothing is permuted: bring tokens into it once with :func:`to_ring_order`.

    Shapes: B batch, T query length, S key length, N query heads, K key/value heads (N a multiple of K; query head n
    uses K/V head n // (N / K)), H head size, Hv value head size.

    Args:
      query, key, value: float32, bfloat16, float16 or float64, all the same. Sums are in float32 (float64 for float64).
      axis_name: mesh axis of the sequence. A pair (outer, inner), a two-level ring, is not implemented yet.
      mesh: the mesh, outside ``shard_map``; None takes that of the context (``jax.set_mesh``).
      batch_axis_name, head_axis_name: mesh axes that shard batch and heads, outside ``shard_map`` only. On Explicit
        axes they are read off the sharding of the inputs. One K/V head is kept whole where heads are sharded.
      scale: factor on q.k; None is 1 / sqrt(H).
      is_causal: a query attends keys at its own position and before.
      local_window_size: w or (left, right): a query at p attends keys in [p - left, p + right]; int w is (w, w), None
        in a pair is unbounded. As in :func:`jax.nn.dot_product_attention`.
      query_seq_lengths, key_value_seq_lengths: int [B], lengths of the whole sequences: tokens whose index in the
        natural order of the sequence is not below the length attend nothing, and nothing attends them.
      segment_ids: int [B, T], or a pair ([B, T], [B, S]): only equal ids attend. Any int32 but the two lowest.
      positions: int [T] or [B, T], or a pair for query and key: used by is_causal and local_window_size in place of the
        layout's positions. No hop can be left out then, since nothing is known of them before run time.
      layout: "contiguous", "zigzag", "striped" or a Layout object: where each token of the sequence lies.
      logits_soft_cap: c in the equation, positive.
      sinks: float [N]: one more logit a head, in the denominator only; neither scaled nor capped.
      return_residual: also return the log-sum-exp, differentiable.
      config: tuning, see :class:`RingConfig`.

    Returns:
      out [B, T, N, Hv] in the dtype of query; with return_residual also lse [B, T, N], the natural log of the softmax
      denominator in float32 (float64 for float64). A query that attends nothing gives 0, lse -inf (with sinks: the
      sink) and zero gradients. NaN or Inf in a key or value reaches only queries that attend it.

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
    axis = _check_axis_name(axis_name)
    inside = _compat.axis_is_bound(axis)
    platform = _platform(mesh)
    call = _Call(
        axis, as_layout(layout), left, right, check_scale(scale, arrays.query.shape[3]),
        check_soft_cap(logits_soft_cap), config, _pick_kernel(config.implementation, platform),
        config.unroll or (1 if platform == "cpu" else 2), None,
    )  # fmt: skip
    if inside:
        _refuse_outside_arguments(axis, mesh, batch_axis_name, head_axis_name)
        out, lse = _local(call, arrays)
    else:
        mesh = _find_mesh(axis, mesh)
        out, lse = _sharded(call, arrays, mesh, batch_axis_name, head_axis_name)
    return (out, lse) if return_residual else out


def _check_axis_name(axis_name: Any) -> str:
    if isinstance(axis_name, (tuple, list)) and len(axis_name) == 1:
        axis_name = axis_name[0]
    if isinstance(axis_name, (tuple, list)) and len(axis_name) == 2:
        raise NotImplementedError(f"axis_name: two-level rings are not implemented yet. Got {axis_name!r}.")
    if not isinstance(axis_name, str):
        raise ValueError(f"axis_name must be the name of a mesh axis. Got {axis_name!r}.")
    return axis_name


def _platform(mesh: Mesh | AbstractMesh | None) -> str:
    """The platform that the call is compiled for."""
    if isinstance(mesh, Mesh) and mesh.devices.size:
        return mesh.devices.flat[0].platform
    context = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    device = getattr(context, "abstract_device", None)
    return device.platform if device is not None and getattr(device, "platform", None) else jax.default_backend()


def _pick_kernel(name: str | None, platform: str) -> Kernel:
    if name is None:
        return xla
    if name not in _KERNELS:
        raise ValueError(
            f"config.implementation must be one that platform {platform!r} has: {', '.join(map(repr, _KERNELS))}, "
            f"or None. Got {name!r}."
        )
    return _KERNELS[name]


# ------------------------------------------------------------------------------------------- inside: local shards


def _refuse_outside_arguments(axis: str, mesh: Any, batch_axis_name: Any, head_axis_name: Any) -> None:
    given = {"mesh": mesh, "batch_axis_name": batch_axis_name, "head_axis_name": head_axis_name}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None where axis {axis!r} is already manual (inside shard_map or vmap): the arrays "
                f"are local shards there. Got {value!r}."
            )


def _local(call: _Call, arrays: Arrays) -> tuple[Array, Array]:
    """Attention of this rank's shard; collectives over call.axis_name are legal here."""
    num_shards = jax.lax.axis_size(call.axis_name)
    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    unit = call.layout.shard_unit()
    for name, length in (("query", q_length), ("key", k_length)):
        if length % unit:
            raise ValueError(
                f"{name}: the length of a shard must be a multiple of {unit} for {call.layout}. Got {length}."
            )
    # One type for all under check_vma: the gradient of what is replicated is then summed by JAX itself.
    axes = frozenset({call.axis_name}) if _compat.checks_varying_axes() else frozenset()
    axes = axes.union(*(_compat.varying_axes(x) for x in jax.tree.leaves(arrays)))
    arrays = jax.tree.map(lambda x: _compat.vary_over(x, axes), arrays)
    # Positions that only the run time knows say nothing of which hops are needed.
    static = call.layout if arrays.q_positions is None else None
    schedule = plan(
        num_shards, static, q_length, k_length, left=call.left, right=call.right, direction=call.config.direction
    )
    config = call.config
    params = KernelParams(call.scale, call.logits_soft_cap, config.block_q, config.block_kv)
    spec = RingSpec(call.axis_name, schedule, call.kernel, params, call.unroll, config.dkv_dtype)
    mask = _local_mask(call, arrays, num_shards)
    return ring(spec, arrays.query, arrays.key, arrays.value, arrays.sinks, mask)


def _local_mask(call: _Call, arrays: Arrays, num_shards: int) -> Mask:
    """Positions and segments of this rank's queries and keys. Lengths and padding become segments."""

    def index(length: int) -> Array:  # of each token of the shard, in the natural order of the sequence
        rank = jax.lax.axis_index(call.axis_name)
        local = jnp.arange(length, dtype=jnp.int32)
        return call.layout.positions(rank, local, length, num_shards)[None]

    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    q_positions, kv_positions = arrays.q_positions, arrays.kv_positions
    if call.left is None and call.right is None:
        q_positions = kv_positions = None
    elif q_positions is None:
        q_positions, kv_positions = index(q_length), index(k_length)
    q_segments, kv_segments = arrays.q_segments, arrays.kv_segments
    if q_segments is None and not (arrays.q_lengths is None and arrays.kv_lengths is None and call.key_length is None):
        q_segments = jnp.zeros((1, q_length), jnp.int32)
        kv_segments = jnp.zeros((1, k_length), jnp.int32)
    if arrays.q_lengths is not None:
        q_segments = exclude(q_segments, index(q_length) < arrays.q_lengths[:, None], NO_QUERY)
    if arrays.kv_lengths is not None:
        kv_segments = exclude(kv_segments, index(k_length) < arrays.kv_lengths[:, None], NO_KEY)
    if call.key_length is not None:
        kv_segments = exclude(kv_segments, index(k_length) < call.key_length, NO_KEY)
    parts = (q_positions, kv_positions, q_segments, kv_segments)
    parts = (None if x is None else _compat.vary_like(x, arrays.query) for x in parts)
    return Mask(*parts, left=call.left, right=call.right)


# --------------------------------------------------------------------------------------- outside: the whole arrays


def _find_mesh(axis: str, mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    manual = _compat.manual_axes()
    if manual and mesh is None:
        raise ValueError(
            f"axis_name must be a manual axis inside shard_map: one of {', '.join(map(repr, manual))}. Got {axis!r}."
        )
    found = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    if not isinstance(found, (Mesh, AbstractMesh)):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None. Got {type(found).__name__}.")
    if found.empty:
        raise ValueError(
            f"axis_name {axis!r} must be an axis of a mesh: pass mesh=, set one with jax.set_mesh, or call inside "
            "shard_map over it. Got no mesh."
        )
    if axis not in found.axis_names:
        where = "mesh" if mesh is not None else "axis_name: the mesh of the context"
        raise ValueError(f"{where} must have an axis {axis!r}. Got axes {', '.join(map(repr, found.axis_names))}.")
    return found


def _sharded(
    call: _Call, arrays: Arrays, mesh: Mesh | AbstractMesh, batch: AxisNames | None, heads: AxisNames | None
) -> tuple[Array, Array]:
    """Pad to what the ring can hold, run it under shard_map, cut the padding off."""
    batch = batch if batch is not None else _explicit_axes(arrays.query, 0, mesh)
    heads = heads if heads is not None else _explicit_axes(arrays.query, 2, mesh)
    num_batch = _check_mesh_axes("batch_axis_name", batch, call.axis_name, mesh)
    num_heads = _check_mesh_axes("head_axis_name", heads, call.axis_name, mesh)
    q_length, k_length = arrays.query.shape[1], arrays.key.shape[1]
    if arrays.query.shape[0] % num_batch:
        raise ValueError(
            f"query: the batch size must be a multiple of {num_batch}, the size of batch_axis_name {batch!r}. "
            f"Got {arrays.query.shape[0]}."
        )
    kv_heads = heads
    if arrays.key.shape[2] == 1:
        kv_heads = None
    if arrays.query.shape[2] % num_heads or (kv_heads is not None and arrays.key.shape[2] % num_heads):
        raise ValueError(
            f"query and key: the numbers of heads must be multiples of {num_heads}, the size of head_axis_name "
            f"{heads!r} (a single K/V head may stay whole). Got N = {arrays.query.shape[2]}, K = {arrays.key.shape[2]}."
        )
    num_shards = mesh.shape[call.axis_name]
    padded = padded_length(k_length, call.layout, num_shards) != k_length
    call = dataclasses.replace(call, key_length=k_length if padded else None)
    specs = _specs(arrays, call.axis_name, batch, heads, kv_heads)
    sizes = {"query": q_length, "q": q_length, "key": k_length, "value": k_length, "kv": k_length}
    fitted = {}
    for name, x in arrays._asdict().items():
        length = sizes.get(name.split("_")[0])
        if x is not None and length is not None and not name.endswith("lengths"):
            x = _pad_to_ring(x, call.layout, num_shards, mesh)
        fitted[name] = None if x is None else _reshard(x, getattr(specs, name), mesh)
    run = _compiled(call, mesh, tuple((n, s) for n, s in specs._asdict().items() if s is not None))
    out, lse = run({name: x for name, x in fitted.items() if x is not None})
    return tuple(_cut_from_ring(x, q_length, call.layout, num_shards, mesh) for x in (out, lse))


@functools.lru_cache(maxsize=256)
def _compiled(
    call: _Call, mesh: Mesh | AbstractMesh, specs: tuple[tuple[str, PartitionSpec], ...]
) -> Callable[[dict[str, Array]], tuple[Array, Array]]:
    """The sharded call under jit. Cached, or every eager call would compile anew."""
    by_name = dict(specs)
    out_spec = by_name["query"]

    def run(given: dict[str, Array]) -> tuple[Array, Array]:
        return _local(call, Arrays(**{name: given.get(name) for name in Arrays._fields}))

    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(by_name,), out_specs=(out_spec, PartitionSpec(*out_spec[:3])))
    )


def _specs(
    arrays: Arrays, sequence: str, batch: AxisNames | None, heads: AxisNames | None, kv_heads: AxisNames | None
) -> Arrays:
    """A PartitionSpec for every array that is given."""

    def row(x: Array | None) -> PartitionSpec | None:  # [B1, L]
        return None if x is None else PartitionSpec(batch if x.shape[0] == arrays.query.shape[0] else None, sequence)

    kv = PartitionSpec(batch, sequence, kv_heads, None)
    lengths = (None if x is None else PartitionSpec(batch) for x in (arrays.q_lengths, arrays.kv_lengths))
    return Arrays(
        PartitionSpec(batch, sequence, heads, None), kv, kv,
        None if arrays.sinks is None else PartitionSpec(heads),
        row(arrays.q_positions), row(arrays.kv_positions), row(arrays.q_segments), row(arrays.kv_segments), *lengths,
    )  # type: ignore[arg-type]  # fmt: skip


def _check_mesh_axes(name: str, axes: AxisNames | None, sequence: str, mesh: Mesh | AbstractMesh) -> int:
    """The product of the sizes of these mesh axes."""
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in mesh.axis_names or axis == sequence:
            allowed = ", ".join(repr(a) for a in mesh.axis_names if a != sequence)
            raise ValueError(f"{name} must name mesh axes other than axis_name: of {allowed or 'none'}. Got {axis!r}.")
        size *= mesh.shape[axis]
    return size


def _explicit_axes(x: Array, dim: int, mesh: Mesh | AbstractMesh) -> AxisNames | None:
    """The Explicit mesh axes that shard this dimension; None on Auto axes, of which a traced array tells nothing."""
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    spec = getattr(jax.typeof(x).sharding, "spec", None)
    entry = spec[dim] if spec is not None and dim < len(spec) else None
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    kept = tuple(name for name in names if name in explicit)
    return kept[0] if len(kept) == 1 else kept or None


def _reshard(x: Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Array:
    """On Explicit axes shard_map takes only what is sharded as it says."""
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return x


def _whole_sequence(x: Array, mesh: Mesh | AbstractMesh) -> Array:
    """Not sharded along axis 1, where sharding in types would forbid what follows."""
    spec = getattr(jax.typeof(x).sharding, "spec", None)
    if AxisType.Explicit in mesh.axis_types and spec is not None and len(spec) > 1 and spec[1] is not None:
        return _reshard(x, PartitionSpec(spec[0], None, *spec[2:]), mesh)
    return x


def _pad_to_ring(x: Array, layout: Layout, num_shards: int, mesh: Mesh | AbstractMesh) -> Array:
    """Put zeros where the padded sequence has padding, in ring order (axis 1)."""
    length = x.shape[1]
    total = padded_length(length, layout, num_shards)
    if total == length:
        return x
    x = _whole_sequence(x, mesh)
    slots = ring_slots(length, layout, num_shards)
    return jnp.zeros((x.shape[0], total, *x.shape[2:]), x.dtype).at[:, slots].set(x)


def _cut_from_ring(x: Array, length: int, layout: Layout, num_shards: int, mesh: Mesh | AbstractMesh) -> Array:
    """The inverse of _pad_to_ring."""
    if x.shape[1] == length:
        return x
    return _whole_sequence(x, mesh)[:, ring_slots(length, layout, num_shards)]
