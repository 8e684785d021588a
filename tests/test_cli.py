"""The command line: what it passes on, how it refuses, and that JAX waits for the configuration."""

import importlib
import re

import pytest
import tiny_run
from typer.testing import CliRunner

import ringjax
from ringjax.cli import app

ROOT = tiny_run.ROOT


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("train", "demo", "bench", "tune"))


def test_bad_keys_are_one_line_each_and_nothing_is_written(tmp_path):
    config = tiny_run.write_config(tmp_path)
    result = invoke("train", config, "--set", "optimizer.lerning_rate=1", "--set", "data.seed=x")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        'error: data.seed: must be an integer. Got "x" (str).',
        "error: optimizer.lerning_rate: unknown key; the nearest valid key is optimizer.learning_rate. Got 1.",
    ]
    assert list(tmp_path.iterdir()) == [config]


def test_missing_configuration_and_unknown_option():
    missing = invoke("train", ROOT / "configs" / "tiny.toml")
    assert missing.exit_code == 2 and "stdlib_tiny.toml" in missing.stderr
    assert invoke("train", "x.toml", "--resume", "perhaps").exit_code == 2


def test_missing_text_is_an_error(tmp_path, monkeypatch):
    from ringjax.training import devices

    monkeypatch.setattr(devices, "start", lambda config: None)  # JAX runs already
    config = tiny_run.write_config(tmp_path)
    result = invoke("train", config, "--set", 'data.paths=["no/such/file"]')
    assert result.exit_code == 2
    assert result.stderr.startswith("error: data.paths: each entry must match at least one file. Got 'no/such/file'")


@pytest.mark.parametrize("command", ["demo", "bench", "tune"])
def test_other_commands_get_their_arguments_untouched(monkeypatch, command):
    module = importlib.import_module(f"ringjax.{command}" + ("" if command == "demo" else ".command"))
    got = []
    monkeypatch.setattr(module, "main", lambda argv: got.append(list(argv)) or 7)
    result = invoke(command, "cpu", "--help", "--rounds", "3", "-x")
    assert result.exit_code == 7
    assert got == [["cpu", "--help", "--rounds", "3", "-x"]]


def test_dry_run_says_what_a_step_takes(tmp_path):
    status, said = tiny_run.run("train", tiny_run.write_config(tmp_path), "--dry-run")
    assert status == 0, said
    assert "data 2 x sequence 4 x tensor 1 = 8 devices" in said
    assert "tokens per step: 2 x 256 = 512" in said
    assert "1 x 64 tokens" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mesh_and_devices_must_agree(tmp_path):
    config = tiny_run.write_config(tmp_path)
    status, said = tiny_run.run("train", config, "--set", "mesh.sequence=2")
    assert status == 2
    assert (
        "error: mesh: data x sequence x tensor must be the number of devices, 8 (cpu, 1 process). Got 2 x 2 x 1" in said
    )
    status, said = tiny_run.run("train", config, "--set", "devices.simulate=0", JAX_PLATFORMS="cpu")
    assert status == 2 and "devices.simulate = 8" in said


@pytest.mark.slow
def test_flags_of_the_user_are_kept(tmp_path):
    """The user's XLA_FLAGS stay; ours are added; nobody starts JAX before the configuration is read."""
    driver = """
import atexit, os
atexit.register(lambda: print("FLAGS", os.environ["XLA_FLAGS"]))
"""
    status, said = tiny_run.run(
        "train",
        tiny_run.write_config(tmp_path),
        "--set",
        "optimizer.steps=3",
        driver=driver,
        XLA_FLAGS="--xla_cpu_enable_fast_math=false --xla_backend_optimization_level=0",
    )
    assert status == 0, said
    flags = next(line for line in said.splitlines() if line.startswith("FLAGS"))
    assert "--xla_cpu_enable_fast_math=false" in flags
    assert "--xla_cpu_collective_call_terminate_timeout_seconds=" in flags
    assert "parameters on 8 cpu devices" in said


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"ringjax {ringjax.__version__}"


def test_a_key_by_its_initials_is_understood(tmp_path):
    result = invoke("train", tiny_run.write_config(tmp_path), "--set", "optimizer.lr=1")
    assert result.exit_code == 2
    assert "optimizer.lr: unknown key; the nearest valid key is optimizer.learning_rate" in result.output


@pytest.mark.slow
def test_tune_without_a_gpu_says_so_and_nothing_else():
    status, said = tiny_run.run("tune")
    assert status == 2
    *usage, last = said.splitlines()
    assert usage[0].startswith("usage: ringjax tune") and all(line.startswith((" ", "usage")) for line in usage)
    assert last == "ringjax tune: error: needs an NVIDIA GPU, or --dry-run with --device-kind. Got platform 'cpu'."


@pytest.mark.parametrize("command", [("demo",), ("bench", "cpu"), ("bench", "gpu"), ("bench", "tpu-static"), ("tune",)])
def test_one_name_for_one_thing(capsys, command):
    name, *rest = command
    module = importlib.import_module(f"ringjax.{name}" + ("" if name == "demo" else ".command"))
    with pytest.raises(SystemExit):
        module.main([*rest, "--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert not flags & {"--length", "--head-size", "--direction", "--num-devices"}
