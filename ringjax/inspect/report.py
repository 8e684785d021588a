"""What is known of a compiled ring, as figures and as JSON."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from ..planner.documents import Documents
from . import wire
from .compile import Compiled
from .cycles import Cycles
from .memory import Term, floor_bytes, floor_terms
from .order import Collective, Done, Launch, Loop, Order, Start, collectives, kernels
from .program import Program
from .topology import generation

_LARGEST_MATRIX = 64  # ranks: beyond it the JSON holds sums only


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Memory of one device on a ring of another size.

    Attributes:
      ring: devices on it.
      floor_bytes: the least that it needs, see :func:`ringjax.inspect.floor_bytes`.
      peak_bytes: what the compiler says; None where nothing was compiled.
    """

    ring: int
    floor_bytes: int
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Payload:
    """All collectives of a kind that carry the same thing the same way.

    Attributes:
      carries: what, as "K" or "dK, dV".
      kind, axis, shift, ring, dtype, shape: as in :class:`ringjax.inspect.order.Start`.
      bytes: what a device sends to others in one execution.
      times, asynchronous, hidden: executions in all, asynchronous ones, and those behind a kernel.
    """

    carries: str
    kind: str
    axis: int | None
    shift: int | None
    ring: int | None
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    asynchronous: int
    hidden: int


@dataclasses.dataclass(frozen=True)
class Link:
    """Bytes that go over one link of an axis in all, each way; over the busiest, where there are several rings.

    TPUs: a link between neighbours on the axis, "up" the ranks and "down". Of gathers and exchanges it is the least
    that such a circle allows. GPUs: the port of a device to the switch, out ("up") and in ("down").

    Attributes:
      axis: of the sequence, 0 the outermost.
      up, down: bytes each way.
    """

    axis: int
    up: float
    down: float


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
      documents: what becomes of the documents given; None without them.
    """

    program: Program
    compiled: Compiled
    order: Order
    pairs: np.ndarray
    cycles: Cycles | None
    scaling: tuple[Scaling, ...]
    documents: Documents | None = None

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every line of the program that sends, in the order in which they are issued."""
        return tuple(collectives(self.order))

    @functools.cached_property
    def permutes(self) -> tuple[Collective, ...]:
        """Those that carry blocks, and sums of dK and dV, round a ring."""
        return tuple(sent for sent in self.collectives if sent.kind == "permute")

    @functools.cached_property
    def exchanges(self) -> tuple[Collective, ...]:
        """Every other collective: keys are gathered, sums scattered, tokens exchanged for heads."""
        return tuple(sent for sent in self.collectives if sent.kind != "permute")

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
        """How many permutes run behind a kernel, see :attr:`ringjax.inspect.order.Collective.hidden`."""
        return sum(permute.times for permute in self.permutes if permute.hidden)

    @property
    def num_synchronous(self) -> int:
        """How many permutes are awaited at once, so that nothing runs meanwhile."""
        return sum(permute.times for permute in self.permutes if not permute.asynchronous)

    @property
    def exposed(self) -> tuple[Collective, ...]:
        """Permutes with no kernel to hide behind."""
        return tuple(permute for permute in self.permutes if not permute.hidden)

    @functools.cached_property
    def payloads(self) -> tuple[Payload, ...]:
        """The collectives by what they carry."""
        groups: dict[tuple[Any, ...], list[Collective]] = {}
        for sent in self.collectives:
            what = carries(sent, self.program)
            key = (what, sent.kind, sent.axis, sent.shift, sent.ring, sent.dtype, sent.shape, sent.bytes)
            groups.setdefault(key, []).append(sent)
        return tuple(
            Payload(
                *key,
                times=sum(p.times for p in group),
                asynchronous=sum(p.times for p in group if p.asynchronous),
                hidden=sum(p.times for p in group if p.hidden),
            )
            for key, group in sorted(groups.items(), key=lambda item: (RANK.index(item[0][0]), str(item[0])))
        )

    @property
    def wire_bytes(self) -> int:
        """What one device sends in all."""
        return sum(sent.times * sent.bytes for sent in self.collectives)

    @functools.cached_property
    def links(self) -> tuple[Link, ...]:
        """What a link of each axis carries; axes over which nothing is sent are left out."""
        found = []
        for axis, size in enumerate(self.program.axes):
            sent = [one for one in self.collectives if (0 if len(self.program.axes) == 1 else one.axis) == axis]
            if not sent:
                continue
            if self.program.slice.platform == "gpu":
                out = float(sum(one.times * one.bytes for one in sent))
                found.append(Link(axis, out, out))
            else:
                rings = {one.ring for one in sent}  # no two of them share a link
                loads = [
                    wire.total(
                        wire.link_bytes(one.kind, one.times * one.bytes, size, one.shift)
                        for one in sent
                        if one.ring == ring
                    )
                    for ring in rings
                ]
                found.append(Link(axis, *(max(each) for each in zip(*loads, strict=True))))
        return tuple(found)

    @property
    def hops_made(self) -> int:
        """Blocks that every rank works on, its own included; the backward pass makes as many again."""
        return self.program.schedule().num_blocks

    @property
    def hops_elided(self) -> int:
        """Blocks that no rank needs and that therefore do not travel."""
        return self.num_blocks - self.hops_made

    @property
    def num_blocks(self) -> int:
        """Blocks of all devices, once keys are merged."""
        return math.prod(self.program.sharing.keys.ring_sizes)

    @property
    def wire_bytes_per_hop(self) -> float:
        """K, V and what belongs to them: what a device sends in one rotation, on average; forward as backward."""
        rotations = self.program.num_rotations() * (2 if self.program.backward else 1)
        sent = sum(p.bytes * p.times for p in self.payloads if p.kind == "permute" and p.carries in _BLOCK)
        return sent / rotations if rotations else 0.0

    @functools.cached_property
    def floor_terms(self) -> tuple[Term, ...]:
        """The least memory that a device needs, by array: :func:`ringjax.inspect.floor_terms`."""
        return floor_terms(self.program)

    @property
    def floor_bytes(self) -> int:
        """Their sum."""
        return floor_bytes(self.program)

    @property
    def held_bytes(self) -> int:
        """What the floor is held against: the peak, with what a TPU keeps in VMEM where the peak alone is less."""
        peak, floor = self.compiled.peak_bytes, self.floor_bytes
        return peak if peak >= floor else peak + self.compiled.vmem_bytes

    @property
    def pairs_per_rank(self) -> np.ndarray:
        """Attended pairs of each rank, all hops together."""
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
        chip = generation(self.program.slice)
        if chip is None:
            return {}
        most = int(self.pairs_per_rank.max())
        passes = {"forward": False, "backward": True} if self.program.backward else {"forward": False}
        return {name: chip.mxu_floor(self.program.macs(most, backward=backward)) for name, backward in passes.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it, but for the text of the program."""
        program, compiled = self.program, self.compiled
        small = program.ring <= _LARGEST_MATRIX
        return {
            "program": program.to_json(),
            "topology": {
                "name": program.slice.name,
                "devices": program.slice.num_devices,
                "side_by_side": program.side_by_side,
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
                "lines": [_line(p, program) for p in self.permutes],
            },
            "exchanges": [_line(sent, program) for sent in self.exchanges],
            "kernels": self.kernels,
            "order": _order_json(self.order),
            "wire": {
                "bytes_per_hop": self.wire_bytes_per_hop,
                "bytes": self.wire_bytes,
                "hops_made": self.hops_made,
                "hops_elided": self.hops_elided,
                "rotations": program.num_rotations(),
                "links": [dataclasses.asdict(link) for link in self.links],
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
                "pairs": int(self.pairs.sum()) // program.heads_over,
                "imbalance": self.imbalance,
                "lockstep_imbalance": self.lockstep_imbalance,
                "pairs_per_rank": self.pairs_per_rank.tolist() if small else None,
                "pairs_rank_by_hop": self.pairs.tolist() if small else None,
            },
            "documents": None if self.documents is None else self.documents.to_json(),
            "cycles": {
                "mxu_floor": self.mxu_floor_cycles,
                "estimates": None if self.cycles is None else self.cycles.estimates,
                "reason": None if self.cycles is None else self.cycles.reason,
            },
        }


_BLOCK = ("K", "V", "segments")
# The order in which what is sent is listed.
RANK = ("Q", *_BLOCK, "out", "dout", "dQ, dK, dV", "dK, dV", "dK", "dV")


def carries(sent: Start, program: Program) -> str:
    """What is sent: the program's arguments are Q, K, V and, with gradients, dout; integers are segments."""
    if sent.dtype in ("s32", "u32"):
        return "segments"
    if sent.source is not None:
        return ("Q", "K", "V", "dout")[sent.source]
    if sent.kind == "all_to_all":
        return "dQ, dK, dV" if sent.backward else "out"
    if program.head_dim == program.value_head_dim:
        return "dK, dV"
    return "dV" if sent.shape[-1] == program.value_head_dim else "dK"


def _line(sent: Collective, program: Program) -> dict[str, Any]:
    return {**dataclasses.asdict(sent), "carries": carries(sent, program), "hidden": sent.hidden}


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
