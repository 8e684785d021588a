"""`ringjax inspect` but for the compiler: arguments, floor of memory, counted pairs, report, picture, errors."""

import importlib.util
import inspect
import itertools
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ringjax import inspect as rooms
from ringjax.cli import app
from ringjax.inspect import command, cycles, picture, text
from ringjax.inspect import compile as compiler
from ringjax.inspect.memory import floor_bytes, floor_terms
from ringjax.inspect.order import Done, Launch, Loop, Start
from ringjax.inspect.program import Program
from ringjax.inspect.report import Report, Scaling
from ringjax.inspect.topology import parse_topology
from ringjax.inspect.work import pairs
from ringjax.layout import ring_order

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 128, "value_head_dim": 64}


def program(topology: str = "v5e:2x4", ring: int = 8, seq_len: int = 16384, **options) -> Program:
    return Program(topology, ring, seq_len, **{**SIZES, **options})


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "stripe"), [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 3)])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 5), (17, None), (None, 31), (100, 0)])
def test_pairs_are_those_of_a_mask_built_pair_by_pair(layout, stripe, window):
    for ring, is_causal in itertools.product((1, 3, 5, 8), (True, False)):
        case = program("v5e:4x4", ring, 720, layout=layout, stripe=stripe, is_causal=is_causal, window=window)
        shards = ring_order(720, case.layout_object, ring).reshape(ring, -1)
        left, right = case.bounds
        counted = pairs(case)
        for rank, (column, hop) in itertools.product(range(ring), enumerate(case.schedule().hops)):
            distance = shards[(rank + hop.offset) % ring][None, :] - shards[rank][:, None]
            attends = np.ones_like(distance, bool)
            attends &= True if left is None else distance >= -left
            attends &= True if right is None else distance <= right
            assert counted[rank, column] == attends.sum(), (ring, is_causal, rank, hop)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_no_pair_is_lost_in_a_long_sequence(layout):
    """Closed forms, so a million tokens on 1024 devices are counted exactly, elided hops or not."""
    length = 2**20
    causal = program("v5p:8x8x16", 1024, length, layout=layout, is_causal=True)
    assert pairs(causal).sum() == length * (length + 1) // 2
    window = program("v5p:8x8x16", 1024, length, layout=layout, is_causal=True, window=(999, None))
    assert pairs(window).sum() == length * 1000 - 999 * 1000 // 2


# --- floor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_heads", "blocks", "with_output"),
    [pytest.param(2, 3, False, id="a hop in the middle"), pytest.param(1, 2, True, id="the last hop")],
)
def test_floor_forward_by_hand(kv_heads, blocks, with_output):
    """L = 2048, N = 4, H = 128, Hv = 64, bfloat16: either another block arrives, or the output is written."""
    rows = 2048
    query, block, out = rows * 4 * 128 * 2, rows * kv_heads * (128 + 64) * 2, rows * 4 * 64 * 2
    softmax = rows * 4 * 64 * 4 + 2 * rows * 4 * 4
    found = floor_bytes(program(is_causal=True, kv_heads=kv_heads))
    assert found == query + blocks * block + softmax + with_output * out


def test_a_float32_output_takes_the_place_of_the_accumulator():
    rows = 2048
    query, block = rows * 4 * 128 * 4, rows * (128 + 64) * 4
    softmax = rows * 4 * 64 * 4 + 2 * rows * 4 * 4
    assert floor_bytes(program(kv_heads=1, dtype="float32")) == query + 3 * block + softmax


def test_floor_backward_by_hand():
    """A hop in the middle needs most: the gradients that are results are absent until the end."""
    rows, batch = 1024, 2
    query, keys, values, out = rows * 4 * 128 * 4, rows * 2 * 128 * 4, rows * 2 * 64 * 4, rows * 4 * 64 * 4
    held = query + 3 * (keys + values) + 2 * out  # with the receive buffers
    sums = query + 3 * (keys + values) // 2 + 2 * rows * 4 * 4  # dq float32, dk and dv in 2 bytes, lse and delta
    ids = 3 * rows * 4
    case = program(seq_len=8192, batch=2, dtype="float32", backward=True, segments=True, dkv_dtype="bfloat16")
    assert floor_bytes(case) == batch * (held + sums + ids)
    assert sum(term.bytes for term in floor_terms(case)) == floor_bytes(case)


# Peaks that compilers have reported, those in README.md and docs/performance.md among them.
_PEAKS = {
    "v5p, forward": ("v5p:2x2x2", 2**17, 16, 4, {}, 371_405_312),
    "v5p": ("v5p:2x2x2", 2**17, 16, 4, {"backward": True}, 706_967_584),
    "h100, a million tokens": ("h100:8", 2**20, 32, 8, {"backward": True}, 10.1 * 2**30),
    "v5e, xla": ("v5e:2x4", 2**14, 8, 8, {"backward": True}, 106_229_248),
    "h100, xla, forward": ("h100:8", 2**15, 8, 2, {}, 48_167_413),
    "h100, xla": ("h100:8", 2**15, 8, 2, {"backward": True}, 102_157_096),
    "h100, triton, forward": ("h100:8", 2**15, 8, 2, {}, 44_376_840),
    "h100, triton": ("h100:8", 2**15, 8, 2, {"backward": True}, 84_215_848),
}


@pytest.mark.parametrize(("topology", "seq_len", "heads", "kv_heads", "options", "peak"), _PEAKS.values(), ids=_PEAKS)
def test_no_program_needs_less_than_the_floor(topology, seq_len, heads, kv_heads, options, peak):
    case = Program(topology, 8, seq_len, heads, kv_heads, 128, 128, is_causal=True, **options)
    assert floor_bytes(case) <= peak < 1.3 * floor_bytes(case)


@pytest.mark.parametrize("backward", [False, True])
def test_floor_halves_as_the_ring_doubles(backward):
    case = program("v5p:8x8x16", 8, 2**20, is_causal=True, backward=backward)
    for ring in (16, 64, 1024):
        assert floor_bytes(case) * 8 == floor_bytes(case.with_ring(ring)) * ring


def test_a_ring_of_one_receives_nothing():
    assert [term.name for term in floor_terms(program(ring=1))] == ["query", "key, value", "output"]


def test_a_window_receives_from_both_sides():
    """Hops 0, 1 and -1 with 1024 of 2048 keys: the sums of the own block wait at home; both parts are received."""
    case = program(layout="contiguous", window=(1000, 1000), backward=True)
    assert case.schedule().strands == ((0,), (1,), (-1,))
    terms = {term.name: term.bytes for term in floor_terms(case)}
    assert terms["receive buffers (2)"] == 2 * 1024 * 2 * (128 + 64) * 2
    assert terms["dkey, dvalue sums (2), float32"] == (1024 + 2048) * 2 * (128 + 64) * 4


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "spelled"),
    [
        ("v5p:8x8x16", 1024, "v5p:8x8x16"), ("v7x:2x2x1", 8, "tpu7x:2x2x1"), ("tpu7x:2x2x2", 16, "tpu7x:2x2x2"),
        ("v5e:16x16", 256, "v5e:16x16"), ("v4:2x2x1", 4, "v4:2x2x1"), ("v6e:32x32", 1024, "v6e:32x32"),
    ],
)  # fmt: skip
def test_topologies(name, devices, spelled):
    topology = parse_topology(name)
    assert (topology.num_devices, topology.name) == (devices, spelled)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:2", "v5e:2xx2", "v5e:2x2x2x2", " v5e:2x2", "2x2"])
def test_unknown_topologies(name):
    with pytest.raises(ValueError, match="topology must be GENERATION:XxY"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e:32x32"}, "no side longer than 16 for v5e: the compiler aborts"),
        ({"topology": "v5e:3x4"}, "even sides x and y"),
        ({"ring": 9}, "ring must be at most 8, the devices of v5e:2x4"),
        ({"ring": 0}, "ring must be a positive integer"),
        ({"seq_len": 16392}, "seq_len must be a multiple of 16 for layout 'zigzag' on a ring of 8"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16"),
        ({"layout": "spiral"}, "layout must be one of"),
        ({"stripe": 4}, "stripe must be 1 unless layout is 'striped'"),
        ({"window": (1, -1)}, "local_window_size must be"),
        ({"implementation": "cuda"}, "implementation must be one of"),
        ({"block_q": 0}, "block_q must be a positive integer"),
        ({"dkv_dtype": "int8"}, "dkv_dtype must be one of"),
        ({"device_order": "random"}, "device_order must be one of ring_mesh"),
        ({"axes": (2, 3)}, r"axes must have the product 8, the devices on the ring. Got \(2, 3\), which is 6"),
        ({"axes": (8, 0)}, r"axes must be a tuple of positive integers. Got \(8, 0\)"),
        ({"strategy": "rings"}, "strategy must be one of 'ring', 'all_to_all', 'all_gather'. Got 'rings'"),
        ({"strategy": "auto"}, "strategy must be one of 'ring', 'all_to_all', 'all_gather'. Got 'auto'"),
        ({"strategy": ("ring", "ring")}, r"strategy must be one word, or one for each of the axes \(8,\)"),
        ({"strategy": "all_to_all"}, "heads must be a multiple of 8, the devices on axes of strategy 'all_to_all'"),
        ({"direction": "back"}, "direction must be one of 'forward', 'both'. Got 'back'"),
        ({"topology": "1*v5e:2x2"}, "topology must have at least 2 slices before its '\\*'"),
        ({"topology": "2*v5e:2x2"}, r"axes must begin with the 2 slices of 2\*v5e:2x2 and have all 8 devices"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(options, message):
    with pytest.raises(ValueError, match=message):
        program(**options)


def test_a_program_survives_json():
    case = program(is_causal=True, window=(100, None), layout="striped", stripe=2, block_q=128)
    assert Program.from_json(json.loads(json.dumps(case.to_json()))) == case
    case = program(axes=(2, 4), strategy=("ring", "all_to_all"), direction="both")
    assert Program.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_rings_side_by_side():
    assert program("v5p:8x8x16", 64, 2**20).side_by_side == 16
    assert program("v5p:8x8x16", 60, 60 * 2048).side_by_side == 1


# --- report ----------------------------------------------------------------------------------------------------------


def ring_order_of_8() -> tuple:
    """The order of a causal ring of 8 as inspect would read it, the last permute of dK, dV alone on the wire."""

    def start(name: str, source: int | None, dtype: str = "bf16", heads: int = 128) -> Start:
        return Start(name, dtype, (1, 2, 2048, heads), 2 * 2048 * heads * 2, True, source)

    body = (start("k", 1), start("v", 2, heads=64), Launch("forward.1"), Done("k"), Done("v"))
    home = (start("home", None, "f32", 64), Done("home"))
    return (Launch("forward.3"), Loop("while", 7, body), Launch("backward.4"), *home)


def report_of(case: Program, order: tuple, found: cycles.Cycles | None = None) -> Report:
    versions = {"jax": "0.10.2", "libtpu": "0.0.42"}
    compiled = compiler.Compiled("", 50_000_000, 10_000_000, 5_000_000, 0.5, 2.0, versions)
    return Report(case, compiled, order, pairs(case), found, (Scaling(8, 1000, None), Scaling(16, 500, 600)))


def test_figures_of_a_report():
    report = report_of(program(is_causal=True), ring_order_of_8())
    assert (report.num_permutes, report.num_hidden, report.num_synchronous) == (15, 14, 0)
    assert [(p.carries, p.times, p.hidden) for p in report.payloads] == [("K", 7, 7), ("V", 7, 7), ("dV", 1, 0)]
    assert [permute.name for permute in report.exposed] == ["home"]
    assert report.wire_bytes_per_hop == 2 * 2048 * (128 + 64) * 2
    assert report.wire_bytes == 7 * report.wire_bytes_per_hop + 2 * 2048 * 64 * 2
    assert report.kernels == {"forward.3": 1, "forward.1": 7, "backward.4": 1}
    assert (report.hops_made, report.hops_elided) == (8, 0)


def test_imbalance_of_layouts():
    """Contiguous: the last rank has (2C - 1) / C of the mean; in lockstep each hop takes as long as a full block."""
    zigzag = report_of(program(is_causal=True), ())
    assert zigzag.imbalance == pytest.approx(1.0) and zigzag.lockstep_imbalance == pytest.approx(1.0, rel=1e-3)
    contiguous = report_of(program(is_causal=True, layout="contiguous"), ())
    assert contiguous.imbalance == pytest.approx(15 / 8, rel=1e-3)
    assert contiguous.lockstep_imbalance == pytest.approx(15 / 8, rel=1e-3)
    window = report_of(program(is_causal=True, layout="contiguous", window=(2049, None)), ())
    assert (window.hops_made, window.hops_elided) == (3, 5)


def test_mxu_floor():
    """4096 queries and keys, one head of 128: 2 x 4096^2 x 128 / 65,536 = 65,536 cycles on v5e; backward 5."""
    case = Program("v5e:2x2", 1, 4096, 1, 1, 128, 128, backward=True)
    assert report_of(case, ()).mxu_floor_cycles == {"forward": 65_536, "backward": 163_840}
    assert report_of(Program("v6e:2x2", 1, 4096, 1, 1, 128, 128), ()).mxu_floor_cycles == {"forward": 32_768}
    # Both cores of a v5p chip are one device.
    assert report_of(Program("v5p:2x2x1", 1, 4096, 1, 1, 128, 128), ()).mxu_floor_cycles == {"forward": 32_768}


def test_estimates_are_matched_by_name():
    """The profiler writes one estimate for kernels that are alike."""
    found = cycles.match_estimates(
        {"fwd.1": 100, "copy.3": 7, "bwd.2": 5, "bwd.3": 6}, {"fwd.1": 1, "fwd.9": 3, "bwd": 1}
    )
    assert found.estimates == {"fwd.1": 100, "fwd.9": 100} and found.reason is None
    nothing = cycles.match_estimates({"copy": 7}, {"fwd.1": 1})
    assert nothing.estimates == {} and nothing.reason is not None


def test_json_holds_what_the_text_says():
    report = report_of(program(is_causal=True), ring_order_of_8())
    found = json.loads(json.dumps(report.to_json()))
    assert found["permutes"]["hidden"] == 14 and found["permutes"]["executed"] == 15
    assert found["memory"]["peak_bytes"] == 50_000_000
    assert found["memory"]["floor_bytes"] == sum(found["memory"]["floor"].values())
    assert found["order"][1][:2] == ["loop", 7] and found["order"][1][2][0] == ["start", "k"]
    assert np.array(found["work"]["pairs_rank_by_hop"]).sum() == 16384 * 16385 // 2 == found["work"]["pairs"]
    large = report_of(program("v5p:8x8x16", 128, 2**18), ()).to_json()
    assert large["work"]["pairs_rank_by_hop"] is None


def test_text_of_a_report():
    said = "\n".join(text.lines(report_of(program(is_causal=True), ring_order_of_8())))
    for words in ("permutes hidden 14/15, all asynchronous", "v5e:2x4, 8 devices", "no kernel runs behind home",
                  "forward 8, backward 1", "imbalance 1.000", "hops elided 0", "not asked for (--cycles)"):  # fmt: skip
        assert words in said
    sync = (Start("k", "bf16", (1,), 2, False, 1), Launch("forward"))
    said = "\n".join(text.lines(report_of(program(), sync, cycles.Cycles({"forward": 12_345}))))
    assert "permutes hidden 0/1, 1 SYNCHRONOUS" in said and "12,345" in said
    said = "\n".join(text.lines(report_of(program(ring=1), (), cycles.Cycles({}, "because"))))
    assert "no permutes: a ring of one" in said and "because" in said


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (3 * 2**40, "3072 GiB")]
)
def test_sizes(num_bytes, words):
    assert text.size(num_bytes) == words


# --- picture ---------------------------------------------------------------------------------------------------------


def test_lanes_show_every_kernel_and_permute_once():
    lanes = picture.lay_out(report_of(program(is_causal=True), ring_order_of_8()))
    assert [box.number for box in lanes.boxes] == list(range(1, 10)) and not lanes.gaps
    assert sum(bar.hidden for bar in lanes.bars) == 14 and len(lanes.bars) == 15
    for bar in lanes.bars:
        behind = [box for box in lanes.boxes if bar.start <= box.start and box.stop <= bar.stop]
        assert bool(behind) == bar.hidden and bar.stop > bar.start
    ends = sorted((box.start, box.stop) for box in lanes.boxes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends)), "kernels do not overlap"


def test_long_orders_are_abbreviated_and_say_so():
    (loop,) = [event for event in ring_order_of_8() if isinstance(event, Loop)]
    rolled = (Launch("forward"), Loop("while", 100, loop.body), Launch("backward"))
    lanes = picture.lay_out(report_of(program(is_causal=True), rolled))
    assert [box.number for box in lanes.boxes] == [1, 2, 101, 102]
    assert [count for _, count in lanes.gaps] == [98]
    unrolled = loop.body * 100
    lanes = picture.lay_out(report_of(program(is_causal=True), unrolled))
    (gap,) = lanes.gaps
    numbers = [box.number for box in lanes.boxes]
    assert numbers[:2] == [1, 2] and numbers[-1] == 100 and len(numbers) + gap[1] == 100
    assert all(bar.hidden for bar in lanes.bars)


def test_synchronous_permutes_stand_alone_on_the_wire():
    order = (Launch("a"), Start("k", "bf16", (1,), 2, False, 1), Launch("b"))
    lanes = picture.lay_out(report_of(program(), order))
    (bar,) = lanes.bars
    assert lanes.boxes[0].stop <= bar.start and bar.stop <= lanes.boxes[1].start and not bar.hidden


@pytest.mark.parametrize("case", [program(is_causal=True), program("v5p:8x8x16", 64, 2**18), program(ring=1)])
def test_the_picture_is_a_png_and_the_same_every_time(tmp_path, case):
    report = report_of(case, ring_order_of_8() if case.ring > 1 else (Launch("forward"),))
    for name in ("a.png", "b.png"):
        picture.draw(report, tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data == (tmp_path / "b.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 600 and math.isclose(width / height, 13 / 9, rel_tol=0.01)


# --- the command -----------------------------------------------------------------------------------------------------

COMMAND = ["inspect", "--topology", "v5e:2x4", "--seq-len", "16384", "--heads", "4", "--head-dim", "128"]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [*COMMAND, *(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:2x2"), "error: --topology must be GENERATION:XxY"),
        (("--ring", 9), "error: --ring must be at most 8"),
        (("--seq-len", 100), "error: --seq-len must be a multiple of 16 for layout 'zigzag' on a ring of 8. Got 100."),
        (("--kv-heads", 3), "error: --heads must be a multiple of --kv-heads, 3. Got 4."),
        (("--block-q", 0), "error: RingConfig: --block-q must be a positive integer or None. Got 0."),
        (("--stripe", 2), "error: --stripe must be 1 unless layout is 'striped'. Got 2 for 'zigzag'."),
        (("--picture", "/no/such/place/x.png"), "error: --picture must be a file in a directory that exists"),
        (("--sweep", "4,3"), "error: --seq-len must be a multiple of 6"),
        (("--sweep", "4,0"), "error: --sweep must be C1,C2,...: numbers of at least 1. Got '4,0'."),
        (("--sweep", "four"), "error: --sweep must be C1,C2,...: numbers of at least 1. Got 'four'."),
        (("--window", "1,2,3"), "error: --window must be W, or L,R: numbers of at least 0"),
        (("--window=-1",), "'none' for L or R. Got '-1'."),
        (("--window", "none"), "'none' for L or R. Got 'none'."),
        (("--axes", "2,0"), "error: --axes must be C1,C2,...: numbers of at least 1. Got '2,0'."),
        (("--axes", "2,4", "--ring", 4), "error: --axes must have the product 4, the devices on the ring."),
        (("--strategy", "ring,all_to_all"), "error: --strategy must be one word, or one for each of the axes (8,)"),
        (("--strategy", "rings"), "error: --strategy must be one of 'ring', 'all_to_all', 'all_gather'. Got"),
        (("--strategy", "all_to_all"), "error: --heads must be a multiple of 8, the devices on axes of strategy"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("given", "window"), [(None, None), ("8", 8), ("8,0", (8, 0)), ("none,4", (None, 4)), ("3, none", (3, None))]
)
def test_windows(given: str | None, window):
    assert command.parse_window(given) == window


def test_the_command_passes_everything_on(monkeypatch):
    given: dict[str, object] = {}

    def stop(topology: str, **arguments: object) -> None:
        given.update(arguments, topology=topology)
        raise ValueError("enough")

    monkeypatch.setattr(command, "inspect_ring", stop)
    flags = "--kv-heads 2 --value-head-dim 64 --batch 3 --ring 4 --dtype float16 --layout striped --stripe 2 --causal"
    flags += " --window 7,none --segments --pass backward --timeout 5 --implementation xla --block-q 16 --block-kv 32"
    flags += " --unroll 2 --dkv-dtype bfloat16 --device-order make_mesh --cycles --sweep 2,8"
    flags += " --axes 2,2 --strategy ring,all_to_all --direction both --rings 3"
    flags += " --max-segment-length 99 --shared-length 8,16 --documents equal:64"
    assert invoke(*flags.split()).stderr == "error: enough\n"
    assert given == {
        "topology": "v5e:2x4", "seq_len": 16384, "heads": 4, "head_dim": 128, "kv_heads": 2, "value_head_dim": 64,
        "batch": 3, "ring": 4, "dtype": "float16", "layout": "striped", "stripe": 2, "is_causal": True,
        "window": (7, None), "segments": True, "backward": True, "timeout": 5.0, "implementation": "xla",
        "block_q": 16, "block_kv": 32, "unroll": 2, "dkv_dtype": "bfloat16", "device_order": "make_mesh",
        "cycles": True, "sweep": (2, 8), "axes": (2, 2), "strategy": ("ring", "all_to_all"), "direction": "both",
        "rings": 3, "max_segment_length": 99, "shared_length": (8, 16), "documents": "equal:64",
    }  # fmt: skip
    assert set(given) == set(inspect.signature(rooms.inspect_ring).parameters)
    invoke()
    defaults = inspect.signature(rooms.inspect_ring).parameters
    assert {name: given[name] for name in given if name not in ("topology", "seq_len", "heads", "head_dim")} == {
        name: parameter.default for name, parameter in defaults.items() if parameter.default is not parameter.empty
    }


def test_missing_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr == 'error: libtpu, the TPU compiler, is not installed: pip install "ringjax[tpu]"\n'


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (("ValueError", "query must be x. Got y."), 2, "query must be x. Got y."),
        (("ValueError", "too many values"), 1, "could not be compiled: ValueError at ringjax/x.py:3: too many values"),
        (("NotImplementedError", "pallas_tpu cannot"), 2, "pallas_tpu cannot"),
        (
            ("JaxRuntimeError", "RESOURCE_EXHAUSTED: ...\nUsed 18.00G of 15.75G hbm. Exceeded"),
            1,
            r"too large for the memory of a device .*: it needs 18.00G of 15.75G\.",
        ),
        (
            ("JaxRuntimeError", "RESOURCE_EXHAUSTED: HLO temporaries (40.01G) exceeds available HBM (15.75G).."),
            1,
            r"too large for the memory of a device .*: it needs 40.01G of 15.75G\.",
        ),
        (
            ("JaxRuntimeError", "E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem."),
            1,
            "too large for the VMEM of a core",
        ),
        (("JaxRuntimeError", "INTERNAL: On platforms with limited ICI routing"), 2, "ring must divide the 8 devices"),
        (("JaxRuntimeError", "\nINTERNAL: Mosaic failed\nmore"), 1, "the compiler refused: INTERNAL: Mosaic failed"),
    ],
)
def test_what_the_child_reports_becomes_one_line(monkeypatch, outcome, code, message):
    def child(request: Path, result: Path, log: Path, timeout: float, libtpu_args: str) -> int:
        log.write_text("", encoding="utf-8")
        result.write_text(
            json.dumps({"error": outcome[0], "message": outcome[1], "where": "ringjax/x.py:3"}), encoding="utf-8"
        )
        return 0

    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    monkeypatch.setattr(compiler, "_run_child", child)
    with pytest.raises(rooms.InspectError, match=message) as caught:
        compiler.compile_ring(program())
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_an_abort_is_told_with_its_last_words(monkeypatch):
    def child(request: Path, result: Path, log: Path, timeout: float, libtpu_args: str) -> int:
        said = "WARNING: Logging before InitGoogle()\nF0000 topology.cc] Check failed: x\n*** SIGABRT ***\n@ 0x1 f()\n"
        log.write_text(said, encoding="utf-8")
        return -6

    monkeypatch.setattr(compiler, "check_libtpu", lambda: None)
    monkeypatch.setattr(compiler, "_run_child", child)
    with pytest.raises(rooms.InspectError) as caught:
        compiler.compile_ring(program())
    expected = (
        "the compiler ended with signal SIGABRT and no result. Its last words: F0000 topology.cc] Check failed: x"
    )
    assert str(caught.value) == expected
