"""Compiles one ring in a process of its own: python -m ringjax.inspect.child REQUEST RESULT. No device.

The compiler aborts on what it cannot do, and is told what to do by environment variables that it reads when it is
loaded. Both are why nobody imports this module: :mod:`ringjax.inspect.compile` starts it.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DeviceLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..attention import ring_attention
from ..mesh import ring_mesh
from ..torus import torus_rings
from .compile import COMPILERS
from .gpus import Hosts, target_config
from .hlo import bytes_in_vmem, parse
from .program import Program
from .topology import Slices, Topology


def compile_program(program: Program) -> dict[str, Any]:
    """The compiled ring: its scheduled text, its memory, and how long it took."""
    mesh = _mesh(program)
    run = jax.jit(_function(program, mesh), **_formats(program, mesh))
    start = time.perf_counter()
    lowered = run.lower(*_arguments(program, mesh))
    middle = time.perf_counter()
    compiled = lowered.compile()
    stop = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    return {
        "text": text,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "lower_seconds": middle - start,
        "compile_seconds": stop - middle,
        "versions": _versions(program),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "vmem_bytes": bytes_in_vmem(parse(text)) if program.slice.platform == "tpu" else 0,
        "rings": torus_rings(list(mesh.devices.flat), program.rings) if program.rings > 1 else (),
    }


def _versions(program: Program) -> dict[str, str]:
    """Of JAX and of the compiler, as far as the installed packages tell them."""
    found = {}
    for name in ("jax", "jaxlib", *COMPILERS[program.slice.platform]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _describe(topology: Topology) -> topologies.TopologyDescription:
    """The devices as the compiler knows them, all of them absent."""
    if isinstance(topology, Hosts):
        config = target_config(topology.gpu)
        return topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology.shape)
    one = topology.each if isinstance(topology, Slices) else topology
    options: dict[str, Any] = {}
    if one.generation.chip_config is not None:
        options["chip_config_name"] = one.generation.chip_config
    if isinstance(topology, Slices):
        options["num_slices"] = topology.number
    return topologies.get_topology_desc(platform="tpu", topology_name=one.name, **options)


def _axes(program: Program) -> tuple[str, ...]:
    """Names of the axes of the sequence."""
    return ("sp",) if len(program.axes) == 1 else tuple(f"sp{n}" for n in range(len(program.axes)))


def _mesh(program: Program) -> Mesh:
    """The topology: axis "dp" of what stands side by side, and those of the sequence."""
    topology = _describe(program.slice)
    shape, names = (program.side_by_side, *program.axes), ("dp", *_axes(program))
    if program.device_order == "make_mesh":
        return Mesh(topologies.make_mesh(topology, shape, names).devices, names)
    # The innermost ring has the most hops, so it is the one of neighbours. An axis over slices has none.
    words = list(zip(_axes(program), program.words, strict=True))[isinstance(program.slice, Slices) :]
    rings = [name for name, word in words if word == "ring"]
    return ring_mesh(shape, names, ring_axis=rings[-1] if rings else None, devices=topology.devices)


def _function(program: Program, mesh: Mesh) -> Any:
    """What is compiled: attention of (query, key, value[, segment_ids]), or that and its gradients for a dout."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        return ring_attention(
            query,
            key,
            value,
            mesh=mesh,
            axis_name=_axes(program),
            batch_axis_name="dp",
            is_causal=program.is_causal,
            local_window_size=program.window,
            segment_ids=segment_ids,
            max_segment_length=program.max_segment_length,
            shared_length=program.shared_length,
            layout=program.layout_object,
            config=program.config(),
        )

    def forward(query: Any, key: Any, value: Any, segment_ids: Any = None) -> Any:
        return attend(query, key, value, segment_ids)

    def with_gradients(query: Any, key: Any, value: Any, dout: Any, segment_ids: Any = None) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), query, key, value)
        return out, *pull(dout)

    return with_gradients if program.backward else forward


def _arguments(program: Program, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Shapes of whole arrays; nothing is allocated."""
    rows, dtype = program.batch * program.side_by_side, jnp.dtype(program.dtype)
    sizes = [(program.heads, program.head_dim), (program.kv_heads, program.head_dim)]
    sizes += [(program.kv_heads, program.value_head_dim)]
    if program.backward:
        sizes += [(program.heads, program.value_head_dim)]
    arrays = [jax.ShapeDtypeStruct((rows, program.seq_len, *size), dtype) for size in sizes]
    if program.segments:
        arrays.append(jax.ShapeDtypeStruct((rows, program.seq_len), jnp.int32))
    return arrays


def _formats(program: Program, mesh: Mesh) -> dict[str, Any]:
    """Sharded over batch and sequence; how a shard lies in memory is the compiler's choice, as it is within a model."""
    sharding = NamedSharding(mesh, PartitionSpec("dp", _axes(program)))
    free = Format(DeviceLayout.AUTO, sharding)  # pyright: ignore[reportCallIssue, reportArgumentType]
    arrays = [free] * (4 if program.backward else 3) + [sharding] * program.segments
    return {"in_shardings": tuple(arrays), "out_shardings": (free,) * 4 if program.backward else free}


def main(request: str, result: str) -> None:
    """Reads a program, writes what came of it; an error too, so that it can be told from a crash."""
    program = Program.from_json(json.loads(Path(request).read_text(encoding="utf-8")))
    try:
        outcome = compile_program(program)
    except Exception as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"
        outcome = {"error": type(error).__name__, "message": str(error), "where": where}
    Path(result).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
