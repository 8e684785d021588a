"""How equal the work of ranks is, in total and hop by hop. NumPy only."""

from collections.abc import Iterable, Iterator

import numpy as np

from ..pairs import between
from .pairs import Bounds

MOST = 2**22  # numbers of an array of pairs, sequences by ranks by ranks


def by_block(work: np.ndarray, sizes: tuple[int, ...], words: tuple[str, ...]) -> np.ndarray:
    """[sequences, C (queries), C (keys)] to [sequences, devices, blocks]: pairs of each device with each of its blocks.

    Args:
      work: pairs of the queries of each rank with the keys of each.
      sizes: of the axes of the sequence, outermost first; C is their product.
      words: the strategy of each. Along "ring" the blocks of all places come one after another, at offset 0, 1, ...;
        along "all_gather" they are one; along "all_to_all" devices share the work of the same tokens, and count as one.
    """
    number = len(sizes)
    work = work.reshape(len(work), *sizes, *sizes)
    for axis, (size, word) in enumerate(zip(sizes, words, strict=True)):
        queries, keys = 1 + axis, 1 + number + axis
        if word == "ring":
            place = np.arange(size).reshape([-1 if n == queries else 1 for n in range(work.ndim)])
            offset = np.arange(size).reshape([-1 if n == keys else 1 for n in range(work.ndim)])
            work = np.take_along_axis(work, (place + offset) % size, axis=keys)
        else:
            work = work.sum(axis=keys if word == "all_gather" else (queries, keys), keepdims=True)
    return work.reshape(len(work), int(np.prod(work.shape[1 : 1 + number])), -1)


def imbalance(works: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of every sequence, in total and in lockstep: float64 [sequences] each.

    In total: pairs of the device with most of them over the mean. In lockstep every hop lasts as long as its busiest
    device: the sum over hops of the most pairs of a device, over the mean.

    Args:
      works: some sequences at a time, as :func:`by_block` gives them.
    """
    total, lockstep = [np.empty(0)], [np.empty(0)]
    for work in works:
        mean = work.sum(axis=(1, 2)) / work.shape[1]
        total.append(work.sum(axis=2).max(axis=1) / mean)
        lockstep.append(work.max(axis=1).sum(axis=1) / mean)
    return np.concatenate(total), np.concatenate(lockstep)


def works_as_they_come(
    lengths: np.ndarray, owner: np.ndarray, chunk_length: int, bounds: Bounds
) -> Iterator[np.ndarray]:
    """Documents one after another in whole sequences: int64 [sequences, C, C], some at a time.

    A document that crosses the border of a sequence goes on in the next one as another document. What does not fill a
    sequence is left out.

    Args:
      lengths: int64 [documents].
      owner: int64 [chunks], the rank that holds each chunk of a sequence.
      chunk_length: tokens of a chunk.
      bounds: what a query sees.
    """
    length, num_shards = len(owner) * chunk_length, int(owner.max()) + 1
    ends = np.cumsum(lengths)
    number, step = int(ends[-1]) // length, max(1, MOST // num_shards**2)
    for begin in range(0, number, step):
        low, high = begin * length, min(begin + step, number) * length
        inside = ends[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, high)]
        # Runs of tokens of one document in one chunk.
        start = np.union1d(inside, np.arange(low, high, chunk_length))
        size = np.diff(start, append=high)
        document, sequence = np.searchsorted(ends, start, side="right"), start // length - begin
        rank = owner[start % length // chunk_length]
        index = np.arange(len(start))
        new = np.append(True, (np.diff(document) != 0) | (np.diff(sequence) != 0))
        nth = index - np.maximum.accumulate(np.where(new, index, 0))  # of its document
        work = np.zeros((high // length - begin, num_shards, num_shards), np.int64)
        apart, later = 0, index
        while later.size:
            earlier = later - apart
            for query, key in ((later, earlier), (earlier, later))[: 2 if apart and bounds.right != 0 else 1]:
                pairs = between(start[key] - start[query], size[query], size[key], bounds.left, bounds.right)
                np.add.at(work, (sequence[query], rank[query], rank[key]), pairs)
            apart += 1
            later = later[nth[later] >= apart]
        yield work
