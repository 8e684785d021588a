"""`ringjax bench gpu` without a GPU: the same measurements on the XLA kernel, small."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ringjax.bench import gpu, ring_peers, timing
from ringjax.cli import app
from ringjax.kernels import tiles as tile_table
from ringjax.kernels.tiles import Key

SMALL = ["--shape", "1,256,4,2,16", "--dtype", "float32", "--implementation", "xla", "--reference", "xla"]
SMALL += ["--cached", "2,64,4,2,16", "--rounds", "2", "--ceiling", "64", "--num-shards", "4"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, arguments)])


def test_command_measures_everything_and_writes_it(tmp_path):
    docs, figures = tmp_path / "docs.md", tmp_path / "figures.json"
    (begin, end), (other, other_end) = map(gpu.markers, ("xla", "cudnn"))
    after = f"{other}\nbeside cuDNN\n{other_end}"
    docs.write_text(f"before\n{begin}\nold\n{end}\n{after}\n", encoding="utf-8")
    result = invoke(*SMALL, "--write-docs", docs, "--json", figures)
    assert result.exit_code == 0, result.output
    record = json.loads(figures.read_text(encoding="utf-8"))
    kinds = [(row["mask"], row["direction"]) for row in record["rows"]]
    assert kinds[:4] == [(mask, direction) for mask in ("full", "causal") for direction in gpu.PASSES]
    assert kinds[4:] == [("full", "fwd"), ("causal", "fwd"), ("causal", "fwd+bwd")], "the ring's loop, then packed"
    assert all(row["ours_ms"] > 0 and row["reference_ms"] > 0 and row["ratio"] > 0 for row in record["rows"])
    assert len(record["zigzag"]["rank_ms"]) == 4 and record["zigzag"]["slowest_over_mean"] >= 1
    one, two = record["cached"]
    assert (one["num_devices"], two["num_devices"]) == (1, 2) and min(one["ratio"], two["bandwidth_share"]) > 0
    text = docs.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"\n{end}\n{after}\n") and "old" not in text
    assert text.count("| 2 x 64 x 4/2 x 16 |") == 2
    assert text.count("| 1 x 256 x 4/2 x 16") == 7 and "fwd: median" in text and "C = 4" in text
    assert "4 blocks / one call" in result.stdout and "tiles of" not in result.stdout


def test_the_title_names_the_table_of_tiles_that_are_used(table: Path, monkeypatch: pytest.MonkeyPatch):
    zigzag = gpu.Measurement((), lambda times: {"slowest_over_mean": 1.0, "sum_over_one_call": 1.0})
    monkeypatch.setattr(gpu, "_against_caches", lambda *_: [])
    monkeypatch.setattr(gpu, "compile_measurements", lambda measurements: [zigzag])
    monkeypatch.setattr(gpu, "in_turns", lambda programs, rounds: [[1.0] * rounds for _ in programs])
    figures = table.with_name("figures.json")
    here = Key("cpu", "xla", "forward", "float32", 64)
    for key in (here, dataclasses.replace(here, device_kind="another")):
        table.unlink(missing_ok=True)
        tile_table.merge(table, {key: {}})
        title = invoke(*SMALL, "--json", figures).stdout.splitlines()[0]
        assert title.endswith(f"TFLOP/s; tiles of {table}" if key == here else "TFLOP/s")
        assert json.loads(figures.read_text(encoding="utf-8"))["title"] == title


def test_flash_attention_stands_beside_documents_and_not_beside_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """XLA's attention in its place: what it is called with must be the same problem."""
    outputs: dict[str, list[Any]] = {"ours": [], "theirs": []}
    find = ring_peers.find

    def found(name: str, device: Any, library: Path | None) -> ring_peers.Peer:
        assert (name, library) == ("flash_attention_3", tmp_path / "library.so")
        return dataclasses.replace(find("xla", device), name="FlashAttention-3")

    def both(self: gpu.Measurement, rounds: int) -> Any:
        if " / " not in str(self.conclude) and len(self.programs) == 2:
            for key, timed in zip(outputs, self.programs, strict=True):
                outputs[key].append(timed.run(*timed.arguments))
        return result(self, rounds)

    result = gpu.Measurement.result
    monkeypatch.setattr(ring_peers, "find", found)
    monkeypatch.setattr(gpu.Measurement, "result", both)
    monkeypatch.setattr(gpu, "_check_platform", lambda request: None)
    (tmp_path / "library.so").touch()
    figures = tmp_path / "figures.json"
    flags = ["--reference", "flash_attention_3", "--flash-attention", tmp_path / "library.so", "--json", figures]
    outcome = invoke(*(text for text in SMALL if text not in ("--cached", "2,64,4,2,16")), *flags)
    assert outcome.exit_code == 0, outcome.output
    refused = invoke(*SMALL, "--cached", "2,64,4,2,16", *flags)
    assert refused.exit_code == 2 and "--cached needs --reference cudnn or xla. Got flash" in refused.stderr
    record = json.loads(figures.read_text(encoding="utf-8"))
    assert record["cached"] == [] and "beside flash_attention_3" in record["title"]
    rows = [(row["what"], row["mask"], row["direction"]) for row in record["rows"]]
    assert len(rows) == 9 and rows[4:6] == [("1 x 256 x 4/2 x 16, 10 documents", "causal", d) for d in gpu.PASSES]
    assert len(outputs["ours"]) == 6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), outputs["ours"], outputs["theirs"]
    )


def test_calls_on_simulated_devices_are_not_queued():
    """Queued programs with collectives ended up holding all of XLA's threads for CPU devices, and waited for ever."""
    events: list[str] = []

    class Result:
        def block_until_ready(self) -> None:
            events.append("ready")

    def call() -> Result:
        events.append("call")
        return Result()

    assert timing.Timed(call, ()).milliseconds(3) >= 0
    assert events[:6] == ["call", "ready"] * 3


def test_every_round_has_another_order():
    """A GPU at its power limit runs faster after a program that needed less: each has other neighbours every time."""
    orders = list(timing.orders(6, 8))
    assert all(sorted(order) == list(range(6)) for order in orders) and len(set(map(tuple, orders))) == 8
    before = {order[place - 1] for order in orders for place in range(1, 6) if order[place] == 0}
    assert len(before) > 2
    calls: list[int] = []
    programs = [timing.Timed(lambda n=n: calls.append(n) or np.float32(0), ()) for n in range(6)]
    times = timing.in_turns(programs, 8, budget_ms=0.0)
    assert [len(each) for each in times] == [8] * 6
    assert calls[18:] == [n for order in orders for n in order for _ in range(2)]


def test_ratios_are_of_rounds_and_work_is_counted():
    row = gpu._row("x", "full", "fwd", [[1.0, 2.0, 4.0], [2.0, 2.0, 4.0]], work=8e9)
    assert (row.ours_ms, row.reference_ms, row.ratio, row.tflops) == (2.0, 2.0, 1.0, 4.0)
    shape = gpu.Shape(1, 8192, 32, 32, 128)
    assert gpu.flops(shape, "full", "fwd") == 4 * 32 * 8192**2 * 128
    assert gpu.flops(shape, "causal", "fwd+bwd") == 7 * 32 * 8192**2 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs an NVIDIA GPU, or --implementation xla --reference xla. Got platform 'cpu'."),
        (
            [*SMALL, "--shape", "1,100,1,1,8"],
            "--shape: T must be a multiple of 8, and at least 32. Got 1 x 100 x 1 x 8.",
        ),
        (
            [*SMALL, "--flash-attention", "x.so"],
            "--flash-attention needs --reference flash_attention_3. Got xla.",
        ),
        (
            ["--reference", "flash_attention_3", "--flash-attention", "x.so"],
            "--flash-attention must be a file that exists. Got x.so.",
        ),
        (["--cached", "1,2,3"], "--cached must be B,T,N,K,H: five positive integers, N a multiple of K. Got '1,2,3'."),
        (["--shape", "1,2,3"], "--shape must be B,T,N,K,H: five positive integers, N a multiple of K. Got '1,2,3'."),
        (["--shape", "1,256,3,2,16"], "N a multiple of K. Got '1,256,3,2,16'."),
        (["--shape", "1,256,x,2,16"], "N a multiple of K. Got '1,256,x,2,16'."),
        ([*SMALL, "--rounds", "0"], "--rounds must be at least 1. Got 0."),
        ([*SMALL, "--num-shards", "0"], "--num-shards must be at least 1. Got 0."),
        ([*SMALL, "--write-docs", "absent.md"], "--write-docs: path must be a file"),
        ([*SMALL, "--json", "absent/x.json"], "--json must be a file in a directory that exists. Got absent/x.json."),
    ],
)
def test_command_refuses(arguments, message):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
