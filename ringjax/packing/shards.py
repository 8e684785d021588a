"""Documents of a sequence onto its shards: which are shared by all, and which shard has each of the others.

All sequences are dealt side by side, each as one row of arrays.
"""

import dataclasses

import numpy as np

SHARED, LEFT_OVER = -1, -2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Documents of sequences, one sequence after another.

    Attributes:
      lengths: int64 [documents].
      pairs: float64 [documents], attended pairs.
      start: int64 [sequences + 1], where the documents of each sequence begin. Within one, documents that are longer
        than a shard come first, then those with the most pairs.
      num_shards, shard_length: C, L.
      most_shared: tokens that a shard may hold of shared documents.
      tolerance: the most pairs of a shard, over the mean.
    """

    lengths: np.ndarray
    pairs: np.ndarray
    start: np.ndarray
    num_shards: int
    shard_length: int
    most_shared: int
    tolerance: float


def deal(rows: Rows) -> np.ndarray:
    """The shard of each document, SHARED or LEFT_OVER: int64 [documents].

    The first k documents of a sequence are shared, and those for which no shard has room. The least k is looked for,
    by trial, with which all fit and no shard has more than ``tolerance`` times the mean of attended pairs: first more
    and more, in steps that double, then between the last one that would not do and the first that did.
    """
    first, last = rows.start[:-1], rows.start[1:]
    least, most = _least_shared(rows), _most_shared(rows)
    low = np.minimum(least, most) - 1  # known, or assumed, not to do
    high = most + 1  # known to do; beyond what is possible, none yet
    step = np.ones_like(low)
    out = np.full(len(rows.lengths), LEFT_OVER, np.int64)
    while True:
        open_rows = np.flatnonzero(low + 1 < high)
        if not len(open_rows):
            break
        found = high[open_rows] <= most[open_rows]
        upward = np.minimum(low[open_rows] + step[open_rows], most[open_rows])
        tried = np.where(found, (low[open_rows] + high[open_rows]) // 2, upward)
        step[open_rows] *= 2
        trial = _Deal(rows, open_rows, tried)
        good = trial.good
        trial.write(out, good, SHARED)
        high[open_rows] = np.where(good, tried, high[open_rows])
        low[open_rows] = np.where(good, low[open_rows], tried)
    hopeless = np.flatnonzero((high > most) & (last > first))
    if len(hopeless):  # as good as it gets
        _Deal(rows, hopeless, most[hopeless]).write(out, np.ones(len(hopeless), bool), LEFT_OVER)
    return out


def unlucky(rows: Rows, shard: np.ndarray) -> np.ndarray:
    """Sequences that share clearly more tokens than most, and than any of them must: bool [sequences]."""
    first, last = rows.start[:-1], rows.start[1:]
    shared = _before(np.where(shard == SHARED, rows.lengths, 0))
    tokens = shared[last] - shared[first]
    before = _before(rows.lengths)
    needed = before[first + _least_shared(rows)] - before[first]
    return tokens > 1.05 * max(np.median(tokens), needed.max(initial=0))


def _before(x: np.ndarray) -> np.ndarray:
    """Sums of all that comes before, and in the end of all."""
    return np.concatenate([[0], np.cumsum(x)])


class _Deal:
    """One trial: of each sequence the first documents are shared, the others are dealt, those with most pairs first.

    A document goes to the shard with the fewest pairs that has room for it.
    """

    def __init__(self, rows: Rows, which: np.ndarray, shared: np.ndarray) -> None:
        self.rows, self.num_shards = rows, rows.num_shards
        # The longest rows first: those that are still being dealt are then the first ones at every step.
        order = np.argsort(rows.start[which] + shared - rows.start[which + 1], kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        which, shared = which[order], shared[order]
        self.back = back
        self.first, self.begin, self.end = rows.start[which], rows.start[which] + shared, rows.start[which + 1]
        tokens_before = _before(rows.lengths)
        pairs_before = _before(rows.pairs)
        self.top_tokens = tokens_before[self.begin] - tokens_before[self.first]
        self.all_pairs = pairs_before[self.end] - pairs_before[self.first]
        self.room = rows.shard_length - -(-self.top_tokens // self.num_shards)
        self.pairs = np.zeros((len(which), self.num_shards))
        self.tokens = np.zeros((len(which), self.num_shards), np.int64)
        self.shard = np.full(int((self.end - self.begin).sum()), SHARED, np.int64)
        self.offset = _before(self.end - self.begin)[:-1]
        self.unplaced_tokens = np.zeros(len(which), np.int64)
        self._run()

    def _run(self) -> None:
        width = max(1, self.num_shards // 16)
        counts = self.end - self.begin
        active = len(counts)
        for step in range(0, int(counts.max(initial=0)), width):
            while active and counts[active - 1] <= step:
                active -= 1
            if width == 1:
                self._place(np.arange(active), np.full(active, step))
            else:
                self._place_several(active, step, width)

    def _score(self, row: np.ndarray | slice, document: np.ndarray) -> np.ndarray:
        """Pairs of each shard; inf where it has no room for a document, one of each row.

        Of shards with as many pairs the first is less, by a fraction of a pair: what numpy makes of equal numbers
        depends on the machine.
        """
        room = self.room[row] - self.rows.lengths[document]
        fraction = np.arange(self.num_shards) / self.num_shards
        return np.where(self.tokens[row] <= room[:, None], self.pairs[row] + fraction, np.inf)

    def _place(self, row: np.ndarray, step: np.ndarray) -> None:
        """The document at ``step`` of each of these rows."""
        document = self.begin[row] + step
        score = self._score(row, document)
        shard = score.argmin(axis=1)
        fits = np.isfinite(score[np.arange(len(row)), shard])
        self.unplaced_tokens[row[~fits]] += self.rows.lengths[document[~fits]]
        row, step, shard, document = row[fits], step[fits], shard[fits], document[fits]
        self.tokens[row, shard] += self.rows.lengths[document]
        self.pairs[row, shard] += self.rows.pairs[document]
        self.shard[self.offset[row] + step] = shard

    def _place_several(self, active: int, step: int, width: int) -> None:
        """The next ``width`` documents of each row onto as many shards; those that find no room there one by one."""
        score = self._score(slice(active), self.begin[:active] + step)
        shards = np.argpartition(score, width - 1, axis=1)[:, :width]
        chosen = np.take_along_axis(score, shards, axis=1)
        shards = np.take_along_axis(shards, np.argsort(chosen, axis=1, kind="stable"), axis=1)
        at = step + np.arange(width)
        there = self.begin[:active, None] + at < self.end[:active, None]
        document = np.minimum(self.begin[:active, None] + at, len(self.rows.lengths) - 1)
        length = np.where(there, self.rows.lengths[document], 0)
        room = self.room[:active, None] - np.take_along_axis(self.tokens[:active], shards, axis=1)
        fits = there & (length <= room)
        inside, place = np.nonzero(fits)  # no shard twice in a row
        shard, chosen = shards[inside, place], document[inside, place]
        self.tokens[inside, shard] += self.rows.lengths[chosen]
        self.pairs[inside, shard] += self.rows.pairs[chosen]
        self.shard[self.offset[inside] + at[place]] = shard
        alone = there & ~fits
        for place in np.flatnonzero(alone.any(axis=0)):
            row = np.flatnonzero(alone[:, place])
            self._place(row, np.full(len(row), step + place))

    @property
    def good(self) -> np.ndarray:
        """Whether all fit, and no shard has too many pairs; in the order in which the rows were given."""
        each = -(-(self.top_tokens + self.unplaced_tokens) // self.num_shards)
        fits = (self.tokens.max(axis=1) + each <= self.rows.shard_length) & (each <= self.rows.most_shared)
        shared_pairs = self.all_pairs - self.pairs.sum(axis=1)
        most = self.num_shards * self.pairs.max(axis=1) + shared_pairs
        return (fits & (most <= self.rows.tolerance * self.all_pairs * (1 + 1e-9)))[self.back]

    def write(self, out: np.ndarray, which: np.ndarray, unplaced: int) -> None:
        """The shards of documents of some of the rows, with a word for those that found no room."""
        chosen = np.empty_like(which)
        chosen[self.back] = which
        row = np.flatnonzero(chosen)
        out[_ranges(self.first[row], self.begin[row])] = SHARED
        dealt = self.shard[_ranges(self.offset[row], self.offset[row] + self.end[row] - self.begin[row])]
        out[_ranges(self.begin[row], self.end[row])] = np.where(dealt < 0, unplaced, dealt)


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The integers of several ranges, one after another."""
    sizes = last - first
    total = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) + np.repeat(first - total + sizes, sizes)


def _least_shared(rows: Rows) -> np.ndarray:
    """Documents that are shared in any case: they are longer than the room, or have more pairs than a shard may."""
    first, last = rows.start[:-1], rows.start[1:]
    row = np.repeat(np.arange(len(first)), last - first)
    tokens = np.cumsum(rows.lengths) - rows.lengths
    pairs = np.cumsum(rows.pairs) - rows.pairs
    tokens, pairs = tokens - tokens[first[row]], pairs - pairs[first[row]]
    whole = np.bincount(row, weights=rows.pairs, minlength=len(first))[row]
    fits = rows.lengths <= rows.shard_length - -(-tokens // rows.num_shards)
    fits &= rows.num_shards * rows.pairs + pairs <= rows.tolerance * whole * (1 + 1e-9)
    index = np.where(fits, np.arange(len(row)), len(row))
    out = last - first
    filled = np.flatnonzero(last > first)
    if len(filled):
        out[filled] = np.minimum(np.minimum.reduceat(index, first[filled]), last[filled]) - first[filled]
    return out


def _most_shared(rows: Rows) -> np.ndarray:
    """How many documents of each row may be shared at most: int64 [sequences]."""
    first, last = rows.start[:-1], rows.start[1:]
    row = np.repeat(np.arange(len(first)), last - first)
    tokens = np.cumsum(rows.lengths)
    tokens = tokens - (tokens - rows.lengths)[first[row]]
    fits = tokens <= rows.num_shards * rows.most_shared
    return np.bincount(row, weights=fits, minlength=len(first)).astype(np.int64)
