"""The least memory that a device needs for its part of the ring, term by term: what the compiled peak is held against.

    O(L) = shards + receive buffers + accumulators,   L = T / C

Nothing in it grows with the whole sequence. Only arrays that must exist at the same time are added up: the floor is the
largest of a few moments, each of which no program can avoid. Padding of tiles, code, a kernel's scratch in VMEM, and
positions, which are computed where they are needed, are not part of it. An array counts wherever it lies: the compiler
for TPUs keeps some that are small in VMEM, which its peak of HBM leaves out.
"""

import dataclasses

from .program import Program


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of the floor; a number in the name counts the arrays that it stands for."""

    name: str
    bytes: int


def floor_terms(program: Program) -> tuple[Term, ...]:
    """The terms of one device, each in bytes, at the moment that needs most.

    Letters: L shard length, N query heads, K K/V heads, H, Hv head sizes, s bytes per item of the inputs.

    The arguments are the caller's and exist throughout: query, B L N H s; key and value, B L K (H + Hv) s; segment
    ids, 4 B L; with ``backward`` dout, B L N Hv s. A receive buffer is as large as key and value with their segment
    ids: one for the block that the kernel reads, unless it is the device's own, and one for the block that arrives
    meanwhile.

    Moments of the forward pass:

    - while the kernel of a hop runs: the receive buffers; the running softmax: accumulator, 4 B L N Hv, maximum and
      sum, 8 B L N. On the last hop also the output, B L N Hv s, unless it can take the accumulator's place.

    Moments of the backward pass, which keeps the output:

    - while the kernel of a hop runs: the receive buffers; lse and delta, 8 B L N; the sum of dq, 4 B L N H; the sums of
      dK and dV, B L K (H + Hv) d each, d bytes per item of ``dkv_dtype``: those of this hop, those that are sent and
      those that are received, if they travel to this hop, and those of the device's own block that wait for the rest.
    - the end: dquery, dkey and dvalue in the dtype of the inputs. They are absent before, so their memory may hold
      other arrays until then.
    """
    return max(_moments(program), key=lambda terms: sum(term.bytes for term in terms))


def floor_bytes(program: Program) -> int:
    """The sum of the terms."""
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
    sum_bytes = 4 if program.dkv_dtype == "float32" else 2
    dkv = program.array_bytes(program.kv_heads, program.head_dim + program.value_head_dim, sum_bytes)

    given = [Term("query", query), Term("key, value", keys + values)]
    given += [Term("segment ids", ids)] if ids else []
    given += [Term("dout", output.bytes)] if program.backward else []
    found: set[tuple[Term, ...]] = {(*given, output)}
    if program.backward:
        found.add((*given, output, Term("dquery, dkey, dvalue", query + keys + values)))
    hops = program.schedule().hops
    if len(hops) == 1:  # nothing is carried from hop to hop
        return found
    strand = 0
    for hop, following in zip(hops, (*hops[1:], None), strict=True):
        strand += hop.first
        buffers = (hop.offset != 0) + (following is not None)
        received = Term(f"receive buffers ({buffers})", buffers * (keys + values + ids))
        softmax = [accumulator, Term("maximum, sum, float32", rows)]
        own_place = following is None and program.item_bytes != 4
        found.add((*given, received, *softmax, *([output] if own_place else [])))
        if program.backward:
            sums = 1 + (0 if hop.first else 2) + (strand > 1)
            travelling = Term(f"dkey, dvalue sums ({sums}), {program.dkv_dtype}", sums * dkv)
            found.add((*given, output, received, Term("lse, delta, float32", rows), dquery, travelling))
    return found
