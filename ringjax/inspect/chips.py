"""TPU generations and names of topologies: what a ring needs to know of a chip, and what would abort the compiler."""

import dataclasses
import math
import re

from .gpus import GPUS

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation, with the figures of its public description.

    Attributes:
      name: as libtpu spells it.
      macs_per_cycle: bfloat16 multiply-adds a cycle of one core: its matrix units times their area.
      cores_per_device: 2 where both cores of a chip are one device ("megacore").
      devices_per_chip: 2 where each of the two cores is a device.
      hbm_bytes: of one device.
      most_devices_a_side: a longer side aborts the compiler; None: none known.
      chip_config: what to ask libtpu for beside the name.
    """

    name: str
    macs_per_cycle: int
    cores_per_device: int
    devices_per_chip: int
    hbm_bytes: int
    longest_side: int | None = None
    chip_config: str | None = None

    def mxu_floor(self, macs: int) -> float:
        """Cycles that the matrix units of a device need at least for so many multiply-adds."""
        return macs / (self.macs_per_cycle * self.cores_per_device)


_MXU_128, _MXU_256 = 128 * 128, 256 * 256
_GENERATIONS = (
    Generation("v4", 4 * _MXU_128, 2, 1, 32 * _GIB, chip_config="megacore"),
    Generation("v5e", 4 * _MXU_128, 1, 1, 16 * _GIB, longest_side=16),
    Generation("v5p", 4 * _MXU_128, 2, 1, 95 * _GIB),
    Generation("v6e", 2 * _MXU_256, 1, 1, 32 * _GIB),
    Generation("tpu7x", 2 * _MXU_256, 1, 2, 96 * _GIB),
)
GENERATIONS = {generation.name: generation for generation in _GENERATIONS}
_ALIASES = {"v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its generation and its sides in chips."""

    generation: Generation
    sides: tuple[int, ...]

    platform = "tpu"

    @property
    def name(self) -> str:
        """As libtpu spells it."""
        return f"{self.generation.name}:{'x'.join(map(str, self.sides))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.sides) * self.generation.devices_per_chip

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.generation.hbm_bytes


def parse_slice(name: str) -> Topology:
    """The topology of a name such as "v5p:8x8x16".

    Raises:
      ValueError: for a name that libtpu does not know, or knows and aborts on.
    """
    match = re.fullmatch(r"(\w+):(\d+)x(\d+)(?:x(\d+))?", name) if isinstance(name, str) else None
    generation = match and GENERATIONS.get(_ALIASES.get(match[1], match[1]))
    if match is None or generation is None:
        known = ", ".join([*GENERATIONS, *_ALIASES])
        raise ValueError(
            f"topology must be GENERATION:XxY or GENERATION:XxYxZ, GENERATION one of {known}, as in v5e:2x4 or "
            f"v5p:2x2x2; or GPU:N, GPU one of {', '.join(GPUS)}, as in h100:8. Got {name!r}."
        )
    sides = tuple(int(side) for side in match.groups()[1:] if side is not None)
    if 0 in sides or sides[0] % 2 or sides[1] % 2:
        raise ValueError(f"topology must have even sides x and y: a host has 2 x 2 chips. Got {name!r}.")
    if generation.longest_side is not None and max(sides) > generation.longest_side:
        raise ValueError(
            f"topology must have no side longer than {generation.longest_side} for {generation.name}: the compiler "
            f"aborts on it. Got {name!r}."
        )
    return Topology(generation, sides)
