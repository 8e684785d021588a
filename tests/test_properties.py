"""Property tests: shapes, masks, layouts and ring sizes that nobody thought of, against the oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import ringjax

everywhere = pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)

layouts = st.sampled_from(("contiguous", "zigzag", "striped", ringjax.Striped(stripe=2), ringjax.Striped(stripe=5)))
windows = st.one_of(st.none(), st.integers(0, 40), st.tuples(st.integers(0, 20), st.integers(0, 20)))


@st.composite
def problems(draw: Any) -> cases.Case:
    """Any problem at all, small."""
    kv_heads = draw(st.integers(1, 2))
    t = draw(st.integers(1, 40))
    square = draw(st.booleans())
    s = t if square else draw(st.integers(1, 40))
    batch = draw(st.integers(1, 2))
    lengths = lambda n: st.one_of(st.none(), st.tuples(*[st.integers(0, n + 2)] * batch))  # noqa: E731
    return cases.Case(
        "drawn",
        t,
        s,
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        is_causal=draw(st.booleans()),
        window=draw(windows),
        soft_cap=draw(st.sampled_from((None, 3.0))),
        query_lengths=draw(lengths(t)),
        key_lengths=draw(lengths(s)),
        segments=draw(st.sampled_from((None, "one", "pair") if square else (None, "pair"))),
        positions=draw(st.sampled_from((None, "one", "batch", "pair") if square else (None, "pair"))),
        sinks=draw(st.booleans()),
        batch=batch,
    )


# A kernel and a ring that it runs on; half of them XLA's.
kernels = st.one_of(
    st.tuples(st.just("xla"), st.sampled_from((1, 2, 3, 4, 5, 8))),
    st.tuples(st.sampled_from(cases.IMPLEMENTATIONS), st.sampled_from((1, 2, 3))),
)


ANY: dict[str, Any] = {
    "kernel": kernels,
    "case": problems(),
    "layout": layouts,
    "blocks": st.tuples(st.integers(1, 12), st.integers(1, 12)),
    "seed": st.integers(0, 2**16),
}


@hypothesis.settings(max_examples=5)
@hypothesis.given(**ANY)
def test_any_problem(kernel: Any, case: Any, layout: Any, blocks: Any, seed: int) -> None:
    check(kernel, case, layout, blocks, seed)


@hypothesis.settings(max_examples=5)
@hypothesis.given(**ANY)
def test_any_other_problem(kernel: Any, case: Any, layout: Any, blocks: Any, seed: int) -> None:
    """Examples follow from a test's name: these are others."""
    check(kernel, case, layout, blocks, seed)


def check(kernel: tuple[str, int], case: cases.Case, layout: Any, blocks: tuple[int, int], seed: int) -> None:
    implementation, num_shards = kernel
    inputs = cases.make_inputs(case, seed=seed)
    result = cases.run_ring(
        case,
        inputs,
        layout=layout,
        num_shards=num_shards,
        implementation=implementation,
        block_q=blocks[0],
        block_kv=blocks[1],
    )
    cases.assert_matches(case, inputs, result)


# The masks below are data: one compiled program serves every example, so there can be many.
MASKED = cases.Case(
    "masked",
    22,
    26,
    2,
    1,
    4,
    4,
    is_causal=True,
    window=(9, 0),
    query_lengths=(0, 0),
    key_lengths=(0, 0),
    segments="pair",
    positions="pair",
    sinks=True,
)


def _masked_program(implementation: str, layout: Any, num_shards: int) -> Any:
    return cases.ring_program(
        MASKED,
        layout=layout,
        num_shards=num_shards,
        implementation=implementation,
        block_q=3,
        block_kv=4,
    )


def integers(low: int, high: int, length: int) -> Any:
    row = st.lists(st.integers(low, high), min_size=length, max_size=length)
    return st.tuples(row, row).map(lambda rows: np.array(rows, np.int32))


@pytest.mark.parametrize(
    ("implementation", "layout", "num_shards"),
    [("xla", "zigzag", 3), ("xla", "striped", 4), ("pallas_tpu", "zigzag", 3), ("pallas_triton", "striped", 2)],
)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    segments=st.tuples(integers(-1, 2, 22), integers(-1, 2, 26)),
    positions=st.tuples(integers(-20, 20, 22), integers(-20, 20, 26)),
    lengths=st.tuples(*[st.tuples(st.integers(0, 30), st.integers(0, 30))] * 2),
    far=st.sampled_from((0, 10**9, -(10**9))),
)
def test_any_mask(
    implementation: str,
    layout: Any,
    num_shards: int,
    segments: Any,
    positions: Any,
    lengths: Any,
    far: int,
) -> None:
    drawn = cases.make_inputs(MASKED)
    masks = {
        "segment_ids": segments,
        "positions": tuple(x + np.int32(far) for x in positions),
        "query_seq_lengths": np.array(lengths[0], np.int32),
        "key_value_seq_lengths": np.array(lengths[1], np.int32),
    }
    inputs = dataclasses.replace(drawn, masks=masks)
    program = _masked_program(implementation, layout, num_shards)
    result = cases.run_ring(MASKED, inputs, layout=layout, num_shards=num_shards, program=program)
    cases.assert_matches(MASKED, inputs, result)


@everywhere
@hypothesis.settings(max_examples=15)
@hypothesis.given(size=st.sampled_from((1e-30, 1e-3, 1.0, 1e2, 1e4)), seed=st.integers(0, 2**16))
def test_any_magnitude(implementation: str, size: float, seed: int) -> None:
    # Softmax is shift invariant and its sums are rescaled at every tile: no magnitude may overflow.
    inputs = cases.make_inputs(MASKED, seed=seed)
    arrays = {**inputs.arrays, "query": inputs.arrays["query"] * np.float32(size)}
    arrays["sinks"] = arrays["sinks"] * np.float32(size)
    masks = {
        **inputs.masks,
        "query_seq_lengths": np.array([22, 20], np.int32),
        "key_value_seq_lengths": np.array([26, 25], np.int32),
    }
    inputs = cases.Inputs(arrays, masks)
    layout, num_shards = ("striped", 2) if implementation == "pallas_triton" else ("zigzag", 3)
    program = _masked_program(implementation, layout, num_shards)
    result = cases.run_ring(MASKED, inputs, layout=layout, num_shards=num_shards, program=program)
    # Backward recomputes p = exp(s - lse): a relative error of eps * |lse| that dense attention does not make.
    lse = result.values["lse"]
    largest = float(np.abs(lse[np.isfinite(lse)]).max())
    cases.assert_matches(MASKED, inputs, result, rounding=cases.ROUNDING * (1 + largest))
