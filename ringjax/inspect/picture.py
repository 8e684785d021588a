"""The picture of a report: a lane for compute and one for the wire, hop by hop; below it who attends to whom.

The lanes are drawn from the compiled order: the horizontal axis is the order of issue, every kernel as wide as the
next. It is not time.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyBboxPatch, Patch

from ..units import size
from .cycles import base_name
from .order import Done, Event, Launch, Loop, Order, Start, num_kernels
from .report import Report, carries
from .text import describe_mask
from .work import visits

_MOST_KERNELS = 16  # drawn; a longer order is abbreviated
_KERNEL_COLOURS = ("#2f6b9a", "#7a5195", "#3d8361", "#8a6d3b")
_HIDDEN, _EXPOSED = "#f0a75c", "#c8352b"
_WORK = LinearSegmentedColormap.from_list("work", ["#f4f6f8", "#9bb7d4", "#1f4e79"])


@dataclasses.dataclass(frozen=True)
class Gap:
    """Where something is left out."""

    kernels: int


@dataclasses.dataclass(frozen=True)
class Box:
    """A kernel in the compute lane; ``number`` counts the calls of the program from 1."""

    start: float
    stop: float
    name: str
    number: int


@dataclasses.dataclass(frozen=True)
class Bar:
    """A permute in the wire lane, from its start to its done."""

    start: float
    stop: float
    carries: str
    hidden: bool


@dataclasses.dataclass(frozen=True)
class Lanes:
    boxes: tuple[Box, ...]
    bars: tuple[Bar, ...]
    gaps: tuple[tuple[float, int], ...]  # where, and how many kernel calls are left out
    width: float


def unrolled(order: Order, most: int = _MOST_KERNELS) -> Iterator[Event | Gap]:
    """The events as they are executed. If there are too many, loops show their first and last iteration."""
    shorten = num_kernels(order) > most
    for event in order:
        if not isinstance(event, Loop):
            yield event
        elif shorten and event.times > 2:
            yield from unrolled(event.body, most)
            yield Gap((event.times - 2) * num_kernels(event.body))
            yield from unrolled(event.body, most)
        else:
            for _ in range(event.times):
                yield from unrolled(event.body, most)


def lay_out(report: Report, most: int = _MOST_KERNELS) -> Lanes:
    """Where everything goes. A kernel is 1 wide; a permute that nothing hides gets a width of its own."""
    events = _cut(list(unrolled(report.order, most)), most)
    boxes, bars, gaps = [], [], []
    started: dict[str, list[tuple[float, Start]]] = {}  # one operation may carry several arrays
    x, number, behind = 0.0, 0, 0
    seen: dict[str, int] = {}  # kernels issued when a permute started
    for event in events:
        if isinstance(event, Gap):
            gaps.append((x, event.kernels))
            number, x = number + event.kernels, x + 1.0
        elif isinstance(event, Launch):
            number, behind = number + 1, behind + 1
            boxes.append(Box(x, x + 1.0, base_name(event.name), number))
            x += 1.0
        elif isinstance(event, Start) and event.asynchronous:
            started.setdefault(event.name, []).append((x, event))
            seen[event.name] = behind
        elif isinstance(event, Start):
            bars.append(Bar(x, x + 0.6, carries(event, report.program), False))
            x += 0.6
        elif isinstance(event, Done) and event.name in started:
            arrays = started.pop(event.name)
            if arrays[0][0] == x:  # the wire works alone
                x += 0.6
            for start, issued in arrays:
                bars.append(Bar(start, x, carries(issued, report.program), behind > seen[event.name]))
    return Lanes(tuple(boxes), tuple(bars), tuple(gaps), x)


def _cut(events: list[Event | Gap], most: int) -> list[Event | Gap]:
    """An order that is unrolled in the program: its first and its last kernels."""
    places = [i for i, event in enumerate(events) if isinstance(event, Launch)]
    if len(places) <= most + 4:
        return events
    first, last = places[most // 2], places[-(most // 2) - 1]
    # Between two kernels: the permutes that wait for the one before belong to it.
    while isinstance(events[first - 1], Start):
        first -= 1
    while last + 1 < len(events) and isinstance(events[last + 1], Done):
        last += 1
    left_out = sum(
        event.kernels if isinstance(event, Gap) else isinstance(event, Launch) for event in events[first : last + 1]
    )
    return [*events[:first], Gap(left_out), *events[last + 1 :]]


def draw(report: Report, path: Path | str) -> None:
    """Writes the PNG."""
    figure = Figure(figsize=(13, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend the user's matplotlibrc names
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(0.78, 1)))
    program = report.program
    passes = "forward and backward" if program.backward else "forward"
    figure.suptitle(
        f"{program.slice.name}, ring of {program.ring}, {program.seq_len} tokens, {program.layout}, "
        f"{describe_mask(report)}, {passes}",
        fontsize=13,
        fontweight="bold",
    )
    _draw_lanes(report, lay_out(report), upper.subplots())
    matrix, bars = lower.subplots(1, 2, width_ratios=(5, 1), sharey=True)
    _draw_work(report, matrix, bars, lower)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bits for the same report


def _draw_lanes(report: Report, lanes: Lanes, axes: Any) -> None:
    rows = [payload.carries for payload in report.payloads]
    rows = list(dict.fromkeys(rows))
    names = list(dict.fromkeys(box.name for box in lanes.boxes))
    colours = {name: _KERNEL_COLOURS[i % len(_KERNEL_COLOURS)] for i, name in enumerate(names)}
    for box in lanes.boxes:
        _box(axes, box.start + 0.06, box.stop - 0.06, 0.0, 0.8, colours[box.name])
        middle = (box.start + box.stop) / 2
        axes.text(middle, 0.4, str(box.number), color="white", ha="center", va="center", fontsize=9)
    height = 0.8 / max(1, len(rows)) if len(rows) < 3 else 0.42
    for bar in lanes.bars:
        y = 1.15 + rows.index(bar.carries) * (height + 0.08)
        _box(axes, bar.start + 0.02, bar.stop - 0.02, y, height, _HIDDEN if bar.hidden else _EXPOSED)
    top = 1.15 + len(rows) * (height + 0.08)
    for x, count in lanes.gaps:
        axes.text(x + 0.5, 0.4, f"...\n{count}\nmore", ha="center", va="center", fontsize=9, color="#555555")
    axes.set_xlim(-0.15, max(lanes.width, 8.0) + 0.15)
    axes.set_ylim(top + 0.05, -0.15)
    axes.set_yticks([0.4, *(1.15 + i * (height + 0.08) + height / 2 for i in range(len(rows)))])
    axes.set_yticklabels(["compute", *(f"wire: {row}" for row in rows)])
    axes.set_xticks([])
    axes.set_xlabel("order of issue, numbered by kernel call (not time)", loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    handles = [Patch(color=colours[name], label=f"kernel ({name})") for name in names]
    words = {_HIDDEN: "behind a kernel", _EXPOSED: "with nothing to hide behind"}
    drawn = {_HIDDEN if bar.hidden else _EXPOSED for bar in lanes.bars}
    handles += [Patch(color=colour, label=label) for colour, label in words.items() if colour in drawn]
    axes.legend(handles=handles, ncols=6, loc="upper right", bbox_to_anchor=(1.0, 0.0), frameon=False, fontsize=9)
    synchronous = f", {report.num_synchronous} of them synchronous" if report.num_synchronous else ""
    axes.set_title(
        f"permutes hidden {report.num_hidden}/{report.num_permutes}{synchronous}; "
        f"{size(report.wire_bytes_per_hop)} per hop",
        loc="left",
        fontsize=11,
    )


def _box(axes: Any, start: float, stop: float, y: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.05"
    width = max(stop - start, 0.02)
    axes.add_patch(FancyBboxPatch((start, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none"))


def _draw_work(report: Report, matrix: Any, bars: Any, figure: Any) -> None:
    sharing = report.program.sharing
    share = report.pairs / (sharing.queries.length * sharing.keys.length)
    ranks, hops = share.shape
    image = matrix.imshow(share, aspect="auto", cmap=_WORK, vmin=0.0, vmax=1.0, interpolation="nearest")
    if max(ranks, hops) <= 16:
        _write_cells(matrix, share)
    offsets = [",".join(map(str, there)) for there in visits(report.program.schedule())]
    matrix.set_xticks(_ticks(hops), [offsets[tick] for tick in _ticks(hops)])
    matrix.set_yticks(_ticks(ranks), [str(tick) for tick in _ticks(ranks)])
    elided = f" ({report.hops_elided} of {report.num_blocks} hops left out)" if report.hops_elided else ""
    matrix.set_xlabel(f"hop t: rank r works on the block of rank r + t{elided}")
    matrix.set_ylabel("rank")
    matrix.set_title("who attends to whom: share of the block's (query, key) pairs", loc="left", fontsize=11)
    figure.colorbar(image, ax=matrix, location="left", shrink=0.9, pad=0.02)
    total = report.pairs_per_rank / max(report.pairs_per_rank.mean(), 1e-9)
    bars.barh(np.arange(ranks), total, height=1.0 if ranks > 32 else 0.85, color="#2f6b9a")
    bars.axvline(1.0, color="#222222", linewidth=1, linestyle=":")
    bars.set_xlim(0, max(1.2, float(total.max()) * 1.08))
    bars.set_xlabel("work of a rank / mean")
    bars.set_title(f"imbalance {report.imbalance:.2f}", loc="left", fontsize=11)
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(labelleft=False, left=False)


def _write_cells(axes: Any, share: np.ndarray) -> None:
    """The number in every cell, and lines between the cells."""
    for (row, column), value in np.ndenumerate(share):
        text = "0" if value == 0 else "1" if value == 1 else f"{value:.2f}".lstrip("0")
        colour = "white" if value > 0.6 else "#bbbbbb" if value == 0 else "#1f2d3a"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    rows, columns = share.shape
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=1)
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=1)


def _ticks(count: int) -> list[int]:
    """Every rank or hop, or every 2nd, 4th, 8th, ...: at most 17."""
    step = 1
    while count > 17 * step:
        step *= 2
    return list(range(0, count, step))
