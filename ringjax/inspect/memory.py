"""The least memory that a device needs for its part of the ring, term by term: what the compiled peak is held against.

    O(L) = shards + receive buffers + accumulators,   L = T / C

Nothing in it grows with the whole sequence. Only arrays that must exist at the same time are added up: the floor is the
largest of a few moments, each of which no program can avoid. Padding of tiles, code, a kernel's scratch in VMEM, and
positions, which are computed where they are needed, are not part of it. An array counts wherever it lies: the compiler
for TPUs keeps some that are small in VMEM, which its peak of HBM leaves out.
"""

import dataclasses
import math
from collections.abc import Iterator

from ..schedule import Schedule
from .program import Program


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of the floor.

    Attributes:
      name: of the array; a number in it counts the arrays that the line stands for.
      bytes: of one device.
    """

    name: str
    bytes: int


def floor_terms(program: Program) -> tuple[Term, ...]:
    """The terms of one device, each in bytes, at the moment that needs most.

    Args:
      program: the ring, the ``program`` of a :class:`ringjax.inspect.Report`.

    Letters: L shard length, N query heads, K K/V heads, H, Hv head sizes, s bytes per item of the inputs.

    The arguments are the caller's and exist throughout: query, B L N H s; key and value, B L K (H + Hv) s; segment
    ids, 4 B L; with ``backward`` dout, B L N Hv s. A block is as large as key and value with their segment ids. Where
    tokens are exchanged for heads over h devices, a block has the h L keys of all of them and the heads that one needs;
    where keys are gathered over g devices it has g times as many keys.

    Moments of the forward pass:

    - while the kernel of a hop runs: the exchanged query, of the size of query; the receive buffers, one for the block
      that the kernel reads, unless it is the device's own, and one for the block that arrives meanwhile, each as large
      as what travels of it under a window; the running softmax: accumulator, 4 B L N Hv, maximum and sum, 8 B L N. On
      the last hop also the output, B L N Hv s, unless it can take the accumulator's place. Half of each block each way
      round takes the same bytes. With a ring within another, also what the outer one receives and sends during a whole
      inner round.
    - where heads are exchanged, the end: the output by heads and the output by tokens.

    Moments of the backward pass, to which forward leaves the output, and query, key, value and output by heads if
    exchanged:

    - while the kernel of a hop runs: the output; query and dout by heads, where these are exchanged, and on the hops of
      the device's own block that by heads; the receive buffers; lse and delta, 8 B L N; the sum of dq, 4 B L N H; the
      sums of dK and dV of a block, d bytes per item of ``dkv_dtype``: those of this hop, those that are sent and those
      that are received, if they travel to this hop, and those of the device's own block that wait for the rest. Of
      gathered keys they are in float32 at the least, on the last hop of one ring in the dtype of the inputs, and where
      there is no ring all gradients by heads.
    - the end: dquery, dkey and dvalue in the dtype of the inputs. They are absent before, so their memory may hold
      other arrays until then.
    """
    return max(_moments(program), key=lambda terms: sum(term.bytes for term in terms))


def floor_bytes(program: Program) -> int:
    """The sum of :func:`floor_terms` of a ``program``."""
    return sum(term.bytes for term in floor_terms(program))


def _moments(program: Program) -> set[tuple[Term, ...]]:
    """What must exist at each of the moments that may need most."""
    keys = program.array_bytes(program.kv_heads, program.head_dim, program.item_bytes)
    values = program.array_bytes(program.kv_heads, program.value_head_dim, program.item_bytes)
    query = program.array_bytes(program.heads, program.head_dim, program.item_bytes)
    output = Term("output", program.array_bytes(program.heads, program.value_head_dim, program.item_bytes))
    ids = program.array_bytes(1, 1, 4) if program.segments else 0
    accumulator = Term("accumulator, float32", program.array_bytes(program.heads, program.value_head_dim, 4))
    rows = 2 * program.array_bytes(program.heads, 1, 4)
    dquery = Term("dquery sum, float32", program.array_bytes(program.heads, program.head_dim, 4))

    sharing = program.sharing
    exchanged, gathered = (
        math.prod(size for size, word in zip(program.axes, sharing.words, strict=True) if word == name)
        for name in ("all_to_all", "all_gather")
    )
    sizes = program.head_dim + program.value_head_dim
    by_heads = exchanged * program.array_bytes(program.kv_heads_here, sizes, program.item_bytes)
    block = gathered * (by_heads + exchanged * ids)
    sum_bytes = 4 if program.dkv_dtype == "float32" else 2
    dkv = gathered * exchanged * program.array_bytes(program.kv_heads_here, sizes, sum_bytes)

    given = [Term("query", query), Term("key, value", keys + values)]
    given += [Term("segment ids", ids)] if ids else []
    given += [Term("dout", output.bytes)] if program.backward else []
    by_head = [Term("query by heads", query)] if exchanged > 1 else []
    end = [Term("output by heads", output.bytes)] if exchanged > 1 else []
    # The block that has not travelled is a caller's array, or one that was exchanged or gathered.
    copied = gathered > 1 or exchanged > 1
    own = [Term("gathered key, value" if gathered > 1 else "key, value by heads", block)] if copied else []
    # What forward leaves to backward. Of gathered keys that is what they are gathered from again.
    kept = [Term("key, value by heads", by_heads)] if exchanged > 1 and program.backward else []

    found: set[tuple[Term, ...]] = {(*given, *((*by_head, *kept) if program.backward else ()), *end, output)}
    back = [*given, *by_head, output]
    if program.backward:
        found.add((*given, output, Term("dquery, dkey, dvalue", query + keys + values)))
        back += [Term("dout by heads", output.bytes)] if exchanged > 1 else []
    moments = list(_hops(program.schedule(), sharing.keys.length))
    if len(moments) == 1:  # nothing is carried from hop to hop
        found.add((*given, *by_head, *own, *(kept if gathered > 1 else ())))
        if program.backward and gathered > 1:
            sums = Term("dkey, dvalue sums (1), float32", dkv * 4 // sum_bytes)
            found.add((*back, *own, sums))
        elif program.backward and exchanged > 1:
            gradients = Term("dquery, dkey, dvalue by heads", query + by_heads)
            found.add((*back, *own, Term("lse, delta, float32", rows), gradients))
        return found
    # On the last hop of one ring nothing is added to sums any more, which then have the dtype of the inputs.
    narrow = program.schedule().is_one_ring and gathered == 1 and program.item_bytes < sum_bytes
    for moment in moments:
        reads_own = own if moment.reads_own else []
        forward = [*by_head, *reads_own, *(kept if gathered > 1 or not moment.reads_own else ())]
        received = Term(f"receive buffers ({moment.count})", int(moment.buffers * block))
        softmax = [accumulator, Term("maximum, sum, float32", rows)]
        own_place = moment.is_last and program.item_bytes != 4
        last = [output] if own_place and exchanged == 1 else []
        found.add((*given, *forward, received, *softmax, *last))
        if program.backward:
            saved = dkv * (1 - program.item_bytes / sum_bytes) if narrow and moment.is_last else 0
            name = f"dkey, dvalue sums ({moment.num_sums}), {program.dkv_dtype}"
            sums = Term(name, int(moment.sums * dkv - saved))
            found.add((*back, *reads_own, received, Term("lse, delta, float32", rows), dquery, sums))
    return found


@dataclasses.dataclass(frozen=True)
class _Moment:
    """While a kernel runs: how many blocks, and sums of dK and dV of blocks, a device holds besides its own block.

    ``count`` and ``num_sums`` count arrays, ``buffers`` and ``sums`` how many whole ones they are together.
    """

    reads_own: bool
    is_last: bool
    count: int
    buffers: float
    num_sums: int
    sums: float

    def within(self, other: "_Moment") -> "_Moment":
        """The same during one of the hops of an outer ring."""
        return _Moment(
            reads_own=self.reads_own and other.reads_own,
            is_last=self.is_last and other.is_last,
            count=self.count + other.count,
            buffers=self.buffers + other.buffers,
            num_sums=self.num_sums + other.num_sums,
            sums=self.sums + other.sums,
        )


def _hops(schedule: Schedule, length: int, held: float = 1.0) -> Iterator[_Moment]:
    """Every kernel of the rings, in order; ``held`` is how much of a block the axes outside have brought here."""
    strand = 0
    size = lambda hop: held if hop.keys is None else (hop.keys[1] - hop.keys[0]) / length  # noqa: E731
    for hop, following in zip(schedule.hops, (*schedule.hops[1:], None), strict=True):
        strand += hop.first
        received = [] if hop.offset == 0 else [size(hop)]
        arriving = [] if following is None else [size(following)]
        travelling = [] if hop.first else [size(hop)] * 2
        waiting = [held] if strand > 1 else []
        if hop.inner is None:
            buffers, sums = [*received, *arriving], [size(hop), *travelling, *waiting]
            yield _Moment(hop.offset == 0, following is None, len(buffers), sum(buffers), len(sums), sum(sums))
            continue
        for inner in _hops(hop.inner, length, size(hop)):
            # What was received is sent on during the whole inner round, or else is read when that starts.
            sent = received if inner.reads_own or (following is not None and not following.first) else []
            # Sums that are sent may be away after the first of its hops; those that are received are there by the last.
            moving = travelling if inner.reads_own else travelling[:1]
            buffers, sums = [*sent, *arriving], [*moving, *waiting]
            outer = _Moment(hop.offset == 0, following is None, len(buffers), sum(buffers), len(sums), sum(sums))
            yield inner.within(outer)
