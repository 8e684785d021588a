"""What a caller promises of documents, held against segment ids that can be seen. On the host, NumPy alone.

A shard is looked at as runs of one id, of which packed documents have few: what is sorted is runs, not tokens.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from .arguments import (
    check_fits_shard,
    check_max_segment_length,
    check_shared_length,
    fitting_integers,
)
from .layout import Layout, as_layout, padded_length

Ids = Int[np.ndarray, "B T"] | Int[jax.Array, "B T"]


def check_segments(
    segment_ids: Ids | tuple[Ids, Ids],
    *,
    layout: str | Layout = "contiguous",
    num_shards: int | tuple[int, ...],
    max_segment_length: int | None = None,
    shared_length: int | tuple[int, ...] | None = None,
) -> None:
    """Whether segments keep the promises that :func:`ring_attention` is given of them. For batches on the host.

    ``ring_attention`` asks the same of arrays whose values it can see, which under ``jit`` it cannot.

    Args:
      segment_ids: integers [B, T] in ring order, or a pair ([B, T], [B, S]) for query and key. Padding that repeats one
        id is a segment like any other: give each token of padding an id of its own.
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of devices on the ring; of several axes the size of each, outermost first.
      max_segment_length: M, a positive integer: no two tokens of one segment lie M or more places apart in the natural
        order of the sequence.
      shared_length: G, or one for each axis: where a segment has tokens at several places of an axis, or of axes
        outside it, all of them are among the first G of their shards.

    Raises:
      ValueError: for a promise that is broken, with the id, its row and where it lies; for arguments that do not fit.
    """
    sizes = num_shards if isinstance(num_shards, (tuple, list)) else (num_shards,)
    if not sizes or not all(isinstance(size, (int, np.integer)) and size > 0 for size in sizes):
        raise ValueError(f"num_shards must be a positive integer, or one for each axis. Got {num_shards!r}.")
    pair = isinstance(segment_ids, (tuple, list))
    if pair and len(segment_ids) != 2:
        raise ValueError(f"segment_ids must be one array or a pair (query, key). Got a sequence of {len(segment_ids)}.")
    sides = []
    for ids in segment_ids if pair else (segment_ids,):
        if isinstance(ids, Tracer):
            raise ValueError("segment_ids must be an array whose values can be seen, outside jit. Got a traced array.")
        ids = np.asarray(fitting_integers("segment_ids", ids))
        if ids.ndim != 2 or (sides and len(ids) != len(sides[0])):
            raise ValueError(f"segment_ids must have shape [B, T], of one batch size. Got {ids.shape}.")
        sides.append(ids)
    promise = Promise(
        layout=as_layout(layout),
        sizes=tuple(int(size) for size in sizes),
        max_segment_length=check_max_segment_length(max_segment_length, segment_ids),
        shared_length=check_shared_length(shared_length, segment_ids, len(sizes)),
    )
    promise.hold_against(sides, [None] * len(sides))


def hold_against(promise: "Promise", segment_ids: Any, q_lengths: Any = None, kv_lengths: Any = None) -> None:
    """Of whole arrays: now if their values can be seen, when they run if JAX is to check.

    Tokens beyond a sequence's length take part in nothing, and so in no promise.
    """
    if not promise.says_anything:
        return
    pair = isinstance(segment_ids, (tuple, list))
    # As they were given: what is a constant to NumPy is traced by jit once JAX has it.
    sides = list(segment_ids) if pair else [segment_ids]
    lengths = [q_lengths, kv_lengths]
    if not pair:
        sides, lengths = (sides, lengths[:1]) if q_lengths is kv_lengths else (sides * 2, lengths)
    if not any(isinstance(x, Tracer) for x in (*sides, *lengths)):
        if all(x.is_fully_addressable for x in (*sides, *lengths) if isinstance(x, jax.Array)):
            promise.hold_against(
                [np.asarray(x) for x in sides], [None if x is None else np.asarray(x) for x in lengths]
            )
    elif jax.config.jax_enable_checks:  # pyright: ignore[reportAttributeAccessIssue]
        jax.debug.callback(functools.partial(_at_run_time, promise), sides, lengths)


def _at_run_time(promise: "Promise", sides: Any, lengths: Any) -> None:
    promise.hold_against([np.asarray(x) for x in sides], [None if x is None else np.asarray(x) for x in lengths])


class _Runs(NamedTuple):
    """Consecutive tokens of one id within a shard; a column for each run."""

    row: np.ndarray
    id: np.ndarray
    first: np.ndarray  # place of its first token in the natural order
    last: np.ndarray
    shard: np.ndarray
    end: np.ndarray  # index in the shard of its last token


class Promise(NamedTuple):
    """What is promised, checked; see :func:`check_segments`."""

    layout: Layout
    sizes: tuple[int, ...]  # of the axes of the sequence, outermost first
    max_segment_length: int | None
    shared_length: tuple[int, ...] | None

    @property
    def says_anything(self) -> bool:
        return self.max_segment_length is not None or self.shared_length is not None

    def hold_against(self, sides: list[np.ndarray], lengths: list[np.ndarray | None]) -> None:
        """Ids [B, T] of each side, and how long its sequences are."""
        num_shards = math.prod(self.sizes)
        longest = max(padded_length(ids.shape[1], self.layout, num_shards) for ids in sides)
        check_fits_shard(self.shared_length, longest // num_shards)
        each = [self._runs(ids, length) for ids, length in zip(sides, lengths, strict=True)]
        runs = _Runs(*(np.concatenate(parts) for parts in zip(*each, strict=True)))
        if not runs.id.size:
            return
        order = np.lexsort((runs.id, runs.row))
        runs = _Runs(*(part[order] for part in runs))
        begins = np.ones(runs.id.size, bool)
        begins[1:] = (runs.id[1:] != runs.id[:-1]) | (runs.row[1:] != runs.row[:-1])
        start = np.flatnonzero(begins)
        self._check_extent(runs, start)
        self._check_shared(runs, start)

    def _runs(self, ids: np.ndarray, lengths: np.ndarray | None) -> _Runs:
        """In ring order, where places grow within a shard."""
        length, num_shards = ids.shape[1], math.prod(self.sizes)
        total = padded_length(length, self.layout, num_shards)
        slot = np.arange(total)
        shard_length = max(total // num_shards, 1)
        place = self.layout.positions(slot // shard_length, slot % shard_length, shard_length, num_shards)
        shard, index, place = (x[place < length] for x in (slot // shard_length, slot % shard_length, place))
        begins = np.ones(ids.shape, bool)
        begins[:, 1:] = (ids[:, 1:] != ids[:, :-1]) | (shard[1:] != shard[:-1])[None]
        present = None if lengths is None else place[None] < lengths[:, None]
        if present is not None:
            begins[:, 1:] |= present[:, 1:] != present[:, :-1]
        start = np.flatnonzero(begins)
        end = np.append(start[1:], ids.size)[: start.size] - 1
        if present is not None:
            kept = present.ravel()[start]
            start, end = start[kept], end[kept]
        row, column, stop = start // max(length, 1), start % max(length, 1), end % max(length, 1)
        return _Runs(
            row=row,
            id=ids.ravel()[start],
            first=place[column],
            last=place[stop],
            shard=shard[column],
            end=index[stop],
        )

    def _check_extent(self, runs: _Runs, start: np.ndarray) -> None:
        if self.max_segment_length is None:
            return
        first, last = np.minimum.reduceat(runs.first, start), np.maximum.reduceat(runs.last, start)
        broken = np.flatnonzero(last - first >= self.max_segment_length)
        if broken.size:
            n = broken[0]
            raise ValueError(
                "segment_ids must hold no two tokens of one id that lie max_segment_length = "
                f"{self.max_segment_length} or more places apart. Got id {runs.id[start[n]]} of row "
                f"{runs.row[start[n]]} at places {first[n]} and {last[n]}, {last[n] - first[n]} apart."
            )

    def _check_shared(self, runs: _Runs, start: np.ndarray) -> None:
        for axis, shared in enumerate(self.shared_length or ()):
            place = runs.shard // math.prod(self.sizes[axis + 1 :])
            end = np.maximum.reduceat(runs.end, start)
            several = np.minimum.reduceat(place, start) != np.maximum.reduceat(place, start)
            broken = np.flatnonzero(several & (end >= shared))
            if not broken.size:
                continue
            n = broken[0]
            of_id = slice(start[n], start[n + 1] if n + 1 < start.size else None)
            shards, ends = runs.shard[of_id], runs.end[of_id]
            far = np.argmax(ends >= shared)
            along = "" if len(self.sizes) == 1 else f" along axis {axis} or one outside it"
            raise ValueError(
                f"segment_ids must lie among the first shared_length = {shared} tokens of each shard where one id "
                f"lies in several shards{along}. Got id {runs.id[start[n]]} of row {runs.row[start[n]]} in shards "
                f"{shards.min()} to {shards.max()}, and at token {ends[far]} of shard {shards[far]}."
            )
