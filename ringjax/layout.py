"""Layouts: which token of the sequence lies where on the ring. Index maths only, no devices.

A layout cuts a sequence of ``C * L`` tokens into equal chunks and deals them to ``C`` ranks. *Ring order* is the
order of the tokens when the shards of rank 0, 1, ..., C-1 are laid end to end.

    contiguous   rank i holds chunk i of C                      best for sliding windows
    zigzag       rank i holds chunks i and 2C-1-i of 2C          equal causal work on every rank and hop
    striped      token j lies on rank (j // stripe) mod C        equal causal work, any mask that is local in time

A sequence whose length is no multiple of the layout's unit is padded at its end; its ring order is the ring order of
the padded sequence with the padding left out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import take


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "step"), meta_fields=("run", "length"))
@dataclasses.dataclass(frozen=True)
class Runs:
    """Positions of the tokens of a shard as three integers: token i lies at base + (i // run) * step + i % run.

    They grow with i.

    Attributes:
      base: position of the first token; may be traced.
      step: from the start of a run to that of the next, at least ``run``; may be traced.
      run: consecutive tokens in a run.
      length: tokens of the shard.
    """

    base: Any  # an integer, or [B, 1] where batch rows differ
    step: Any  # at least run
    run: int
    length: int

    def at(self, index: Any) -> Any:
        """Position of the token at ``index`` of the shard, from 0 on; an integer or an array."""
        if self.run >= self.length:
            return self.base + index
        if self.run == 1:
            return self.base + index * self.step
        if self.length <= 2 * self.run and isinstance(index, jax.Array):
            return self.base + index + jnp.where(index >= self.run, self.step - self.run, jnp.int32(0))
        runs = jax.lax.div(index, jnp.int32(self.run)) if isinstance(index, jax.Array) else index // self.run
        return self.base + index + runs * (self.step - self.run)

    def part(self, start: int, stop: int) -> "Runs":
        """Positions of the tokens [start, stop) of the shard: within one run, or from the start of a run on.

        Raises:
          ValueError: a part of several runs starts within one.
        """
        if start // self.run == (stop - 1) // self.run:
            length = stop - start
            return Runs(base=self.at(start), step=length, run=length, length=length)
        if start % self.run:
            raise ValueError(f"start must be a multiple of {self.run} for a part that several runs share. Got {start}.")
        return Runs(base=self.at(start), step=self.step, run=self.run, length=stop - start)

    def find(self, position: Any) -> Any:
        """Index of the token at ``position``; ``length`` where it is none of this shard."""
        ahead = position - self.base
        index, here = ahead, ahead >= 0
        if self.run < self.length:
            whole = jax.lax.div(ahead, jnp.broadcast_to(jnp.asarray(self.step, ahead.dtype), ahead.shape))
            rest = ahead - whole * self.step
            index, here = whole * self.run + rest, here & (rest < self.run)
        return jnp.where(here & (index < self.length), index, self.length)

    def count_below(self, position: Any) -> Any:
        """How many tokens of the shard lie before ``position``."""
        ahead = position - self.base
        if self.run < self.length:
            ahead = jnp.maximum(ahead, 0)
            whole = jax.lax.div(ahead, jnp.broadcast_to(jnp.asarray(self.step, ahead.dtype), ahead.shape))
            ahead = whole * self.run + jnp.minimum(ahead - whole * self.step, self.run)
        return jnp.clip(ahead, 0, self.length)


class Layout:
    """How a sequence is dealt to the ranks of a ring. Subclasses are frozen dataclasses, so they hash and compare.

    A sequence of C L tokens is cut into equal chunks, and each rank holds as many chunks, in the order of the sequence.
    """

    def unit(self, num_shards: int) -> int:
        """The number that the sequence length must be a multiple of, on ``num_shards`` ranks."""
        raise NotImplementedError

    def shard_unit(self) -> int:
        """The number that the length of one shard must be a multiple of."""
        return self.unit(1)

    def chunk_length(self, shard_length: int) -> int:
        """The number of consecutive tokens in one chunk, given ``shard_length``, L."""
        raise NotImplementedError

    def owner(self, chunk: Any, num_shards: int) -> Any:
        """Which of ``num_shards`` ranks holds a ``chunk``, counted along the sequence; an integer or an array."""
        raise NotImplementedError

    def runs(self, rank: Any, shard_length: int, num_shards: int) -> Runs:
        """Positions of the shard of ``rank``, an integer, numpy or JAX array, as three integers.

        Args:
          rank: from 0 to ``num_shards`` - 1.
          shard_length, num_shards: L and C.
        """
        raise NotImplementedError

    def positions(self, rank: Any, index: Any, shard_length: int, num_shards: int) -> Any:
        """Global position of the token at ``index`` of the shard of ``rank``; integers, numpy or JAX arrays.

        ``shard_length`` and ``num_shards`` are L and C.
        """
        return self.runs(rank, shard_length, num_shards).at(index)

    def merge(self, x: Any) -> Any:
        """``x`` [B, shards, L, ...], the shards of ascending ranks, to [B, shards * L, ...] in ascending order."""
        raise NotImplementedError

    def split(self, x: Any, num_shards: int) -> Any:
        """The inverse of merge: ``x`` [B, shards * L, ...] to [B, ``num_shards``, L, ...]."""
        raise NotImplementedError

    def merged_runs(self, first: Any, offsets: tuple[int, ...], shard_length: int, num_shards: int) -> Runs | None:
        """Positions of the shards of ranks ``first + offsets``, merged. None: they are not three integers.

        ``shard_length`` and ``num_shards`` are L and C. None is always right: positions are an array then.
        """
        return self.runs(first, shard_length, num_shards) if offsets == (0,) else None


def _spacing(offsets: tuple[int, ...]) -> int | None:
    """The distance between neighbours where it is the same for all."""
    gaps = {after - before for before, after in zip(offsets[:-1], offsets[1:], strict=True)}
    return gaps.pop() if len(gaps) == 1 else None


def _rows(x: Any, *sizes: int) -> Any:
    """[B, n, ...] to [B, *sizes, ...]: the second axis alone changes."""
    return x.reshape(x.shape[0], *sizes, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Contiguous(Layout):
    """Rank i holds tokens [i L, (i + 1) L)."""

    def unit(self, num_shards: int) -> int:
        return num_shards

    def chunk_length(self, shard_length: int) -> int:
        return shard_length

    def owner(self, chunk: Any, num_shards: int) -> Any:
        return chunk

    def runs(self, rank: Any, shard_length: int, num_shards: int) -> Runs:
        return Runs(base=rank * shard_length, step=shard_length, run=shard_length, length=shard_length)

    def merge(self, x: Any) -> Any:
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def split(self, x: Any, num_shards: int) -> Any:
        return _rows(x, num_shards, x.shape[1] // num_shards)

    def merged_runs(self, first: Any, offsets: tuple[int, ...], shard_length: int, num_shards: int) -> Runs | None:
        if len(offsets) == 1:
            return self.runs(first, shard_length, num_shards)
        gap = _spacing(offsets)
        if gap is None:
            return None
        length = len(offsets) * shard_length
        run = length if gap == 1 else shard_length
        return Runs(base=first * shard_length, step=max(gap * shard_length, run), run=run, length=length)


@dataclasses.dataclass(frozen=True)
class Zigzag(Layout):
    """Rank i holds chunks i and 2C-1-i of 2C: an early and a late one, so causal work is equal on every rank."""

    def unit(self, num_shards: int) -> int:
        return 2 * num_shards

    def chunk_length(self, shard_length: int) -> int:
        return shard_length // 2

    def owner(self, chunk: Any, num_shards: int) -> Any:
        return np.minimum(chunk, 2 * num_shards - 1 - chunk)

    def runs(self, rank: Any, shard_length: int, num_shards: int) -> Runs:
        half = shard_length // 2
        between = 2 * num_shards - 1 - 2 * rank  # chunks from the early one to the late one
        return Runs(base=rank * half, step=between * half, run=half, length=shard_length)

    def merge(self, x: Any) -> Any:
        # The early chunks of all, then the late ones, of which the last rank holds the first.
        half = x.shape[2] // 2
        x = x.reshape(*x.shape[:2], 2, half, *x.shape[3:])
        both = jnp.stack([x[:, :, 0], x[:, ::-1, 1]], axis=1)
        return both.reshape(x.shape[0], -1, *x.shape[4:])

    def split(self, x: Any, num_shards: int) -> Any:
        x = _rows(x, 2, num_shards, x.shape[1] // (2 * num_shards))
        both = jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2)
        return both.reshape(x.shape[0], num_shards, -1, *x.shape[4:])

    def merged_runs(self, first: Any, offsets: tuple[int, ...], shard_length: int, num_shards: int) -> Runs | None:
        if len(offsets) == 1:
            return self.runs(first, shard_length, num_shards)
        if _spacing(offsets) != 1:
            return None
        half, count = shard_length // 2, len(offsets)
        between = 2 * num_shards - count - 2 * first
        return Runs(base=first * half, step=between * half, run=count * half, length=count * shard_length)


@dataclasses.dataclass(frozen=True)
class Striped(Layout):
    """Token j lies on rank (j // stripe) mod C.

    Attributes:
      stripe: consecutive tokens that lie together.

    Raises:
      ValueError: stripe is no positive integer.
    """

    stripe: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.stripe, int) or isinstance(self.stripe, bool) or self.stripe < 1:
            raise ValueError(f"Striped: stripe must be a positive integer. Got {self.stripe!r}.")

    def unit(self, num_shards: int) -> int:
        return num_shards * self.stripe

    def chunk_length(self, shard_length: int) -> int:
        return self.stripe

    def owner(self, chunk: Any, num_shards: int) -> Any:
        return chunk % num_shards

    def runs(self, rank: Any, shard_length: int, num_shards: int) -> Runs:
        return Runs(base=rank * self.stripe, step=num_shards * self.stripe, run=self.stripe, length=shard_length)

    def merge(self, x: Any) -> Any:
        x = x.reshape(*x.shape[:2], -1, self.stripe, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], -1, *x.shape[4:])

    def split(self, x: Any, num_shards: int) -> Any:
        x = _rows(x, x.shape[1] // (num_shards * self.stripe), num_shards, self.stripe)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], num_shards, -1, *x.shape[4:])

    def merged_runs(self, first: Any, offsets: tuple[int, ...], shard_length: int, num_shards: int) -> Runs | None:
        count, gap = len(offsets), _spacing(offsets)
        if count == 1:
            return self.runs(first, shard_length, num_shards)
        length, base = count * shard_length, first * self.stripe
        if gap == 1:
            run = min(count * self.stripe, length)
            return Runs(base=base, step=num_shards * self.stripe, run=run, length=length)
        if gap is not None and gap * count == num_shards:
            return Runs(base=base, step=gap * self.stripe, run=self.stripe, length=length)
        return None


_LAYOUTS: dict[str, Layout] = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}


def as_layout(layout: str | Layout) -> Layout:
    """The layout of this name, or the object itself."""
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str) and layout in _LAYOUTS:
        return _LAYOUTS[layout]
    names = ", ".join(repr(name) for name in _LAYOUTS)
    raise ValueError(f"layout must be one of {names} or a ringjax Layout object. Got {layout!r}.")


def padded_length(length: int, layout: Layout, num_shards: int) -> int:
    """The length rounded up to the layout's unit."""
    unit = layout.unit(num_shards)
    return -(-length // unit) * unit


def ring_order(length: int, layout: Layout, num_shards: int) -> np.ndarray:
    """Global positions in ring order, a permutation of range(length); int32 numpy, for any length."""
    total = padded_length(length, layout, num_shards)
    shard_length = total // num_shards
    slot = np.arange(total, dtype=np.int32)
    if total:
        slot = layout.positions(slot // shard_length, slot % shard_length, shard_length, num_shards)
    return slot[slot < length].astype(np.int32)


def ring_runs(length: int, layout: Layout, num_shards: int) -> list[tuple[int, int]]:
    """Where the tokens lie, in ring order, once the sequence is padded: runs [start, stop) between the padding."""
    there = ring_order(padded_length(length, layout, num_shards), layout, num_shards) < length
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _check(num_shards: Any, length: Any = 0, what: str = "length") -> None:
    if not isinstance(num_shards, (int, np.integer)) or num_shards < 1:
        raise ValueError(f"num_shards must be a positive integer. Got {num_shards!r}.")
    if not isinstance(length, (int, np.integer)) or length < 0:
        raise ValueError(f"{what} must be a non-negative integer. Got {length!r}.")


def ring_positions(length: int, *, layout: str | Layout = "contiguous", num_shards: int) -> jax.Array:
    """Global position of each token of a sequence in ring order: int32 [length]. Feed it to RoPE.

    ``x[:, ring_positions(T, ...)]`` brings any sequence into ring order. For a length that is no multiple of the
    layout's unit this is the ring order of the padded sequence with the padding left out.

    Args:
      length: number of tokens of the whole sequence.
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of devices on the ring.

    Returns:
      int32 [length].

    Raises:
      ValueError: for an unknown layout, a negative length or num_shards < 1.
    """
    layout = as_layout(layout)
    _check(num_shards, length)
    if length % layout.unit(num_shards) or not length:
        return jnp.asarray(ring_order(length, layout, num_shards))
    shard_length = length // num_shards  # arithmetic on an iota: no array of this length enters a compiled program
    slot = jnp.arange(length, dtype=jnp.int32)
    return layout.positions(slot // shard_length, slot % shard_length, shard_length, num_shards)


def _on_axis(x: Any, axis: int, name: str) -> tuple[Any, int]:
    """The leaf as an array (numpy stays numpy) and its axis as a non-negative number."""
    x = x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{name}: axis must be within the rank of every leaf. Got axis {axis}, shape {x.shape}.")
    return x, axis % x.ndim


def _take(x: Any, index: np.ndarray, axis: int) -> Any:
    return np.take(x, index, axis=axis) if isinstance(x, np.ndarray) else take(x, index, axis)


def to_ring_order(
    tree: Any,
    *,
    layout: str | Layout = "contiguous",
    num_shards: int,
    axis: int = 1,
    pad_value: Any = None,
) -> Any:
    """Bring every leaf from natural order into ring order along ``axis``. Do it once, to tokens, not to activations.

    Args:
      tree: pytree of arrays (tokens, targets, loss masks, segment ids). numpy arrays stay numpy arrays.
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of devices on the ring.
      axis: the sequence axis, the same for every leaf.
      pad_value: None, or a scalar for all leaves, or a pytree of scalars (a prefix of ``tree``): pads the end of the
        sequence up to the layout's unit (C contiguous, 2C zigzag, C * stripe striped).

    Returns:
      The tree in ring order.

    Raises:
      ValueError: if a length is no multiple of the unit and pad_value is None; for a bad axis, layout or num_shards.
    """
    layout = as_layout(layout)
    _check(num_shards)

    def permute(x: Any, fill: Any) -> Any:
        x, ax = _on_axis(x, axis, "to_ring_order")
        length = x.shape[ax]
        extra = padded_length(length, layout, num_shards) - length
        if extra and fill is None:
            raise ValueError(
                f"to_ring_order: the length must be a multiple of {layout.unit(num_shards)} "
                f"({layout} over {num_shards} shards), or pad_value must be given. Got length {length}."
            )
        if extra:
            widths = [(0, extra if i == ax else 0) for i in range(x.ndim)]
            x = (np if isinstance(x, np.ndarray) else jnp).pad(x, widths, constant_values=fill)
        return _take(x, ring_order(x.shape[ax], layout, num_shards), ax)

    fills = jax.tree.broadcast(pad_value, tree, is_leaf=lambda leaf: leaf is None)
    return jax.tree.map(permute, tree, fills)


def from_ring_order(
    tree: Any,
    *,
    layout: str | Layout = "contiguous",
    num_shards: int,
    axis: int = 1,
    length: int | None = None,
) -> Any:
    """The inverse of :func:`ringjax.to_ring_order`; ``length`` trims the padding off again.

    Args:
      tree: pytree of arrays in ring order. numpy arrays stay numpy arrays.
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of devices on the ring.
      axis: the sequence axis, the same for every leaf.
      length: of the sequence before it was padded; None: it was not.

    Returns:
      The tree in natural order.

    Raises:
      ValueError: if the length of a leaf is no multiple of the layout's unit, or is shorter than ``length``.
    """
    layout = as_layout(layout)
    _check(num_shards, 0 if length is None else length)

    def invert(x: Any) -> Any:
        x, ax = _on_axis(x, axis, "from_ring_order")
        total = x.shape[ax]
        if total % layout.unit(num_shards):
            raise ValueError(
                f"from_ring_order: the length must be a multiple of {layout.unit(num_shards)} "
                f"({layout} over {num_shards} shards). Got length {total}."
            )
        if length is not None and length > total:
            raise ValueError(f"from_ring_order: length must be at most the leaf's length {total}. Got {length}.")
        return _take(x, np.argsort(ring_order(total, layout, num_shards))[:length], ax)

    return jax.tree.map(invert, tree)
