"""`ringjax bench serve` on simulated devices, small."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ringjax.bench import serve
from ringjax.cli import app
from ringjax.layers.decoder import Decoder
from ringjax.models.generation import generate

SIZES = "64,32,4,2,8,64,2"
SMALL = ["--model", SIZES, "--dtype", "float32", "--new-tokens", "3", "--devices", "4"]
REQUEST = serve.Request(model=SIZES, prompts=(32,), batch_size=2, new_tokens=11, dtype="float32")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def test_command_measures_every_prompt_and_writes_it(tmp_path: Path):
    figures = tmp_path / "figures.json"
    result = invoke(*SMALL, "--prompt-length", 32, "--prompt-length", 50, "--batch-size", 2, "--json", figures)
    assert result.exit_code == 0, result.output
    record = json.loads(figures.read_text(encoding="utf-8"))
    assert record["title"].startswith("4 x cpu") and "22,688 random parameters" in record["title"]
    assert "sequence over 4, heads over 1; " in record["title"]
    assert [row["prompt_tokens"] for row in record["rows"]] == [32, 50]
    for row in record["rows"]:
        assert row["first_token_seconds"] > 0 and row["token_seconds"] > 0 and row["reason"] == ""
        room = -(-(row["prompt_tokens"] + 1 + 2 + 3) // 4)  # tokens of one of four devices
        assert row["cache_bytes"] >= 2 * 2 * 2 * room * 2 * 8 * 4, "layers, keys and values, rows, heads, size, bytes"
        assert row["compile_seconds"] > 0 and row["first_call_seconds"] > 0
    assert "2 x 32 " in result.stdout and "2 x 50 " in result.stdout
    assert result.stdout.index("2 x 32: compiled in ") < result.stdout.index("2 x 50: compiled in ")


@pytest.mark.parametrize("head_devices", [1, 2])
def test_it_times_what_generate_does(head_devices: int, monkeypatch: pytest.MonkeyPatch):
    """The same tokens, so the same work: the first of the prompt, and each from those before it."""
    request = dataclasses.replace(REQUEST, head_devices=head_devices)
    mesh = serve.mesh_of(request, jax.devices()[:4])
    assert dict(mesh.shape) == {"sp": 4 // head_devices, "heads": head_devices}
    decoder = Decoder.init_sharded(request.decoder_config(), mesh=mesh)
    seen: list[np.ndarray] = []
    timed = serve._timed

    def recorded(run: Any, *arguments: Any) -> Any:
        found = timed(run, *arguments)
        seen.append(found[0])
        return found

    monkeypatch.setattr(serve, "_timed", recorded)
    row = serve.measure(decoder, request, 32, print)
    assert row.reason == "" and [x.shape for x in seen] == [(2,)] * 2 + [(8, 2)] * 3
    assert seen.pop(0).tolist() == seen[0].tolist(), "the prompt is read twice"
    got = [seen[0], *seen[1][:2], *seen[2], *seen[3][:3]]
    prompts = np.random.default_rng(0).integers(0, 64, (2, 32)).tolist()
    wanted = list(generate(decoder, prompts, max_new_tokens=len(got), capacity=46))
    assert [step.tolist() for step in got] == wanted


def test_a_prompt_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch):
    measured = serve._measure

    def too_much(decoder: Decoder, asked: serve.Request, tokens: int, say: Any) -> serve.Row:
        if tokens > 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate")
        return measured(decoder, asked, tokens, say)

    monkeypatch.setattr(serve, "_measure", too_much)
    result = invoke(*SMALL, "--prompt-length", 64, "--prompt-length", 32)
    assert result.exit_code == 0, result.output
    assert "1 x 64 was not measured: RESOURCE_EXHAUSTED: Out of memory while trying" in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "1 x 64 - - - - - -" in lines and any(line.startswith("1 x 32 ") and "s" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model must be llama3-8b or V,E,N,K,H,M,L: vocabulary, width, query heads,"),
        (["--model", "1,2,3"], "layers. Got '1,2,3'."),
        (["--model", "64,32,4,3,8,64,2"], "--model: num_kv_heads must divide num_heads."),
        (["--prompt-length", "0"], "--prompt-length must be at least 1. Got 0."),
        (["--head-devices", "4"], "--head-devices must divide the 2 key/value heads. Got 4."),
        (["--head-devices", "2", "--devices", "3"], "--head-devices must divide the 3 devices. Got 2."),
        (["--new-tokens", "0"], "--new-tokens must be at least 1. Got 0."),
        (["--batch-size", "0"], "--batch-size must be at least 1. Got 0."),
        (["--json", "absent/x.json"], "--json must be a file in a directory that exists."),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str):
    result = invoke(*SMALL, *arguments)
    line = " ".join(result.stderr.split())
    assert result.exit_code == 2 and line.startswith("error: ") and message in line, result.output
