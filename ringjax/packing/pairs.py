"""Attended (query, key) pairs of documents, counted in closed form. NumPy only; no token is looked at.

A query at offset i of a document has the position max(i, prefix - 1), a key at offset j the position j, and a query at
position q attends to keys at positions in [q - left, q + right]; None is no bound, and a causal mask is right = 0.
"""

import dataclasses

import numpy as np

from ..pairs import attended_pairs, between

# A document of so many windows, or more, is cut straight. Measured at C = 8 and 64: see docs/packing.md.
_STRAIGHT = 2


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Which keys a query sees: positions in [q - left, q + right]; None is no bound."""

    left: int | None
    right: int | None

    def reach(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both bounds for documents of these lengths, in which no distance exceeds length - 1."""
        last = lengths - 1
        left, right = (last if side is None else np.minimum(side, last) for side in (self.left, self.right))
        return left, right

    def spare(self, lengths: np.ndarray) -> np.ndarray:
        """Whether a document of each of these lengths loses nothing to a window: bool [documents]."""
        left, right = self.reach(lengths)
        return (left == lengths - 1) & ((right == lengths - 1) | (self.right == 0))


def document_pairs(lengths: np.ndarray, prefix: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Pairs of whole documents: int64 [documents].

    A prefix of P tokens, which there is under a causal mask only, has P queries that attend to min(P, left + 1) keys
    each.
    """
    pairs = attended_pairs(lengths, bounds.left, bounds.right)
    if prefix.any():
        left, _ = bounds.reach(lengths)
        causal = np.where(prefix > 0, attended_pairs(prefix, bounds.left, 0), 0)
        pairs = pairs - causal + prefix * np.minimum(prefix, left + 1)
    return pairs


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Shared documents, cut. A document is a prefix and what follows it, either of which may be empty, and each of the
    two is cut in 2 C pieces: rank r holds pieces r and 2 C - 1 - r, or those of rank r - turn.

    Lengths of pieces differ by one at most, and which ones are longer goes round over all documents of a sequence, so
    that the ranks' sums differ by one at most.

    Attributes:
      sizes: int64 [documents, 2, 2 C], tokens of each piece in order of offsets; prefixes first.
      turn: int64 [documents], which rank has the first piece.
      straight: bool [documents], whether rank r holds pieces 2 r and 2 r + 1 instead, or those of rank r - turn.
    """

    sizes: np.ndarray
    turn: np.ndarray
    straight: np.ndarray

    @property
    def num_shards(self) -> int:
        """C."""
        return self.sizes.shape[2] // 2

    @property
    def starts(self) -> np.ndarray:
        """Offsets at which pieces start: [documents, 2, 2 C]."""
        flat = self.sizes.reshape(len(self.sizes), 4 * self.num_shards)
        return (np.cumsum(flat, axis=1) - flat).reshape(self.sizes.shape)

    @property
    def early(self) -> np.ndarray:
        """Which piece each rank holds first: [documents, C]."""
        place = (np.arange(self.num_shards) - self.turn[:, None]) % self.num_shards
        return np.where(self.straight[:, None], 2 * place, place)

    @property
    def late(self) -> np.ndarray:
        """Which it holds behind it: [documents, C]."""
        return np.where(self.straight[:, None], self.early + 1, 2 * self.num_shards - 1 - self.early)

    @property
    def owner(self) -> np.ndarray:
        """The rank of each piece: [documents, 2 C]."""
        piece = np.arange(2 * self.num_shards)
        place = np.where(self.straight[:, None], piece // 2, np.minimum(piece, piece[::-1]))
        return (place + self.turn[:, None]) % self.num_shards

    def of_ranks(self, which: np.ndarray) -> np.ndarray:
        """Sizes of the early or the late pieces of ranks: [documents, 2, C]."""
        return np.take_along_axis(self.sizes, which[:, None], axis=2)

    def part(self, which: np.ndarray) -> "Pieces":
        return Pieces(self.sizes[which], self.turn[which], self.straight[which])


def cut(lengths: np.ndarray, prefix: np.ndarray, sequence: np.ndarray, num_shards: int, bounds: Bounds) -> Pieces:
    """Cuts shared documents, those of one sequence one after another: ``sequence`` ascends.

    A document that is much longer than a window has equal work in all its pieces, and only neighbours have to do with
    each other: it is cut straight, two neighbours for each rank, so that all have the same at one hop. Zigzag would
    have it at two hops, of which the ranks at the ends need one only.

    Where a window cuts keys off, a document's first tokens have less work than others, which would always be on the
    first ranks: such documents begin on different ranks, evenly over those of a sequence (multiples of the golden
    ratio).
    """
    number = 2 * num_shards
    first = np.searchsorted(sequence, sequence)  # the first document of each one's sequence
    whole = bounds.spare(lengths)
    nth = np.cumsum(~whole)
    nth = nth - nth[first] + ~whole[first] - 1
    turn = np.where(whole, 0, (nth * ((5**0.5 - 1) / 2) % 1 * num_shards).astype(np.int64))

    far = np.maximum(*bounds.reach(lengths))
    straight = ~whole & (prefix == 0) & (_STRAIGHT * far <= lengths)
    spans = np.stack([prefix, lengths - prefix], axis=1)  # [documents, 2]
    longer = (spans % number).reshape(-1)
    before = np.cumsum(longer) - longer
    begin = ((before - before[2 * first].repeat(2)) % number).reshape(-1, 2, 1)
    # Places of longer pieces go round: the first piece of rank t for t < C, then the second one of rank t - C.
    pieces = Pieces(np.empty((len(lengths), 2, number), np.int64), turn, straight)
    piece = np.arange(number)
    is_late = np.where(straight[:, None], piece % 2 == 1, piece >= num_shards)
    place = pieces.owner + num_shards * is_late
    extra = (place[:, None] - begin) % number < longer.reshape(-1, 2, 1)
    return Pieces((spans // number)[:, :, None] + extra, turn, straight)


def shared_work(
    pieces: Pieces, lengths: np.ndarray, prefix: np.ndarray, sequence: np.ndarray, num_sequences: int, bounds: Bounds
) -> np.ndarray:
    """Pairs of the queries of each rank with the keys of each: int64 [sequences, C (queries), C (keys)].

    Args:
      pieces: of shared documents.
      lengths, prefix, sequence: of the same documents; ``sequence`` ascends and is below ``num_sequences``.
    """
    whole = bounds.spare(lengths)
    work = np.zeros((num_sequences, pieces.num_shards, pieces.num_shards), np.int64)
    if whole.any():
        work += _whole_work(pieces.part(whole), sequence[whole], num_sequences, bounds.right == 0)
    if not whole.all():
        cut_off = ~whole
        _add_window_work(work, pieces.part(cut_off), prefix[cut_off], sequence[cut_off], bounds)
    return work


def _whole_work(pieces: Pieces, sequence: np.ndarray, num_sequences: int, is_causal: bool) -> np.ndarray:
    """Of documents that no window cuts: sums over documents of products of lengths, which are products of matrices.

    They all begin on rank 0. Queries attend to all of the prefix. Beyond it query piece i attends to key pieces j < i
    and to half of itself: of a lower rank both pieces attend to the early one, of a higher one the late piece to both.
    """
    num_shards = pieces.num_shards
    early, late = pieces.of_ranks(pieces.early), pieces.of_ranks(pieces.late)
    prefix, rest = early[:, 0] + late[:, 0], early[:, 1] + late[:, 1]
    early, late = early[:, 1], late[:, 1]
    if not is_causal:  # all attend to all
        prefix, rest, early, late = prefix + rest, 0 * rest, 0 * early, 0 * late

    # [documents, C] to [sequences, documents of a sequence, C]. Products are exact in float64: below L^2 < 2^53.
    start = np.searchsorted(sequence, np.arange(num_sequences))
    place = np.arange(len(sequence)) - start[sequence]
    shape = (num_sequences, int(place.max()) + 1, num_shards)

    def of_sequences(x: np.ndarray) -> np.ndarray:
        out = np.zeros(shape)
        out[sequence, place] = x
        return out

    def products(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(of_sequences(queries).swapaxes(1, 2)) @ of_sequences(keys)

    lower = np.tri(num_shards, k=-1, dtype=bool)  # the keys' rank is lower
    work = products(prefix + rest, prefix)
    work += np.where(lower, products(rest, early), 0) + np.where(lower.T, products(late, rest), 0)
    own = (early * (early + 1) + late * (late + 1)) // 2 + early * late
    work[:, range(num_shards), range(num_shards)] += of_sequences(own).sum(axis=1)
    return work.astype(np.int64)


def _add_window_work(
    work: np.ndarray, pieces: Pieces, prefix: np.ndarray, sequence: np.ndarray, bounds: Bounds
) -> None:
    """Of documents that a window cuts: pairs of query piece i and key piece i - t, for every t that has any."""
    num_shards = pieces.num_shards
    has_prefix = bool(prefix.any())
    owner = pieces.owner
    if has_prefix:
        sizes, starts = (x.reshape(len(x), 4 * num_shards) for x in (pieces.sizes, pieces.starts))
        owner = np.tile(owner, (1, 2))
    else:
        sizes, starts = pieces.sizes[:, 1], pieces.starts[:, 1]
    number = owner.shape[1]
    least = int(sizes.min())  # no run of t pieces is shorter than t times that
    back, ahead = (
        number - 1 if side is None or has_prefix or not least else min(number - 1, side // least + 1)
        for side in (bounds.left, bounds.right)
    )
    flat = work.reshape(-1)
    for apart in range(-ahead, back + 1):
        queries = np.arange(max(0, apart), number + min(0, apart))
        keys = queries - apart
        pairs = _between(
            starts[:, queries], sizes[:, queries], starts[:, keys], sizes[:, keys], prefix[:, None], bounds
        )
        index = sequence[:, None] * num_shards**2 + owner[:, queries] * num_shards + owner[:, keys]
        np.add.at(flat, index.reshape(-1), pairs.reshape(-1))


def _between(
    query: np.ndarray, queries: np.ndarray, key: np.ndarray, keys: np.ndarray, prefix: np.ndarray, bounds: Bounds
) -> np.ndarray:
    """Pairs of a run of queries and one of keys, by first offset and length. No run of queries is in and out of the
    prefix."""
    pairs = between(key - query, queries, keys, bounds.left, bounds.right)
    # All queries of a prefix stand at its end.
    first = 0 if bounds.left is None else prefix - 1 - bounds.left
    seen = np.clip(np.minimum(key + keys, prefix) - np.maximum(key, first), 0, None)
    return np.where(query < prefix, queries * seen, pairs)
