"""Attention to a cache sharded over the ring, against the float64 oracle; what is written where; what is sent."""

from __future__ import annotations

import math
import re
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import CAPACITY, Problem, run
from cases import Inputs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax import KVCache, cached_attention, exchange

# Every C, layout, way and feature at least once with another; the interpreter where a kernel is to run in it.
PROBLEMS = {
    "one device, one token": Problem(shards=1, layout="striped"),
    "one token, ragged, sinks": Problem(shards=8, layout="striped", options=(("sinks", True),)),
    "one token, window, MQA": Problem(shards=5, layout="striped", options=(("window", (6, 0)), ("num_kv_heads", 1))),
    "one token, soft cap": Problem(shards=2, layout="zigzag", options=(("soft_cap", 1.5), ("scale", 0.9))),
    "some tokens": Problem(shards=3, layout="contiguous", queries=5),
    "some tokens, rows of fewer": Problem(
        shards=5, layout="zigzag", queries=4, counts=(0, 3), options=(("window", (9, 0)), ("sinks", True))
    ),
    "an empty row": Problem(shards=2, layout=ringjax.Striped(4), queries=2, lengths=(0, 40), counts=(0, 2)),
    "16 bits": Problem(shards=3, layout="striped", queries=3, dtype=jnp.bfloat16),
    "keys travel": Problem(shards=3, layout="striped", queries=6, travels="keys"),
    "keys travel, ragged": Problem(
        shards=2, layout="zigzag", queries=8, counts=(8, 3), travels="keys", options=(("sinks", True),)
    ),
    "keys travel, window": Problem(
        shards=5, layout="contiguous", queries=10, travels="keys", options=(("window", (7, 0)),)
    ),
    "queries travel": Problem(shards=5, layout="striped", queries=10, travels="queries"),
    "queries travel, ragged": Problem(
        shards=3, layout="contiguous", queries=9, counts=(2, 9), travels="queries", options=(("window", (5, 0)),)
    ),
    "queries travel, sinks": Problem(
        shards=8, layout="zigzag", queries=16, travels="queries", options=(("sinks", True), ("soft_cap", 2.0))
    ),
    "the TPU kernel": Problem(shards=2, layout="striped", queries=2, implementation="pallas_tpu"),
    "the Triton kernel": Problem(shards=2, layout="striped", queries=2, implementation="pallas_triton"),
}


# Each round of tests has every other one: see tests/rounds.py.
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.breadth if i % 2 else pytest.mark.once) for i, x in enumerate(PROBLEMS)]
)
def test_attention_to_a_cache_is_that_of_the_oracle(name: str):
    problem = PROBLEMS[name]
    inputs = problem.inputs()
    as_users = name in ("one token, ragged, sinks", "keys travel", "queries travel")
    cases.assert_matches(problem.case, inputs, run(problem, inputs, as_users=as_users), as_users=as_users)


@pytest.mark.parametrize("travels", [None, "keys", "queries"])
def test_what_is_not_cached_takes_part_in_nothing(travels: str | None):
    """NaN beyond the length of a row, and in absent queries and their cotangents."""
    problem = Problem(shards=2, layout="striped", queries=4, counts=(2, 4), travels=travels, options=(("sinks", True),))
    clean = problem.inputs()
    arrays = {name: np.array(x) for name, x in clean.arrays.items()}
    for row, (length, count) in enumerate(zip(problem.lengths, problem.counts or (), strict=True)):
        for name in ("key", "value"):
            arrays[name][row, length:] = np.nan
        arrays["query"][row, count:] = np.nan
        arrays["dout"][row, count:] = np.nan
    got, want = run(problem, Inputs(arrays, clean.masks)), run(problem, clean)
    for name, x in want.values.items():
        if name == "dsinks":  # an absent query still has a sink, and a cotangent of its log-sum-exp
            continue
        np.testing.assert_array_equal(got.values[name], x, err_msg=name)


# ----------------------------------------------------------------------------------------------------- what is written


def natural(cache: KVCache, x: Any) -> np.ndarray:
    order = ringjax.ring_positions(x.shape[1], layout=cache.layout, num_shards=cache.num_shards)
    return np.asarray(x)[:, np.argsort(np.asarray(order))]


def tokens(batch: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((batch, length, 2, size)).astype(np.float32) for size in (4, 3))  # type: ignore


@pytest.mark.parametrize(("shards", "layout"), [(1, "contiguous"), (2, "zigzag"), (3, "striped"), (5, "contiguous")])
def test_rows_of_different_lengths_grow_in_place(shards: int, layout: str):
    mesh, (key, value) = cases.mesh_of(shards), tokens(2, CAPACITY)
    empty = KVCache.empty(2, CAPACITY, 2, 4, value_head_dim=3, dtype=jnp.float32, layout=layout, mesh=mesh)
    cache, lengths = empty, np.zeros(2, int)
    for counts in ((3, 0), (1, 1), (2, 3)):
        width = max(counts)
        take = [slice(n, n + width) for n in lengths]
        new = [np.stack([x[row, cut] for row, cut in enumerate(take)]) for x in (key, value)]
        cache = cache.append(*new, counts=np.array(counts), mesh=mesh)
        lengths = lengths + counts
    assert cache.lengths.tolist() == lengths.tolist()
    for x, held in ((key, cache.key), (value, cache.value)):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(natural(cache, held)[row, :length], x[row, :length])
            assert not natural(cache, held)[row, length:].any(), "nothing is written beyond the tokens"
    assert cache.key.sharding.is_equivalent_to(empty.key.sharding, 4)


@pytest.mark.parametrize(("shards", "layout"), [(2, "zigzag"), (3, "striped"), (3, "contiguous")])
def test_a_chunk_that_is_dealt_lands_where_its_tokens_would(shards: int, layout: str):
    mesh, (key, value) = cases.mesh_of(shards), tokens(2, 17)
    make = KVCache.empty(2, CAPACITY, 2, 4, value_head_dim=3, dtype=jnp.float32, layout=layout, mesh=mesh)
    begun = make.append(key[:, :5], value[:, :5], mesh=mesh)
    new = key[:, 5:], value[:, 5:]
    dealt = ringjax.to_ring_order(new, layout=layout, num_shards=shards)
    one, other = begun.append(*new, mesh=mesh), begun.append(*dealt, mesh=mesh, dealt=True)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("shards", "window"), [(1, None), (3, None), (3, 5), (2, 9)])
def test_a_prompt_fills_a_cache_as_its_tokens_would_one_by_one(shards: int, window: int | None):
    mesh, (key, value) = cases.mesh_of(shards), tokens(2, 24)
    lengths = np.array([24, 13])
    empty = KVCache.empty(
        2, CAPACITY, 2, 4, value_head_dim=3, dtype=jnp.float32, mesh=mesh, local_window_size=window
    )  # fmt: skip
    dealt = ringjax.to_ring_order((key, value), layout="striped", num_shards=shards)
    filled, grown = empty.fill(*dealt, lengths=lengths, mesh=mesh), empty
    append = jax.jit(lambda cache, *new, counts: cache.append(*new, counts=counts, mesh=mesh))
    for t in range(24):
        grown = append(grown, key[:, t : t + 1], value[:, t : t + 1], counts=(t < lengths).astype(np.int32))
    assert filled.lengths.tolist() == grown.lengths.tolist() == lengths.tolist()
    query = np.ones((2, 1, 4, 4), np.float32)
    options: dict[str, Any] = {"mesh": mesh, "local_window_size": window}
    np.testing.assert_array_equal(cached_attention(query, filled, **options), cached_attention(query, grown, **options))
    if window is None:
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(natural(filled, filled.key)[row, :length], key[row, :length])


@pytest.mark.parametrize(("shards", "layout"), [(1, "striped"), (2, "contiguous"), (3, "striped")])
def test_a_window_keeps_only_what_it_needs(shards: int, layout: str):
    """Against a cache of everything, token by token and in small chunks, far beyond its slots."""
    mesh, (key, value) = cases.mesh_of(shards), tokens(2, CAPACITY)
    make = dict(value_head_dim=3, dtype=jnp.float32, layout=layout, mesh=mesh)
    whole = KVCache.empty(2, CAPACITY, 2, 4, **make)
    rolls = KVCache.empty(2, CAPACITY, 2, 4, local_window_size=6, max_new_tokens=3, **make)
    assert rolls.rolls and rolls.capacity < 9 + 8 * shards
    options: dict[str, Any] = {"mesh": mesh, "local_window_size": 6}
    step = jax.jit(
        lambda cache, query, *new: (c := cache.append(*new, mesh=mesh), cached_attention(query, c, **options))
    )
    start = 0
    for width in (3, 1, 3, 1, 3, 3, 1, 1):
        query = np.random.default_rng(start).standard_normal((2, width, 4, 4)).astype(np.float32)
        new = key[:, start : start + width], value[:, start : start + width]
        (whole, want), (rolls, got) = step(whole, query, *new), step(rolls, query, *new)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
        start += width


def test_a_row_beyond_the_capacity_shows_it():
    cache = KVCache.empty(2, 15, 2, 4, dtype=jnp.float32, num_shards=2)
    mesh = cases.mesh_of(2)
    key, _ = tokens(2, 16)
    grow = jax.jit(lambda cache, key, counts: cache.append(key, key, counts=counts, mesh=mesh))
    full = grow(grow(cache, key, np.array([16, 2])), key, np.array([1, 1]))
    out = cached_attention(np.ones((2, 1, 4, 4), np.float32), full, mesh=mesh)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    with pytest.raises(ValueError, match="key: every row must have room, of a capacity of 16. Got 16 tokens"):
        grow(cache, key, np.array([16, 2])).append(key[:, :1], key[:, :1], mesh=mesh)


@pytest.mark.parametrize(("shards", "capacity"), [(1, 1), (2, 131_107), (3, 40)])
def test_no_device_has_slots_that_kernels_would_copy_for(shards: int, capacity: int):
    """Decoding reads the cache where it lies: for Hopper, in boxes of 8 tokens."""
    empty = lambda **how: jax.eval_shape(lambda: KVCache.empty(1, capacity, 1, 128, num_shards=shards, **how))  # noqa: E731
    for cache in (empty(), empty(local_window_size=11, max_new_tokens=4)):
        assert cache.capacity % (8 * shards) == 0
    assert capacity <= empty().capacity < capacity + 8 * shards
    assert empty(layout="contiguous").capacity < capacity + shards, "as long as the prompts that fill it"


# -------------------------------------------------------------------------------------------------------- what is sent

REDUCTION = re.compile(r"= (\w+)\[([\d,]*)\][^=]* all-reduce(?:-start)?\(")
OTHERS = ("collective-permute", "all-gather", "all-to-all", "reduce-scatter")


def decode(mesh: Any, layout: str = "striped", rows: int = 3) -> tuple[Any, tuple[Any, ...]]:
    """Append one token and attend, as a decoder does; and shapes of its arguments."""
    shards = mesh.shape["sp"]
    make = lambda: KVCache.empty(rows, 64, 2, 8, value_head_dim=4, dtype=jnp.float32, layout=layout, num_shards=shards)  # noqa: E731
    cache = jax.eval_shape(make)
    put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    cache = jax.tree.map(put, cache, cache.specs())
    new = [jax.ShapeDtypeStruct((rows, 1, *rest), jnp.float32) for rest in ((4, 8), (2, 8), (2, 4))]

    def step(cache: Any, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value, mesh=mesh)
        return cached_attention(query, cache, mesh=mesh), cache

    return jax.jit(step, donate_argnums=0), (cache, *new)


@pytest.mark.parametrize(("layout", "rows"), [("striped", 3), ("striped", 2200), ("zigzag", 3)])
def test_decoding_sends_no_key(layout: str, rows: int):
    """B N (Hv + 1) float32 numbers of each rank in one sum, or in a maximum and a sum; the cache written in place."""
    program, shapes = decode(cases.mesh_of(4), layout, rows)
    compiled = program.lower(*shapes).compile()
    text = compiled.as_text()
    assert not [name for name in OTHERS if name in text]
    sizes = [math.prod(map(int, dims.split(","))) for dtype, dims in REDUCTION.findall(text) if dtype == "f32"]
    assert len(sizes) == text.count(" all-reduce(") + text.count(" all-reduce-start(")
    assert sorted(sizes) == ([4 * rows * 4 * (4 + 1)] if rows == 3 else [rows * 4, rows * 4 * (4 + 1)])
    assert compiled.memory_analysis().alias_size_in_bytes >= rows * 16 * 2 * (8 + 4) * 4


def test_whichever_is_less_travels():
    """A chunk that is short beside the cache sends its queries; one as long as the cache has keys sent."""
    mesh = cases.mesh_of(4)

    def sent(queries: int, **options: Any) -> str:
        cache = jax.eval_shape(lambda: KVCache.empty(1, 512, 1, 8, dtype=jnp.float32, num_shards=4))
        query = jax.ShapeDtypeStruct((1, queries, 2, 8), jnp.float32)
        attend = lambda q, c: cached_attention(q, c, mesh=mesh, dealt=True, **options)  # noqa: E731
        return str(jax.make_jaxpr(attend)(query, cache))

    assert "ppermute" not in sent(8) and "all_gather" in sent(8)
    assert "ppermute" in sent(512) and "all_gather" not in sent(512)
    assert "ppermute" in sent(8, travels="keys") and "all_gather" in sent(512, travels="queries")


# ------------------------------------------------------------------------------------------------- meshes and the merge


def test_batch_and_heads_have_axes_of_their_own():
    mesh = jax.make_mesh((2, 2, 2), ("data", "sp", "model"), (AxisType.Auto,) * 3)
    axes: dict[str, Any] = {"mesh": mesh, "batch_axis_name": "data", "head_axis_name": "model"}
    key, value = tokens(2, 12)
    cache = KVCache.empty(2, 16, 2, 4, value_head_dim=3, dtype=jnp.float32, **axes).append(key, value, **axes)
    assert cache.key.sharding.shard_shape(cache.key.shape) == (1, 8, 1, 4)
    query = np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32)
    alone = KVCache.empty(2, 16, 2, 4, value_head_dim=3, dtype=jnp.float32, mesh=cases.mesh_of(1))
    alone = alone.append(key, value, mesh=cases.mesh_of(1))
    want = cached_attention(query, alone, mesh=cases.mesh_of(1))
    np.testing.assert_allclose(cached_attention(query, cache, **axes), want, rtol=2e-6, atol=2e-6)


def test_explicit_axes():
    mesh = jax.make_mesh((4,), ("sp",), (AxisType.Explicit,), devices=jax.devices()[:4])
    key, value = tokens(2, 12)
    with jax.set_mesh(mesh):
        cache = KVCache.empty(2, 16, 2, 4, value_head_dim=3, dtype=jnp.float32, mesh=mesh).append(key, value)
        got = cached_attention(jnp.asarray(np.ones((2, 1, 4, 4), np.float32)), cache)
    alone = KVCache.empty(2, 16, 2, 4, value_head_dim=3, dtype=jnp.float32, mesh=cases.mesh_of(1))
    alone = alone.append(key, value, mesh=cases.mesh_of(1))
    want = cached_attention(np.ones((2, 1, 4, 4), np.float32), alone, mesh=cases.mesh_of(1))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_inside_shard_map_the_result_is_typed_as_the_same_everywhere():
    mesh = cases.mesh_of(4)
    key, value = tokens(2, 12)
    cache = KVCache.empty(2, 16, 2, 4, value_head_dim=3, dtype=jnp.float32, mesh=mesh)
    query = np.random.default_rng(2).standard_normal((2, 1, 4, 4)).astype(np.float32)

    def step(cache: Any, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value)
        return cached_attention(query, cache), cache

    specs = cache.specs()
    inside = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, P(), P(), P()), out_specs=(P(), specs)))
    got, grown = inside(cache, query, key, value)
    want = cached_attention(query, cache.append(key, value, mesh=mesh), mesh=mesh)
    np.testing.assert_array_equal(got, want)
    assert grown.lengths.tolist() == [12, 12]


@pytest.mark.parametrize("rows", [2, 2000])
def test_merging_over_an_axis_is_merging_partials(rows: int):
    """Values and gradients, with a rank and a row that attend to nothing, under check_vma; in one sum and in two."""
    assert (4 * rows * 3 * (5 + 1) > exchange._FEW) == (rows == 2000)
    rng = np.random.default_rng(0)
    out = rng.standard_normal((4, rows, 3, 5)).astype(np.float32)
    lse = (40 * rng.standard_normal((4, rows, 3))).astype(np.float32)
    lse[1], lse[:, 0, 1] = -np.inf, -np.inf
    mesh = cases.mesh_of(4)

    @jax.jit
    def over_axis(out: Any, lse: Any) -> Any:
        merge = lambda out, lse: ringjax.merge_over_axis(out[0], lse[0], "sp")  # noqa: E731
        return jax.shard_map(merge, mesh=mesh, in_specs=P("sp"), out_specs=P())(out, lse)

    one_by_one = jax.jit(lambda out, lse: ringjax.merge_partials(list(zip(out, lse, strict=True))))
    (got, pull), (want, pull_want) = jax.vjp(over_axis, out, lse), jax.vjp(one_by_one, out, lse)
    cotangents = tuple(rng.standard_normal(x.shape).astype(np.float32) for x in want)
    for x, y in zip((*got, *pull(cotangents)), (*want, *pull_want(cotangents)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 2000])
def test_sinks_count_once(rows: int):
    """In float64: lse = log(sum_r exp(lse_r) + exp(sink)), out = sum_r exp(lse_r - lse) out_r."""
    rng = np.random.default_rng(1)
    out, lse, sinks = (3 * rng.standard_normal(shape) for shape in ((4, rows, 3, 5), (4, rows, 3), (3,)))
    merge = lambda out, lse, sinks: exchange.merge_ranks(out[0], lse[0], "sp", sinks=sinks)  # noqa: E731
    specs = {"in_specs": (P("sp"), P("sp"), P()), "out_specs": P()}
    over_axis = jax.jit(jax.shard_map(merge, mesh=cases.mesh_of(4), **specs))
    got = over_axis(*(x.astype(np.float32) for x in (out, lse, sinks)))
    total = np.log(np.exp(lse).sum(0) + np.exp(sinks))
    want = (np.exp(lse - total)[..., None] * out).sum(0), total
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


def small(**options: Any) -> KVCache:
    return KVCache.empty(2, 16, 2, 4, dtype=jnp.float32, **{"num_shards": 2, **options})


QUERY = np.ones((2, 1, 4, 4), np.float32)
WRONG: dict[str, tuple[Any, str]] = {
    "capacity": (lambda: KVCache.empty(2, 0, 2, 4), "capacity must be a positive integer. Got 0"),
    "layout": (lambda: KVCache.empty(2, 8, 2, 4, layout="spiral"), "layout must be one of .* Got 'spiral'"),
    "shards": (lambda: small(mesh=cases.mesh_of(4)), "num_shards must be 4, the size of 'sp'. Got 2"),
    "another ring": (
        lambda: cached_attention(QUERY, small(), mesh=cases.mesh_of(4)), "axis 'sp' must have 2 devices, .* Got 4"
    ),
    "no mesh": (lambda: cached_attention(QUERY, small()), "axis_name 'sp' must be an axis of a mesh"),
    "no cache": (lambda: cached_attention(QUERY, {}), "cache must be a ringjax.KVCache. Got dict"),
    "dtype": (
        lambda: cached_attention(QUERY.astype(np.float16), small(), mesh=cases.mesh_of(2)), "must have one dtype"
    ),
    "counts": (
        lambda: cached_attention(QUERY, small(), counts=np.ones(3, int), mesh=cases.mesh_of(2)),
        r"counts must have shape \[B\] = \(2,\). Got \(3,\)",
    ),
    "travels": (
        lambda: cached_attention(QUERY, small(), travels="keys", mesh=cases.mesh_of(2)), "travels .*unless dealt"
    ),
    "dealt": (
        lambda: cached_attention(QUERY, small(), dealt=True, mesh=cases.mesh_of(2)),
        "query: dealt over 2 ranks the length must be a multiple of 2 .* Got 1",
    ),
    "new tokens": (
        lambda: small().append(QUERY, QUERY, mesh=cases.mesh_of(2)),
        r"append: key must have shape \[2, T, 2, 4\]. Got \(2, 1, 4, 4\)",
    ),
    "a long prompt": (
        lambda: small().fill(*[np.ones((2, 18, 2, 4), np.float32)] * 2, mesh=cases.mesh_of(2)),
        "key: a prompt must fit the 16 slots. Got 18 tokens",
    ),
    "a prompt in another layout": (
        lambda: small(layout="zigzag").fill(*[np.ones((2, 8, 2, 4), np.float32)] * 2, mesh=cases.mesh_of(2)),
        "takes prompts of 16 tokens, its slots. Got 8",
    ),
    "a window that is not kept": (
        lambda: cached_attention(QUERY, small(local_window_size=3), local_window_size=16, mesh=cases.mesh_of(2)),
        "local_window_size: a cache that rolls must have slots .* Got 16 slots, local_window_size=16",
    ),
    "merge outside": (
        lambda: ringjax.merge_over_axis(np.ones((2, 3)), np.ones(2), "sp"), "axis_name must be an axis of the shard_map"
    ),
    "merge of other shapes": (
        lambda: ringjax.merge_over_axis(np.ones((2, 3)), np.ones(3), "sp"), "lse must have the shape of out without"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
