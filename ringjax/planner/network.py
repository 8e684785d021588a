"""What the wires of a topology give each axis of a mesh: bytes per second and device, for each kind of traffic.

The figures are those of an idle network on which all groups of the axis send at the same time.

- A torus has links between neighbours, each of which carries as much one way as the other at the same time. An axis
  takes whole sides where it can: then no two groups share a link. A side that two axes share gives the outer one steps
  that are as many links long as the inner one is wide, and the messages of neighbouring groups share these links.
- A switch gives every GPU as much to any other GPU of its host. Between hosts every GPU has a network card.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from .chips import Tpu
from .topology import Hosts, Slice, Topology

# Between the two devices of one chip, in links of the torus [Cloud TPU, TPU7x: die to die].
_CORE_LINKS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """Of one axis, in bytes/s that each device receives.

    Attributes:
      size: devices along the axis.
      hop: of a block that moves to the next device of the ring, one way.
      ways: 2 where a ring that goes both ways has twice as much, because the other direction of its links is idle.
      gather: of an all_gather, or a reduce_scatter.
      exchange: of an all_to_all.
      link: of the slowest link that the axis uses, one way: a message that it passes alone has as much.
      rings: so many rings through all devices of the axis share no link; see :mod:`ringjax.torus`.
    """

    size: int
    hop: float
    ways: int
    gather: float
    exchange: float
    link: float
    rings: int = 1


def links_of(topology: Topology, sizes: Sequence[int]) -> tuple[Links, ...]:
    """The links of every axis, outermost first.

    Raises:
      ValueError: unless the product of the sizes is the number of devices.
    """
    if math.prod(sizes) != topology.num_devices:
        raise ValueError(
            f"sizes must multiply to {topology.num_devices}, the devices of {topology.name}. Got {tuple(sizes)}."
        )
    if isinstance(topology, Hosts):
        return tuple(_switched(topology, sizes, n) for n in range(len(sizes)))
    return _torus(topology, sizes)


def _switched(hosts: Hosts, sizes: Sequence[int], axis: int) -> Links:
    """GPUs are counted host by host, the innermost axis first."""
    size, stride, a_host = sizes[axis], math.prod(sizes[axis + 1 :]), hosts.gpus_a_host
    inside, network = hosts.gpu.link_bandwidth, hosts.gpu.network_bandwidth
    here = max(1, min(size, a_host // stride))  # devices of a group in one host
    while size % here:
        here -= 1
    if here == size:
        # A device sends all that it can already, whichever way: a switch has no idle direction.
        return Links(size=size, hop=inside, ways=1, gather=inside, exchange=inside, link=inside)
    # Of what a device receives, the part from other hosts comes through its own card in an exchange; a gather brings it
    # into the host once, through the cards of all devices of the group there.
    outside = (size - here) / (size - 1)
    return Links(
        size=size,
        hop=min(inside, network),
        # Blocks enter a host through the card of one GPU and leave through that of another.
        ways=2 if here > 1 else 1,
        gather=min(inside, network * here / outside),
        exchange=min(inside, network / outside),
        link=min(inside, network),
    )


@dataclasses.dataclass(frozen=True)
class _Side:
    """One dimension of the box of devices."""

    size: int
    bandwidth: float  # of a link, one way
    wraps: bool
    is_core: bool = False


def _sides(topology: Slice) -> tuple[_Side, ...]:
    chip = topology.generation
    long = [side for side in topology.sides if side > 1]
    wraps = bool(long) and min(topology.sides) >= chip.wraps_every
    sides = [_Side(side, chip.link_bandwidth, wraps and side % chip.wraps_every == 0) for side in topology.sides]
    if chip.devices_per_chip > 1:
        sides.append(_Side(chip.devices_per_chip, _CORE_LINKS * chip.link_bandwidth, False, is_core=True))
    return tuple(sides)


def _torus(topology: Slice, sizes: Sequence[int]) -> tuple[Links, ...]:
    sides = _sides(topology)
    parts = min(_assignments([side.size for side in sides], tuple(sizes)), key=_awkwardness)
    chip = topology.generation
    return tuple(_on_torus(chip, sides, parts, axis) for axis in range(len(sizes)))


def _assignments(sides: Sequence[int], sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each side its factors, one for each axis, such that those of an axis multiply to its size."""
    if not sides:
        if all(size == 1 for size in sizes):
            yield ()
        return
    for factors in _factors(sides[0], sizes):
        rest = tuple(size // factor for size, factor in zip(sizes, factors, strict=True))
        for more in _assignments(sides[1:], rest):
            yield (factors, *more)


def _factors(side: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Ways to write a side as a product of divisors of the sizes."""
    divisors = [[d for d in range(1, side + 1) if side % d == 0 and size % d == 0] for size in sizes]
    return (factors for factors in itertools.product(*divisors) if math.prod(factors) == side)


def _awkwardness(parts: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """Sides that axes share, then how far the axes reach."""
    shared = sum(sum(factor > 1 for factor in factors) > 1 for factors in parts)
    return shared, sum(sum(factors) for factors in parts)


def _on_torus(chip: Tpu, sides: tuple[_Side, ...], parts: tuple[tuple[int, ...], ...], axis: int) -> Links:
    size = math.prod(factors[axis] for factors in parts)
    hops, gathers, exchanges, loops = [], [], [], []
    spans_cores = any(side.is_core and factors[axis] > 1 for side, factors in zip(sides, parts, strict=True))
    for side, factors in zip(sides, parts, strict=True):
        length, stride = factors[axis], math.prod(factors[axis + 1 :])
        if length == 1:
            continue
        wraps = side.wraps and length * stride == side.size
        # The devices of a chip share its links, unless one ring goes through both of them.
        devices = 1 if side.is_core else chip.devices_per_chip
        rings = 1 if spans_cores else devices
        one = side.bandwidth / stride
        hops.append(one / rings)
        if not side.is_core:
            gathers.append((2 if wraps else 1) * one / rings)
        # Half of what devices send crosses the middle of the side: over one link of each row, or two if it wraps.
        exchanges.append(4 * (2 if wraps else 1) * one / (length * devices))
        loops.append((length, wraps))
    whole = size == math.prod(side.size for side in sides)
    if not hops:  # one device alone
        return Links(size=1, hop=math.inf, ways=1, gather=math.inf, exchange=math.inf, link=chip.link_bandwidth)
    gather = sum(gathers) or min(hops)
    if chip.gather_links is not None:
        gather = min(gather, chip.gather_links * chip.link_bandwidth)
    return Links(
        size=size,
        hop=min(hops),
        ways=_ways(loops),
        gather=gather,
        exchange=min(exchanges),
        link=chip.link_bandwidth,
        rings=len(loops) if whole and chip.devices_per_chip == 1 and all(wraps for _, wraps in loops) else 1,
    )


def _ways(loops: list[tuple[int, bool]]) -> int:
    """2 where a cycle of single steps visits every device: otherwise a ring turns back and uses both directions."""
    if len(loops) == 1:
        length, wraps = loops[0]
        return 2 if wraps and length > 2 else 1
    return 2 if math.prod(length for length, _ in loops) % 2 == 0 else 1
