"""The cross entropy of each token, and perplexity by position, against sums by hand over the logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from test_decoder import V, cube, make, ring_mesh
from test_generate import WIDE, natural
from test_models_gguf import smol_that_reads
from typer.testing import CliRunner

from ringjax import models, to_ring_order
from ringjax.cli import app

CONFIG = WIDE["everything"]


def by_hand(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64, of the decoder on one device: itself held against the dense one."""
    decoder = make(natural(CONFIG))
    logits = np.asarray(jax.jit(lambda d, t: d(t))(decoder, tokens)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("mesh", [None, 3, "cube", "typed"], ids=str)
def test_token_losses(mesh: Any):
    """In the order of the tokens, for chunks that do not divide a shard; their mean is the loss."""
    tokens, targets = np.random.default_rng(0).integers(0, V, (2, 2, 24), np.int32)
    want, decoder, shards = by_hand(tokens, targets), make(natural(CONFIG)), 1
    config = dataclasses.replace(CONFIG, loss_chunk=5)
    where: Any = None
    if mesh is not None:
        axes = {} if mesh == 3 else {"batch_axis_name": "data", "head_axis_name": "tensor"}
        where = ring_mesh(3) if mesh == 3 else cube(AxisType.Explicit if mesh == "typed" else AxisType.Auto)
        decoder = make(dataclasses.replace(config, **axes), where)
        shards = where.shape["sp"]
    dealt: Any = to_ring_order((tokens, targets, want), layout=decoder.config.layout, num_shards=shards)
    run = jax.jit(lambda decoder, *arrays: (decoder.token_losses(*arrays), decoder.loss(*arrays)[0]))
    if mesh == "typed":
        with jax.set_mesh(where):
            losses, loss = run(decoder, *dealt[:2])
    else:
        losses, loss = run(decoder, *dealt[:2])
    assert losses.dtype == np.float32 and losses.shape == (2, 24)
    np.testing.assert_allclose(np.asarray(losses), np.asarray(dealt[2]), atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(float(loss), want.mean(), rtol=2e-5)


def test_a_target_outside_the_vocabulary_is_nan_for_its_token_alone():
    tokens = np.random.default_rng(0).integers(0, V, (1, 8), np.int32)
    targets = np.where(np.arange(8) == 3, -1, tokens)
    losses = np.asarray(make(natural(CONFIG)).token_losses(tokens, targets))
    assert (np.isnan(losses) == (targets == -1)).all()
    with pytest.raises(ValueError, match=r"targets must be integers of shape \(1, 8\)"):
        make(natural(CONFIG)).token_losses(tokens, targets[:, :3])


@pytest.mark.parametrize("shards", [1, 3])
def test_perplexity_by_position(shards: int):
    """Sequences of 150 tokens, the last one shorter: ranges end at 64, at 128 and with the sequence."""
    text = np.random.default_rng(1).integers(0, V, 370)
    losses: list[np.ndarray] = []
    for start in range(0, text.size, 150):
        part = text[None, start : start + 150].astype(np.int32)
        losses.append(by_hand(part[:, :-1], part[:, 1:])[0])
    decoder = make(natural(CONFIG)) if shards == 1 else make(CONFIG, ring_mesh(shards))
    whole, ranges = models.perplexity(decoder, text.tolist(), sequence_length=150)
    assert [(each.start, each.stop) for each in ranges] == [(1, 64), (64, 128), (128, 150)]
    for each in (whole, *ranges):
        cut = np.concatenate([x[each.start - 1 : each.stop - 1] for x in losses])
        assert each.tokens == cut.size
        np.testing.assert_allclose(each.loss, cut.mean(), rtol=2e-5)
        np.testing.assert_allclose(each.perplexity, np.exp(cut.mean()), rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "length", "words"),
    [
        ([1], 8, "ids must hold at least 2 tokens"),
        ([1, 2], 1, "sequence_length be 2 or more. Got 2 and 1"),
        ([1, 2], 0, "sequence_length must be"),
        ([1, V], 8, rf"ids must be in \[0, {V}\). Got 1 to {V}"),
    ],
)
def test_perplexity_refuses(ids: list[int], length: int, words: str):
    with pytest.raises(ValueError, match=words):
        models.perplexity(make(natural(CONFIG)), ids, sequence_length=length)


# --------------------------------------------------------------------------------------------------------- the command


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return smol_that_reads(tmp_path / "m.gguf")


def test_the_command_prints_a_table_and_draws_it(model: Path, tmp_path: Path):
    text, png = tmp_path / "text.txt", tmp_path / "x.png"
    text.write_text("the capital of the north " * 6, encoding="utf-8")
    got = command("--model", model, "--text", text, "--seq-len", 100, "--png", png)
    assert got.exit_code == 0, got.output
    ids = models.tokenizer(model).encode(text.read_text(encoding="utf-8"))
    whole, ranges = models.perplexity(models.load(model, layout="contiguous"), ids, sequence_length=100)
    for each in (whole, *ranges):
        assert f"{each.tokens}" in got.stdout and f"{each.perplexity:.2f}" in got.stdout
    assert "1 to 63" in got.stdout and "64 to 99" in got.stdout and "parameters in float32" in got.stderr
    assert png.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))
    few = command("--model", model, "--text", text, "--max-tokens", 9)
    assert few.exit_code == 0 and "1 to 8" in few.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "absent.txt"), "absent.txt: must be a text in UTF-8. Got [Errno 2]"),
        (("--text", "latin.txt"), "latin.txt: must be a text in UTF-8. Got 'utf-8' codec"),
        (("--text", "empty.txt"), "empty.txt: must hold at least 2 tokens. Got 0"),
        (("--text", "empty.txt", "--png", "absent/x.png"), "absent/x.png: must be a file in a directory that exists"),
        (("--text", "empty.txt", "--seq-len", "1"), "--seq-len must be at least 2. Got 1"),
        (("--text", "empty.txt", "--max-tokens", "0"), "--max-tokens must be at least 2. Got 0"),
        (("--text", "empty.txt", "--devices", "0"), "--devices must be at least 1. Got 0"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").touch()
    got = command("--model", model, *arguments)
    assert got.exit_code == 2 and got.stdout == ""
    (line,) = got.stderr.splitlines()
    assert line.startswith("error: ") and words in line
