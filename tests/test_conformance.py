"""Every kernel, feature, layout and ring size against the float64 oracle: out, lse and all gradients."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import poison
import profiles
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import ringjax

everywhere = pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
CELLS = [cell for name in cases.IMPLEMENTATIONS for cell in profiles.matrix(cases.PROFILES[name], tuple(cases.BY_NAME))]


def every(what: str, of_ring: tuple[Any, ...], of_kernel: tuple[Any, ...]) -> Any:
    """Values on XLA's kernel, for what the ring makes of them, and on interpreted kernels, which compile for long."""
    values = [(name, x) for name in cases.IMPLEMENTATIONS for x in (of_ring if name == "xla" else of_kernel)]
    return pytest.mark.parametrize(("implementation", what), values)


def in_words(cell: profiles.Cell) -> str:
    words = (cell.implementation, cell.feature, cell.layout, str(cell.num_shards))
    return "-".join((*words, "as users compile") if cell.as_users else words)


def of_cells(*features: str) -> Any:
    """The cells of these features: the README's command has what users compile; a later JAX has the largest rings of
    XLA's kernel, and every feature on one of the kernels that it interprets, in turn, with few optimisations."""

    def marks(number: int, x: profiles.Cell) -> list[Any]:
        breadth = [] if x.as_users else [pytest.mark.breadth]
        later = x.num_shards == max(cases.NUM_SHARDS) if x.implementation == "xla" else number % 2
        return breadth if later else [*breadth, pytest.mark.once]

    cells = [pytest.param(x, id=in_words(x), marks=marks(n, x)) for n, x in enumerate(CELLS) if x.feature in features]
    return pytest.mark.parametrize("cell", cells)


@of_cells(*cases.BY_NAME)
def test_matrix(cell: profiles.Cell) -> None:
    case = cases.BY_NAME[cell.feature]
    inputs = cases.make_inputs(case)
    ring = dict(layout=cell.layout, num_shards=cell.num_shards)
    result = cases.run_ring(case, inputs, implementation=cell.implementation, as_users=cell.as_users, **ring)
    cases.assert_matches(case, inputs, result, as_users=cell.as_users)


@of_cells(*(name for name, case in cases.BY_NAME.items() if poison.hidden_keys(case)[1].any()))
def test_keys_that_nobody_attends(cell: profiles.Cell) -> None:
    """NaN and Inf in them reach nothing: the matrix' own programs, run once more."""
    ring = dict(layout=cell.layout, num_shards=cell.num_shards, implementation=cell.implementation)
    poison.check_hidden_keys(cases.BY_NAME[cell.feature], as_users=cell.as_users, **ring)


def test_the_matrix_holds_every_pair() -> None:
    pairs = lambda *fields: {tuple(getattr(cell, field) for field in fields) for cell in CELLS}  # noqa: E731
    product = lambda *of: set(itertools.product(*of))  # noqa: E731
    assert pairs("implementation", "feature") == product(cases.IMPLEMENTATIONS, cases.BY_NAME)
    assert pairs("feature", "layout") == product(cases.BY_NAME, cases.LAYOUTS)
    assert pairs("layout", "num_shards") == product(cases.LAYOUTS, cases.NUM_SHARDS)
    assert pairs("implementation", "layout") == product(cases.IMPLEMENTATIONS, cases.LAYOUTS)
    for field in ("implementation", "feature", "layout", "num_shards"):
        assert pairs(field, "as_users") >= {(*value, True) for value in pairs(field)}


@pytest.mark.parametrize(
    ("implementation", "name", "dtype", "size"),
    [
        (implementation, name, dtype, size)
        for number, implementation in enumerate(cases.IMPLEMENTATIONS)
        for name, dtype, size in (
            (("causal_gqa", jnp.bfloat16, 4), ("everything", jnp.float16, 1)),
            (("causal_gqa", jnp.float16, 1), ("everything", jnp.bfloat16, 4)),
        )[number % 2]
    ],
)
def test_half_precision_and_the_same_bits_on_two_runs(implementation: str, name: str, dtype: type, size: int) -> None:
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case, dtype)
    num_shards = min(size, cases.PROFILES[implementation].largest)
    ring = dict(layout="zigzag", num_shards=num_shards, implementation=implementation)
    first, second = (cases.run_ring(case, inputs, **ring) for _ in range(2))
    cases.assert_matches(case, inputs, first)
    for what, value in first.values.items():
        np.testing.assert_array_equal(value, second.values[what], err_msg=what)


@everywhere
@pytest.mark.parametrize(("name", "layout"), [("causal_gqa", "zigzag"), ("everything", "striped")])
def test_float64(implementation: str, name: str, layout: str) -> None:
    case = cases.BY_NAME[name]
    with jax.enable_x64(True):
        inputs = cases.make_inputs(case, jnp.float64)
        if not cases.PROFILES[implementation].takes(jnp.dtype(jnp.float64)):
            with pytest.raises(NotImplementedError, match=f"'{implementation}' takes float32.* Got float64"):
                cases.run_ring(case, inputs, layout=layout, num_shards=3, implementation=implementation)
            return
        result = cases.run_ring(case, inputs, layout=layout, num_shards=3, implementation=implementation)
        cases.assert_matches(case, inputs, result)
    # A float32 step anywhere would pass the rule above only if the dense reference had one too.
    worst, _ = cases.errors(result.values["out"], cases.run_oracle(case, inputs)["out"])
    assert worst < 1e-13


@every("stripe", (2,), (5,))
def test_wide_stripes(implementation: str, stripe: int) -> None:
    case = cases.Case(
        "stripes", 51, 51, is_causal=True, window=(20, 0), key_lengths=(37, 51), segments="one", num_heads=2
    )
    inputs = cases.make_inputs(case)
    layout, num_shards = ringjax.Striped(stripe=stripe), min(4, cases.PROFILES[implementation].largest)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=num_shards, implementation=implementation)
    cases.assert_matches(case, inputs, result)


@every("num_shards", (1, 5), (3,))
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


@every("window", (None, (6, 0), (0, 9)), (None, (6, 9)))
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


@every("unroll", (None, 2, 8), (None,))
def test_loops_and_unrolled_hops(implementation: str, unroll: int | None) -> None:
    # Three hops to either side: two strands, each with a loop of its own unless it is unrolled.
    case = cases.Case("both ways", window=16, num_heads=2, sinks=True)
    inputs = cases.make_inputs(case)
    num_shards = 8 if implementation == "xla" else 4
    result = cases.run_ring(case, inputs, num_shards=num_shards, implementation=implementation, unroll=unroll)
    cases.assert_matches(case, inputs, result)


@everywhere
def test_sixteen_bit_gradients_on_the_wire(implementation: str) -> None:
    # Asked for, so allowed to cost: one rounding of dK and dV a hop, and of nothing else.
    case = cases.BY_NAME["causal_gqa"]
    inputs = cases.make_inputs(case, jnp.bfloat16)
    truth = cases.run_oracle(case, inputs)
    ring = dict(layout="zigzag", num_shards=4 if implementation == "xla" else 2, implementation=implementation)
    run = functools.partial(cases.run_ring, case, inputs, **ring)
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


@every("is_causal", (False,), (True,))
def test_bfloat16_error_does_not_grow_with_the_ring(implementation: str, is_causal: bool) -> None:
    largest = 8 if implementation == "xla" else 2
    one = _bfloat16_rms(implementation, is_causal, 1)
    many = _bfloat16_rms(implementation, is_causal, largest)
    for name in one:
        assert many[name] <= 1.1 * one[name], f"{name}: {many[name]:.3g} against {one[name]:.3g}"


@every("num_shards", (1, 4), (2,))
def test_extreme_scale(implementation: str, num_shards: int) -> None:
    # Logits of +-1e4: exp overflows unless every merge subtracts the running maximum first.
    case = cases.Case("extreme", 40, 40, 2, 1, 8, 8, is_causal=True, scale=1.0, sinks=True)
    drawn = cases.make_inputs(case)
    arrays = dict(drawn.arrays)
    logits = np.einsum("btnh,bsnh->bnts", drawn.arrays["query"], drawn.arrays["key"][:, :, [0, 0]])
    arrays["query"] = arrays["query"] * np.float32(1e4 / np.abs(logits).max())
    arrays["sinks"] = np.array([9e3, -1e4], np.float32)
    inputs = cases.Inputs(arrays, drawn.masks)
    result = cases.run_ring(case, inputs, num_shards=num_shards, implementation=implementation)
    cases.assert_matches(case, inputs, result)


@every("scale", (-0.4, 0.0), (-0.4, 0.0, 1e-30))
def test_scales_that_are_no_ordinary_ones(implementation: str, scale: float) -> None:
    case = cases.Case("scale", 40, 40, is_causal=True, scale=scale, num_heads=2, segments="one", sinks=True)
    inputs = cases.make_inputs(case)
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, num_shards=1, implementation=implementation))


def test_head_sizes_and_lengths_that_no_tile_divides() -> None:
    case = cases.Case("ragged", 37, 45, 6, 2, 20, 12, is_causal=True, sinks=True)
    inputs = cases.make_inputs(case)
    for implementation in cases.IMPLEMENTATIONS:
        blocks = dict(block_q=16, block_kv=32)
        result = cases.run_ring(case, inputs, num_shards=1, implementation=implementation, **blocks)
        cases.assert_matches(case, inputs, result)


# --- kernels of which no interpreter runs all ------------------------------------------------------------------------

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
# A ring of two has twice the kernels: two of them are lowered, and every carry in tests/test_mosaic_forward.py.
LOWERED = [cell._replace(num_shards=cell.num_shards if cell.feature in ("causal_gqa", "everything") else 1)
           for profile in cases.PROFILES.values() if profile.on_cpu == "lowered"
           for cell in profiles.matrix(profile, tuple(cases.BY_NAME))]  # fmt: skip


@pytest.mark.parametrize("cell", LOWERED, ids=in_words)
def test_lowers_for_a_gpu(cell: profiles.Cell) -> None:
    """Both passes on stacked shards; what they compute is for tests/test_gpu.py, which has the same features."""
    case = dataclasses.replace(cases.BY_NAME[cell.feature], head_size=64, value_size=64, query_length=96, key_length=96)
    inputs = cases.make_inputs(case, jnp.bfloat16)
    config = ringjax.RingConfig(implementation=cell.implementation)
    ring = dict(layout=cell.layout, num_shards=cell.num_shards)
    program, arrays = cases.stacked_program(case, inputs, config, **ring)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = program.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "ringjax_forward" in text and "ringjax_backward" in text and "collective_permute" not in text
