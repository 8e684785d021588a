"""Batches of whole documents, dealt so that every device of the ring works equally: `[data] packing = "balanced"`.

Documents are packed once, by :func:`ringjax.pack`; every epoch takes the sequences in another order. A batch is again a
function of (seed, step) alone. A document longer than a sequence is cut to parts that are not, whose last tokens keep
their targets. Every token stands once in an epoch; what fills the last sequence counts nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

import ringjax

from .config import Data
from .data import Batches, Corpus, DataError

Window = int | tuple[int | None, int | None] | None  # as DecoderConfig.local_window_size


class Packed(Batches):
    """Batches of a corpus, by step number.

    Args:
      corpus: the documents.
      config: length and number of sequences, seed.
      num_shards: devices on the ring; the layout is "contiguous".
      window: of the decoder's layers, so that pairs are counted as they are; None: a token attends to all before it.

    Raises:
      DataError: the length of a sequence is no multiple of num_shards.
    """

    names = (*Batches.names, "positions")

    def __init__(self, corpus: Corpus, config: Data, *, num_shards: int, window: Window = None) -> None:
        super().__init__(corpus, config, layout="contiguous", num_shards=num_shards)
        length = config.sequence_length
        if length % num_shards:
            raise DataError(f"data.sequence_length: must be a multiple of {num_shards}, the shards. Got {length}.")
        self.window: Window = window
        parts = -(-corpus.lengths // length)
        number = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
        self._starts = np.repeat(corpus.starts, parts) + number * length  # of each part, in the text
        self._ends = np.repeat(corpus.starts + corpus.lengths, parts)  # of its document
        self.packing = ringjax.pack(
            np.minimum(self._ends - self._starts, length),
            num_shards=num_shards,
            shard_length=length // num_shards,
            seed=config.seed,
            window=window,
            final=True,
        )
        assert not len(self.packing.left_over), "a final call leaves nothing over where it chooses shared_length"
        self.shared_length = self.packing.shared_length
        found = self.packing
        self.notes = (
            f"packed in {len(found):,} sequences, {found.padding:.1%} of them padding; the busiest device has at most "
            f"{found.imbalance.max():.3f} times the mean of attended pairs; {found.shared.documents:,} documents are "
            f"shared, and {self.shared_length:,} of {length // num_shards:,} keys travel",
        )
        self._per_epoch = len(self.packing)
        self._arrangement = functools.lru_cache(maxsize=2 * config.batch_size)(self.packing.__getitem__)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def once(self, batch_size: int) -> PackedOnce:
        config = dataclasses.replace(self.config, batch_size=batch_size)
        return PackedOnce(self.corpus, config, num_shards=self.num_shards, window=self.window)

    def _row(self, number: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        return self._sequence(self._order(number // self._per_epoch)[number % self._per_epoch], positions)

    def _sequence(self, index: int, at: np.ndarray) -> dict[str, np.ndarray]:
        found = self._arrangement(int(index))
        part, offset = found.document[at], found.offset[at]
        present = part >= 0
        source = np.where(present, self._starts[part] + offset, 0)
        has_next = present & (source + 1 < self._ends[part])
        text = self.corpus.text
        return {
            "tokens": np.where(present, text[source], 0).astype(np.int32),
            "targets": np.where(has_next, text[source + has_next], 0).astype(np.int32),
            "segment_ids": found.segment_ids[at],
            "loss_mask": has_next,
            "positions": offset,
        }

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch]).permutation(self._per_epoch)


class PackedOnce(Packed):
    """Batches in which every token of a corpus stands once; what fills up the last one counts nothing."""

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._per_epoch // self.config.batch_size)

    def _row(self, number: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        row = self._sequence(min(number, self._per_epoch - 1), positions)
        row["loss_mask"] &= number < self._per_epoch
        return row
