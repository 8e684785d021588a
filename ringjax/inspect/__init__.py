"""`ringjax inspect`: compiles a ring for TPUs or GPUs that are absent, and reads what the compiler made of it.

The order in which permutes and kernels are issued, memory against its floor, bytes on the wire, work of every rank.
The compiler runs in a child process. Nothing runs on a device, so nothing here is a speed.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from . import wire
from .compile import Compiled as Compiled
from .compile import InspectError as InspectError
from .compile import compile_ring
from .cycles import Cycles as Cycles
from .cycles import estimate_cycles
from .documents import deal
from .memory import floor_bytes, floor_terms
from .order import kernels, read_order
from .program import Program as Program
from .report import Report as Report
from .report import Scaling
from .topology import parse_topology
from .work import pairs

__all__ = ["Compiled", "Cycles", "InspectError", "Program", "Report", "floor_bytes", "floor_terms", "inspect_ring"]


def inspect_ring(
    topology: str,
    *,
    seq_len: int,
    heads: int,
    head_dim: int,
    ring: int | None = None,
    kv_heads: int | None = None,
    value_head_dim: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    layout: str = "zigzag",
    stripe: int = 1,
    is_causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    segments: bool = False,
    max_segment_length: int | None = None,
    shared_length: int | tuple[int, ...] | None = None,
    documents: Any = None,
    backward: bool = False,
    implementation: str | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    unroll: int | None = None,
    dkv_dtype: str = "float32",
    device_order: str = "ring_mesh",
    axes: tuple[int, ...] | None = None,
    strategy: str | tuple[str, ...] = "ring",
    direction: str = "forward",
    rings: int = 1,
    cycles: bool = False,
    sweep: Sequence[int] = (),
    timeout: float = 600.0,
) -> Report:
    """Compiles ring attention for a topology of TPUs or GPUs and reports on it.

    Where the ring takes fewer devices than the topology has, and divides them, such rings stand side by side and each
    has a batch of its own; where it does not divide them, one ring is compiled and the other devices take no part,
    which v5e and v6e refuse on all but small slices.

    Args:
      topology: "v5p:8x8x16": generation (v4, v5e, v5p, v6e, tpu7x or v7x) and sides in chips. "h100:8": GPU (a100,
        h100, h200 or b200) and how many of them a host has; "h100:4x8": four such hosts. "2*v5e:4x4": two slices of
        TPUs, joined by the network of their hosts.
      seq_len: T, tokens of the whole sequence; a multiple of the layout's unit.
      heads, kv_heads: N and K; K is N unless given.
      head_dim, value_head_dim: H and Hv; Hv is H unless given.
      ring: C, devices that share the sequence; the product of ``axes``, or all of the topology, unless given.
      axes: sizes of the axes of the sequence, outermost first; one of all C unless given. Slices are the outermost.
      batch: sequences of one ring.
      dtype: of query, key and value: "bfloat16", "float16" or "float32".
      layout, stripe, is_causal, window: as in :func:`ringjax.ring_attention`; ``stripe`` is that of "striped".
      segments: give segment ids, which then travel as well.
      max_segment_length, shared_length: what is promised of them, as in :func:`ringjax.ring_attention`.
      documents: lengths, a file of them or a distribution, as in :func:`ringjax.plan`. The report then says what
        becomes of these documents as they come, in this program, and dealt by :func:`ringjax.pack`, which may share
        ``shared_length`` tokens of a shard. Of segments alone, in contiguous or zigzag layout.
      backward: the forward pass and all gradients in one program, instead of the forward pass alone.
      strategy, direction, rings: of the axes, see :class:`ringjax.RingConfig`. Neighbours are physical ones on the
        innermost axis of strategy "ring".
      implementation, block_q, block_kv, unroll, dkv_dtype: see :class:`ringjax.RingConfig`.
      device_order: "ring_mesh", or "make_mesh": the order of ``jax.make_mesh``, to compare; TPUs alone.
      cycles: also ask for static cycle estimates of the kernels; compiles once more. TPUs alone.
      sweep: other sizes of ring to compile for the table of memory; of several axes the outermost changes.
      timeout: seconds for each compilation.

    Returns:
      The report.

    Raises:
      ValueError: for arguments that do not fit.
      InspectError: the platform's compiler is not installed, or it refused, aborted or took too long.
    """
    given = (window, window) if isinstance(window, int) else window
    sizes = {"heads": heads, "kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim}
    program = Program(
        topology, _devices(topology, axes) if ring is None else ring, seq_len, **sizes,
        value_head_dim=head_dim if value_head_dim is None else value_head_dim, batch=batch, dtype=dtype,
        layout=layout, stripe=stripe, is_causal=is_causal, window=given, segments=segments,
        max_segment_length=max_segment_length, shared_length=shared_length, backward=backward,
        implementation=implementation, block_q=block_q, block_kv=block_kv, unroll=unroll, dkv_dtype=dkv_dtype,
        device_order=device_order, axes=() if axes is None else axes, strategy=strategy, direction=direction,
        rings=rings,
    )  # fmt: skip
    if cycles and program.slice.platform != "tpu":
        raise ValueError(f"cycles must be False for {program.slice.name}: static estimates are of TPUs. Got True.")
    dealt = None if documents is None else deal(program, documents)
    others = [program.with_ring(size) for size in sweep if size != program.ring]  # refuses before anything is compiled
    compiled = compile_ring(program, timeout=timeout)
    order = read_order(compiled.text, wire.Devices((program.side_by_side, *program.axes), compiled.rings))
    peaks = {program.ring: compiled.peak_bytes}
    peaks |= {other.ring: compile_ring(other, timeout=timeout).peak_bytes for other in others}
    found = estimate_cycles(program, kernels(order), timeout=timeout) if cycles else None
    return Report(program, compiled, order, pairs(program), found, _scaling(program, peaks), dealt)


def _devices(topology: str, axes: tuple[int, ...] | None) -> int:
    """As many as the axes have; all where there are none, or none that could be multiplied."""
    if axes and all(isinstance(size, int) and size > 0 for size in axes):
        return math.prod(axes)
    return parse_topology(topology).num_devices


def _scaling(program: Program, peaks: dict[int, int]) -> tuple[Scaling, ...]:
    """The floor for every ring that was compiled, and for a half and a quarter, twice and four times this one."""
    floors = {ring: floor_bytes(program.with_ring(ring)) for ring in peaks}
    near = [program.ring // factor for factor in (4, 2) if program.ring % factor == 0]
    for ring in (*near, 2 * program.ring, 4 * program.ring):
        with contextlib.suppress(ValueError):  # more devices than there are, or a size that does not divide
            floors.setdefault(ring, floor_bytes(program.with_ring(ring)))
    return tuple(Scaling(ring, floors[ring], peaks.get(ring)) for ring in sorted(floors))
