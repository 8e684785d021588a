"""A call on whole arrays: finds the mesh, pads what does not divide, wraps the shards' work in shard_map."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from . import _compat
from .arguments import Arrays
from .config import RingConfig
from .kernels.choose import Target
from .layout import Layout, padded_length, ring_runs
from .local import Call, attend
from .torus import torus_rings

AxisNames = str | tuple[str, ...]


def target_of(mesh: Mesh | AbstractMesh | None) -> Target:
    """The devices of a mesh; None: those of the context's mesh, otherwise JAX's first."""
    if isinstance(mesh, Mesh) and mesh.devices.size:
        device: Any = mesh.devices.flat[0]
    else:
        context = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
        device = getattr(context, "abstract_device", None)
        if device is None or not getattr(device, "platform", None):
            device = jax.devices()[0]
    return Target(
        platform=device.platform,
        device_kind=device.device_kind,
        capability=getattr(device, "compute_capability", None),
    )


def ring_cycles(
    config: RingConfig, axes: tuple[str, ...], strategies: tuple[str, ...], mesh: Mesh | AbstractMesh | None
) -> tuple[tuple[int, ...], ...]:
    """Ranks along each of ``config.rings`` rings of a torus; none for one ring. ``mesh``: None inside shard_map."""
    if config.rings == 1:
        return ()
    if strategies != ("ring",):
        raise ValueError(
            f"config.rings must be 1 unless the sequence has one axis, of strategy 'ring'. Got {config.rings} for axes "
            f"{axes!r} of {strategies!r}."
        )
    found = mesh if isinstance(mesh, Mesh) else _compat.concrete_mesh()
    if found is None or axes[0] not in found.axis_names:
        raise ValueError(
            "config.rings must be 1 where the devices are not known: pass mesh=, or set one with jax.set_mesh. "
            f"Got {config.rings}."
        )
    if found.size != found.shape[axes[0]]:
        raise ValueError(
            f"config.rings must be 1 unless axis {axes[0]!r} goes round all devices of the mesh. Got {config.rings} "
            f"for {found.shape[axes[0]]} of {found.size}."
        )
    return torus_rings(list(found.devices.flat), config.rings)


def find_mesh(axes: tuple[str, ...], mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    manual = _compat.manual_axes()
    if manual:
        raise ValueError(
            f"axis_name must be a manual axis inside shard_map: one of {', '.join(map(repr, manual))}. For a ring over "
            "another axis use one shard_map over all of these and it, since JAX cannot differentiate one shard_map "
            f"within another. Got {_quoted(axes)}{'' if mesh is None else ' and a mesh'}."
        )
    found = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    if not isinstance(found, (Mesh, AbstractMesh)):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None. Got {type(found).__name__}.")
    if found.empty:
        raise ValueError(
            f"axis_name {_quoted(axes)} must be an axis of a mesh: pass mesh=, set one with jax.set_mesh, or call "
            "inside shard_map over it. Got no mesh."
        )
    for axis in axes:
        if axis not in found.axis_names:
            where = "mesh" if mesh is not None else "axis_name: the mesh of the context"
            raise ValueError(f"{where} must have an axis {axis!r}. Got axes {', '.join(map(repr, found.axis_names))}.")
    return found


def _quoted(axes: tuple[str, ...]) -> str:
    return repr(axes[0] if len(axes) == 1 else axes)


def sharded(
    call: Call,
    arrays: Arrays,
    mesh: Mesh | AbstractMesh,
    batch: AxisNames | None,
    heads: AxisNames | None,
) -> tuple[Array, Array]:
    """Pad to what the ring can hold, attend on the shards under shard_map, cut the padding off."""
    batch = batch if batch is not None else _explicit_axes(arrays.query, 0, mesh)
    heads = heads if heads is not None else _explicit_axes(arrays.query, 2, mesh)
    kv_heads = heads if arrays.key.shape[2] > 1 else None  # a single K/V head stays whole
    _check_sizes(call, arrays, mesh, batch, heads)
    _check_placed(arrays, mesh)
    num_shards = _num_shards(call, mesh)
    lengths = (x.shape[1] for x in (arrays.query, arrays.key))
    padded = [length if padded_length(length, call.layout, num_shards) != length else None for length in lengths]
    call = dataclasses.replace(call, query_length=padded[0], key_length=padded[1])
    specs = _specs(arrays, call.axis_names, batch, heads, kv_heads)
    # Pallas' interpreter mixes types, JAX 0.10 to 0.12. vmap(spmd_axis_name=) adds its axis to the types of the arrays
    # that it maps, but not to those of constants: of no loop that starts from one, nor of Pallas' outputs.
    check_vma = not call.interpreted and not _compat.inside_spmd_vmap()
    return _compiled(call, mesh, tuple(specs.items()), check_vma)({name: getattr(arrays, name) for name in specs})


@functools.lru_cache(maxsize=256)
def _compiled(
    call: Call,
    mesh: Mesh | AbstractMesh,
    specs: tuple[tuple[str, PartitionSpec], ...],
    check_vma: bool,
) -> Callable[[dict[str, Array]], tuple[Array, Array]]:
    """The sharded call under jit. Cached, or every eager call would compile anew."""
    by_name, num_shards = dict(specs), _num_shards(call, mesh)
    out_spec = by_name["query"]
    absent = dict.fromkeys(set(Arrays._fields) - set(by_name))

    def on_shards(given: dict[str, Array]) -> tuple[Array, Array]:
        return attend(call, Arrays(**given, **absent))  # type: ignore[arg-type]

    ring = jax.shard_map(
        on_shards,
        mesh=mesh,
        in_specs=(by_name,),
        out_specs=(out_spec, PartitionSpec(*out_spec[:3])),
        check_vma=check_vma,
    )

    def run(given: dict[str, Array]) -> tuple[Array, Array]:
        fitted = {}
        for name, x in given.items():
            if not name.endswith("lengths") and name != "sinks":  # axis 1 is the sequence
                x = _pad_to_ring(x, call.layout, num_shards, mesh)
            fitted[name] = reshard(x, by_name[name], mesh)
        cut = functools.partial(
            _cut_from_ring,
            length=given["query"].shape[1],
            layout=call.layout,
            num_shards=num_shards,
            mesh=mesh,
        )
        out, lse = ring(fitted)
        return cut(out), cut(lse)

    return jax.jit(run)


def _num_shards(call: Call, mesh: Mesh | AbstractMesh) -> int:
    """C."""
    return math.prod(mesh.shape[axis] for axis in call.axis_names)


def _specs(
    arrays: Arrays, axes: tuple[str, ...], batch: AxisNames | None, heads: AxisNames | None, kv_heads: AxisNames | None
) -> dict[str, PartitionSpec]:
    """A PartitionSpec for every array that is given."""
    sequence = axes[0] if len(axes) == 1 else axes
    specs: dict[str, PartitionSpec] = {}
    for name, x in arrays._asdict().items():
        if x is None:
            continue
        rows = batch if x.shape[0] == arrays.query.shape[0] else None  # positions may be the same for every row
        if name in ("query", "key", "value"):
            specs[name] = PartitionSpec(rows, sequence, heads if name == "query" else kv_heads, None)
        elif name == "sinks":
            specs[name] = PartitionSpec(heads)
        elif name.endswith("lengths"):
            specs[name] = PartitionSpec(rows)
        else:
            specs[name] = PartitionSpec(rows, sequence)
    return specs


def _check_sizes(
    call: Call, arrays: Arrays, mesh: Mesh | AbstractMesh, batch: AxisNames | None, heads: AxisNames | None
) -> None:
    """Batch and heads divide over their mesh axes."""
    num_batch = _mesh_size("batch_axis_name", batch, call.axis_names, mesh)
    num_heads = _mesh_size("head_axis_name", heads, call.axis_names, mesh)
    (size, _, q_heads, _), kv_heads = arrays.query.shape, arrays.key.shape[2]
    if size % num_batch:
        raise ValueError(
            f"query: the batch size must be a multiple of {num_batch}, the size of batch_axis_name {batch!r}. "
            f"Got {size}."
        )
    if q_heads % num_heads or (kv_heads > 1 and kv_heads % num_heads):
        raise ValueError(
            f"query and key: the numbers of heads must be multiples of {num_heads}, the size of head_axis_name "
            f"{heads!r} (a single K/V head may stay whole). Got N = {q_heads}, K = {kv_heads}."
        )


def _check_placed(arrays: Arrays, mesh: Mesh | AbstractMesh) -> None:
    """An AbstractMesh has no devices: they are those of the arrays, or of nothing where the call is only lowered."""
    if isinstance(mesh, Mesh) or mesh.size == 1 or _compat.context_has_devices():
        return
    placed = [_compat.is_placed(x, mesh.size) for x in arrays if x is not None]
    if not any(placed) and None not in placed:
        raise ValueError(
            f"mesh: with an AbstractMesh the arrays must be placed on its {mesh.size} devices (jax.device_put with a "
            "NamedSharding), or the call be traced by jax.jit; otherwise pass a jax.sharding.Mesh. "
            "Got arrays that are placed on no mesh."
        )


def _mesh_size(name: str, axes: AxisNames | None, sequence: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """The product of the sizes of these mesh axes."""
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in mesh.axis_names or axis in sequence:
            allowed = ", ".join(repr(a) for a in mesh.axis_names if a not in sequence)
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


def reshard(x: Array, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Array:
    """On Explicit axes shard_map takes only what is sharded as it says."""
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return x


def _whole_sequence(x: Array, mesh: Mesh | AbstractMesh) -> Array:
    """Not sharded along axis 1.

    Under Explicit axes the types forbid slices of a sharded axis. Under Auto axes XLA's partitioner takes them, but
    gets the transpose of slice and pad wrong for some lengths (seen with JAX 0.10 to 0.12): out right, gradients not.
    """
    if AxisType.Explicit not in mesh.axis_types:
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None, *rest)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    spec = (*jax.typeof(x).sharding.spec, None, None)
    return reshard(x, PartitionSpec(spec[0], None, *spec[2 : x.ndim]), mesh)


def _pad_to_ring(x: Array, layout: Layout, num_shards: int, mesh: Mesh | AbstractMesh) -> Array:
    """Put zeros where the padded sequence has padding, in ring order (axis 1)."""
    length = x.shape[1]
    total = padded_length(length, layout, num_shards)
    if total == length:
        return x
    x = _whole_sequence(x, mesh)
    runs = ring_runs(length, layout, num_shards)
    parts, used, end = [], 0, 0
    for start, stop in runs:
        after = total - stop if stop == runs[-1][1] else 0
        widths = [(0, 0), (start - end, after), *((0, 0),) * (x.ndim - 2)]
        parts.append(jnp.pad(x[:, used : used + stop - start], widths))
        used, end = used + stop - start, stop
    return _whole_sequence(jnp.concatenate(parts, axis=1), mesh)


def _cut_from_ring(x: Array, length: int, layout: Layout, num_shards: int, mesh: Mesh | AbstractMesh) -> Array:
    """The inverse of _pad_to_ring. Slices, not a gather, whose transpose would be a scatter."""
    if x.shape[1] == length:
        return x
    x = _whole_sequence(x, mesh)
    parts = [x[:, start:stop] for start, stop in ring_runs(length, layout, num_shards)]
    return _whole_sequence(jnp.concatenate(parts, axis=1), mesh)
