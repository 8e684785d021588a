"""The demo's figures, checked against counts made by hand; and the commands themselves, small."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from typer.testing import CliRunner, Result

from ringjax import demo, units
from ringjax.bench import cpu
from ringjax.cli import app
from ringjax.simulate import set_cpu_devices, simulate_cpu_devices


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:4]), ("sp",))


def test_hop_table_causal_contiguous():
    rows = demo.hop_table(3, 4, layout="contiguous", left=None, right=0)
    assert [[hop.block for hop in row] for row in rows] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    own = 10 / 16  # a triangle of 4 with its diagonal
    assert [[hop.share for hop in row] for row in rows] == [[own, 0, 0], [own, 0, 1], [own, 1, 1]]


def test_hop_table_zigzag_is_balanced():
    rows = demo.hop_table(4, 8, layout="zigzag", left=None, right=0)
    work = [sum(hop.share for hop in row) for row in rows]
    assert work == pytest.approx([work[0]] * 4)
    assert [hop.share for row in rows for hop in row[1:]] == [0.5] * 12


def test_hop_table_window_covers_all_pairs():
    rows = demo.hop_table(8, 4, layout="contiguous", left=4, right=0)
    assert [len(row) for row in rows] == [2] * 8
    pairs = sum(min(position, 4) + 1 for position in range(32))
    assert sum(hop.share for row in rows for hop in row) * 16 == pytest.approx(pairs)


@pytest.mark.parametrize("layout", demo.LAYOUTS)
def test_agreement(mesh: Mesh, layout: str):
    row = demo.agreement(mesh, 64, "causal", layout, is_causal=True)
    assert 0 < max(row.output, *row.gradients) < 1e-5


def test_agreement_sees_a_difference(mesh: Mesh, monkeypatch):
    monkeypatch.setattr(demo, "_ring", lambda mesh, layout, options: lambda q, k, v: q)
    assert demo.agreement(mesh, 64, "causal", "contiguous", is_causal=True).output > 0.1


def test_traffic_counts_blocks(mesh: Mesh):
    block = 2 * 16 * demo.KV_HEADS * demo.HEAD_SIZE * 4  # K and V of 16 tokens
    sent = demo.traffic(mesh, 64, "contiguous", gradients=False)
    assert (sent.permutes, sent.bytes) == (2 * 3, 3 * block)  # C - 1 rotations of two arrays
    both = demo.traffic(mesh, 64, "contiguous", gradients=True)
    assert both.bytes == 3 * block + 3 * block + 4 * block  # K and V again; dK and dV visit every rank and go home
    window = demo.traffic(mesh, 64, "contiguous", gradients=False, is_causal=True, local_window_size=(16, 0))
    assert block <= window.bytes < 1.1 * block  # one rotation, and the positions


def test_memory_is_of_one_device():
    devices = jax.devices()
    few, many = (demo.ring_memory(devices[:count], 16384) for count in (2, 8))
    assert 3 < few / many < 5
    assert demo.dense_memory(devices[0], 1024) > 4 * 1024 * 1024 * demo.HEADS  # it does hold the T x S array


@pytest.mark.slow
def test_demo_prints_every_part():
    result = invoke("demo", "--devices", 2, "--seq-len", 64)
    assert result.exit_code == 0, result.output
    for part in ("Who holds which block", "dense attention", "Memory per device", "What one device sends"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices must be at least 1. Got 0."),
        (["--seq-len", "100"], "--seq-len must be a multiple of 16 (2 x devices, the zigzag layout's unit). Got 100."),
    ],
)
def test_demo_refuses(arguments: list[str], message: str):
    result = invoke("demo", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.slow
def test_bench_measures_and_writes(tmp_path):
    docs, figures = tmp_path / "docs.md", tmp_path / "figures.json"
    docs.write_text(f"before\n{cpu.BEGIN}\nold\n{cpu.END}\nafter\n", encoding="utf-8")
    small = "bench cpu --seq-len 64 --heads 2 --head-dim 8 --devices 4 --rounds 2".split()
    result = invoke(*small, "--json", figures, "--write-docs", docs)
    assert result.exit_code == 0, result.output
    rows = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    expected = {("full", "contiguous")} | {("causal", layout) for layout in cpu.LAYOUTS}
    assert {(row["mask"], row["layout"]) for row in rows} == expected
    assert len(rows) == 2 * len(expected)
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and 0 < row["difference"] < 1e-5 for row in rows)
    text = docs.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert sum(line.startswith("| fwd") for line in text.splitlines()) == len(rows)
    assert "ring/dense" in result.stdout


def test_bench_refuses_a_document_without_markers(tmp_path):
    path = tmp_path / "docs.md"
    path.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        cpu.write_docs([], "title", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1. Got 0."),
        (["--devices", "0"], "--devices must be at least 1. Got 0."),
        (["--head-dim", "-1"], "--head-dim must be at least 1. Got -1."),
        (["--block-kv", "0"], "--block-kv must be at least 1. Got 0."),
        (["--seq-len", "100"], "--seq-len must be a multiple of 8 for --layout contiguous on 8 devices. Got 100."),
        (["--write-docs", "absent.md"], "--write-docs: path must be a file"),
        (["--json", "absent/x.json"], "--json must be a file in a directory that exists. Got absent/x.json."),
    ],
)
def test_bench_refuses(arguments: list[str], message: str):
    result = invoke("bench", "cpu", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.slow
def test_the_passes_of_a_bench_are_named_as_everywhere(tmp_path):
    figures = tmp_path / "figures.json"
    small = "bench cpu --seq-len 16 --heads 1 --head-dim 8 --devices 2 --rounds 1 --mask full --layout zigzag".split()
    found = []
    for given in (["forward"], ["backward"], ["backward", "forward"]):
        result = invoke(*small, "--json", figures, *(part for name in given for part in ("--pass", name)))
        assert result.exit_code == 0, result.output
        found.append([row["direction"] for row in json.loads(figures.read_text(encoding="utf-8"))["rows"]])
    assert found == [["fwd"], ["fwd+bwd"], ["fwd+bwd", "fwd"]]


def test_ratio_is_the_median_within_rounds():
    case = cpu.Case("ring", "full", "contiguous", "fwd", run=lambda: None, arguments=())
    rounds = [[(1.0, [0.5])], [(10.0, [2.0])], [(1.0, [0.3])]]
    (row,) = cpu._rows([(case, [case])], rounds, [1e-7])
    assert (row.seconds, row.dense_seconds, row.ratio) == (0.5, 1.0, 0.3)


def test_simulated_devices():
    count = len(jax.devices())  # JAX has started: what is there can be had, more cannot
    assert simulate_cpu_devices(count) == jax.devices()
    assert len(simulate_cpu_devices(2)) == 2
    with pytest.raises(RuntimeError, match=f"already started with {count}"):
        simulate_cpu_devices(count + 1)
    with pytest.raises(ValueError, match="at least 1. Got 0"):
        set_cpu_devices(0)


def test_sizes():
    assert [units.size(n) for n in (512, 2048, 3 * 2**20, 5 * 2**30)] == ["512 B", "2 KiB", "3 MiB", "5 GiB"]
    assert [units.size(n) for n in (1023.96, 2**20 - 1)] == ["1 KiB", "1 MiB"], "as rounded"
    times = [1.5, 0.9997, 0.99949, 0.0009997, 2e-7, 0.0]
    assert [units.duration(t) for t in times] == ["1.5 s", "1 s", "999 ms", "1 ms", "0.2 us", "0 us"]
