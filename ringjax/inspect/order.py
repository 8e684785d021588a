"""The compiled order of a ring: what is issued when. Permutes, block kernels and the loops around them, from HLO text.

A *block kernel* is a custom call to a Pallas kernel: of Mosaic for TPU, of Mosaic for GPU or of Triton. In a program
that has none, as with implementation "xla", it is a loop that multiplies matrices and permutes nothing.

A permute is *hidden* if it is asynchronous and, between its start and its done, at least one block kernel is issued:
in the same computation, in the order of the lines. A kernel in a loop between the two counts as well. HLO cannot start
a permute in one iteration of a loop and end it in another, so the order within the body is the order of every
iteration. A permute in the body of a loop counts as often as the loop runs.

A permute here is one array that travels. The compiler for GPUs sends several in one operation, which then is as many
permutes of one name, hidden or not together. It may also mark an operation as one to be awaited at once, although it
has a start and a done: that is a synchronous permute.
"""

import dataclasses
import re
from collections.abc import Iterator

from .hlo import HloError, Module, Op, Scope, num_bytes, parse, trip_count

_PALLAS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton)"')
_PRODUCT = re.compile(r'custom_call_target="__cu(blas|dnn)')
_AWAITED = re.compile(r'"is_sync":\s*true')
_OURS = re.compile(r'op_name="[^"]*/(ringjax_\w+)')


@dataclasses.dataclass(frozen=True)
class Start:
    """A permute is issued; a synchronous one is also awaited here, and has no Done."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    asynchronous: bool
    source: int | None  # the number of the program's argument that travels, None if it was computed


@dataclasses.dataclass(frozen=True)
class Done:
    """The permute of this name is awaited."""

    name: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """A block kernel runs."""

    name: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with permutes in it."""

    name: str
    times: int
    body: "Order"


Event = Start | Done | Launch | Loop
Order = tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class Permute:
    """One line of the program that permutes; it runs ``times`` times."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    asynchronous: bool
    source: int | None
    times: int
    kernels_between: int

    @property
    def hidden(self) -> bool:
        return self.asynchronous and self.kernels_between > 0


def read_order(text: str) -> Order:
    """The order of a scheduled program.

    Raises:
      HloError: the text is not scheduled, or has a loop with permutes in it whose number of iterations it hides.
    """
    module = parse(text)
    everything = [op for computation in module.computations.values() for op in computation.ops]
    pallas = any(_PALLAS.search(op.attributes) for op in everything if op.opcode == "custom-call")
    return _Reader(module, pallas).read(Scope(module.entry))


class _Reader:
    def __init__(self, module: Module, pallas: bool) -> None:
        self.module = module
        self.pallas = pallas

    def read(self, scope: Scope) -> Order:
        events: list[Event] = []
        for op in scope.computation.ops:
            if op.opcode in ("collective-permute-start", "collective-permute"):
                events += self._starts(op, scope)
            elif op.opcode == "collective-permute-done":
                if _is_asynchronous(scope.computation.by_name[op.operands[0]]):
                    events.append(Done(op.operands[0]))
            elif op.called or op.opcode == "custom-call":
                events += self._caller(op, scope)
        return tuple(events)

    def _starts(self, op: Op, scope: Scope) -> list[Start]:
        # The type of a start is (operands, results, contexts), where several operands are a tuple of their own.
        several = op.type.startswith("((" if op.opcode == "collective-permute-start" else "(")
        names = op.operands if several else op.operands[:1]
        asynchronous = _is_asynchronous(op)
        found = []
        for name, (dtype, shape) in zip(names, op.arrays(), strict=False):
            origin, where, _ = scope.origin(name)
            source = origin.index if origin.opcode == "parameter" and where.around is None else None
            found.append(Start(op.name, dtype, shape, num_bytes(dtype, shape), asynchronous, source))
        return found

    def _caller(self, op: Op, scope: Scope) -> list[Event]:
        inside = [op, *self.module.inside(op)]
        if any(inner.opcode.startswith("collective-permute") for inner in inside):
            if op.opcode == "while":
                times = trip_count(self.module, op, scope)
                if times is None:
                    raise HloError(f"the loop {op.name} permutes, and how often it runs cannot be read.")
                body = Scope(self.module.computations[op.called["body"][0]], op, scope)
                return [Loop(op.name, times, self.read(body))]
            if op.opcode == "call":
                return list(self.read(Scope(self.module.computations[op.called["to_apply"][0]], op, scope)))
            raise HloError(f"permutes must stand in loops or alone. Got {op.opcode} {op.name} around one.")
        return [Launch(_kernel_name(op))] if self._is_kernel(op, inside) else []

    def _is_kernel(self, op: Op, inside: list[Op]) -> bool:
        if self.pallas:
            return any(inner.opcode == "custom-call" and _PALLAS.search(inner.attributes) for inner in inside)
        return op.opcode == "while" and any(_multiplies(inner) for inner in inside)


def _is_asynchronous(op: Op) -> bool:
    return op.opcode == "collective-permute-start" and not _AWAITED.search(op.attributes)


def _multiplies(op: Op) -> bool:
    """Whether it is a product of matrices, or a call to a library for one."""
    return op.opcode in ("dot", "convolution") or (op.opcode == "custom-call" and bool(_PRODUCT.search(op.attributes)))


def _kernel_name(op: Op) -> str:
    """The name of the line; that of the kernel, where the line is named after the primitive, as it is on GPUs."""
    ours = _OURS.search(op.attributes) if op.opcode == "custom-call" else None
    if ours is None or op.name.startswith(ours[1]):
        return op.name
    return re.sub(r"^.*?(?=(\.\d+)?$)", ours[1], op.name, count=1)


def permutes(order: Order, times: int = 1) -> Iterator[Permute]:
    """Every permute of the program, see the rule at the head of this module."""
    for index, event in enumerate(order):
        if isinstance(event, Loop):
            yield from permutes(event.body, times * event.times)
        elif isinstance(event, Start):
            between = 0
            if event.asynchronous:
                done = order.index(Done(event.name), index)
                between = sum(num_kernels((inner,)) for inner in order[index + 1 : done])
            yield Permute(**vars(event), times=times, kernels_between=between)


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
