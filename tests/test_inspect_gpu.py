"""`ringjax inspect` for GPUs: names, what XLA is told of them, recorded programs, and the real compiler where it is.

tests/record_gpu_order.py made what is in tests/data/, with the compiler that is too large for every machine.
"""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from record_gpu_order import DATA, RECORDINGS, cut
from typer.testing import CliRunner

from ringjax.cli import app
from ringjax.inspect import InspectError, Report, inspect_ring, picture, text, wire
from ringjax.inspect import compile as compiler
from ringjax.inspect.gpus import GPUS, Hosts, target_config
from ringjax.inspect.hlo import parse
from ringjax.inspect.order import Done, Event, Launch, Loop, Start, kernels, permutes, read_order
from ringjax.inspect.topology import parse_topology
from ringjax.inspect.work import pairs


def has_cuda() -> bool:
    try:
        compiler.check_cuda()
    except InspectError:
        return False
    return True


needs_cuda = pytest.mark.skipif(not has_cuda(), reason='no CUDA plugin: pip install "ringjax[cuda]"; needs no GPU')
needs_groups = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 cannot say what is one operation of XLA"
)
SIZES = {"heads": 8, "kv_heads": 2, "head_dim": 128, "is_causal": True}
AWAITED = 'backend_config={"collective_backend_config":{"is_sync":IS_SYNC}}'


def recorded(name: str, **compiled) -> Report:
    """The report of a recorded program."""
    program = RECORDINGS[name]
    order = read_order((DATA / f"{name}.hlo.txt").read_text(encoding="utf-8"))
    sizes = {"peak_bytes": 2**30, "argument_bytes": 2**20, "output_bytes": 2**20, **compiled}
    said = compiler.Compiled("", lower_seconds=0.5, compile_seconds=2.0, versions={}, **sizes)
    return Report(program, said, order, pairs(program), None, ())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "spelled", "shape"),
    [
        ("h100:8", 8, "h100:8", "1x1x8"), ("h200:1", 1, "h200:1", "1x1x1"), ("h100:4x8", 32, "h100:4x8", "1x4x8"),
        ("b200:1x8", 8, "b200:8", "1x1x8"), ("a100:2x4", 8, "a100:2x4", "1x2x4"),
    ],
)  # fmt: skip
def test_hosts_of_gpus(name, devices, spelled, shape):
    topology = parse_topology(name)
    assert isinstance(topology, Hosts) and topology.platform == "gpu" and topology.num_devices == devices
    assert (topology.name, topology.shape) == (spelled, shape)
    assert 79 * 2**30 < topology.memory_bytes < 192 * 2**30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:9", "1 to 8 GPUs a host"), ("h100:0", "1 to 8 GPUs a host"), ("h100:0x8", "1 to 8 GPUs a host"),
        ("h100", "GPU:N or GPU:HOSTSxN for GPUs, GPU one of a100, h100, h200, b200"), ("h100:8x", "GPU:N or"),
        ("h100:2x2x2", "GPU:N or"), ("h100: 8", "GPU:N or"), ("v100:8", "GENERATION:XxY .* or GPU:N, GPU one of a100"),
        (8, "GENERATION:XxY"),
    ],
)  # fmt: skip
def test_unknown_hosts(name, message):
    with pytest.raises(ValueError, match=f"topology must (be|have) {message}"):
        parse_topology(name)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_what_xla_is_told_of_a_gpu(gpu):
    said = target_config(gpu)
    assert said.count("{") == said.count("}") and f'device_description_str: "{gpu.kind}"' in said
    assert f"major: {gpu.capability[0]} " in said and f"core_count: {gpu.multiprocessors}\n" in said
    assert ("ACCELERATED_FEATURES" in said) == (gpu.name != "a100"), "wgmma and tcgen05 are not in the common set"


# --- what TPUs have and GPUs have not --------------------------------------------------------------------------------


def test_an_order_of_devices_and_cycles_are_refused():
    with pytest.raises(ValueError, match="device_order must be 'ring_mesh' for GPUs, .* Got 'make_mesh'"):
        inspect_ring("h100:8", seq_len=16384, device_order="make_mesh", **SIZES)
    with pytest.raises(ValueError, match="cycles must be False for h100:8: static estimates are of TPUs. Got True"):
        inspect_ring("h100:8", seq_len=16384, cycles=True, **SIZES)


def test_no_floor_of_matrix_units():
    report = recorded("h100_mosaic")
    assert report.mxu_floor_cycles == {} and report.to_json()["cycles"]["mxu_floor"] == {}
    last = list(text.lines(report))[-1]
    assert last.startswith("cycles  none: ")


def test_a_missing_plugin_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["inspect", "--topology", "h100:8", "--seq-len", "16384", "--heads", "8", "--head-dim", "128"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        'error: the CUDA plugin of JAX, the GPU compiler, is not installed: pip install "ringjax[cuda]"\n'
    )
    result = CliRunner().invoke(app, [*command[:2], "h100:9", *command[3:]])
    assert result.exit_code == 2 and result.stderr.startswith("error: --topology must have 1 to 8 GPUs a host")


@pytest.mark.parametrize("version", ["12", "13"])
def test_either_plugin_will_do(monkeypatch, version):
    def find(name: str) -> object:
        if name != f"jax_plugins.xla_cuda{version}":
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    compiler.check_cuda()


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"peak_bytes": 90 * 2**30}, r"too large for the memory of a device .*: it needs 90G of 79.11G\."),
        (
            {
                "error": "JaxRuntimeError",
                "message": "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 9",
            },
            r"too large for the shared memory of a multiprocessor \(smaller tiles .*requested 9\.",
        ),
    ],
)
def test_too_large(monkeypatch, outcome, message):
    """This compiler does not mind a program that no device could hold."""

    def child(request: Path, result: Path, log: Path, timeout: float, libtpu_args: str) -> int:
        log.write_text("", encoding="utf-8")
        said = {"text": "", "argument_bytes": 1, "output_bytes": 1, "lower_seconds": 1.0, "compile_seconds": 1.0}
        said = outcome if "error" in outcome else {**said, "versions": {}, **outcome}
        result.write_text(json.dumps(said), encoding="utf-8")
        return 0

    monkeypatch.setattr(compiler, "check_cuda", lambda: None)
    monkeypatch.setattr(compiler, "_run_child", child)
    with pytest.raises(InspectError, match=message):
        compiler.compile_ring(RECORDINGS["h100_mosaic"])


# --- recorded programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_small_and_cut_no_further(name):
    said = (DATA / f"{name}.hlo.txt").read_text(encoding="utf-8")
    assert len(said) < 40_000 and "python tests/record_gpu_order.py" in said
    assert read_order(cut(said)) == read_order(said)


@pytest.mark.parametrize("name", [name for name in RECORDINGS if name.startswith("h100")])
def test_every_permute_spans_a_kernel_forward_and_backward(name):
    """C = 8, causal zigzag, grouped heads: all but those that bring dK and dV home, after which nothing runs."""
    report = recorded(name)
    schedule = report.program.schedule()
    assert report.num_synchronous == 0
    times = {(p.carries, p.dtype): (p.times, p.asynchronous, p.hidden) for p in report.payloads}
    block = [("K", "bf16"), ("V", "bf16"), *([("segments", "s32")] if report.program.segments else [])]
    sums = {("dK, dV", "f32"): (14, 14, 14), ("dK, dV", "bf16"): (2, 2, 0)}  # from hop to hop, and home
    assert times == {**dict.fromkeys(block, (14, 14, 14)), **sums}
    # All that a hop sends is one operation. Sums of dK and dV start a hop later than blocks, and go one hop further.
    assert report.num_operations == 2 * schedule.num_rotations + 2
    assert sum(permute.times for permute in report.permutes if permute.source == 1 and permute.backward) == 7
    assert all(permute.backward for permute in report.permutes if permute.source is None), "dK, dV"
    home = report.exposed
    assert len({permute.name for permute in home}) == 1 and list(report.permutes[-2:]) == list(home)
    assert report.hops_made == 8
    a_pass = 2 if report.program.implementation == "pallas_triton" else 1  # dK and dV, and dQ
    assert sum(times for kernel, times in report.kernels.items() if "forward" in kernel) == 8
    assert sum(report.kernels.values()) == 8 * (1 + a_pass)
    assert all(kernel.startswith("ringjax_") for kernel in report.kernels), "named as on TPUs"


def test_what_travels_together_is_said():
    said = "\n".join(text.lines(recorded("h100_million")))
    assert "permutes hidden 42/44, all asynchronous, sent in 16 operations" in said
    (home,) = {permute.name for permute in recorded("h100_million").exposed}
    assert f"no kernel runs behind {home} (1 x 512 MiB)" in said, "dK and dV together"
    said = "\n".join(text.lines(recorded("h100_documents")))
    assert "permute: K, V, segments, dK, dV | ringjax_backward_keys | await 1" in said.replace("\n          ", " ")


def test_synchronous_operations_of_several_arrays():
    """On an A100 the compiler awaits what it sends: what each part carries is read all the same."""
    report = recorded("a100_triton")
    assert report.num_synchronous == report.num_permutes == 44 and report.num_hidden == 0
    carried = {p.carries: (p.times, p.bytes) for p in report.payloads if p.carries in ("K", "V")}
    assert carried == {"K": (14, 2 * 2**20), "V": (14, 2 * 2**20)}


def test_flags_of_the_environment_are_said():
    flags = "--xla_gpu_enable_latency_hiding_scheduler=false"
    report = recorded("h100_mosaic", flags=flags)
    assert f"XLA_FLAGS {flags}" in "\n".join(text.lines(report))
    assert report.to_json()["compiler"]["xla_flags"] == flags


def test_the_picture_has_a_bar_for_each_array(tmp_path):
    report = recorded("h100_mosaic")
    lanes = picture.lay_out(report)
    assert len(lanes.bars) == 44 and sum(bar.hidden for bar in lanes.bars) == 42
    picture.draw(report, tmp_path / "ring.png")


def test_json():
    found = json.loads(json.dumps(recorded("h100_million").to_json()))
    assert found["topology"]["platform"] == "gpu" and found["topology"]["hbm_bytes"] == GPUS["h100"].memory_bytes
    assert found["permutes"]["operations"] == 16 and found["permutes"]["executed"] == 44
    assert found["compiler"]["xla_flags"] == ""


# --- the parser ------------------------------------------------------------------------------------------------------

PAIR = "(bf16[2,4]{1,0}, s32[2]{0})"
PROGRAM = f"""HloModule ring, is_scheduled=true

ENTRY %main (q: bf16[2,4], k: bf16[2,4], s: s32[2]) -> {PAIR} {{
  %q = bf16[2,4]{{1,0}} parameter(0)
  %k = bf16[2,4]{{1,0}} parameter(1)
  %s = s32[2]{{0}} parameter(2)
  %go.1 = ({PAIR}, {PAIR}) collective-permute-start(%k, /*index=1*/%s), {AWAITED}
  %mpmd_map.7 = bf16[2,4]{{1,0}} custom-call(%q, %k), custom_call_target="TARGET", metadata={{op_name="jit(f)/ringjax_forward/x"}}, backend_config={{module = "calls=%nothing"}}
  %here.1 = {PAIR} collective-permute-done(%go.1)
  %k.1 = bf16[2,4]{{1,0}} get-tuple-element(%here.1), index=0
  %s.1 = s32[2]{{0}} get-tuple-element(%here.1), index=1
  ROOT %again = {PAIR} collective-permute(%k.1, %s.1), source_target_pairs={{{{0,1}},{{1,0}}}}
}}
"""  # noqa: E501


@pytest.mark.parametrize("target", ["mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "tpu_custom_call"])
def test_operations_of_several_arrays(target):
    order = read_order(PROGRAM.replace("TARGET", target).replace("IS_SYNC", "false"))
    assert order == (
        Start("go.1", "bf16", (2, 4), 16, True, 1),
        Start("go.1", "s32", (2,), 8, True, 2),
        Launch("ringjax_forward.7"),
        Done("go.1"),
        Start("again", "bf16", (2, 4), 16, False, 1),
        Start("again", "s32", (2,), 8, False, 2),
    )
    assert [permute.hidden for permute in permutes(order)] == [True, True, False, False]


def test_a_start_may_be_awaited_at_once():
    order = read_order(PROGRAM.replace("TARGET", "mosaic_gpu_v2").replace("IS_SYNC", "true"))
    assert not any(isinstance(event, Done) for event in order)
    assert [permute.asynchronous for permute in permutes(order)] == [False] * 4


def test_other_custom_calls_are_no_kernels():
    order = read_order(PROGRAM.replace("TARGET", "xla.gpu.ext.memcpy").replace("IS_SYNC", "false"))
    assert kernels(order) == {}


PAIRS = "source_target_pairs={{0,1},{1,0}}"
# K, V and the segments of keys, in one group. Inside, the lines stand in any order, and two arrays share a permute.
GROUP = f"""HloModule ring, is_scheduled=true

%sent (v.1: bf16[2,4], s.1: s32[2], k.1: bf16[2,4]) -> (bf16[2,4], s32[2], bf16[2,4]) {{
  %k.1 = bf16[2,4]{{1,0}} parameter(2)
  %s.1 = s32[2]{{0}} parameter(1)
  %v.1 = bf16[2,4]{{1,0}} parameter(0)
  %both = (bf16[2,4]{{1,0}}, s32[2]{{0}}) collective-permute(%k.1, %s.1), {PAIRS}, {AWAITED.replace("IS_SYNC", "true")}
  %s.2 = s32[2]{{0}} get-tuple-element(%both), index=1
  %k.2 = bf16[2,4]{{1,0}} get-tuple-element(%both), index=0
  %v.2 = bf16[2,4]{{1,0}} collective-permute(%v.1), {PAIRS}, {AWAITED.replace("IS_SYNC", "true")}
  ROOT %all = (bf16[2,4]{{1,0}}, s32[2]{{0}}, bf16[2,4]{{1,0}}) tuple(RESULTS)
}}

ENTRY %main (q: bf16[2,4], k: bf16[2,4], v: bf16[2,4], s: s32[2]) -> (bf16[2,4], bf16[2,4]) {{
  %q = bf16[2,4]{{1,0}} parameter(0)
  %k = bf16[2,4]{{1,0}} parameter(1)
  %v = bf16[2,4]{{1,0}} parameter(2)
  %s = s32[2]{{0}} parameter(3)
LINES
  %v.3 = bf16[2,4]{{1,0}} get-tuple-element(%here.1), index=0
  %k.3 = bf16[2,4]{{1,0}} get-tuple-element(%here.1), index=2
  %v.4 = bf16[2,4]{{1,0}} collective-permute(%v.3), {PAIRS}
  %k.4 = bf16[2,4]{{1,0}} collective-permute(%k.3), {PAIRS}
  ROOT %out = (bf16[2,4]{{1,0}}, bf16[2,4]{{1,0}}) tuple(%k.4, %v.4)
}}
"""
_TUPLE = "(bf16[2,4]{1,0}, s32[2]{0}, bf16[2,4]{1,0})"
GO = (
    f"  %go.1 = ({_TUPLE}, {_TUPLE}) async-start(%v, %s, %k), calls=%sent, "
    'metadata={op_name="jit(f)/transpose(jvp(f))/xla_metadata_call"}'
)
RUN = '  %run.1 = bf16[2,4]{1,0} custom-call(%q, %k), custom_call_target="mosaic_gpu_v2"'
AWAIT = f"  %here.1 = {_TUPLE} async-done(%go.1)"


def group(*lines: str, results: str = "%v.2, %s.2, %k.2") -> tuple[Event, ...]:
    """The order of the program with the group and these lines, on a ring of two."""
    return read_order(GROUP.replace("LINES", "\n".join(lines)).replace("RESULTS", results), wire.Devices((1, 2)))


def test_a_group_is_as_many_collectives_as_it_has_arrays():
    sent = {"kind": "permute", "axis": 0, "shift": 1}
    first = {"name": "go.1", "asynchronous": True, "backward": True, **sent}
    then = {"asynchronous": False, **sent}
    assert group(GO, RUN, AWAIT) == (
        Start(dtype="bf16", shape=(2, 4), bytes=16, source=1, **first),
        Start(dtype="s32", shape=(2,), bytes=8, source=3, **first),
        Start(dtype="bf16", shape=(2, 4), bytes=16, source=2, **first),
        Launch("run.1"),
        Done("go.1"),
        # What arrived is what was sent, and travels on.
        Start(name="v.4", dtype="bf16", shape=(2, 4), bytes=16, source=2, **then),
        Start(name="k.4", dtype="bf16", shape=(2, 4), bytes=16, source=1, **then),
    )


@pytest.mark.parametrize(
    ("lines", "hidden"),
    [((GO, RUN, AWAIT), True), ((GO, AWAIT, RUN), False), ((RUN, GO, AWAIT), False)],
    ids=["between", "after", "before"],
)
def test_a_group_is_hidden_or_not_together(lines, hidden):
    sent = [one for one in permutes(group(*lines)) if one.name == "go.1"]
    assert [one.hidden for one in sent] == [hidden] * 3 and all(one.asynchronous for one in sent)


def test_what_arrives_is_read_from_the_group_itself():
    """A group that gives its results in another order than it takes its operands."""
    on = group(GO, RUN, AWAIT, results="%k.2, %s.2, %v.2")[-2:]
    assert [one.source for one in on if isinstance(one, Start)] == [1, 2], "%v.3 is K, %k.3 is V"


# --- the compiler ----------------------------------------------------------------------------------------------------


@needs_cuda
@needs_groups
@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [2**15, 2**20], ids=["short", "million"])
@pytest.mark.parametrize("topology", ["h100:8", "h200:8"])
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_triton", "xla"])
def test_the_ring_of_8_gpus(topology, implementation, seq_len):
    """As the TPU ring in tests/test_tpu_ring.py: forward and backward in one program."""
    sizes = {**SIZES, "heads": 32, "kv_heads": 8}
    report = inspect_ring(topology, seq_len=seq_len, backward=True, implementation=implementation, **sizes)
    assert (report.num_hidden, report.num_permutes, report.num_synchronous) == (42, 44, 0)
    assert sum(permute.times for permute in report.exposed) == 2
    assert all(permute.source is None and permute.dtype == "bf16" for permute in report.exposed), "dK and dV"
    # XLA's kernel writes logits to memory on GPUs: of a tile, up to 2^20 a head, some times over.
    logits = 4 * sizes["heads"] * 2**20 if implementation == "xla" else 0
    peak, floor = report.compiled.peak_bytes, report.floor_bytes
    assert floor <= peak < 1.3 * floor + 3 * logits
    assert sum(isinstance(event, Loop) for event in report.order) == 2
    json.dumps(report.to_json())


@needs_cuda
@needs_groups
@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [2**15, 2**20], ids=["short", "million"])
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_triton", "xla"])
def test_forward_alone(implementation, seq_len):
    sizes = {**SIZES, "heads": 32, "kv_heads": 8}
    report = inspect_ring("h100:8", seq_len=seq_len, implementation=implementation, **sizes)
    assert (report.num_hidden, report.num_permutes, report.num_synchronous) == (14, 14, 0)


@needs_cuda
@needs_groups
@pytest.mark.slow
def test_recordings_are_what_the_compiler_makes():
    """Of the installed version: the order, not the names."""
    said = compiler.compile_ring(RECORDINGS["h100_triton"]).text
    assert parse(cut(said)).entry.ops
    order, old = read_order(said), recorded("h100_triton").order
    assert read_order(cut(said)) == order
    assert [type(event) for event in order] == [type(event) for event in old]


@needs_cuda
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "a100:8", "implementation": "pallas_gpu"}, "'pallas_triton' or 'xla' on 'NVIDIA A100"),
        ({"implementation": "pallas_triton", "block_q": 1024, "block_kv": 1024}, "shared memory of a multiprocessor"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(options, message):
    with pytest.raises(InspectError, match=message) as caught:
        inspect_ring(**{"topology": "h100:8", "seq_len": 2**15, **SIZES, **options})
    assert "\n" not in str(caught.value)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "ring", "rings"), [("h100:2x8", 16, 1), ("b200:8", 4, 2), ("h200:8", 6, 1), ("a100:1", 1, 1)]
)
def test_hosts_rings_side_by_side_and_parts(topology, ring, rings):
    report = inspect_ring(topology, ring=ring, seq_len=1024 * ring, implementation="pallas_triton", **SIZES)
    assert (report.program.ring, report.program.side_by_side) == (ring, rings)
    assert report.num_permutes == 2 * (ring - 1) and sum(report.kernels.values()) == ring
