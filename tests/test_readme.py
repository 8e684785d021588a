"""What the README and three pages of the site promise: examples run as they stand, commands say what is shown."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from test_models_gguf import smol_that_reads
from tpu import needs_libtpu
from typer.testing import CliRunner

import ringjax
from ringjax.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def example() -> str:
    """The first Python block of the README; the other goes on from it."""
    return BLOCKS[0]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def run_as_users_do(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # conftest.py's
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def test_example_is_short_and_checks_itself():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15
    assert lines[-1].startswith("assert ")
    assert "jax.nn.dot_product_attention" in example()


def test_the_first_example_as_a_newcomer_runs_it():
    """And that it would fail on a wrong result."""
    wrong = example().replace("is_causal=True, layout", "layout", 1)
    assert wrong != example()
    result = run_as_users_do(f"{example()}\nprint('right')\n{wrong}")
    assert result.stdout == "right\n" and "AssertionError" in result.stderr, result.stderr


def test_example_of_a_pretrained_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With a file of the same form and name, small enough to be compiled in seconds."""
    _, code = BLOCKS
    (name,) = set(re.findall(r'"(\S+\.gguf)"', code))
    smol_that_reads(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {"jax": jax, "ringjax": ringjax}  # it goes on from the first example
    exec(code, names)
    assert len(names["tokens"]) == int(*re.findall(r"max_new_tokens=(\d+)", code))
    assert capsys.readouterr().out == names["tokenizer"].decode(names["tokens"]) + "\n"


def test_commands_of_fine_tuning_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after another, with a small file of the same name and shorter sequences; the last one is compiled only."""
    (block,) = (text for text in re.findall(r"```bash\n(.*?)```", page("training"), re.DOTALL) if "finetune" in text)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[:2] for command in commands] == [
        ["ringjax", "generate"], ["ringjax", "eval"], ["ringjax", "train"], ["ringjax", "eval"], ["python", "-c"]
    ]  # fmt: skip
    smol_that_reads(tmp_path / "SmolLM2-135M-Instruct.gguf")
    (tmp_path / "book.txt").write_text("the lighthouse stood at the end of a long road, " * 60, encoding="utf-8")
    (tmp_path / "configs").mkdir()
    shutil.copy(Path(__file__).parents[1] / "configs" / "finetune.toml", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for place in ("ringjax.simulate", "ringjax.training.devices"):  # JAX has started here, with eight devices
        monkeypatch.setattr(f"{place}.set_cpu_devices", lambda count: None)
    shorter = {
        "generate": ["--max-new-tokens", "3"],
        "eval": ["--seq-len", "128"],
        "train": ["--set", "data.sequence_length=128", "--set", "optimizer.learning_rate=3e-3"],
    }
    perplexities = []
    for _, name, *arguments in commands[:-1]:
        with jax.numpy_dtype_promotion("standard"):
            result = CliRunner().invoke(app, [name, *arguments, *shorter[name]])
        assert result.exit_code == 0, result.output
        if name == "eval":
            perplexities += [float(x) for x in re.findall(r" all .* ([\d.]+) ", result.stdout)]
    before, after = perplexities
    assert after < 0.9 * before
    assert '"smollm2-book"' in (tmp_path / "configs" / "finetune.toml").read_text(encoding="utf-8")
    assert "'smollm2-book'" in compile_code(commands[-1][2]) and (tmp_path / "smollm2-book" / "config.json").exists()


def compile_code(code: str) -> str:
    compile(code, "README", "exec")
    return code


@needs_libtpu
def test_inspect_says_what_the_readme_shows():
    """Its page, now; but for the compiler's time and version, and the memory that one version of it needs."""
    form = r"```bash\n(ringjax inspect [^\n]*)\n```\n\n```text\n(.*?)\n```"
    (command, shown), *more = re.findall(form, page("inspect"), re.DOTALL)
    assert not more
    said = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=True).stdout
    kept = lambda text: [line for line in text.split("\n") if not re.search(r"compiled in|peak| {2}8 ", line)]  # noqa: E731
    assert kept(said.rstrip("\n")) == kept(shown)
    assert len(kept(shown)) > 20


@needs_libtpu
def test_the_test_that_the_page_about_inspect_shows_passes():
    code = re.findall(r"```python\n(.*?)```", page("inspect"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    test()
