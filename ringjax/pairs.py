"""Attended (query, key) pairs, counted in closed form: no mask is built and no token is looked at. NumPy only.

A query at position p attends to keys at positions in [p - left, p + right]; None is no bound, and a causal mask is
right = 0. Integers may be Python's, which do not overflow, or arrays of int64.
"""

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)


def attended_pairs(length: Number, left: int | None, right: int | None) -> Number:
    """Pairs of whole sequences or documents, each of so many tokens.

    The sum over p of 1 + min(p, left) + min(length - 1 - p, right).
    """
    last = length - 1

    def side(bound: int | None) -> Number:
        if isinstance(last, int):
            far = last if bound is None else min(bound, last)
        else:
            far = last if bound is None else np.minimum(bound, last)
        return far * (far + 1) // 2 + far * (last - far)

    return length + side(left) + side(right)


def between(
    distance: np.ndarray, queries: int | np.ndarray, keys: int | np.ndarray, left: int | None, right: int | None
) -> np.ndarray:
    """Pairs between runs of consecutive positions, whose keys start ``distance`` after the queries: int64.

    Args:
      distance: from the first query to the first key of each.
      queries, keys: tokens of each run.
      left, right: what a query sees.
    """
    upper = queries * keys if right is None else _at_most(right - distance, queries, keys)
    lower = 0 if left is None else _at_most(-left - 1 - distance, queries, keys)
    return np.broadcast_to(upper - lower, np.shape(distance)).astype(np.int64)


def _at_most(bound: np.ndarray, queries: int | np.ndarray, keys: int | np.ndarray) -> np.ndarray:
    """Pairs (x, y), 0 <= x < queries and 0 <= y < keys, with y - x <= bound: the sum over x of
    clip(x + bound + 1, 0, keys)."""

    def ramp(top: np.ndarray) -> np.ndarray:  # the sum of clip(u, 0, keys) over all u up to top
        rising = np.clip(top, 0, keys)
        return rising * (rising + 1) // 2 + np.maximum(top - keys, 0) * keys

    return ramp(queries + bound) - ramp(bound)
