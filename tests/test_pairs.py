"""Attended pairs in closed form, against masks that are built and summed."""

import numpy as np
import pytest

from ringjax.pairs import attended_pairs, between

BOUNDS = [(None, None), (None, 0), (2, 3), (20, 0), (0, 0), (3, None), (5, 9), (None, 3)]


def mask(queries: np.ndarray, keys: np.ndarray, left: int | None, right: int | None) -> np.ndarray:
    apart = keys[None, :] - queries[:, None]
    seen = np.ones_like(apart, bool)
    seen &= apart >= -left if left is not None else True
    return seen & (apart <= right if right is not None else True)


@pytest.mark.parametrize(("left", "right"), BOUNDS)
def test_whole_documents(left: int | None, right: int | None) -> None:
    lengths = np.arange(1, 40)
    counted = [int(mask(np.arange(n), np.arange(n), left, right).sum()) for n in lengths]
    assert attended_pairs(lengths, left, right).tolist() == counted
    assert [attended_pairs(int(n), left, right) for n in lengths] == counted


def test_python_integers_do_not_overflow() -> None:
    assert attended_pairs(2**40, None, 0) == 2**39 * (2**40 + 1)


@pytest.mark.parametrize(("left", "right"), BOUNDS)
def test_between_two_runs(left: int | None, right: int | None) -> None:
    distance, queries, keys = (x.ravel() for x in np.meshgrid(np.arange(-12, 13), [1, 4, 7], [1, 3, 8]))
    counted = [
        int(mask(np.arange(q), np.arange(k) + d, left, right).sum())
        for d, q, k in zip(distance, queries, keys, strict=True)
    ]
    assert between(distance, queries, keys, left, right).tolist() == counted
