"""One packed sequence, token by token."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from .balance import MOST, by_block
from .pairs import Bounds, Pieces, cut, document_pairs, shared_work


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dealt:
    """Documents of sequences, one sequence after another. Of each, shared documents come first, then those of shard 0,
    of shard 1, and so on.

    Attributes:
      documents: int64 [n], which ones.
      lengths, prefix: int64 [n], theirs.
      shard: int64 [n], of each; -1: shared.
      start: int64 [sequences + 1], where each sequence begins.
      num_shards, shard_length: C, L.
      has_prefixes: whether positions of queries and keys differ.
      bounds: what a query sees.
      axes: sizes of the axes of the sequence, outermost first.
    """

    documents: np.ndarray
    lengths: np.ndarray
    prefix: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    num_shards: int
    shard_length: int
    has_prefixes: bool
    bounds: Bounds
    axes: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.start) - 1

    @property
    def sequence(self) -> np.ndarray:
        """Of each document: int64 [n], ascending."""
        return np.repeat(np.arange(self.num_sequences), np.diff(self.start))

    def part(self, begin: int, end: int) -> "Dealt":
        """Sequences ``begin`` to ``end``."""
        these = slice(self.start[begin], self.start[end])
        return dataclasses.replace(
            self,
            documents=self.documents[these],
            lengths=self.lengths[these],
            prefix=self.prefix[these],
            shard=self.shard[these],
            start=self.start[begin : end + 1] - self.start[begin],
        )

    def pieces(self) -> Pieces:
        """Of shared documents."""
        shared = self.shard < 0
        return cut(self.lengths[shared], self.prefix[shared], self.sequence[shared], self.num_shards, self.bounds)

    def shared_tokens(self) -> np.ndarray:
        """Tokens of shared documents in each sequence: int64 [sequences]."""
        total = np.concatenate([[0], np.cumsum(np.where(self.shard < 0, self.lengths, 0))])
        return np.diff(total[self.start])

    def work(self) -> np.ndarray:
        """Pairs of the queries of each rank with the keys of each: int64 [sequences, C, C]."""
        shared, sequence = self.shard < 0, self.sequence
        work = np.zeros((self.num_sequences, self.num_shards, self.num_shards), np.int64)
        if shared.any():
            work += shared_work(
                self.pieces(),
                self.lengths[shared],
                self.prefix[shared],
                sequence[shared],
                self.num_sequences,
                self.bounds,
            )
        local, shard = ~shared, self.shard[~shared]
        pairs = document_pairs(self.lengths[local], self.prefix[local], self.bounds)
        np.add.at(work, (sequence[local], shard, shard), pairs)
        return work

    def works(self) -> Iterator[np.ndarray]:
        """The same, some sequences at a time."""
        step = max(1, MOST // self.num_shards**2)
        for begin in range(0, self.num_sequences, step):
            yield self.part(begin, min(begin + step, self.num_sequences)).work()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Arrangement:
    """Where each token of a sequence is: arrays of C * L places in ring order, shard after shard.

    Tokens of shared documents come first in each shard, then its own documents, one after another, then padding.

    Attributes:
      document: int32 [C L], index into the ``lengths`` given to :func:`ringjax.pack`; -1: padding.
      offset: int32 [C L], the token's place in its document; 0 where there is padding.
      segment_ids: int32 [C L], for :func:`ringjax.ring_attention`. They grow along each shard, so that the ends of two
        tiles tell a kernel whether they have anything in common. Each place of padding has an id of its own, above
        those of documents.
      positions: for :func:`ringjax.ring_attention`, int32 [C L]: the offsets; where there are prefixes, a pair for
        query and key, (max(offset, prefix - 1), offset). Positions of rotary embeddings are the offsets in any case.
      loss_mask: bool [C L], whether another token of its document follows.
      dealt: the documents of this sequence.
    """

    document: np.ndarray
    offset: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray | tuple[np.ndarray, np.ndarray]
    loss_mask: np.ndarray
    dealt: Dealt = dataclasses.field(repr=False)

    def take(self, tokens: Any, starts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of this sequence and what follows each of them.

        Args:
          tokens: [N], all documents one after another, or in any order, in one array (or memory map).
          starts: integers [documents], where each document given to :func:`ringjax.pack` begins in it.

        Returns:
          (inputs, targets), both [C L], in the dtype of ``tokens``. Padding is 0, and so are targets where
          ``loss_mask`` is False.

        Raises:
          ValueError: where a document would end behind the last token.
        """
        tokens, starts = np.asarray(tokens), np.asarray(starts)
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be one array of all documents, of rank 1. Got shape {tokens.shape}.")
        if starts.ndim != 1 or not np.issubdtype(starts.dtype, np.integer):
            raise ValueError(f"starts must be integers [documents]. Got {starts.dtype.name} {starts.shape}.")
        documents = self.dealt.documents
        if len(documents) and documents.max() >= len(starts):
            raise ValueError(
                f"starts must have a number for each document, and there is a document {documents.max()}. "
                f"Got {len(starts)}."
            )
        begin = starts[documents].astype(np.int64)
        wrong = np.flatnonzero((begin < 0) | (begin + self.dealt.lengths > len(tokens)))
        if len(wrong):
            first = wrong[0]
            raise ValueError(
                f"tokens must hold all tokens of document {documents[first]}, "
                f"{self.dealt.lengths[first]} of them from {begin[first]} on. Got {len(tokens)}."
            )
        inputs = np.zeros(self.document.shape, tokens.dtype)
        targets = np.zeros(self.document.shape, tokens.dtype)
        present = self.document >= 0
        place = starts[self.document[present]].astype(np.int64) + self.offset[present]
        inputs[present] = tokens[place]
        followed = self.loss_mask[present]
        targets[self.loss_mask] = tokens[place[followed] + 1]
        return inputs, targets

    def work(self) -> np.ndarray:
        """Attended pairs, rank by hop: int64 [C, C]. At hop o rank r works on the keys of rank (r + o) mod C.

        Over several axes hops are those of rings within rings: at offsets o1, o2, ... along the axes, the last of which
        changes fastest, the keys of the rank so many places on along each.
        """
        return by_block(self.dealt.work(), self.dealt.axes, ("ring",) * len(self.dealt.axes))[0]


def arrange(dealt: Dealt) -> Arrangement:
    """The arrays of a sequence: runs of consecutive tokens first, shard by shard, then their tokens."""
    num_shards, number = dealt.num_shards, int((dealt.shard < 0).sum())
    index = np.arange(len(dealt.documents))  # documents within the sequence
    shards = np.arange(num_shards)
    # Shared: on each shard document by document, of each the early and the late piece of the prefix, and of the rest.
    pieces = dealt.pieces()
    piece = np.stack([pieces.early, pieces.late], axis=2)[:, None]  # [documents, 1, C, 2]
    shape = (num_shards, number, 2, 2)  # shard, document, prefix or rest, early or late
    sizes, starts = (
        np.take_along_axis(x[:, :, None], piece, axis=3).transpose(2, 0, 1, 3) for x in (pieces.sizes, pieces.starts)
    )
    # Runs: shard, document, first offset, tokens.
    runs = np.concatenate(
        [
            np.stack(
                [
                    np.broadcast_to(shards[:, None, None, None], shape),
                    np.broadcast_to(index[None, :number, None, None], shape),
                    starts,
                    sizes,
                ]
            ).reshape(4, -1),
            np.stack([dealt.shard[number:], index[number:], 0 * index[number:], dealt.lengths[number:]]),
        ],
        axis=1,
    )
    held = np.bincount(runs[0], weights=runs[3], minlength=num_shards).astype(np.int64)
    padding = np.stack([shards, np.full(num_shards, -1), np.zeros_like(shards), dealt.shard_length - held])
    runs = np.concatenate([runs, padding], axis=1)
    runs = runs[:, np.argsort(runs[0], kind="stable")]

    end = np.cumsum(runs[3])
    local, first = np.repeat(runs[1], runs[3]), np.repeat(runs[2] - end + runs[3], runs[3])
    offset = first + np.arange(len(first))
    empty = local < 0
    offset[empty] = 0
    # A place of padding has a number of its own, above those of documents.
    segment_ids = np.where(empty, len(index) + np.cumsum(empty) - 1, local)
    look_up = lambda x, fill: np.where(empty, fill, x[local]) if len(x) else np.full(len(local), fill)  # noqa: E731
    document, length, prefix = look_up(dealt.documents, -1), look_up(dealt.lengths, 0), look_up(dealt.prefix, 0)
    offset, segment_ids, document = (x.astype(np.int32) for x in (offset, segment_ids, document))
    positions = offset
    if dealt.has_prefixes:
        positions = (np.maximum(offset, prefix - 1).astype(np.int32), offset)
    return Arrangement(
        document=document,
        offset=offset,
        segment_ids=segment_ids,
        positions=positions,
        loss_mask=offset + 1 < length,
        dealt=dealt,
    )
