"""Names of topologies, of whichever platform: a slice of TPU chips, or hosts of GPUs."""

from . import chips, gpus

Topology = chips.Topology | gpus.Hosts


def parse_topology(name: str) -> Topology:
    """The topology of a name such as "v5p:8x8x16" or "h100:8".

    Raises:
      ValueError: for a name that neither platform knows.
    """
    if isinstance(name, str) and name.partition(":")[0] in gpus.GPUS:
        return gpus.parse_hosts(name)
    return chips.parse_slice(name)
