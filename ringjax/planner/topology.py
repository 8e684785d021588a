"""Names of topologies, of whichever platform: a slice of TPU chips, or hosts of GPUs."""

import dataclasses
import math
import re

from .chips import GPUS, TPU_ALIASES, TPUS, Gpu, Tpu

_MOST_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips.

    Attributes:
      generation: as v5p, with the figures of a chip.
      sides: in chips, of the box that they fill.
    """

    generation: Tpu
    sides: tuple[int, ...]

    platform = "tpu"

    @property
    def chip(self) -> Tpu:
        return self.generation

    @property
    def name(self) -> str:
        """As libtpu spells it."""
        return f"{self.generation.name}:{'x'.join(map(str, self.sides))}"

    @property
    def num_devices(self) -> int:
        """Cores that JAX takes for devices: one a chip, or two."""
        return math.prod(self.sides) * self.generation.devices_per_chip

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.generation.memory_bytes


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts that each hold as many GPUs, all of one model.

    Attributes:
      gpu: as h100, with the figures of a GPU.
      hosts: how many.
      gpus_a_host: GPUs of each.
    """

    gpu: Gpu
    hosts: int
    gpus_a_host: int

    platform = "gpu"

    @property
    def chip(self) -> Gpu:
        return self.gpu

    @property
    def name(self) -> str:
        """Hosts are named where there are several."""
        return f"{self.gpu.name}:{f'{self.hosts}x' if self.hosts > 1 else ''}{self.gpus_a_host}"

    @property
    def num_devices(self) -> int:
        """GPUs of all hosts."""
        return self.hosts * self.gpus_a_host

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.gpu.memory_bytes

    @property
    def shape(self) -> str:
        """As XLA spells it: partitions, hosts of one, devices of one."""
        return f"1x{self.hosts}x{self.gpus_a_host}"


Topology = Slice | Hosts


def parse_topology(name: str, what: str = "topology") -> Topology:
    """The topology of a name such as "v5p:8x8x16" or "h100:8".

    Args:
      name: the name.
      what: the argument that an error names.

    Raises:
      ValueError: for a name that neither platform knows.
    """
    if isinstance(name, str) and name.partition(":")[0] in GPUS:
        return parse_hosts(name, what)
    return parse_slice(name, what)


def parse_slice(name: str, what: str = "topology") -> Slice:
    """The topology of a name such as "v5p:8x8x16".

    Raises:
      ValueError: for a name that libtpu does not know, or knows and aborts on.
    """
    match = re.fullmatch(r"(\w+):(\d+)x(\d+)(?:x(\d+))?", name) if isinstance(name, str) else None
    generation = match and TPUS.get(TPU_ALIASES.get(match[1], match[1]))
    if match is None or generation is None:
        known = ", ".join([*TPUS, *TPU_ALIASES])
        raise ValueError(
            f"{what} must be GENERATION:XxY or GENERATION:XxYxZ, GENERATION one of {known}, as in v5e:2x4 or "
            f"v5p:2x2x2; or GPU:N, GPU one of {', '.join(GPUS)}, as in h100:8. Got {name!r}."
        )
    sides = tuple(int(side) for side in match.groups()[1:] if side is not None)
    if 0 in sides or sides[0] % 2 or sides[1] % 2:
        raise ValueError(f"{what} must have even sides x and y: a host has 2 x 2 chips. Got {name!r}.")
    if generation.longest_side is not None and max(sides) > generation.longest_side:
        raise ValueError(
            f"{what} must have no side longer than {generation.longest_side} for {generation.name}: the compiler "
            f"aborts on it. Got {name!r}."
        )
    return Slice(generation, sides)


def parse_hosts(name: str, what: str = "topology") -> Hosts:
    """The hosts of a name such as "h100:8", or "h100:4x8" for four of them.

    Raises:
      ValueError: for a name that is none, or more GPUs than a host holds.
    """
    match = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", name)
    gpu = match and GPUS.get(match[1])
    if match is None or gpu is None:
        raise ValueError(
            f"{what} must be GPU:N or GPU:HOSTSxN for GPUs, GPU one of {', '.join(GPUS)}, as in h100:8 or h100:2x8. "
            f"Got {name!r}."
        )
    hosts, count = int(match[2] or 1), int(match[3])
    if not 1 <= count <= _MOST_A_HOST or hosts < 1:
        raise ValueError(
            f"{what} must have 1 to {_MOST_A_HOST} GPUs a host, and a host at least: {gpu.name}:2x8 is two hosts of "
            f"8. Got {name!r}."
        )
    return Hosts(gpu, hosts, count)


def likely_topology(chip: Tpu | Gpu, num_devices: int) -> Topology:
    """Where nothing but the number of devices is known: the fullest hosts of GPUs, or the most compact box of chips.

    The number must be a multiple of the devices of a chip.
    """
    if isinstance(chip, Gpu):
        a_host = max(count for count in range(1, _MOST_A_HOST + 1) if num_devices % count == 0)
        return Hosts(chip, num_devices // a_host, a_host)
    return Slice(chip, min(_boxes(num_devices // chip.devices_per_chip, chip.dimensions), key=sum))


def _boxes(size: int, dimensions: int) -> list[tuple[int, ...]]:
    """Sides, ascending, whose product is the size."""
    if dimensions == 1:
        return [(size,)]
    return [
        (side, *rest)
        for side in range(1, size + 1)
        if size % side == 0
        for rest in _boxes(size // side, dimensions - 1)
        if side <= rest[0]
    ]
