"""Hopper GPUs: which they are, the compiler option that hides a ring there, and that `ringjax train` sets it."""

import dataclasses
import io
import types

import jax
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType
from rich.console import Console

from ringjax.hopper import COMBINE, is_hopper, ring_options
from ringjax.inspect.gpus import GPUS
from ringjax.training import devices, loop, program
from ringjax.training.loading import load

H100, H200, A100 = (GPUS[name].kind for name in ("h100", "h200", "a100"))
COMBINED = {"xla_gpu_collective_permute_combine_threshold_bytes": 2**34}
OTHER_FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_all_reduce_combine_threshold_bytes=1"


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [
        (H100, True), (H200, True), ("NVIDIA GH200 480GB", True), ("NVIDIA H100 PCIe", True), ("NVIDIA H20", True),
        ("NVIDIA H800", True), (A100, False), (GPUS["b200"].kind, False), ("NVIDIA GB200", False),
        ("NVIDIA L40S", False), ("AMD Instinct MI300X", False), ("TPU v5p", False), ("cpu", False), ("", False),
    ],
)  # fmt: skip
def test_which_devices_are_hopper(kind, hopper):
    assert is_hopper(kind) is hopper
    assert ring_options(kind, 8, "") == (COMBINED if hopper else {})


@pytest.mark.parametrize(
    ("ring", "flags", "options"),
    [
        (1, "", {}),
        (2, "", COMBINED),
        (8, OTHER_FLAGS, COMBINED),
        (8, f"--{COMBINE}=0", {}),
        (8, f"{OTHER_FLAGS} --{COMBINE}=17179869184", {}),
    ],
)
def test_a_ring_and_what_the_user_says(ring, flags, options):
    assert ring_options(H100, ring, flags) == options


# --- training --------------------------------------------------------------------------------------------------------


def mesh_of(config) -> jax.sharding.Mesh:
    """On the devices that the tests have."""
    shape = (config.mesh.data, config.mesh.sequence, config.mesh.tensor)
    return jax.make_mesh(shape, devices.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def config(tmp_path):
    return load(tiny_run.write_config(tmp_path), ["optimizer.steps=3"])


@pytest.fixture
def made(config):
    with jax.numpy_dtype_promotion("standard"):  # Adam in Optax raises a float to an int32 count
        yield program.build(config, mesh_of(config))


@pytest.mark.parametrize(
    ("kind", "sequence", "flags", "options"),
    [
        (H100, 4, "", COMBINED),
        (H200, 8, OTHER_FLAGS, COMBINED),
        (H100, 1, "", {}),
        (H100, 4, f"--{COMBINE}=1", {}),
        (A100, 4, "", {}),
        ("cpu", 4, "", {}),
    ],
)
def test_the_step_asks_for_its_own_mesh(monkeypatch, made, kind, sequence, flags, options):
    monkeypatch.setenv("XLA_FLAGS", flags)

    class Pretended:
        devices = np.array([types.SimpleNamespace(device_kind=kind)] * 8, dtype=object)
        shape = {"data": 8 // sequence, "sequence": sequence, "tensor": 1}

    monkeypatch.setattr(program, "Mesh", Pretended)
    assert dataclasses.replace(made, mesh=Pretended()).compiler_options == options


def test_an_abstract_mesh_needs_no_options(config):
    assert program.build(config, devices.abstract_mesh(config)).compiler_options == {}


def pretend(monkeypatch, options: dict[str, int]) -> None:
    monkeypatch.setattr(program, "ring_options", lambda kind, ring, flags: options)


def test_the_compiler_is_given_the_option(monkeypatch, made):
    """XLA knows its flags on every platform, and refuses others: an unknown one shows that they arrive."""
    pretend(monkeypatch, COMBINED)
    made.compile_step()
    pretend(monkeypatch, {"xla_no_such_flag": 1})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_flag"):
        made.compile_step()


@pytest.mark.parametrize("options", [{}, {"xla_no_such_flag": 1}], ids=["none", "one"])
def test_a_run_compiles_so_and_says_it(monkeypatch, config, options):
    printed = io.StringIO()
    monkeypatch.setattr(devices, "start", mesh_of)
    pretend(monkeypatch, options)
    console = Console(file=printed, width=200)
    with jax.numpy_dtype_promotion("standard"):
        if options:
            with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_flag"):
                loop.train(config, console=console)
        else:
            loop.train(config, console=console)
    assert ("compiled with xla_no_such_flag=1, so that permutes hide" in printed.getvalue()) == bool(options)
    assert ("compiled with" in printed.getvalue()) == bool(options)
