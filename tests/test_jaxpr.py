"""What the traced program sends and holds: number, dtype and size of every permute, and no array of T x S."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import ringjax

B, T, N, K, H, HV = 2, 64, 4, 2, 8, 12
Shape = jax.ShapeDtypeStruct

# What the ring sends does not depend on the kernel: one of XLA's operations, and one that is opaque.
everywhere = pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])


def shapes(dtype: Any = jnp.bfloat16, length: int = T) -> Any:
    """Query, key, value and sinks."""
    q, k, v = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return (*(Shape(x, dtype) for x in (q, k, v)), Shape((N,), jnp.float32))


def attention(num_shards: int, implementation: str, **options: Any) -> Any:
    config = cases.config_of(implementation, **options.pop("config", {}))
    with_sinks = options.pop("sinks", False)

    def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return ringjax.ring_attention(
            query,
            key,
            value,
            sinks=sinks if with_sinks else None,
            mesh=cases.mesh_of(num_shards),
            return_residual=True,
            config=config,
            **options,
        )

    return attend


def forward(attend: Any, arrays: Any) -> Any:
    return jax.make_jaxpr(attend)(*arrays)


def both(attend: Any, arrays: Any) -> Any:
    """Forward and backward in one program."""

    def run(*args: Any) -> Any:
        result, pull = jax.vjp(attend, *args)
        return result, pull(result)

    return jax.make_jaxpr(run)(*arrays)


def sent(jaxpr: Any, dtype: str) -> dict[tuple[int, ...], int]:
    permutes = jaxprs.float_permutes(jaxpr)
    return {shape: times for (name, shape), times in permutes.items() if name == dtype}


def k_and_v(num_shards: int, times: int, length: int = T) -> dict[tuple[int, ...], int]:
    """K and V, each sent so many times, head-major: K heads and never N."""
    shard = length // num_shards
    return {(B, K, shard, H): times, (B, K, shard, HV): times} if times else {}


# How hops are unrolled is no matter of the kernel.
@pytest.mark.parametrize(("implementation", "unroll"), [("xla", None), ("xla", 2), ("xla", 8), ("pallas_tpu", None)])
@pytest.mark.parametrize("num_shards", cases.NUM_SHARDS)
def test_a_full_ring_rotates_once_less_than_it_has_devices(
    implementation: str, num_shards: int, unroll: int | None
) -> None:
    attend = attention(num_shards, implementation, config={"unroll": unroll})
    length = T if T % num_shards == 0 else 60
    arrays = shapes(length=length)
    pair = functools.partial(k_and_v, num_shards, length=length)

    ahead = forward(attend, arrays)
    assert sent(ahead, "bfloat16") == pair(num_shards - 1)
    assert sent(ahead, "float32") == {}

    # Backward rotates K and V as often again; dK and dV go all the way round in float32, and home as they are returned.
    total = both(attend, arrays)
    assert sent(total, "bfloat16") == pair(2 * (num_shards - 1) + (num_shards > 1))
    assert sent(total, "float32") == pair(num_shards - 1)


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_travel_in_the_dtype_that_was_asked_for(implementation: str, dtype: str) -> None:
    """And home as they are returned, if that is narrower."""
    attend = attention(4, implementation, config={"dkv_dtype": dtype})
    total = both(attend, shapes(jnp.float16))
    narrower = dtype == "float32"
    assert sent(total, "float16") == k_and_v(4, 6 + narrower)
    assert sent(total, dtype) == k_and_v(4, 4 - narrower)
    wide = both(attend, shapes(jnp.float32))
    assert sent(wide, "float32") == k_and_v(4, 10 if narrower else 6)
    assert sent(wide, "bfloat16") == ({} if narrower else k_and_v(4, 4))


def test_float64_travels_as_float64() -> None:
    with jax.enable_x64(True):
        total = both(attention(4, "xla"), shapes(jnp.float64))
    assert jaxprs.float_permutes(total).keys() == {("float64", s) for s in k_and_v(4, 1)}
    assert sent(total, "float64") == k_and_v(4, 6 + 4)


# Rotations of K and V, and of dK and dV, among 8 shards of 8 tokens. The gradient of the own block stays where it is,
# but on a whole ring, with which it sets out. All return home in one rotation.
WINDOWS: dict[str, tuple[dict[str, Any], int, int]] = {
    "own shard": ({"local_window_size": (0, 0)}, 0, 0),
    "one before": ({"local_window_size": (8, 0)}, 1, 1),
    "causal int": ({"local_window_size": 8, "is_causal": True}, 1, 1),
    "just two before": ({"local_window_size": (9, 0)}, 2, 2),
    "one each way": ({"local_window_size": 8}, 2, 2),
    "two before, one after": ({"local_window_size": (9, 3)}, 3, 3),
    "all": ({"local_window_size": (64, 0)}, 7, 8),
    "unbounded": ({"local_window_size": (None, 0)}, 7, 8),
}


@everywhere
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_makes_only_the_hops_it_needs(implementation: str, name: str) -> None:
    options, rotations, gradient_rotations = WINDOWS[name]
    attend = attention(8, implementation, **options)
    assert sent(forward(attend, shapes()), "bfloat16") == k_and_v(8, rotations)
    total = both(attend, shapes())
    narrow = gradient_rotations == 8  # of a whole ring, the last one
    assert sent(total, "bfloat16") == k_and_v(8, 2 * rotations + narrow)
    assert sent(total, "float32") == k_and_v(8, gradient_rotations - narrow)


@everywhere
def test_given_positions_make_every_hop(implementation: str) -> None:
    positions = np.arange(T, dtype=np.int32)
    attend = attention(8, implementation, local_window_size=(0, 0), positions=positions)
    assert sent(forward(attend, shapes()), "bfloat16") == k_and_v(8, 7)


@everywhere
def test_no_integer_travels_that_a_rank_can_compute(implementation: str) -> None:
    lengths = np.full(B, T - 3, np.int32)
    attend = attention(4, implementation, layout="zigzag", is_causal=True, key_value_seq_lengths=lengths)
    sent_integers = [s for s in jaxprs.collectives(both(attend, shapes())) if np.issubdtype(s.dtype, np.integer)]
    assert sent_integers == []


@everywhere
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_nothing_else_goes_over_the_wire(implementation: str, layout: str) -> None:
    # Integers: one segment id per key; positions and lengths follow from the rank. Sums: N numbers, of the sinks.
    segments = np.zeros((B, T), np.int32)
    attend = attention(4, implementation, layout=layout, is_causal=True, segment_ids=segments, sinks=True)
    total = jaxprs.collectives(both(attend, shapes()))
    integers = [s for s in total if np.issubdtype(s.dtype, np.integer)]
    assert all(s.primitive.startswith("ppermute") for s in integers)
    assert all(s.shape == (B, T // 4) for s in integers)
    assert sum(s.times for s in integers) == 2 * 3
    others = [s for s in total if not s.primitive.startswith("ppermute")]
    assert [(s.primitive[:4], s.shape, s.times) for s in others] == [("psum", (N,), 1)]


@everywhere
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "layout": "zigzag"},
        {"local_window_size": 40, "sinks": True},
        {"segment_ids": True, "key_value_seq_lengths": np.array([300], np.int32)},
    ],
    ids=["full", "causal", "window", "segments"],
)
def test_no_score_matrix_and_no_repeated_keys(implementation: str, options: dict[str, Any]) -> None:
    # A device holds 16 queries under 4 heads and 64 keys under one: 256 numbers each, and a tile has as many.
    # Scores or a mask of its queries against one block, or K repeated for the query heads, would be 1024 or more.
    t, s, n, h = 128, 512, 4, 4
    if "segment_ids" in options:
        ids = (np.zeros((1, t), np.int32), np.zeros((1, s), np.int32))
        options = {**options, "segment_ids": ids}
    attend = attention(8, implementation, **options)
    f32 = jnp.float32
    arrays = (Shape((1, t, n, h), f32), *[Shape((1, s, 1, h), f32)] * 2, Shape((n,), f32))
    for jaxpr in (forward(attend, arrays), both(attend, arrays)):
        size, primitive = jaxprs.largest_array(jaxpr)
        assert size == 256, primitive


def test_the_largest_array_would_be_seen() -> None:
    # The measure itself: a dense attention inside shard_map has its score matrix found.
    spec = jax.sharding.PartitionSpec(None, "sp")

    @functools.partial(jax.shard_map, mesh=cases.mesh_of(4), in_specs=(spec, spec), out_specs=spec)
    def dense(q: jax.Array, k: jax.Array) -> jax.Array:
        everything = jax.lax.all_gather(k, "sp", axis=1, tiled=True)
        return jax.nn.softmax(jnp.einsum("bqh,bkh->bqk", q, everything)) @ everything

    x = Shape((1, 64, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(dense)(x, x)
    assert jaxprs.largest_array(jaxpr)[0] == 16 * 64
    (gathered,) = jaxprs.collectives(jaxpr)
    assert gathered.primitive.startswith("all_gather") and gathered.size == 64


@everywhere
def test_the_compiled_program_gathers_nothing(implementation: str) -> None:
    # Partitioning could still insert what the jaxpr does not show.
    sharding = jax.sharding.NamedSharding(cases.mesh_of(4), jax.sharding.PartitionSpec(None, "sp"))
    attend = attention(4, implementation, is_causal=True)
    arrays = [Shape(x.shape, x.dtype, sharding=sharding) for x in shapes()[:3]]

    def gradients(query: Any, key: Any, value: Any) -> Any:
        result, pull = jax.vjp(lambda *x: attend(*x, None), query, key, value)
        return pull(result)

    text = jax.jit(gradients).lower(*arrays).compile().as_text()
    assert "collective-permute" in text
    for word in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"):
        assert word not in text


@everywhere
@pytest.mark.parametrize("name", ["causal_gqa", "everything"])
def test_the_forward_of_the_vjp_is_the_primal(implementation: str, name: str) -> None:
    # Defaults filled in below custom_vjp would be seen by one of the two only.
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case)
    x = inputs.arrays
    arrays = (x["query"], x["key"], x["value"], x.get("sinks"))
    options = dict(case.static_options(), **inputs.masks, return_residual=True)
    attend = lambda q, k, v, s: ringjax.ring_attention(  # noqa: E731
        q,
        k,
        v,
        sinks=s,
        mesh=cases.mesh_of(4),
        layout="zigzag",
        config=cases.config_of(implementation),
        **options,
    )
    primal = jax.jit(attend)(*arrays)
    under_vjp = jax.jit(lambda *a: jax.vjp(attend, *a)[0])(*arrays)
    jax.tree.map(np.testing.assert_array_equal, primal, under_vjp)
