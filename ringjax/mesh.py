"""A mesh whose ring axis visits physically adjacent chips. Coordinates only; knows no attention.

A chip has coordinates (x, y, z) on its slice, and one or two cores, each of which may be a device. A ring goes round
a box of chips: one even side, the other sides flattened into a snake, is a grid of two dimensions, and such a grid
has a cycle of single steps (down the first column, back through the others). So every box with an even number of
chips and at least two sides longer than one has one, whether or not the links wrap around. Where there is none (a
line, an odd number of chips) the ring follows a path of single steps folded on itself, 0, 2, 4, ..., 5, 3, 1: no hop
is longer than two. On slices that route to near neighbours only (TPU v5e and v6e) a longer hop makes XLA fall back
to a permute that is synchronous. Coordinates begin anew on every slice: a ring lies within one where it fits, and a
longer one goes through slice after slice, crossing the network once for each.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

Point = tuple[int, ...]
Box = tuple[int, ...]


def ring_mesh(
    shape: int | Sequence[int],
    axis_names: str | Sequence[str] = "sp",
    *,
    ring_axis: str | None = None,
    devices: Sequence[Any] | None = None,
    axis_types: Sequence[AxisType] | None = None,
) -> Mesh:
    """A mesh in which neighbours on the ring axis are physical neighbours.

    Each ring takes a compact box of chips, and the rings lie side by side. The two cores of a chip follow each other.
    Of several TPU slices each takes as many whole rings as fit, the first slice first: with ``(slices, chips)`` as
    shape a row is a slice. A ring that fits into none goes through one slice after another.

    Args:
      shape: sizes of the axes, or the size of the only one. Their product may be smaller than the number of devices.
      axis_names: as many names.
      ring_axis: the axis along which K/V travel; None is the last one.
      devices: default ``jax.devices()``. Those of CPUs and GPUs keep the order in which they are given.
      axis_types: of the axes, as in :class:`jax.sharding.Mesh`; None is Auto.

    Returns:
      The mesh. ``jax.set_mesh`` it, or give it to :func:`ringjax.ring_attention`.

    Raises:
      ValueError: for sizes, names or types that do not fit each other, or more devices than there are.
    """
    sizes, names, ring_axis = _check_axes(shape, axis_names, ring_axis)
    given = list(jax.devices() if devices is None else devices)
    ring = sizes[names.index(ring_axis)]
    count = math.prod(sizes)
    if count > len(given):
        raise ValueError(f"shape must need at most {len(given)} devices, all there are. Got {sizes}, which is {count}.")
    if axis_types is not None and len(axis_types) != len(sizes):
        raise ValueError(f"axis_types must be None or one for each of {len(sizes)} axes. Got {axis_types!r}.")
    if not all(_has_place(device) for device in given):
        array = _as_array(given[:count]).reshape(sizes)
    else:
        rings = _as_array([device for one in _rings(given, count // ring, ring) for device in one])
        others = [size for size, name in zip(sizes, names, strict=True) if name != ring_axis]
        array = np.moveaxis(rings.reshape(*others, ring), -1, names.index(ring_axis))
    if axis_types is None:
        return Mesh(array, names)
    return Mesh(array, names, axis_types=tuple(axis_types))


def _check_axes(
    shape: int | Sequence[int], axis_names: str | Sequence[str], ring_axis: str | None
) -> tuple[tuple[int, ...], tuple[str, ...], str]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    if not sizes or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"shape must be a positive integer or a sequence of them. Got {shape!r}.")
    if len(names) != len(sizes) or len(set(names)) != len(names):
        raise ValueError(f"axis_names must be {len(sizes)} different names, one for each axis. Got {axis_names!r}.")
    if ring_axis is not None and ring_axis not in names:
        raise ValueError(f"ring_axis must be one of axis_names {names}, or None. Got {ring_axis!r}.")
    return tuple(int(n) for n in sizes), names, names[-1] if ring_axis is None else ring_axis


def _has_place(device: Any) -> bool:
    """GPUs may have coordinates too, but a switch between them: XLA wants them in their own order."""
    return getattr(device, "coords", None) is not None and getattr(device, "platform", "tpu") == "tpu"


def _as_array(devices: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    return array


def _rings(devices: Sequence[Any], num_rings: int, ring: int) -> list[list[Any]]:
    """The devices of every ring, in the order in which a block visits them."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    parts = [slices[index] for index in sorted(slices)]
    if len(parts) == 1:
        return _rings_of_a_slice(devices, num_rings, ring)
    rings: list[list[Any]] = []
    for part in parts:
        if count := min(len(part) // ring, num_rings - len(rings)):
            rings += _rings_of_a_slice(part, count, ring)
    if len(rings) == num_rings:
        return rings
    path = [device for part in parts for device in _rings_of_a_slice(part, 1, len(part))[0]]
    return [path[i * ring : (i + 1) * ring] for i in range(num_rings)]


def _rings_of_a_slice(devices: Sequence[Any], num_rings: int, ring: int) -> list[list[Any]]:
    chips: dict[Point, list[Any]] = {}
    for device in devices:
        chips.setdefault(tuple(device.coords), []).append(device)
    for cores in chips.values():
        cores.sort(key=lambda device: (getattr(device, "core_on_chip", 0) or 0, device.id))
    sides, corner = _bounding_box(list(chips))
    cores = {len(found) for found in chips.values()}
    if len(chips) != math.prod(sides) or len(cores) != 1:  # holes: a snake through what is there
        path = [device for point in _snake(sides) for device in chips.get(_add(point, corner), ())]
        return [_fold(path[i * ring : (i + 1) * ring]) for i in range(num_rings)]
    num_cores = cores.pop()
    if ring % num_cores == 0:
        found = _cycles(sides, num_rings, ring // num_cores)
        if found is not None:  # single steps from chip to chip, core after core on each
            return [[device for point in one for device in chips[_add(point, corner)]] for one in found]
    # Cores as one more side of the box: down a line of chips on the first cores, back on the second ones.
    grid = (*sides, num_cores)
    rings = _cycles(grid, num_rings, ring) or _folded_rings(grid, num_rings, ring)
    return [[chips[_add(point[:-1], corner)][point[-1]] for point in one] for one in rings]


def _cycles(sides: Box, num_rings: int, size: int) -> list[list[Point]] | None:
    """Disjoint cycles of single steps in a grid, each round the most compact box that fits often enough."""
    boxes = [box for box in _boxes(sides, size) if _fits(box, sides) >= num_rings]
    closed = [box for box in boxes if _has_cycle(box)]
    if not closed:
        return None
    box = min(closed, key=lambda box: (sum(box), box))
    corners = itertools.islice(_snake(tuple(s // b for s, b in zip(sides, box, strict=True))), num_rings)
    return [[_add(point, _scale(corner, box)) for point in _cycle(box)] for corner in corners]


def _folded_rings(sides: Box, num_rings: int, size: int) -> list[list[Point]]:
    """Pieces of one snake through the grid, or through boxes of the ring's size, folded: no hop longer than two."""
    boxes = [box for box in _boxes(sides, size) if _fits(box, sides) >= num_rings]
    if boxes:
        box = min(boxes, key=lambda box: (sum(box), box))
        corners = itertools.islice(_snake(tuple(s // b for s, b in zip(sides, box, strict=True))), num_rings)
        return [[_add(point, _scale(corner, box)) for point in _fold(list(_snake(box)))] for corner in corners]
    path = list(_snake(sides))
    return [_fold(path[i * size : (i + 1) * size]) for i in range(num_rings)]


def _boxes(sides: Box, size: int) -> Iterator[Box]:
    """Boxes of ``size`` points that fit into the grid."""
    if not sides:
        if size == 1:
            yield ()
        return
    for side in range(1, min(sides[0], size) + 1):
        if size % side == 0:
            yield from ((side, *rest) for rest in _boxes(sides[1:], size // side))


def _fits(box: Box, sides: Box) -> int:
    """How many such boxes stand side by side in the grid."""
    return math.prod(side // edge for side, edge in zip(sides, box, strict=True))


def _has_cycle(box: Box) -> bool:
    """Whether single steps lead through every point and back; two points, or one, do so trivially."""
    size = math.prod(box)
    return size <= 2 or (size % 2 == 0 and sum(side > 1 for side in box) >= 2)


def _cycle(box: Box) -> list[Point]:
    """A cycle of single steps through every point of a box that has one."""
    if math.prod(box) <= 2:
        return list(_snake(box))
    # The rows are an even side; the columns, the other sides along a snake. Row 0 of column 0 follows the last point.
    axis = next(i for i, side in enumerate(box) if side % 2 == 0)
    columns = list(_snake(box[:axis] + box[axis + 1 :]))
    grid = [(row, 0) for row in range(box[axis])]
    for number, row in enumerate(reversed(range(box[axis]))):
        rest = range(1, len(columns))
        grid += [(row, column) for column in (rest if number % 2 == 0 else reversed(rest))]
    return [columns[column][:axis] + (row,) + columns[column][axis:] for row, column in grid]


def _snake(sides: Box) -> Iterator[Point]:
    """Every point of a box along a path of single steps; the last coordinate runs fastest."""
    if not sides:
        yield ()
        return
    for number, head in enumerate(_snake(sides[:-1])):
        line = range(sides[-1])
        yield from ((*head, last) for last in (line if number % 2 == 0 else reversed(line)))


def _fold(path: list[Any]) -> list[Any]:
    """Out on every other step of a path and back on the rest."""
    return path[0::2] + path[1::2][::-1]


def _bounding_box(points: Sequence[Point]) -> tuple[Box, Point]:
    """Sides and lowest corner of the smallest box around these points."""
    columns = list(zip(*points, strict=True))
    corner = tuple(min(column) for column in columns)
    return tuple(max(column) - low + 1 for column, low in zip(columns, corner, strict=True)), corner


def _add(a: Point, b: Point) -> Point:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _scale(a: Point, b: Point) -> Point:
    return tuple(x * y for x, y in zip(a, b, strict=True))
