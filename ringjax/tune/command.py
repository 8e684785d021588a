"""`ringjax tune`: finds the fastest tiles of the GPU kernels on this machine's GPU and writes them to the user's table.

For every kernel, head size and way of calling it, candidates are compiled, held against the results of the built-in
tiles, and timed in turns with them. What is faster by more than 2%, twice, goes into the table, which later processes
read by themselves (see RINGJAX_TILES); where nothing is, the key's entry is dropped. The table is written after each
key, so an interrupted search keeps what it has found. Tiles are looked up by GPU, kernel, 16-bit or float32, and head
size; RingConfig.block_q and block_kv go before any table.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from ringjax.bench.gpu import Timed, in_turns
from ringjax.kernels import tiles as tile_table
from ringjax.kernels.choose import BY_NAME, Target, default, is_hopper
from ringjax.tune.space import HEAD_SIZES, KERNELS, Problem
from ringjax.usage import UsageError, check_at_least_one

MARGIN = 1.02  # times as fast as the built-in tiles, or it is noise
UNIT = 256  # the largest tile: lengths are a multiple of it, so that no tile is ragged

Say = Callable[[str], None]
# Milliseconds of the programs of each of some tiles together, round by round, of so many rounds.
Timer = Callable[[Mapping[Any, Sequence[Timed]], int], Mapping[Any, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The fastest tiles of a key; ``ratio`` is how many times as fast as the built-in ones, 1 for these themselves."""

    problem: Problem
    built_in: Any
    built_in_ms: float
    best: Any
    best_ms: float
    ratio: float
    dropped: int  # candidates that failed

    @property
    def entry(self) -> dict[str, Any] | None:
        """As it goes into the table; None: the built-in tiles are as good."""
        if self.best == self.built_in:
            return None
        found = {
            "ms": round(self.best_ms, 4),
            "built_in_ms": round(self.built_in_ms, 4),
            "length": self.problem.length,
            "heads": self.problem.heads,
            "jax": jax.__version__,
            "ringjax": importlib.metadata.version("ringjax"),
        }
        return {"tiles": dataclasses.asdict(self.best), "found": found}


class TuneError(RuntimeError):
    """A key cannot be searched."""


class DeviceLost(TuneError):
    """Nothing runs any more: a candidate has taken the GPU's context with it."""


# ------------------------------------------------------------------------------------------------------- one key


def time_in_turns(programs: Mapping[Any, Sequence[Timed]], rounds: int) -> dict[Any, list[float]]:
    """The timer of real searches."""
    times = iter(in_turns([program for each in programs.values() for program in each], rounds))
    return {
        tiles: [sum(calls) for calls in zip(*(next(times) for _ in each), strict=True)]
        for tiles, each in programs.items()
    }


def search(problem: Problem, *, rounds: int, say: Say, known: Any = None, timer: Timer = time_in_turns) -> Outcome:
    """The fastest tiles of one key; ``known`` are those that the table has."""
    built_in, *candidates = problem.candidates()
    trial = _Trial(problem, say)
    programs = trial.prepare([built_in])
    if not programs:
        raise TuneError("the built-in tiles fail")
    programs |= trial.prepare(dict.fromkeys([*([] if known in (None, built_in) else [known]), *candidates]))
    best = _fastest(timer(programs, rounds), built_in)
    if best != built_in:
        finer = {best: programs[best], **trial.prepare(problem.refinements(best))}
        best = _fastest(timer(finer, rounds), best)
        programs |= finer
    # Of many that are timed the luckiest wins: once more, alone with the built-in ones.
    times = timer({tiles: programs[tiles] for tiles in (built_in, best)}, rounds)
    ratio = _ratio(times, built_in, best)
    if ratio < MARGIN:
        best, ratio = built_in, 1.0
    built_in_ms, best_ms = (statistics.median(times[tiles]) for tiles in (built_in, best))
    return Outcome(problem, built_in, built_in_ms, best, best_ms, ratio, trial.failed)


def _fastest(times: Mapping[Any, Sequence[float]], standard: Any) -> Any:
    """The tiles that beat the standard by most; the standard if none does by more than the noise."""
    ratio, best = max(((_ratio(times, standard, tiles), tiles) for tiles in times), key=lambda pair: pair[0])
    return best if ratio >= MARGIN else standard


def _ratio(times: Mapping[Any, Sequence[float]], standard: Any, tiles: Any) -> float:
    """How many times as fast as the standard, in the median over rounds."""
    return statistics.median(a / b for a, b in zip(times[standard], times[tiles], strict=True))


class _Trial:
    """Compiles tiles of one key and holds what they compute against the first ones, the built-in tiles."""

    def __init__(self, problem: Problem, say: Say) -> None:
        self.problem, self.say = problem, say
        self.arrays = problem.arrays()
        self.failed = 0
        self._standard: list[Timed] = []
        self._expected: list[Any] = []

    def prepare(self, candidates: Iterable[Any]) -> dict[Any, list[Timed]]:
        """The programs of those that compile and are right; what is wrong with the others is said."""
        ready: dict[Any, list[Timed]] = {}
        for tiles, programs in self._compile(list(candidates)):
            try:
                if isinstance(programs, Exception):
                    raise programs
                self._check(programs)
                ready[tiles] = programs
            except Exception as error:  # of the compiler or the GPU: whatever it is, these tiles are out
                self.failed += 1
                self.say(f"  dropped {describe(tiles)}: {_first_line(error)}")
                self._still_there(tiles)
        return ready

    def _compile(self, candidates: Sequence[Any]) -> list[tuple[Any, list[Timed] | Exception]]:
        """The compiler works on several at once."""

        def compiled(tiles: Any) -> list[Timed] | Exception:
            try:
                calls = self.problem.calls(tiles, self.arrays)
                return [Timed(jax.jit(call).lower(*args).compile(), args) for call, args in calls]
            except Exception as error:
                return error

        pool = concurrent.futures.ThreadPoolExecutor()
        try:
            return list(zip(candidates, pool.map(compiled, candidates), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # of an interrupted search, what has not begun

    def _check(self, programs: list[Timed]) -> None:
        results = [jax.block_until_ready(program.run(*program.arguments)) for program in programs]
        if not self._standard:
            self._standard, self._expected = programs, results
        for result, expected in zip(results, self._expected, strict=True):
            for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
                error = _difference(x, y)
                if not error <= _TOLERANCE[tile_table.dtype_class(self.problem.dtype)]:
                    raise TuneError(f"the result differs from that of the built-in tiles by {error:.1e} times its size")

    def _still_there(self, tiles: Any) -> None:
        """Raises DeviceLost if the built-in tiles do not run any more either."""
        try:
            for program in self._standard:
                jax.block_until_ready(program.run(*program.arguments))
        except Exception:
            raise DeviceLost(f"nothing runs on the GPU any more after {describe(tiles)}") from None


# float32 sums in another order, and in 16 bits weights and results are rounded too.
_TOLERANCE = {"half": 2e-2, "float32": 1e-4}


def _difference(x: jax.Array, y: jax.Array) -> float:
    """The largest difference, relative to y, of matrices to a row's largest number. NaN if there is any in either.

    Of a causal call the first rows have much larger numbers than the last.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size = jnp.max(jnp.abs(y), axis=-1, keepdims=True) if y.ndim == 4 else jnp.maximum(jnp.abs(y), 1.0)
    return float(jnp.max(jnp.where(x == y, 0.0, jnp.abs(x - y) / size)))  # equal infinities do not differ


# ------------------------------------------------------------------------------------------------------ all keys


def tune(
    problems: Sequence[Problem],
    file: Path,
    *,
    rounds: int,
    seconds: float | None,
    say: Say,
    timer: Timer = time_in_turns,
) -> tuple[list[Outcome], int]:
    """Outcomes of the keys that could be searched, and how many could not. The file is written after each of them.

    No key is begun once ``seconds`` have passed; those that the file lacks come first.
    """
    start, outcomes, failed = time.monotonic(), [], 0
    entries = tile_table.read(file)
    problems = sorted(problems, key=lambda problem: str(problem.key) in entries)
    for number, problem in enumerate(problems):
        if seconds is not None and time.monotonic() - start > seconds:
            say(f"{seconds:g} seconds have passed: {len(problems) - number} of {len(problems)} keys were not searched")
            break
        say(f"{problem.key} ({number + 1} of {len(problems)})")
        try:
            known = _known(problem, entries.get(str(problem.key)))
            outcome = search(problem, rounds=rounds, say=say, known=known, timer=timer)
        except DeviceLost:
            raise
        except (TuneError, jax.errors.JaxRuntimeError) as error:  # the latter: no memory for a key's arrays, say
            failed += 1
            say(f"  not searched: {_first_line(error)}")
            continue
        tile_table.merge(file, {problem.key: outcome.entry})
        outcomes.append(outcome)
        say(f"  {outcome.ratio:.3f} times as fast: {_tiles(outcome)}")
    return outcomes, failed


def _known(problem: Problem, entry: Any) -> Any:
    """Tiles of the table, if they are such as the kernel takes."""
    if entry is None:
        return None
    try:
        tiles = tile_table.parse(entry, problem.key, problem.built_in())
    except ValueError:
        return None
    return tiles if problem.accepts(tiles) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def describe(tiles: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(tiles).items()).replace(", ", ",")


def _tiles(outcome: Outcome) -> str:
    """What differs from the built-in tiles."""
    new, old = (dataclasses.asdict(tiles) for tiles in (outcome.best, outcome.built_in))
    changed = " ".join(f"{name}={value}" for name, value in new.items() if value != old[name])
    return changed.replace(", ", ",") or "as built in"


def render(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("kernel", "head size", "built-in ms", "best ms", "times as fast", "tiles"):
        table.add_column(name, justify="left" if name in ("kernel", "tiles") else "right")
    for outcome in outcomes:
        numbers = (f"{outcome.built_in_ms:.3f}", f"{outcome.best_ms:.3f}", f"{outcome.ratio:.3f}")
        table.add_row(outcome.problem.kernel, str(outcome.problem.head_size), *numbers, _tiles(outcome))
    return table


# --------------------------------------------------------------------------------------------------- command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `ringjax tune` is asked for.

    Attributes:
      implementation: "pallas_gpu" or "pallas_triton"; None: the GPU's best.
      head_sizes: of HEAD_SIZES.
      directions: "forward" and/or "backward".
      dtype: of query, key and value.
      length, heads: of the calls that are timed.
      rounds: in which all candidates are timed.
      seconds: no key is begun later; None: all are searched.
      table: the file to write; None: the user's.
      dry_run: print the candidates and do nothing else.
      device_kind: of a dry run for another GPU than the one at hand, as JAX names it.
    """

    implementation: str | None
    head_sizes: tuple[int, ...]
    directions: tuple[str, ...]
    dtype: str
    length: int
    heads: int
    rounds: int
    seconds: float | None
    table: Path | None
    dry_run: bool
    device_kind: str | None

    def __post_init__(self) -> None:
        for size in self.head_sizes:
            if size not in HEAD_SIZES:
                raise UsageError(f"--head-dim must be one of {', '.join(map(str, HEAD_SIZES))}. Got {size}.")
        if self.device_kind is not None and not self.dry_run:
            raise UsageError(
                f"--device-kind needs --dry-run: what is timed is the GPU at hand. Got {self.device_kind!r}."
            )
        check_at_least_one(heads=self.heads, rounds=self.rounds)
        if self.seconds is not None and not self.seconds >= 0:
            raise UsageError(f"--seconds must be at least 0. Got {self.seconds}.")
        if self.length < UNIT or self.length % UNIT:
            raise UsageError(f"--seq-len must be a multiple of {UNIT}. Got {self.length}.")


def main(request: Request) -> int:
    """`ringjax tune`; returns the exit status.

    Raises:
      UsageError: for what this GPU cannot, and a table that cannot be written.
    """
    console = Console()
    say: Say = lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    problems = _problems(request, say)
    if request.dry_run:
        for problem in problems:
            candidates = problem.candidates()
            say(f"{problem.key}: {len(candidates)} candidates, the built-in tiles first")
            for tiles in candidates:
                say(f"  {describe(tiles)}")
        return 0
    file = _writable_table(request.table)
    before = _modified(file)
    try:
        outcomes, failed = tune(problems, file, rounds=request.rounds, seconds=request.seconds, say=say)
    except DeviceLost as error:
        say(f"error: {error}. Keys searched before are in {file}; start again for the others.")
        return 1
    except OSError as error:
        say(f"error: {file}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; what was found before is in {file}" if _modified(file) != before else "interrupted")
        return 128 + signal.SIGINT
    first = problems[0]
    title = f"{first.device_kind}, {first.implementation}, {request.dtype}, 1 x {first.length} x {first.heads}"
    console.print(render(outcomes, f"{title}; medians of {request.rounds} rounds"))
    changed = sum(outcome.entry is not None for outcome in outcomes)
    say(f"{changed} of {len(outcomes)} keys have faster tiles than the built-in ones"
        + (f"; later processes find them in {file}" if changed else ""))  # fmt: skip
    if request.table is not None and changed and file != tile_table.path():
        say(f"{tile_table.VARIABLE}={file} has them read")
    return 1 if failed else 0


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _problems(request: Request, say: Say) -> list[Problem]:
    """All keys that are asked for."""
    kind, capability = request.device_kind, None
    if kind is None:
        try:
            platform = jax.default_backend()
        except RuntimeError:  # JAX_PLATFORMS names what this machine lacks, see the command line
            platform = "cpu"
        if platform != "gpu":
            raise UsageError(f"needs an NVIDIA GPU, or --dry-run with --device-kind. Got platform {platform!r}.")
        device: Any = jax.devices()[0]
        kind, capability = device.device_kind, getattr(device, "compute_capability", None)
    sizes = list(dict.fromkeys(request.head_sizes))
    target = Target(platform="gpu", device_kind=kind, capability=capability)
    best = lambda dtype: default(target, dtype, max(sizes)).name  # noqa: E731
    implementation = request.implementation or best(request.dtype)
    if implementation == "xla":
        raise UsageError(
            "needs an NVIDIA GPU of Ampere or later, as JAX names it ('NVIDIA ...'): others run 'xla', which has no "
            f"tiles. Got {kind!r}."
        )
    directions = [direction for direction in ("forward", "backward") if direction in request.directions]
    if implementation == "pallas_gpu":
        if not is_hopper(target):
            raise UsageError(f"--implementation pallas_gpu needs a Hopper GPU (H100, H200). Got {kind!r}.")
        if request.dtype not in BY_NAME[implementation].dtypes:
            raise UsageError(f"--implementation pallas_gpu needs --dtype bfloat16 or float16. Got {request.dtype}.")
        if directions == ["backward"]:
            raise UsageError(
                "--pass backward: the backward kernels of pallas_gpu have nothing to tune, their registers leave one "
                "choice of tiles. --implementation pallas_triton has."
            )
        if "backward" in directions:
            say("pallas_gpu: forward only, its backward kernels have nothing to tune")
    kernels = [kernel for direction in directions for kernel in KERNELS.get((implementation, direction), ())]
    return [
        Problem(implementation, kernel, request.dtype, size, request.length, request.heads, kind)
        for size in sizes
        for kernel in kernels
    ]


def _writable_table(named: Path | None) -> Path:
    """The file to write: one that can be, since minutes of timing come before."""
    file = named or tile_table.path()
    if file is None:
        raise UsageError(f"--table must name a file where {tile_table.VARIABLE} is empty.")
    try:
        tile_table.read(file)
        file.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise UsageError(f"--table {file}: {error}") from None
    if not os.access(file.resolve().parent, os.W_OK):
        raise UsageError(f"--table {file}: its directory must be writable.")
    return file
