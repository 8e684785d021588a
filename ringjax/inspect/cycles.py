"""Static cycle estimates of the block kernels, where the compiler gives any, and the least that the matrix units need.

The estimate is the compiler's own count of one call, made without running anything: good for ranking, not calibrated.
The profiler that prints it aborts on some kernels (those with scalar prefetch, for one) and on v4; hence a child
process of its own, and a reason in place of a figure.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .compile import InspectError, compile_ring
from .program import Program

_ESTIMATE = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)(?:\s+num_equivalent_hlos: (\d+))?')


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Static estimates of the compiler for TPUs.

    Attributes:
      estimates: cycles of one call, by the kernel's name in the program; empty where there is a reason.
      reason: why there are none.
    """

    estimates: dict[str, int]
    reason: str | None = None


def estimate_cycles(program: Program, kernels: dict[str, int], *, timeout: float) -> Cycles:
    """Compiles once more with the profiler on.

    Args:
      program: the ring.
      kernels: how often each kernel runs, by name.
      timeout: seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ringjax-") as folder:
        try:
            compile_ring(program, timeout=timeout, libtpu_args=profile_to(Path(folder)))
        except InspectError as error:
            return Cycles({}, f"the profiler gives none: {error}")
        found = {name: cycles for name, cycles, _ in read_profile(Path(folder))}
    return match_estimates(found, kernels)


def profile_to(folder: Path) -> str:
    """The argument of libtpu that switches the profiler on."""
    return f"--xla_jf_dump_static_llo_profile_to={folder}"


def read_profile(folder: Path) -> Iterator[tuple[str, int, int]]:
    """What the profiler wrote: an operation's name, its cycles, and how many operations are the same as it."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for name, cycles, number in _ESTIMATE.findall(file.read_text(encoding="utf-8")):
            yield name, int(cycles), int(number or 1)


def match_estimates(found: dict[str, int], kernels: dict[str, int]) -> Cycles:
    """The profiler writes one estimate for kernels that are the same, under the name of one of them."""
    estimates = {}
    for kernel in kernels:
        alike = {name: cycles for name, cycles in found.items() if base_name(name) == base_name(kernel)}
        if kernel in alike:
            estimates[kernel] = alike[kernel]
        elif len(set(alike.values())) == 1:
            estimates[kernel] = next(iter(alike.values()))
    if not any(estimates.values()):
        return Cycles({}, "the profiler gives none for these kernels.")
    return Cycles(estimates)


def base_name(name: str) -> str:
    """A name in a program without the numbers that make it unique."""
    return re.sub(r"(\.(\d+|clone))+$", "", name)
