"""Documents into sequences: the largest first, each into the sequence that has the most room left."""

import bisect
import heapq

import numpy as np

_SLACK = 128  # a sequence aims at 1 - 1/128 of its places, so that shards need not be filled to the last one
_ENOUGH = 40  # where it would stay below 1 - 1/40, it may have more than that


def fill(
    lengths: np.ndarray, *, num_sequences: int, capacity: int, longest_local: int, most_shared: int,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Which sequence each document goes to, -1 for none: int64 [documents].

    Documents are taken in their order, so that those that were left over before come first, until there are enough;
    the others only fill gaps. The largest ones are dealt first and the smallest last, so that every sequence gets its
    mix of both and sequences end up equally full. The order is that of lengths up to a random tenth, so that another
    seed deals otherwise. A sequence may stay empty.

    Args:
      lengths: int64 [documents].
      num_sequences: how many to fill.
      capacity: tokens of a sequence.
      longest_local: documents that are longer are shared.
      most_shared: tokens of such documents in a sequence.
      rng: the source of randomness.
    """
    aim = capacity - capacity // _SLACK
    of = np.full(len(lengths), -1, np.int64)
    taken = max(1, int(np.searchsorted(np.cumsum(lengths), num_sequences * aim, side="right")))
    if num_sequences * capacity >= lengths.sum():  # a last sequence, of all that is there
        taken = len(lengths)
    shuffled = lengths[:taken] * rng.uniform(0.9, 1.1, taken)
    order = np.lexsort((-shuffled, lengths[:taken] <= longest_local))

    width = max(1, (num_sequences - 1).bit_length())
    mask = (1 << width) - 1
    heap = list(range(num_sequences))  # used << width | sequence: the least used one first
    chosen: list[int] = []
    for length in lengths[order].tolist():
        most = most_shared if length > longest_local else capacity
        least = heap[0]
        if (least >> width) + length > most:
            chosen.append(-1)
        else:
            heapq.heapreplace(heap, least + (length << width))
            chosen.append(least & mask)
    of[order] = chosen
    used = [(entry & mask, entry >> width) for entry in heap]
    _fill_gaps(of, lengths, used, capacity, aim, capacity if most_shared == capacity else longest_local)
    return of


def _fill_gaps(
    of: np.ndarray, lengths: np.ndarray, used: list[tuple[int, int]], capacity: int, aim: int, longest: int
) -> None:
    """Documents that are still left go where they fit, the largest that do, and of several of one length the first."""
    enough = capacity - capacity // _ENOUGH
    left = np.flatnonzero((of < 0) & (lengths <= longest))
    left = left[np.lexsort((-left, lengths[left]))]
    documents, sizes = left.tolist(), lengths[left].tolist()
    for sequence, tokens in used:
        while sizes:
            at = bisect.bisect_right(sizes, aim - tokens)
            if not at and tokens < enough:  # beyond the aim, as little as may be
                at = min(bisect.bisect_left(sizes, enough - tokens) + 1, bisect.bisect_right(sizes, capacity - tokens))
                at = bisect.bisect_right(sizes, sizes[at - 1]) if at else 0
            if not at:
                break
            tokens += sizes.pop(at - 1)
            of[documents.pop(at - 1)] = sequence
