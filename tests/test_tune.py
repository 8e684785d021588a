"""`ringjax tune` without a GPU: toy problems, and a timer that knows what it will say."""

import dataclasses
import functools
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_mosaic_forward as mosaic_cases
import test_triton as triton_cases
from tables import CAUSAL, FULL, KIND, entry, operand, triton_tiles
from typer.testing import CliRunner

from ringjax.cli import app
from ringjax.kernels import tiles as tile_table
from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.mosaic import tiles as mosaic_sizes
from ringjax.kernels.triton import tiles as triton_sizes
from ringjax.tune import command, space
from ringjax.tune.space import Problem

# ----------------------------------------------------------------------------------------------------- searching


def tiles(block: int) -> triton_sizes.TileSizes:
    return triton_sizes.TileSizes(block, 16, 4, 1)


@dataclasses.dataclass(frozen=True)
class Toy(Problem):
    """A problem whose tiles of 64 do not compile and whose tiles of 128 are wrong."""

    tried: tuple[int, ...] = (16, 32, 64, 128)
    finer: tuple[int, ...] = ()

    def built_in(self) -> Any:
        return tiles(16)

    def candidates(self) -> list[Any]:
        return [tiles(block) for block in self.tried]

    def refinements(self, best: Any) -> list[Any]:
        return [tiles(block) for block in self.finer]

    def accepts(self, tiles: Any) -> bool:
        return True

    def arrays(self) -> tuple[Any, ...]:
        return (jnp.arange(8.0),)

    def calls(self, tiles: Any, arrays: Any) -> list[Any]:
        if tiles.block_q == 64:
            raise NotImplementedError("no registers left\nand a long explanation")
        wrong = 1.0 if tiles.block_q == 128 else 0.0
        return [(lambda x: (x + wrong, x * 2.0), arrays), (lambda x: -x, arrays)]


def toy(kernel: str = "dq", size: int = 128, **options: Any) -> Toy:
    return Toy("pallas_triton", kernel, "bfloat16", size, 256, 2, KIND, **options)


def timer(*, asked: list[list[int]] | None = None, **milliseconds: Any) -> command.Timer:
    """Times by block_q, one for each round of a list."""

    def time(programs: Any, rounds: int) -> dict[Any, list[float]]:
        if asked is not None:
            asked.append([tiles.block_q for tiles in programs])
        times = {tiles: milliseconds[f"ms{tiles.block_q}"] for tiles in programs}
        return {tiles: list(ms) if isinstance(ms, list) else [ms] * rounds for tiles, ms in times.items()}

    return time


def search(problem: Problem, said: list[str] | None = None, known: Any = None, **milliseconds: Any) -> command.Outcome:
    say = [] if said is None else said
    return command.search(problem, rounds=3, say=say.append, known=known, timer=timer(**milliseconds))


def test_the_fastest_wins_and_failures_are_dropped():
    said: list[str] = []
    outcome = search(toy(), said, ms16=4.0, ms32=2.0)
    assert (outcome.best, outcome.ratio, outcome.built_in_ms, outcome.best_ms) == (tiles(32), 2.0, 4.0, 2.0)
    assert outcome.dropped == 2
    assert [line.split(": ", 1) for line in said] == [
        ["  dropped block_q=64 block_kv=16 num_warps=4 num_stages=1", "no registers left"],
        [
            "  dropped block_q=128 block_kv=16 num_warps=4 num_stages=1",
            "the result differs from that of the built-in tiles by 1.0e+00 times its size",
        ],
    ]
    assert outcome.entry is not None and outcome.entry["tiles"] == dataclasses.asdict(tiles(32))
    assert outcome.entry["found"]["ms"] == 2.0


def test_differences_are_those_of_rows():
    large = jnp.concatenate([jnp.full((1, 1, 1, 8), 100.0), jnp.full((1, 1, 1, 8), 0.1)], axis=1)
    assert command._difference(large, large) == 0.0
    assert command._difference(large.at[0, 1, 0, 3].set(0.2), large) == pytest.approx(1.0)
    lse = jnp.array([[[-jnp.inf, 5.0, 0.0]]])
    assert command._difference(lse, lse) == 0.0
    assert command._difference(lse.at[0, 0, 2].set(0.5), lse) == 0.5
    assert not command._difference(jnp.zeros_like(lse), lse) <= 1.0
    assert not command._difference(lse.at[0, 0, 1].set(jnp.nan), lse) <= 1.0


def test_two_percent_are_noise():
    outcome = search(toy(), ms16=1.0, ms32=1.0 / 1.019)
    assert (outcome.best, outcome.ratio, outcome.entry) == (tiles(16), 1.0, None)
    assert search(toy(), ms16=1.0, ms32=1.0 / 1.021).best == tiles(32)
    # The median of the rounds' ratios counts, not one lucky round.
    assert search(toy(), ms16=[1.0, 1.0, 1.0], ms32=[0.1, 1.0, 1.0]).entry is None


def test_the_winner_must_win_alone_too():
    calls = []

    def lucky(programs: Any, rounds: int) -> dict[Any, list[float]]:
        calls.append(len(programs))
        return {x: [0.5 if x == tiles(32) and len(calls) == 1 else 1.0] * rounds for x in programs}

    outcome = command.search(toy(tried=(16, 32, 48)), rounds=3, say=[].append, timer=lucky)
    assert calls == [3, 1, 2] and outcome.entry is None


def test_refinements_and_what_the_table_has_are_tried_too():
    asked: list[list[int]] = []
    times = {"ms16": 4.0, "ms32": 2.0, "ms48": 1.99, "ms80": 1.0}
    assert search(toy(tried=(16, 32), finer=(48,)), asked=asked, **times).best == tiles(32), "by noise only"
    assert search(toy(tried=(16, 32), finer=(80,)), **times).best == tiles(80)
    assert search(toy(tried=(16, 32)), known=tiles(80), asked=asked, **times).best == tiles(80)
    assert asked == [[16, 32], [32, 48], [16, 32], [16, 80, 32], [80], [16, 80]]


def test_built_in_tiles_that_fail_are_the_end_of_a_key_only(table: Path):
    said: list[str] = []
    problems = [toy("dkv", tried=(64, 16)), toy("dq", tried=(16, 32))]
    outcomes, failed = command.tune(
        problems, table, rounds=3, seconds=None, say=said.append, timer=timer(ms16=2.0, ms32=1.0)
    )
    assert [outcome.problem.kernel for outcome in outcomes] == ["dq"] and failed == 1
    assert "  not searched: the built-in tiles fail" in said


def test_no_memory_is_the_end_of_a_key_only(table: Path, monkeypatch: pytest.MonkeyPatch):
    def arrays(self: Toy) -> Any:
        if self.kernel == "dkv":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand where")
        return (jnp.arange(8.0),)

    monkeypatch.setattr(Toy, "arrays", arrays)
    said: list[str] = []
    problems = [toy("dkv"), toy("dq", tried=(16, 32))]
    outcomes, failed = command.tune(
        problems, table, rounds=3, seconds=None, say=said.append, timer=timer(ms16=2.0, ms32=1.0)
    )
    assert (len(outcomes), failed) == (1, 1)
    assert said[1] == "  not searched: RESOURCE_EXHAUSTED: out of memory"


def test_a_lost_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    lost = []

    check = command._Trial._check

    def dies(self: Any, programs: Any) -> None:
        if self._standard:
            lost.append(1)
            self._standard = [command.Timed(lambda *_: 1 / 0, program.arguments) for program in self._standard]
            raise RuntimeError("an illegal memory access was encountered")
        check(self, programs)

    monkeypatch.setattr(command._Trial, "_check", dies)
    with pytest.raises(command.DeviceLost, match="nothing runs on the GPU any more after block_q=32 "):
        search(toy(), ms16=1.0)
    assert lost == [1]


def test_what_was_found_is_used_later(table: Path):
    outcomes, failed = command.tune(
        [toy(tried=(16, 32))], table, rounds=3, seconds=None, say=[].append, timer=timer(ms16=2.0, ms32=1.0)
    )
    assert (len(outcomes), failed) == (1, 0)
    assert triton_tiles("dq") == tiles(32)
    # The built-in tiles win now: the entry goes.
    command.tune([toy()], table, rounds=3, seconds=None, say=[].append, timer=timer(ms16=1.0, ms32=1.0))
    assert tile_table.read(table) == {}
    assert triton_tiles("dq") != tiles(32)


def test_nothing_is_written_where_nothing_was_found(table: Path):
    command.tune([toy()], table, rounds=3, seconds=None, say=[].append, timer=timer(ms16=1.0, ms32=1.0))
    assert tile_table.read(table) == {}


def test_an_interrupted_search_keeps_finished_keys(table: Path):
    def interrupted(programs: Any, rounds: int) -> Any:
        if "dkv" in said[-1]:
            raise KeyboardInterrupt
        return timer(ms16=2.0, ms32=1.0)(programs, rounds)

    said: list[str] = []
    problems = [toy("dq", tried=(16, 32)), toy("dkv", tried=(16, 32))]
    with pytest.raises(KeyboardInterrupt):
        command.tune(problems, table, rounds=3, seconds=None, say=said.append, timer=interrupted)
    assert list(tile_table.read(table)) == [str(problems[0].key)]


def test_keys_that_the_table_lacks_come_first_and_time_is_kept(table: Path, monkeypatch: pytest.MonkeyPatch):
    problems = [toy("dq", tried=(16, 32)), toy("dkv", tried=(16, 32)), toy("forward", tried=(16, 32))]
    tile_table.merge(table, {problems[0].key: entry(tiles(32))})
    clock = iter([0.0, 0.0, 5.0, 11.0])
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    said: list[str] = []
    outcomes, _ = command.tune(
        problems, table, rounds=3, seconds=10.0, say=said.append, timer=timer(ms16=2.0, ms32=1.0)
    )
    assert [outcome.problem.kernel for outcome in outcomes] == ["dkv", "forward"]
    assert said[-1] == "10 seconds have passed: 1 of 3 keys were not searched"
    assert len(tile_table.read(table)) == 3


def test_times_of_the_calls_of_one_candidate_are_added(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "in_turns", lambda programs, rounds: [[float(p)] * rounds for p in programs])
    programs: Any = {"a": [1, 2], "b": [3]}
    assert command.time_in_turns(programs, 2) == {"a": [3.0, 3.0], "b": [3.0, 3.0]}


@pytest.mark.parametrize("kernel", ["forward", "dkv", "dq"])
def test_a_real_kernel_interpreted(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(space, "MOST_CANDIDATES", 2)
    problem = Problem("pallas_triton", kernel, "float32", 64, 64, 1, "cpu", interpret=True)
    built_in, other = problem.candidates()
    said: list[str] = []
    faster = lambda programs, rounds: {x: [1.0 if x == other else 2.0] * rounds for x in programs}  # noqa: E731
    outcome = command.search(problem, rounds=2, say=said.append, timer=faster)
    assert (said, outcome.best, outcome.built_in) == ([], other, built_in)


# ---------------------------------------------------------------------------------------------------- candidates


def every_problem(length: int, heads: int, **options: Any) -> list[Problem]:
    return [
        Problem(implementation, kernel, dtype, size, length, heads, KIND, **options)
        for (implementation, _), kernels in space.KERNELS.items()
        for kernel in kernels
        for size in space.HEAD_SIZES
        for dtype in (["bfloat16"] if implementation == "pallas_gpu" else ["bfloat16", "float32"])
    ]


def some_problems(length: int, heads: int) -> list[Problem]:
    """All of Mosaic's; of Triton's every pair of kernel, head size and dtype."""
    kernels = [kernel for of_pass in space.KERNELS.values() for kernel in of_pass]
    return [
        problem
        for problem in every_problem(length, heads)
        if problem.implementation == "pallas_gpu"
        or (kernels.index(problem.kernel) + space.HEAD_SIZES.index(problem.head_size)) % 2
        == (problem.dtype == "float32")
    ]


def test_candidates_are_few_and_what_a_call_would_use(table: Path):
    for problem in every_problem(8192, 16):
        candidates = problem.candidates()
        assert candidates[0] == problem.built_in()
        assert 4 < len(set(candidates)) == len(candidates) <= 24
        for found in [candidates[-1], *problem.refinements(candidates[-1])]:
            tile_table.merge(table, {problem.key: entry(found)})
            x = operand(8192, problem.head_size, problem.dtype)
            params = KernelParams(1.0, device_kind=KIND)
            if problem.implementation == "pallas_triton":
                assert triton_sizes.tile_sizes(problem.kernel, Block(x, x, x, FULL), params) == found
            else:
                mask = CAUSAL if "masked" in problem.kernel else FULL
                whole = "carry" not in problem.kernel
                assert mosaic_sizes.forward_tiles(x, x, mask, params, whole=whole) == found


@pytest.mark.slow
@triton_cases.lowers_triton
@pytest.mark.parametrize("problem", some_problems(512, 2), ids=lambda problem: str(problem.key))
def test_candidates_lower(problem: Problem):
    """Every other one of whole and full Mosaic calls, which take the least time; of others some."""
    arrays = jax.eval_shape(problem.arrays)
    every = 2 if problem.kernel == "forward" and problem.implementation == "pallas_gpu" else 8
    texts = set()
    candidates = problem.candidates()[every // 2 :: every]
    for found in candidates:
        call, arguments = problem.calls(found, arrays)[-1]
        with jax.sharding.use_abstract_mesh(mosaic_cases.H100):
            texts.add(jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text())
    assert len(texts) == len(candidates) > 0, "each is a program of its own"


# -------------------------------------------------------------------------------------------------- command line


def run(*arguments: str, status: int = 0) -> str:
    """What `ringjax tune` prints."""
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


HOPPER = ("--dry-run", "--device-kind", KIND)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "needs an NVIDIA GPU, or --dry-run with --device-kind. Got platform 'cpu'"),
        (("--dry-run",), "needs an NVIDIA GPU, or --dry-run with --device-kind. Got platform 'cpu'"),
        (("--device-kind", KIND), "--device-kind needs --dry-run"),
        ((*HOPPER, "--head-dim", "96"), "--head-dim must be one of 64, 128, 256. Got 96."),
        ((*HOPPER, "--seq-len", "1000"), "--seq-len must be a multiple of 256. Got 1000"),
        ((*HOPPER, "--rounds", "0"), "--rounds must be at least 1. Got 0"),
        ((*HOPPER, "--seconds", "-1"), "--seconds must be at least 0. Got -1"),
        ((*HOPPER, "--pass", "backward"), "backward kernels of pallas_gpu have nothing to tune"),
        ((*HOPPER, "--implementation", "pallas_gpu", "--dtype", "float32"), "needs --dtype bfloat16 or float16"),
        (
            ("--dry-run", "--device-kind", "NVIDIA A100-SXM4-40GB", "--implementation", "pallas_gpu"),
            "needs a Hopper GPU .*Got 'NVIDIA A100-SXM4-40GB'",
        ),
        (("--dry-run", "--device-kind", "AMD Instinct MI300X"), "an NVIDIA GPU of Ampere .*Got 'AMD Instinct MI300X'"),
    ],
)
def test_refusals(arguments: tuple[str, ...], what: str):
    assert re.search(f"^error: .*{what}", refused(*arguments))


def test_the_gpu_at_hand_is_refused_where_it_runs_xla(monkeypatch: pytest.MonkeyPatch):
    device = types.SimpleNamespace(device_kind="NVIDIA T4", compute_capability="7.5")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert re.search("an NVIDIA GPU of Ampere or later.*Got 'NVIDIA T4'", refused("--dry-run"))
    device.device_kind, device.compute_capability = "NVIDIA L4", "8.9"
    said = run("--dry-run", "--head-dim", "64", "--pass", "forward")
    assert "NVIDIA L4 / pallas_triton / forward / half / 64" in said and "dkv" not in said
    said = run("--dry-run", "--head-dim", "64", "--pass", "backward", "--pass", "forward")
    assert "forward / half / 64" in said and "dkv / half / 64" in said


def test_dry_run_prints_candidates_and_writes_nothing(table: Path):
    said = run(*HOPPER, "--head-dim", "128").splitlines()
    assert said[0] == "pallas_gpu: forward only, its backward kernels have nothing to tune"
    assert [line.split(" / ")[2] for line in said if line.startswith(KIND)] == list(
        space.KERNELS["pallas_gpu", "forward"]
    )
    said = run("--dry-run", "--device-kind", "NVIDIA A100-SXM4-40GB", "--dtype", "float32")
    assert said.count(" candidates, the built-in tiles first") == 9
    assert "NVIDIA A100-SXM4-40GB / pallas_triton / dkv / float32 / 64: 24 candidates" in said
    assert tile_table.read(table) == {}


@pytest.fixture
def on_toys(monkeypatch: pytest.MonkeyPatch) -> list[Toy]:
    """The command searches these, by a timer that finds tiles of 32 twice as fast as those of 16."""
    problems = [toy("dq", tried=(16, 32)), toy("dkv", tried=(16,))]
    monkeypatch.setattr(command, "_problems", lambda request, say: problems)
    found = functools.partial(command.tune, timer=timed_by_block)
    monkeypatch.setattr(command, "tune", found)
    return problems


def timed_by_block(programs: Any, rounds: int) -> dict[Any, list[float]]:
    return {tiles: [32.0 / tiles.block_q] * rounds for tiles in programs}


def test_the_command_writes_the_table_and_shows_it(table: Path, on_toys: list[Toy]):
    said = run()
    assert re.search(r"dq .* 128 .* 2\.000 .* 1\.000 .* 2\.000 .* block_q=32", said)
    assert re.search(r"dkv .* 128 .* 2\.000 .* 2\.000 .* 1\.000 .* as built in", said)
    assert f"1 of 2 keys have faster tiles than the built-in ones; later processes find them in {table}" in said
    assert list(tile_table.read(table)) == [str(on_toys[0].key)]


def test_another_table(table: Path, on_toys: list[Toy]):
    other = table.with_name("deep") / "other.json"
    assert f"RINGJAX_TILES={other}" in run("--table", str(other))
    assert list(tile_table.read(other)) == [str(on_toys[0].key)] and tile_table.read(table) == {}


def test_tables_that_cannot_be_written(table: Path, on_toys: list[Toy], monkeypatch: pytest.MonkeyPatch):
    table.write_text("precious", encoding="utf-8")
    assert "must be JSON" in refused()
    monkeypatch.setenv(tile_table.VARIABLE, "")
    assert "--table must name a file where RINGJAX_TILES is empty" in refused()
    assert "--table" in refused("--table", str(table / "below.json"))


def test_the_command_interrupted(table: Path, on_toys: list[Toy], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Toy, "arrays", lambda self: (jnp.arange(8.0),) if self.kernel == "dq" else stop())

    def stop() -> Any:
        raise KeyboardInterrupt

    assert f"interrupted; what was found before is in {table}" in run(status=130)
    assert list(tile_table.read(table)) == [str(on_toys[0].key)]
