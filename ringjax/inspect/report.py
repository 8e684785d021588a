"""What is known of a compiled ring, as figures and as JSON."""

import dataclasses
import functools
from typing import Any

import numpy as np

from .chips import Topology
from .compile import Compiled
from .cycles import Cycles
from .memory import Term, floor_bytes, floor_terms
from .order import Done, Launch, Loop, Order, Permute, Start, kernels, permutes
from .program import Program

_LARGEST_MATRIX = 64  # ranks: beyond it the JSON holds sums only


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Memory of one device on a ring of another size; peak is None where nothing was compiled."""

    ring: int
    floor_bytes: int
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Payload:
    """All permutes that carry the same thing. Counts are of executions, bytes of one execution."""

    carries: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    asynchronous: int
    hidden: int


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled ring. Bytes, pairs and counts are of one device; see the properties and :meth:`to_json`.

    Attributes:
      program: what was compiled.
      compiled: what the compiler said.
      order: permutes and kernels in the order in which they are issued.
      pairs: attended (query, key) pairs of one head and batch row, rank by hop.
      cycles: static estimates, None unless they were asked for.
      scaling: memory against the size of the ring.
    """

    program: Program
    compiled: Compiled
    order: Order
    pairs: np.ndarray
    cycles: Cycles | None
    scaling: tuple[Scaling, ...]

    @functools.cached_property
    def permutes(self) -> tuple[Permute, ...]:
        return tuple(permutes(self.order))

    @functools.cached_property
    def kernels(self) -> dict[str, int]:
        """How often each block kernel runs."""
        return kernels(self.order)

    @property
    def num_permutes(self) -> int:
        """How many permutes are executed, each of one array."""
        return sum(permute.times for permute in self.permutes)

    @property
    def num_operations(self) -> int:
        """How many operations carry them: on GPUs the compiler sends several arrays in one."""
        return sum({permute.name: permute.times for permute in self.permutes}.values())

    @property
    def num_hidden(self) -> int:
        """How many of them run behind a kernel, see :mod:`ringjax.inspect.order`."""
        return sum(permute.times for permute in self.permutes if permute.hidden)

    @property
    def num_synchronous(self) -> int:
        return sum(permute.times for permute in self.permutes if not permute.asynchronous)

    @property
    def exposed(self) -> tuple[Permute, ...]:
        """Permutes with no kernel to hide behind."""
        return tuple(permute for permute in self.permutes if not permute.hidden)

    @functools.cached_property
    def payloads(self) -> tuple[Payload, ...]:
        groups: dict[tuple[Any, ...], list[Permute]] = {}
        for permute in self.permutes:
            key = (carries(permute, self.program), permute.dtype, permute.shape, permute.bytes)
            groups.setdefault(key, []).append(permute)
        return tuple(
            Payload(
                *key,
                times=sum(p.times for p in group),
                asynchronous=sum(p.times for p in group if p.asynchronous),
                hidden=sum(p.times for p in group if p.hidden),
            )
            for key, group in sorted(groups.items(), key=lambda item: (_RANK.index(item[0][0]), item[0]))
        )

    @property
    def wire_bytes(self) -> int:
        """What one device sends in all."""
        return sum(permute.times * permute.bytes for permute in self.permutes)

    @property
    def hops_made(self) -> int:
        """Blocks that every rank works on, its own included; the backward pass makes as many again."""
        return len(self.program.schedule().hops)

    @property
    def hops_elided(self) -> int:
        """Blocks that no rank needs and that therefore do not travel."""
        return self.program.ring - self.hops_made

    @property
    def wire_bytes_per_hop(self) -> float:
        """K, V and what belongs to them: what a device sends for one hop of the forward pass."""
        forward = {"K": 0, "V": 0, "segments": 0}
        for payload in self.payloads:
            if payload.carries in forward:
                forward[payload.carries] = payload.bytes
        return sum(forward.values())

    @functools.cached_property
    def floor_terms(self) -> tuple[Term, ...]:
        return floor_terms(self.program)

    @property
    def floor_bytes(self) -> int:
        return floor_bytes(self.program)

    @property
    def held_bytes(self) -> int:
        """What the floor is held against: the peak, with what a TPU keeps in VMEM where the peak alone is less."""
        peak, floor = self.compiled.peak_bytes, self.floor_bytes
        return peak if peak >= floor else peak + self.compiled.vmem_bytes

    @property
    def pairs_per_rank(self) -> np.ndarray:
        return self.pairs.sum(axis=1)

    @property
    def imbalance(self) -> float:
        """The most pairs of a rank over the mean."""
        return _ratio(self.pairs_per_rank.max(), self.pairs_per_rank.mean())

    @property
    def lockstep_imbalance(self) -> float:
        """The same where every hop lasts as long as its busiest rank, as the next block comes from a neighbour."""
        return _ratio(self.pairs.max(axis=0).sum(), self.pairs_per_rank.mean())

    @property
    def mxu_floor_cycles(self) -> dict[str, float]:
        """Least cycles of the busiest rank: matrix units alone, attended pairs alone. Empty for GPUs."""
        slice_ = self.program.slice
        if not isinstance(slice_, Topology):
            return {}
        most = int(self.pairs_per_rank.max())
        passes = {"forward": False, "backward": True} if self.program.backward else {"forward": False}
        return {
            name: slice_.generation.mxu_floor(self.program.macs(most, backward=backward))
            for name, backward in passes.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, but for the text of the program."""
        program, compiled = self.program, self.compiled
        small = program.ring <= _LARGEST_MATRIX
        return {
            "program": program.to_json(),
            "topology": {
                "name": program.slice.name,
                "devices": program.slice.num_devices,
                "rings": program.rings,
                "platform": program.slice.platform,
                "hbm_bytes": program.slice.memory_bytes,
            },
            "compiler": {
                "versions": compiled.versions,
                "xla_flags": compiled.flags,
                "lower_seconds": compiled.lower_seconds,
                "compile_seconds": compiled.compile_seconds,
            },
            "permutes": {
                "executed": self.num_permutes,
                "operations": self.num_operations,
                "hidden": self.num_hidden,
                "synchronous": self.num_synchronous,
                "lines": [
                    {**dataclasses.asdict(p), "carries": carries(p, program), "hidden": p.hidden} for p in self.permutes
                ],
            },
            "kernels": self.kernels,
            "order": _order_json(self.order),
            "wire": {
                "bytes_per_hop": self.wire_bytes_per_hop,
                "bytes": self.wire_bytes,
                "hops_made": self.hops_made,
                "hops_elided": self.hops_elided,
                "rotations": program.schedule().num_rotations,
            },
            "memory": {
                "peak_bytes": compiled.peak_bytes,
                "floor_bytes": self.floor_bytes,
                "vmem_bytes": compiled.vmem_bytes,
                "peak_over_floor": _ratio(self.held_bytes, self.floor_bytes),
                "argument_bytes": compiled.argument_bytes,
                "output_bytes": compiled.output_bytes,
                "floor": {term.name: term.bytes for term in self.floor_terms},
                "scaling": [dataclasses.asdict(row) for row in self.scaling],
            },
            "work": {
                "pairs": int(self.pairs.sum()),
                "imbalance": self.imbalance,
                "lockstep_imbalance": self.lockstep_imbalance,
                "pairs_per_rank": self.pairs_per_rank.tolist() if small else None,
                "pairs_rank_by_hop": self.pairs.tolist() if small else None,
            },
            "cycles": {
                "mxu_floor": self.mxu_floor_cycles,
                "estimates": None if self.cycles is None else self.cycles.estimates,
                "reason": None if self.cycles is None else self.cycles.reason,
            },
        }


_RANK = ("K", "V", "segments", "dK, dV", "dK", "dV")


def carries(permute: Permute | Start, program: Program) -> str:
    """What travels: the program's second argument is K, its third V; integers are segments."""
    if permute.dtype in ("s32", "u32"):
        return "segments"
    if permute.source is not None:
        return {1: "K", 2: "V"}[permute.source]
    if program.head_dim == program.value_head_dim:
        return "dK, dV"
    return "dV" if permute.shape[-1] == program.value_head_dim else "dK"


def _ratio(a: Any, b: Any) -> float:
    return float(a) / float(b) if b else 1.0


_EVENTS = {Start: "start", Done: "done", Launch: "kernel"}


def _order_json(order: Order) -> list[Any]:
    """["start", name], ["done", name], ["kernel", name] or ["loop", times, [...]]."""
    return [
        ["loop", event.times, _order_json(event.body)]
        if isinstance(event, Loop)
        else [_EVENTS[type(event)], event.name]
        for event in order
    ]
