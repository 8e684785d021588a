"""Rings without a common link on a torus of chips. Coordinates only; knows no attention.

The links of a torus of n dimensions fall into n rings of all chips, none of which shares a link with another (Kotzig
1973 for two dimensions, Foregger 1978 for three). They are found by exchange: to begin with the links along each
dimension are a set of short rings; where two sets own opposite sides of a square, swapping these joins rings, or parts
them. Swaps at random that leave no more rings than before are kept, and this ends with one ring in each set.
"""

import functools
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from .planner.chips import Tpu, find_chip

_MOST_SWAPS = 200_000  # a hundred times what 4,096 chips take


def torus_rings(devices: Sequence[Any], count: int) -> tuple[tuple[int, ...], ...]:
    """Indices of these devices along ``count`` rings of all of them, no two of which share a link.

    Raises:
      ValueError: where the devices are no whole torus, or have fewer such rings.
    """
    given = f"Got {count} for {len(devices)} devices"
    kind = str(getattr(devices[0], "device_kind", ""))
    places: list[Any] = [getattr(device, "coords", None) for device in devices]
    if None in places or getattr(devices[0], "platform", "tpu") != "tpu":
        raise ValueError(
            f"config.rings must be 1 except on TPUs, whose chips have a place on a torus. {given} {kind!r}."
        )
    if len(set(map(tuple, places))) < len(places):
        raise ValueError(f"config.rings must be 1 where a chip is more than one device. {given} {kind!r}.")
    low = [min(axis) for axis in zip(*places, strict=True)]
    sides = tuple(max(axis) - start + 1 for axis, start in zip(zip(*places, strict=True), low, strict=True))
    spread = [side for side in sides if side > 1]
    chip = find_chip(kind)
    closed = isinstance(chip, Tpu) and all(side % chip.wraps_every == 0 for side in spread)
    most = len(spread) if closed and math.prod(sides) == len(devices) else 1
    if count > most:
        raise ValueError(
            f"config.rings must be at most {most} on a slice of {'x'.join(map(str, sides))} chips: links close to a "
            "torus on sides that are multiples of 4 (TPU v4, v5p) or 16 (v5e, v6e), and there is a ring for each such "
            f"side. {given} {kind!r}."
        )
    index = {tuple(a - b for a, b in zip(place, low, strict=True)): n for n, place in enumerate(places)}
    points = list(itertools.product(*map(range, sides)))
    return tuple(tuple(index[points[n]] for n in ring) for ring in disjoint_rings(sides)[:count])


@functools.lru_cache(maxsize=16)
def disjoint_rings(sides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """As many rings through all points of a torus as it has sides longer than one, no two with a common link.

    Points are counted row-major. Sides are 1 or at least 3, so that a point has two neighbours along each.
    """
    points = list(itertools.product(*map(range, sides)))
    number = {point: n for n, point in enumerate(points)}
    axes = [axis for axis, side in enumerate(sides) if side > 1]

    def ahead(n: int, axis: int, by: int = 1) -> int:
        point = list(points[n])
        point[axis] = (point[axis] + by) % sides[axis]
        return number[tuple(point)]

    sets = [[{ahead(n, axis), ahead(n, axis, -1)} for n in range(len(points))] for axis in axes]
    squares = [
        (n, ahead(n, a), ahead(ahead(n, a), b), ahead(n, b))
        for n in range(len(points))
        for a, b in itertools.combinations(axes, 2)
    ]
    chance = random.Random(0)
    counts = [len(_rings(links)) for links in sets]
    for _ in range(_MOST_SWAPS):
        if sum(counts) == len(axes):
            return tuple(tuple(_rings(links)[0]) for links in sets)
        u, v, w, x = chance.choice(squares)
        owner = [next(i for i, links in enumerate(sets) if b in links[a]) for a, b in ((u, v), (v, w), (w, x), (x, u))]
        if owner[0] != owner[2] or owner[1] != owner[3] or owner[0] == owner[1]:
            continue
        first, second = sets[owner[0]], sets[owner[1]]
        _swap(first, second, (u, v, w, x))
        new = len(_rings(first)), len(_rings(second))
        if sum(new) <= counts[owner[0]] + counts[owner[1]]:
            counts[owner[0]], counts[owner[1]] = new
        else:
            _swap(first, second, (v, w, x, u))
    raise AssertionError(f"no disjoint rings were found on a torus of {sides}")


def _swap(first: list[set[int]], second: list[set[int]], square: tuple[int, int, int, int]) -> None:
    """The first set gives its two sides of a square, of which the first is from corner 0 to 1, for the other two."""
    u, v, w, x = square
    for links, others, pairs in ((first, second, ((u, v), (w, x))), (second, first, ((v, w), (x, u)))):
        for a, b in pairs:
            links[a].remove(b)
            links[b].remove(a)
            others[a].add(b)
            others[b].add(a)


def _rings(links: list[set[int]]) -> list[list[int]]:
    """All rings of points that have two links each."""
    seen, found = [False] * len(links), []
    for start in range(len(links)):
        if seen[start]:
            continue
        ring, before, here = [], -1, start
        while not seen[here]:
            seen[here] = True
            ring.append(here)
            before, here = here, next(n for n in sorted(links[here]) if n != before)
        found.append(ring)
    return found
