"""The least memory that a device needs for its part of the ring, term by term: what the compiled peak is held against.

    O(L) = shards + two receive buffers + accumulators,   L = T / C

Nothing in it grows with the whole sequence. Padding of tiles, code and a kernel's scratch in VMEM are not part of it.
"""

import dataclasses

from .program import Program


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of the floor. ``count`` arrays of the same size in all."""

    name: str
    bytes: int


def floor_terms(program: Program) -> tuple[Term, ...]:
    """The terms of one device, each in bytes. Letters: L shard length, N query heads, K kv heads, H, Hv head sizes.

    Forward, with s bytes an item of the inputs and float32 sums:

    - query: B L N H s; key, value: B L K (H + Hv) s; output: B L N Hv s.
    - receive buffers: 2 B L K (H + Hv) s. The block that a kernel reads, and the next one that arrives meanwhile; the
      own block stays, since it is the caller's.
    - accumulator: 4 B L N Hv; maximum and sum: 8 B L N.
    - positions: three blocks of 4 L (the own one and two that travel), where there is a causal mask or a window;
      segments: 4 B L each likewise.

    Forward and backward in one program. While the backward pass runs there are:

    - query, key, value, output and the receive buffers as above; dout: B L N Hv s; lse and delta: 8 B L N.
    - dquery, dkey, dvalue in the dtype of the inputs, since they are results.
    - dquery sum: 4 B L N H; the sums of dK and dV in d bytes an item: 3 B L K (H + Hv) d. Those of this hop, those
      that are sent and those that are received, which the wire needs at once.
    """
    keys = program.array_bytes(program.kv_heads, program.head_dim, program.item_bytes)
    values = program.array_bytes(program.kv_heads, program.value_head_dim, program.item_bytes)
    query = program.array_bytes(program.heads, program.head_dim, program.item_bytes)
    output = program.array_bytes(program.heads, program.value_head_dim, program.item_bytes)
    row = program.array_bytes(program.heads, 1, 4)
    travels = program.schedule().num_rotations > 0
    terms = [
        Term("query", query),
        Term("key, value", keys + values),
        Term("output", output),
        Term("receive buffers (2)", 2 * (keys + values) if travels else 0),
    ]
    if program.bounds != (None, None):
        terms.append(Term("positions (3)", 3 * 4 * program.shard_length))
    if program.segments:
        terms.append(Term("segment ids (3)", 3 * 4 * program.batch * program.shard_length))
    if not program.backward:
        accumulator = program.array_bytes(program.heads, program.value_head_dim, 4)
        return *terms, Term("accumulator, float32", accumulator), Term("maximum, sum, float32", 2 * row)
    d = 4 if program.dkv_dtype == "float32" else 2
    kv_sums = program.array_bytes(program.kv_heads, program.head_dim + program.value_head_dim, d)
    return (
        *terms,
        Term("dout", output),
        Term("lse, delta, float32", 2 * row),
        Term("dquery, dkey, dvalue", query + keys + values),
        Term("dquery sum, float32", program.array_bytes(program.heads, program.head_dim, 4)),
        Term(f"dkey, dvalue sums (3), {program.dkv_dtype}", (3 if travels else 1) * kv_sums),
    )


def floor_bytes(program: Program) -> int:
    """The sum of the terms."""
    return sum(term.bytes for term in floor_terms(program))
