"""Parses the text of a compiled XLA program into computations and ops. Knows no rings.

The text of a program for TPUs or GPUs is scheduled: the order of the lines of a computation is the order in which they
are issued.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^  (ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class HloError(ValueError):
    """The text is not what this parser was written for."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One line: ``%name = type opcode(operands), attributes``."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of computations, by the attribute that names them."""
        # What the backend is told comes last, and may hold a whole kernel.
        attributes = self.attributes.partition(", backend_config=")[0]
        return {key: tuple(re.findall(r"%([\w.\-]+)", names)) for key, names in _CALLED.findall(attributes)}

    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every array of the type."""
        found = _ARRAY.findall(re.sub(r"\{[^}]*\}", "", self.type))
        return [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found]

    @property
    def index(self) -> int:
        """Of a get-tuple-element, or the number of a parameter."""
        if self.opcode == "parameter":
            return int(self.inside)
        return int(re.findall(r"\bindex=(\d+)", self.attributes)[0])


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    ops: tuple[Op, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @property
    def root(self) -> Op:
        return next(op for op in self.ops if op.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def inside(self, op: Op) -> Iterator[Op]:
        """Every op of the computations that this op calls, and of those that they call."""
        for names in op.called.values():
            for name in names:
                for inner in self.computations[name].ops:
                    yield inner
                    yield from self.inside(inner)


def parse(text: str) -> Module:
    """The module.

    Raises:
      HloError: if the text is not that of a scheduled module.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise HloError("the program must be a scheduled one (is_scheduled=true): its order says nothing otherwise.")
    computations: dict[str, Computation] = {}
    entry, name, ops, is_entry = None, None, [], False
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                is_entry, name, ops = header[1] is not None, header[2], []
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(ops))
            entry = computations[name] if is_entry else entry
            name = None
        elif _OP.match(line):
            ops.append(_parse_op(line))
    if entry is None:
        raise HloError("the program must have an ENTRY computation.")
    return Module(computations, entry)


def _parse_op(line: str) -> Op:
    head = _OP.match(line)
    assert head is not None
    start = head.end()
    # The type of a tuple is in parentheses; otherwise it has no blanks.
    stop = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    kind, rest = line[start:stop], line[stop:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    return Op(
        name=head[2],
        opcode=rest[:opened],
        type=kind,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        attributes=rest[closed + 1 :],
        is_root=head[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at ``start`` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise HloError(f"a parenthesis must close. Got {text[start : start + 80]!r}.")


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, without the padding of its tiles."""
    digits = re.search(r"\d+", dtype)  # s32, bf16 and f8e4m3fn name their bits; pred takes a byte
    return math.prod(shape) * (int(digits[0]) if digits else 8) // 8


_IN_VMEM = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]\{[^}]*S\(1\)[^}]*\}")
# Ops whose result is another name for what exists, or that are counted where they end.
_NO_NEW_ARRAY = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "async-done"}


def bytes_in_vmem(module: Module) -> int:
    """At most so many bytes of arrays does a TPU program keep in VMEM, where no peak of memory counts them.

    All arrays that it ever places there, whether or not they exist at the same time.
    """
    total = 0
    for computation in module.computations.values():
        for op in computation.ops:
            if op.opcode not in _NO_NEW_ARRAY and not op.opcode.endswith("-start"):
                found = _IN_VMEM.findall(op.type)
                total += sum(num_bytes(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found)
    return total


_MOVES = {
    "bitcast", "copy", "copy-done", "reshape", "transpose", "collective-permute-done", "all-gather", "all-gather-start",
    "all-gather-done", "all-to-all", "all-to-all-start", "all-to-all-done", "async-done",
}  # fmt: skip
# With operands of one origin they put it into another order. A fusion is taken for one that does no more.
_REARRANGES = {"fusion", "slice", "concatenate", "broadcast", "pad", "get-tuple-element", "dynamic-slice"}
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_SCALAR = re.compile(r"^(s32|u32|s64|u64|pred)\[\](\{[^}]*\})?$")


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation, and who called it with what: a loop, or a group of collectives, in the scope around it."""

    module: Module
    computation: Computation
    caller: Op | None = None
    around: "Scope | None" = None

    def inside(self, caller: Op, attribute: str) -> "Scope":
        """Of the computation that an op here names by this attribute."""
        return Scope(self.module, self.module.computations[caller.called[attribute][0]], caller, self)

    def origin(self, name: str) -> "tuple[Op, Scope, int | None]":
        """The op that first made this value, and which part of its tuple.

        Moves, loops, tuples and groups of collectives are seen through.
        """
        op, scope, part = self.computation.by_name[name], self, None
        for _ in range(10_000):
            if op.opcode == "get-tuple-element":
                op, part = scope.computation.by_name[op.operands[0]], op.index
            elif op.opcode == "tuple" and part is not None:
                op, part = scope.computation.by_name[op.operands[part]], None
            elif op.opcode in ("while", "opt-barrier") and part is not None:
                op = scope.computation.by_name[op.operands[0]]
            elif op.opcode == "parameter" and scope.caller is not None and scope.around is not None:
                op, scope = scope.around.computation.by_name[scope.caller.operands[op.index]], scope.around
            elif op.opcode == "async-start":
                scope = scope.inside(op, "calls")
                op = scope.computation.root  # the part stays: the result of an operation of several is a tuple
            elif op.opcode in ("recv", "recv-done"):
                op, part = scope.computation.by_name[self._sent(scope.computation, op)], None
            elif op.opcode in _MOVES or (op.opcode == "fusion" and len(op.operands) == 1 and part is None):
                op = scope.computation.by_name[op.operands[0]]
            elif op.opcode in ("copy-start", "collective-permute-start", "collective-permute"):
                # A permute of several arrays is a tuple of them: the part says which.
                operand = op.operands[part if part is not None and part < len(op.operands) else 0]
                op, part = scope.computation.by_name[operand], None
            else:
                break
        return op, scope, part

    def argument(self, name: str) -> int | None:
        """The number of the program's argument that this value is, or is part of in another order. None: computed."""
        found: set[int] = set()
        waiting, seen = [self.origin(name)[:2]], set()
        while waiting:
            op, scope = waiting.pop()
            if (op.name, id(scope.computation)) in seen:
                continue
            seen.add((op.name, id(scope.computation)))
            if op.opcode == "parameter" and scope.around is None:
                found.add(op.index)
            elif op.opcode not in _REARRANGES or op.arrays()[0][0] in ("s32", "u32"):
                return None
            else:
                arrays = [one for one in op.operands if len(scope.computation.by_name[one].arrays()[0][1]) > 0]
                waiting += [scope.origin(one)[:2] for one in arrays]
            if len(found) > 1:
                return None
        return found.pop() if found else None

    @staticmethod
    def _sent(computation: Computation, op: Op) -> str:
        """What the other slice sends, which runs the same program."""
        recv = computation.by_name[op.operands[0]] if op.opcode == "recv-done" else op
        meeting = _RENDEZVOUS.findall(recv.attributes)
        sends = (one for one in computation.ops if one.opcode == "send")
        return next(one.operands[0] for one in sends if _RENDEZVOUS.findall(one.attributes) == meeting)


def trip_count(module: Module, loop: Op, scope: Scope, limit: int = 1_000_000) -> int | None:
    """How often a while loop runs: its scalars are computed, as the program would. None if they depend on data."""
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    first = scope.computation.by_name[loop.operands[0]]
    if first.opcode != "tuple":
        return None
    state: list[int | None] = [_initial(scope, name) for name in first.operands]
    root = body.root
    if root.opcode != "tuple":
        return None
    scalars = [i for i, name in enumerate(root.operands) if _SCALAR.match(body.by_name[name].type)]
    for count in range(limit):
        going = _value(module, condition, condition.root.name, [state], {})
        if going is None:
            return None
        if not going:
            return count
        known: dict[str, int | None] = {}
        following = {i: _value(module, body, root.operands[i], [state], known) for i in scalars}
        if all(following[i] == state[i] for i in scalars):
            return None
        state = [following.get(i) for i in range(len(state))]
    return None


def _initial(scope: Scope, name: str) -> int | None:
    """The value of a scalar where the loop starts, if it is a constant."""
    op, _, _ = scope.origin(name)
    return _constant(op)


def _constant(op: Op) -> int | None:
    if op.opcode != "constant" or not _SCALAR.match(op.type):
        return None
    return {"true": 1, "false": 0}[op.inside] if op.inside in ("true", "false") else int(op.inside)


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _value(
    module: Module, computation: Computation, name: str, arguments: list, known: dict[str, int | None]
) -> int | None:
    """A scalar of a computation, given its arguments: numbers, lists of numbers for tuples, None where unknown."""
    if name in known:
        return known[name]
    op = computation.by_name[name]
    result: int | None = None
    if op.opcode == "parameter":
        given = arguments[op.index]
        result = given if isinstance(given, int) else None
    elif op.opcode == "get-tuple-element":
        source = computation.by_name[op.operands[0]]
        if source.opcode == "parameter" and isinstance(arguments[source.index], list):
            result = arguments[source.index][op.index]
    elif _SCALAR.match(op.type):
        parts = [_value(module, computation, operand, arguments, known) for operand in op.operands]
        result = _apply(module, op, parts)
    known[name] = result
    return result


def _apply(module: Module, op: Op, parts: list[int | None]) -> int | None:
    if op.opcode == "constant":
        return _constant(op)
    if any(part is None for part in parts):
        return None
    if op.opcode == "fusion":
        inner = module.computations[op.called["calls"][0]]
        return _value(module, inner, inner.root.name, list(parts), {})
    if op.opcode in ("copy", "bitcast", "convert", "reshape"):
        return parts[0]
    if op.opcode == "compare":
        return int(_COMPARE[re.findall(r"direction=(\w\w)", op.attributes)[0]](*parts))
    if op.opcode in _ARITHMETIC:
        return _ARITHMETIC[op.opcode](*parts)
    return None
