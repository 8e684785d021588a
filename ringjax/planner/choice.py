"""Every way to share a sequence over given devices, what each costs, and which one to take."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..arguments import check_fits_shard, check_max_segment_length, check_shared_length
from ..config import DIRECTIONS, STRATEGIES
from ..layout import Layout, as_layout, padded_length
from . import words
from .chips import Chip, Tpu, find_chip
from .costs import memory_terms
from .documents import Documents, deal_documents
from .estimate import Estimate, Problem, Way, estimate, impossible
from .lengths import document_lengths
from .models import Model, find_model
from .network import Links, links_of
from .topology import Topology, likely_topology, parse_topology

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Words of two axes, outermost first. Exchanges are within: there layouts keep positions three integers, and hosts of
# GPUs have their fast links.
_PAIRS = (("ring", "all_to_all"), ("ring", "all_gather"), ("ring", "ring"), ("all_gather", "all_to_all"))
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}
# Of a device's memory for the attention of one layer where nothing else is said: parameters, their optimizer and what
# other layers keep need the rest.
_SHARE_OF_MEMORY = 0.25


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to share the sequence, and its cost.

    Attributes:
      way: strategies, sizes of axes, direction, layout.
      cost: of one device and layer; None where the way is impossible.
      reason: why it cannot be taken; None where it can.
    """

    way: Way
    cost: Estimate | None
    reason: str | None

    @property
    def name(self) -> str:
        """The way in words, as "ring 4 x all_to_all 4, both ways"."""
        return words.name_of(self.way)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        found: dict[str, Any] = {
            "strategy": list(self.way.words),
            "axes": list(self.way.sizes),
            "direction": self.way.direction,
            "rings": self.way.rings,
            "layout": words.layout_name(self.way.layout),
            "reason": self.reason,
        }
        if self.cost is not None:
            found |= {
                "seconds": self.cost.seconds,
                "compute_seconds": self.cost.compute_seconds,
                "overhead_seconds": self.cost.overhead_seconds,
                "exposed_seconds": self.cost.exposed_seconds,
                "wire_bytes": self.cost.wire_bytes,
                "link_bytes": self.cost.link_bytes,
                "memory_bytes": self.cost.memory_bytes,
                "memory": self.cost.memory,
            }
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model's attention costs on some devices, way by way. Figures are of one device and one layer.

    Attributes:
      model, topology, seq_len, batch, dtype, is_causal, window, backward: as given.
      memory_budget: bytes that the attention of one layer may take.
      problem: the attention of one layer.
      candidates: what fits, fastest first; then what does not, with the reason.
      documents: what becomes of the documents given; None without them.
      choice: the first of them.
      why: in words.
      config: Python to paste.
    """

    model: Model
    topology: Topology
    seq_len: int
    batch: int
    dtype: str
    is_causal: bool
    window: tuple[int | None, int | None]
    backward: bool
    memory_budget: int
    problem: Problem
    candidates: tuple[Candidate, ...]
    documents: Documents | None = None

    @property
    def choice(self) -> Candidate:
        return self.candidates[0]

    @property
    def step_seconds(self) -> float:
        """Attention of all layers, in the way chosen."""
        assert self.choice.cost is not None
        return self.choice.cost.seconds * self.model.num_layers

    @property
    def why(self) -> str:
        return words.why(self.candidates, self.memory_budget)

    @property
    def config(self) -> str:
        return words.code(self.choice.way, self.problem)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return {
            "model": dataclasses.asdict(self.model),
            "devices": {"name": self.topology.name, "number": self.topology.num_devices,
                        "memory_bytes": self.topology.memory_bytes},
            "seq_len": self.seq_len,
            "batch": self.batch,
            "dtype": self.dtype,
            "is_causal": self.is_causal,
            "window": list(self.window),
            "max_segment_length": self.problem.max_segment_length,
            "shared_length": self.problem.shared_length,
            "backward": self.backward,
            "memory_budget": self.memory_budget,
            "shard_length": self.problem.query_length,
            "documents": None if self.documents is None else self.documents.to_json(),
            "step_seconds": self.step_seconds,
            "choice": self.choice.to_json(),
            "why": self.why,
            "config": self.config,
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }  # fmt: skip


def plan(
    model: str | Sequence[int] | Model,
    *,
    seq_len: int,
    devices: str | Topology,
    batch: int = 1,
    dtype: str = "bfloat16",
    is_causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    max_segment_length: int | None = None,
    shared_length: int | None = None,
    documents: Any = None,
    memory_budget: int | str | None = None,
    backward: bool = True,
) -> Plan:
    r"""What attention over a sharded sequence costs on given devices, for every strategy, and which one to take.

    A pass over one layer takes

    .. math::  exchanges + \sum_{hops} \max(products, wire) + overheads,

    the products at the rate that attention reaches on the chip, the wire at the rate of the links that an axis of the
    mesh has. Nothing is compiled or run. ``docs/plan.md`` says where the figures come from and what is assumed.

    Args:
      model: the name of a model, as "llama3-8b"; a training configuration, as "configs/v5p_256_1m.toml"; "N,K,D,layers"
        or four integers: query heads, key/value heads, size of a head, layers.
      seq_len: tokens of one sequence.
      devices: a topology, all of whose devices share the sequence: "v5p:4x4x4", "h100:8", or "h100:4x8" for four hosts.
      batch: sequences that the devices work on at a time.
      dtype: of query, key and value: "bfloat16", "float16" or "float32".
      is_causal: a query attends to keys at its own position and before.
      window: w or (left, right), as ``local_window_size`` of :func:`ringjax.ring_attention`; None takes the model's.
      max_segment_length, shared_length: what is promised of packed documents, as in :func:`ringjax.ring_attention`; the
        latter is one number for all axes. Segment ids then travel too, and with ``shared_length`` positions, both as
        :func:`ringjax.pack` gives them. Pairs are as many as documents that keep the promises can have.
      documents: lengths of documents that fill the sequences, dealt by :func:`ringjax.pack`: integers; a file with one
        a line, or a list in JSON; or a distribution, "lognormal:MEDIAN:SIGMA:LONGEST", "uniform:SHORTEST:LONGEST" or
        "equal:LENGTH", of which documents for 16 sequences are drawn. Bytes and pairs are then theirs, and
        ``plan.documents`` holds them against the same documents as they come, on a ring in zigzag.
      memory_budget: what the attention of one layer may take on each device: bytes, or a text such as "20GiB". None:
        all of its memory.
      backward: forward and all gradients; False: forward alone.

    Returns:
      The plan: ``choice``, ``why``, ``config`` to paste, and all candidates.

    Raises:
      ValueError: for an unknown model or topology, for numbers that do not fit, and if nothing fits the memory: then it
        says how many devices or which length would.
    """
    found = find_model(model)
    topology = devices if isinstance(devices, Topology) else parse_topology(devices, "devices")
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer. Got {value!r}.")
    for name, value in (("is_causal", is_causal), ("backward", backward)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False. Got {value!r}.")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}. Got {dtype!r}.")
    if window is None and found.window is not None:
        window = (found.window, None)
    left, right = _bounds(window, is_causal)
    budget = parse_bytes(memory_budget, topology.memory_bytes)
    num_devices = topology.num_devices
    if seq_len < num_devices:
        raise ValueError(f"seq_len must be at least {num_devices}, a token for each device. Got {seq_len}.")
    # As ring_attention pads it, for the layout with the largest unit.
    length = padded_length(seq_len, as_layout("zigzag"), num_devices) // num_devices
    _check_promises(max_segment_length, shared_length, length)
    promised = max_segment_length is not None or shared_length is not None
    bounded = left is not None or right is not None
    problem = Problem(
        query_length=length,
        key_length=length,
        batch=batch,
        num_heads=found.num_heads,
        num_kv_heads=found.num_kv_heads,
        head_size=found.head_dim,
        value_size=found.head_dim,
        item_bytes=ITEM_BYTES[dtype],
        left=left,
        right=right,
        backward=backward,
        max_segment_length=max_segment_length,
        shared_length=shared_length,
        segments=promised,
        positions=shared_length is not None and bounded,
    )
    dealt = None
    if documents is not None:
        if max_segment_length is not None:
            raise ValueError(
                "max_segment_length must be None with documents, of which long ones are shared by all devices. "
                f"Got {max_segment_length}."
            )
        way = Way(("ring",), (num_devices,), "forward", as_layout("zigzag"))
        dealt = deal_documents(document_lengths(documents, length * num_devices), problem, way)
        problem = dataclasses.replace(
            problem,
            shared_length=dealt.after.shared_length,
            segments=True,
            positions=bounded,
            pairs=dealt.after.busiest_pairs,
        )
    candidates = evaluate(problem, ways(topology, problem), topology.chip, topology, budget)
    if candidates[0].reason is not None:
        raise ValueError(_what_would_fit(problem, num_devices, budget, seq_len))
    return Plan(
        model=found,
        topology=topology,
        seq_len=seq_len,
        batch=batch,
        dtype=dtype,
        is_causal=is_causal,
        window=(left, right),
        backward=backward,
        memory_budget=budget,
        problem=problem,
        candidates=candidates,
        documents=dealt,
    )


def ways(topology: Topology, problem: Problem) -> Iterator[Way]:
    """Each word over all devices, and two words over two axes; in every layout that suits the mask, both directions.

    One axis goes round as many rings as the topology has.
    """
    num_devices = topology.num_devices
    (whole,) = links_of(topology, (num_devices,))
    if problem.shared_length is not None:
        layouts = (as_layout("contiguous"),)  # that of ringjax.pack, which keeps the promise
    elif problem.spares:
        layouts = (as_layout("contiguous"), as_layout("zigzag"))
    elif problem.right == 0:
        layouts = (as_layout("zigzag"), as_layout("contiguous"))
    else:
        layouts = (as_layout("contiguous"),)
    splits: list[tuple[tuple[str, ...], tuple[int, ...]]] = [((word,), (num_devices,)) for word in STRATEGIES]
    for outer in range(2, num_devices):
        if num_devices % outer == 0:
            splits += [(pair, (outer, num_devices // outer)) for pair in _PAIRS]
    for (given, sizes), layout in itertools.product(splits, layouts):
        if layout != layouts[0] and problem.spares and len(given) > 1:
            continue  # windows are local, and so is the layout that suits them: the other is shown once
        if set(given) == {"all_to_all"} and layout != as_layout("contiguous"):
            continue  # every device has the whole sequence, whatever the layout
        # Under a window blocks take the shorter way in any case.
        turns = "ring" in given and num_devices > 1 and not problem.spares
        for direction in DIRECTIONS if turns else DIRECTIONS[:1]:
            for rings in range(1, 1 + (whole.rings if turns and len(given) == 1 else 1)):
                yield Way(given, sizes, direction, layout, rings)


def evaluate(
    problem: Problem, given: Iterator[Way] | Sequence[Way], chip: Chip, topology: Topology, budget: int
) -> tuple[Candidate, ...]:
    """What each way costs: those that fit first, fastest first, the simpler of equals."""
    links: dict[tuple[int, ...], tuple[Links, ...]] = {}
    found = []
    for way in given:
        reason = impossible(problem, way)
        if reason is not None:
            found.append(Candidate(way, None, reason))
            continue
        if way.sizes not in links:
            links[way.sizes] = links_of(topology, way.sizes)
        cost = estimate(problem, way, chip, links[way.sizes])
        if cost.memory_bytes > budget:
            reason = words.too_large(cost.memory_bytes, budget)
        found.append(Candidate(way, cost, reason))
    return tuple(sorted(found, key=_rank))


def _rank(candidate: Candidate) -> tuple[Any, ...]:
    if candidate.cost is None:
        return (2, 0.0)
    # Equal up to rounding is equal: then the order in which ways are made decides.
    return (candidate.reason is not None, float(f"{candidate.cost.seconds:.9g}"), len(candidate.way.words))


def _what_would_fit(problem: Problem, num_devices: int, budget: int, seq_len: int) -> str:
    """A ring needs least; its memory falls with the devices and with the length."""

    def needs(devices: int, length: int) -> int:
        shard = dataclasses.replace(problem.shard, queries=-(-length // devices), keys=-(-length // devices))
        return sum(memory_terms(shard, (), (), (devices,), backward=problem.backward).values())

    message = (
        f"memory_budget must be at least {words.size(needs(num_devices, seq_len))}, what a ring over {num_devices} "
        f"devices needs for {seq_len} tokens. Got {words.size(budget)}."
    )
    more = next((n for n in (num_devices << k for k in range(1, 21)) if needs(n, seq_len) <= budget), None)
    less = next((n for n in (seq_len >> k for k in range(1, 41)) if n and needs(num_devices, n) <= budget), None)
    fits = [f"a ring over {more} devices"] if more else []
    fits += [f"{less} tokens on these"] if less else []
    return message + (f" What would fit: {', or '.join(fits)}." if fits else "")


def _bounds(window: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right): a query at p attends to keys in [p - left, p + right]; None is unbounded."""
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    fits = len(sides) == 2 and all(
        side is None or (isinstance(side, int) and not isinstance(side, bool) and side >= 0) for side in sides
    )
    if not fits:
        raise ValueError(
            "window must be None, a non-negative integer or a pair (left, right) of non-negative integers or None. "
            f"Got {window!r}."
        )
    left, right = sides
    return left, 0 if is_causal else right


def _check_promises(max_segment_length: Any, shared_length: Any, shard_length: int) -> None:
    check_max_segment_length(max_segment_length, True)
    if isinstance(shared_length, (tuple, list)):
        raise ValueError(
            f"shared_length must be one number, the same for every axis of a plan, or None. Got {shared_length!r}."
        )
    check_fits_shard(check_shared_length(shared_length, True, 1), shard_length)


def parse_bytes(budget: int | str | None, everything: int) -> int:
    """The bytes of "20GiB", of a number or, for None, of all the memory there is.

    Raises:
      ValueError: for what is no positive number of bytes.
    """
    if budget is None:
        return everything
    number = None
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if match and (match[2] or "B") in _UNITS:
            number = int(float(match[1]) * _UNITS[match[2] or "B"])
    elif isinstance(budget, int) and not isinstance(budget, bool):
        number = budget
    if number is None or number < 1:
        raise ValueError(
            f"memory_budget must be a positive number of bytes, with a unit of {', '.join(_UNITS)} or without one, as "
            f"20GiB. Got {budget!r}."
        )
    return number


@functools.lru_cache(maxsize=1024)
def choose_strategy(
    *,
    axis_sizes: tuple[int, ...],
    device_kind: str,
    platform: str,
    query_length: int,
    key_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    value_size: int,
    itemsize: int,
    batch: int,
    is_causal: bool,
    window: int | tuple[int | None, int | None] | None,
    backward: bool = True,
    memory_budget: int | None = None,
    layout: str | Layout = "zigzag",
    direction: str = "forward",
) -> tuple[str, ...]:
    """The word for each axis that is predicted to be fastest: what ``RingConfig(strategy="auto")`` means.

    Which links the axes have is not known at trace time: the devices are taken for full hosts of GPUs, or for the most
    compact box of TPU chips.

    Args:
      axis_sizes: of the axes of the sequence, outermost first.
      device_kind, platform: as JAX names them.
      query_length, key_length: tokens of one shard.
      num_heads, num_kv_heads, head_size, value_size, batch: of one device's arrays.
      itemsize: bytes of one item of query, key and value.
      is_causal, window: the mask, as in :func:`ringjax.plan`.
      backward: whether gradients are taken too.
      memory_budget: bytes for the attention of one layer; None: a quarter of the device's memory.
      layout, direction: of the call.

    Returns:
      A word of ``RingConfig.strategy`` for each axis; "ring" for all where the device is not in the table or nothing
      fits, and on axes of one device.
    """
    rings = ("ring",) * len(axis_sizes)
    chip = find_chip(device_kind) if platform in ("tpu", "gpu") else None
    num_devices = math.prod(axis_sizes)
    if chip is None or num_devices == 1 or not query_length or not key_length:
        return rings
    if isinstance(chip, Tpu) and num_devices % chip.devices_per_chip:
        chip = dataclasses.replace(chip, devices_per_chip=1)
    left, right = _bounds(window, is_causal)
    problem = Problem(
        query_length=query_length,
        key_length=key_length,
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        value_size=value_size,
        item_bytes=itemsize,
        left=left,
        right=right,
        backward=backward,
        sum_bytes=max(itemsize, 4),
    )
    choices = [STRATEGIES if size > 1 else ("ring",) for size in axis_sizes]
    given = [Way(each, axis_sizes, direction, as_layout(layout)) for each in itertools.product(*choices)]
    budget = int(chip.memory_bytes * _SHARE_OF_MEMORY) if memory_budget is None else memory_budget
    best = evaluate(problem, given, chip, likely_topology(chip, num_devices), budget)[0]
    return best.way.words if best.reason is None else rings
