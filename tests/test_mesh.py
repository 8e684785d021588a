"""ring_mesh: neighbours on the ring are neighbours on the slice, for every shape of slice and of mesh."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import ringjax
from ringjax.mesh import _cycle, _has_cycle, _rings


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as ring_mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    slice_index: int = 0


def slice_of(*sides: int, cores: int = 1, origin: tuple[int, int, int] = (0, 0, 0)) -> list[Chip]:
    """The devices of a slice, x fastest, as libtpu lists them."""
    points = itertools.product(*(range(side) for side in reversed(sides)))
    chips = [tuple(a + b for a, b in zip(reversed(point), origin, strict=True)) for point in points]
    return [Chip(cores * i + core, (x, y, z), core) for i, (x, y, z) in enumerate(chips) for core in range(cores)]


def distance(a: Chip, b: Chip) -> int:
    """Links between two devices without wraparound; two cores of a chip are one step apart at most."""
    return sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True))


def hops(ring: list[Chip]) -> list[int]:
    return [distance(a, b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]


SIDES = [sides for sides in itertools.product((1, 2, 3, 4, 5, 8), repeat=3) if math.prod(sides) <= 160]


@pytest.mark.parametrize("cores", [1, 2])
def test_a_ring_over_a_whole_slice(cores):
    """Single steps wherever a cycle exists, at most two otherwise; every device once."""
    for sides in SIDES:
        devices = slice_of(*sides, cores=cores)
        (ring,) = _rings(devices, 1, len(devices))
        assert sorted(ring, key=lambda d: d.id) == devices, sides
        closed = _has_cycle(sides) or cores == 2
        assert max(hops(ring)) <= (1 if closed else 2), sides


def slices_of(count: int, *sides: int, cores: int = 1) -> list[Chip]:
    """Slices whose coordinates are the same, in turns, so that their order tells nothing."""
    one = slice_of(*sides, cores=cores)
    copies = [[dataclasses.replace(c, id=c.id + n * len(one), slice_index=n) for c in one] for n in range(count)]
    return [chip for chips in zip(*copies, strict=True) for chip in chips]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("sides", [(2, 2, 1), (4, 4, 1), (2, 2, 2), (3, 1, 1), (8, 1, 1)])
def test_rings_lie_within_slices(sides, cores):
    """Rows of a mesh (slices, chips), and shorter ones; each as on a slice alone."""
    devices, size = slices_of(3, *sides, cores=cores), math.prod(sides) * cores
    for ring in (n for n in range(1, size + 1) if size % n == 0):
        rings = _rings(devices, 3 * size // ring, ring)
        assert sorted(d.id for one in rings for d in one) == list(range(3 * size))
        assert [one[0].slice_index for one in rings] == sorted(d.slice_index for d in devices)[::ring]
        assert all(len({d.slice_index for d in one}) == 1 for one in rings)
        alone = _rings(slice_of(*sides, cores=cores), size // ring, ring)
        assert [[d.coords for d in one] for one in rings] == 3 * [[d.coords for d in one] for one in alone]


def test_a_ring_longer_than_a_slice_crosses_the_network_once_for_each():
    devices = slices_of(4, 2, 4, 1)
    for num_rings, ring in ((1, 32), (2, 16), (1, 24), (1, 12)):
        for one in _rings(devices, num_rings, ring):
            assert len({d.id for d in one}) == ring
            crossings = [a.slice_index != b.slice_index for a, b in zip(one, one[1:] + one[:1], strict=True)]
            assert sum(crossings) == len({d.slice_index for d in one})
            steps = [distance(a, b) for a, b in itertools.pairwise(one) if a.slice_index == b.slice_index]
            assert max(steps) == 1


def test_cycles_exist_just_where_they_are_said_to():
    """A grid of odd size is bipartite with unequal halves and a line has two ends: no cycle. Elsewhere one is built."""
    for sides in SIDES:
        if _has_cycle(sides):
            cycle = _cycle(sides)
            assert len(set(cycle)) == math.prod(sides)
            steps = zip(cycle, cycle[1:] + cycle[:1], strict=True)
            assert all(sum(abs(p - q) for p, q in zip(a, b, strict=True)) <= 1 for a, b in steps), sides
        else:
            assert math.prod(sides) % 2 or sum(side > 1 for side in sides) == 1, sides


@pytest.mark.parametrize(
    ("sides", "num_rings", "size"),
    [
        ((8, 8, 1), 4, 16), ((8, 8, 1), 16, 4), ((8, 8, 1), 32, 2), ((16, 16, 1), 8, 32), ((8, 8, 16), 16, 64),
        ((4, 4, 4), 8, 8), ((4, 4, 8), 2, 64), ((8, 16, 1), 2, 64), ((4, 4, 4), 1, 8), ((3, 4, 1), 2, 6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cores", [1, 2])
def test_rings_side_by_side_are_compact_cycles(sides, num_rings, size, cores):
    devices = slice_of(*sides, cores=cores)
    rings = _rings(devices, num_rings, size * cores)
    used = [device for ring in rings for device in ring]
    assert len(set(used)) == num_rings * size * cores
    for ring in rings:
        assert max(hops(ring)) == 1
        spread = [max(c) - min(c) + 1 for c in zip(*(device.coords for device in ring), strict=True)]
        assert math.prod(spread) == size, "a ring fills its box"


def test_two_cores_of_a_chip_follow_each_other():
    (ring,) = _rings(slice_of(4, 4, 4, cores=2), 1, 128)
    assert all(a.coords == b.coords and a != b for a, b in zip(ring[::2], ring[1::2], strict=True))


def test_odd_rings_take_hops_of_at_most_two():
    for size, num_rings in ((5, 3), (7, 9), (3, 21), (13, 4), (63, 1)):
        rings = _rings(slice_of(8, 8, 1), num_rings, size)
        assert max(max(hops(ring)) for ring in rings) <= 2
        assert len({device for ring in rings for device in ring}) == num_rings * size


def test_slices_that_start_elsewhere_and_have_holes():
    (ring,) = _rings(slice_of(4, 4, 1, origin=(4, 8, 2)), 1, 16)
    assert set(hops(ring)) == {1}
    devices = slice_of(4, 4, 1)
    del devices[5]
    (ring,) = _rings(devices, 1, 15)
    assert sorted(ring, key=lambda d: d.id) == devices


def test_order_of_axes_and_types(monkeypatch):
    seen = {}

    def mesh(array, names, **options):
        seen.update(array=array, names=names, **options)

    monkeypatch.setattr(ringjax.mesh, "Mesh", mesh)
    devices = slice_of(8, 8, 1)
    ringjax.ring_mesh((4, 16), ("dp", "sp"), devices=devices)
    rows = seen["array"]
    assert all(max(hops(list(row))) == 1 for row in rows)
    ringjax.ring_mesh((16, 4), ("sp", "dp"), ring_axis="sp", devices=devices, axis_types=(AxisType.Explicit,) * 2)
    assert (seen["array"] == rows.T).all() and seen["axis_types"] == (AxisType.Explicit,) * 2
    ringjax.ring_mesh((2, 16, 2), ("dp", "sp", "tp"), ring_axis="sp", devices=devices)
    assert seen["array"].shape == (2, 16, 2)
    assert all(max(hops(list(seen["array"][i, :, j]))) == 1 for i in range(2) for j in range(2))


def test_devices_without_coordinates_keep_their_order():
    devices = jax.devices()
    assert ringjax.ring_mesh(8).devices.tolist() == devices
    mesh = ringjax.ring_mesh((2, 3), ("dp", "sp"), devices=devices[::-1])
    assert mesh.devices.tolist() == [devices[:4:-1], devices[4:1:-1]]
    assert mesh.axis_names == ("dp", "sp") and set(mesh.axis_types) == {AxisType.Auto}
    explicit = ringjax.ring_mesh(8, axis_types=(AxisType.Explicit,))
    assert explicit.axis_types == (AxisType.Explicit,)


def test_ring_attention_takes_the_mesh():
    mesh = ringjax.ring_mesh((2, 4), ("dp", "sp"))
    x = jax.device_put(np.ones((2, 16, 2, 8), np.float32), jax.NamedSharding(mesh, PartitionSpec("dp", "sp")))
    out = ringjax.ring_attention(x, x, x, mesh=mesh, batch_axis_name="dp", is_causal=True)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "shape must be a positive integer"),
        (((2, True),), {"axis_names": ("a", "b")}, "shape must be a positive integer"),
        (((2, 4),), {}, "axis_names must be 2 different names"),
        (((2, 4),), {"axis_names": ("a", "a")}, "axis_names must be 2 different names"),
        ((8,), {"ring_axis": "dp"}, "ring_axis must be one of axis_names"),
        ((16,), {}, "at most 8 devices"),
        ((8,), {"axis_types": ()}, "axis_types must be None or one for each"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ringjax.ring_mesh(*arguments, **options)
