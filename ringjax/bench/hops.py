"""`ringjax bench hops`: the block kernel of every hop of a ring, each by itself, on one device.

What the queries of each rank and the keys of each other rank take without a wire, beside one call over the whole
sequence. So one device shows whether ranks have equal work, hop by hop, and what the kernel loses in pieces. A hop is
timed without what a hop before it leaves, which the kernel would read and write besides.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import ringjax
from ringjax.bench import document
from ringjax.bench.gpu import draw
from ringjax.bench.ring import PROBLEMS, packed
from ringjax.bench.ring_programs import DEALT, Problem
from ringjax.bench.timing import Measurement, Timed, compile_measurements
from ringjax.kernels.base import Block, Kernel, KernelParams, Upstream
from ringjax.kernels.choose import choose
from ringjax.layout import Contiguous, Runs, as_layout
from ringjax.mask import Mask, Tokens
from ringjax.sharded import target_of
from ringjax.usage import UsageError, check_at_least_one

COLUMNS = ("shape", "mask", "order", "pass", "queries of rank", "keys of rank", "ms", "TFLOP/s")
DIRECTIONS = {"forward": "fwd", "backward": "bwd"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured.

    Attributes:
      problems: arrays and masks.
      num_ranks: of the ring.
      passes: "forward" and/or "backward", which is the gradients alone.
      documents: that are packed in each sequence, as :func:`ringjax.plan` takes them; None: a sequence is one.
      dtype: of query, key and value.
      implementation: the block kernel; None: the best one.
      deterministic: as in RingConfig.
      rounds: in which all programs of a problem and pass are timed.
    """

    problems: tuple[Problem, ...] = PROBLEMS
    num_ranks: int = 2
    passes: tuple[str, ...] = tuple(DIRECTIONS)
    documents: str | None = None
    dtype: str = "bfloat16"
    implementation: str | None = None
    deterministic: bool = False
    rounds: int = 4

    def __post_init__(self) -> None:
        check_at_least_one(ranks=self.num_ranks, rounds=self.rounds)
        unit = 2 * self.num_ranks
        for problem in self.problems:
            if problem.shape.length % unit:
                raise UsageError(
                    f"--shape: T must be a multiple of {unit} for {self.num_ranks} ranks. Got {problem.shape}."
                )


@dataclasses.dataclass(frozen=True)
class Row:
    """Median milliseconds of one hop; without ranks, of one call over the whole sequence."""

    queries_of: int | None
    keys_of: int | None
    milliseconds: float
    tflops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hops:
    """A problem and pass.

    Attributes:
      shape, mask, direction: of the problem.
      order: of the tokens, a layout or DEALT.
      rows: one call, then every hop, rank by rank.
      sum_over_one_call: all hops together.
      slowest_over_mean: of the ranks, each with all of its hops.
      lockstep_over_mean: of a ring in which every hop lasts as long as its slowest rank.
    """

    shape: str
    mask: str
    order: str
    direction: str
    rows: list[Row]
    sum_over_one_call: float
    slowest_over_mean: float
    lockstep_over_mean: float

    def cells(self) -> list[tuple[str, ...]]:
        """A line for each row, as COLUMNS names them."""
        rank = lambda number: "all" if number is None else str(number)  # noqa: E731
        head = (self.shape, self.mask, self.order, self.direction)
        return [
            (*head, rank(row.queries_of), rank(row.keys_of), f"{row.milliseconds:.3f}", f"{row.tflops:.3g}")
            for row in self.rows
        ]

    def line(self) -> str:
        return (
            f"{self.shape}, {self.mask}, {self.order}, {self.direction}: all hops take {self.sum_over_one_call:.3f} x "
            f"one call, the slowest rank {self.slowest_over_mean:.3f} x the mean, hop by hop "
            f"{self.lockstep_over_mean:.3f} x."
        )


class _Tokens:
    """The tokens of each rank: of documents as ringjax.pack deals them, or of one sequence in the balancing layout."""

    def __init__(self, problem: Problem, num_ranks: int) -> None:
        self.problem, self.num_ranks = problem, num_ranks
        self.order = problem.balancing if problem.documents is None else DEALT
        self.shard = problem.shape.length // num_ranks

    def of(self, rank: int, length: int) -> Tokens:
        """The first so many of a rank."""
        documents = self.problem.documents
        if documents is None:
            if not self.problem.is_causal:
                return Tokens()
            return Tokens(positions=as_layout(self.order).runs(jnp.int32(rank), self.shard, self.num_ranks))
        arrays = (documents.dealt.positions, documents.dealt.segment_ids)
        place = slice(rank * self.shard, rank * self.shard + length)
        positions, segments = (jnp.asarray(x[place])[None] for x in arrays)
        return Tokens(positions=positions if self.problem.is_causal else None, segments=segments)

    def whole(self) -> Tokens:
        """Those of the sequence, its documents one after another."""
        documents, length = self.problem.documents, self.problem.shape.length
        positions = Contiguous().runs(jnp.int32(0), length, 1) if self.problem.is_causal else None
        return Tokens(positions, None if documents is None else jnp.asarray(documents.segment_ids)[None])

    def keys_length(self, queries_of: int, keys_of: int) -> int:
        documents = self.problem.documents
        return self.shard if documents is None or queries_of == keys_of else documents.shared_length

    def pairs(self, queries_of: int, keys_of: int) -> int:
        """Attended ones of a head."""
        sides = (self.of(queries_of, self.shard), self.of(keys_of, self.keys_length(queries_of, keys_of)))
        return count_pairs(*sides, self.mask(*sides), self.shard)

    def mask(self, queries: Tokens, keys: Tokens) -> Mask:
        window = self.problem.window
        return Mask(queries=queries, keys=keys, left=window, right=0 if self.problem.is_causal else None)


def count_pairs(queries: Tokens, keys: Tokens, mask: Mask, shard: int) -> int:
    """Who attends to whom, by sorting the keys: tokens are without lengths, and one batch row."""

    def numbers(side: Tokens) -> tuple[np.ndarray, np.ndarray]:
        positions, segments = side.positions, side.segments
        if isinstance(positions, Runs):
            positions = positions.at(jnp.arange(shard, dtype=jnp.int32))[None]
        length = next((x.shape[1] for x in (positions, segments) if x is not None), shard)
        at, segment = (np.zeros(length) if x is None else np.asarray(x)[0] for x in (positions, segments))
        return at.astype(np.int64), segment.astype(np.int64)

    (at, segment), (key_at, key_segment) = numbers(queries), numbers(keys)
    far = 2**32
    ordered = np.sort(key_segment * far + key_at)
    low = 0 * at if mask.left is None else np.maximum(at - mask.left, 0)
    high = 0 * at + (far - 1) if mask.right is None else at + mask.right
    first = np.searchsorted(ordered, segment * far + low, side="left")
    return int((np.searchsorted(ordered, segment * far + high, side="right") - first).sum())


def _program(kernel: Kernel, params: KernelParams, direction: str) -> Callable[..., Any]:
    """One call of the kernel. A new function each time: programs of one function share what is compiled."""

    def run(q: Any, k: Any, v: Any, dout: Any, lse: Any, mask: Mask) -> Any:
        q, k, v, dout = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, dout))
        block = Block(q=q, k=k, v=v, mask=mask)
        if direction == "fwd":
            return kernel.forward(block, params, None, finish=False)
        upstream = Upstream(dout=dout, lse=lse, delta=jnp.zeros_like(lse))
        return kernel.backward(block, upstream, params, None, finish=False)

    return run


def measure(
    problem: Problem, kernel: Kernel, direction: str, *, dtype: Any, num_ranks: int, deterministic: bool = False
) -> Measurement:
    """One call over the sequence, and every hop of every rank."""
    shape, tokens = problem.shape, _Tokens(problem, num_ranks)
    kind = jax.devices()[0].device_kind
    params = KernelParams(shape.head_size**-0.5, device_kind=kind, deterministic=deterministic)

    def arrays(length: int, keys: int) -> tuple[jax.Array, ...]:
        q, k, v, dout = draw(dataclasses.replace(shape, length=length), dtype)
        # About what the sum of so many exponentials is: the time does not depend on it.
        lse = jnp.full((shape.batch, shape.heads, length), np.log(shape.length) + 0.5, jnp.float32)
        return q, k[:, :keys], v[:, :keys], dout, lse

    runs = functools.cache(lambda keys: _program(kernel, params, direction))
    given = functools.cache(arrays)
    whole = tokens.whole()
    one = (*given(shape.length, shape.length), tokens.mask(whole, whole))
    programs = [Timed(_program(kernel, params, direction), one)]
    pairs = [0]
    places = [(rank, (rank - hop) % num_ranks) for rank in range(num_ranks) for hop in range(num_ranks)]
    for rank, owner in places:
        keys = tokens.keys_length(rank, owner)
        mask = tokens.mask(tokens.of(rank, tokens.shard), tokens.of(owner, keys))
        programs.append(Timed(runs(keys), (*given(tokens.shard, keys), mask)))
        pairs.append(tokens.pairs(rank, owner))
    pairs[0] = sum(pairs)
    conclude = functools.partial(_conclude, problem, tokens.order, direction, [(None, None), *places], pairs)
    return Measurement(tuple(programs), conclude)


def _conclude(
    problem: Problem, order: str, direction: str, places: Sequence[tuple[int | None, int | None]],
    pairs: Sequence[int], times: list[list[float]],
) -> Hops:  # fmt: skip
    shape = problem.shape
    work = (4.0 if direction == "fwd" else 10.0) * shape.batch * shape.heads * shape.head_size
    took = [statistics.median(each) for each in times]
    rows = [Row(*place, ms, work * n / ms / 1e9) for place, n, ms in zip(places, pairs, took, strict=True)]
    hops = np.array(took[1:]).reshape(int(len(took[1:]) ** 0.5), -1)  # [rank, hop]
    mean = hops.sum(axis=1).mean()
    return Hops(
        shape=str(shape),
        mask=problem.mask,
        order=order,
        direction=direction,
        rows=rows,
        sum_over_one_call=float(hops.sum() / took[0]),
        slowest_over_mean=float(hops.sum(axis=1).max() / mean),
        lockstep_over_mean=float(hops.max(axis=0).sum() / mean),
    )


def run(request: Request, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All measurements, as they go to the JSON file; ``say`` and ``keep`` as in :func:`ringjax.bench.ring.run`."""
    dtype, device = jnp.dtype(request.dtype), jax.devices()[0]
    config = ringjax.RingConfig(implementation=request.implementation)
    try:
        backends = [choose(config, target_of(None), dtype, problem.shape.head_size) for problem in request.problems]
    except (ValueError, NotImplementedError) as error:  # which begin with config.implementation
        raise UsageError(f"--{str(error).removeprefix('config.')}") from error
    problems = [packed(problem, request.documents, request.num_ranks) for problem in request.problems]
    names = ", ".join(dict.fromkeys(backend.name for backend in backends))
    title = (
        f"{device.device_kind}, JAX {jax.__version__}, {request.dtype}: implementation {names}"
        f"{', deterministic' * request.deterministic}; medians of {request.rounds} rounds"
    )
    say(title)
    say(_aligned(COLUMNS))
    record: dict[str, Any] = {"title": title, "hops": []}
    for problem, backend in zip(problems, backends, strict=True):
        for name in request.passes:
            options: dict[str, Any] = {"num_ranks": request.num_ranks, "deterministic": request.deterministic}
            one = measure(problem, backend.load(), DIRECTIONS[name], dtype=dtype, **options)
            (compiled,) = compile_measurements([one])
            found: Hops = compiled.result(request.rounds)
            for cells in found.cells():
                say(_aligned(cells))
            say(found.line())
            record["hops"].append(dataclasses.asdict(found))
            keep(record)
    return record


def _aligned(cells: Sequence[str]) -> str:
    widths = (26, 36, 10, 4, 15, 12, 10, 7)
    return "  ".join(
        text.ljust(width) if n < 4 else text.rjust(width)
        for n, (text, width) in enumerate(zip(cells, widths, strict=True))
    )


def main(request: Request, *, json_file: Path | None) -> None:
    """`ringjax bench hops`.

    Args:
      request: what to measure.
      json_file: also gets all figures, after every problem and pass.

    Raises:
      UsageError: lengths that do not divide over the ranks, documents that do not fill a sequence, or a file that
        cannot be written.
    """
    document.check_files(json_file, None, "", "")
    console = Console()
    say = lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    run(request, say, (lambda record: None) if json_file is None else functools.partial(document.write_json, json_file))
