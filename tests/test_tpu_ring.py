"""The promises of the ring, proved on the programs compiled for real TPU topologies: overlap, memory, scale.

Nothing runs on a TPU. Every figure is read from the compiled program by :mod:`ringjax.inspect`.
"""

import pytest
from tpu import needs_libtpu

from ringjax.inspect import Report, inspect_ring
from ringjax.inspect.hlo import num_bytes, parse

pytestmark = [needs_libtpu, pytest.mark.slow]
SLICES = {"v4": "v4:2x2x2", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "v7x": "v7x:2x2x1"}  # 8 devices
MASKS = {
    "zigzag, D = 128": {"head_dim": 128, "is_causal": True},
    "window, D = 64": {"head_dim": 64, "is_causal": True, "layout": "contiguous", "window": 1000},
}


# A window makes a short ring on every generation alike: on the smallest chip, and where a chip is two devices.
CASES = [*((generation, "zigzag, D = 128") for generation in SLICES), *((g, "window, D = 64") for g in ("v5e", "v7x"))]


@pytest.mark.parametrize(("generation", "mask"), CASES)
def test_a_ring_of_8(generation, mask):
    """Forward and backward in one program, grouped heads, bfloat16. One compilation each: all is asserted on it."""
    report = inspect_ring(SLICES[generation], seq_len=4096, heads=4, kv_heads=2, backward=True, **MASKS[mask])
    every_permute_hides_behind_a_kernel(report, 7 if mask.startswith("zigzag") else 2)
    only_kv_heads_travel_and_no_more_often_than_planned(report)


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


def only_kv_heads_travel_and_no_more_often_than_planned(report: Report) -> None:
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
        "v5p:4x4x4", seq_len=64 * 4096, heads=8, kv_heads=4, head_dim=128, is_causal=True, backward=True
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


def test_a_ring_over_64_chips_of_v5e_stays_asynchronous():
    near = inspect_ring("v5e:8x8", seq_len=65536, heads=4, kv_heads=2, head_dim=128, is_causal=True)
    assert near.num_synchronous == 0 and near.num_hidden == near.num_permutes == 2 * 63


@pytest.mark.parametrize(("backward", "rings"), [(False, (8, 64)), (True, (8, 1024))])
def test_memory_of_a_million_tokens_is_near_the_floor_and_halves_as_the_ring_doubles(backward, rings):
    """1,048,576 tokens, 16 heads of 128, bfloat16, on v5p."""
    report = inspect_ring(
        "v5p:8x8x16", ring=8, sweep=rings, seq_len=2**20, heads=16, head_dim=128, is_causal=True,
        backward=backward,
    )  # fmt: skip
    peaks = {row.ring: row.peak_bytes for row in report.scaling if row.peak_bytes is not None}
    floors = {row.ring: row.floor_bytes for row in report.scaling}
    assert tuple(sorted(peaks)) == rings
    for ring, peak in peaks.items():
        assert 1 <= peak / floors[ring] < 1.15, ring
        assert abs(peak * ring / (peaks[8] * 8) - 1) < 0.1, ring


def test_4096_chips_take_no_larger_program_than_few():
    """The loop is rolled."""
    sizes = {"heads": 16, "kv_heads": 4, "head_dim": 128, "is_causal": True, "backward": True}
    report = inspect_ring("v5p:16x16x16", seq_len=2**22, **sizes)
    assert report.program.ring == 4096 and report.num_synchronous == 0
    assert len(report.kernels) <= 8 and sum(report.kernels.values()) == 2 * 4096
    assert sum(permute.times for permute in report.exposed) == 2
