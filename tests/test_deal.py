"""Merged shards: where their tokens lie, by counting them, and that what is needed of a block is what is sent."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import ringjax
from ringjax import layout as layouts
from ringjax import schedule as schedules
from ringjax.deal import Deal

LAYOUTS = ("contiguous", "zigzag", "striped", ringjax.Striped(stripe=2))
SIZES = ((4,), (2, 2), (3, 2), (2, 4), (2, 2, 2), (1, 4))
LENGTH = 8


def deals(layout: Any) -> list[Deal]:
    hand = layouts.as_layout(layout)
    return [Deal(hand, sizes, merged, LENGTH)
            for sizes in SIZES for merged in itertools.product((False, True), repeat=len(sizes))]  # fmt: skip


def places(deal: Deal) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for size in deal.ring_sizes)))


def held(deal: Deal, place: tuple[int, ...]) -> np.ndarray:
    """Positions of all tokens of the ranks whose shards are merged, in the order of the ranks: [shards, L]."""
    rank_of = np.arange(deal.num_ranks).reshape(deal.sizes)
    at = iter(place)
    ranks = rank_of[tuple(slice(None) if merged else next(at) for merged in deal.merged)].ravel()
    index = np.arange(LENGTH)
    return np.stack([deal.layout.positions(int(rank), index, LENGTH, deal.num_ranks) for rank in ranks])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_merged_shards_grow_and_hold_the_tokens_of_all(layout: Any) -> None:
    for deal in deals(layout):
        for place in places(deal):
            tokens = held(deal, place)
            merged = np.asarray(deal.merge(tokens[None]))[0]
            np.testing.assert_array_equal(merged, np.sort(tokens.ravel()))
            np.testing.assert_array_equal(np.asarray(deal.split(merged[None]))[0], tokens)
            np.testing.assert_array_equal(np.asarray(deal.positions(place))[0], merged)
            runs = deal.runs(place)
            if runs is not None:
                assert runs.length == merged.size
                np.testing.assert_array_equal(runs.at(np.arange(runs.length)), merged)


def test_what_the_design_promises_is_three_integers() -> None:
    """Exchanges within rings, the whole sequence, and contiguous or striped shards exchanged over outer axes."""
    for layout in LAYOUTS:
        for deal in deals(layout):
            inner = deal.merged == tuple(sorted(deal.merged))
            outer = deal.merged == tuple(sorted(deal.merged, reverse=True)) and not isinstance(
                deal.layout, ringjax.Zigzag
            )
            if inner or outer:
                assert deal.runs(tuple(0 for _ in deal.ring_sizes)) is not None, deal


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_chunks_are_where_the_tokens_are(layout: Any) -> None:
    for deal in deals(layout):
        device, start = deal.chunks()
        size = deal.layout.chunk_length(LENGTH)
        for number, place in enumerate(places(deal)):
            merged = np.sort(held(deal, place).ravel())
            for chunk in np.flatnonzero(device == number):
                np.testing.assert_array_equal(
                    merged[start[chunk] : start[chunk] + size], np.arange(chunk * size, (chunk + 1) * size)
                )


BOUNDS = ((3, 0), (0, 4), (9, 2), (17, 0), (None, 0), (5, None), (30, 30))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 2, 2)], ids=str)
def test_all_that_is_needed_is_sent_and_not_much_more(layout: Any, sizes: tuple[int, ...]) -> None:
    """Offsets exactly; of a block the hull of what is needed, in whole tiles, or runs if it is in several."""
    hand = layouts.as_layout(layout)
    for (left, right), merged in itertools.product(BOUNDS, itertools.product((False, True), repeat=len(sizes))):
        if all(merged):
            continue
        keys = Deal(hand, sizes, merged, LENGTH)
        queries = Deal(hand, sizes, tuple(n == 0 and m for n, m in enumerate(merged)), LENGTH)
        found = schedules.needed_keys(queries, keys, left, right)
        truth: dict[tuple[int, ...], tuple[int, int]] = {}
        apart = [n for n, m in enumerate(merged) if not m]
        for own in places(queries):
            at_q = np.sort(held(queries, own).ravel())[:, None]
            of_axes = iter(own)
            full = [0 if m else next(of_axes) for m in queries.merged]
            for other in places(keys):
                at_k = np.sort(held(keys, other).ravel())[None]
                seen = np.ones((at_q.size, at_k.size), bool)
                seen &= True if left is None else at_k >= at_q - left
                seen &= True if right is None else at_k <= at_q + right
                index = np.flatnonzero(seen.any(axis=0))
                if index.size:
                    offset = tuple((b - full[n]) % sizes[n] for b, n in zip(other, apart, strict=True))
                    low, high = truth.get(offset, (keys.length, 0))
                    truth[offset] = min(low, int(index[0])), max(high, int(index[-1]) + 1)
        assert found.keys() == truth.keys(), (left, right, merged)
        run = getattr(keys.runs((0,) * len(apart)), "run", 8)
        for offset, (low, high) in truth.items():
            start, stop = found[offset]
            assert start <= low and high <= stop <= keys.length
            if left is not None and right is not None:
                assert low - start < 8 + run and stop - high < 8


@pytest.mark.parametrize("sizes", [(8,), (2, 4), (4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_arrives_covers_what_is_needed(layout: Any, sizes: tuple[int, ...]) -> None:
    """Walks the schedule of several axes as the ring does: every pair that is attended meets once, with its keys."""
    hand = layouts.as_layout(layout)
    for left, right in BOUNDS:
        deal = Deal(hand, sizes, (False,) * len(sizes), LENGTH)
        schedule = schedules.plan_rings(deal, deal, left, right)
        met: dict[tuple[int, ...], tuple[int, int]] = {}
        _walk(schedule, (), (0, LENGTH), met)
        needed = schedules.needed_keys(deal, deal, left, right)
        assert len(met) == schedule.num_blocks
        for offset, (low, high) in needed.items():
            start, stop = met[offset]
            assert start <= low and high <= stop
        assert met.keys() - needed.keys() <= {(0,) * len(sizes)}


def _walk(schedule: Any, outer: tuple[int, ...], held: tuple[int, int], met: dict[Any, Any]) -> None:
    before = held
    for hop in schedule.hops:
        here = hop.keys or held
        source = held if hop.first else before
        assert source[0] <= here[0] and here[1] <= source[1], "what arrives must have been there"
        at = (*outer, hop.offset % schedule.num_shards)
        if hop.inner is None:
            assert at not in met
            met[at] = here
        else:
            _walk(hop.inner, at, here, met)
        before = here


def test_a_block_goes_the_way_on_which_less_travels() -> None:
    """All ranks are needed, the farthest only in part; all forward, the whole block would go three times."""
    schedule = schedules.plan(4, ringjax.Contiguous(), 16, 16, left=40, right=0)
    assert [(hop.offset, hop.keys) for hop in schedule.hops] == [(0, None), (1, (8, 16)), (-1, None), (-2, None)]
