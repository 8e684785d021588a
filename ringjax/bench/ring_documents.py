"""Packed documents of `ringjax bench ring`: one after another as they come, and dealt by `ringjax.pack`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import ringjax
from ringjax.bench.timing import Shape
from ringjax.packing import Arrangement
from ringjax.planner.lengths import document_lengths
from ringjax.usage import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Those of one sequence of T places. Padding follows the last one.

    Attributes:
      lengths: int64 [documents].
      dealt: the same documents over all devices.
      order: int64 [T], of each place of ``dealt`` its place where documents lie one after another.
      shared_length: what ``dealt`` promises.
    """

    lengths: np.ndarray
    dealt: Arrangement
    order: np.ndarray
    shared_length: int

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def places(self) -> int:
        return len(self.order)

    @property
    def starts(self) -> np.ndarray:
        """Of each document, of the padding and of what is behind it: int32 [documents + 2]."""
        return np.concatenate([[0], np.cumsum(self.lengths), [self.places]]).astype(np.int32)

    @property
    def segment_ids(self) -> np.ndarray:
        """Of documents one after another, each place of padding for itself: int32 [T]."""
        number, padding = len(self.lengths), self.places - self.tokens
        return np.concatenate([np.repeat(np.arange(number), self.lengths), number + np.arange(padding)]).astype(
            np.int32
        )

    def of_rank(self, rank: int, num_ranks: int, *, is_causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin among the queries of a rank, a run of places, and among all keys: int32 [n + 2] each.

        A document's keys are those up to the rank's last query of it, so that a causal mask is aligned with the last
        of both; without one they are all. The keys before the first document and behind the last one stand for two
        more, of no queries.
        """
        shard, starts = self.places // num_ranks, self.starts
        begin, end = rank * shard, (rank + 1) * shard
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        among_queries = np.clip(starts[first : last + 1], begin, end) - begin
        among_keys = np.clip(starts[first : last + 1], 0, end if is_causal else None)
        queries = np.concatenate([[0], among_queries, [shard]])
        return queries.astype(np.int32), np.concatenate([[0], among_keys, [self.places]]).astype(np.int32)


def deal(given: Any, shape: Shape, num_devices: int, *, is_causal: bool, window: int | None) -> Documents:
    """The first sequence that `ringjax.pack` makes of documents, for so many devices.

    Args:
      given: lengths, as :func:`ringjax.planner.lengths.document_lengths` takes them.
      shape: of the query.
      num_devices: that the sequence is dealt over.
      is_causal, window: the mask.

    Raises:
      UsageError: for several sequences, and for documents that are none or are longer than a sequence.
    """
    if shape.batch != 1:
        raise UsageError(f"--shape: B must be 1 with --documents, which are those of one sequence. Got {shape}.")
    try:
        lengths = document_lengths(given, shape.length)
    except ValueError as error:  # which begins with the word
        raise UsageError(f"--{error}") from error
    try:
        packing = ringjax.pack(
            lengths,
            num_shards=num_devices,
            shard_length=shape.length // num_devices,
            is_causal=is_causal,
            window=None if window is None else (window, 0),
        )
    except ValueError as error:
        raise UsageError(f"--documents: {error}") from error
    if not len(packing):
        raise UsageError(f"--documents must fill a sequence of {shape.length} tokens. Got {lengths.sum()} tokens.")
    dealt = packing[0]
    present, padding = np.unique(dealt.document[dealt.document >= 0]), dealt.document < 0
    start = np.zeros(len(lengths), np.int64)
    start[present] = np.cumsum(lengths[present]) - lengths[present]
    order = start[dealt.document] + dealt.offset
    order[padding] = lengths[present].sum() + np.arange(padding.sum())
    return Documents(lengths=lengths[present], dealt=dealt, order=order, shared_length=packing.shared_length)
