"""Registers of the kernels for Hopper GPUs, as ptxas reports them. Needs no GPU, but a JAX whose compiler ptxas is."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_inspect_gpu import needs_cuda

needs_ptxas = pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="JAX 0.12 has nvJitLink compile, which gives warpgroups no registers"
)


@needs_cuda
@needs_ptxas
@pytest.mark.parametrize(
    ("head_dim", "flags"),
    [
        (64, ""), (64, "--causal"), (64, "--segments"), (128, ""), (128, "--causal"), (128, "--segments"),
        (256, "--causal"),
    ],
)  # fmt: skip
def test_products_run_beside_other_work(tmp_path: Path, head_dim: int, flags: str) -> None:
    """Where registers do not suffice, ptxas waits for every product at once and says so, as by C7512."""
    command = "-m ringjax inspect --topology h100:2 --seq-len 32768 --heads 8 --kv-heads 2 --pass backward"
    asked = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    subprocess.run(
        [sys.executable, *command.split(), *flags.split(), "--head-dim", str(head_dim)],
        env={**os.environ, **asked}, check=True, capture_output=True,
    )  # fmt: skip
    reports = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.ptxas")}
    assert {name.split("_")[1] for name in reports} == {"forward", "backward"}
    assert [name for name, report in reports.items() if "serialized" in report] == []
