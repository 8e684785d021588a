"""Names of topologies, of whichever platform: a slice of TPU chips, several such slices, or hosts of GPUs."""

import dataclasses
import re

from ..planner import topology as single
from ..planner.chips import Tpu


@dataclasses.dataclass(frozen=True)
class Slices:
    """TPU slices that are joined by a network of hosts, slower than the links within each."""

    number: int
    each: single.Slice

    platform = "tpu"

    @property
    def name(self) -> str:
        return f"{self.number}*{self.each.name}"

    @property
    def num_devices(self) -> int:
        return self.number * self.each.num_devices

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.each.memory_bytes


Topology = single.Topology | Slices


def parse_topology(name: str) -> Topology:
    """The topology of a name such as "v5p:8x8x16", "2*v5e:4x4" (two slices) or "h100:8".

    Raises:
      ValueError: for a name that neither platform knows.
    """
    several = re.fullmatch(r"(\d+)\*(.*)", name) if isinstance(name, str) else None
    if several is None:
        return single.parse_topology(name)
    number = int(several[1])
    if number < 2:
        raise ValueError(f"topology must have at least 2 slices before its '*'. Got {name!r}.")
    return Slices(number, single.parse_slice(several[2]))


def generation(topology: Topology) -> Tpu | None:
    """Of TPUs."""
    if isinstance(topology, single.Hosts):
        return None
    return (topology.each if isinstance(topology, Slices) else topology).generation
