"""Over which axis of the mesh a collective goes and how far, and what the links of that axis carry. Numbers only.

Devices are numbered row-major over what stands side by side and then the axes of the sequence. The links of an axis of
c devices are those between neighbours, a circle of c links with two directions each; two devices have one link, which
both permutes, by +1 and by -1, use in both directions. Several rings through the devices of an axis have c links each.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .hlo import HloError


@dataclasses.dataclass(frozen=True)
class Devices:
    """How the devices of a program are numbered.

    Attributes:
      sizes: how many groups stand side by side, then the axes of the sequence, outermost first.
      rings: devices along each of several rings through all of them, if there are several.
    """

    sizes: tuple[int, ...]
    rings: Sequence[Sequence[int]] = ()


class Route(NamedTuple):
    """Where a permute goes; None for what the program does not say.

    Attributes:
      axis: of the sequence.
      shift: every device of the axis sends to the one so many further on, the shorter way round, positive on a tie.
      ring: of several through the devices of the axis.
    """

    axis: int | None = None
    shift: int | None = None
    ring: int | None = None


_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")
_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Axes of a mesh, whose devices are in order unless it lists them; 'x':(2)4 is a part of axis x: 4 of it, after 2.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]*)\}"
)
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_SLICES = re.compile(r"_xla_megascale_target=\{((?:\{\d+->\d+\},?)+)\}")
_FIRST_OF_A_SLICE = 100_000  # devices of slice s are numbered from (s + 1) times this


def route(attributes: str, devices: Devices | None) -> Route:
    """Where a permute goes."""
    slices = _SLICES.search(attributes)
    if slices is not None:
        apart = {int(b) // _FIRST_OF_A_SLICE - int(a) // _FIRST_OF_A_SLICE for a, b in _numbers(slices[1], "->")}
        return Route(0, None if devices is None else _shorter(apart.pop(), devices.sizes[1]))
    found = _PAIRS.search(attributes)
    if found is None or devices is None:
        return Route()
    pairs = [(int(a), int(b)) for a, b in _numbers(found[1], ",")]
    for number, ring in enumerate(devices.rings):
        for shift in (1, -1):
            if set(pairs) == set(zip(ring, (*ring[shift:], *ring[:shift]), strict=True)):
                return Route(0, shift, number)
    sizes = devices.sizes
    source, target = (np.unravel_index(ends, sizes) for ends in zip(*pairs, strict=True))
    apart = [
        {int(step) for step in (b - a) % size} if size > 1 else {0}
        for a, b, size in zip(source, target, sizes, strict=True)
    ]
    moved = [n for n, steps in enumerate(apart) if steps != {0}]
    if len(moved) != 1 or len(apart[moved[0]]) != 1:
        return Route()
    (axis,) = moved
    return Route(axis - 1, _shorter(apart[axis].pop(), sizes[axis]))


def group(attributes: str, devices: Devices | None) -> tuple[int, int | None]:
    """(how many devices take part in one collective, the axis of the sequence that they are).

    Raises:
      HloError: the program does not say which devices take part.
    """
    groups = _groups(attributes)
    if devices is None:
        return groups.shape[1], None
    places = np.unravel_index(groups, devices.sizes)
    varying = [n for n, place in enumerate(places) if (place != place[:, :1]).any()]
    return groups.shape[1], varying[0] - 1 if len(varying) == 1 else None


def _groups(attributes: str) -> np.ndarray:
    found = _GROUPS.search(attributes)
    if found is not None:
        return np.array([[int(n) for n in one] for one in _numbers(found[1], ",")])
    iota = _IOTA.search(attributes)
    if iota is not None:
        return _transposed(iota[2], iota[3]).reshape(_integers(iota[1]))
    mesh = _MESH.search(attributes)
    if mesh is None:
        raise HloError(f"a collective must say which devices take part. Got {attributes[:80]!r}.")
    return _groups_of_mesh(*mesh.groups())


def _groups_of_mesh(axes: str, source: str | None, perm: str | None, listed: str | None, over: str) -> np.ndarray:
    """Groups over some axes of a mesh: devices that differ along these alone. Arguments are the groups of _MESH."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = _transposed(source or str(math.prod(sizes.values())), perm)
    if listed is not None:
        devices = np.array(_integers(listed))
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _PART.findall(over)}
    # Each axis as what is before, the part that is named, 1 where none is, and what is after it.
    shape = []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        shape += [before, part, size // before // part]
    grid = devices.reshape(*shape)
    named = range(1, len(shape), 3)
    return np.moveaxis(grid, named, range(-len(named), 0)).reshape(-1, math.prod(shape[n] for n in named))


def _transposed(source: str, perm: str | None) -> np.ndarray:
    shape = _integers(source)
    order = np.arange(math.prod(shape)).reshape(shape)
    return order if perm is None else order.transpose(_integers(perm))


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _numbers(text: str, between: str) -> list[list[str]]:
    return [part.split(between) for part in re.findall(r"\{([^}]*)\}", text)]


def _shorter(step: int, size: int) -> int:
    step %= size
    return step if 2 * step <= size else step - size


def sent_bytes(kind: str, num_bytes: int, devices: int) -> int:
    """What a device sends to others, which is what it receives, where it has so many bytes before the collective."""
    if kind == "permute":
        return num_bytes
    if kind == "all_gather":
        return num_bytes * (devices - 1)
    return num_bytes * (devices - 1) // devices * (2 if kind == "all_reduce" else 1)


def link_bytes(kind: str, num_bytes: int, size: int, shift: int | None) -> tuple[float, float]:
    """What a link of the axis carries (up, down the ranks) of a collective in which each device sends ``num_bytes``.

    A permute passes as many links as its shift, all the same way. Of the others it is the least possible: half of it
    goes each way round, and tokens exchanged for heads pass size / 4 links on average.
    """
    if size == 2:
        return num_bytes, num_bytes
    if kind == "permute":
        steps = 1 if shift is None else shift
        return (num_bytes * steps, 0.0) if steps > 0 else (0.0, num_bytes * -steps)
    if kind == "all_to_all":
        steps = sum(min(n, size - n) for n in range(1, size))
        num_bytes *= steps / (size - 1)  # pyright: ignore[reportAssignmentType]
    return num_bytes / 2, num_bytes / 2


def total(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of several collectives over one axis."""
    ups, downs = zip(*parts, strict=True)
    return sum(ups), sum(downs)
