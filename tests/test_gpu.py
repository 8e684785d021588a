"""The GPU kernels on a real GPU, every feature against the float64 oracle: JAX_PLATFORMS=cuda pytest tests/test_gpu.py.

A ring of C devices runs on one as `jax.vmap(axis_name="sp")` over stacked shards, collectives included. Without a GPU
the harness itself is tested, on the XLA kernel. Problems are 16 times as long on a GPU as those of the conformance
suite, so that tiles of its size are EMPTY, PARTIAL and FULL.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import Problem
from caches import run as run_cached
from poison import attended, poison, spoilt

import ringjax

ON_GPU = jax.default_backend() == "gpu"
IS_HOPPER = ON_GPU and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
needs_gpu = pytest.mark.skipif(
    not ON_GPU, reason="needs a GPU; on a CPU tests/test_conformance.py holds the same cases"
)
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="Pallas Mosaic GPU needs a Hopper GPU")
# Later JAX versions say so whenever a Triton kernel is lowered.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:On Hopper GPUs attention is slow with JAX 0.12:UserWarning"),
]
BF16, F16, F32 = (jnp.dtype(x) for x in (jnp.bfloat16, jnp.float16, jnp.float32))
FACTOR = 16 if ON_GPU else 4


def enlarged(case: cases.Case, head_size: int) -> cases.Case:
    """The same problem, longer and with heads that a GPU kernel is made for."""
    times = lambda x: None if x is None else tuple(FACTOR * n for n in x) if isinstance(x, tuple) else FACTOR * x  # noqa: E731
    wider = case.value_size > case.head_size and head_size < 256  # no kernel of Mosaic's has longer ones
    return dataclasses.replace(
        case,
        scale=None,  # with longer heads another one would make every softmax a choice of one key
        query_length=FACTOR * case.query_length,
        key_length=FACTOR * case.key_length,
        window=times(case.window),
        query_lengths=times(case.query_lengths),
        key_lengths=times(case.key_lengths),
        head_size=head_size,
        value_size=head_size if case.value_size == case.head_size else head_size + (32 if wider else -16),
    )


def assert_as_good_as_dense(case: cases.Case, inputs: cases.Inputs, result: cases.Result, implementation: str) -> None:
    """The house rule, and for 16-bit inputs the stricter one of the kernel's profile."""
    cases.assert_matches(case, inputs, result)
    dtype = inputs.arrays["query"].dtype
    if dtype.itemsize > 2:
        return
    truth, dense = cases.run_oracle(case, inputs), cases.run_dense(case, inputs)
    for name in ("out", "dquery", "dkey", "dvalue"):
        ours, theirs = (cases.errors(x[name], truth[name])[1] for x in (result.values, dense))
        assert ours <= cases.PROFILES[implementation].half_error * theirs, f"{name}: {ours:.3g} against {theirs:.3g}"


def on_kernels(*cases_and_dtypes: tuple[Any, ...]) -> Any:
    """(..., dtype) on each GPU kernel that takes the dtype; on other machines on XLA's, to test the harness."""
    found = []
    for *what, dtype in cases_and_dtypes:
        marks = {"pallas_triton": needs_gpu, "pallas_gpu": needs_hopper} if ON_GPU else {"xla": ()}
        for implementation, mark in marks.items():
            if not cases.PROFILES[implementation].takes(dtype):
                continue
            name = "-".join(map(str, (*what, implementation, dtype.name)))
            found.append(pytest.param(*what, implementation, dtype, id=name, marks=mark))
    return found


# C = 2, 4 and 8: causal zigzag, windows, packed.
RINGS = [
    ("causal_gqa", "zigzag", 2, BF16),
    ("causal_window_sinks", "zigzag", 2, BF16),
    ("causal_segments", "striped", 4, BF16),
    ("position_pair_window", "striped", 4, BF16),
    ("causal_gqa", "zigzag", 8, BF16),
    ("causal_segments", "zigzag", 8, BF16),
]
# On a CPU it is the harness that is tested, for which two will do.
RINGS = RINGS if ON_GPU else [RINGS[1], RINGS[3]]


@pytest.mark.parametrize(("name", "layout", "num_shards", "implementation", "dtype"), on_kernels(*RINGS))
def test_ring_on_one_device(name: str, layout: str, num_shards: int, implementation: str, dtype: Any) -> None:
    case = enlarged(cases.BY_NAME[name], 64 if num_shards == 4 else 128)
    inputs = cases.make_inputs(case, dtype)
    config = ringjax.RingConfig(implementation=implementation)
    result = cases.stacked_ring(case, inputs, config, layout=layout, num_shards=num_shards)
    assert_as_good_as_dense(case, inputs, result, implementation)


@pytest.mark.skipif(not ON_GPU or len(jax.devices()) < 2, reason="needs two GPUs: collectives between them")
@pytest.mark.parametrize(
    ("name", "layout", "implementation", "dtype"),
    on_kernels(("causal_gqa", "zigzag", BF16), ("causal_segments", "striped", BF16), ("lengths", "contiguous", BF16)),
)
def test_ring_of_two_gpus(name: str, layout: str, implementation: str, dtype: Any) -> None:
    case = enlarged(cases.BY_NAME[name], 128)
    inputs = cases.make_inputs(case, dtype)
    options = dict(interpret=False, block_q=None, block_kv=None)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=2, implementation=implementation, **options)
    assert_as_good_as_dense(case, inputs, result, implementation)


# Shares of the work on two GPUs: words, way round, case, layout.
SHARES = [
    ("ring", "both", "causal_gqa", "zigzag"),
    ("ring", "both", "full_mqa_wide_value", "contiguous"),
    ("ring", "forward", "causal_window_sinks", "contiguous"),
    ("all_to_all", "forward", "causal_gqa", "zigzag"),
    ("all_to_all", "forward", "everything", "striped"),
    ("all_gather", "forward", "causal_segments", "zigzag"),
]


@pytest.mark.skipif(not ON_GPU or len(jax.devices()) < 2, reason="needs two GPUs: collectives between them")
@pytest.mark.parametrize(
    ("strategy", "direction", "name", "layout", "implementation", "dtype"),
    on_kernels(*((*share, BF16) for share in SHARES)),
)
def test_shares_on_two_gpus(
    strategy: str, direction: str, name: str, layout: str, implementation: str, dtype: Any
) -> None:
    case = enlarged(cases.BY_NAME[name], 128)
    if strategy == "all_to_all":
        case = dataclasses.replace(case, num_heads=4)
    inputs = cases.make_inputs(case, dtype)
    options = dict(interpret=False, block_q=None, block_kv=None, strategy=strategy, direction=direction)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=2, implementation=implementation, **options)
    cases.assert_matches(case, inputs, result)


FEATURES = [(name, size, BF16) for name in cases.BY_NAME for size in (64, 128)]
FEATURES += [(name, 128, F16) for name in cases.BY_NAME]
FEATURES += [(name, 64, F32) for name in cases.BY_NAME]
FEATURES += [
    (name, size, BF16) for name in ("full_mqa_wide_value", "causal_gqa", "lengths", "everything") for size in (80, 256)
]


@needs_gpu
@pytest.mark.parametrize(("name", "head_size", "implementation", "dtype"), on_kernels(*FEATURES))
def test_every_feature(name: str, head_size: int, implementation: str, dtype: Any) -> None:
    case = enlarged(cases.BY_NAME[name], head_size)
    inputs = cases.make_inputs(case, dtype)
    result = cases.run_ring(
        case, inputs, num_shards=1, implementation=implementation, interpret=False, block_q=None, block_kv=None
    )
    assert_as_good_as_dense(case, inputs, result, implementation)


@needs_gpu
@pytest.mark.parametrize(
    ("name", "head_size", "implementation", "dtype"),
    on_kernels(
        ("full_mqa_wide_value", 128, BF16), ("causal_gqa", 128, BF16), ("causal_gqa", 128, F16),
        ("causal_gqa", 256, BF16), ("causal_gqa", 64, BF16),
    ),
)  # fmt: skip
@pytest.mark.parametrize("ends", [(0.0, 30.0), (30.0, 0.0), (1.0, 5000.0)])
def test_logits_that_grow_along_the_keys(
    name: str, head_size: int, implementation: str, dtype: Any, ends: tuple[float, float]
) -> None:
    """What is done with the maximum of the tiles before comes out as with the maximum of all, on one device and two."""
    case = enlarged(cases.BY_NAME[name], head_size)
    inputs = cases.make_inputs(case, dtype)
    growth = np.linspace(*ends, case.key_length)[:, None, None]
    inputs = dataclasses.replace(inputs, arrays={**inputs.arrays, "key": (inputs.arrays["key"] * growth).astype(dtype)})
    config = ringjax.RingConfig(implementation=implementation)
    for num_shards in (1, 2):
        result = cases.stacked_ring(case, inputs, config, layout="zigzag", num_shards=num_shards)
        cases.assert_matches(case, inputs, result)


# One token and some, of heads that share keys or not: few enough for the kernel that splits keys, and too many for it.
DECODED = {
    "one token": Problem(shards=1, layout="striped"),
    "one token, window, MQA": Problem(
        shards=1, layout="striped", options=(("window", (600, 0)), ("num_kv_heads", 1), ("sinks", True))
    ),
    "some tokens, rows of fewer": Problem(
        shards=1, layout="striped", queries=4, counts=(0, 3), options=(("sinks", True), ("soft_cap", 1.5))
    ),
    "a chunk": Problem(shards=1, layout="striped", queries=70),
    "two devices": Problem(shards=2, layout="striped", queries=2, options=(("sinks", True),)),
}


@needs_gpu
@pytest.mark.parametrize(
    ("name", "head_size", "implementation", "dtype"),
    on_kernels(*((name, size, BF16) for name in DECODED for size in (64, 128)), ("one token", 256, BF16)),
)
def test_attention_to_a_cache(name: str, head_size: int, implementation: str, dtype: Any) -> None:
    problem = dataclasses.replace(
        DECODED[name], head_size=head_size, capacity_asked=2048, lengths=(1901, 130), implementation=implementation,
        dtype=dtype, config=(("interpret", False), ("block_q", None), ("block_kv", None)),
    )  # fmt: skip
    if problem.shards > len(jax.devices()):
        pytest.skip("needs two GPUs: collectives between them")
    inputs = problem.inputs()
    # Not the stricter rule: each rank rounds its result before they are merged.
    cases.assert_matches(problem.case, inputs, run_cached(problem, inputs, as_users=True))


@needs_hopper
@pytest.mark.parametrize(
    ("head_size", "together", "parts"), [(64, 1, 1), (128, 1, 1), (64, 2, 3), (128, 2, 3), (256, 2, 2), (256, 4, 1)]
)
@pytest.mark.parametrize("name", ["causal_gqa", "causal_segments", "full_mqa_wide_value"])
def test_programs_of_backward(
    monkeypatch: pytest.MonkeyPatch, name: str, head_size: int, together: int, parts: int
) -> None:
    """Side by side or in turn, and of a part of the queries, as long sequences have them."""
    from ringjax.kernels.mosaic import backward_common

    programs = lambda mask, heads, *args, **options: backward_common.Programs(parts, min(together, heads[1]))  # noqa: E731
    monkeypatch.setattr(backward_common, "programs_of", programs)
    case = enlarged(cases.BY_NAME[name], head_size)
    if name == "causal_gqa":
        case = dataclasses.replace(case, num_heads=8, num_kv_heads=4)
    inputs = cases.make_inputs(case, BF16)
    jax.clear_caches()  # the numbers are no part of what JAX compares
    result = cases.stacked_ring(case, inputs, ringjax.RingConfig(), layout="zigzag", num_shards=2)
    jax.clear_caches()
    assert_as_good_as_dense(case, inputs, result, "pallas_gpu")


@needs_hopper
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("name", ["causal_segments", "causal_gqa", "window_cross"])
def test_blocks_draw_unequal_rows(monkeypatch: pytest.MonkeyPatch, name: str, head_size: int) -> None:
    """Of a few blocks of threads, each has many rows, on the first hop and on the last."""
    from ringjax.kernels.mosaic import forward, tiles

    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(forward, "ENOUGH_TILES", 1)
    monkeypatch.setattr(forward, "ENOUGH_ROWS", 1)  # the heads of one K/V head after those of another
    case = enlarged(cases.BY_NAME[name], head_size)
    inputs = cases.make_inputs(case, BF16)
    jax.clear_caches()  # the number is no part of what JAX compares
    result = cases.stacked_ring(case, inputs, ringjax.RingConfig(), layout="zigzag", num_shards=2)
    jax.clear_caches()
    assert_as_good_as_dense(case, inputs, result, "pallas_gpu")


@needs_gpu
@pytest.mark.parametrize(("head_size", "implementation", "dtype"), on_kernels((64, BF16), (128, BF16)))
def test_rows_with_nothing_to_attend_between_others(head_size: int, implementation: str, dtype: Any) -> None:
    """More tiles of queries than multiprocessors, so that a program has some of either kind, on the last hop as well.

    The first sequence has no keys; of a contiguous causal ring every rank but the last sees nothing on its last hop.
    """
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (4, 2, 2048, 16, head_size), jnp.float32)  # noqa: E731
    query, key, value = (draw(seed).astype(dtype) for seed in range(3))

    def attend(config: ringjax.RingConfig) -> Any:
        of_rank = lambda q, k, v: ringjax.ring_attention(  # noqa: E731
            q, k, v, is_causal=True, key_value_seq_lengths=jnp.array([0, 8192], jnp.int32), config=config
        )
        return np.asarray(jax.jit(jax.vmap(of_rank, axis_name="sp"))(query, key, value).astype(jnp.float32))

    ours, theirs = (attend(ringjax.RingConfig(implementation=name)) for name in (implementation, "xla"))
    np.testing.assert_array_equal(ours[:, 0], 0.0)
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], atol=0.02, rtol=0.02)


def on_one_device(case: cases.Case, implementation: str, deterministic: bool) -> Any:
    """inputs -> out, lse and gradients, by one compiled program."""
    options = dict(num_shards=1, layout="contiguous")
    program = cases.ring_program(
        case, implementation=implementation, interpret=False, block_q=None, block_kv=None,
        deterministic=deterministic, **options,
    )  # fmt: skip
    return lambda inputs: cases.run_ring(case, inputs, program=program, **options).values


@needs_gpu
@pytest.mark.parametrize(
    ("head_size", "implementation", "dtype"), on_kernels((64, BF16), (128, BF16), (256, BF16), (128, F32))
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_bad_numbers_reach_only_those_that_attend(
    head_size: int, implementation: str, dtype: Any, deterministic: bool
) -> None:
    """One token is bad, in the middle of a window: in a tile of which some see it and some do not."""
    size = 700
    case = cases.Case("one bad token", size, size, 2, 1, head_size, head_size, is_causal=True, window=(170, 0))
    clean = cases.make_inputs(case, dtype)
    run = on_one_device(case, implementation, deterministic)
    want, sees, token = run(clean), attended(case, clean)[0], 421
    here = np.arange(size)[None] == token
    here = np.concatenate([here, ~here & False])  # of the first sequence alone
    for name in ("key", "value", "query", "dout"):
        queries = sees[:, token] if name in ("key", "value") else here[0]  # that are spoilt
        keys = sees[queries].any(axis=0)
        for got in (run(poison(clean, name, here)), run(spoilt(clean, name, here, np.nan))):
            for what, bad in (
                ("out", queries),
                ("lse", queries),
                ("dquery", queries),
                ("dkey", keys),
                ("dvalue", keys),
            ):
                if what in ("out", "lse") and (name == "dout" or (name, what) == ("value", "lse")):
                    bad = queries & False
                for row, ok in ((0, ~bad), (1, slice(None))):
                    np.testing.assert_allclose(
                        got[what][row][ok], want[what][row][ok], rtol=0.02, atol=0.004, err_msg=f"{what} of {name}"
                    )
        # With NaN throughout, nobody who attends gets a number.
        for what, bad in (("dquery", queries), ("dkey", keys)):
            assert np.isnan(got[what][0][bad]).all(), f"{what} of {name}"


@needs_gpu
@pytest.mark.parametrize(("implementation", "dtype"), on_kernels((BF16,)))
@pytest.mark.parametrize("deterministic", [False, True])
def test_same_bits_on_two_runs(
    monkeypatch: pytest.MonkeyPatch, implementation: str, dtype: Any, deterministic: bool
) -> None:
    """By default all but dq, which Mosaic's backward sums in the order in which its programs arrive."""
    if deterministic and implementation == "pallas_gpu":  # dk and dv in two parts, as of long sequences
        from ringjax.kernels.mosaic import backward_common

        monkeypatch.setattr(backward_common, "_PART", 1)
    case = enlarged(cases.BY_NAME["causal_gqa"], 128)
    inputs = cases.make_inputs(case, dtype)
    run = on_one_device(case, implementation, deterministic)
    first, second = run(inputs), run(inputs)
    for name, value in first.items():
        if name == "dquery" and implementation == "pallas_gpu" and not deterministic:
            continue
        np.testing.assert_array_equal(value, second[name], err_msg=name)
