"""PyTorch's context parallelism for `ringjax bench ring`, in processes of its own: one for each GPU.

They run before JAX takes the memory of the GPUs, so not in turns with the others. This file is both what starts them
and what they run; nothing here imports PyTorch unless it is such a process.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAME = "context_parallel"
KERNEL = "PyTorch"
BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}
ROTATIONS = ("allgather", "alltoall")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu", "-m", "ringjax.bench.ring_torch")
PATIENCE = 240.0  # seconds for all of it


@dataclasses.dataclass(frozen=True)
class Work:
    """One problem, as the processes are told of it. directions: "fwd" and/or "fwd+bwd"."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    is_causal: bool
    directions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """index: of the work; name, kernel: as tables call it. One of milliseconds and reason is None."""

    index: int
    direction: str
    name: str
    kernel: str
    milliseconds: float | None
    reason: str | None


def measure(
    work: Sequence[Work], dtype: str, rounds: int, seconds: float, patience: float = PATIENCE
) -> tuple[list[Result], str]:
    """Starts the processes and reads what they found.

    Args:
      work: the problems.
      dtype: by PyTorch's name, which is JAX's.
      rounds, seconds: as the other programs are timed.
      patience: seconds, after which all of them are ended; what they have found by then counts.

    Returns:
      The results, and why there are none or not all; "" if nothing is missing.
    """
    if importlib.util.find_spec("torch") is None:
        return [], "PyTorch is not installed"
    with tempfile.TemporaryDirectory() as folder:
        task, found = Path(folder) / "task.json", Path(folder) / "found.jsonl"
        todo = {"work": [dataclasses.asdict(each) for each in work], "dtype": dtype, "rounds": rounds}
        task.write_text(json.dumps(todo | {"seconds": seconds}), encoding="utf-8")
        command = [sys.executable, *LAUNCH, str(task), str(found)]
        pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipe)
        try:
            printed, _ = process.communicate(timeout=patience)
            reason = "" if process.returncode == 0 else _last_error(printed)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            reason = f"was ended after {patience:g} seconds"
        text = found.read_text(encoding="utf-8") if found.is_file() else ""
    return [Result(**json.loads(line)) for line in text.splitlines()], reason


def _last_error(printed: str) -> str:
    """The line that names the error, of all that several processes print."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["it printed nothing"])[-1][:240]


def main(task: Path, found: Path) -> None:
    """In each of the processes."""
    torch: Any = importlib.import_module("torch")
    dist: Any = importlib.import_module("torch.distributed")
    todo = json.loads(task.read_text(encoding="utf-8"))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cuda", (dist.get_world_size(),))
    for index, given in enumerate(todo["work"]):
        work = Work(**given)
        for backend, rotation in ((b, r) for b in BACKENDS for r in ROTATIONS):
            for direction in work.directions:
                milliseconds, reason = None, None
                try:
                    call = _program(torch, mesh, work, todo["dtype"], backend, rotation, direction)
                    milliseconds = call(lambda f: _timed(torch, dist, f, todo["rounds"], todo["seconds"]))
                except Exception as error:  # the others go on
                    reason = " ".join(str(error).split())[:240]
                if dist.get_rank() == 0:
                    result = Result(index, direction, f"{NAME} {rotation}", f"{KERNEL} {backend}", milliseconds, reason)
                    with found.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    dist.destroy_process_group()


def _program(
    torch: Any, mesh: Any, work: Work, dtype: str, backend: str, rotation: str, direction: str
) -> Callable[[Callable[[Callable[[], Any]], float]], float]:
    """Runs what it is given on a call, inside the contexts that make PyTorch's attention a ring."""
    attention: Any = importlib.import_module("torch.nn.attention")
    parallel: Any = importlib.import_module("torch.distributed.tensor.experimental")
    ring: Any = importlib.import_module("torch.distributed.tensor.experimental._attention")
    context = getattr(parallel, "context_parallel", None) or ring.context_parallel
    ring.set_rotate_method(rotation)
    options = getattr(ring, "_cp_options", None)
    if options is not None:  # its zigzag order, which it refuses without a causal mask
        options.enable_load_balance = work.is_causal

    def draw(heads: int) -> Any:
        size = (work.batch, heads, work.length, work.head_size)
        return torch.randn(size, device="cuda", dtype=getattr(torch, dtype))

    def within(time_it: Callable[[Callable[[], Any]], float]) -> float:
        whole = [draw(heads) for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)]
        backends = getattr(attention.SDPBackend, BACKENDS[backend])
        with attention.sdpa_kernel(backends), context(mesh, buffers=whole, buffer_seq_dims=[2] * len(whole)):
            q, k, v, dout = (x.detach().clone().requires_grad_(n < 3) for n, x in enumerate(whole))
            grouped = {"enable_gqa": True} if work.heads != work.kv_heads else {}

            def forward() -> Any:
                attend = torch.nn.functional.scaled_dot_product_attention
                return attend(q, k, v, is_causal=work.is_causal, **grouped)

            def both() -> Any:
                return torch.autograd.grad(forward(), (q, k, v), dout)

            return time_it(both if direction == "fwd+bwd" else forward)

    return within


def _timed(torch: Any, dist: Any, call: Callable[[], Any], rounds: int, seconds: float) -> float:
    """Milliseconds: the median over the rounds of a mean over calls that are queued one behind the other."""

    def once(calls: int) -> float:
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / calls

    once(2)
    calls = torch.tensor(max(1, min(50, int(1e3 * seconds / rounds / once(2)))), device="cuda")
    dist.broadcast(calls, 0)  # all of them must call as often
    return statistics.median(once(int(calls)) for _ in range(rounds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
