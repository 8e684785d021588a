"""Names of topologies, of whichever platform: a slice of TPU chips, or hosts of GPUs."""

from ..planner.topology import Topology, parse_topology

__all__ = ["Topology", "parse_topology"]
