"""Which queries attend to which keys: (query, key) pairs of every rank at every hop, counted exactly in closed form.

Nothing is sampled and no mask is built. A shard is a few runs of consecutive positions (contiguous, zigzag), or evenly
spaced stripes; pairs between two runs depend on their distance and lengths alone.
"""

import itertools
from collections.abc import Callable

import numpy as np

from ..layout import Contiguous, Striped, Zigzag
from ..pairs import between
from ..schedule import Schedule
from .program import Program

Count = Callable[[np.ndarray, np.ndarray], np.ndarray]  # pairs of queries of some ranks and keys of others


def pairs(program: Program) -> np.ndarray:
    """Attended pairs of one batch row and one head of a device: int64 [C, blocks], rank by block that it works on.

    Where tokens are exchanged for heads, devices that have other heads of the same tokens have the same pairs. Where
    half of each block goes each way round, the two halves that a device works on at a hop count as one block of whose
    two owners each has half of the pairs: float64. Segments are not known: of pairs, those that no segment of the
    promised length could have are left out, and no others.
    """
    count = _striped_pairs(program) if isinstance(program.layout_object, Striped) else _run_pairs(program)
    there = visits(program.schedule())
    columns = [_pairs_with(program, offsets, count) for offsets in there]
    if program.both:
        back = (_pairs_with(program, tuple(-offset for offset in offsets), count) for offsets in there)
        columns = [(one + other) / 2 for one, other in zip(columns, back, strict=True)]
    return np.stack(columns, axis=1)


def visits(schedule: Schedule) -> list[tuple[int, ...]]:
    """The offsets on all rings, outermost first, of the blocks that a device works on, in order."""
    return [(hop.offset, *rest) for hop in schedule.hops for rest in ([()] if hop.inner is None else visits(hop.inner))]


def _pairs_with(program: Program, offsets: tuple[int, ...], count: Count) -> np.ndarray:
    """Pairs of every device with the block at these offsets on the axes of rings: [C]."""
    sizes, words = program.axes, program.sharing.words
    places = np.unravel_index(np.arange(program.ring), sizes)
    rings = iter(offsets)
    # Along merged axes a block has the keys of all ranks; along rings, of the one at the offset.
    moved = [
        None if merged else (place + next(rings, 0)) % size
        for place, size, merged in zip(places, sizes, program.sharing.keys.merged, strict=True)
    ]
    total = np.zeros(program.ring, np.int64)
    among_all = (range(size) if at is None else (at,) for at, size in zip(moved, sizes, strict=True))
    for among in itertools.product(*among_all):
        keys = np.ravel_multi_index([np.broadcast_to(at, program.ring) for at in among], sizes)
        total += count(np.arange(program.ring), keys)
    exchanged = tuple(n for n, word in enumerate(words) if word == "all_to_all")
    return np.broadcast_to(total.reshape(sizes).sum(axis=exchanged, keepdims=True), sizes).ravel()


def _run_pairs(program: Program) -> Count:
    """Pairs between shards that are one run or two."""
    layout, length, ring = program.layout_object, program.shard_length, program.ring
    if not isinstance(layout, (Contiguous, Zigzag)):
        raise NotImplementedError(f"layout: pairs are counted for the layouts that have a name. Got {layout}.")
    chunk = layout.chunk_length(length)
    left, right = program.reach

    def count(ranks: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        total = np.zeros(len(ranks), np.int64)
        for start in range(0, length, chunk):
            for other in range(0, length, chunk):
                queries = layout.positions(ranks, np.int64(start), length, ring)
                keys = layout.positions(blocks, np.int64(other), length, ring)
                total += between(keys - queries, chunk, chunk, left, right)
        return total

    return count


def _striped_pairs(program: Program) -> Count:
    """Pairs between two striped shards: they depend on the difference of the ranks alone."""
    stripe, ring = program.stripe, program.ring
    left, right = program.reach
    number = program.shard_length // stripe
    apart = np.arange(1 - number, number, dtype=np.int64)
    multiplicity = number - np.abs(apart)
    by_difference = np.array(
        [
            int((multiplicity * between((apart * ring + difference) * stripe, stripe, stripe, left, right)).sum())
            for difference in range(1 - ring, ring)
        ],
        np.int64,
    )
    return lambda ranks, blocks: by_difference[blocks - ranks + ring - 1]
