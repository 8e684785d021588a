"""Masks: the predicate against the oracle's, whatever each side's tokens are known by."""

from __future__ import annotations

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from ringjax.layout import Contiguous, Layout, Runs, Striped, Zigzag
from ringjax.mask import Mask, Rule, SideRule, Tokens, Vectors, attends, window

# One set of shapes, so that the many examples below share their compiled operations.
BATCH, T, S, SHARDS = 2, 12, 20, 3
BOUNDS = ((None, None), (None, 0), (0, 0), (4, 0), (2, 3), (None, 2), (1, None))
LAYOUTS = (Contiguous(), Zigzag(), Striped(), Striped(2))


def as_int(x: Any) -> Any:
    return jnp.asarray(x, jnp.int32)


def traced(runs: Runs) -> Runs:
    """As in a ring, where the rank is not known before run time."""
    return jax.tree.map(as_int, runs)


def make(rng: np.random.Generator, bounds: tuple[Any, Any], kind: str) -> Mask:
    """Sorted positions and packed segments, as in training, or arbitrary ones; or positions of a layout's shards."""
    left, right = bounds
    sides = []
    layout: Layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    with_segments, with_lengths = rng.random() < 0.5, rng.random() < 0.5
    for length in (T, S):
        positions: Any = rng.integers(-5, 25, (BATCH, length))
        segments = rng.integers(0, 3, (BATCH, length))
        if kind != "arbitrary":
            positions, segments = np.sort(positions), np.sort(segments)
        positions = as_int(positions)
        if kind == "layout":
            positions = traced(layout.runs(int(rng.integers(SHARDS)), length, SHARDS))
        sides.append(
            Tokens(
                positions=None if left is None and right is None else positions,
                segments=as_int(segments) if with_segments else None,
                length=as_int(rng.integers(0, length + 1, BATCH)) if with_lengths else None,
            )
        )
    return Mask(queries=sides[0], keys=sides[1], left=left, right=right)


def expected(mask: Mask) -> np.ndarray:
    """By the oracle, from arrays."""

    def positions(tokens: Tokens, length: int) -> Any:
        if isinstance(tokens.positions, Runs):
            return np.broadcast_to(np.asarray(tokens.positions.at(jnp.arange(length))), (BATCH, length))
        return None if tokens.positions is None else np.asarray(tokens.positions)

    far = 10**6
    both = (positions(mask.queries, T), positions(mask.keys, S))
    segments = (mask.queries.segments, mask.keys.segments)
    allowed = oracle.attends(
        BATCH,
        T,
        S,
        local_window_size=None
        if both[0] is None
        else (far if mask.left is None else mask.left, far if mask.right is None else mask.right),
        positions=None if both[0] is None else both,
        segment_ids=None if segments[0] is None else tuple(np.asarray(x) for x in segments),
    )
    for axis, (tokens, length) in enumerate(((mask.queries, T), (mask.keys, S)), 1):
        if tokens.length is not None:
            present = np.arange(length) < np.asarray(tokens.length)[:, None]
            allowed = allowed & np.expand_dims(present, 3 - axis)
    return allowed


any_mask = st.builds(
    lambda seed, bounds, kind: make(np.random.default_rng(seed), bounds, kind),
    st.integers(0, 2**20),
    st.sampled_from(BOUNDS),
    st.sampled_from(("sorted", "arbitrary", "layout")),
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(any_mask)
def test_predicate_is_the_oracle(mask: Mask) -> None:
    got = np.broadcast_to(np.asarray(mask.predicate(T, S)), (BATCH, T, S))
    np.testing.assert_array_equal(got, expected(mask))


@pytest.mark.parametrize("bound", [0, 1, 2**31 - 2])
def test_bounds_saturate_where_int32_would_wrap_around(bound: int) -> None:
    lowest, highest = -(2**31), 2**31 - 1
    positions = as_int([lowest, lowest + 1, -1, 0, 1, highest - 1, highest])
    first, last = window(positions, bound, bound, natural=False)
    at = np.asarray(positions).astype(object)
    np.testing.assert_array_equal(first, [max(p - bound, lowest) for p in at])
    np.testing.assert_array_equal(last, [min(p + bound, highest) for p in at])


def test_a_tile_beyond_the_last_token_is_absent() -> None:
    # What a kernel does with the ragged end of a shard: the index says it, whatever was loaded.
    side = SideRule(run=None, length=3, counted=True)
    rule = Rule(queries=side, keys=side, left=None, right=None)
    nothing, index = Vectors(None, None), jnp.arange(4, dtype=jnp.int32)
    numbers = tuple(as_int(n) for n in (0, 0, 3, 0, 0, 2))
    queries, keys = rule.of_queries(nothing, numbers, index), rule.of_keys(nothing, numbers[3:], index)
    allowed = attends(jax.tree.map(lambda x: x[:, None], queries), jax.tree.map(lambda x: x[None], keys))
    np.testing.assert_array_equal(allowed, np.outer([1, 1, 1, 0], [1, 1, 0, 0]).astype(bool))
    assert rule.needs_numbers


def test_nothing_to_mask_is_known_at_trace_time() -> None:
    at = jnp.zeros((1, 4), jnp.int32)
    assert Mask().is_full
    assert not Mask().has_vectors
    assert not Mask(queries=Tokens(positions=at), keys=Tokens(positions=at), right=0).is_full
    assert not Mask(queries=Tokens(length=at[:, 0])).is_full
    runs = Tokens(positions=traced(Zigzag().runs(1, 4, 2)))
    assert not Mask(queries=runs, keys=runs, right=0).has_vectors
    assert Mask(queries=runs, keys=runs._replace(segments=at), right=0).has_vectors
