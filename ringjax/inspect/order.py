"""The compiled order of a ring: what is issued when. Collectives, block kernels and the loops around them, from HLO.

A *block kernel* is a custom call to a Pallas kernel: of Mosaic for TPU, of Mosaic for GPU or of Triton. In a program
that has none, as with implementation "xla", it is a loop that multiplies matrices and permutes nothing.

A permute is *hidden* if it is asynchronous and, between its start and its done, at least one block kernel is issued:
in the same computation, in the order of the lines. A kernel in a loop between the two counts as well. HLO cannot start
a permute in one iteration of a loop and end it in another, so the order within the body is the order of every
iteration. A permute in the body of a loop counts as often as the loop runs.

A permute here is one array that travels. The compiler for GPUs sends several in one operation, a permute of several
arrays or a group of collectives: it is as many permutes of one name, hidden or not together. It may also mark an
operation as one to be awaited at once, although it has a start and a done: that is a synchronous permute.

All of this holds of the other collectives too: keys that are gathered, sums of their gradients that are scattered,
tokens that are exchanged for heads. Between slices of TPUs a permute is a message from host to host: what is received
stands for it.
"""

import dataclasses
import re
from collections.abc import Iterator

from . import wire
from .hlo import HloError, Module, Op, Scope, num_bytes, parse, trip_count

_PALLAS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton)"')
_PRODUCT = re.compile(r'custom_call_target="__cu(blas|dnn)')
_AWAITED = re.compile(r'"is_sync":\s*true')
_OURS = re.compile(r'op_name="[^"]*/(ringjax_\w+)')


@dataclasses.dataclass(frozen=True)
class Start:
    """A collective is issued; a synchronous one is also awaited here, and has no Done.

    Attributes:
      name: in the program.
      dtype, shape: of the array that a device has before it.
      bytes: what a device sends to others, and receives from them.
      asynchronous: it has a start and a done.
      source: the number of the program's argument that travels, None if it was computed.
      kind: "permute", "all_gather", "reduce_scatter", "all_to_all" or "all_reduce".
      axis: of the sequence, 0 the outermost; None: not known, or not one.
      shift: of a permute: how many devices further on the array goes, the shorter way round.
      ring: of several without a common link, the one along which a permute goes.
      backward: it belongs to the gradient, as far as the program says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    asynchronous: bool
    source: int | None
    kind: str = "permute"
    axis: int | None = None
    shift: int | None = None
    ring: int | None = None
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class Done:
    """The collective of this name is awaited."""

    name: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """A block kernel runs."""

    name: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with collectives in it."""

    name: str
    times: int
    body: "Order"


Event = Start | Done | Launch | Loop
Order = tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class Collective(Start):
    """One line of the program that sends.

    Attributes:
      times: how often it runs.
      kernels_between: block kernels that are issued between its start and its done, in one run.
    """

    times: int = 1
    kernels_between: int = 0

    @property
    def hidden(self) -> bool:
        """It is asynchronous, and a block kernel is issued between its start and its done."""
        return self.asynchronous and self.kernels_between > 0


def read_order(text: str, devices: wire.Devices | None = None) -> Order:
    """The order of a scheduled program.

    Args:
      text: of the program.
      devices: how they are numbered; None: no axes are named.

    Raises:
      HloError: the text is not scheduled, or has a loop with collectives in it whose number of iterations it hides.
    """
    module = parse(text)
    everything = [op for computation in module.computations.values() for op in computation.ops]
    pallas = any(_PALLAS.search(op.attributes) for op in everything if op.opcode == "custom-call")
    return _Reader(module, pallas, devices).read(Scope(module, module.entry))


# By the name that HLO gives them. What is sent to another slice is known by what is received from it.
_KINDS = {
    "collective-permute": "permute",
    "recv": "permute",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "all-reduce": "all_reduce",
}


class _Reader:
    def __init__(self, module: Module, pallas: bool, devices: wire.Devices | None) -> None:
        self.module = module
        self.pallas = pallas
        self.devices = devices

    def read(self, scope: Scope) -> Order:
        events: list[Event] = []
        for op in scope.computation.ops:
            sent = list(self._sent(op, scope))
            if sent:
                events += [start for each in sent for start in self._starts(op, *each)]
            elif op.opcode.endswith("-done") and self._is_awaited(op, scope):
                events.append(Done(op.operands[0]))
            elif op.called or op.opcode == "custom-call":
                events += self._caller(op, scope)
        return tuple(events)

    def _sent(self, op: Op, scope: Scope) -> Iterator[tuple[Op, Scope]]:
        """The collectives that this op issues, and their scopes: itself, or those of an asynchronous call or fusion."""
        if op.opcode.removesuffix("-start") in _KINDS:
            yield op, scope
        elif op.opcode == "async-start" or _is_scatter(op):
            yield from self._within(scope.inside(op, "calls"))

    def _within(self, scope: Scope) -> Iterator[tuple[Op, Scope]]:
        for op in scope.computation.ops:
            if op.opcode in _KINDS:
                yield op, scope
            elif "calls" in op.called:
                yield from self._within(scope.inside(op, "calls"))

    def _is_awaited(self, done: Op, scope: Scope) -> bool:
        start = scope.computation.by_name[done.operands[0]]
        return any(self._sent(start, scope)) and _is_asynchronous(start)

    def _starts(self, op: Op, sent: Op, scope: Scope) -> list[Start]:
        """One collective that an op issues, in the collective's own scope: an event for every array of it."""
        is_scatter = scope.caller is not None and _is_scatter(scope.caller)
        kind = "reduce_scatter" if is_scatter else _KINDS[sent.opcode.removesuffix("-start")]
        if sent.opcode == "recv":
            names: tuple[str, ...] = (sent.name,)
            arrays = sent.arrays()[:1]
        elif kind == "permute":
            # The type of a start is (operands, results, contexts), where several operands are a tuple of their own.
            several = sent.type.startswith("((" if sent.opcode == "collective-permute-start" else "(")
            names, arrays = sent.operands if several else sent.operands[:1], sent.arrays()
        else:
            names = sent.operands
            arrays = [scope.computation.by_name[name].arrays()[0] for name in names]
        count, route = 2, wire.Route()
        if kind == "permute":
            route = wire.route(sent.attributes, self.devices)
        else:
            count, axis = wire.group(sent.attributes, self.devices)
            route = wire.Route(axis)
        # Only what issues a group says to which pass it belongs.
        backward = any("transpose(" in each.attributes for each in (op, sent))
        found = []
        for name, (dtype, shape) in zip(names, arrays, strict=False):
            source = scope.argument(name)
            num = wire.sent_bytes(kind, num_bytes(dtype, shape), count)
            found.append(
                Start(
                    name=op.name, dtype=dtype, shape=shape, bytes=num, asynchronous=_is_asynchronous(op), source=source,
                    kind=kind, **route._asdict(), backward=backward,
                )
            )  # fmt: skip
        return found

    def _caller(self, op: Op, scope: Scope) -> list[Event]:
        inside = [op, *self.module.inside(op)]
        if any(inner.opcode.removesuffix("-start") in _KINDS for inner in inside):
            if op.opcode == "while":
                times = trip_count(self.module, op, scope)
                if times is None:
                    raise HloError(f"the loop {op.name} sends, and how often it runs cannot be read.")
                return [Loop(op.name, times, self.read(scope.inside(op, "body")))]
            if op.opcode == "call":
                return list(self.read(scope.inside(op, "to_apply")))
            raise HloError(f"collectives must stand in loops or alone. Got {op.opcode} {op.name} around one.")
        return [Launch(_kernel_name(op))] if self._is_kernel(op, inside) else []

    def _is_kernel(self, op: Op, inside: list[Op]) -> bool:
        if self.pallas:
            return any(inner.opcode == "custom-call" and _PALLAS.search(inner.attributes) for inner in inside)
        return op.opcode == "while" and any(_multiplies(inner) for inner in inside)


def _is_scatter(op: Op) -> bool:
    """A sum of which each device keeps a part, which TPUs run as one operation."""
    return op.opcode == "fusion" and op.called.get("calls", ("",))[0].startswith("all-reduce-scatter")


def _is_asynchronous(op: Op) -> bool:
    return (op.opcode.endswith("-start") or op.opcode == "recv") and not _AWAITED.search(op.attributes)


def _multiplies(op: Op) -> bool:
    """Whether it is a product of matrices, or a call to a library for one."""
    return op.opcode in ("dot", "convolution") or (op.opcode == "custom-call" and bool(_PRODUCT.search(op.attributes)))


def _kernel_name(op: Op) -> str:
    """The name of the line; that of the kernel, where the line is named after the primitive, as it is on GPUs."""
    ours = _OURS.search(op.attributes) if op.opcode == "custom-call" else None
    if ours is None or op.name.startswith(ours[1]):
        return op.name
    return re.sub(r"^.*?(?=(\.\d+)?$)", ours[1], op.name, count=1)


def permutes(order: Order) -> Iterator[Collective]:
    """Every permute of the program, see the rule at the head of this module."""
    return (sent for sent in collectives(order) if sent.kind == "permute")


def collectives(order: Order, times: int = 1) -> Iterator[Collective]:
    """Everything that the program sends."""
    for index, event in enumerate(order):
        if isinstance(event, Loop):
            yield from collectives(event.body, times * event.times)
        elif isinstance(event, Start):
            between = 0
            if event.asynchronous:
                done = order.index(Done(event.name), index)
                between = sum(num_kernels((inner,)) for inner in order[index + 1 : done])
            yield Collective(**vars(event), times=times, kernels_between=between)


def num_kernels(order: Order) -> int:
    """How often a block kernel runs."""
    return sum(kernels(order).values())


def kernels(order: Order, times: int = 1) -> dict[str, int]:
    """How often each block kernel runs, by its name."""
    found: dict[str, int] = {}
    for event in order:
        if isinstance(event, Launch):
            found[event.name] = found.get(event.name, 0) + times
        elif isinstance(event, Loop):
            for name, count in kernels(event.body, times * event.times).items():
                found[name] = found.get(name, 0) + count
    return found
