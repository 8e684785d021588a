"""Who may attend to whom: positions, segments and lengths to an elementwise predicate.

The one place that says so. A query at position p with segment a attends to a key at position r with segment b when

    p - left <= r <= p + right   (each bound only if given; causal is right = 0)      and      a == b

and both are present. Absent tokens (padding, and what lies beyond a sequence's length) are the last ones of a shard in
every layout, so a count says which they are. Which tiles a kernel visits follows in :mod:`ringjax.kernels.visits`.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from .layout import Runs

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


class Tokens(NamedTuple):
    """What the mask knows of the tokens of one side. ``B1`` is the batch size, or 1 if it is the same for all rows."""

    positions: Runs | Int32[Array, "B1 L"] | None = None  # None where neither bound is given
    segments: Int32[Array, "B1 L"] | None = None  # None where everything is in one segment
    length: Int32[Array, " B1"] | None = None  # how many are present, the first ones of the shard. None: all


class Vectors(NamedTuple):
    """The part of :class:`Tokens` that is an array along the sequence: what a kernel must load."""

    positions: Array | None
    segments: Array | None


class QuerySide(NamedTuple):
    """First and last position that a query attends to, its segment, whether it is present. None: no such condition."""

    first: Array | None
    last: Array | None
    segments: Array | None
    present: Array | None


class KeySide(NamedTuple):
    """Position and segment of a key, and whether it is present. None: no such condition."""

    positions: Array | None
    segments: Array | None
    present: Array | None


def attends(queries: QuerySide, keys: KeySide) -> Bool[Array, "..."]:
    """The predicate itself, elementwise: give the sides as columns and rows that broadcast against each other."""
    conditions = [x for x in (queries.present, keys.present) if x is not None]
    if keys.positions is not None and queries.first is not None:
        conditions.append(keys.positions >= queries.first)
    if keys.positions is not None and queries.last is not None:
        conditions.append(keys.positions <= queries.last)
    if keys.segments is not None and queries.segments is not None:
        conditions.append(queries.segments == keys.segments)
    return functools.reduce(operator.and_, conditions) if conditions else jnp.ones((), dtype=bool)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("queries", "keys"), meta_fields=("left", "right"))
@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask between one query shard and one block."""

    queries: Tokens = Tokens()
    keys: Tokens = Tokens()
    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Known at trace time: every query attends to every key."""
        return all(x is None for x in (*self.queries, *self.keys))

    @property
    def has_vectors(self) -> bool:
        """Whether some of it is an array along the sequence, so that tiles are listed and not ranges of arithmetic."""
        return any(x is not None for side in self.vectors() for x in side)

    def vectors(self, q_length: int = 0, kv_length: int = 0) -> tuple[Vectors, Vectors]:
        """Of queries and keys, extended to at least these lengths; what is beyond the end is absent, see ``rule``."""
        return _vectors(self.queries, q_length), _vectors(self.keys, kv_length)

    def numbers(self, q_length: int, kv_length: int) -> Int32[Array, "B1 6"]:
        """Base, step and tokens present, of queries then of keys: what :class:`Rule` needs besides the vectors."""
        sides = (_numbers(self.queries, q_length), _numbers(self.keys, kv_length))
        batch = max(x.shape[0] for side in sides for x in side)
        return jnp.stack([jnp.broadcast_to(x, (batch,)) for side in sides for x in side], axis=1)

    def rule(self, q_length: int, kv_length: int, *, ragged_q: bool, ragged_kv: bool) -> "Rule":
        """For a kernel's body. ``ragged_q`` and ``ragged_kv``: some tile reaches beyond the last token of the shard."""
        return Rule(
            queries=_side_rule(self.queries, q_length, ragged_q),
            keys=_side_rule(self.keys, kv_length, ragged_kv),
            left=self.left,
            right=self.right,
        )

    def predicate(self, q_length: int, kv_length: int) -> Bool[Array, "B1 T S"]:
        """True where the query attends to the key. For small arrays: it is T x S."""
        rule = self.rule(q_length, kv_length, ragged_q=False, ragged_kv=False)
        queries, keys = self.vectors()
        numbers = tuple(self.numbers(q_length, kv_length)[:, n, None] for n in range(6))
        index = lambda length: jnp.arange(length, dtype=jnp.int32)[None]  # noqa: E731
        columns = jax.tree.map(lambda x: x[:, :, None], rule.of_queries(queries, numbers, index(q_length)))
        rows = jax.tree.map(lambda x: x[:, None, :], rule.of_keys(keys, numbers[3:], index(kv_length)))
        return attends(columns, rows)


@dataclasses.dataclass(frozen=True)
class SideRule:
    """What is known of one side's tokens at trace time."""

    run: int | None  # of positions that are three integers, see :class:`ringjax.layout.Runs`; None: they are not
    length: int  # of the shard
    counted: bool  # some tokens of some tile may be absent


@dataclasses.dataclass(frozen=True)
class Rule:
    """The mask as a kernel's body applies it: vectors are loaded tile by tile, the rest follows from six numbers."""

    queries: SideRule
    keys: SideRule
    left: int | None
    right: int | None

    @property
    def needs_numbers(self) -> bool:
        return any(side.run is not None or side.counted for side in (self.queries, self.keys))

    def of_queries(self, loaded: Vectors, numbers: Any, index: Array) -> QuerySide:
        """The side of the queries at ``index`` in the shard. Works on arrays of any shape, in a kernel too.

        Args:
          loaded: their positions and segments, as far as these are vectors.
          numbers: their base, step and tokens present, of :meth:`Mask.numbers` for this batch row. Only those that are
            needed are looked up: in some kernels each costs a load.
        """
        positions, present = _at(self.queries, loaded, numbers, index)
        first, last = window(positions, self.left, self.right, natural=self.queries.run is not None)
        return QuerySide(first, last, loaded.segments, present)

    def of_keys(self, loaded: Vectors, numbers: Any, index: Array) -> KeySide:
        """The same of keys."""
        positions, present = _at(self.keys, loaded, numbers, index)
        return KeySide(positions, loaded.segments, present)


def window(
    positions: Array | None, left: int | None, right: int | None, *, natural: bool
) -> tuple[Array | None, Array | None]:
    """First and last position that each query attends to; None is unbounded. Saturates where int32 would wrap around.

    ``natural``: positions count from 0 on, so that no bound can reach below int32.
    """
    if positions is None:
        return None, None
    first = last = None
    if left is not None:
        first = (positions if natural else jnp.maximum(positions, jnp.int32(_LOWEST + left))) - left
    if right is not None:
        last = positions if right == 0 else jnp.minimum(positions, jnp.int32(_HIGHEST - right)) + right
    return first, last


def _at(side: SideRule, loaded: Vectors, numbers: Any, index: Array) -> tuple[Array | None, Array | None]:
    """Positions, and which tokens are present."""
    positions = loaded.positions
    if side.run is not None:
        step = numbers[1] if side.run < side.length else 0
        positions = Runs(base=numbers[0], step=step, run=side.run, length=side.length).at(index)
    return positions, index < numbers[2] if side.counted else None


def _side_rule(tokens: Tokens, length: int, ragged: bool) -> SideRule:
    run = tokens.positions.run if isinstance(tokens.positions, Runs) else None
    return SideRule(run=run, length=length, counted=ragged or tokens.length is not None)


def _numbers(tokens: Tokens, length: int) -> tuple[Array, Array, Array]:
    one = lambda x: jnp.asarray(x, jnp.int32).reshape(-1)  # noqa: E731
    base = step = one(0)
    if isinstance(tokens.positions, Runs):
        base, step = one(tokens.positions.base), one(tokens.positions.step)
    return base, step, one(length if tokens.length is None else tokens.length)


def _vectors(tokens: Tokens, length: int) -> Vectors:
    positions = None if isinstance(tokens.positions, Runs) else tokens.positions
    return Vectors(*(_extend_edge(x, length) for x in (positions, tokens.segments)))


def _extend_edge(x: Array | None, length: int) -> Array | None:
    """Repeats the last one, so that the extent of the last tile does not grow."""
    if x is None or x.shape[1] >= length:
        return x
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), mode="edge")
