"""Every implementation x feature x layout x ring size against the float64 oracle: out, lse and all gradients."""

from __future__ import annotations

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax

everywhere = pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("implementation", "layout", "num_shards"),
    [(kernel, *ring) for kernel in cases.IMPLEMENTATIONS for ring in cases.rings(kernel)],
)
@pytest.mark.parametrize("name", cases.BY_NAME)
def test_matrix(implementation: str, name: str, layout: str, num_shards: int) -> None:
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=num_shards, implementation=implementation)
    cases.assert_matches(case, inputs, result)


@everywhere
@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["causal_gqa", "everything"])
def test_half_precision(implementation: str, name: str, dtype: type, num_shards: int) -> None:
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case, dtype)
    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=num_shards, implementation=implementation)
    cases.assert_matches(case, inputs, result)


@everywhere
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", ["causal_gqa", "everything"])
def test_float64(implementation: str, name: str, layout: str) -> None:
    case = cases.BY_NAME[name]
    with jax.enable_x64(True):
        inputs = cases.make_inputs(case, jnp.float64)
        if implementation != "xla":  # no Pallas kernel has float64
            with pytest.raises(NotImplementedError, match=f"'{implementation}' takes float32.* Got float64"):
                cases.run_ring(case, inputs, layout=layout, num_shards=3, implementation=implementation)
            return
        result = cases.run_ring(case, inputs, layout=layout, num_shards=3, implementation=implementation)
        cases.assert_matches(case, inputs, result)
    # A float32 step anywhere would pass the rule above only if the dense reference had one too.
    worst, _ = cases.errors(result.values["out"], cases.run_oracle(case, inputs)["out"])
    assert worst < 1e-13


@everywhere
@pytest.mark.parametrize("stripe", [2, 5])
def test_wide_stripes(implementation: str, stripe: int) -> None:
    case = cases.BY_NAME["everything"]
    inputs = cases.make_inputs(case)
    layout = ringjax.Striped(stripe=stripe)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=4, implementation=implementation)
    cases.assert_matches(case, inputs, result)


@everywhere
@pytest.mark.parametrize("num_shards", [1, 5])
def test_default_blocks(implementation: str, num_shards: int) -> None:
    # The user who tunes nothing: block sizes are then the implementation's own choice.
    case = cases.BY_NAME["causal_cross_soft_cap"]
    inputs = cases.make_inputs(case)
    result = cases.run_ring(
        case,
        inputs,
        num_shards=num_shards,
        implementation=implementation,
        block_q=None,
        block_kv=None,
    )
    cases.assert_matches(case, inputs, result)


@everywhere
def test_uneven_blocks(implementation: str) -> None:
    # Neither block divides the shard, and the key block is larger than a whole shard.
    case = cases.BY_NAME["causal_segments"]
    inputs = cases.make_inputs(case)
    result = cases.run_ring(
        case,
        inputs,
        layout="striped",
        num_shards=3,
        implementation=implementation,
        block_q=5,
        block_kv=32,
    )
    cases.assert_matches(case, inputs, result)


@everywhere
@pytest.mark.parametrize("window", [None, (6, 0), (0, 9)])
def test_sentinel_positions(implementation: str, window: tuple[int, int] | None) -> None:
    # Padding is often marked by the largest or smallest integer: a difference of the two does not fit int32.
    case = cases.Case("sentinels", is_causal=window is None, window=window, positions="pair", num_heads=2)
    inputs = cases.make_inputs(case)
    limits = np.iinfo(np.int32)
    query, key = (x - np.int32(20) for x in inputs.masks["positions"])
    query[:, ::7], query[:, 1::7] = limits.max, limits.min
    key[:, ::5], key[:, 1::5] = limits.min, limits.max
    inputs = cases.Inputs(inputs.arrays, {"positions": (query, key)})
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, num_shards=2, implementation=implementation))


@everywhere
@pytest.mark.parametrize("unroll", [None, 2, 8])
def test_loops_and_unrolled_hops(implementation: str, unroll: int | None) -> None:
    # Three hops to either side: two strands, each with a loop of its own unless it is unrolled.
    case = cases.Case("both ways", window=16, num_heads=2, sinks=True)
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, num_shards=8, implementation=implementation, unroll=unroll)
    cases.assert_matches(case, inputs, result)


@everywhere
def test_sixteen_bit_gradients_on_the_wire(implementation: str) -> None:
    # Asked for, so allowed to cost: one rounding of dK and dV a hop, and of nothing else.
    case = cases.BY_NAME["causal_gqa"]
    inputs = cases.make_inputs(case, jnp.bfloat16)
    truth = cases.run_oracle(case, inputs)
    run = functools.partial(cases.run_ring, case, inputs, num_shards=4, implementation=implementation)
    wide, narrow = run(), run(dkv_dtype="bfloat16")
    for name, want in truth.items():
        if name in ("dkey", "dvalue"):
            worst, _ = cases.errors(narrow.values[name], want)
            assert worst <= 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(want).max()
            assert (narrow.values[name] != wide.values[name]).any()
        else:
            np.testing.assert_array_equal(narrow.values[name], wide.values[name])


@functools.cache
def _bfloat16_rms(implementation: str, is_causal: bool, num_shards: int) -> dict[str, float]:
    case = cases.Case("precision", 256, 256, 4, 2, 16, 16, is_causal=is_causal)
    inputs = cases.make_inputs(case, jnp.bfloat16)
    truth = cases.run_oracle(case, inputs)
    result = cases.run_ring(
        case,
        inputs,
        layout="zigzag",
        num_shards=num_shards,
        implementation=implementation,
        block_q=32,
        block_kv=32,
    )
    return {name: cases.errors(result.values[name], truth[name])[1] for name in truth}


@everywhere
@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_error_does_not_grow_with_the_ring(implementation: str, is_causal: bool) -> None:
    one = _bfloat16_rms(implementation, is_causal, 1)
    eight = _bfloat16_rms(implementation, is_causal, 8)
    for name in one:
        assert eight[name] <= 1.1 * one[name], f"{name}: {eight[name]:.3g} against {one[name]:.3g}"


@everywhere
@pytest.mark.parametrize("name", ["causal_gqa", "causal_window_sinks", "lengths"])
def test_same_bits_on_two_runs(implementation: str, name: str) -> None:
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case, jnp.bfloat16)
    program = cases.ring_program(case, layout="zigzag", num_shards=8, implementation=implementation)
    first, second = (cases.run_ring(case, inputs, layout="zigzag", num_shards=8, program=program) for _ in range(2))
    for what, value in first.values.items():
        np.testing.assert_array_equal(value, second.values[what], err_msg=what)


@everywhere
def test_extreme_scale(implementation: str) -> None:
    # Logits of +-1e4: exp overflows unless every merge subtracts the running maximum first.
    case = cases.Case("extreme", 40, 40, 2, 1, 8, 8, is_causal=True, scale=1.0, sinks=True)
    drawn = cases.make_inputs(case)
    arrays = dict(drawn.arrays)
    logits = np.einsum("btnh,bsnh->bnts", drawn.arrays["query"], drawn.arrays["key"][:, :, [0, 0]])
    arrays["query"] = arrays["query"] * np.float32(1e4 / np.abs(logits).max())
    arrays["sinks"] = np.array([9e3, -1e4], np.float32)
    inputs = cases.Inputs(arrays, drawn.masks)
    for num_shards in (1, 4):
        result = cases.run_ring(case, inputs, num_shards=num_shards, implementation=implementation)
        cases.assert_matches(case, inputs, result)
