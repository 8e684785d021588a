"""Who holds which block at which hop, and which hops exist. Pure Python, enumerable; knows no arrays and no devices.

An *offset* t means that rank r works on the block of rank (r + t) mod C. Offset 0 is the own block. To come from
offset a to offset b every rank r sends what it holds to rank (r - (b - a)) mod C: neighbours for b = a + 1.

A *strand* is a chain of offsets that one travelling block visits, starting from home (offset 0, whether or not home
itself is one of its hops). A full ring is one strand 0, 1, ..., C-1. A sliding window needs only the ranks near the
own one, some before and some after it, so it has up to two strands: 0, 1, 2 one way round and -1, -2 the other.
"""

import dataclasses

from .layout import Layout


@dataclasses.dataclass(frozen=True)
class Hop:
    """One step: every rank works on the block at ``offset``.

    ``shift`` is the rotation that brings the block here: from the previous hop, or from home if the hop is the
    ``first`` of its strand. ``homeward`` is the rotation from here back home.
    """

    offset: int
    shift: int
    first: bool

    @property
    def homeward(self) -> int:
        return -self.offset


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The hops of one attention call on a ring of ``num_shards`` devices; a strand is a tuple of offsets."""

    num_shards: int
    strands: tuple[tuple[int, ...], ...]

    @property
    def hops(self) -> tuple[Hop, ...]:
        """All hops, strand after strand."""
        return tuple(
            Hop(offset=offset, shift=offset - (strand[i - 1] if i else 0), first=i == 0)
            for strand in self.strands
            for i, offset in enumerate(strand)
        )

    @property
    def num_rotations(self) -> int:
        """Rotations of K/V in the forward pass; the backward pass makes as many."""
        return sum(hop.shift != 0 for hop in self.hops)

    def holds(self, rank: int) -> tuple[int, ...]:
        """The blocks that this rank works on, hop by hop."""
        return tuple((rank + hop.offset) % self.num_shards for hop in self.hops)


def permutation(shift: int, num_shards: int) -> tuple[tuple[int, int], ...]:
    """(source, destination) pairs of the rotation that moves every rank's view by ``shift`` offsets."""
    return tuple((rank, (rank - shift) % num_shards) for rank in range(num_shards))


def plan(
    num_shards: int,
    layout: Layout | None,
    query_length: int,
    key_length: int,
    *,
    left: int | None,
    right: int | None,
    direction: str = "forward",
) -> Schedule:
    """The hops that at least one rank needs.

    Args:
      num_shards: C.
      layout: None where positions are given by the user, so that nothing is known before run time: every hop is made.
      query_length, key_length: shard lengths.
      left, right: a query at position p sees keys in [p - left, p + right]; None is unbounded. Causal is right = 0.
      direction: "forward". "both" (half of K/V each way round) is not implemented yet.
    """
    if direction != "forward":
        raise NotImplementedError(f"direction: only 'forward' is implemented. Got {direction!r}.")
    needed = set(range(num_shards))
    if layout is not None and (left is not None or right is not None):
        needed = layout.needed_offsets(num_shards, query_length, key_length, left, right) | {0}
    return Schedule(num_shards, _strands(needed, num_shards))


def _strands(needed: set[int], num_shards: int) -> tuple[tuple[int, ...], ...]:
    """Cut the circle of offsets at its widest gap: what lies before the gap goes forward, the rest backward."""
    ring = [*sorted(needed), num_shards]  # offset C is home again
    gaps = [after - before for before, after in zip(ring[:-1], ring[1:], strict=True)]
    # On a tie cut late: a full ring (all gaps 1) is then one forward strand that ends at C-1.
    cut = max(range(len(gaps)), key=lambda i: (gaps[i], i))
    forward = tuple(ring[: cut + 1])
    backward = tuple(t - num_shards for t in reversed(ring[cut + 1 : -1]))
    return (forward, backward) if backward else (forward,)
