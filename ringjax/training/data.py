"""Documents -> batches in ring order. A batch is a function of (seed, step) alone, so nothing is saved to resume.

The documents of an epoch are shuffled and laid end to end; the stream is cut into sequences of T tokens, which are
shuffled too. Each document in a sequence is a segment of its own. The target of a token is the next token of the same
document; the last token of a document has none (its loss mask is False). Without a tokenizer tokens are bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

import ringjax
from ringjax.models import Tokenizer

from .config import Data
from .sources import DataError as DataError
from .sources import Document, as_ids, read_documents

Batch = dict[str, jax.Array]
"""tokens, targets, segment_ids: int32 [B, T]; loss_mask: bool [B, T]; of packed documents also positions: int32 [B, T],
the place of each token in its document. All in ring order."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents, laid end to end. Document i is text[starts[i] : starts[i] + lengths[i]]."""

    text: np.ndarray  # uint8 [bytes] or int32 [tokens]
    starts: np.ndarray  # int64 [documents]
    lengths: np.ndarray  # int64 [documents], each at least 1
    fingerprint: str  # the same for the same documents in the same order
    empty: str = ""  # names of files without text, where the user gave some

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Corpus:
        """Drops empty documents. Raises: DataError if no token is left."""
        kept = [document for document in documents if len(document)]
        if not kept:
            raise DataError("data: needs at least one document that is not empty. Got none.")
        arrays = [np.frombuffer(each, np.uint8) if isinstance(each, bytes) else each for each in kept]
        lengths = np.array([array.size for array in arrays], np.int64)
        return cls._laid(np.concatenate(arrays), lengths)

    @classmethod
    def _laid(cls, text: np.ndarray, lengths: np.ndarray) -> Corpus:
        digest = hashlib.sha256(lengths.tobytes())
        digest.update(text.tobytes())
        return cls(text=text, starts=np.cumsum(lengths) - lengths, lengths=lengths, fingerprint=digest.hexdigest()[:16])

    @property
    def unit(self) -> str:
        """What a token is."""
        return "byte" if self.text.dtype == np.uint8 else "token"

    def take(self, documents: np.ndarray) -> Corpus:
        """Some of the documents, by number."""
        parts = [self.text[self.starts[i] : self.starts[i] + self.lengths[i]] for i in documents]
        return self._laid(np.concatenate(parts), self.lengths[documents])


def read(config: Data, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads the documents that `config` names. Raises: DataError."""
    found = read_documents(config, tokenizer)
    return dataclasses.replace(Corpus.of(found.documents), empty=found.empty)


def hold_out(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Parts a corpus: what training sees, and what it never sees.

    Whole documents are held out, in an order that the seed gives, while they fit into the fraction of the tokens. Where
    that is less than half of the fraction, since documents are few, it is the tail of the corpus instead: the document
    in which that begins is cut.

    Raises:
      DataError: one of the two would have no token to predict.
    """
    wanted = round(fraction * len(corpus.text))
    count = len(corpus.lengths)
    held, tokens = [], 0
    for number in np.random.default_rng([seed, count]).permutation(count):
        if tokens + corpus.lengths[number] <= wanted:
            held.append(number)
            tokens += corpus.lengths[number]
    if 2 * tokens > wanted and len(held) < count:
        inside = np.zeros(count, bool)
        inside[held] = True
        parts = corpus.take(np.flatnonzero(~inside)), corpus.take(np.flatnonzero(inside))
    else:
        at = len(corpus.text) - wanted
        ends = corpus.starts + corpus.lengths
        before, after = np.clip(at - corpus.starts, 0, corpus.lengths), np.clip(ends - at, 0, corpus.lengths)
        if not 0 < at < len(corpus.text):
            raise _no_targets(fraction, corpus)
        parts = (
            Corpus._laid(corpus.text[:at], before[before > 0]),
            Corpus._laid(corpus.text[at:], after[after > 0]),
        )
    if any(part.lengths.max() < 2 for part in parts):
        raise _no_targets(fraction, corpus)
    training, held_out = parts
    return dataclasses.replace(training, empty=corpus.empty), held_out


def _no_targets(fraction: float, corpus: Corpus) -> DataError:
    return DataError(
        "data.eval_fraction: must leave at least 2 tokens of a document on each side. "
        f"Got {fraction} of {len(corpus.text)} tokens in {len(corpus.lengths)} documents."
    )


class Measured(Protocol):
    """Batches in which every token of a corpus stands once."""

    def __len__(self) -> int: ...

    def on_devices(self, step: int, sharding: NamedSharding) -> Batch: ...

    def on_host(self, step: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """One pass over the corpus: a stream of documents and the order in which its sequences are taken."""

    documents: np.ndarray  # int64: which document comes k-th
    ends: np.ndarray  # int64: where in the stream the k-th one ends
    sequences: np.ndarray  # int64: a permutation of range(number of sequences)


class Batches:
    """Batches of a corpus, by step number. Make them with :meth:`from_tokens`.

    Args:
      corpus: the documents.
      config: length and number of sequences, seed.
      layout: the ring's layout, a name or an object.
      num_shards: devices on the ring.
    """

    names: tuple[str, ...] = ("tokens", "targets", "segment_ids", "loss_mask")  # of the arrays of a batch
    shared_length: int | None = None  # a promise about its segments, see ring_attention
    notes: tuple[str, ...] = ()  # what there is to tell

    def __init__(self, corpus: Corpus, config: Data, *, layout: str | ringjax.Layout, num_shards: int) -> None:
        self.corpus = corpus
        self.config = config
        self.layout: str | ringjax.Layout = layout
        self.num_shards = num_shards
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)  # two: a batch may straddle two epochs
        natural = np.arange(config.sequence_length)
        self._positions: np.ndarray = ringjax.to_ring_order(natural, layout=layout, num_shards=num_shards, axis=0)
        # A corpus shorter than one sequence is repeated until it fills one.
        self._repeats = -(-config.sequence_length // len(corpus.text))
        self._per_epoch = self._repeats * len(corpus.text) // config.sequence_length

    @classmethod
    def from_tokens(
        cls,
        documents: Iterable[Any],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        layout: str | ringjax.Layout | None = None,
        num_shards: int = 1,
        packing: str = "stream",
        window: int | tuple[int | None, int | None] | None = None,
    ) -> Batches:
        """Batches of documents that are tokens already.

        Args:
          documents: integer arrays [tokens], or lists of integers, one per document; empty ones are left out. Nothing
            is added to them, no end token either.
          sequence_length: T, a multiple of what the layout deals to num_shards.
          batch_size: B, sequences of a batch.
          seed: of the shuffle, 0 or more.
          layout, num_shards: the ring order, as the decoder's ``layout`` and the devices on its ring. None: "zigzag",
            or "contiguous" of balanced packing, which deals the tokens itself.
          packing: "stream" lays documents end to end and cuts them where a sequence ends; "balanced" keeps them whole
            and deals them so that every device works equally, see :func:`ringjax.pack`.
          window: of balanced packing, the decoder's ``local_window_size``.

        Raises:
          ValueError: naming the argument, what is required and what was given.
          DataError: no document holds a token.
        """
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_shards", num_shards, 1),
        ):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}. Got {value!r}.")
        kept = []
        for number, document in enumerate(documents):
            try:
                kept.append(as_ids(document))
            except ValueError as error:
                raise ValueError(f"documents[{number}] {error}") from None
        if packing not in ("stream", "balanced"):
            raise ValueError(f"packing must be 'stream' or 'balanced'. Got {packing!r}.")
        balanced = packing == "balanced"
        if balanced and layout not in (None, "contiguous"):
            raise ValueError(f"layout must be 'contiguous' or None with packing 'balanced'. Got {layout!r}.")
        if balanced and sequence_length % num_shards:
            raise ValueError(f"sequence_length must be a multiple of num_shards, {num_shards}. Got {sequence_length}.")
        if window is not None and not balanced:
            raise ValueError(f"window must be None with packing 'stream', which takes no notice of it. Got {window!r}.")
        config = Data(
            sequence_length=int(sequence_length), batch_size=int(batch_size), seed=int(seed),
            packing="balanced" if balanced else "stream",
        )  # fmt: skip
        corpus = Corpus.of(kept)
        if balanced:
            from .packed import Packed

            return Packed(corpus, config, num_shards=int(num_shards), window=window)
        return cls(corpus, config, layout="zigzag" if layout is None else layout, num_shards=int(num_shards))

    def on_devices(self, step: int, sharding: NamedSharding) -> Batch:
        """The batch of a step, as arrays [B, T] by name; each process builds only the shards of its own devices.

        Args:
          step: counted from 0.
          sharding: of every array.
        """
        shape = (self.config.batch_size, self.config.sequence_length)
        built: dict[str, dict[str, np.ndarray]] = {}  # devices along the tensor axis hold the same shard

        def shard(name: str, index: Any) -> np.ndarray:
            rows, columns = (range(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            key = f"{rows} {columns}"
            if key not in built:
                built[key] = self.on_host(step, rows, self._positions[columns.start : columns.stop])
            return built[key][name]

        make = jax.make_array_from_callback
        return {name: make(shape, sharding, functools.partial(shard, name)) for name in self.names}

    def on_host(
        self, step: int, rows: Iterable[int] | None = None, positions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of a step, or a part of it, as numpy arrays by name.

        tokens, targets, segment_ids: int32; loss_mask: bool; of balanced packing also positions: int32, the place of
        each token in its document.

        Args:
          step: counted from 0.
          rows: of the batch; None: all.
          positions: places of the sequence in natural order; None: all, in ring order.
        """
        rows = range(self.config.batch_size) if rows is None else rows
        at = self._positions if positions is None else positions
        parts = [self._row(step * self.config.batch_size + row, at) for row in rows]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def once(self, batch_size: int) -> Measured:
        """The same documents as they come, every token once: to measure on."""
        config = dataclasses.replace(self.config, batch_size=batch_size)
        return Once(self.corpus, config, layout=self.layout, num_shards=self.num_shards)

    def _row(self, number: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Sequence `number` of the run, at `positions`."""
        epoch = self._epoch(number // self._per_epoch)
        first = epoch.sequences[number % self._per_epoch] * self.config.sequence_length
        return self._cut(epoch, first, first + positions)

    def _cut(self, epoch: _Epoch, first: int, at: np.ndarray) -> dict[str, np.ndarray]:
        """A sequence that starts at `first` in the stream, at the places `at` of the stream."""
        place = np.searchsorted(epoch.ends, at, side="right")  # which document of the stream
        document = epoch.documents[place]
        source = self.corpus.starts[document] + self.corpus.lengths[document] - (epoch.ends[place] - at)
        has_next = at + 1 < epoch.ends[place]
        text = self.corpus.text
        return {
            "tokens": text[source].astype(np.int32),
            "targets": np.where(has_next, text[source + has_next], 0).astype(np.int32),
            "segment_ids": (place - np.searchsorted(epoch.ends, first, side="right") + 1).astype(np.int32),
            "loss_mask": has_next,
        }

    def _make_epoch(self, number: int) -> _Epoch:
        random = np.random.default_rng([self.config.seed, number])
        count = len(self.corpus.lengths)
        documents = np.concatenate([random.permutation(count) for _ in range(self._repeats)])
        ends = np.cumsum(self.corpus.lengths[documents])
        return _Epoch(documents, ends, random.permutation(self._per_epoch))


class Once(Batches):
    """Batches in which every token of a corpus stands once, in its order; what fills up the last one counts nothing."""

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.corpus.text) // (self.config.sequence_length * self.config.batch_size))

    def _row(self, number: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        length = len(self.corpus.text)
        first = min(number * self.config.sequence_length, length - 1)
        at = number * self.config.sequence_length + positions
        row = self._cut(self._epoch(0), first, np.minimum(at, length - 1))
        row["loss_mask"] &= at < length  # the last token of a document has no target: neither have its copies
        return row

    def _make_epoch(self, number: int) -> _Epoch:
        del number  # Unused: there is one.
        return _Epoch(np.arange(len(self.corpus.lengths)), np.cumsum(self.corpus.lengths), np.zeros(1, np.int64))
