"""`ringjax bench ring`: every strategy beside kernels of other libraries under plain collectives, on all devices.

The programs of a problem are compiled together, checked against each other and called in turns in one process; a time
is the median over the rounds, a ratio the median of the ratios within a round. What cannot be timed is named, and why.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import ringjax
from ringjax.bench import document, ring_peers, ring_torch
from ringjax.bench.cpu import PASSES
from ringjax.bench.gpu import parse_shape
from ringjax.bench.ring_documents import deal
from ringjax.bench.ring_measure import Data, measure, reason_of
from ringjax.bench.ring_programs import OURS, Left, Problem, factors, programs, strategies_for
from ringjax.bench.ring_table import (
    Group,
    cells,
    columns,
    conclude,
    document_lines,
    find_planner,
    plan_of,
    summary,
    with_others,
)
from ringjax.bench.timing import Shape
from ringjax.config import STRATEGIES
from ringjax.simulate import simulate_cpu_devices
from ringjax.usage import UsageError, check_at_least_one

BEGIN, END = "<!-- ringjax bench ring: begin -->", "<!-- ringjax bench ring: end -->"

# Short and long sequences, many and few K/V heads, each mask at least once.
PROBLEMS = (
    Problem(Shape(1, 4096, 32, 8, 128), is_causal=True),
    Problem(Shape(1, 8192, 32, 8, 128), is_causal=True),
    Problem(Shape(1, 16384, 32, 8, 128), is_causal=True),
    Problem(Shape(1, 65536, 32, 8, 128), is_causal=True),
    Problem(Shape(1, 65536, 32, 8, 128), is_causal=False),
    Problem(Shape(1, 65536, 16, 16, 128), is_causal=True),
    Problem(Shape(1, 65536, 32, 8, 128), is_causal=True, window=4096),
    Problem(Shape(1, 262144, 8, 2, 128), is_causal=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured.

    Attributes:
      problems: arrays and masks.
      passes: "forward" and/or "backward", which is forward and all gradients in one program.
      strategies: one word for each axis of the mesh; empty: all.
      peers: of ring_peers.PEERS; empty: those that the platform may have.
      flash_attention: the library of FlashAttention-3; None: the installed package's.
      dtype: of query, key and value.
      implementation: our block kernel; None: the best one.
      devices: how many CPU devices to simulate; None: all that JAX finds.
      rounds: in which all programs of a problem are timed.
      seconds: of timing for each program, all rounds together; at least one call in each round.
      time_limit: seconds after which no further problem is begun; None: no limit.
      torch: whether PyTorch's context parallelism is timed too.
      plan: whether the planner's choice is marked.
      documents: that are packed in each sequence, as :func:`ringjax.plan` takes them; None: a sequence is one.
    """

    problems: tuple[Problem, ...]
    passes: tuple[str, ...] = tuple(PASSES)
    strategies: tuple[tuple[str, ...], ...] = ()
    peers: tuple[str, ...] = ()
    flash_attention: Path | None = None
    dtype: str = "bfloat16"
    implementation: str | None = None
    devices: int | None = None
    rounds: int = 4
    seconds: float = 0.25
    time_limit: float | None = None
    torch: bool = False
    plan: bool = False
    documents: str | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        """As tables call the passes."""
        return tuple(PASSES[name] for name in self.passes)

    def __post_init__(self) -> None:
        check_at_least_one(rounds=self.rounds, devices=self.devices)
        for name, value in (("seconds-per-row", self.seconds), ("time-limit", self.time_limit)):
            if value is not None and not value > 0:
                raise UsageError(f"--{name} must be above 0. Got {value}.")
        ring_peers.check_library(self.flash_attention)


def parse_problems(shapes: Sequence[str], masks: Sequence[str]) -> tuple[Problem, ...]:
    """Every mask on every shape; PROBLEMS if there are neither."""
    if not shapes and not masks:
        return PROBLEMS
    found = [parse_shape(text) for text in shapes] or list(dict.fromkeys(problem.shape for problem in PROBLEMS))
    return tuple(_problem(shape, mask) for shape, mask in itertools.product(found, masks or ("full", "causal")))


def _problem(shape: Shape, mask: str) -> Problem:
    if mask in ("full", "causal"):
        return Problem(shape, is_causal=mask == "causal")
    try:
        window = int(mask)
    except ValueError:
        window = 0
    if window < 1:
        raise UsageError(
            f"--mask must be full, causal or W, a number of keys above 0: causal with that window. Got {mask!r}."
        )
    return Problem(shape, is_causal=True, window=window)


def parse_strategy(text: str) -> tuple[str, ...]:
    """One word, or two for two axes."""
    words = tuple(text.split(","))
    if len(words) > 2 or not set(words) <= set(STRATEGIES):
        raise UsageError(
            f"--strategy must be WORD or WORD,WORD, outermost first, of {', '.join(STRATEGIES)}. Got {text!r}."
        )
    return words


def find_devices(request: Request) -> list[Any]:
    devices = jax.devices() if request.devices is None else simulate_cpu_devices(request.devices)
    if len(devices) < 2:
        raise UsageError(f"needs at least 2 devices, or --devices C to simulate them on the CPU. Got {len(devices)}.")
    unit = 2 * len(devices)
    for problem in request.problems:
        if problem.shape.length % unit:
            raise UsageError(f"--shape: T must be a multiple of {unit} on {len(devices)} devices. Got {problem.shape}.")
    if not factors(len(devices)) and any(len(words) > 1 for words in request.strategies):
        raise UsageError(
            f"--strategy: two words need a number of devices that is a product of two, each above 1. "
            f"Got {len(devices)} devices."
        )
    return devices


def packed(problem: Problem, documents: str | None, num_devices: int) -> Problem:
    """The problem with documents of these lengths, see :func:`ringjax.bench.ring_documents.deal`; None: as it is."""
    if documents is None:
        return problem
    mask = {"is_causal": problem.is_causal, "window": problem.window}
    return dataclasses.replace(problem, documents=deal(documents, problem.shape, num_devices, **mask))


def run(request: Request, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All measurements, as they go to the JSON file.

    Args:
      request: what to measure.
      say: gets lines as they are known.
      keep: gets the record after every problem and pass, so that a run that is cut off leaves what it has.
    """
    start = time.monotonic()
    # Before JAX takes the memory of the GPUs.
    by_torch, no_torch = _by_torch(request) if request.torch else ({}, "")
    devices = find_devices(request)
    problems = [packed(problem, request.documents, len(devices)) for problem in request.problems]
    dtype = jnp.dtype(request.dtype)
    names = request.peers or ring_peers.PEERS[: None if devices[0].platform == "cpu" else -1]
    peers = [ring_peers.find(name, devices[0], request.flash_attention) for name in names]
    left = [f"{peer.name}: {peer.absent}" for peer in peers if peer.attend is None]
    left += [f"{ring_torch.KERNEL}: {no_torch}"] * bool(no_torch)
    choose, no_plan = find_planner() if request.plan else (None, "")
    left += [f"the plan: {no_plan}"] * bool(no_plan)
    config = ringjax.RingConfig(implementation=request.implementation)
    title = (
        f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}, {request.dtype}; medians of "
        f"{request.rounds} rounds"
    )
    say(title)
    for text in left:
        say(f"not timed: {text}")
    groups: list[Group] = []
    record: dict[str, Any] = {"title": title, "left": left, "groups": []}

    def finish(group: Group) -> None:
        groups.append(group)
        record["groups"].append(dataclasses.asdict(group))
        keep(record)
        for line in _lines(group, choose is not None):
            say(line)

    def is_late(*what: str) -> bool:
        if request.time_limit is None or time.monotonic() - start < request.time_limit:
            return False
        left.append(f"{', '.join(what)}: --time-limit {request.time_limit:g} was over")
        say(f"not timed: {left[-1]}")
        return True

    strategies = request.strategies or strategies_for(len(devices))
    for problem in problems:
        if is_late(str(problem.shape), problem.mask):
            continue
        data = Data(problem, devices, dtype)
        found, refused = programs(problem, devices, strategies, peers, config)
        sizes = list(dict.fromkeys(program.sizes for program in found if program.strategy))
        for direction in request.directions:
            if is_late(str(problem.shape), problem.mask, direction):
                continue
            measured, failed = measure(
                found, data, direction, dtype=request.dtype, rounds=request.rounds, seconds=request.seconds
            )
            missing = [*refused, *failed]
            try:
                chosen = (
                    [] if choose is None else plan_of(choose, problem, direction, sizes, devices[0], dtype.itemsize)
                )
            except Exception as error:  # the times are worth more than the plan
                chosen = []
                missing.append(Left("the plan", OURS, reason_of(error)))
            group = conclude(problem, direction, measured, missing, chosen)
            finish(with_others(group, problem, len(devices), by_torch.get((problem, direction), [])))
    record["summary"] = summary(groups)
    for line in record["summary"]:
        say(line)
    record["table"] = document_lines(title, groups, left, choose is not None)
    return record


def _lines(group: Group, with_plan: bool) -> list[str]:
    """Of the terminal."""
    widths = (48, 18, 9, 19, 14, 11, 9)

    def aligned(texts: Sequence[str]) -> str:
        sized = zip(texts, widths, strict=False)
        text = "".join(text.ljust(width) if n < 2 else text.rjust(width) for n, (text, width) in enumerate(sized))
        return "  ".join([text, *texts[len(widths) :]])

    head = f"{group.shape}, {group.mask}, {group.direction}"
    rows = [cells(row, with_plan) for row in group.rows]
    left = [f"not timed: {one.name}, {one.kernel}: {one.reason}" for one in group.left]
    return ["", head, aligned(columns(with_plan)), *map(aligned, rows), *left]


def _by_torch(request: Request) -> tuple[dict[tuple[Problem, str], list[ring_torch.Result]], str]:
    """PyTorch's results by problem and pass, and why some are missing."""
    if request.devices is not None:
        return {}, "needs NVIDIA GPUs, and --devices simulates CPU devices"
    if request.documents is not None:
        return {}, "its ring has no documents"
    problems = [problem for problem in request.problems if problem.window is None]
    windowed = len(problems) < len(request.problems)
    work = [
        ring_torch.Work(
            **dataclasses.asdict(problem.shape),
            is_causal=problem.is_causal,
            directions=request.directions,
        )
        for problem in problems
    ]
    results, reason = ring_torch.measure(work, request.dtype, request.rounds, request.seconds)
    found: dict[tuple[Problem, str], list[ring_torch.Result]] = {}
    for result in results:
        found.setdefault((problems[result.index], result.direction), []).append(result)
    reasons = [reason] * bool(reason) + ["its ring has no window"] * windowed
    return found, "; ".join(reasons)


def main(request: Request, *, json_file: Path | None, docs: Path | None) -> None:
    """`ringjax bench ring`.

    Args:
      request: what to measure.
      json_file: also gets all figures, after every problem and pass.
      docs: a document whose table is replaced.

    Raises:
      UsageError: fewer than two devices, lengths that do not divide over them, or files that cannot be written.
    """
    document.check_files(json_file, docs, BEGIN, END)
    console = Console()

    def keep(record: dict[str, Any]) -> None:
        if json_file is not None:
            document.write_json(json_file, record)

    record = run(request, lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False), keep)
    table = record.pop("table")
    keep(record)
    if docs is not None:
        document.replace(docs, BEGIN, END, table)
