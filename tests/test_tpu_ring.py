"""The promises of the ring, proved on the programs compiled for real TPU topologies: overlap, memory, scale.

Nothing runs on a TPU. Every figure is read from the compiled program by :mod:`ringjax.inspect`.
"""

import math
from typing import Any

import pytest
from tpu import needs_libtpu

from ringjax.inspect import Report, inspect_ring
from ringjax.inspect.cycles import base_name
from ringjax.inspect.hlo import num_bytes, parse
from ringjax.inspect.order import Done, Start

pytestmark = [needs_libtpu, pytest.mark.slow]
SLICES = {"v4": "v4:2x2x2", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "v7x": "v7x:2x2x1"}  # 8 devices
HALF = {"block_q": 256, "block_kv": 256}  # of what the chips have by default: a fourth to compile
SMALL = {"block_q": 128, "block_kv": 128}  # tiles that the compiler is done with sooner; the ring is the same
MASKS = {
    "zigzag, D = 128": {"head_dim": 128, "is_causal": True},
    "window, D = 64": {"head_dim": 64, "is_causal": True, "layout": "contiguous", "window": 1000},
}


# What becomes of a short ring, which a window leaves, and of one both ways round is no matter of the generation: one is
# compiled where a chip is two devices, the other for the smallest chip, which routes to neighbours alone.
CASES = [*((generation, "zigzag, D = 128") for generation in SLICES), ("v7x", "window, D = 64")]


@pytest.mark.parametrize(("generation", "mask"), CASES)
def test_a_ring_of_8(generation, mask):
    """Forward and backward in one program, grouped heads, bfloat16. One compilation each: all is asserted on it.

    On v5e one more, both ways round.
    """
    options: dict[str, Any] = dict(seq_len=4096, heads=4, kv_heads=2, backward=True, **MASKS[mask])
    report = inspect_ring(SLICES[generation], **options)
    every_permute_hides_behind_a_kernel(report, 7 if mask.startswith("zigzag") else 2)
    only_the_keys_in_sight_travel_and_no_more_often_than_planned(report)
    if generation == "v5e":
        each_way_round_carries_half(report, inspect_ring(SLICES[generation], direction="both", **options))


def each_way_round_carries_half(one_way: Report, both: Report) -> None:
    """Half of the bytes of every permute, the other half the other way; the same work; no more memory."""
    halves = {}
    for payload in one_way.payloads:
        batch, heads, *rest = payload.shape
        for shift in (1, -1):
            halves[payload.carries, payload.dtype, (batch, heads // 2, *rest), shift] = (
                payload.bytes // 2,
                payload.times,
            )
    found = {(p.carries, p.dtype, p.shape, p.shift): (p.bytes, p.times) for p in both.payloads}
    assert found == halves
    (alone,), (shared,) = one_way.links, both.links
    assert (alone.up, shared.up) == (0, shared.down) and shared.down * 2 == alone.down > 0
    # Only the last sums have no kernel behind which they could come home: two halves of dK, two of dV.
    assert both.num_synchronous == 0 and both.num_permutes - both.num_hidden == sum(p.times for p in both.exposed) == 4
    assert {payload.carries for payload in both.payloads if payload.hidden < payload.times} == {"dK, dV"}
    assert kernel_work(both) == kernel_work(one_way), "nothing is computed twice"
    buffer = 512 * 2 * 2 * 128 * 2  # K and V of a shard
    assert both.compiled.peak_bytes <= one_way.compiled.peak_bytes + buffer


def kernel_work(report: Report) -> dict[str, int]:
    """Calls of a kernel times query heads, queries and keys of a call, by its name."""
    module = parse(report.compiled.text)
    work: dict[str, int] = {}
    for computation in module.computations.values():
        for op in computation.ops:
            if op.name in report.kernels:
                arrays = [computation.by_name[name].arrays()[0] for name in op.operands]
                query, key = [shape for dtype, shape in arrays if dtype == "bf16" and len(shape) == 4][:2]
                name = base_name(op.name)
                work[name] = work.get(name, 0) + report.kernels[op.name] * math.prod(query[:3]) * key[2]
    return work


def test_two_slices_exchange_a_block_during_a_whole_inner_round():
    """Two slices of v5e, joined by the network of their hosts, rings of 4 within; forward and backward."""
    report = inspect_ring(
        "2*v5e:2x2", axes=(2, 4), seq_len=8192, heads=4, kv_heads=2, head_dim=128, is_causal=True, backward=True,
        **HALF,
    )  # fmt: skip
    assert report.num_synchronous == 0 and sum(report.kernels.values()) == 2 * 8
    block = 1024 * 2 * 128
    outer = [sent for sent in report.permutes if sent.axis == 0]
    there = [sent for sent in outer if sent.dtype == "bf16"]
    assert [(sent.bytes, sent.times) for sent in there] == 4 * [(2 * block, 1)], "K and V once in either pass"
    # Backward waits for nothing here but dout, an argument: the compiler fetches its block as early as it likes.
    assert [sent.kernels_between for sent in there[:2]] == [4, 4] and min(s.kernels_between for s in there[2:]) >= 4
    sums = [sent for sent in outer if sent.dtype == "f32"]
    assert [(sent.bytes, sent.times, sent.kernels_between) for sent in sums] == [
        (4 * block, 1, n) for n in (4, 4, 0, 0)
    ]
    order = report.order
    starts = [order.index(event) for event in order if isinstance(event, Start) and event.axis == 0]
    dones = [order.index(Done(sent.name)) for sent in outer]
    inner = [sent for sent in report.permutes if sent.axis == 1]
    # K and V, 2 rounds of 3 hops in either pass; dK and dV the same once, and home once.
    assert sum(sent.times for sent in inner) == 2 * (2 * 2 * 3) + 2 * (2 * 3 + 1)
    assert {sent.shift for sent in inner} == {-1} and sum(sent.times for sent in inner if not sent.hidden) == 2
    first = next(n for n, event in enumerate(order) if isinstance(event, Start) and event.axis == 1)
    assert max(starts[:2]) < first < min(dones[:2]), "issued before the inner round, awaited after it"
    assert report.floor_bytes <= report.held_bytes < 1.3 * report.floor_bytes


def test_gathered_keys_and_exchanged_heads_byte_for_byte():
    """Keys over 2, heads over 4 with two K/V heads, of which each device gets one. One kernel in each pass."""
    report = inspect_ring(
        "v5e:2x4", axes=(2, 4), strategy=("all_gather", "all_to_all"), seq_len=8192, heads=4, kv_heads=2, head_dim=128,
        is_causal=True, backward=True, **HALF,
    )  # fmt: skip
    shard, parts = 1024 * 128 * 2, 3 / 4  # of one head; a quarter stays where it is
    sent: dict[tuple[str, int | None, str, str], int] = {}
    for one in report.payloads:
        key = one.kind, one.axis, one.dtype, one.carries
        sent[key] = sent.get(key, 0) + one.bytes * one.times
    assert sent == {
        ("all_to_all", 1, "bf16", "Q"): 4 * shard * parts,
        ("all_to_all", 1, "bf16", "K"): 4 * shard * parts,  # two heads, each to two devices
        ("all_to_all", 1, "bf16", "V"): 4 * shard * parts,
        ("all_to_all", 1, "bf16", "out"): 4 * shard * parts,
        ("all_to_all", 1, "bf16", "dout"): 4 * shard * parts,
        ("all_to_all", 1, "bf16", "dQ, dK, dV"): 3 * 4 * shard * parts,
        ("all_gather", 0, "bf16", "K"): 2 * 4 * shard,  # its head of four shards, forward and backward
        ("all_gather", 0, "bf16", "V"): 2 * 4 * shard,
        ("reduce_scatter", 0, "f32", "dK, dV"): 2 * 2 * 4 * shard,
    }
    assert sum(report.kernels.values()) == 2 and report.floor_bytes <= report.held_bytes


def test_a_window_of_512_moves_512_keys_of_65536():
    """Forward and backward, dK and dV in float32."""
    report = inspect_ring(
        "v5e:2x4", seq_len=8 * 65536, heads=1, head_dim=128, window=(512, 0), layout="contiguous", backward=True,
        **HALF,
    )  # fmt: skip
    found = {(one.carries, one.shift): (one.bytes, one.times) for one in report.payloads}
    keys = 512 * 128
    assert found == {("K", 1): (2 * keys, 2), ("V", 1): (2 * keys, 2), ("dK, dV", -1): (4 * keys, 2)}
    assert report.num_synchronous == 0 and {p.source for p in report.exposed} <= {None}


def every_permute_hides_behind_a_kernel(report: Report, rotations: int) -> None:
    """All but those that bring the sums of dK and dV home after the last kernel, which have nothing to hide behind."""
    assert report.program.schedule().num_rotations == rotations
    assert report.num_synchronous == 0
    exposed = report.exposed
    assert sum(permute.times for permute in exposed) == 2
    order = list(report.permutes)
    assert all(permute.source is None and permute.dtype in ("bf16", "f32") for permute in exposed), "dK and dV"
    assert set(order[-2:]) <= set(exposed), "the last thing that happens"
    assert any(name.startswith("ringjax_forward") for name in report.kernels)
    assert sum(report.kernels.values()) == 2 * report.hops_made, "one kernel a hop in either pass: no merge kernels"


def only_the_keys_in_sight_travel_and_no_more_often_than_planned(report: Report) -> None:
    """All of a full ring. Of a window of 1000 before: shards of 512, 488 of the second in whole tiles: 512 too."""
    schedule = report.program.schedule()
    size = 512 * 2 * report.program.head_dim
    for payload in report.payloads:
        if payload.carries in ("K", "V"):
            # As often backward as forward: were a rotation of both shared, its block would be kept in between.
            assert payload.bytes == 2 * size and payload.times == 2 * schedule.num_rotations
        elif payload.carries == "dK, dV":
            assert payload.bytes in (2 * size, 4 * size)
    sums = [payload.times for payload in report.payloads if payload.carries == "dK, dV"]
    leaving = [strand for strand in schedule.strands if strand[-1] != 0]
    assert sum(sums) == 2 * sum(map(len, leaving)), "a sum starts at the first hop of a strand and ends at home"


def test_loops_hold_nothing_but_kernels_and_permutes():
    """Forward: no copy of K or V, no pass over the accumulator, in the loop or between its kernels.

    Backward: two additions a hop, of the sums that arrive and those of this hop. The loops stand for any C.
    """
    report = inspect_ring(
        "v5p:4x4x4", seq_len=64 * 4096, heads=8, kv_heads=4, head_dim=128, is_causal=True, backward=True, **SMALL
    )
    module = parse(report.compiled.text)
    block = 4096 * 4 * 128 * 2
    bodies = [module.computations[op.called["body"][0]] for op in module.entry.ops if op.opcode == "while"]
    bodies = [body for body in bodies if any(op.opcode == "collective-permute-start" for op in body.ops)]
    assert len(bodies) == 2, "one loop forward, one backward"
    free = {"parameter", "get-tuple-element", "tuple", "bitcast", "custom-call"}
    free |= {"collective-permute-start", "collective-permute-done"}
    for body in bodies:
        large = [op for op in body.ops if sum(num_bytes(*array) for array in op.arrays()) >= block // 2]
        work = [op for op in large if op.opcode not in free]
        kernels = [op for op in body.ops if op.name.startswith("ringjax_")]
        assert len(kernels) == 2, "unrolled by two"
        if kernels[0].name.startswith("ringjax_forward"):
            assert work == []
        else:
            # copy-start, copy-done: XLA prefetches an operand of the addition into VMEM.
            adds = [op for op in work if op.opcode not in ("copy-start", "copy-done")]
            assert len(adds) == 4 and {op.opcode for op in adds} <= {"add", "fusion"}
            assert all(op.arrays() == [("f32", (1, 4, 4096, 128))] for op in adds)


@pytest.mark.parametrize(("backward", "rings"), [(False, (8, 64)), (True, (8, 1024))])
def test_memory_of_a_million_tokens_is_near_the_floor_and_halves_as_the_ring_doubles(backward, rings):
    """1,048,576 tokens, 16 heads of 128, bfloat16, on v5p. The tiles, of VMEM, compile faster than the default ones.

    The larger ring takes no larger program: the loop is rolled.
    """
    report = inspect_ring(
        "v5p:8x8x16", ring=rings[1], sweep=rings, seq_len=2**20, heads=16, head_dim=128, is_causal=True,
        backward=backward, block_q=512, block_kv=512,
    )  # fmt: skip
    peaks = {row.ring: row.peak_bytes for row in report.scaling if row.peak_bytes is not None}
    floors = {row.ring: row.floor_bytes for row in report.scaling}
    assert tuple(sorted(peaks)) == rings
    for ring, peak in peaks.items():
        assert 1 <= peak / floors[ring] < 1.15, ring
        assert abs(peak * ring / (peaks[8] * 8) - 1) < 0.1, ring
    passes = 2 if backward else 1
    assert report.program.ring == rings[1] and report.num_synchronous == 0
    assert len(report.kernels) <= 4 * passes and sum(report.kernels.values()) == passes * rings[1]
    assert sum(permute.times for permute in report.exposed) == 2 * (passes - 1)
