"""The command line: what it passes on, how it refuses, and that JAX waits for the configuration."""

import re
import subprocess
import sys
import typing
from typing import Any

import pytest
import tiny_run
import typer
from typer.testing import CliRunner, Result

import ringjax
from ringjax import cli
from ringjax.bench import cpu, gpu, ring, ring_peers, tpu
from ringjax.cli import app, options
from ringjax.config import DKV_DTYPES, IMPLEMENTATIONS
from ringjax.inspect.program import DEVICE_ORDERS, DTYPES
from ringjax.tune import space

ROOT = tiny_run.ROOT
COMMANDS = [
    "train",
    "demo",
    "bench cpu",
    "bench gpu",
    "bench hops",
    "bench ring",
    "bench serve",
    "bench tpu-static",
    "tune",
    "plan",
    "inspect",
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def words(text: str) -> str:
    """Without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", text).split())


def command_of(name: str) -> Any:
    found: Any = typer.main.get_command(app)
    for part in name.split():
        found = found.commands[part]
    return found


def test_help_names_the_commands():
    """Each in one line that is not cut off."""
    for group, names in (
        ((), ["train", "generate", "eval", "demo", "bench", "tune", "plan", "inspect"]),
        (("bench",), ["cpu", "gpu", "hops", "ring", "serve", "tpu-static"]),
    ):
        result = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0
        rows = [words(line) for line in result.output.partition("Commands")[2].splitlines()]
        rows = [row for row in rows if row]
        assert [row.split()[0] for row in rows] == names
        assert all(len(row.split()) > 4 and row.endswith(".") for row in rows), rows


@pytest.mark.parametrize("command", ["bench", *COMMANDS])
def test_every_command_has_the_same_help(command: str):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.output.split("Usage: ")[1].startswith(f"ringjax {command} [OPTIONS]")
    assert "─ Options ─" in result.output and "Show this message and exit." in result.output
    said = words(result.output)
    for option in command_of(command).params:
        assert option.opts[0] in said and option.help and option.help.endswith((".", ")"))


@pytest.mark.parametrize("command", ["bench", *COMMANDS])
@pytest.mark.parametrize("wrong", ["--sequence-length", "--quiet"])
def test_an_unknown_flag_is_reported_before_missing_ones(command: str, wrong: str):
    result = invoke(*command.split(), wrong, "8")
    assert (result.exit_code, result.stdout) == (2, "")
    said = words(result.stderr)
    assert f"No such option: {wrong}" in said and "Missing" not in said


@pytest.mark.parametrize(
    ("command", "wrong", "near"),
    [
        ("inspect", "--seq-length", "--seq-len"),
        ("inspect", "--num-heads", "--heads"),
        ("train", "--dry-ran", "--dry-run"),
        ("bench cpu", "--device", "--devices"),
        ("tune", "--head-size", "--head-dim"),
    ],
)
def test_an_unknown_flag_comes_with_the_nearest_one(command: str, wrong: str, near: str):
    said = words(invoke(*command.split(), wrong, "8").stderr)
    assert re.search(f"No such option: {wrong}.*{near}", said)


def test_missing_flags_are_named():
    assert "Missing option '--topology'" in words(invoke("inspect").stderr)
    assert "Missing argument" in words(invoke("train").stderr)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("inspect", "--dtype", "int8"), ("'--dtype'", "'int8'", "'bfloat16'")),
        (("bench", "cpu", "--pass", "fwd"), ("'--pass'", "'fwd'", "'forward'", "'backward'")),
        (("tune", "--pass", "both"), ("'--pass'", "'both'", "'forward'", "'backward'")),
        (("demo", "--devices", "many"), ("'--devices': must be an integer. Got 'many'.",)),
        (("inspect", "--timeout", "long"), ("'--timeout': must be a number. Got 'long'.",)),
        (("bench", "tpu"), ("'tpu'",)),
        (("watch",), ("'watch'",)),
    ],
)
def test_wrong_words_are_refused(arguments: tuple[str, ...], parts: tuple[str, ...]):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    said = words(result.stderr)
    assert all(part in said for part in parts) and "Traceback" not in said


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
    assert said == "error: needs an NVIDIA GPU, or --dry-run with --device-kind. Got platform 'cpu'.\n"


# What a flag is called wherever the thing is one of a command's, and the letter or the words that it takes.
NAMES = {
    "--seq-len": "T",
    "--heads": "N",
    "--kv-heads": "K",
    "--head-dim": "H",
    "--value-head-dim": "Hv",
    "--devices": "C",
    "--ring": "C",
    "--rounds": "R",
    "--timeout": "S",
    "--dtype": options.DtypeName,
    "--layout": options.LayoutName,
    "--pass": options.PassName,
}


# The plan is made for devices that are there by name, with the links between them.
EXCEPT = {("plan", "--devices"): "TOPOLOGY"}


def leaves(kind: Any) -> set[Any]:
    """The types that one is made of: of `list[int] | None`, int and None's."""
    return set().union(*map(leaves, typing.get_args(kind))) or {kind}


FUNCTIONS: dict[str, Any] = {
    "train": cli.train.train,
    "demo": cli.demo.demo,
    "bench cpu": cli.bench.cpu,
    "bench gpu": cli.bench.gpu,
    "bench hops": cli.bench.hops,
    "bench ring": cli.bench.ring,
    "bench serve": cli.bench.serve,
    "bench tpu-static": cli.bench.tpu_static,
    "tune": cli.tune.tune,
    "plan": cli.plan.plan,
    "inspect": cli.inspect.inspect,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_name_for_one_thing(command: str):
    others = "length head-size backward num-devices sequence-length num-heads"
    hints = typing.get_type_hints(FUNCTIONS[command], include_extras=True)
    seen = set()
    for option in command_of(command).params:
        if option.name not in hints:
            continue  # --help
        flag, hint = option.opts[0], hints[option.name]
        kinds = leaves(hint.__origin__)
        seen.add(option.name)
        assert flag not in {f"--{other}" for other in others.split()}
        expected = EXCEPT.get((command, flag), NAMES.get(flag))
        if isinstance(expected, str):
            assert option.metavar == expected, flag
        elif expected is not None:
            assert expected in kinds, flag
        if kinds & {int, float}:
            assert hint.__metadata__[0].parser is not None, f"{flag} would not say what was given"
    assert seen == set(hints) - {"return"}


def test_words_are_those_of_the_library():
    """They are declared without importing JAX, and must not drift."""

    def values(choices: type[options.Choice]) -> set[str]:
        return {choice.value for choice in choices}

    assert values(options.DtypeName) == set(DTYPES) == set(DKV_DTYPES)
    assert values(options.LayoutName) == set(cpu.LAYOUTS)
    assert values(options.PassName) == set(cpu.PASSES) == set(tpu.PASSES)
    assert values(cli.inspect.Implementation) == set(IMPLEMENTATIONS)
    assert values(cli.inspect.DeviceOrder) == set(DEVICE_ORDERS)
    assert values(cli.bench.Generation) == set(tpu.TOPOLOGIES)
    assert values(cli.bench.GpuImplementation) == set(IMPLEMENTATIONS) - {"pallas_tpu"}
    assert values(cli.bench.RingImplementation) == set(IMPLEMENTATIONS)
    assert values(cli.bench.PeerName) == set(ring_peers.PEERS)
    assert values(cli.tune.TunedImplementation) == {implementation for implementation, _ in space.KERNELS}
    assert f"{options.LayoutName.zigzag!r}" == "'zigzag'", "as messages of the library quote it"
    assert (len(gpu.SHAPES), len(ring.PROBLEMS)) == (4, 8), "as the help says"


def test_a_command_is_imported_when_it_is_called():
    code = "import sys, ringjax.cli; sys.stdout.write(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ringjax.cli.bench" in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("ringjax.")}
    assert not rooms & {"bench", "demo", "inspect", "tune", "training", "nnx", "linen"}
    assert not {"flax", "optax", "orbax", "matplotlib", "jax.experimental.pallas"} & set(loaded)
