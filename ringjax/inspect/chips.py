"""TPU generations and slices of them, as the planner's table has them."""

from ..planner.chips import TPUS as GENERATIONS
from ..planner.chips import Tpu as Generation
from ..planner.topology import Slice as Topology
from ..planner.topology import parse_slice

__all__ = ["GENERATIONS", "Generation", "Topology", "parse_slice"]
