"""The call, its checks, and what it returns."""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrangement import Arrangement, Dealt, arrange
from .balance import by_block, imbalance
from .pairs import Bounds, document_pairs
from .sequences import fill
from .shards import LEFT_OVER, SHARED, Rows, deal, unlucky

_EVEN = 0.98  # of what tolerance allows; the rest is for pieces of shared documents, which differ by a token
_ATTEMPTS = 6  # to do without sequences that share much more than others


class Shared(NamedTuple):
    """What is shared by all devices.

    Attributes:
      documents: how many.
      tokens: theirs, over all tokens.
    """

    documents: int
    tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Documents dealt into sequences of C shards. ``packing[i]`` is the arrangement of sequence i, made when asked for.

    Attributes:
      num_shards, shard_length: C, L.
      axes: sizes of the axes of the sequence, outermost first; C is their product.
      shared_length: G, the same for every axis: the places at the front of each shard that tokens of shared documents
        take at most. Of the keys of a shard only these are needed elsewhere.
      num_sequences: how many there are; ``len(packing)`` too.
      left_over: int64, indices of documents that are in none of them, ascending. Put them first in the next call.
      imbalance: float64 [sequences], attended pairs of the rank with most of them, over the mean.
      lockstep_imbalance: float64 [sequences], the same where every hop of a ring lasts as long as its busiest rank: the
        sum over hops of the most pairs of a rank, over the mean of ranks.
      padding: places without a token, over all places.
      shared: how many documents are shared, and which part of all tokens they have.
      dealt: the documents of all sequences.
    """

    num_shards: int
    axes: tuple[int, ...]
    shard_length: int
    shared_length: int
    num_sequences: int
    left_over: np.ndarray
    imbalance: np.ndarray
    lockstep_imbalance: np.ndarray
    padding: float
    shared: Shared
    dealt: Dealt = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.num_sequences

    def __iter__(self) -> Iterator[Arrangement]:
        return (self[index] for index in range(self.num_sequences))

    def __getitem__(self, index: int) -> Arrangement:
        place = range(self.num_sequences)[index]
        return arrange(self.dealt.part(place, place + 1))


def pack(
    lengths: Any,
    *,
    num_shards: int | tuple[int, ...],
    shard_length: int,
    seed: int = 0,
    is_causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    prefix: Any = None,
    shared_length: int | None = None,
    multiple: int = 128,
    tolerance: float = 1.05,
    final: bool = False,
) -> Packing:
    r"""Packs whole documents into sequences of C shards of L tokens, so that every device of a ring works equally.

    A document is local, all its tokens in one shard, or shared by all. A shared document is cut in 2 C pieces, of which
    rank r holds pieces r and 2C - 1 - r, so that every rank does the same work at every hop; pieces 2r and 2r + 1 where
    it is as long as two windows. Its tokens come first in each shard, and only these are needed elsewhere. Local
    documents are dealt so that shards are equal in pairs,

    .. math::  \max_r W_r \le tolerance \cdot \frac{1}{C} \sum_r W_r

    and in tokens. Those with the most pairs are shared, as few as this takes, and those that fit into no shard.

    Runs on the host, with NumPy. The result depends on the arguments alone.

    Args:
      lengths: integers [documents], tokens of each.
      num_shards: C, devices on the ring; of several axes of strategy "ring" the size of each, outermost first, C being
        their product. Documents are shared by all C devices, over all axes, or by none.
      shard_length: L, tokens of each in one sequence.
      seed: another one deals otherwise.
      is_causal, window: the mask, as ``is_causal`` and ``local_window_size`` of :func:`ringjax.ring_attention`.
      prefix: integers [documents]: all tokens of a document attend to so many at its beginning (a prefix language
        model). As many as the document has: full attention. Causal masks only.
      shared_length: G, places of a shard that shared documents may take. None: as many as it takes. Otherwise documents
        that do not fit are left over, and balance is as good as it gets.
      multiple: where G is chosen here it is a multiple of this, or L.
      tolerance: pairs of the rank with most of them, over the mean, for which documents are shared.
      final: also fill a last sequence, in part, with what is left over otherwise.

    Returns:
      A :class:`ringjax.packing.Packing`. Documents that do not fill a sequence are left over, not dropped:
      put them first in the next call.

    Raises:
      ValueError: for arguments that do not fit, naming the argument, what is required and what was given.
    """
    axes = _axes(num_shards)
    num_shards = math.prod(axes)
    shard_length = _integer("shard_length", shard_length, least=1)
    seed = _integer("seed", seed, least=0)
    multiple = _integer("multiple", multiple, least=1)
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real) or not tolerance >= 1:
        raise ValueError(f"tolerance must be a number of at least 1, most pairs over the mean. Got {tolerance!r}.")
    if not isinstance(final, bool):
        raise ValueError(f"final must be True or False. Got {final!r}.")
    bounds = _bounds(window, is_causal)
    most_shared = shard_length
    if shared_length is not None:
        most_shared = _integer("shared_length", shared_length, least=0)
        if most_shared > shard_length:
            raise ValueError(f"shared_length must be at most shard_length, {shard_length}. Got {shared_length}.")
    sizes = _lengths(lengths, num_shards, shard_length, most_shared)
    prefixes = _prefix(prefix, sizes, is_causal)

    rng = np.random.default_rng(seed)
    documents, shard, of, left = _sequences(
        sizes,
        document_pairs(sizes, prefixes, bounds).astype(np.float64),
        num_shards=num_shards,
        shard_length=shard_length,
        most_shared=most_shared,
        tolerance=1 + _EVEN * (float(tolerance) - 1),
        attempts=_ATTEMPTS if shared_length is None else 0,
        final=final,
        rng=rng,
    )
    number = int(of.max(initial=-1)) + 1
    of = rng.permutation(number)[of]
    order = np.lexsort((shard, of))
    documents, shard, of = documents[order], shard[order], of[order]
    dealt = Dealt(
        documents=documents,
        lengths=sizes[documents],
        prefix=prefixes[documents],
        shard=shard,
        start=np.searchsorted(of, np.arange(number + 1)),
        num_shards=num_shards,
        shard_length=shard_length,
        has_prefixes=prefix is not None,
        bounds=bounds,
        axes=axes,
    )
    if shared_length is None:
        each = -(-int(dealt.shared_tokens().max(initial=0)) // num_shards)
        most_shared = min(shard_length, -(-each // multiple) * multiple)
    return _packing(dealt, left, most_shared)


def _sequences(
    sizes: np.ndarray,
    pairs: np.ndarray,
    *,
    num_shards: int,
    shard_length: int,
    most_shared: int,
    tolerance: float,
    attempts: int,
    final: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Documents, the shard and the sequence of each, and those that are left over.

    Sequences are filled and dealt until what is left has fewer tokens than one. As often as ``attempts`` says those
    that share much more than others are filled anew, as one of them would decide how much of all travels.
    """
    capacity = num_shards * shard_length
    left = np.arange(len(sizes))
    found = [np.empty((3, 0), np.int64)]  # document, shard, sequence
    number = 0
    while more := max(int(sizes[left].sum()) // capacity, int(final and len(left) > 0)):
        of = fill(
            sizes[left],
            num_sequences=more,
            capacity=capacity,
            longest_local=shard_length,
            most_shared=num_shards * most_shared,
            rng=rng,
        )
        documents, (filled, of) = left[of >= 0], np.unique(of[of >= 0], return_inverse=True)
        order = np.lexsort((documents, -pairs[documents], sizes[documents] <= shard_length, of))
        documents, of = documents[order], of[order]
        rows = Rows(
            lengths=sizes[documents],
            pairs=pairs[documents],
            start=np.searchsorted(of, np.arange(len(filled) + 1)),
            num_shards=num_shards,
            shard_length=shard_length,
            most_shared=most_shared,
            tolerance=tolerance,
        )
        shard = deal(rows)
        kept = shard != LEFT_OVER
        if attempts:
            attempts -= 1
            again = unlucky(rows, shard)
            kept &= ~(again | np.roll(again, 1))[of]  # together with the documents of another one
        filled, of = np.unique(of[kept], return_inverse=True)
        found.append(np.stack([documents[kept], shard[kept], of + number]))
        number += len(filled)
        left = np.setdiff1d(left, documents[kept], assume_unique=True)
    documents, shard, of = np.concatenate(found, axis=1)
    return documents, shard, of, left


def _packing(dealt: Dealt, left: np.ndarray, shared_length: int) -> Packing:
    number, shared = dealt.num_sequences, dealt.shard == SHARED
    total, lockstep = imbalance(by_block(work, dealt.axes, ("ring",) * len(dealt.axes)) for work in dealt.works())
    tokens = int(dealt.lengths.sum())
    places = number * dealt.num_shards * dealt.shard_length
    return Packing(
        num_shards=dealt.num_shards,
        axes=dealt.axes,
        shard_length=dealt.shard_length,
        shared_length=shared_length,
        num_sequences=number,
        left_over=left,
        imbalance=total,
        lockstep_imbalance=lockstep,
        padding=(places - tokens) / max(places, 1),
        shared=Shared(documents=int(shared.sum()), tokens=int(dealt.lengths[shared].sum()) / max(tokens, 1)),
        dealt=dealt,
    )


# --- arguments -------------------------------------------------------------------------------------------------------


def _integer(name: str, given: Any, *, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or int(given) < least:
        raise ValueError(f"{name} must be an integer of at least {least}. Got {given!r}.")
    return int(given)


def _axes(given: Any) -> tuple[int, ...]:
    if not isinstance(given, (tuple, list)):
        return (_integer("num_shards", given, least=1),)
    if not given or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1 for n in given):
        raise ValueError(
            f"num_shards must be an integer of at least 1, or one for each axis, outermost first. Got {given!r}."
        )
    return tuple(int(n) for n in given)


def _integers(name: str, given: Any) -> np.ndarray:
    array = np.asarray(given)
    if array.ndim == 1 and not array.size:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers [documents]. Got {array.dtype.name} {array.shape}.")
    return array.astype(np.int64)


def _lengths(given: Any, num_shards: int, shard_length: int, most_shared: int) -> np.ndarray:
    lengths = _integers("lengths", given)
    wrong = np.flatnonzero(lengths < 1)
    if len(wrong):
        raise ValueError(f"lengths must be positive. Got {lengths[wrong[0]]} of document {wrong[0]}.")
    capacity = num_shards * shard_length
    wrong = np.flatnonzero(lengths > capacity)
    if len(wrong):
        raise ValueError(
            f"lengths must be at most num_shards * shard_length = {num_shards} * {shard_length} = {capacity}. "
            f"Got {lengths[wrong[0]]} of document {wrong[0]}."
        )
    wrong = np.flatnonzero((lengths > shard_length) & (lengths > num_shards * most_shared))
    if len(wrong):
        raise ValueError(
            f"lengths must be at most shard_length, {shard_length}, or num_shards * shared_length = {num_shards} * "
            f"{most_shared} = {num_shards * most_shared}. Got {lengths[wrong[0]]} of document {wrong[0]}."
        )
    return lengths


def _prefix(given: Any, lengths: np.ndarray, is_causal: bool) -> np.ndarray:
    if given is None:
        return np.zeros_like(lengths)
    prefix = _integers("prefix", given)
    if prefix.shape != lengths.shape:
        raise ValueError(f"prefix must have a number for each of {len(lengths)} documents. Got {len(prefix)}.")
    wrong = np.flatnonzero((prefix < 0) | (prefix > lengths))
    if len(wrong):
        first = wrong[0]
        raise ValueError(
            f"prefix must be from 0 to the length of its document. Got {prefix[first]} of document {first} with "
            f"{lengths[first]} tokens."
        )
    if not is_causal:
        raise ValueError("prefix must be None where is_causal is False: all tokens attend to all. Got an array.")
    return prefix


def _bounds(window: Any, is_causal: Any) -> Bounds:
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal must be True or False. Got {is_causal!r}.")
    sides: Sequence[Any] = window if isinstance(window, (tuple, list)) else (window, window)
    whole = [
        side is None or (isinstance(side, numbers.Integral) and not isinstance(side, bool) and int(side) >= 0)
        for side in sides
    ]
    if len(sides) != 2 or not all(whole):
        raise ValueError(
            "window must be None, a non-negative integer or a pair (left, right) of non-negative integers or None. "
            f"Got {window!r}."
        )
    left, right = (None if side is None else int(side) for side in sides)
    return Bounds(left, 0 if is_causal else right)
