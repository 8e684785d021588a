"""Who holds which block at which hop, and which hops exist. Pure Python, enumerable; knows no arrays and no devices.

An *offset* t means that rank r works on the block of rank (r + t) mod C. Offset 0 is the own block. To come from
offset a to offset b every rank r sends what it holds to rank (r - (b - a)) mod C: neighbours for b = a + 1.

A *strand* is a chain of offsets that one travelling block visits, starting from home (offset 0, whether or not home
itself is one of its hops). A full ring is one strand 0, 1, ..., C-1. A sliding window needs only the ranks near the
own one, some before and some after it, so it has the own block and up to two strands: 1, 2 one way round and -1, -2 the
other; and of a block only the keys that some rank needs travel, here or further on the strand.

Several axes are rings within rings. A hop of an outer one brings the block of another rank along that axis, and has a
schedule of its own for the axes within, round which that block goes before the next one is needed.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import numpy as np

from .deal import Deal
from .layout import Layout, Striped

# More chunks than these are not looked at one by one.
_MOST_CHUNKS = 8192
# Keys of a block travel in tiles of this size if it divides a shard, otherwise of the smaller one, or one by one.
_TILES = (128, 8)

Keys = tuple[int, int]  # a range [start, stop) of a block


@dataclasses.dataclass(frozen=True)
class Hop:
    """One step: every rank works on the block at ``offset``.

    ``shift`` is the rotation that brings the block here: from the previous hop, or from home if the hop is the
    ``first`` of its strand. ``homeward`` is the rotation from here back home. ``keys`` is what arrives of the block,
    None being all of it. ``inner`` says what follows on the axes within; None: this is the innermost.
    """

    offset: int
    shift: int
    first: bool
    keys: Keys | None = None
    inner: "Schedule | None" = None

    @property
    def homeward(self) -> int:
        return -self.offset


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The hops of one attention call along one axis of ``num_shards`` devices; a strand is a tuple of offsets.

    ``keys`` and ``inner`` have one entry for every hop, in order; None stands for all None.
    """

    num_shards: int
    strands: tuple[tuple[int, ...], ...]
    keys: tuple[Keys | None, ...] | None = None
    inner: "tuple[Schedule | None, ...] | None" = None

    @functools.cached_property
    def hops(self) -> tuple[Hop, ...]:
        """All hops, strand after strand."""
        steps = [
            (offset, offset - (strand[i - 1] if i else 0), i == 0)
            for strand in self.strands
            for i, offset in enumerate(strand)
        ]
        nothing = (None,) * len(steps)
        return tuple(
            Hop(offset=offset, shift=shift, first=first, keys=keys, inner=inner)
            for (offset, shift, first), keys, inner in zip(
                steps, self.keys or nothing, self.inner or nothing, strict=True
            )
        )

    @property
    def is_full(self) -> bool:
        """Every block goes round whole, here and on the axes within."""
        whole = all(hop.keys is None and (hop.inner is None or hop.inner.is_full) for hop in self.hops)
        return whole and self.strands == (tuple(range(self.num_shards)),)

    @property
    def is_one_ring(self) -> bool:
        """Full, with no ring within: the sums of dK and dV are complete when they come home."""
        return self.is_full and self.hops[0].inner is None

    @property
    def num_rotations(self) -> int:
        """Rotations of K/V along this axis in the forward pass; the backward pass makes as many."""
        return sum(hop.shift != 0 for hop in self.hops)

    @property
    def num_blocks(self) -> int:
        """Blocks, or parts of blocks, that a rank works on."""
        return sum(1 if hop.inner is None else hop.inner.num_blocks for hop in self.hops)

    def holds(self, rank: int) -> tuple[int, ...]:
        """The blocks that this rank works on, hop by hop."""
        return tuple((rank + hop.offset) % self.num_shards for hop in self.hops)


@dataclasses.dataclass(frozen=True)
class Route:
    """Round a ring forward or backward (``sign`` -1), past the ranks in their order or in that of ``cycle``."""

    sign: int = 1
    cycle: tuple[int, ...] | None = None

    def sources(self, shift: int, num_shards: int) -> tuple[int, ...]:
        """For each rank, the rank whose view it takes over when every view moves by ``shift`` offsets."""
        cycle = self.cycle or tuple(range(num_shards))
        source = [0] * num_shards
        for place, rank in enumerate(cycle):
            source[rank] = cycle[(place + self.sign * shift) % num_shards]
        return tuple(source)


def permutation(shift: int, num_shards: int, route: Route = Route()) -> tuple[tuple[int, int], ...]:  # noqa: B008  frozen
    """(source, destination) pairs of the rotation that moves every rank's view by ``shift`` offsets."""
    return tuple(sorted((source, rank) for rank, source in enumerate(route.sources(shift, num_shards))))


def plan(
    num_shards: int,
    layout: Layout | None,
    query_length: int,
    key_length: int,
    *,
    left: int | None,
    right: int | None,
) -> Schedule:
    """The hops that at least one rank needs on a ring of one axis.

    Args:
      num_shards: C.
      layout: None where positions are given by the user, so that nothing is known before run time: every hop is made.
      query_length, key_length: shard lengths.
      left, right: a query at position p sees keys in [p - left, p + right]; None is unbounded. Causal is right = 0.
    """
    if layout is None:
        return full_schedule((num_shards,))
    queries, keys = (Deal(layout, (num_shards,), (False,), length) for length in (query_length, key_length))
    return plan_rings(queries, keys, left, right)


def full_schedule(sizes: tuple[int, ...]) -> Schedule:
    """Every block goes round all axes, outermost first."""
    if not sizes:
        return Schedule(1, ((0,),))
    inner = None if len(sizes) == 1 else (full_schedule(sizes[1:]),) * sizes[0]
    return Schedule(sizes[0], (tuple(range(sizes[0])),), inner=inner)


@functools.lru_cache(maxsize=1024)
def plan_rings(
    queries: Deal, keys: Deal, left: int | None, right: int | None, shared: tuple[int, ...] | None = None
) -> Schedule:
    """The hops that at least one device needs, on the axes along which the keys are not merged.

    The queries may be merged along fewer axes than the keys: along the others each device has its own. ``shared`` is
    that of :func:`needed_keys`.
    """
    sizes = keys.ring_sizes
    if not sizes or (left is None and right is None and shared is None):
        return full_schedule(sizes)
    needed = needed_keys(queries, keys, left, right, shared)
    needed.setdefault((0,) * len(sizes), (0, keys.length))  # the own block costs nothing
    return _schedule(sizes, needed, keys.length)


def _schedule(sizes: tuple[int, ...], needed: Mapping[tuple[int, ...], Keys], length: int) -> Schedule:
    """From what is needed at each combination of offsets."""
    size, within = sizes[0], sizes[1:]
    by_offset: dict[int, dict[tuple[int, ...], Keys]] = {}
    for (offset, *rest), keys in needed.items():
        by_offset.setdefault(offset, {})[tuple(rest)] = keys
    if len(needed) == math.prod(sizes) and all(keys == (0, length) for keys in needed.values()):
        return full_schedule(sizes)
    here = {offset: _hull(inner.values()) for offset, inner in by_offset.items()}
    strands, held = min((_held(strands, here, size) for strands in _strands(set(here), size)), key=_travelled)
    whole = (0, length)
    keys = tuple(None if strand == (0,) or part == whole else part
                 for strand, parts in zip(strands, held, strict=True) for part in parts)  # fmt: skip
    inner = [_schedule(within, by_offset[t % size], length) for strand in strands for t in strand] if within else None
    return Schedule(size, strands, keys=keys, inner=None if inner is None else tuple(inner))


Strands = tuple[tuple[int, ...], ...]


def _strands(needed: set[int], num_shards: int) -> list[Strands]:
    """Ways to reach these offsets from home, both ways round.

    One that leaves offsets out cuts the circle at its widest gap, on a tie late: what lies before the gap goes forward,
    the rest backward. Where none is left out it is all forward, half and half, or all backward.
    """
    ring = [0, *sorted(needed - {0}), num_shards]  # offset C is home again
    cuts = [len(ring) - 2, (len(ring) - 2) // 2, 0]
    if len(needed | {0}) < num_shards:
        gaps = [after - before for before, after in zip(ring[:-1], ring[1:], strict=True)]
        cuts = [max(range(len(gaps)), key=lambda i: (gaps[i], i))]
    own = (0,) if 0 in needed else ()
    ways = ((own, ring[1 : cut + 1], [t - num_shards for t in reversed(ring[cut + 1 : -1])]) for cut in cuts)
    return [tuple(tuple(strand) for strand in way if strand) for way in ways]


def _held(strands: Strands, here: Mapping[int, Keys], size: int) -> tuple[Strands, list[list[Keys]]]:
    """With what a rank holds of a block at each offset: all that is needed there, or wherever it goes from there."""
    held = []
    for strand in strands:
        parts: list[Keys] = []
        for offset in reversed(strand):
            parts.insert(0, _hull([here[offset % size], *parts[:1]]))
        held.append(parts)
    return strands, held


def _travelled(way: tuple[Strands, list[list[Keys]]]) -> int:
    """Keys times the links that they pass."""
    steps = 0
    for strand, parts in zip(*way, strict=True):
        for before, offset, (start, stop) in zip((0, *strand), strand, parts):  # noqa: B905  one longer
            steps += abs(offset - before) * (stop - start)
    return steps


def _hull(ranges: Iterable[Keys]) -> Keys:
    starts, stops = zip(*ranges, strict=True)
    return min(starts), max(stops)


def needed_keys(
    queries: Deal, keys: Deal, left: int | None, right: int | None, shared: tuple[int, ...] | None = None
) -> dict[tuple[int, ...], Keys]:
    """For offsets on the axes along which keys are not merged: the range of a block's keys that some query attends to.

    Left out are offsets at which nobody attends to anything. A query at p sees keys in [p - left, p + right]; None is
    no bound. ``shared`` has a number for every axis of the sequence: of a shard only so many keys, the first ones, are
    attended to from other places on that axis; None is all of them. Ranges are of whole tiles, and of whole runs where
    they reach across one.
    """
    sizes, most = keys.ring_sizes, _most_keys(keys, shared)
    if left is None and right is None:
        start, stop = np.zeros_like(most), most
    else:
        start, stop = _within_bounds(queries, keys, left, right, most)
    found = np.flatnonzero(stop)
    tiles = [_whole_tiles(keys, int(start[n]), int(stop[n])) for n in found]
    return dict(zip(_offsets(found, sizes), tiles, strict=True))


def _most_keys(keys: Deal, shared: tuple[int, ...] | None) -> np.ndarray:
    """For each offset, row-major: only so many keys of a block can be needed there, the first ones."""
    most = np.full(keys.ring_sizes, keys.length)
    firsts = [] if shared is None else [n for n, merged in zip(shared, keys.merged, strict=True) if not merged]
    for axis, first in enumerate(firsts):
        # The first keys of several shards are no range of the merged one.
        whole = first > 0 and keys.num_merged > 1
        # Offsets of which this is the outermost axis that they move along.
        most[(0,) * axis + (slice(1, None),)] = keys.length if whole else min(first, keys.length)
    return most.ravel()


def _within_bounds(
    queries: Deal, keys: Deal, left: int | None, right: int | None, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each offset, row-major, where the keys of a block start and stop that some query sees; 0 to 0: none is."""
    sizes = keys.ring_sizes
    # Queries that are split along an axis of merged keys are of one device as far as these are concerned.
    q_size, k_size = (deal.layout.chunk_length(deal.shard_length) for deal in (queries, keys))
    num_q, num_k = (deal.num_ranks * deal.shard_length // size for deal, size in ((queries, q_size), (keys, k_size)))
    if max(num_q, num_k) > _MOST_CHUNKS:
        stop = np.zeros_like(most)
        seen = _distant(queries, keys, q_size, left, right, (num_q, num_k))
        stop[seen] = most[seen]
        return np.zeros_like(most), stop
    of_query = keys.device_of(queries.layout.owner(np.arange(num_q), queries.num_ranks))
    of_key, at = keys.chunks()
    start, stop = np.full_like(most, keys.length), np.zeros_like(most)
    chunk = np.arange(num_q) * q_size
    low = np.zeros(num_q, int) if left is None else np.maximum(chunk - left, 0)
    high = np.full(num_q, num_k * k_size) if right is None else np.minimum(chunk + q_size + right, num_k * k_size)
    low, high = np.minimum(low, num_k * k_size), np.maximum(high, 0)
    first, last = low // k_size, (high - 1) // k_size
    for ahead in range(int((last - first).max(initial=-1)) + 1):  # the chunk so far from the first one that is seen
        seen = np.flatnonzero(first + ahead <= last)
        key = first[seen] + ahead
        offset = _difference(of_key[key], of_query[seen], sizes)
        begin = at[key] + np.maximum(low[seen] - key * k_size, 0)
        end = np.minimum(at[key] + np.minimum(high[seen] - key * k_size, k_size), most[offset])
        there = begin < end
        np.minimum.at(start, offset[there], begin[there])
        np.maximum.at(stop, offset[there], end[there])
        if ((start == 0) & (stop == most) | (most == 0)).all():
            break
    return start, stop


def _difference(owner: np.ndarray, own: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Offset of one device from the other, axis by axis; all as indices row-major over the axes."""
    theirs, ours = np.unravel_index(owner, sizes), np.unravel_index(own, sizes)
    away = [(a - b) % size for a, b, size in zip(theirs, ours, sizes, strict=True)]
    return np.ravel_multi_index(away, sizes)


def _offsets(flat: Iterable[int], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in np.unravel_index(offset, sizes)) for offset in flat]


def _distant(
    queries: Deal, keys: Deal, size: int, left: int | None, right: int | None, counts: tuple[int, int]
) -> list[int]:
    """Offsets from the distance between stripes alone, of which there are too many to look at each."""
    everything = list(range(math.prod(keys.ring_sizes)))
    if not isinstance(queries.layout, Striped):
        return everything
    back, ahead = (
        count - 1 if bound is None else min(count - 1, (bound + size - 1) // size)
        for bound, count in zip((left, right), counts, strict=True)
    )
    num_ranks = keys.num_ranks
    if back + ahead + 1 >= num_ranks:
        return everything
    ranks = np.arange(num_ranks)
    device = keys.device_of(ranks)
    found: set[int] = set()
    for distance in range(-back, ahead + 1):
        found.update(_difference(device[(ranks + distance) % num_ranks], device, keys.ring_sizes).tolist())
    return sorted(found)


def _whole_tiles(keys: Deal, start: int, stop: int) -> Keys:
    """Rounded outwards: to tiles, and to the start of a run if it reaches across one, as Runs.part needs it."""
    tile = next((size for size in _TILES if keys.length % size == 0), 1)
    start, stop = start // tile * tile, min(-(-stop // tile) * tile, keys.length)
    runs = keys.runs((0,) * len(keys.ring_sizes))
    if runs is not None and start // runs.run != (stop - 1) // runs.run:
        start = start // runs.run * runs.run
    return start, stop
