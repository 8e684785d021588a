"""Real text -> batches in ring order. A batch is a function of (seed, step) alone, so nothing is saved to resume.

The documents of an epoch are shuffled and laid end to end; the stream is cut into sequences of T bytes, which are
shuffled too. Each document in a sequence is a segment of its own. The target of a byte is the next byte of the same
document; the last byte of a document has none (its loss mask is False).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

import ringjax

from .config import Data

VOCAB_SIZE = 256  # bytes
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
Batch = dict[str, jax.Array]
"""tokens, targets, segment_ids: int32 [B, T]; loss_mask: bool [B, T]. All in ring order."""


class DataError(ValueError):
    """There is no text where the configuration says there is."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents, laid end to end. Document i is text[starts[i] : starts[i] + lengths[i]]."""

    text: np.ndarray  # uint8 [bytes]
    starts: np.ndarray  # int64 [documents]
    lengths: np.ndarray  # int64 [documents], each at least 1
    fingerprint: str  # the same for the same documents in the same order
    empty: str = ""  # names of files without text, where the user gave some

    @classmethod
    def of(cls, documents: Iterable[bytes]) -> Corpus:
        """Drops empty documents. Raises: DataError if no byte is left."""
        kept = [document for document in documents if document]
        if not kept:
            raise DataError("data: needs at least one document that is not empty. Got none.")
        lengths = np.array([len(document) for document in kept], np.int64)
        text = np.frombuffer(b"".join(kept), np.uint8)
        digest = hashlib.sha256(lengths.tobytes())
        digest.update(text.tobytes())
        return cls(text=text, starts=np.cumsum(lengths) - lengths, lengths=lengths, fingerprint=digest.hexdigest()[:16])


def read(config: Data) -> Corpus:
    """Reads the documents that `config` names, a file each. Raises: DataError."""
    if config.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY & {*p.relative_to(root).parts})
        if not files:
            raise DataError(
                f"data.source: 'stdlib' needs the .py files of the standard library in {root}. Got none; "
                "set data.source = 'paths' and data.paths."
            )
    else:
        files = list(_find(config.paths))
    documents = [_bytes_of(file) for file in files]
    empty = [file for file, document in zip(files, documents, strict=True) if not document]
    if len(empty) == len(files):
        raise DataError(f"data: needs text. Got nothing but empty files: {_some(empty)}.")
    corpus = Corpus.of(documents)
    # The library has empty files on purpose; an empty file among the user's is worth a word.
    return corpus if config.source == "stdlib" else dataclasses.replace(corpus, empty=_some(empty))


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data: must be readable. Got {file} ({error.strerror}).") from None


def _some(files: Sequence[Path]) -> str:
    """The names of files, no more than a line takes."""
    shown = ", ".join(str(file) for file in files[:3])
    return f"{shown} and {len(files) - 3} more" if len(files) > 3 else shown


def _find(patterns: Sequence[str]) -> Iterator[Path]:
    """Files of the patterns, in their order, each file once; a directory stands for all visible files below it."""
    seen: set[Path] = set()
    for pattern in patterns:
        try:
            files = _matches(pattern)
        except (OSError, RuntimeError) as error:  # a directory that may not be entered; no home of that name
            raise DataError(f"data.paths: each entry must be readable. Got {pattern!r} ({error}).") from None
        if not files:
            raise DataError(f"data.paths: each entry must match at least one file. Got {pattern!r} in {Path.cwd()}.")
        yield from (file for file in files if file.resolve() not in seen)
        seen.update(file.resolve() for file in files)


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    hits = [expanded] if expanded.exists() else [Path(p) for p in glob.glob(str(expanded), recursive=True)]
    return sorted({file for hit in hits for file in ([hit] if hit.is_file() else _visible_files(hit))})


def _visible_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """One pass over the corpus: a stream of documents and the order in which its sequences are taken."""

    documents: np.ndarray  # int64: which document comes k-th
    ends: np.ndarray  # int64: where in the stream the k-th one ends
    sequences: np.ndarray  # int64: a permutation of range(number of sequences)


class Batches:
    """Batches of a corpus, by step number.

    Args:
      corpus: the documents.
      config: length and number of sequences, seed.
      layout: the ring's layout, a name or an object.
      num_shards: devices on the ring.
    """

    def __init__(self, corpus: Corpus, config: Data, *, layout: str | ringjax.Layout, num_shards: int) -> None:
        self._corpus = corpus
        self._config = config
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)  # two: a batch may straddle two epochs
        natural = np.arange(config.sequence_length)
        self._positions: np.ndarray = ringjax.to_ring_order(natural, layout=layout, num_shards=num_shards, axis=0)
        # A corpus shorter than one sequence is repeated until it fills one.
        self._repeats = -(-config.sequence_length // len(corpus.text))
        self._per_epoch = self._repeats * len(corpus.text) // config.sequence_length

    def on_devices(self, step: int, sharding: NamedSharding) -> Batch:
        """The batch of a step (counted from 0); each process builds only the shards of its own devices."""
        shape = (self._config.batch_size, self._config.sequence_length)
        built: dict[str, dict[str, np.ndarray]] = {}  # devices along the tensor axis hold the same shard

        def shard(name: str, index: Any) -> np.ndarray:
            rows, columns = (range(*s.indices(n)) for s, n in zip(index, shape, strict=True))
            key = f"{rows} {columns}"
            if key not in built:
                built[key] = self.on_host(step, rows, self._positions[columns.start : columns.stop])
            return built[key][name]

        names = ("tokens", "targets", "segment_ids", "loss_mask")
        return {name: jax.make_array_from_callback(shape, sharding, functools.partial(shard, name)) for name in names}

    def on_host(
        self, step: int, rows: Iterable[int] | None = None, positions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The given rows of the batch of a step, at the given positions of the sequence (default: all, ring order)."""
        rows = range(self._config.batch_size) if rows is None else rows
        at = self._positions if positions is None else positions
        parts = [self._row(step * self._config.batch_size + row, at) for row in rows]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _row(self, number: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Sequence `number` of the run, at `positions`."""
        epoch = self._epoch(number // self._per_epoch)
        first = epoch.sequences[number % self._per_epoch] * self._config.sequence_length
        at = first + positions
        place = np.searchsorted(epoch.ends, at, side="right")  # which document of the stream
        document = epoch.documents[place]
        source = self._corpus.starts[document] + self._corpus.lengths[document] - (epoch.ends[place] - at)
        has_next = at + 1 < epoch.ends[place]
        text = self._corpus.text
        return {
            "tokens": text[source].astype(np.int32),
            "targets": np.where(has_next, text[source + has_next], 0).astype(np.int32),
            "segment_ids": (place - np.searchsorted(epoch.ends, first, side="right") + 1).astype(np.int32),
            "loss_mask": has_next,
        }

    def _make_epoch(self, number: int) -> _Epoch:
        random = np.random.default_rng([self._config.seed, number])
        count = len(self._corpus.lengths)
        documents = np.concatenate([random.permutation(count) for _ in range(self._repeats)])
        ends = np.cumsum(self._corpus.lengths[documents])
        return _Epoch(documents, ends, random.permutation(self._per_epoch))
