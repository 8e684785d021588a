"""What the times of `ringjax bench ring` mean: rows, the planner's choice beside them, and the table in a document."""

from __future__ import annotations

import dataclasses
import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ringjax.bench import document
from ringjax.bench.ring_measure import Measured
from ringjax.bench.ring_programs import ONE_DEVICE, OURS, PLAIN, Left, Problem, Program
from ringjax.bench.ring_torch import Result

COLUMNS = ("program", "kernel", "ms", "TFLOP/s per device", "times as fast", "efficiency", "of plain")
WITHIN = 1.05  # of our fastest: the planner has chosen well


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program.

    Attributes:
      name, kernel, layout, num_devices, strategy: see Program.
      milliseconds: of one call, the median over the rounds.
      tflops: per device, of the products that the mask needs.
      times_as_fast: the fastest peer's time over this one. None: no peer was timed.
      efficiency: the time of one device with the same kernel over this one, a device. None: one device was not timed.
      of_plain: this time over that of the same exchange written by hand around our kernel. None: there is none.
      difference, largest_difference: of the results from those of the first program, relative to its norm and its
        largest entry. None: not compared.
      same_as: the earlier one of ours that compiles to the same program, and whose time this is.
      plan: of the planner's choice, this time over that of the fastest of ours on the same mesh, one direction alike,
        which is not the planner's to choose; None: it chose another.
      rounds: the times.
    """

    name: str
    kernel: str
    layout: str
    num_devices: int
    strategy: tuple[str, ...]
    milliseconds: float
    tflops: float
    times_as_fast: float | None
    efficiency: float | None
    of_plain: float | None
    difference: float | None
    largest_difference: float | None
    same_as: str | None
    plan: float | None
    rounds: list[float]


@dataclasses.dataclass(frozen=True)
class Group:
    """A problem and a pass."""

    shape: str
    mask: str
    direction: str
    peer: str | None  # the fastest
    rows: list[Row]
    left: list[Left]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def conclude(
    problem: Problem,
    direction: str,
    measured: Measured,
    left: Sequence[Left],
    chosen: Sequence[tuple[tuple[int, ...], tuple[str, ...]]] = (),
) -> Group:
    """Rows from times.

    Args:
      problem, direction: what was computed.
      measured: the programs and their times.
      left: programs without times.
      chosen: the planner's strategy for each mesh, by the sizes of its axes.
    """
    pairs = list(zip(measured.programs, measured.times, strict=True))
    is_peer = lambda program: program.kernel != OURS and program.name != ONE_DEVICE  # noqa: E731
    median = lambda pair: statistics.median(pair[1])  # noqa: E731
    peer = min((pair for pair in pairs if is_peer(pair[0])), key=median, default=None)
    ours: dict[tuple[int, ...], list[float]] = {}  # the fastest on each mesh
    for program, times in sorted(pairs, key=median):
        if program.strategy and not program.variant:
            ours.setdefault(program.sizes, times)
    alone = {program.kernel: times for program, times in pairs if program.name == ONE_DEVICE}
    plain = {program.name: times for program, times in pairs if program.kernel == OURS and not program.strategy}
    work, rows = problem.flops(direction), []
    for number, (program, times) in enumerate(pairs):
        count, one = program.num_devices, alone.get(program.kernel)
        by_hand = plain.get(PLAIN.get(program.name, "")) if program.strategy else None
        took, same = statistics.median(times), measured.same[number]
        rows.append(
            Row(
                name=program.name,
                kernel=program.kernel,
                layout=program.layout,
                num_devices=count,
                strategy=program.strategy,
                milliseconds=took,
                tflops=work / count / took / 1e9,
                times_as_fast=None if peer is None else ratio(peer[1], times),
                efficiency=None if one is None else ratio(one, times) / count,
                of_plain=None if by_hand is None else ratio(times, by_hand),
                difference=measured.differences[number][0],
                largest_difference=measured.differences[number][1],
                same_as=None if same is None else same.name,
                plan=ratio(times, ours[program.sizes]) if _is_chosen(program, chosen) else None,
                rounds=times,
            )
        )
    timed = {(program.sizes, program.strategy) for program in measured.programs}
    absent = [
        Left(f"the plan's {' x '.join(words)} on {' x '.join(map(str, sizes))}", OURS, "not among what was timed")
        for sizes, words in chosen
        if (sizes, words) not in timed
    ]
    name = None if peer is None else peer[0].label
    return Group(str(problem.shape), problem.mask, direction, name, rows, [*left, *absent])


def _is_chosen(program: Program, chosen: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]) -> bool:
    """The plan says no direction: that which the call takes without being told."""
    return (program.sizes, program.strategy) in chosen and not program.variant


def with_others(group: Group, problem: Problem, num_devices: int, results: Sequence[Result]) -> Group:
    """Adds what was timed in processes of its own, and so is compared by medians and not within a round."""
    peer = next((row.milliseconds for row in group.rows if f"{row.name}, {row.kernel}" == group.peer), None)
    work = problem.flops(group.direction)
    rows = [
        Row(
            name=result.name,
            kernel=result.kernel,
            layout="zigzag" if problem.is_causal else "contiguous",
            num_devices=num_devices,
            strategy=(),
            milliseconds=result.milliseconds,
            tflops=work / num_devices / result.milliseconds / 1e9,
            times_as_fast=None if peer is None else peer / result.milliseconds,
            efficiency=None,
            of_plain=None,
            difference=None,
            largest_difference=None,
            same_as=None,
            plan=None,
            rounds=[result.milliseconds],
        )
        for result in results
        if result.milliseconds is not None
    ]
    left = [Left(one.name, one.kernel, one.reason or "") for one in results if one.milliseconds is None]
    return dataclasses.replace(group, rows=[*group.rows, *rows], left=[*group.left, *left])


def find_planner() -> tuple[Callable[..., tuple[str, ...]] | None, str]:
    """The function that chooses strategies, and why there is none."""
    try:
        return importlib.import_module("ringjax.planner").choose_strategy, ""
    except (ImportError, AttributeError) as error:
        return None, str(error)


def plan_of(
    choose: Callable[..., tuple[str, ...]],
    problem: Problem,
    direction: str,
    sizes: Sequence[tuple[int, ...]],
    device: Any,
    itemsize: int,
) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """What the planner chooses on each mesh, told what a call knows at trace time: lengths are a shard's."""
    if problem.documents is not None:
        raise ValueError("at trace time it is not told of documents; see ringjax plan --documents")
    shape = problem.shape
    return [
        (
            each,
            tuple(
                choose(
                    axis_sizes=each,
                    device_kind=device.device_kind,
                    platform=device.platform,
                    query_length=shape.length // math.prod(each),
                    key_length=shape.length // math.prod(each),
                    num_heads=shape.heads,
                    num_kv_heads=shape.kv_heads,
                    head_size=shape.head_size,
                    value_size=shape.head_size,
                    itemsize=itemsize,
                    batch=shape.batch,
                    is_causal=problem.is_causal,
                    window=None if problem.window is None else (problem.window, 0),
                    layout=problem.balancing,
                    backward=direction == "fwd+bwd",
                )
            ),
        )
        for each in sizes
    ]


def columns(with_plan: bool) -> tuple[str, ...]:
    return (*COLUMNS, "plan") if with_plan else COLUMNS


def cells(row: Row, with_plan: bool = False) -> tuple[str, ...]:
    """As columns names them."""
    figure = lambda value: "-" if value is None else f"{value:.3f}"  # noqa: E731
    name = row.name if row.same_as is None else f"{row.name} (as {row.same_as})"
    found = (
        name,
        row.kernel,
        f"{row.milliseconds:.3f}",
        f"{row.tflops:.0f}" if row.tflops >= 10 else f"{row.tflops:.3g}",
        *map(figure, (row.times_as_fast, row.efficiency, row.of_plain)),
    )
    if not with_plan:
        return found
    near = "" if row.plan is None else f"{row.plan:.3f}, {'within' if row.plan <= WITHIN else 'not within'} 5%"
    return (*found, near or "-")


def summary(groups: Sequence[Group]) -> list[str]:
    """What the figures amount to, a line for each pass."""
    lines = []
    for direction in dict.fromkeys(group.direction for group in groups):
        rows = [row for group in groups if group.direction == direction for row in group.rows]
        for name, by_hand in PLAIN.items():
            found = [row.of_plain for row in rows if row.name == name and row.of_plain is not None]
            if found:
                lines.append(
                    f"{direction}: {name} takes {statistics.median(found):.3f} of the {by_hand} around our kernel in "
                    f"the median, {max(found):.3f} at most."
                )
        best = [
            max((row.times_as_fast or 0 for row in group.rows if row.strategy), default=0)
            for group in groups
            if group.direction == direction and group.peer is not None
        ]
        if best := [value for value in best if value]:
            lines.append(
                f"{direction}: our fastest strategy is {statistics.median(best):.3f} times as fast as the fastest peer "
                f"in the median, {min(best):.3f} at least."
            )
        plans = [row.plan for row in rows if row.plan is not None]
        if plans:
            near = sum(plan <= WITHIN for plan in plans)
            lines.append(f"{direction}: the planner's choice is within 5% of our fastest in {near} of {len(plans)}.")
    return lines


def document_lines(title: str, groups: Sequence[Group], left: Sequence[str], with_plan: bool) -> list[str]:
    """Of the document: the table, what is missing from it, and what it amounts to."""
    names = ("shape", "mask", "pass", *columns(with_plan))
    rows = [
        (group.shape, group.mask, group.direction, *cells(row, with_plan)) for group in groups for row in group.rows
    ]
    missing = dict.fromkeys(left, "")
    for group in groups:
        for one in group.left:
            text = f"{one.name}, {one.kernel}: {one.reason}"
            missing[text] = f"{missing.get(text, '')}; {group.shape}, {group.mask}, {group.direction}"
    lines = [title + ".", "", *document.markdown(names, rows, num_left=5), "", *(f"{x}  " for x in summary(groups))]
    return (
        [*lines, "", "Not timed:", "", *(f"- {text}{where}" for text, where in missing.items())] if missing else lines
    )
