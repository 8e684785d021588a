"""What differs between JAX versions, or is not in JAX's public interface. The only file that may know.

Checked with JAX 0.10.2, 0.11.2 and 0.12.0.
"""

import ctypes
import functools
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as _config
from jax._src import core as _core
from jax._src import mesh as _mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")


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


def inside_spmd_vmap() -> bool:
    """Whether this is traced inside ``jax.vmap(..., spmd_axis_name=...)``."""
    return bool(_core.get_axis_env().spmd_axis_names)


def is_placed(x: Any, num_devices: int) -> bool | None:
    """Whether this array lies on that many devices for good; None where tracing hides it."""
    value = _core.to_concrete_value(x)
    if value is None:
        return None
    return isinstance(value, jax.Array) and value.committed and len(value.sharding.device_set) == num_devices


def context_has_devices() -> bool:
    """Whether the mesh of the context, if any, is one of devices (``jax.set_mesh``), not an abstract one."""
    return not _mesh.get_concrete_mesh().empty


def concrete_mesh() -> jax.sharding.Mesh | None:
    """The mesh of the context (``jax.set_mesh``), if it is one of devices."""
    mesh = _mesh.get_concrete_mesh()
    return None if mesh.empty else mesh


def mesh_size_inside() -> int:
    """Devices of the mesh over which the shard_map is that this is traced in; 1 outside one."""
    return jax.sharding.get_abstract_mesh().size if manual_axes() else 1


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


def in_one_operation(collectives: Callable[[T], T]) -> Callable[[T], T]:
    """The same collectives, as one operation of XLA for GPUs, in which NCCL sends and receives everything at once.

    That XLA runs one operation of the wire behind a kernel, and awaits any other before it. JAX 0.10 cannot say which
    belong together; there they stay several.

    Args:
      collectives: does nothing else, and has a result for every argument, in their order.
    """
    from jax.experimental import xla_metadata

    call: Any = getattr(xla_metadata, "xla_metadata_call", None)
    if call is None:
        return collectives
    # XLA inlines other calls before it looks for groups.
    return call(collectives, _collectives_group="", inlineable="false")


def tpu_interpreter_is_forced() -> bool:
    """Whether this runs under ``jax.experimental.pallas.tpu.force_tpu_interpret_mode()``."""
    return _config.pallas_tpu_interpret_mode_context_manager.value is not None


# Whether Pallas Mosaic GPU kernels can concatenate what is in registers.
GPU_CONCATENATES = jax.__version_info__ >= (0, 11)


@functools.cache
def gpu_registers_are_ignored() -> bool:
    """Whether Mosaic kernels for GPUs run without the registers that their warpgroups ask for, several times as long.

    JAX 0.12 has nvJitLink compile them, where it is installed: to it a kernel is a part of a larger program, whose
    functions have one number of registers. Where it is not, and before, ptxas does.
    """
    try:
        if jax.__version_info__ < (0, 12) or jax.default_backend() != "gpu":
            return False
    except RuntimeError:  # JAX_PLATFORMS names what this machine lacks: it compiles for another one
        return False

    def loads(library: str) -> bool:
        try:
            ctypes.CDLL(library)
        except OSError:
            return False
        return True

    wheels = {name.lower() for found in importlib.metadata.distributions() if (name := found.name)}
    return not wheels.isdisjoint(("nvidia-nvjitlink", "nvidia-nvjitlink-cu12")) or any(
        loads(f"libnvJitLink.so.{version}") for version in (12, 13)
    )


def gpu_load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Load from shared or device memory into registers laid out so. In Pallas Mosaic GPU kernels."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    index = inspect.signature(load).parameters.get("idx")  # must be given in JAX 0.10, must not be later
    required = index is not None and index.default is inspect.Parameter.empty
    return load(ref, *([()] if required else []), layout=layout, optimized=optimized)


def gpu_kernel(
    body: Any, operands: Sequence[Any], updated: Sequence[jax.Array], *,
    out_type: Sequence[Any], scratch_types: Sequence[Any], compiler_params: Any, grid: tuple[int, ...],
    grid_names: tuple[Any, ...], **mesh_options: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:  # fmt: skip
    """``plgpu.kernel``, but some arrays may be changed in place, under shard_map and vmap as well.

    A kernel that is given a mutable array (``jax.new_ref``) does not work under ``shard_map(check_vma=True)``.

    Args:
      body: called with refs of the operands, of the updated arrays, of the outputs, and the scratch.
      updated: what is changed in place (a copy of it, where it is used elsewhere).

    Returns:
      (updated, outputs).
    """
    from jax._src.pallas import mpmd
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    options = {"scratch_types": scratch_types, "compiler_params": compiler_params, **mesh_options}
    if not updated:
        run = plgpu.kernel(body, out_type=list(out_type), grid=grid, grid_names=grid_names, **options)
        return (), tuple(run(*operands))
    num_updated = len(updated)

    @jax.custom_batching.custom_vmap
    def run_updating(updated: Sequence[jax.Array], operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, **mesh_options)
        count = len(operands)

        def kernel(*refs: Any) -> None:
            # The arrays that go in and those that come out are the same memory.
            given = functools.partial(body, *refs[:count], *refs[count + num_updated :])
            pl.run_scoped(given, *scratch_types, collective_axes=mesh.thread_name)

        with _config._check_vma(False):  # as plgpu.kernel does; the types of the outputs say what they vary over
            return tuple(
                mpmd._mpmd_map(
                    [(mesh, kernel)],
                    [*(shape_like(x.shape, x.dtype, x) for x in updated), *out_type],
                    input_output_aliases={count + n: n for n in range(num_updated)},
                    compiler_params=compiler_params,
                    name=mesh.kernel_name,
                    # As plgpu.kernel does: under force_gpu_interpret_mode, which shares this with TPU's.
                    interpret=_config.pallas_tpu_interpret_mode_context_manager.value or False,
                )(*operands, *updated)
            )

    @run_updating.def_vmap
    def _with_one_more_grid_axis(size: int, is_batched: Any, updated: Any, operands: Any) -> Any:
        axis = object()
        whole = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(updated, is_batched[0], strict=True)]
        of_outputs = (True,) * (num_updated + len(out_type))

        def at_index(*refs: Any) -> None:
            index, flags = jax.lax.axis_index(axis), (*is_batched[1], *of_outputs)
            body(*(r.at[index] if f else r for r, f in zip(refs, flags, strict=False)), *refs[len(flags) :])

        changed, outputs = gpu_kernel(
            at_index, operands, whole,
            out_type=[t.update(shape=(size, *t.shape)) for t in out_type],
            grid=(size, *grid), grid_names=(axis, *grid_names), **options,
        )  # fmt: skip
        return (*changed, *outputs), of_outputs

    everything = run_updating(tuple(updated), tuple(operands))
    return everything[:num_updated], everything[num_updated:]
