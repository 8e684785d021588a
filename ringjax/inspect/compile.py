"""Runs the compiler in a child process and turns whatever happens there into a result or one clear line."""

import contextlib
import dataclasses
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import process
from .program import Program

# The packages of a platform's compiler; JAX has one for each major version of CUDA.
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt")}
_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# Two ways in which the compiler says how much it lacks.
_USED = re.compile(r"(?:Used |\()([\d.]+[KMGT]\w*)\)?(?: of | exceeds available \w+ \()([\d.]+[KMGT]\w*)")
# Memory that a kernel's tiles may be too large for, by the word that the compiler has for it.
_TIGHT = {"vmem": "VMEM of a core", "shared memory": "shared memory of a multiprocessor"}


class InspectError(Exception):
    """The ring could not be compiled.

    Args:
      message: one line that says why.
      code: the exit status of the command.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said. Bytes are of one device.

    Attributes:
      text: the program, scheduled HLO.
      peak_bytes: of memory, arguments included; of TPUs that of HBM.
      argument_bytes, output_bytes: of the program's arguments and results.
      lower_seconds, compile_seconds: what it took.
      versions: of the packages, by name.
      flags: XLA_FLAGS of the compiler.
      vmem_bytes: of arrays that a TPU keeps in VMEM, at most.
      rings: devices along each of several rings.
    """

    text: str
    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    lower_seconds: float
    compile_seconds: float
    versions: dict[str, str]
    flags: str = ""  # XLA_FLAGS, which the child inherits
    vmem_bytes: int = 0  # of arrays that a TPU keeps in VMEM, at most; the peak is of HBM
    rings: Sequence[Sequence[int]] = ()  # devices along each of several rings


def check_libtpu() -> None:
    """Raises InspectError where there is no TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise InspectError('libtpu, the TPU compiler, is not installed: pip install "ringjax[tpu]"', code=2)


def check_cuda() -> None:
    """Raises InspectError where there is no GPU compiler."""
    for name in _CUDA_PLUGINS:
        with contextlib.suppress(ModuleNotFoundError):  # the parent of a name is imported, and may be missing
            if importlib.util.find_spec(name) is not None:
                return
    raise InspectError(
        'the CUDA plugin of JAX, the GPU compiler, is not installed: pip install "ringjax[cuda]"', code=2
    )


def compile_ring(program: Program, *, timeout: float = 600.0, libtpu_args: str = "") -> Compiled:
    """Compiles in a child process, which is killed on a timeout and on Ctrl-C.

    Args:
      program: what to compile.
      timeout: seconds.
      libtpu_args: appended to LIBTPU_INIT_ARGS of the child.

    Raises:
      InspectError: no compiler for the platform, or it refused, aborted or took too long.
    """
    if program.slice.platform == "gpu":
        check_cuda()
    else:
        check_libtpu()
    with tempfile.TemporaryDirectory(prefix="ringjax-") as folder:
        request, result, log = (Path(folder) / name for name in ("request.json", "result.json", "stderr.txt"))
        request.write_text(json.dumps(program.to_json()), encoding="utf-8")
        status = _run_child(request, result, log, timeout, libtpu_args)
        said = log.read_text(encoding="utf-8", errors="replace")
        if not result.exists():
            raise InspectError(process.how_it_ended(status, said))
        outcome = json.loads(result.read_text(encoding="utf-8"))
    if "error" in outcome:
        raise _refusal(program, outcome)
    compiled = Compiled(**outcome)
    memory = program.slice.memory_bytes
    if program.slice.platform == "gpu" and compiled.peak_bytes > memory:  # what the compiler for TPUs refuses itself
        raise _too_large(f"it needs {compiled.peak_bytes / 2**30:.4g}G of {memory / 2**30:.4g}G")
    return compiled


def _too_large(detail: str, where: str = "memory of a device (a larger --ring holds less on each)") -> InspectError:
    return InspectError(f"the program is too large for the {where}: {detail}.")


def _run_child(request: Path, result: Path, log: Path, timeout: float, libtpu_args: str) -> int:
    """The exit status; negative is a signal."""
    arguments = ("ringjax.inspect.child", str(request), str(result))
    with (
        log.open("w", encoding="utf-8") as stream,
        process.started(*arguments, log=stream, stdout=stream, libtpu_args=libtpu_args) as child,
    ):
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise InspectError(f"the compiler was stopped: it took longer than --timeout, {timeout:g} s.") from None


def _refusal(program: Program, outcome: dict[str, Any]) -> InspectError:
    """One line for an exception in the child."""
    kind, message = outcome["error"], outcome["message"]
    if kind == "NotImplementedError" or (kind == "ValueError" and "Got " in message):  # an argument, in our own words
        return InspectError(_first_line(message), code=2)
    if "limited ICI routing" in message:
        return InspectError(
            f"ring must divide the {program.slice.num_devices} devices of {program.slice.name}, whose generation "
            f"compiles for whole slices only. Got {program.ring}.",
            code=2,
        )
    if "RESOURCE_EXHAUSTED" in message or "Oom" in message:
        used = _USED.search(message)
        detail = f"it needs {used[1]} of {used[2]}" if used else _first_line(message)
        for word, where in _TIGHT.items():
            if word in message.lower():
                return _too_large(detail, f"{where} (smaller tiles of a kernel, --block-q and --block-kv, need less)")
        return _too_large(detail)
    if kind != "JaxRuntimeError":
        return InspectError(f"the ring could not be compiled: {kind} at {outcome['where']}: {_first_line(message)}")
    return InspectError(f"the compiler refused: {_first_line(message)}")


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "it did not say why")[:400]
