"""A training run of seconds, as a command of its own: for tests that kill, stop, resume or spread it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LIBRARY = Path(sysconfig.get_paths()["stdlib"])

CONFIG = f"""
[devices]
simulate = 8

[mesh]
data = 2
sequence = 4

[data]
source = "paths"
paths = {json.dumps([str(_LIBRARY / name) for name in ("textwrap.py", "bisect.py", "heapq.py")])}
sequence_length = 256
batch_size = 2

[model]
num_layers = 1
embed_dim = 32
num_heads = 2
num_kv_heads = 1
head_dim = 16
mlp_dim = 64
loss_chunk = 32

[optimizer]
steps = 10
learning_rate = 1e-2
warmup_steps = 2

[checkpoint]
every_steps = 3
"""


def write_config(directory: Path, extra: str = "") -> Path:
    """tiny.toml in a directory; the run writes beside it."""
    path = directory / "tiny.toml"
    path.write_text(f"output = {json.dumps(str(directory / 'out'))}\n{CONFIG}{extra}", encoding="utf-8")
    return path


def start(*arguments: object, driver: str = "", **environment: str) -> subprocess.Popen[str]:
    """Starts `ringjax ARGUMENTS` in a fresh interpreter, after the Python statements of `driver`."""
    code = f"{driver}\nfrom ringjax.cli import main\nmain()\n"
    # JAX_PLATFORMS is left out: the configuration alone must do.
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    # As in the tests' own process, see conftest.py: what a run computes is for others, and each compiles for long.
    env |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status (negative: the signal) and all that was printed."""
    output, _ = process.communicate()
    return process.returncode, output


def run(*arguments: object, driver: str = "", **environment: str) -> tuple[int, str]:
    return finish(start(*arguments, driver=driver, **environment))


def metrics(output: Path) -> list[dict[str, float]]:
    """The records of a run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learned(output: Path) -> list[tuple[float, ...]]:
    """What must not depend on interruptions: step, loss and the norm of the gradient, to the last bit."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in metrics(output)]
