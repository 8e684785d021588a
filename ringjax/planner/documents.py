"""What becomes of given documents: one after another as they come, and dealt by :func:`ringjax.pack`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..layout import Contiguous, Zigzag
from ..packing import pack
from ..packing.balance import by_block, imbalance, works_as_they_come
from ..packing.pairs import Bounds
from ..units import size, table
from .estimate import Problem, Way, hops, received
from .words import layout_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Of all sequences.

    Attributes:
      mean, most: the mean, and the largest.
    """

    mean: float
    most: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dealing:
    """Documents in sequences on devices. Figures of one device, one layer and one call, both passes if asked.

    Attributes:
      layout: of the sequence.
      shared_length: tokens of a shard in documents of several shards, as promised; None: nothing is promised.
      sequences: how many whole ones.
      left_over: tokens that are in none.
      padding: places without a token, over all places.
      imbalance: attended pairs of the busiest device over the mean.
      lockstep_imbalance: the same where every hop of a ring lasts as long as its busiest device.
      hops_made, hops_elided: blocks that a device works on, its own among them, and those that nobody needs.
      wire_bytes: received, of segment ids and positions too.
      busiest_pairs: of the busiest device, hop by hop, times the number of devices; the mean of sequences, one head.
    """

    layout: str
    shared_length: int | None
    sequences: int
    left_over: int
    padding: float
    imbalance: Spread
    lockstep_imbalance: Spread
    hops_made: int
    hops_elided: int
    wire_bytes: int
    busiest_pairs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Given documents before and after they are packed.

    Attributes:
      number, tokens, longest: of the documents.
      cut: how many are longer than a sequence, and so cut to parts that are not.
      strategy: of the devices, in words.
      before: one after another as they come.
      after: dealt by :func:`ringjax.pack`.
    """

    number: int
    tokens: int
    longest: int
    cut: int
    strategy: str
    before: Dealing
    after: Dealing

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def deal_documents(lengths: np.ndarray, problem: Problem, way: Way) -> Documents:
    """Both ways to deal them.

    Args:
      lengths: int64 [documents].
      problem: the attention of one layer; its promises are those of the documents as they come, but for
        ``shared_length``, which is what :func:`ringjax.pack` may share.
      way: axes, strategies and the layout of the documents as they come.

    Raises:
      ValueError: for a layout whose chunks are no long runs, and for documents that do not fit the promises.
    """
    if not isinstance(way.layout, (Contiguous, Zigzag)):
        raise ValueError(f"layout must be 'contiguous' or 'zigzag' with documents. Got {layout_name(way.layout)!r}.")
    longest, most = int(lengths.max()), problem.max_segment_length
    num_ranks, length = math.prod(way.sizes), problem.query_length
    if most is not None and min(longest, num_ranks * length) > most:
        raise ValueError(f"max_segment_length must be at least {longest}, the longest of the documents. Got {most}.")
    return Documents(
        number=len(lengths),
        tokens=int(lengths.sum()),
        longest=longest,
        cut=int((lengths > num_ranks * length).sum()),
        strategy=" x ".join(f"{word} {n}" for word, n in zip(way.words, way.sizes, strict=True)),
        before=_as_they_come(lengths, dataclasses.replace(problem, shared_length=None), way),
        after=_packed(lengths, dataclasses.replace(problem, max_segment_length=None), way),
    )


def _as_they_come(lengths: np.ndarray, problem: Problem, way: Way) -> Dealing:
    problem = dataclasses.replace(problem, segments=True, positions=False)
    num_ranks, shard_length = math.prod(way.sizes), problem.query_length
    chunk = way.layout.chunk_length(shard_length)
    owner = np.asarray(way.layout.owner(np.arange(num_ranks * shard_length // chunk), num_ranks))
    works = works_as_they_come(lengths, owner, chunk, Bounds(problem.left, problem.right))
    return _dealing(problem, way, works, left_over=int(lengths.sum()) % (num_ranks * shard_length), padding=0.0)


def _packed(lengths: np.ndarray, problem: Problem, way: Way) -> Dealing:
    num_ranks, shard_length = math.prod(way.sizes), problem.query_length
    length = num_ranks * shard_length
    parts = -(-lengths // length)
    number = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
    lengths = np.minimum(np.repeat(lengths, parts) - number * length, length)
    longest, shared = int(lengths.max()), problem.shared_length
    if shared is not None and longest > max(shard_length, num_ranks * shared):
        raise ValueError(
            f"shared_length must be at least {-(-longest // num_ranks)} for a document of {longest} tokens, which is "
            f"longer than a shard of {shard_length}. Got {shared}."
        )
    packing = pack(
        lengths,
        num_shards=num_ranks,
        shard_length=shard_length,
        is_causal=problem.right == 0,
        window=(problem.left, problem.right),
        shared_length=problem.shared_length,
    )
    if not len(packing):
        raise ValueError(f"documents must fill a sequence of {length} tokens. Got {lengths.sum()} tokens that do not.")
    bounded = problem.left is not None or problem.right is not None
    problem = dataclasses.replace(problem, shared_length=packing.shared_length, segments=True, positions=bounded)
    return _dealing(
        problem,
        dataclasses.replace(way, layout=Contiguous()),
        packing.dealt.works(),
        left_over=int(lengths[packing.left_over].sum()),
        padding=packing.padding,
    )


def _dealing(problem: Problem, way: Way, works: Iterator[np.ndarray], *, left_over: int, padding: float) -> Dealing:
    words, made, all_blocks = hops(problem, way)
    totals: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for work in works:
            totals.append(work.sum(axis=(1, 2)).astype(np.float64))
            yield by_block(work, way.sizes, words)

    total, lockstep = imbalance(blocks())
    spread = lambda x: Spread(mean=float(x.mean()), most=float(x.max()))  # noqa: E731
    return Dealing(
        layout=layout_name(way.layout),
        shared_length=problem.shared_length,
        sequences=len(total),
        left_over=left_over,
        padding=padding,
        imbalance=spread(total),
        lockstep_imbalance=spread(lockstep),
        hops_made=made,
        hops_elided=all_blocks - made,
        wire_bytes=sum(received(problem, way).values()),
        busiest_pairs=float((np.concatenate(totals) * lockstep).mean()),
    )


def lines(documents: Documents) -> Iterator[str]:
    """A table; imbalance is the mean of sequences and the most of any."""
    cut = f", {documents.cut} of them longer than a sequence and cut" if documents.cut else ""
    yield (
        f"{documents.number} documents of {documents.tokens} tokens, at most {documents.longest}{cut}; on "
        f"{documents.strategy}, of one device and layer; imbalance in the mean and at most"
    )
    rows: list[tuple[str, ...]] = [
        ("documents", "layout", "imbalance", "in lockstep", "hops", "elided", "received", "padding", "shared")
    ]
    for name, found in (("as they come", documents.before), ("packed", documents.after)):
        spreads = (found.imbalance, found.lockstep_imbalance)
        rows.append((
            name,
            found.layout,
            *(f"{spread.mean:.3f} {spread.most:.3f}" for spread in spreads),
            str(found.hops_made),
            str(found.hops_elided),
            size(found.wire_bytes),
            f"{found.padding:.1%}",
            "-" if found.shared_length is None else str(found.shared_length),
        ))  # fmt: skip
    yield from table(rows)
