"""`ringjax inspect` with the real compiler: what it reads from rings compiled for TPUs that are absent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tpu import needs_libtpu

from ringjax.inspect import InspectError, inspect_ring
from ringjax.inspect.compile import compile_ring
from ringjax.inspect.program import Program

pytestmark = needs_libtpu
SIZES = {"heads": 8, "kv_heads": 8, "head_dim": 128, "implementation": "xla"}


def test_a_causal_ring_forward_and_backward():
    report = inspect_ring("v5e:2x4", seq_len=16384, is_causal=True, backward=True, **SIZES)
    counts = {(p.carries, p.dtype): p for p in report.payloads}
    assert {"K", "V", "dK, dV"} == {name for name, _ in counts}, "positions are computed where they are needed"
    assert counts["K", "bf16"].bytes == 2048 * 8 * 128 * 2
    assert counts["dK, dV", "f32"].times == 14, "7 rotations of both, while kernels run"
    assert report.num_synchronous == 0
    # The hop that brings the last sums home has no kernel left to hide behind.
    assert {p.name for p in report.exposed} <= {p.name for p in report.permutes if p.source is None}
    assert sum(p.times for p in report.exposed) == 2
    assert sum(report.kernels.values()) == 16
    assert report.floor_bytes <= report.compiled.peak_bytes < 1.2 * report.floor_bytes
    json.dumps(report.to_json())


def test_small_shards_lie_in_vmem_and_the_floor_still_holds():
    """Two devices: a received block is small enough for VMEM, and the peak of HBM alone is less than the floor."""
    sizes = {"seq_len": 16384, "heads": 8, "kv_heads": 2, "head_dim": 128, "block_q": 512, "block_kv": 512}
    report = inspect_ring("v5e:2x4", ring=2, is_causal=True, **sizes)
    assert report.compiled.vmem_bytes > 0
    assert report.floor_bytes <= report.held_bytes < 1.4 * report.floor_bytes


def test_rolled_loops_are_counted_as_often_as_they_run():
    """C = 64: 63 rotations of K and of V, whatever the unrolling."""
    for unroll in (1, 3):
        report = inspect_ring("v5p:4x4x4", seq_len=65536, unroll=unroll, **SIZES)
        assert [(p.carries, p.times, p.hidden) for p in report.payloads if p.carries == "K"] == [("K", 63, 63)]
        assert sum(report.kernels.values()) == 64
        assert report.num_permutes == report.num_hidden == 126


def test_windows_leave_hops_out_and_segments_travel():
    report = inspect_ring(
        "v6e:2x4", seq_len=16384, layout="contiguous", is_causal=True, window=3000, segments=True, batch=2, **SIZES
    )
    assert (report.hops_made, report.hops_elided) == (3, 5)
    # The first hop brings a whole shard, the second the 952 tokens that the window still reaches, in whole tiles.
    assert sorted((p.carries, p.times, p.bytes) for p in report.payloads) == [
        ("K", 1, 2 * 1024 * 8 * 128 * 2),
        ("K", 1, 2 * 2048 * 8 * 128 * 2),
        ("V", 1, 2 * 1024 * 8 * 128 * 2),
        ("V", 1, 2 * 2048 * 8 * 128 * 2),
        ("segments", 1, 2 * 1024 * 4),
        ("segments", 1, 2 * 2048 * 4),
    ]


def test_ring_mesh_keeps_permutes_asynchronous_where_make_mesh_does_not():
    """v5e routes to near neighbours only: a ring over 64 chips in the usual order has synchronous permutes."""
    near = inspect_ring("v5e:8x8", seq_len=65536, **SIZES)
    assert near.num_synchronous == 0 and near.num_hidden == near.num_permutes == 126
    usual = inspect_ring("v5e:8x8", seq_len=65536, device_order="make_mesh", **SIZES)
    assert usual.num_synchronous == 126 and usual.num_hidden == 0


@pytest.mark.parametrize("ring", [4, 32])
def test_rings_side_by_side_are_asynchronous_too(ring):
    report = inspect_ring("v5e:8x8", ring=ring, seq_len=1024 * ring, **SIZES)
    assert report.num_synchronous == 0 and report.num_permutes == 2 * (ring - 1)


def test_rings_without_a_common_link_carry_a_part_each():
    """Two rings on a torus of 4 x 4, each both ways: a link carries a fourth of 15 blocks, and every permute hides."""
    report = inspect_ring("v5p:4x4x1", seq_len=16384, rings=2, direction="both", **SIZES)
    block = 1024 * 8 * 2 * 128 * 2
    assert {(p.ring, p.shift) for p in report.permutes} == {(0, 1), (0, -1), (1, 1), (1, -1)}
    assert [(link.axis, link.up, link.down) for link in report.links] == [(0, 15 * block / 4, 15 * block / 4)]
    assert report.num_synchronous == 0 and report.num_hidden == report.num_permutes == 15 * 8


def test_memory_follows_the_floor_as_the_ring_grows():
    report = inspect_ring("v5p:4x4x4", ring=16, seq_len=2**18, sweep=(32,), is_causal=True, **SIZES)
    peaks = {row.ring: row.peak_bytes for row in report.scaling if row.peak_bytes is not None}
    assert sorted(peaks) == [16, 32]
    floors = {row.ring: row.floor_bytes for row in report.scaling}
    assert all(1 <= peaks[ring] / floors[ring] < 1.2 for ring in peaks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e:2x2", "seq_len": 2**22}, r"too large for the memory of a device .*: it needs [\d.]+G of"),
        ({"topology": "v5e:8x8", "ring": 24, "seq_len": 24 * 1024}, "ring must divide the 64 devices of v5e:8x8"),
        ({"topology": "v5e:2x4", "seq_len": 8192, "implementation": "pallas_gpu"}, "config.implementation must be one"),
        ({"topology": "v5e:2x4", "seq_len": 8192, "timeout": 0.1}, "longer than --timeout, 0.1 s"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(options, message):
    with pytest.raises(InspectError, match=message) as caught:
        inspect_ring(**{**SIZES, **options})
    assert "\n" not in str(caught.value)


def test_a_compiler_that_ends_by_itself_is_told_with_its_last_words():
    program = Program("v5e:2x2", 4, 1024, 2, 2, 128, 128, implementation="xla")
    with pytest.raises(InspectError, match="exit status 1 and no result. Its last words: .*no_such_flag"):
        compile_ring(program, libtpu_args="--no_such_flag=1")


def test_estimates_or_a_reason():
    """The ring of jax.numpy has no kernel that the profiler could estimate."""
    report = inspect_ring("v5e:2x2", seq_len=4096, cycles=True, **SIZES)
    assert report.cycles is not None and report.cycles.estimates == {} and report.cycles.reason


def children(pid: int) -> list[int]:
    """Processes whose parent this is, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_compiler(sent, code):
    # A shell that starts the tests in the background has them ignore Ctrl-C, which is inherited.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heed, sys.executable, "-m", "ringjax", "inspect", "--topology", "v5p:16x16x16"]
    command += ["--seq-len", str(2**22)]
    command += ["--heads", "8", "--head-dim", "128", "--implementation", "xla", "--unroll", "200"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not children(process.pid):
        time.sleep(0.05)
    (child,) = children(process.pid)
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == code
    assert said == ("error: interrupted; the compiler was stopped\n" if sent == signal.SIGINT else "")
    assert not Path(f"/proc/{child}").exists()
