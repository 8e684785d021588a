"""Decoding with a sharded cache: logits of the decoder that sees everything at once, the same tokens on every ring."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_decoder import V, change, cube, make, ring_mesh
from test_models_gguf import smol_that_reads

from ringjax import models
from ringjax.kernels.choose import Target
from ringjax.layers import decoder_layer, placement
from ringjax.models import generation
from ringjax.models.generation import Sampling, Stats, draw, generate
from ringjax.nnx import DynamicScaling, LayerKind

LENGTHS = np.array([11, 7], np.int32)
WIDE = {
    "plain": change(),
    # Two kinds of layers and one left over; everything that meets the cache.
    "everything": change(
        num_layers=3,
        layer_pattern=(LayerKind(local_window_size=4), LayerKind()),
        qk_norm=True,
        use_sinks=True,
        attention_bias=True,
        logits_soft_cap=3.0,
        output_soft_cap=5.0,
    ),
}


def natural(config: Any) -> Any:
    """For one device, with tokens in natural order."""
    return dataclasses.replace(config, num_shards=1)


def text(length: int = 24) -> np.ndarray:
    return np.random.default_rng(3).integers(0, V, (2, length), np.int32)


@pytest.mark.parametrize(
    ("name", "mesh", "scan"),
    [
        ("everything", None, None),
        ("everything", 3, False),
        ("plain", 8, None),
        ("everything", "cube", False),
        ("everything", "cube", "apart"),
        ("plain", "typed", None),
    ],
    ids=lambda x: str(x),
)
def test_logits_are_those_of_the_whole_text(name: str, mesh: Any, scan: Any):
    """Ragged prompts, then one and two tokens at a time."""
    axes: dict[str, Any] = {}
    where = mesh
    if isinstance(mesh, int):
        where = ring_mesh(mesh)
    elif mesh in ("cube", "typed"):
        where = cube(AxisType.Explicit if mesh == "typed" else AxisType.Auto)
        axes = {"batch_axis_name": "data", "head_axis_name": "tensor"}
    tokens = text()
    want = np.asarray(jax.jit(lambda d, t: d(t))(make(natural(WIDE[name])), tokens))
    config = natural(WIDE[name]) if mesh is None else dataclasses.replace(WIDE[name], **axes)
    decoder = make(config, where)
    if scan == "apart":
        decoder, scan = decoder.with_scan_layers(False), None

    def run() -> None:
        cache = decoder.empty_cache(2, 24, max_new_tokens=2, scan_layers=scan)
        prefill = jax.jit(lambda decoder, *rest: decoder.prefill(*rest[:2], lengths=rest[2]))
        decode = jax.jit(lambda decoder, *rest: decoder.decode(*rest[:2], counts=rest[2]), donate_argnums=2)
        logits, cache = prefill(decoder, tokens[:, :13], cache, LENGTHS)
        seen = LENGTHS.copy()
        for counts in (None, [1, 1], [2, 1], [1, 2], [2, 2], [0, 1], [1, 1]):
            if counts is not None:
                new = np.stack([tokens[row, n : n + 2] for row, n in enumerate(seen)])
                logits, cache = decode(decoder, new, cache, np.array(counts, np.int32))
                seen += np.array(counts, np.int32)
            for row, length in enumerate(seen):
                if counts is None or counts[row]:
                    np.testing.assert_allclose(np.asarray(logits)[row], want[row, length - 1], atol=2e-5, rtol=2e-5)
        assert cache.lengths.tolist() == seen.tolist()

    if mesh == "typed":
        with jax.set_mesh(where):
            run()
    else:
        run()


PROMPTS = ([1, 5, 9, 2, 7, 7, 3], [4, 4, 20])


BOTH_KINDS = dataclasses.replace(WIDE["everything"], num_layers=2)  # of layers; what is left over compiles once more


def written_on_cube(kind: AxisType) -> list[list[int | None]]:
    config = dataclasses.replace(BOTH_KINDS, batch_axis_name="data", head_axis_name="tensor")
    with jax.set_mesh(cube(kind)):
        return written(cube(kind), config)


def written(mesh: Any, config: Any = None, **options: Any) -> list[list[int | None]]:
    config = BOTH_KINDS if config is None else config
    decoder = make(natural(config) if mesh is None else config, mesh)
    return list(generate(decoder, PROMPTS, max_new_tokens=12, **options))


def test_the_same_tokens_on_every_ring():
    """Greedy and drawn; and whatever the other row is."""
    greedy, drawn = written(None), written(None, sampling=Sampling(temperature=1.0, top_p=0.9, seed=3))
    assert len(greedy) == 12 and greedy != drawn
    config = dataclasses.replace(BOTH_KINDS, layout="zigzag")
    assert written(ring_mesh(2), config, sampling=Sampling(temperature=1.0, top_p=0.9, seed=3)) == drawn
    config = dataclasses.replace(BOTH_KINDS, layout="contiguous")
    assert written(ring_mesh(8), config) == greedy
    assert written_on_cube(AxisType.Auto) == written_on_cube(AxisType.Explicit) == greedy
    twice = generate(make(natural(BOTH_KINDS)), [PROMPTS[0]] * 2, max_new_tokens=12)
    assert list(twice) == [[first, first] for first, _ in greedy]


def test_rows_end_at_their_stops():
    greedy = written(None)
    stop = greedy[2][0]
    steps = written(None, stop_ids=[stop])
    first = [row[0] for row in steps]
    end = first.index(stop)
    assert first[: end + 1] == [row[0] for row in greedy][: end + 1] and set(first[end + 1 :]) <= {None}
    if stop not in [row[1] for row in greedy]:
        assert [row[1] for row in steps] == [row[1] for row in greedy]


@pytest.mark.parametrize("together", [1, 3, 8])
def test_the_same_text_however_many_tokens_a_call_writes(together: int, monkeypatch: pytest.MonkeyPatch):
    """Up to the end of all rows, to stops amid a call, and not beyond."""
    greedy = written(None)
    counts: list[int] = []
    call = generation.next_tokens

    def counted(*args: Any) -> Any:
        counts.append(int(args[4]))
        return call(*args)

    monkeypatch.setattr(generation, "next_tokens", counted)
    monkeypatch.setattr(generation, "_count", lambda seconds: together)
    assert written(None) == greedy
    assert counts == {1: [1] * 11, 3: [1, 1, 3, 3, 3], 8: [1, 1, 8, 1]}[together]
    for stop in {i for row in greedy for i in row}:
        ends = [next((n for n, row in enumerate(greedy) if row[at] == stop), 11) for at in range(2)]
        wanted = [[i if n <= end else None for i, end in zip(row, ends, strict=True)] for n, row in enumerate(greedy)]
        assert written(None, stop_ids=[stop, -5, 2**40]) == wanted[: max(ends) + 1]


def test_a_call_ends_with_the_last_row():
    """No more tokens are written, and rows that have ended take no room."""
    decoder = make(natural(BOTH_KINDS))
    cache = decoder.empty_cache(2, 32, scan_layers=False)
    tokens = np.array([[i for i in row[:2]] for row in PROMPTS], np.int32)
    chosen, cache = generation.first_token(decoder, tokens, cache, np.full(2, 2, np.int32), Sampling())
    several = lambda cache, stops: generation.next_tokens(  # noqa: E731
        decoder, chosen, cache, np.ones(2, bool), np.int32(7), np.array(stops, np.int32), Sampling()
    )
    copy = lambda: jax.tree.map(jnp.copy, cache)  # noqa: E731
    ids, full = several(copy(), [])
    ids = np.asarray(ids)
    assert ids.shape == (8, 2) and not ids[7].any() and full.lengths.tolist() == [9, 9]
    stops = [int(ids[1, 0]), int(ids[3, 1])]
    ends = [int(np.argmax(np.isin(ids[:7, row], stops))) for row in range(2)]
    got, cut = several(copy(), stops)
    assert cut.lengths.tolist() == [2 + 1 + end for end in ends]
    for row, end in enumerate(ends):
        assert np.asarray(got)[: end + 1, row].tolist() == ids[: end + 1, row].tolist()
    assert not np.asarray(got)[max(ends) + 1 :].any()


def test_a_call_takes_a_tenth_of_a_second_or_one_token(monkeypatch: pytest.MonkeyPatch):
    assert [generation._count(seconds) for seconds in (1.0, 0.1, 0.049, 0.03, 0.001, 0.0)] == [1, 1, 2, 3, 8, 8]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert generation._count(1.0) == 8, "processes have clocks of their own, and must call the same"


def test_one_program_decodes_at_every_length():
    step: Any = generation.next_tokens
    before = step._cache_size()
    decoder, stats = make(natural(WIDE["plain"])), Stats()
    for length in (3, 9, 30):
        list(generate(decoder, [[1] * length], max_new_tokens=4, capacity=64, stats=stats))
    assert step._cache_size() == before + 1
    assert stats.prompt_tokens == 30 and stats.new_tokens == 12 and stats.decode_rate > 0 and stats.cache_bytes > 0


def test_a_token_copies_no_cache():
    """The cache is written in place, and beside it there is one layer's, which XLA's kernel reads in another order."""
    config = natural(change(num_layers=4))
    decoder = make(config)

    def compiled(capacity: int) -> Any:
        cache = jax.eval_shape(lambda: decoder.empty_cache(2, capacity, scan_layers=False))
        tokens, count, none = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (), (0,)))
        going = jax.ShapeDtypeStruct((2,), bool)
        step = generation.next_tokens.lower(decoder, tokens, cache, going, count, none, Sampling())
        return step.compile().memory_analysis(), cache

    (small, _), (large, cache) = compiled(2**12), compiled(2**15)
    layer = cache.layers[0].key.size * 4
    assert large.alias_size_in_bytes >= 2 * config.num_layers * layer
    # 1.75 times a layer's keys with JAX 0.10, 2.6 since; a copy of keys and values would be two more.
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 3 * layer


@pytest.mark.parametrize("stacked", [False, True])
def test_a_loop_takes_no_layer_out_of_a_stack(stacked: bool):
    """XLA for GPUs copies what is cut out of an array in a loop, all parameters for every token."""
    config = natural(change(num_layers=3, scan_layers=stacked))
    decoder = make(config)
    cache = jax.eval_shape(lambda: decoder.empty_cache(2, 64, scan_layers=False))
    tokens, count, none = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (), (0,)))
    going = jax.ShapeDtypeStruct((2,), bool)
    text = generation.next_tokens.lower(decoder, tokens, cache, going, count, none, Sampling()).as_text()
    cuts = re.findall(r"stablehlo\.(?:dynamic_)?slice .*-> tensor<((?:\d+x)+)", text)
    sizes = [math.prod(int(n) for n in shape.split("x")[:-1]) for shape in cuts]
    assert any(size >= config.embed_dim * config.mlp_dim for size in sizes) == stacked, cuts


def test_lengths_are_those_of_the_first_layer():
    """So that XLA computes once, and not in each layer, what depends on them."""
    decoder = make(natural(WIDE["plain"]))
    cache = decoder.empty_cache(2, 24, scan_layers=False)
    _, cache = jax.jit(lambda d, *rest: d.prefill(*rest[:2], lengths=rest[2]))(decoder, text()[:, :13], cache, LENGTHS)
    first, second = cache.layers
    other = dataclasses.replace(cache, layers=(first, dataclasses.replace(second, lengths=second.lengths * 0)))
    decode = jax.jit(lambda d, tokens, cache: d.decode(tokens, cache))
    for got, want in zip(*(jax.tree.leaves(decode(decoder, text()[:, :1], x)) for x in (other, cache)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_generating_from_a_stack_on_a_gpu_warns(monkeypatch: pytest.MonkeyPatch):
    decoder = make(natural(WIDE["plain"]))
    apart = decoder.with_scan_layers(False)
    monkeypatch.setattr(generation, "target_of", lambda mesh: Target(platform="gpu", device_kind="", capability=None))
    with pytest.warns(UserWarning, match=r"layers are stacked.* decoder\.with_scan_layers\(False\)"):
        want = list(generate(decoder, PROMPTS, max_new_tokens=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(generate(apart, PROMPTS, max_new_tokens=2)) == want


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_is_never_alone_on_gpus(rows: int, monkeypatch: pytest.MonkeyPatch):
    """XLA for GPUs would write products of one row to memory, and gather a table that devices share for one look-up."""
    decoder = make(natural(change(num_layers=1)))
    tokens = np.arange(rows, dtype=np.int32)[:, None] + 3

    def logits() -> tuple[Any, str]:
        cache = decoder.empty_cache(rows, 8, scan_layers=False)
        step = jax.jit(lambda decoder, tokens, cache: decoder.decode(tokens, cache)[0])
        return step(decoder, tokens, cache), step.lower(decoder, tokens, cache).as_text()

    want, _ = logits()
    monkeypatch.setattr(placement, "target_of", lambda mesh: Target(platform="gpu", device_kind="", capability=None))
    got, text = logits()
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
    products = re.findall(r"contracting_dims = (?:\[2\] x \[0\]|\[3, 2\] x \[1, 0\]),.*\(tensor<(\d)x(\d)x", text)
    assert len(products) == 7 and set(products) == ({("1", "2")} if rows == 1 else {("2", "1")})
    (ids,) = re.findall(rf"stablehlo.gather.*tensor<{V}x\d+xf32>, tensor<(\dx\d)x1xi32>", text)
    assert ids == ("1x2" if rows == 1 else "2x1")


def test_large_kernels_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """They stay products of matrices, even of one row: XLA draws the line at ten million numbers per device."""
    monkeypatch.setattr(placement, "target_of", lambda mesh: Target(platform="gpu", device_kind="", capability=None))
    here = make(natural(change(num_layers=1)))._placement().decoding()
    x = jax.ShapeDtypeStruct((1, 1, 1000), jnp.float32)
    for width, tokens in ((9_999, 2), (10_000, 1)):
        kernel = jax.ShapeDtypeStruct((1000, width), jnp.float32)
        traced = jax.make_jaxpr(lambda x, kernel: here.product("bte,ef->btf", x, kernel))(x, kernel)
        (dot,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "dot_general"]
        assert dot.outvars[0].aval.shape == (1, tokens, width)


def test_a_layer_of_a_prompt_waits_until_the_one_before_has_written():
    """XLA for GPUs would write all caches at the end, and keep every layer's keys and values for it."""
    decoder = make(natural(change(num_layers=4)))
    cache = jax.eval_shape(lambda: decoder.empty_cache(2, 64, scan_layers=False))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    text = jax.jit(lambda *of: of[0].prefill(*of[1:])).lower(decoder, tokens, cache).as_text()
    barriers = [line for line in text.splitlines() if "stablehlo.optimization_barrier" in line]
    held = "x".join(map(str, cache.layers[0].key.shape))
    assert sum(line.count(f"tensor<{held}x") >= 2 and "tensor<2x32x" in line for line in barriers) == 4


@pytest.mark.parametrize("mesh", [None, 3, "cube"])
def test_a_prompt_whose_mlps_take_some_tokens_at_a_time(mesh: Any, monkeypatch: pytest.MonkeyPatch):
    """The same logits and cache, where a shard's tokens do not divide and where there are fewer than chunks."""
    where = cube(AxisType.Auto) if mesh == "cube" else None if mesh is None else ring_mesh(mesh)
    axes: dict[str, Any] = {"batch_axis_name": "data", "head_axis_name": "tensor"} if mesh == "cube" else {}
    config = dataclasses.replace(BOTH_KINDS, post_norms=True, mlp_bias=True, **axes)
    decoder = make(natural(config) if mesh is None else config, where)

    def read(tokens: int) -> tuple[Any, Any]:
        monkeypatch.setattr(decoder_layer, "_TOKENS", tokens)
        prefill = jax.jit(lambda decoder, *rest: decoder.prefill(*rest[:2], lengths=rest[2]))
        cache = decoder.empty_cache(2, 24, scan_layers=False)
        lowered = prefill.lower(decoder, text()[:, :13], cache, LENGTHS)
        return lowered.as_text().count("stablehlo.while"), prefill(decoder, text()[:, :13], cache, LENGTHS)

    loops, want = read(10**6)
    for tokens in (5, 1):
        more, found = read(tokens)
        assert more > loops
        for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(right), atol=1e-5, rtol=1e-5)


def test_some_tokens_at_a_time_take_less_memory_and_gather_no_kernel_again(monkeypatch: pytest.MonkeyPatch):
    config = change(num_layers=1, mlp_dim=1024)
    decoder = make(config, ring_mesh(4))
    cache = decoder.empty_cache(1, 4096, scan_layers=False)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def compiled(at_once: int) -> Any:
        monkeypatch.setattr(decoder_layer, "_TOKENS", at_once)
        return jax.jit(lambda *of: of[0].prefill(*of[1:])).lower(decoder, tokens, cache).compile()

    whole, cut = compiled(1024), compiled(128)
    for program in (whole, cut):
        computation, gathers = "", []
        for line in program.as_text().splitlines():
            computation = line if line.endswith("{") and not line.startswith(" ") else computation
            gathers += [computation] if " all-gather(" in line else []
        assert len(gathers) == 8 and all(name.startswith("ENTRY") for name in gathers), "once, in no loop"
    saved = [program.memory_analysis().temp_size_in_bytes for program in (whole, cut)]
    assert saved[0] - saved[1] > 1024 * 1024 * 4, "of the MLP's width, of a device's tokens"


def test_drawing():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 400))
    positions = jnp.arange(400, dtype=jnp.int32)
    count = lambda **options: np.bincount(draw(logits, positions, Sampling(**options)), minlength=4) / 400  # noqa: E731
    assert count().tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(count(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.08)
    np.testing.assert_allclose(count(temperature=1.0, top_p=0.81), [0.625, 0.375, 0, 0], atol=0.08)
    assert count(temperature=1.0, top_p=0.1).tolist() == [1, 0, 0, 0], "one is always left"
    assert count(temperature=1e-4).tolist() == [1, 0, 0, 0]
    one, other = (draw(logits, positions, Sampling(temperature=1.0, seed=seed)) for seed in (0, 1))
    assert (one != other).any()


WRONG: dict[str, tuple[Any, str]] = {
    "no prompt": (lambda d: generate(d, []), "prompts must hold at least one id each"),
    "an empty prompt": (lambda d: generate(d, [[1], []]), r"prompts must .* Got lengths \[1, 0\]"),
    "no room": (
        lambda d: generate(d, [[1] * 9], max_new_tokens=4, capacity=12), r"capacity must have room .* 9 \+ 4 .* Got 12"
    ),
    "ids": (lambda d: list(generate(d, [[V]])), "prompts must be in"),
    "temperature": (lambda d: Sampling(temperature=-1.0), "temperature must be a number of at least 0"),
    "top_p": (lambda d: Sampling(top_p=0.0), "top_p must be a number above 0 and at most 1. Got 0.0"),
    "seed": (lambda d: Sampling(seed=-1), "seed must be an integer"),
    "a full cache": (
        lambda d: d.decode(np.ones((1, 9), np.int32), d.empty_cache(1, 4, max_new_tokens=9)),
        "tokens: a row must fit the cache's capacity of 8. Got 9",
    ),
    "a long prompt": (
        lambda d: d.prefill(np.ones((1, 9), np.int32), d.empty_cache(1, 4)), "tokens: a row must fit .* of 8. Got 9"
    ),
    "rows": (lambda d: d.decode(np.ones((2, 1), np.int32), d.empty_cache(1, 4)), "tokens must have the 1 rows"),
    "no cache": (lambda d: d.decode(np.ones((2, 1), np.int32), {}), "cache must be of empty_cache. Got dict"),
    "scan_layers": (lambda d: d.empty_cache(1, 4, scan_layers=1), "scan_layers must be True or False. Got 1"),
    "layers that are apart": (
        lambda d: d.with_scan_layers(False).empty_cache(1, 4, scan_layers=True),
        "scan_layers must be False or None, as the decoder's layers are not stacked. Got True",
    ),
    "a stacked cache": (
        lambda d: d.with_scan_layers(False).decode(np.ones((1, 1), np.int32), d.empty_cache(1, 4, scan_layers=True)),
        "cache must be of this decoder's empty_cache. Got one of layers that are stacked",
    ),
    "with_scan_layers": (lambda d: d.with_scan_layers(0), "scan_layers must be True or False. Got 0"),
    "dtype": (lambda d: d.empty_cache(1, 4, dtype="bfloat16"), "dtype must be that of the decoder, float32. Got bfl"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call(make(natural(WIDE["plain"])))


def test_rotations_that_change_with_the_length_are_refused():
    scaling = DynamicScaling(factor=2.0, original_length=8)
    decoder = make(natural(change(rope_scaling=scaling)))
    with pytest.raises(NotImplementedError, match="rope_scaling: DynamicScaling"):
        decoder.empty_cache(1, 16)


# --------------------------------------------------------------------------------------------------------- the command


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringjax", "generate", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_streams_text_and_says_what_it_took(tmp_path: Path):
    path = smol_that_reads(tmp_path / "m.gguf")
    got = command("--model", path, "--prompt", "the capital", "--max-new-tokens", 5, "--devices", 2)
    assert got.returncode == 0, got.stderr
    words = models.tokenizer(path)
    decoder = models.load(path, layout="contiguous")
    ids = [
        step[0] for step in generate(decoder, [words.encode("the capital")], max_new_tokens=5, stop_ids=words.eos_ids)
    ]
    assert got.stdout == words.decode([i for i in ids if i is not None]) + "\n"
    assert "on 2 cpu devices" in got.stderr and "decode 5 tokens" in got.stderr and "per device" in got.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere", "--prompt", "x"), "nowhere"),
        (("--model", "nowhere", "--prompt", "x", "--devices", "0"), "--devices must be at least 1. Got 0"),
        (("--model", "nowhere", "--prompt", "x", "--top-p", "2"), "--top-p must be a number above 0"),
        (("--model", "nowhere", "--no-such-flag"), "No such option: --no-such-flag"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments: tuple[str, ...], words: str):
    got = command(*arguments)
    assert got.returncode == 2 and words in got.stderr and "Traceback" not in got.stderr
