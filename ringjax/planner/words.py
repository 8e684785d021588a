"""A plan in words: names of ways, why one was chosen, Python to paste. Knows no formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..layout import Contiguous, Layout, Striped, Zigzag
from ..units import duration, size
from .estimate import Problem, Way

if TYPE_CHECKING:
    from .choice import Candidate

_LAYOUTS = {Contiguous: "contiguous", Zigzag: "zigzag", Striped: "striped"}
# What an axis is called in the code to paste, by its word.
_AXES = {"ring": "ring", "all_gather": "keys", "all_to_all": "heads"}


def layout_name(layout: Layout) -> str:
    return _LAYOUTS.get(type(layout), str(layout))


def name_of(way: Way) -> str:
    """As "ring 16 x all_to_all 4, both ways"."""
    said = " x ".join(f"{word} {size}" for word, size in zip(way.words, way.sizes, strict=True))
    said += f", {way.rings} rings" if way.rings > 1 else ""
    return f"{said}, both ways" if way.direction == "both" else said


def too_large(needed: int, budget: int) -> str:
    return f"needs {size(needed)} per device, more than {size(budget)}"


def why(candidates: Sequence[Candidate], budget: int) -> str:
    """The choice, what it is made of, and what the others lose against it."""
    best = candidates[0]
    assert best.cost is not None
    cost = best.cost
    lines = [
        f"{best.name} ({layout_name(best.way.layout)}) takes {duration(cost.seconds)} per layer: products "
        f"{duration(cost.compute_seconds)}, {_rest(best)}. It needs {size(cost.memory_bytes)} of {size(budget)} per "
        "device."
    ]
    for words in dict.fromkeys(candidate.way.words for candidate in candidates):
        other = next(candidate for candidate in candidates if candidate.way.words == words)
        if words != best.way.words:
            lines.append(_against(other, best))
    return "\n".join(lines)


def _rest(candidate: Candidate) -> str:
    cost = candidate.cost
    assert cost is not None
    what = "hops and exchanges" if len(set(candidate.way.words)) > 1 else _costly(candidate.way)
    said = [f"{what} cost {duration(cost.overhead_seconds)} besides"] if cost.overhead_seconds else []
    if cost.exposed_seconds:
        said.append(f"{duration(cost.exposed_seconds)} of the wire has no products to hide behind")
    else:
        said.append("all of the wire hides behind them" if sum(cost.wire_bytes.values()) else "nothing travels")
    return ", ".join(said)


def _costly(way: Way) -> str:
    return "hops" if way.words[0] == "ring" else "exchanges"


def _against(other: Candidate, best: Candidate) -> str:
    """The best of its kind against the choice."""
    if other.cost is None or best.cost is None:
        return f"{other.name}: impossible, {other.reason}."
    slower = other.cost.seconds / best.cost.seconds - 1
    parts = {
        "products": other.cost.compute_seconds - best.cost.compute_seconds,
        _costly(other.way): other.cost.overhead_seconds - best.cost.overhead_seconds,
        "the wire": other.cost.exposed_seconds - best.cost.exposed_seconds,
    }
    most = max(parts, key=lambda part: parts[part])
    said = "as fast" if slower < 0.005 else f"{slower:.1%} slower"
    if slower >= 0.005:
        said += f", {duration(parts[most])} more for {most}"
    elif slower < 0:
        said = f"{-slower:.1%} faster"
    return f"{other.name}: {said}{'; but it ' + other.reason if other.reason else ''}."


def code(way: Way, problem: Problem) -> str:
    """A mesh and a call of ring_attention."""
    names = [_AXES[word] for word in way.words]
    if way.words == ("ring", "ring"):
        names = ["outer", "inner"]
    several = len(names) > 1
    axes = f"({', '.join(map(_quoted, names))})" if several else _quoted("sp")
    sizes = f"({', '.join(map(str, way.sizes))})" if several else str(way.sizes[0])
    strategy = f"({', '.join(map(_quoted, way.words))})" if several else _quoted(way.words[0])
    ring = f", ring_axis={_quoted('ring')}" if several and way.words.count("ring") == 1 else ""
    left, right = problem.left, problem.right
    mask = ["is_causal=True"] if right == 0 else []
    if left is not None or right not in (None, 0):
        mask.append(f"local_window_size={(left, right)!r}")
    options = [f"axis_name={axes}", *mask, f"layout={_quoted(layout_name(way.layout))}"]
    given = [name for name in ("positions", "segments") if getattr(problem, name)]
    promised = [f"{name}={name}".replace("segments", "segment_ids") for name in given]
    for name in ("max_segment_length", "shared_length"):
        promised += [] if getattr(problem, name) is None else [f"{name}={getattr(problem, name)}"]
    direction = f", direction={_quoted(way.direction)}" if way.direction != "forward" else ""
    direction += f", rings={way.rings}" if way.rings > 1 else ""
    return "\n".join([
        f"mesh = ringjax.ring_mesh({sizes}, {axes}{ring})",
        "out = ringjax.ring_attention(",
        f"    query, key, value, mesh=mesh, {', '.join(options)},",
        *([f"    {', '.join(promised)},"] if promised else []),
        f"    config=ringjax.RingConfig(strategy={strategy}{direction}),",
        ")",
    ])  # fmt: skip


def _quoted(name: str) -> str:
    return f'"{name}"'
