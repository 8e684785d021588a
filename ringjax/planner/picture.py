"""The picture of a plan: where the time of a layer goes, way by way, and the memory that each needs."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from ..units import duration, size
from . import words
from .choice import Candidate, Plan
from .text import best_of_each, heading

_MOST_ROWS = 14
_PARTS = (("products", "#2f6b9a"), ("hops and exchanges", "#f0a75c"), ("wire exposed", "#c8352b"))
_MEMORY = "#7a5195"


def draw(plan: Plan, path: Path | str) -> None:
    """Writes the PNG."""
    rows = [candidate for candidate in best_of_each(plan.candidates) if candidate.reason is None][:_MOST_ROWS]
    figure = Figure(figsize=(13, 2.4 + 0.42 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend the user's matplotlibrc names
    figure.suptitle("\n".join(heading(plan)), fontsize=11, x=0.01, ha="left")
    times, memory = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    _draw_times(times, rows)
    _draw_memory(memory, rows, plan.memory_budget)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bits for the same plan


def _draw_times(axes: Any, rows: list[Candidate]) -> None:
    longest = 0.0
    for place, candidate in enumerate(rows):
        cost = candidate.cost
        assert cost is not None
        start = 0.0
        parts = (cost.compute_seconds, cost.overhead_seconds, cost.exposed_seconds)
        for (_, colour), seconds in zip(_PARTS, parts, strict=True):
            axes.barh(place, seconds, left=start, height=0.7, color=colour)
            start += seconds
        axes.text(start, place, f" {duration(start)}", va="center", fontsize=9)
        longest = max(longest, start)
    names = [f"{candidate.name} ({words.layout_name(candidate.way.layout)})" for candidate in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("seconds of one layer, predicted")
    handles = [Patch(color=colour, label=name) for name, colour in _PARTS]
    axes.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)
    _plain(axes)


def _draw_memory(axes: Any, rows: list[Candidate], budget: int) -> None:
    most = 0
    for place, candidate in enumerate(rows):
        cost = candidate.cost
        assert cost is not None
        axes.barh(place, cost.memory_bytes / 2**30, height=0.7, color=_MEMORY)
        # In front of the line of the budget, beside the bar.
        axes.annotate(
            size(cost.memory_bytes),
            (cost.memory_bytes / 2**30, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
        most = max(most, cost.memory_bytes)
    axes.set_xlim(0, 1.35 * most / 2**30)
    if budget <= 1.35 * most:
        axes.axvline(budget / 2**30, color="#222222", linewidth=1, linestyle=":", zorder=0)
    axes.set_xlabel(f"GiB per device, of {size(budget)}")
    axes.tick_params(labelleft=False, left=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
