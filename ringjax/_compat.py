"""What differs between JAX versions, or is not in JAX's public interface. The only file that may know.

Checked with JAX 0.10.2, 0.11.2 and 0.12.0.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as _config
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def axis_is_bound(name: str) -> bool:
    """Whether a collective over this axis name is legal here: manual in shard_map, or an axis of vmap."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def manual_axes() -> tuple[str, ...]:
    """Mesh axes that are manual here; empty outside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual)


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes over which this value is known to vary (empty unless shard_map checks it)."""
    kind = jax.typeof(x)
    # JAX 0.10 and later say it in manual_axis_type, earlier ones in vma.
    return frozenset(getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", ())))


def vary_over(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The same value, typed as varying over these axes too. Its transpose sums over the axes added."""
    missing = tuple(sorted(frozenset(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, *references: Any) -> jax.Array:
    """The same value, typed as varying over every axis over which a reference varies.

    A loop's carry must have one type throughout, so what starts as a constant needs the type of what it becomes.
    """
    return vary_over(x, frozenset().union(*(varying_axes(r) for r in references)))


def checks_varying_axes() -> bool:
    """Whether this code is traced inside a shard_map with check_vma=True."""
    return bool(manual_axes()) and bool(_config._check_vma.value)


def take(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    """jnp.take along one axis; on Explicit mesh axes, where a gather must say how its result is sharded, as x is."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return jnp.take(x, index, axis=axis)
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    names = (spec[axis],) if isinstance(spec[axis], str) else tuple(spec[axis] or ())
    if len(index) % math.prod(mesh.shape[name] for name in names):
        spec[axis] = None  # the new length cannot be sharded so
    where = (slice(None),) * axis + (index,)
    return x.at[where].get(out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def shape_like(shape: tuple[int, ...], dtype: Any, reference: Any) -> jax.ShapeDtypeStruct:
    """The shape of a Pallas output that varies over the manual axes over which the reference varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(reference).manual_axis_type)


def tpu_interpreter_is_forced() -> bool:
    """Whether this runs under ``jax.experimental.pallas.tpu.force_tpu_interpret_mode()``."""
    return _config.pallas_tpu_interpret_mode_context_manager.value is not None
