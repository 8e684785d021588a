"""A plan as it is printed, and as rows that a picture draws too."""

from collections.abc import Iterable, Iterator

from ..units import duration, size, table
from . import documents, words
from .choice import Candidate, Plan

_COLUMNS = ("strategy", "layout", "time", "products", "besides", "exposed", "received", "a link", "memory")


def heading(plan: Plan) -> Iterator[str]:
    """What is asked, in two lines."""
    model, topology = plan.model, plan.topology
    yield (
        f"{model.name}: {model.num_heads} heads on {model.num_kv_heads} K/V heads of {model.head_dim}, "
        f"{model.num_layers} layers"
    )
    yield (
        f"{topology.name}: {topology.num_devices} devices of {size(topology.memory_bytes)}; {plan.batch} x "
        f"{plan.seq_len} tokens, {plan.problem.query_length} per device; {_mask(plan)}; {plan.dtype}; "
        f"{'forward and backward' if plan.backward else 'forward'}"
    )


def _mask(plan: Plan) -> str:
    left, right = plan.window
    said = ["causal"] if plan.is_causal else []
    if left is not None or right not in (None, 0):
        sides = ", ".join("all" if side is None else str(side) for side in (left, right))
        said.append(f"window ({sides})")
    problem = plan.problem
    if problem.max_segment_length is not None:
        said.append(f"documents of at most {problem.max_segment_length} places")
    if problem.shared_length is not None:
        said.append(f"{problem.shared_length} tokens of a shard in documents of several")
    return ", ".join(said) or "no mask"


def best_of_each(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of each strategy, direction and number of rings the best, of each other layout too, as the plan has them."""
    candidates = list(candidates)
    ways: dict[tuple[object, ...], Candidate] = {}
    layouts: dict[object, Candidate] = {}
    for candidate in candidates:
        ways.setdefault((candidate.way.words, candidate.way.direction, candidate.way.rings), candidate)
        layouts.setdefault(candidate.way.layout, candidate)
    chosen = {id(candidate) for candidate in (*ways.values(), *layouts.values())}
    return [candidate for candidate in candidates if id(candidate) in chosen]


def lines(plan: Plan) -> Iterator[str]:
    """The table, the choice and why, and the code to paste."""
    yield from heading(plan)
    if plan.documents is not None:
        yield ""
        yield from documents.lines(plan.documents)
    rows = best_of_each(plan.candidates)
    yield "\nthe best of each strategy; times and bytes of one device and one layer"
    yield from table([_COLUMNS, *(_cells(candidate) for candidate in rows if candidate.reason is None)])
    refused = [candidate for candidate in rows if candidate.reason is not None]
    if refused:
        yield "\nimpossible"
    for candidate in refused:
        yield f"  {candidate.name} ({words.layout_name(candidate.way.layout)}): {candidate.reason}"
    yield f"\n{plan.why}"
    yield f"Attention of a step: {duration(plan.step_seconds)} in {plan.model.num_layers} layers."
    yield f"\n{plan.config}"


def _cells(candidate: Candidate) -> tuple[str, ...]:
    cost = candidate.cost
    assert cost is not None
    times = (cost.seconds, cost.compute_seconds, cost.overhead_seconds, cost.exposed_seconds)
    return (
        candidate.name,
        words.layout_name(candidate.way.layout),
        *map(duration, times),
        size(sum(cost.wire_bytes.values())),
        size(cost.link_bytes),
        size(cost.memory_bytes),
    )
