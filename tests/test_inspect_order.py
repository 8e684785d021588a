"""What inspect reads from a scheduled program: loops, trip counts, which permute hides behind which kernel."""

import pytest

from ringjax.inspect import wire
from ringjax.inspect.hlo import HloError, Scope, num_bytes, parse, trip_count
from ringjax.inspect.order import Done, Launch, Loop, Start, collectives, kernels, num_kernels, permutes, read_order
from ringjax.torus import disjoint_rings

BLOCK = "bf16[1,2,64,128]{3,2,1,0:T(8,128)(2,1)}"
PAIR = f"({BLOCK}, {BLOCK}, u32[]{{:S(2)}}, u32[]{{:S(2)}})"
KERNEL = 'custom-call({}), custom_call_target="tpu_custom_call", metadata={{op_name="a (b) c"}}'


def program(body: str, *, entry: str = "", bound: int = 4, step: int = 1, head: str = "is_scheduled=true") -> str:
    """A ring in a loop: state is (counter, k), the body computes %next from %k."""
    state = f"(s32[]{{:T(128)}}, {BLOCK})"
    return f"""HloModule jit_f, {head}, entry_computation_layout={{()->()}}

%body (arg: (s32[], bf16[1,2,64,128])) -> (s32[], bf16[1,2,64,128]) {{
  %arg = {state} parameter(0)
  %one = s32[]{{:T(128)}} constant({step})
  %count = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %k = {BLOCK} get-tuple-element(%arg), index=1
  %more = s32[]{{:T(128)}} add(%count, %one)
{body}
  ROOT %out = {state} tuple(%more, /*index=1*/%next)
}}

%condition (arg.1: (s32[], bf16[1,2,64,128])) -> pred[] {{
  %arg.1 = {state} parameter(0)
  %bound = s32[]{{:T(128)}} constant({bound})
  %count.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%count.1, %bound), direction=LT
}}

ENTRY %main (q: bf16[1,2,64,128], key: bf16[1,2,64,128]) -> bf16[1,2,64,128] {{
  %q = {BLOCK} parameter(0)
  %key = {BLOCK} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  %copied = s32[]{{:T(128)}} copy(%zero)
{entry}
  %init = {state} tuple(%copied, %key)
  %loop = {state} while(%init), condition=%condition, body=%body
  ROOT %result = {BLOCK} get-tuple-element(%loop), index=1
}}
"""


START = f"  %go = {PAIR} collective-permute-start(%k), channel_id=1, source_target_pairs={{{{0,1}},{{1,0}}}}"
DONE = f"  %next = {BLOCK} collective-permute-done(%go)"
RUN = f"  %attend = {BLOCK} {KERNEL.format('%k')}"


def lines(*parts: str) -> str:
    return "\n".join(parts)


def test_a_permute_around_a_kernel_is_hidden_as_often_as_the_loop_runs():
    order = read_order(program(lines(START, RUN, DONE)))
    (loop,) = order
    assert isinstance(loop, Loop) and loop.times == 4
    assert loop.body == (Start("go", "bf16", (1, 2, 64, 128), 32768, True, 1), Launch("attend"), Done("go"))
    (permute,) = permutes(order)
    assert permute.hidden and (permute.times, permute.kernels_between, permute.bytes) == (4, 1, 32768)
    assert permute.source == 1, "through the loop and the tuple, what travels is the program's second argument"
    assert kernels(order) == {"attend": 4} and num_kernels(order) == 4


@pytest.mark.parametrize("body", [(RUN, START, DONE), (START, DONE, RUN)])
def test_a_kernel_before_or_after_hides_nothing(body):
    (permute,) = permutes(read_order(program(lines(*body))))
    assert permute.asynchronous and not permute.hidden and permute.kernels_between == 0


def test_a_synchronous_permute_is_never_hidden():
    body = lines(f"  %next = {BLOCK} collective-permute(%k), source_target_pairs={{{{0,1}},{{1,0}}}}", RUN)
    (permute,) = permutes(read_order(program(body)))
    assert not permute.asynchronous and not permute.hidden
    assert (permute.bytes, permute.times) == (32768, 4)


def test_kernels_of_a_loop_count_for_a_permute_around_it():
    text = program(lines(START, RUN, DONE), entry=START.replace("%k)", "%q)").replace("%go", "%far"))
    text = text.replace("  ROOT %result", f"  %landed = {BLOCK} collective-permute-done(%far)\n  ROOT %result")
    far, near = permutes(read_order(text))
    assert (far.name, far.times, far.kernels_between, far.source) == ("far", 1, 4, 0)
    assert (near.name, near.times, near.kernels_between, near.source) == ("go", 4, 1, 1)


def test_without_pallas_a_loop_of_products_is_the_kernel():
    state = f"({BLOCK}, {BLOCK})"
    inner = f"""
%inner (x: {BLOCK}) -> {BLOCK} {{
  %x = {BLOCK} parameter(0)
  ROOT %product = {BLOCK} OPCODE(%x, %x), dim_labels=bf_io->bf
}}

%forever (y: {BLOCK}) -> pred[] {{
  %y = {BLOCK} parameter(0)
  ROOT %yes = pred[]{{:T(512)}} constant(true)
}}

ENTRY"""
    run = f"  %rows = {state} while(%k), condition=%forever, body=%inner"
    text = program(lines(START, run, DONE)).replace("\nENTRY", inner)
    (permute,) = permutes(read_order(text.replace("OPCODE", "convolution")))
    assert permute.hidden and permute.kernels_between == 1
    (permute,) = permutes(read_order(text.replace("OPCODE", "add")))
    assert not permute.hidden, "a loop that only adds is no kernel"


@pytest.mark.parametrize(("bound", "step", "times"), [(4, 1, 4), (31, 2, 16), (1, 5, 1), (0, 1, 0)])
def test_trip_counts(bound, step, times):
    module = parse(program(lines(START, DONE), bound=bound, step=step))
    assert trip_count(module, module.entry.by_name["loop"], Scope(module, module.entry)) == times


def test_trip_counts_that_depend_on_data_are_not_guessed():
    text = program(lines(START, DONE)).replace("constant(0)", "custom-call()")
    module = parse(text)
    assert trip_count(module, module.entry.by_name["loop"], Scope(module, module.entry)) is None
    with pytest.raises(HloError, match="how often it runs cannot be read"):
        read_order(text)
    standing = program(lines(START, DONE), step=0)
    with pytest.raises(HloError, match="how often it runs cannot be read"):
        read_order(standing)


def test_trip_count_through_fusions_and_arguments():
    """The counter may be stepped in a fusion, and the bound may come in through the loop's state."""
    fused = """
%step (a: s32[]) -> s32[] {
  %a = s32[]{:T(128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  ROOT %sum = s32[]{:T(128)} add(%a, %two)
}

ENTRY"""
    text = program(lines(START, DONE), bound=9).replace("\nENTRY", fused)
    text = text.replace("add(%count, %one)", "fusion(%count), kind=kLoop, calls=%step")
    module = parse(text)
    assert trip_count(module, module.entry.by_name["loop"], Scope(module, module.entry)) == 5


def test_what_was_computed_has_no_source():
    (permute,) = permutes(read_order(program(lines(RUN, START.replace("%k)", "%attend)"), DONE))))
    assert permute.source is None


def test_unscheduled_text_is_refused():
    with pytest.raises(HloError, match="is_scheduled"):
        read_order(program(lines(START, DONE), head="x"))
    with pytest.raises(HloError, match="ENTRY"):
        parse("HloModule m, is_scheduled=true\n")


def test_bytes_of_types():
    assert num_bytes("bf16", (2, 3)) == 12 and num_bytes("f32", ()) == 4 and num_bytes("s32", (8,)) == 32
    assert num_bytes("pred", (4,)) == 4 and num_bytes("f8e4m3fn", (4,)) == 4


# --- other collectives, axes and slices ------------------------------------------------------------------------------

DEVICES = wire.Devices((1, 2, 4))  # one ring, axes of 2 and of 4


@pytest.mark.parametrize(
    ("pairs", "axis", "shift"),
    [
        ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", 1, 1),
        ("{{0,3},{1,0},{2,1},{3,2},{4,7},{5,4},{6,5},{7,6}}", 1, -1),
        ("{{0,2},{1,3},{2,0},{3,1}}", 1, 2),
        ("{{0,4},{4,0},{1,5},{5,1}}", 0, 1),
        ("{{0,5},{5,0}}", None, None),
        ("{{0,1},{1,3}}", None, None),
    ],
)
def test_where_a_permute_goes(pairs, axis, shift):
    assert wire.route(f", source_target_pairs={pairs}, x={{1}}", DEVICES) == (axis, shift, None)
    assert wire.route(f", source_target_pairs={pairs}", None) == (None, None, None)


def test_on_which_of_several_rings_a_permute_goes():
    rings = disjoint_rings((4, 4))
    devices = wire.Devices((1, 16), rings)
    for number, ring in enumerate(rings):
        for shift in (1, -1):
            pairs = sorted((ring[n], ring[(n + shift) % 16]) for n in range(16))
            text = ",".join(f"{{{a},{b}}}" for a, b in pairs)
            assert wire.route(f", source_target_pairs={{{text}}}", devices) == (0, shift, number)


@pytest.mark.parametrize(
    ("groups", "devices", "axis"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 0),
        ("[2,4]<=[8]", 4, 1),
        ("[4,2]<=[2,4]T(1,0)", 2, 0),
        ("[1,8]<=[8]", 8, None),
        ("mesh['dp'=1,'sp0'=2,'sp1'=4] {'sp1'}", 4, 1),
        ("mesh['dp'=1,'sp0'=2,'sp1'=4] {'sp0'}", 2, 0),
        ("mesh['dp'=1,'sp0'=2,'sp1'=4] {'sp0','sp1'}", 8, None),
        ("mesh['x'=8] {'x':(2)4}", 4, 1),
        ("mesh['x'=8] {'x':(1)2}", 2, 0),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4, 1),
        ("mesh['x'=2,'y'=4], device_ids=(0,1,2,3,4,5,6,7) {'y'}", 4, 1),
    ],
)
def test_who_takes_part_in_a_collective(groups, devices, axis):
    assert wire.group(f", replica_groups={groups}, dimensions={{0}}", DEVICES) == (devices, axis)
    assert wire.group(f", replica_groups={groups}", None) == (devices, None)
    with pytest.raises(HloError, match="which devices take part"):
        wire.group("replica_groups={}", DEVICES)


GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}"


def test_asynchronous_collectives_hide_behind_kernels_as_permutes_do():
    gather = f"  %go = ({BLOCK}, {BLOCK}) all-gather-start(%k), {GROUPS}"
    done = f"  %next = {BLOCK} all-gather-done(%go)"
    (one,) = collectives(read_order(program(lines(gather, RUN, done)), DEVICES))
    assert (one.kind, one.axis, one.bytes, one.times) == ("all_gather", 1, 3 * 32768, 4)
    assert one.hidden and one.source == 1 and not list(permutes(read_order(program(lines(gather, RUN, done)), DEVICES)))
    called = f"""
%scatter (x: {BLOCK}) -> {BLOCK} {{
  %x = {BLOCK} parameter(0)
  ROOT %sum = {BLOCK} reduce-scatter(%x), {GROUPS}
}}

ENTRY"""
    start = f"  %go = (({BLOCK}), {BLOCK}) async-start(%k), calls=%scatter"
    done = f"  %next = {BLOCK} async-done(%go)"
    text = program(lines(start, RUN, done)).replace("\nENTRY", called)
    (one,) = collectives(read_order(text, DEVICES))
    assert (one.name, one.kind, one.bytes, one.hidden) == ("go", "reduce_scatter", 3 * 32768 // 4, True)
    # TPUs have one operation for a sum of which each device keeps a part.
    fused = called.replace("%scatter", "%all-reduce-scatter.2").replace("reduce-scatter(%x)", "all-reduce(%x)")
    text = program(lines(f"  %next = {BLOCK} fusion(%k), kind=kCustom, calls=%all-reduce-scatter.2", RUN))
    (one,) = collectives(read_order(text.replace("\nENTRY", fused), DEVICES))
    assert (one.kind, one.bytes, one.asynchronous, one.hidden) == ("reduce_scatter", 3 * 32768 // 4, False, False)


def test_a_message_to_another_slice_is_a_permute():
    meeting = '_xla_host_transfer_rendezvous="a",_xla_megascale_target={{100000->200000},{200000->100000}}'
    send = f"  %send = ({BLOCK}, u32[], token[]) send(%k, %t), is_host_transfer=true, frontend_attributes={{{meeting}}}"
    recv = f"  %recv = ({BLOCK}, u32[], token[]) recv(%t), is_host_transfer=true, frontend_attributes={{{meeting}}}"
    token = "  %t = token[] after-all()"
    done = f"  %done = ({BLOCK}, token[]) recv-done(%recv)\n  %next = {BLOCK} get-tuple-element(%done), index=0"
    (one,) = permutes(read_order(program(lines(token, send, recv, RUN, done)), DEVICES))
    assert (one.name, one.axis, one.shift, one.bytes, one.source) == ("recv", 0, 1, 32768, 1)
    assert one.hidden and one.times == 4


def test_what_was_put_into_another_order_is_still_the_argument():
    """Shards are merged by slices of it; a sum with something else is not it."""
    part = BLOCK.replace("64", "32")
    cut = [f"  %cut.{n} = {part} slice(%key), slice={{[{n}:{n + 1}]}}" for n in (0, 1)]
    joined = lines(*cut, f"  %joined = {BLOCK} concatenate(%cut.0, %cut.1), dimensions={{2}}")
    body = lines(START, DONE)
    text = program(body, entry=joined).replace("tuple(%copied, %key)", "tuple(%copied, %joined)")
    (one,) = permutes(read_order(text))
    assert one.source == 1
    (one,) = permutes(read_order(text.replace("slice(%key), slice={[1", "slice(%q), slice={[1")))
    assert one.source is None
