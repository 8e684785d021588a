"""A report as lines of text."""

import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from ..planner import documents
from ..units import size, table
from .cycles import base_name
from .order import Done, Launch, Loop, Order, Start
from .program import Program
from .report import RANK, Payload, Report, carries


def lines(report: Report) -> Iterator[str]:
    """Section after section: the label of each stands in front of its first line."""
    sections = {
        "ring": _ring(report),
        "order": _order(report),
        "wire": _wire(report),
        "memory": _memory(report),
        "work": _work(report),
        "cycles": _cycles(report),
    }
    if report.documents is not None:
        sections["packing"] = documents.lines(report.documents)
    for number, (label, body) in enumerate(sections.items()):
        if number:
            yield ""
        for index, line in enumerate(body):
            yield f"{label if index == 0 else '':<8}{line}"


def describe_mask(report: Report) -> str:
    """The mask in words."""
    program = report.program
    left, right = program.bounds
    words = ["causal"] if program.is_causal else []
    if left is not None or (right is not None and not program.is_causal):
        sides = ["all" if side is None else str(side) for side in (left, right)]
        words.append(f"window ({', '.join(sides)})")
    words += [_segments(program)] if program.segments else []
    return ", ".join(words) or "no mask"


def _segments(program: Program) -> str:
    promised = [] if program.max_segment_length is None else [f"of at most {program.max_segment_length} places"]
    if program.shared_length is not None:
        several = program.shared_length if isinstance(program.shared_length, tuple) else (program.shared_length,)
        promised.append(f"{', '.join(map(str, several))} tokens of a shard in those of several shards")
    return f"segments ({', '.join(promised)})" if promised else "segments"


def _ring(report: Report) -> Iterator[str]:
    program, slice_ = report.program, report.program.slice
    number = program.side_by_side
    rings = "one ring" if number == 1 else f"{number} rings side by side, each"
    hbm = size(slice_.memory_bytes)
    yield f"{slice_.name}, {slice_.num_devices} devices of {hbm}: {rings} of {program.ring}"
    if len(program.axes) > 1 or program.words != ("ring",) or program.direction == "both" or program.rings > 1:
        words = [f"{word} over {axis}" for word, axis in zip(program.words, program.axes, strict=True)]
        part = "half of every block each way round" if program.both else "every block the same way round"
        ways = part + (f", in parts over {program.rings} rings without a common link" if program.rings > 1 else "")
        yield f"axes {' x '.join(map(str, program.axes))}: {', then '.join(words)}" + (
            f"; {ways}" if "ring" in program.sharing.words else ""
        )
        if program.sharing.words != program.words:
            yield "keys that nobody can need stay where they are: the others are fetched, and nothing is gathered"
    passes = "forward and backward" if program.backward else "forward"
    values = "" if program.value_head_dim == program.head_dim else f", values of {program.value_head_dim}"
    yield (
        f"{passes}; {program.batch} x {program.seq_len} tokens, {program.shard_length} per device; {program.layout}; "
        f"{describe_mask(report)}"
    )
    yield (
        f"{program.heads} heads on {program.kv_heads} K/V heads of {program.head_dim}{values}, {program.dtype}; "
        f"implementation {program.implementation or 'default'}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.compiled.versions.items())
    yield f"compiled in {report.compiled.lower_seconds + report.compiled.compile_seconds:.1f} s by {versions}"
    if slice_.platform == "gpu" and report.compiled.flags:
        yield f"XLA_FLAGS {report.compiled.flags}"


def _order(report: Report) -> Iterator[str]:
    if not report.collectives:
        yield "no permutes: a ring of one, or nobody needs another's block"
        return
    sync = report.num_synchronous
    kind = "all asynchronous" if not sync else f"{sync} SYNCHRONOUS"
    together = f", sent in {report.num_operations} operations" if report.num_operations < report.num_permutes else ""
    yield f"permutes hidden {report.num_hidden}/{report.num_permutes}, {kind}{together}"
    rows = [("carries", "by", "bytes each", "executed", "asynchronous", "hidden")]
    rows += [
        (
            f"{p.carries} ({p.dtype})",
            _way(report, p),
            size(p.bytes),
            str(p.times),
            str(p.asynchronous),
            str(p.hidden),
        )  # fmt: skip
        for p in report.payloads
    ]
    yield from table(rows)
    if report.exposed:
        sent: dict[tuple[str, int], int] = {}
        for p in report.exposed:
            sent[p.name, p.times] = sent.get((p.name, p.times), 0) + p.bytes
        names = sorted(f"{name} ({times} x {size(num)})" for (name, times), num in sent.items())
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield f"no kernel runs behind {', '.join(names[:6])}{more}"
    issued = "issued: " + _abridged(list(_issued(report.order, report)))
    yield from textwrap.wrap(issued, 112, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    counts: dict[str, int] = {}
    for name, times in report.kernels.items():
        counts[base_name(name)] = counts.get(base_name(name), 0) + times
    yield "kernel calls: " + ", ".join(f"{name} {times}" for name, times in counts.items())


def _way(report: Report, sent: Payload | Start) -> str:
    """A kind of collective, how far it goes, on which of several rings and over which of several axes."""
    over = f" over axis {sent.axis}" if sent.axis is not None and len(report.program.axes) > 1 else ""
    ring = f" on ring {sent.ring}" if sent.ring is not None and report.program.rings > 1 else ""
    return sent.kind + ("" if sent.shift is None else f" {sent.shift:+d}") + ring + over


def _issued(order: Order, report: Report) -> Iterator[str]:
    """The events in words; neighbours that are alike are one."""
    for kind, group in itertools.groupby(order, type):
        events: list[Any] = list(group)
        if kind is Loop:
            yield from (f"{one.times} x ({' | '.join(_issued(one.body, report))})" for one in events)
        elif kind is Launch:
            yield ", ".join(base_name(one.name) for one in events)
        elif kind is Done:
            yield f"await {len(events)}"
        else:
            sent = [(_way(report, one), carries(one, report.program)) for one in events]
            for way in sorted({way for way, _ in sent}):  # the compiler's order among them says nothing
                yield f"{way}: {', '.join(sorted({what for other, what in sent if other == way}, key=RANK.index))}"


def _abridged(parts: list[str], most: int = 14) -> str:
    left_out = len(parts) - most
    if left_out > 1:
        parts = [*parts[: most // 2], f"... {left_out} more ...", *parts[-(most // 2) :]]
    return " | ".join(parts)


def _wire(report: Report) -> Iterator[str]:
    rotations = report.program.num_rotations()
    yield (
        f"{size(report.wire_bytes_per_hop)} per hop (K, V and what belongs to them), {rotations} rotations, "
        f"{size(report.wire_bytes)} sent per device in all"
    )
    yield f"blocks worked on {report.hops_made} of {report.num_blocks}, hops elided {report.hops_elided}"
    port = report.program.slice.platform == "gpu"
    name = "port of a GPU" if port else "link between neighbours"
    rows = [(f"through a {name}, of axis", "out" if port else "up", "in" if port else "down")]
    rows += [
        (f"{link.axis} ({report.program.axes[link.axis]})", size(link.up), size(link.down)) for link in report.links
    ]
    if report.links:
        yield from table(rows)


def _memory(report: Report) -> Iterator[str]:
    peak, floor = report.compiled.peak_bytes, report.floor_bytes
    hbm = report.program.slice.memory_bytes
    vmem = report.held_bytes - peak  # small arrays that the compiler for TPUs never places in HBM
    where = f" of HBM and up to {size(vmem)} of VMEM" if vmem else ""
    yield (
        f"peak {size(peak)}{where} per device, {report.held_bytes / floor:.3f} x the floor of {size(floor)}; "
        f"{peak / hbm:.1%} of its memory"
    )
    yield from table([(term.name, size(term.bytes)) for term in report.floor_terms])
    yield "as the ring grows and the sequence stays"
    rows = [("devices", "floor", "peak")]
    rows += [
        (str(row.ring), size(row.floor_bytes), "-" if row.peak_bytes is None else size(row.peak_bytes))
        for row in report.scaling
    ]
    yield from table(rows)


def _work(report: Report) -> Iterator[str]:
    pairs = report.pairs_per_rank
    yield f"attended pairs per rank and head: mean {pairs.mean():.4g}, least {pairs.min():.4g}, most {pairs.max():.4g}"
    yield (
        f"imbalance {report.imbalance:.3f} (most / mean); hop by hop in lockstep {report.lockstep_imbalance:.3f} "
        "(sum over hops of the most, / mean)"
    )


def _cycles(report: Report) -> Iterator[str]:
    if report.program.slice.platform != "tpu":
        yield "none: the floor of the matrix units and the static estimates of kernels are of TPUs"
        return
    floors = ", ".join(f"{name} {cycles:,.0f}" for name, cycles in report.mxu_floor_cycles.items())
    yield f"matrix units need at least, for the busiest rank: {floors}"
    if report.cycles is None:
        yield "static estimates of the kernels: not asked for (--cycles)"
    elif report.cycles.reason is not None:
        yield f"static estimates of the kernels: {report.cycles.reason}"
    else:
        rows = [("kernel", "cycles per call", "calls")]
        rows += [(name, f"{n:,}", str(report.kernels[name])) for name, n in report.cycles.estimates.items()]
        yield "static estimates of the kernels, every tile visited"
        yield from table(rows)
