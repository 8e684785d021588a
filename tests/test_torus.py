"""Rings without a common link on a torus: the links themselves, attention along them, and where there are none."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import cases
import jax
import jaxprs
import pytest

import ringjax
from ringjax import sharded, torus


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5"
    platform: str = "tpu"


def slice_of(sides: tuple[int, int, int], kind: str = "TPU v5") -> list[Chip]:
    return [Chip((x + 8, y, z), kind) for z, y, x in itertools.product(*(range(n) for n in sides[::-1]))]


def links(ring: Any) -> list[frozenset[int]]:
    return [frozenset(pair) for pair in zip(ring, (*ring[1:], ring[0]), strict=True)]


@pytest.mark.parametrize("sides", [(4, 4, 1), (16, 16, 1), (4, 4, 4), (4, 8, 4), (1, 4, 12)], ids=str)
def test_every_link_of_the_torus_is_in_one_ring(sides: tuple[int, int, int]) -> None:
    kind = "TPU v6 lite" if sides == (16, 16, 1) else "TPU v5"
    chips, dims = slice_of(sides, kind), sum(side > 1 for side in sides)
    rings = torus.torus_rings(chips, dims)
    used = [link for ring in rings for link in links(ring)]
    assert len(used) == len(set(used)) == dims * len(chips)
    for ring in rings:
        assert sorted(ring) == list(range(len(chips)))
        for link in links(ring):
            a, b = (chips[n].coords for n in link)
            steps = [min((x - y) % side, (y - x) % side) for x, y, side in zip(a, b, sides, strict=True)]
            assert sorted(steps) == [0, 0, 1], "one step from chip to chip"


@pytest.mark.parametrize(
    ("chips", "count", "words"),
    [
        (slice_of((4, 4, 2)), 2, "at most 1 on a slice of 4x4x2 chips.*Got 2 for 32"),
        (slice_of((4, 4, 4)), 4, "at most 3 on a slice of 4x4x4 chips.*Got 4 for 64"),
        (slice_of((8, 8, 1), "TPU v5 lite"), 2, "at most 1 on a slice of 8x8x1"),
        (slice_of((4, 4, 4))[1:], 2, "at most 1 .*Got 2 for 63 devices 'TPU v5'"),
        (slice_of((4, 4, 1)) * 2, 2, "1 where a chip is more than one device"),
    ],
)
def test_where_there_are_none(chips: list[Chip], count: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"config.rings must be {words}"):
        torus.torus_rings(chips, count)


CYCLES = ((0, 1, 2, 3), (0, 2, 1, 3))  # any two orders of the ranks compute the same


@pytest.mark.parametrize(
    ("feature", "layout", "direction"), [("everything", "zigzag", "forward"), ("causal_segments", "striped", "both")]
)
def test_a_part_of_every_block_on_each_ring(
    monkeypatch: pytest.MonkeyPatch, feature: str, layout: str, direction: str
) -> None:
    """Heads where they divide, otherwise tokens, against the oracle."""
    monkeypatch.setattr(sharded, "torus_rings", lambda devices, count: ((0, 1, 2), (0, 2, 1))[:count])
    case = cases.BY_NAME[feature]
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=3, rings=2, direction=direction)
    cases.assert_matches(case, inputs, result)


def test_each_ring_carries_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "torus_rings", lambda devices, count: CYCLES[:count])
    x = [jax.ShapeDtypeStruct((1, 64, heads, 8), "float32") for heads in (8, 4, 4)]
    sent = {}
    for rings in (1, 2):
        config = cases.config_of("xla", rings=rings, direction="both")
        run = lambda *x, config=config: ringjax.ring_attention(*x, mesh=cases.mesh_of(4), config=config)  # noqa: E731
        sent[rings] = jaxprs.float_permutes(jax.make_jaxpr(run)(*x))
    assert sent[1] == {("float32", (1, 2, 16, 8)): 2 * 2 * 3}
    assert sent[2] == {("float32", (1, 1, 16, 8)): 2 * 4 * 3}


def test_arguments() -> None:
    def call(mesh: Any = None, axis_name: Any = "sp", **options: Any) -> Any:
        x = jax.numpy.zeros((1, 16, 2, 8))
        config = ringjax.RingConfig(rings=2, **options)
        return ringjax.ring_attention(x, x, x, mesh=mesh or cases.mesh_of(4), axis_name=axis_name, config=config)

    with pytest.raises(ValueError, match="config.rings must be 1 except on TPUs.*Got 2 for 4 devices 'cpu'"):
        call()
    with pytest.raises(ValueError, match="config.rings must be 1 unless the sequence has one axis, of strategy 'ring'"):
        call(strategy="all_gather")
    with pytest.raises(ValueError, match="config.rings must be 1 unless axis 'sp1' goes round all.*Got 2 for 2 of 4"):
        call(cases.mesh_of((2, 2)), axis_name="sp1")
    with pytest.raises(ValueError, match="rings must be a positive integer. Got None"):
        ringjax.RingConfig(rings=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config.rings must be 1 where the devices are not known"):
        inside = lambda x: ringjax.ring_attention(x, x, x, config=ringjax.RingConfig(rings=2))  # noqa: E731
        jax.vmap(inside, axis_name="sp")(jax.numpy.zeros((4, 1, 4, 2, 8)))
