"""`ringjax bench hops` on the CPU, small: whose pairs a hop has, what is made of times, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ringjax.bench import hops
from ringjax.bench.ring_documents import deal
from ringjax.bench.ring_programs import Problem
from ringjax.bench.timing import Shape
from ringjax.cli import app

SHAPE = Shape(1, 96, 4, 2, 16)
SMALL = ["--shape", "1,96,4,2,16", "--dtype", "float32", "--rounds", "2"]
LENGTHS = [40, 7, 1, 20, 28]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "hops", *map(str, arguments)], env={"COLUMNS": "120"})


def problem(mask: dict[str, Any], lengths: list[int] | None, num_ranks: int) -> Problem:
    found = Problem(SHAPE, **mask)
    if lengths is None:
        return found
    options: dict[str, Any] = {"window": None, **mask}
    return dataclasses.replace(found, documents=deal(np.array(lengths), SHAPE, num_ranks, **options))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["one", "documents"])
@pytest.mark.parametrize(
    "mask",
    [{"is_causal": False}, {"is_causal": True}, {"is_causal": True, "window": 9}],
    ids=["full", "causal", "window"],
)
def test_hops_have_the_pairs_of_the_mask(mask: dict[str, Any], lengths: list[int] | None, num_ranks: int) -> None:
    """Counted in the predicate itself; together they are those of the whole sequence, which the problem counts."""
    given = problem(mask, lengths, num_ranks)
    tokens = hops._Tokens(given, num_ranks)
    found = 0
    for queries_of, keys_of in np.ndindex(num_ranks, num_ranks):
        keys = tokens.keys_length(queries_of, keys_of)
        sides = tokens.of(queries_of, tokens.shard), tokens.of(keys_of, keys)
        want = int(np.broadcast_to(tokens.mask(*sides).predicate(tokens.shard, keys), (1, tokens.shard, keys)).sum())
        assert tokens.pairs(queries_of, keys_of) == want
        found += want
    whole = tokens.whole()
    assert found == np.broadcast_to(tokens.mask(whole, whole).predicate(96, 96), (1, 96, 96)).sum()


def test_times_to_figures() -> None:
    """Two ranks, two hops each: 1 + 3 and 2 + 2 ms, one call 4 ms."""
    times = [[4.0, 4.0], [1.0, 1.0], [3.0, 3.0], [2.0, 2.0], [2.0, 2.0]]
    places = [(None, None), (0, 0), (0, 1), (1, 1), (1, 0)]
    made = hops._conclude(Problem(SHAPE, is_causal=False), "contiguous", "bwd", places, [96 * 96, 1, 2, 3, 4], times)
    assert made.sum_over_one_call == 2.0 and made.slowest_over_mean == 1.0 and made.lockstep_over_mean == 1.25
    assert made.rows[0].tflops == pytest.approx(10 * 4 * 16 * 96 * 96 / 4e-3 / 1e12)
    assert [(row.queries_of, row.keys_of, row.milliseconds) for row in made.rows[1:3]] == [(0, 0, 1.0), (0, 1, 3.0)]
    assert "all hops take 2.000 x one call, the slowest rank 1.000 x the mean, hop by hop 1.250 x." in made.line()


def test_command_times_every_hop(tmp_path: Path) -> None:
    figures, lengths = tmp_path / "hops.json", tmp_path / "lengths.json"
    lengths.write_text(json.dumps(LENGTHS), encoding="utf-8")
    result = invoke(
        *SMALL, "--mask", "causal", "--ranks", 2, "--documents", lengths, "--deterministic", "--json", figures
    )
    assert result.exit_code == 0, result.output
    record = json.loads(figures.read_text(encoding="utf-8"))
    assert result.stdout.startswith(record["title"])
    assert record["title"].endswith("implementation xla, deterministic; medians of 2 rounds")
    assert [one["direction"] for one in record["hops"]] == ["fwd", "bwd"]
    for one in record["hops"]:
        assert one["order"] == "dealt" and "5 documents of up to 40" in one["mask"]
        places = [(row["queries_of"], row["keys_of"]) for row in one["rows"]]
        assert places == [(None, None), (0, 0), (0, 1), (1, 1), (1, 0)]
        assert all(row["milliseconds"] > 0 for row in one["rows"])
    assert result.stdout.count(" dealt ") == 10 and result.stdout.count("x one call") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--ranks", "5"], "--shape: T must be a multiple of 10 for 5 ranks. Got 1 x 96 x 4/2 x 16."),
        ([*SMALL, "--ranks", "0"], "--ranks must be at least 1. Got 0."),
        ([*SMALL, "--rounds", "0"], "--rounds must be at least 1. Got 0."),
        ([*SMALL, "--mask", "0"], "--mask must be full, causal or W"),
        ([*SMALL, "--documents", "equal:8:none"], "--documents"),
        ([*SMALL, "--documents", "absent.json"], "--documents"),
        ([*SMALL, "--implementation", "pallas_gpu"], "--implementation must be one that platform 'cpu' has."),
        ([*SMALL, "--json", "absent/hops.json"], "--json must be a file in a directory that exists."),
    ],
)
def test_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert message in text, text
