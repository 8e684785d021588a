"""Schedules, enumerated: what travels where is simulated block by block, and what is needed is counted pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ringjax
from ringjax import layout as layouts
from ringjax import schedule as schedules

ALL = ("contiguous", "zigzag", "striped", ringjax.Striped(stripe=2))
# (left, right) as the schedule takes them; None is unbounded.
BOUNDS = ((None, None), (None, 0), (3, 0), (5, 0), (1, 1), (0, 4), (7, 2), (9, None), (0, 0))


def plan(layout: Any, num_shards: int, q: int, k: int, left: Any, right: Any) -> Any:
    return schedules.plan(num_shards, layouts.as_layout(layout), q, k, left=left, right=right)


def truly_needed(layout: Any, num_shards: int, q: int, k: int, left: int | None, right: int | None) -> set[int]:
    """The offsets at which some query of some rank attends some key, pair by pair."""
    hand = layouts.as_layout(layout).positions
    needed = set()
    for rank in range(num_shards):
        for offset in range(num_shards):
            at_q = hand(rank, np.arange(q), q, num_shards)[:, None]
            at_k = hand((rank + offset) % num_shards, np.arange(k), k, num_shards)[None, :]
            seen = np.ones((q, k), bool)
            seen &= True if left is None else at_k >= at_q - left
            seen &= True if right is None else at_k <= at_q + right
            if seen.any():
                needed.add(offset)
    return needed


@pytest.mark.parametrize("num_shards", range(1, 9))
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_needed_hop_is_made_once_and_no_other(layout: Any, num_shards: int) -> None:
    for left, right in BOUNDS:
        for q, k in ((4, 4), (2, 2), (4, 6), (6, 2)):
            needed = truly_needed(layout, num_shards, q, k, left, right)
            schedule = plan(layout, num_shards, q, k, left, right)
            offsets = [hop.offset % num_shards for hop in schedule.hops]
            assert len(offsets) == len(set(offsets))
            # The own block costs no rotation, so it may be visited in vain.
            assert set(offsets) | {0} == needed | {0}, (left, right, q, k)


@pytest.mark.parametrize("num_shards", range(1, 9))
def test_blocks_arrive_where_the_schedule_says_and_go_home(num_shards: int) -> None:
    for left, right in BOUNDS:
        schedule = plan("contiguous", num_shards, 4, 4, left, right)
        visited: list[list[int]] = [[] for _ in range(num_shards)]
        home = list(range(num_shards))
        block = home  # block[rank]: whose block this rank holds now
        for hop in schedule.hops:
            block = rotate(home if hop.first else block, hop.shift)
            for rank, origin in enumerate(block):
                visited[rank].append(origin)
            assert rotate(block, hop.homeward) == home
        assert [tuple(v) for v in visited] == [schedule.holds(r) for r in range(num_shards)]


def rotate(block: list[int], shift: int) -> list[int]:
    """Executes `permutation` as ppermute would."""
    pairs = schedules.permutation(shift, len(block))
    assert sorted(source for source, _ in pairs) == list(range(len(block)))
    moved = [-1] * len(block)
    for source, destination in pairs:
        assert moved[destination] == -1, "two senders to one rank"
        moved[destination] = block[source]
    return moved


@pytest.mark.parametrize("layout", ALL, ids=str)
@pytest.mark.parametrize("num_shards", range(1, 9))
def test_a_whole_ring_is_one_strand_of_neighbour_sends(layout: Any, num_shards: int) -> None:
    for left, right in ((None, None), (None, 0)):
        schedule = plan(layout, num_shards, 4, 4, left, right)
        assert schedule.strands == (tuple(range(num_shards)),)
        assert schedule.num_rotations == num_shards - 1
        assert [hop.shift for hop in schedule.hops] == [0] + [1] * (num_shards - 1)
        # The seed's direction: device i sends to i - 1.
        assert schedules.permutation(1, 4) == ((0, 3), (1, 0), (2, 1), (3, 2))


@pytest.mark.parametrize("window", range(1, 40))
def test_a_causal_window_needs_only_the_ranks_it_reaches(window: int) -> None:
    # A window of W keys, itself included, in shards of L: ceil((W - 1) / L) rotations.
    shard, num_shards = 4, 8
    schedule = plan("contiguous", num_shards, shard, shard, window - 1, 0)
    assert schedule.num_rotations == min(num_shards - 1, -(-(window - 1) // shard))


def test_a_symmetric_window_goes_both_ways() -> None:
    schedule = plan("contiguous", 8, 4, 4, 5, 5)
    assert schedule.strands == ((0,), (1, 2), (-1, -2))
    assert schedule.num_rotations == 4


def test_given_positions_elide_nothing() -> None:
    schedule = schedules.plan(4, None, 4, 4, left=1, right=0)
    assert schedule.num_rotations == 3
