"""An offset that all logits share costs no digits: at most twice dense attention's error, compiled as users compile.

Softmax does not see the offset, but rounding does. Backward recomputes a logit, and what it rounds otherwise than
forward did is as large as the last digit of the offset, while the difference of two logits stays small.
"""

from __future__ import annotations

from typing import Any

import cases
import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

OFFSETS = (0.0, 50.0, 500.0, 9000.0, 1e4)
FIRST = ((jnp.float32, 500.0), (jnp.float32, 9000.0))  # of both rounds of tests the first has these alone
# No power of two is the scale of heads of 8 and of 128.
PLAIN = cases.Case("plain", 48, 48, 2, 1, 8, 8)
CASES = {
    "plain": PLAIN,
    "causal, grouped": cases.Case("causal, grouped", 40, 48, 4, 2, 8, 8, is_causal=True),
    # Many heads: the gradient of a sink is one number per head, whose error is that of a sum, and two say little.
    "windows and segments": cases.Case(
        "windows and segments", 48, 48, 32, 4, 8, 8, window=(20, 9), segments="one", sinks=True
    ),
    "heads of 128": cases.Case("heads of 128", 32, 48, 2, 1, 128, 16, is_causal=True),
    "soft cap": cases.Case("soft cap", 48, 48, 2, 1, 8, 8, soft_cap=3e4),
}


def check(case: cases.Case, dtype: Any, offset: float, seed: int = 0, **ring: Any) -> None:
    inputs = cases.with_offset(case, cases.make_inputs(case, dtype, seed), offset)
    program = cases.ring_program(case, as_users=True, **ring)
    result = cases.run_ring(case, inputs, layout=ring["layout"], num_shards=ring["num_shards"], program=program)
    cases.assert_matches(case, inputs, result, as_users=True)


ON_XLA = [
    (name, dtype, "xla", ring)
    for name, ring in zip(
        CASES, [("contiguous", 2), ("zigzag", 4), ("striped", 3), ("contiguous", 1), ("zigzag", 2)], strict=True
    )
    for dtype in (jnp.float32, jnp.bfloat16)
    if dtype == jnp.float32 or name in ("plain", "windows and segments")
]
INTERPRETED = [
    (name, dtype, kernel, ring)
    for kernel in cases.IMPLEMENTATIONS
    if kernel != "xla"
    for name, dtype, ring in (
        ("plain", jnp.float32, ("contiguous", 2)),
        ("heads of 128", jnp.float32, ("contiguous", 1)),
        ("windows and segments", jnp.float32, ("striped", 2)),
        ("causal, grouped", jnp.bfloat16, ("zigzag", 1)),
        ("soft cap", jnp.float32, ("contiguous", 1)),
    )
]


def in_words(x: Any) -> str | None:
    """Part of a test's name."""
    if isinstance(x, tuple):
        return "-".join(map(str, x))
    return None if isinstance(x, (str, float)) else jnp.dtype(x).name


@pytest.mark.parametrize(
    ("name", "dtype", "implementation", "ring", "offset"),
    [
        pytest.param(name, dtype, *where, offset, marks=() if (dtype, offset) in FIRST else pytest.mark.breadth)
        for name, dtype, *where in ON_XLA + INTERPRETED
        for offset in OFFSETS
    ],
    ids=in_words,
)
def test_at_most_twice_the_error_of_dense_attention(
    name: str, dtype: Any, implementation: str, ring: tuple[str, int], offset: float
) -> None:
    check(CASES[name], dtype, offset, layout=ring[0], num_shards=ring[1], implementation=implementation)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@hypothesis.given(offset=st.floats(0, 1e4, width=32), seed=st.integers(0, 2**16))
def test_any_offset(implementation: str, offset: float, seed: int) -> None:
    check(PLAIN, jnp.float32, offset, seed, layout="contiguous", num_shards=2, implementation=implementation)
