"""What the TPU compiler expects each operation of a program to take, in cycles: no TPU needed, only libtpu.

The estimate is the compiler's own, from the schedule it has made: deterministic, not calibrated, good for ranking.
Operations that run beside others (asynchronous copies) count nothing. The profiler is switched on by a variable that
libtpu reads when it is loaded, and it aborts the process on kernels it cannot follow (scalar prefetch, for one). So
programs are compiled by a child, `python -m ringjax.bench.static_cycles FOLDER`, which is started again after an abort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..inspect import process
from ..inspect.compile import check_libtpu
from ..inspect.cycles import profile_to, read_profile
from ..planner.topology import parse_slice

_ABORT = re.compile(r"(?:Static LLO profiling of .*? failed|Check failure|Check failed): .*")


@dataclasses.dataclass(frozen=True)
class Built:
    """A program to compile: a function of arrays, and their shapes (ShapeDtypeStructs, in any pytree)."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the child makes a program. All of it goes through JSON.

    Attributes:
      builder: "module:function"; called with the device and the options, returns a :class:`Built`.
      options: keyword arguments of the builder.
      topology: as libtpu spells it, such as "v5e:2x2". The program runs on one device of it.
      compiler_options: XLA flags for this program alone.
    """

    builder: str
    options: dict[str, Any]
    topology: str
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cycles of each operation of one program; none, and the reason, where the compiler gave none."""

    operations: dict[str, int]
    reason: str | None = None

    @property
    def total(self) -> int:
        if self.reason is not None:
            raise ValueError(f"total needs an estimate. Got none: {self.reason}")
        return sum(self.operations.values())


def estimate(
    recipes: Sequence[Recipe], *, timeout: float = 600.0, progress: Callable[[int, Estimate], None] | None = None
) -> list[Estimate]:
    """Compiles programs one after the other, in a child process.

    Args:
      recipes: what to compile.
      timeout: seconds for each program.
      progress: called with the index of a program and its estimate, as they come.

    Returns:
      One estimate per program; what cannot be compiled or estimated has a reason.

    Raises:
      InspectError: libtpu is not installed.
    """
    check_libtpu()
    for recipe in recipes:
        parse_slice(recipe.topology)
    found: list[Estimate] = []
    while len(found) < len(recipes):
        for result in _child(recipes[len(found) :], timeout):
            found.append(result)
            if progress is not None:
                progress(len(found) - 1, result)
    return found


def _child(recipes: Sequence[Recipe], timeout: float) -> Iterator[Estimate]:
    """Estimates until the child ends; if it ended too early, the last one says why. Always at least one."""
    with tempfile.TemporaryDirectory(prefix="ringjax-") as name:
        folder = Path(name)
        fields = [dataclasses.asdict(recipe) for recipe in recipes]
        (folder / "recipes.json").write_text(json.dumps(fields), encoding="utf-8")
        log = folder / "stderr.txt"
        count, limit = 0, _Limit(timeout)
        with log.open("w", encoding="utf-8") as stream, _started(folder, stream) as child:
            limit.watch(child)
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith('{"operations"'):
                    limit.watch(child)
                    count += 1
                    yield Estimate(**json.loads(line))
            limit.stop()
            status = child.wait()
        if count < len(recipes):
            said = log.read_text(encoding="utf-8", errors="replace")
            yield Estimate({}, limit.reason or _last_words(said, status))


def _started(folder: Path, log: IO[str]) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return process.started(
        "ringjax.bench.static_cycles",
        str(folder),
        log=log,
        stdout=subprocess.PIPE,
        libtpu_args=profile_to(folder / "profile"),
        environment={"TPU_STDERR_LOG_LEVEL": "0"},  # an abort tells its reason there
    )


class _Limit:
    """Kills a child that does not report in time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.reason, self._timer = seconds, None, None

    def watch(self, child: subprocess.Popen[str]) -> None:
        """Starts anew."""
        self.stop()
        self._timer = threading.Timer(self.seconds, self._kill, (child,))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self, child: subprocess.Popen[str]) -> None:
        self.reason = f"stopped: it took longer than {self.seconds:g} s."
        process.kill(child)


def _last_words(said: str, status: int) -> str:
    """Why a child ended before its work was done."""
    abort = _ABORT.search(said)
    if abort is not None:
        return f"the profiler aborts: {abort[0][:300]}"
    return process.how_it_ended(status, said)


def _compile(recipe: Recipe, profile: Path) -> dict[str, int]:
    """In the child: compiles, and collects what the profiler wrote."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    generation = parse_slice(recipe.topology).generation
    options = {} if generation.chip_config is None else {"chip_config_name": generation.chip_config}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=recipe.topology, **options)
    device = topology.devices[0]
    module, name = recipe.builder.split(":")
    built: Built = getattr(importlib.import_module(module), name)(device, **recipe.options)
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), built.arguments)
    shutil.rmtree(profile, ignore_errors=True)
    lowered = jax.jit(built.function, donate_argnums=built.donated).lower(*arguments)
    flags: Any = recipe.compiler_options or None
    lowered.compile(compiler_options=flags)
    operations: dict[str, int] = {}
    for name, cycles, number in read_profile(profile):
        operations[name] = operations.get(name, 0) + cycles * number
    return operations


def _main(folder: Path) -> None:
    """The child: one line of JSON per program."""
    for fields in json.loads((folder / "recipes.json").read_text(encoding="utf-8")):
        start = time.perf_counter()
        try:
            operations = _compile(Recipe(**fields), folder / "profile")
            result = Estimate(operations, None if operations else "the compiler wrote no estimate.")
        except Exception as error:  # the next program may well compile
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            result = Estimate({}, f"{type(error).__name__}: {first[:300]}")
        print(json.dumps(dataclasses.asdict(result)), flush=True)
        print(f"{fields['builder']}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
