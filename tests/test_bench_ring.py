"""`ringjax bench ring` on simulated devices, small; and what it makes of times that are given."""

import dataclasses
import json
import math
import statistics
import sys
import types

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import ringjax
from ringjax.bench import ring, ring_documents, ring_measure, ring_peers, ring_table, ring_torch
from ringjax.bench.ring_measure import Measured
from ringjax.bench.ring_peers import Peer
from ringjax.bench.ring_programs import OURS, Left, Problem, Program, factors, programs, strategies_for
from ringjax.bench.timing import Shape, Timed
from ringjax.cli import app

SMALL = ["--shape", "1,64,4,2,16", "--dtype", "float32", "--rounds", "2", "--seconds-per-row", "0.001"]


@pytest.fixture(autouse=True)
def no_tpu_is_looked_for():
    jax.devices("cpu")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "ring", *map(str, arguments)])


def test_command_measures_everything_and_writes_it(tmp_path):
    docs, figures = tmp_path / "docs.md", tmp_path / "figures.json"
    docs.write_text(f"before\n{ring.BEGIN}\nold\n{ring.END}\nafter\n", encoding="utf-8")
    flags = ["--mask", "8", "--devices", "2", "--torch"]
    result = invoke(*SMALL, *flags, "--write-docs", docs, "--json", figures)
    assert result.exit_code == 0, result.output
    record = json.loads(figures.read_text(encoding="utf-8"))
    groups = [(group["mask"], group["direction"]) for group in record["groups"]]
    assert groups == [("causal, window 8", "fwd"), ("causal, window 8", "fwd+bwd")]
    ours = ["ring", "all_gather", "all_to_all", "plain all-gather", "plain Ulysses", "one device"]
    for group in record["groups"]:
        rows = group["rows"]
        assert [row["name"] for row in rows] == ours + ours[3:] and group["left"] == []
        assert [row["kernel"] for row in rows] == [OURS] * 6 + ["XLA"] * 3
        assert all(row["milliseconds"] > 0 and len(row["rounds"]) == 2 and row["efficiency"] > 0 for row in rows)
        assert all(row["difference"] < 1e-5 for row in rows), "all compute the same"
        assert [row["of_plain"] is not None for row in rows] == [False, True, True] + [False] * 6
        assert group["peer"] in ("plain all-gather, XLA", "plain Ulysses, XLA")
        # Under this window both fetch the eight keys before the shard, and nothing is compiled or timed twice.
        assert rows[1]["same_as"] == "ring" and rows[1]["rounds"] == rows[0]["rounds"]
        assert [row["same_as"] for row in rows].count(None) == 8
    left = "\n".join(record["left"])
    assert "FlashAttention-3: needs an NVIDIA Hopper GPU. Got 'cpu'." in left
    assert "cuDNN: needs an NVIDIA GPU. Got platform 'cpu'." in left
    assert "PyTorch: needs NVIDIA GPUs, and --devices simulates CPU devices" in left
    text = docs.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| 1 x 64 x 4/2 x 16 | causal, window 8 |") == 18
    assert "fwd: all_gather takes" in text and "- cuDNN: needs an NVIDIA GPU" in text
    assert all(line in result.stdout for line in record["left"] + record["summary"])


def test_strategies_and_peers_on_four_devices_compute_the_same(tmp_path):
    """More devices than K/V heads, chunks in zigzag order, two axes."""
    figures = tmp_path / "figures.json"
    chosen = [x for word in ("ring", "all_gather", "all_to_all", "ring,all_to_all") for x in ("--strategy", word)]
    flags = ["--devices", "4", "--mask", "causal", "--pass", "forward", "--peer", "xla", "--json", figures]
    result = invoke(*SMALL, *chosen, *flags)
    assert result.exit_code == 0, result.output
    (group,) = json.loads(figures.read_text(encoding="utf-8"))["groups"]
    plain = ["plain all-gather", "plain Ulysses", "one device"]
    ours = ["ring", "ring, both ways", "all_gather", "all_to_all", "ring 2 x all_to_all 2"]
    assert [row["name"] for row in group["rows"]] == ours + plain + plain and group["left"] == []
    assert all(row["difference"] < 1e-5 for row in group["rows"])
    layouts = {row["name"]: row["layout"] for row in group["rows"]}
    assert [name for name, layout in layouts.items() if layout == "contiguous"] == ["all_to_all", *plain[1:]]


@pytest.mark.parametrize(("mask", "direction"), [("causal", "backward"), ("full", "forward"), ("9", "forward")])
def test_packed_documents_compute_the_same_as_they_come_and_dealt(tmp_path, mask, direction):
    figures = tmp_path / "figures.json"
    shape = ["--shape", "1,192,4,2,16", "--dtype", "float32", "--rounds", "1", "--seconds-per-row", "0.001"]
    chosen = [x for word in ("ring", "all_to_all", "ring,all_gather") for x in ("--strategy", word)]
    flags = ["--devices", "4", "--mask", mask, "--pass", direction, "--documents", "lognormal:20:1.2:90", "--plan"]
    result = invoke(*shape, *chosen, *flags, "--json", figures)
    assert result.exit_code == 0, result.output
    (group,) = json.loads(figures.read_text(encoding="utf-8"))["groups"]
    assert group["mask"].endswith(", 6 documents of up to 90")
    names = {(row["name"], row["kernel"]) for row in group["rows"]}
    dealt = {("ring, dealt", OURS), ("ring 2 x all_gather 2, dealt", OURS)}
    by_hand = {("plain all-gather", "XLA"), ("plain Ulysses", "XLA"), ("one device", "XLA")}
    assert dealt | by_hand | {("all_to_all", OURS), ("one device", OURS), ("plain Ulysses", OURS)} <= names
    assert ("all_to_all, dealt", OURS) not in names and ("plain all-gather", OURS) not in names
    assert all(row["difference"] < 1e-5 for row in group["rows"]), "all attend to the same documents"
    (plan,) = group["left"]
    assert plan["name"] == "the plan" and "not told of documents" in plan["reason"]


def test_documents_of_a_rank():
    """Two documents of 5 and 6 tokens, one place of padding, three ranks: each has its parts, and their keys."""
    documents = ring_documents.Documents(lengths=np.array([5, 6]), dealt=None, order=np.arange(12), shared_length=0)
    assert documents.starts.tolist() == [0, 5, 11, 12]
    assert documents.segment_ids.tolist() == [0] * 5 + [1] * 6 + [2]
    causal, full = (
        [[x.tolist() for x in documents.of_rank(rank, 3, is_causal=each)] for rank in range(3)]
        for each in (True, False)
    )
    # Queries of nobody before and behind; then the documents that the rank has a part of.
    assert causal[0] == [[0, 0, 4, 4], [0, 0, 4, 12]] and full[0] == [[0, 0, 4, 4], [0, 0, 5, 12]]
    assert causal[1] == [[0, 0, 1, 4, 4], [0, 0, 5, 8, 12]] and full[1] == [[0, 0, 1, 4, 4], [0, 0, 5, 11, 12]]
    assert causal[2] == [[0, 0, 3, 4, 4], [0, 5, 11, 12, 12]] == full[2]


def test_documents_count_their_own_pairs_and_lie_as_they_are_dealt():
    shape = Shape(1, 240, 4, 2, 16)
    documents = ring_documents.deal([100] * 2 + [37] * 10, shape, 4, is_causal=True, window=None)
    lengths, dealt = documents.lengths, documents.dealt
    assert documents.tokens == lengths.sum() == (dealt.document >= 0).sum() and documents.longest == 100
    natural = documents.segment_ids[documents.order]
    same = natural[:, None] == natural
    assert (same == (dealt.segment_ids[:, None] == dealt.segment_ids)).all(), "the same tokens share a document"
    assert sorted(documents.order) == list(range(240))
    problem = Problem(shape, is_causal=False, documents=documents)
    assert problem.flops("fwd") == 4 * 4 * 16 * (lengths**2).sum()
    window = dataclasses.replace(problem, is_causal=True, window=36)  # within every document
    (i, j), ids = np.indices((240, 240)), documents.segment_ids
    seen = (ids[i] == ids[j]) & (j <= i) & (i - j <= 36) & (i < documents.tokens)
    assert window.flops("fwd") == 4 * 4 * 16 * seen.sum()


def test_heads_that_do_not_divide_are_named():
    problem = Problem(Shape(1, 48, 3, 3, 8), is_causal=True)
    peers = [Peer("P", lambda *_, **__: None), Peer("absent", None, "why")]
    config = ringjax.RingConfig(implementation="xla")
    found, left = programs(problem, jax.devices()[:2], strategies_for(2), peers, config)
    named = [(one.name, one.kernel) for one in left]
    assert named == [("all_to_all", OURS), ("plain Ulysses", OURS), ("plain Ulysses", "P")]
    assert {one.reason for one in left} == {"needs a number of query heads that is a multiple of 2. Got 3"}
    assert [one.label for one in found if one.kernel == "P"] == ["plain all-gather, P", "one device, P"]


def program(name: str, kernel: str, *, strategy: tuple[str, ...] = (), count: int = 2) -> Program:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sizes = (count,) if count > 1 else ()
    return Program(
        name=name,
        kernel=kernel,
        layout="contiguous",
        sharding=sharding,
        attend=lambda q, k, v: q,
        strategy=strategy,
        sizes=sizes,
    )


def test_ratios_are_of_rounds():
    problem = Problem(Shape(1, 1000, 2, 2, 8), is_causal=False)
    given = [
        (program("ring", OURS, strategy=("ring",)), [2.0, 4.0, 6.0]),
        (program("all_gather", OURS, strategy=("all_gather",)), [2.0, 2.2, 2.1]),
        (program("plain all-gather", OURS), [2.0, 2.0, 2.0]),
        (program("one device", OURS, count=1), [4.0, 4.0, 12.0]),
        (program("plain all-gather", "P"), [1.0, 8.0, 3.0]),
        (program("plain Ulysses", "P"), [9.0, 9.0, 9.0]),
        (program("one device", "Q", count=1), [0.1, 0.1, 0.1]),
    ]
    measured = Measured([p for p, _ in given], [t for _, t in given], [(0.0, 0.0)] * 7, [None] * 7)
    left = [Left("plain Ulysses", "Q", "why")]
    chosen = [((2,), ("all_gather",)), ((2, 2), ("ring", "ring"))]
    group = ring_table.conclude(problem, "fwd", measured, left, chosen)
    assert group.peer == "plain all-gather, P", "the fastest in the median, and no single device"
    rows = group.rows
    assert [row.milliseconds for row in rows] == [4.0, 2.1, 2.0, 4.0, 3.0, 9.0, 0.1]
    assert rows[0].times_as_fast == statistics.median([1 / 2, 8 / 4, 3 / 6]) == 0.5
    assert rows[0].efficiency == statistics.median([4 / 4, 4 / 8, 12 / 12]) == 1.0
    assert rows[1].of_plain == statistics.median([1.0, 1.1, 1.05]) and rows[0].of_plain is None
    assert rows[3].efficiency == 1.0 and rows[6].efficiency == 1.0 and rows[4].efficiency is None
    assert rows[1].plan == 1.0 and [row.plan for row in rows].count(None) == 6
    assert math.isclose(rows[1].tflops, 4 * 2 * 1000**2 * 8 / 2 / 2.1e-3 / 1e12)
    assert math.isclose(rows[3].tflops, 4 * 2 * 1000**2 * 8 / 4e-3 / 1e12), "on one device"
    assert [one.name for one in group.left] == ["plain Ulysses", "the plan's ring x ring on 2 x 2"]
    slow = ring_table.conclude(problem, "fwd", measured, [], [((2,), ("ring",))])
    # What is not the planner's to choose, directions and meshes, is nothing to compare it with.
    faster = [
        dataclasses.replace(given[1][0], **{"name": "x", **change}) for change in ({"variant": "x"}, {"sizes": (1, 2)})
    ]
    others = Measured(
        [*measured.programs, *faster], [*measured.times, [1.0] * 3, [1.0] * 3], [(0.0, 0.0)] * 9, [None] * 9
    )
    assert ring_table.conclude(problem, "fwd", others, [], [((2,), ("ring",))]).rows[0].plan == slow.rows[0].plan
    assert slow.rows[0].plan == statistics.median([2 / 2, 4 / 2.2, 6 / 2.1])
    assert ring_table.cells(slow.rows[0], with_plan=True)[-1] == "1.818, not within 5%"
    assert ring_table.cells(rows[1], with_plan=True)[-1] == "1.000, within 5%"
    lines = ring_table.summary([group, slow])
    assert (
        "fwd: all_gather takes 1.050 of the plain all-gather around our kernel in the median, 1.050 at most." in lines
    )
    assert "fwd: the planner's choice is within 5% of our fastest in 1 of 2." in lines
    results = [
        ring_torch.Result(0, "fwd", "context_parallel", "PyTorch", 6.0, None),
        ring_torch.Result(0, "fwd", "other", "PyTorch", None, "why"),
    ]
    more = ring_table.with_others(group, problem, 2, results)
    assert more.rows[-1].times_as_fast == 0.5 and more.left[-1].reason == "why"
    text = "\n".join(ring_table.document_lines("title", [more, slow], ["a peer: absent"], with_plan=True))
    assert "- a peer: absent\n" in text and "- other, PyTorch: why; 1 x 1000 x 2 x 8, full, fwd" in text


def test_work_is_counted():
    shape = Shape(2, 50, 6, 3, 8)
    i, j = np.indices((50, 50))
    window = Problem(shape, is_causal=True, window=7)
    assert window.flops("fwd") == 4 * 2 * 6 * 8 * int(((j <= i) & (i - j <= 7)).sum())
    assert Problem(shape, is_causal=False).flops("fwd+bwd") == 14 * 2 * 6 * 8 * 50**2
    assert Problem(shape, is_causal=True).flops("fwd") == 2 * 2 * 6 * 8 * 50**2
    assert factors(8) == [(2, 4), (4, 2)] and factors(7) == []
    assert len(strategies_for(4)) > len(strategies_for(2)) == len(strategies_for(3)) == 3


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    """One peer is wrong, one refuses, one fails while it is timed; time stands still but for them."""

    def ours_but(scale: float):
        return lambda q, k, v, *, offset, window: scale * ring_peers._xla(q, k, v, offset=offset, window=window)

    def refuses(q, k, v, *, offset, window):
        raise ring_peers.Refused("no\n such mask")

    kinds = {"flash_attention_3": ours_but(1.01), "cudnn": refuses, "xla": ours_but(1.0)}
    monkeypatch.setattr(ring_peers, "find", lambda name, *_: Peer(name, kinds[name]))
    calls: list[tuple[Timed, int]] = []

    def milliseconds(timed: Timed, count: int) -> float:
        calls.append((timed, count))
        if len({id(one) for one, _ in calls}) == 3:  # the third program that is timed
            raise RuntimeError("out of memory")
        return 0.25

    monkeypatch.setattr(Timed, "milliseconds", milliseconds)
    request = ring.Request(
        problems=ring.parse_problems(["1,16,2,2,8"], ["full"]),
        passes=("forward",),
        strategies=(("ring",),),
        peers=tuple(kinds),
        dtype="float32",
        devices=2,
        rounds=2,
        seconds=0.002,
    )
    said: list[str] = []
    kept: list[dict] = []
    record = ring.run(request, said.append, lambda record: kept.append(json.loads(json.dumps(record))))
    (group,) = record["groups"]
    assert [(row["name"], row["kernel"]) for row in group["rows"]] == [
        ("ring", OURS),
        ("one device", OURS),
        ("plain Ulysses", "xla"),
        ("one device", "xla"),
    ]
    reasons = {(one["name"], one["kernel"]): one["reason"] for one in group["left"]}
    assert reasons[("plain all-gather", "xla")] == "out of memory"
    for name in ("plain all-gather", "plain Ulysses", "one device"):
        assert reasons[(name, "cudnn")] == "no such mask"
        assert "differs from ring, ringjax: by 1.0e-02 in norm" in reasons[(name, "flash_attention_3")]
    assert kept == [json.loads(json.dumps({key: record[key] for key in ("title", "left", "groups")}))], "after each"
    assert f"not timed: plain Ulysses, cudnn: {reasons[('plain Ulysses', 'cudnn')]}" in said
    # 2 ms over 2 rounds, 0.25 ms a call: four calls a round.
    assert [count for timed, count in calls if timed is calls[0][0]] == [1, 2, 4, 4]
    late = ring.run(
        ring.Request(problems=request.problems, devices=2, time_limit=1e-9), said.append, lambda record: None
    )
    assert late["groups"] == [] and late["left"][-1] == "1 x 16 x 2 x 8, full: --time-limit 1e-09 was over"


def test_one_program_under_two_names_stands_or_falls_together(monkeypatch: pytest.MonkeyPatch):
    problem = Problem(Shape(1, 16, 2, 2, 8), is_causal=False)
    twins = [program("one", OURS, count=1), program("two", OURS, count=1)]
    data = ring_measure.Data(problem, jax.devices()[:2], "float32")
    options = {"dtype": "float32", "rounds": 1, "seconds": 1e-6}
    measured, left = ring_measure.measure(twins, data, "fwd", **options)
    assert measured.same == [None, twins[0]] and measured.times[0] is measured.times[1] and left == []

    def fails(timed: Timed, count: int) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Timed, "milliseconds", fails)
    measured, left = ring_measure.measure(twins, data, "fwd", **options)
    assert measured.programs == []
    assert left == [Left("one", OURS, "out of memory"), Left("two", OURS, "is the program of one, ringjax")]


def test_nan_is_no_match():
    problem = Problem(Shape(1, 16, 2, 2, 8), is_causal=False)
    data = ring_measure.Data(problem, jax.devices()[:2], "float32")
    broken = program("broken", "P", count=1)
    results = [Timed(lambda *_, x=x: data.of(broken)[0] * x, ()) for x in (1.0, np.nan)]
    found, left = ring_measure.check_group([broken] * 2, dict(enumerate(results)), data, "float32")
    assert list(found) == [0] and "by nan in norm" in left[0].reason


def test_the_planner_is_asked_for_every_mesh(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def choose(**given):
        asked.append(given)
        return ("ring",) * len(given["axis_sizes"])

    problem = Problem(Shape(2, 64, 4, 2, 16), is_causal=True, window=5)
    found = ring_table.plan_of(choose, problem, "fwd", [(4,), (2, 2)], jax.devices()[0], 2)
    assert found == [((4,), ("ring",)), ((2, 2), ("ring", "ring"))]
    assert asked[0] == dict(
        axis_sizes=(4,), device_kind="cpu", platform="cpu", query_length=16, key_length=16, num_heads=4,
        num_kv_heads=2, head_size=16, value_size=16, itemsize=2, batch=2, is_causal=True, window=(5, 0),
        layout="contiguous", backward=False,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ringjax.planner", types.ModuleType("ringjax.planner"))
    absent, reason = ring_table.find_planner()
    assert absent is None and "choose_strategy" in reason
    choose_strategy = lambda **_: ("ring",)  # noqa: E731
    monkeypatch.setattr(sys.modules["ringjax.planner"], "choose_strategy", choose_strategy, raising=False)
    assert ring_table.find_planner() == (choose_strategy, "")


def test_processes_of_pytorch(monkeypatch: pytest.MonkeyPatch):
    work = [ring_torch.Work(1, 64, 4, 2, 16, True, ("fwd",))]
    monkeypatch.setattr(ring_torch.importlib.util, "find_spec", lambda name: None)
    assert ring_torch.measure(work, "float32", 1, 0.1) == ([], "PyTorch is not installed")
    monkeypatch.setattr(ring_torch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ring_torch, "LAUNCH", ("-c", _PROCESS))
    results, reason = ring_torch.measure(work, "float32", 1, 0.1)
    assert reason == "ValueError: after one result"
    assert results == [ring_torch.Result(0, "fwd", "context_parallel", "PyTorch", 64.0, None)]


_PROCESS = """
import json, sys
task = json.load(open(sys.argv[1]))
found = dict(index=0, direction="fwd", name="context_parallel", kernel="PyTorch", reason=None)
open(sys.argv[2], "w").write(json.dumps(found | dict(milliseconds=float(task["work"][0]["length"]))) + "\\n")
raise ValueError("after one result")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "--shape must be B,T,N,K,H: five positive integers, N a multiple of K. Got '1,2,3'."),
        (["--shape", "1,66,4,2,16"], "--shape: T must be a multiple of 16 on 8 devices. Got 1 x 66 x 4/2 x 16."),
        (["--mask", "0"], "--mask must be full, causal or W, a number of keys above 0: causal with that window."),
        (["--mask", "square"], "causal with that window. Got 'square'."),
        (["--documents", "equal:0"], "--documents must be equal:LENGTH, positive integers. Got 'equal:0'."),
        (["--documents", "equal:9", "--shape", "2,64,4,2,16"], "B must be 1 with --documents, which are those of one"),
        (["--documents", "equal:99", "--shape", "1,64,4,2,16"], "--documents: lengths"),
        (["--documents", "absent.txt"], "and the file one that can be read. Got 'absent.txt'."),
        (["--strategy", "halo"], "--strategy must be WORD or WORD,WORD, outermost first, of ring, all_to_all,"),
        (["--strategy", "ring,ring,ring"], "of ring, all_to_all, all_gather. Got 'ring,ring,ring'."),
        (["--strategy", "ring,ring", "--devices", "3", "--shape", "1,36,4,2,16"], "each above 1. Got 3 devices."),
        (["--devices", "1"], "needs at least 2 devices, or --devices C to simulate them on the CPU. Got 1."),
        (["--devices", "0"], "--devices must be at least 1. Got 0."),
        (["--rounds", "0"], "--rounds must be at least 1. Got 0."),
        (["--seconds-per-row", "0"], "--seconds-per-row must be above 0. Got 0.0."),
        (["--time-limit", "-1"], "--time-limit must be above 0. Got -1.0."),
        (["--flash-attention", "absent.so"], "--flash-attention must be a file that exists. Got absent.so."),
        (["--write-docs", "absent.md"], "--write-docs: path must be a file"),
        (["--json", "absent/x.json"], "--json must be a file in a directory that exists. Got absent/x.json."),
    ],
)
def test_command_refuses(arguments, message):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
