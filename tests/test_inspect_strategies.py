"""`ringjax inspect` of strategies, but for the compiler: floor of memory, pairs, links, report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inspect import program, report_of

import ringjax
from ringjax import local
from ringjax.inspect import text
from ringjax.inspect.memory import floor_bytes, floor_terms
from ringjax.inspect.order import Done, Launch, Loop, Start
from ringjax.inspect.work import pairs
from ringjax.layout import ring_order

# --- arguments and work ----------------------------------------------------------------------------------------------

SHARINGS = [
    {"strategy": "all_gather"},
    {"axes": (2, 4), "strategy": ("ring", "all_to_all"), "direction": "both"},
    {"axes": (4, 2), "strategy": ("all_gather", "ring"), "layout": "contiguous", "window": (900, 0)},
    {"axes": (2, 4), "strategy": ("ring", "all_gather"), "layout": "striped", "stripe": 8, "window": (90, 9)},
    {"axes": (2, 2, 2), "strategy": ("all_to_all", "ring", "all_gather"), "is_causal": True},
    {"axes": (1, 8), "strategy": ("all_gather", "ring"), "direction": "both"},
]


@pytest.mark.parametrize("options", SHARINGS)
def test_the_program_shares_the_sequence_as_the_call_does(monkeypatch, options):
    """What ring_attention traces, seen at the place where it deals out the work."""
    case = program(**options, implementation="xla")
    names = tuple(f"sp{n}" for n in range(len(case.axes)))
    seen = []
    monkeypatch.setattr(local, "share", lambda *given, share=local.share: seen.append(share(*given)) or seen[-1])
    arrays = [
        jax.ShapeDtypeStruct((1, case.seq_len, heads, size), jnp.bfloat16)
        for heads, size in ((4, 128), (2, 128), (2, 64))
    ]
    jax.eval_shape(
        lambda *arrays: ringjax.ring_attention(
            *arrays, mesh=jax.make_mesh(case.axes, names), axis_name=names, layout=case.layout_object,
            local_window_size=case.window, is_causal=case.is_causal, config=case.config(),
        ),
        *arrays,
    )  # fmt: skip
    (shared,) = seen
    assert case.sharing == shared


@pytest.mark.parametrize("options", SHARINGS)
def test_pairs_of_shared_sequences_are_those_of_a_mask_built_pair_by_pair(options):
    case = program(seq_len=720 - 720 % 64, **{**options, "window": options.get("window") and (60, 5)})
    shards = ring_order(case.seq_len, case.layout_object, 8).reshape(*case.axes, -1)
    left, right = case.bounds
    words = case.sharing.words
    counted = pairs(case)
    total = np.zeros(8)
    for rank, place in enumerate(np.ndindex(*case.axes)):
        # Of merged axes the device has every shard, of the others its own.
        queries = [slice(None) if word == "all_to_all" else at for word, at in zip(words, place, strict=True)]
        distance = np.arange(case.seq_len)[None, :] - shards[tuple(queries)].reshape(-1, 1)
        attends = np.ones_like(distance, bool)
        attends &= True if left is None else distance >= -left
        attends &= True if right is None else distance <= right
        total[rank] = attends.sum()
    np.testing.assert_array_equal(counted.sum(axis=1), total)
    assert counted.shape[1] == case.schedule().num_blocks


# --- floor -----------------------------------------------------------------------------------------------------------


def test_floor_of_exchanged_heads_by_hand():
    """L = 2048, h = 4 on the inner axis, a ring of 2 outside; K = 2: a K/V head on each of 4. bfloat16, forward.

    The hop of the own block needs most: it was exchanged, and one like it arrives.
    """
    rows = 2048
    given = rows * (4 * 128 + 2 * (128 + 64)) * 2
    block = 4 * rows * 1 * (128 + 64) * 2
    softmax = rows * 4 * 64 * 4 + 2 * rows * 4 * 4
    case = program(axes=(2, 4), strategy=("ring", "all_to_all"), is_causal=True)
    assert floor_bytes(case) == given + rows * 4 * 128 * 2 + 2 * block + softmax
    # Backward, the last hop: query and dout by heads, the other's block; float32 sums of dK and dV that were sent and
    # received, and what becomes of them, to which nothing is added any more, in bfloat16.
    backward = program(axes=(2, 4), strategy=("ring", "all_to_all"), is_causal=True, backward=True)
    query, out = rows * 4 * 128 * 2, rows * 4 * 64 * 2
    held = given + out + out + query + out  # dout, output; by heads query, dout
    assert floor_bytes(backward) == held + block + 2 * rows * 4 * 4 + rows * 4 * 128 * 4 + 2 * 2 * block + block


def test_floor_of_gathered_keys_by_hand():
    """L = 2048 on 8 devices: all keys are on each, and their gradients in float32 before they are scattered."""
    rows = 2048
    given, block = rows * (4 * 128 + 2 * (128 + 64)) * 2, 8 * rows * 2 * (128 + 64) * 2
    assert floor_bytes(program(strategy="all_gather")) == given + block
    out = rows * 4 * 64 * 2
    case = program(strategy="all_gather", backward=True, dkv_dtype="bfloat16")
    assert floor_bytes(case) == given + 2 * out + block + 2 * block


def test_floor_of_a_ring_within_a_ring():
    """While the inner ring turns, the outer one sends a block and receives one: two more than a single ring."""
    names = lambda case: {term.name for term in floor_terms(case)}  # noqa: E731
    single, nested = program(ring=8), program(axes=(4, 2))
    assert "receive buffers (2)" in names(single) and "receive buffers (3)" in names(nested)
    block = 2048 * 2 * (128 + 64) * 2
    assert floor_bytes(nested) == floor_bytes(single) + block
    assert floor_bytes(program(direction="both")) == floor_bytes(single), "half of each buffer each way"


# --- report ----------------------------------------------------------------------------------------------------------


def test_bytes_per_link_by_hand():
    """Axes 2 x 4 of devices in order: a block over the outer axis, half a block each way round the inner one, heads."""

    def permute(name: str, num: int, axis: int, shift: int) -> Start:
        return Start(name, "bf16", (num // 2,), num, True, 1, axis=axis, shift=shift)

    body = (permute("up", 100, 1, 1), permute("down", 60, 1, -1), Launch("forward"), Done("up"), Done("down"))
    order = (permute("outer", 1000, 0, 1), Loop("while", 3, body), Done("outer"))
    case = program(axes=(2, 4))
    assert [(link.axis, link.up, link.down) for link in report_of(case, order).links] == [
        (0, 1000, 1000),  # of two devices each sends to the other over one link
        (1, 300, 180),
    ]
    # Going home over 3 links; gathering 3 blocks of 8 bytes; 4 parts of 8 bytes, one stays: 1, 2 and 1 links away.
    home = Start("home", "f32", (2,), 8, False, None, axis=1, shift=3)
    gathered = Start("gather", "bf16", (4,), 24, False, 1, "all_gather", 1)
    exchanged = Start("heads", "bf16", (16,), 24, False, 0, "all_to_all", 1)
    for sent, up, down in ((home, 24, 0), (gathered, 12, 12), (exchanged, 16, 16)):
        assert [(link.axis, link.up, link.down) for link in report_of(case, (sent,)).links] == [(1, up, down)]
    assert report_of(case, (gathered, exchanged)).wire_bytes == 48
    port = report_of(program("h100:8", axes=(2, 4)), (home, gathered)).links
    assert [(link.up, link.down) for link in port] == [(32, 32)]


def test_text_and_json_of_strategies():
    gather = Start("gather.1", "bf16", (1, 2048, 2, 128), 2**20, True, 1, "all_gather", 1)
    sums = Start("scatter.2", "f32", (1, 8192, 2, 128), 2**21, False, None, "reduce_scatter", 1, backward=True)
    move = Start("k", "bf16", (1, 2, 2048, 128), 2**19, True, 1, axis=0, shift=-1)
    order = (gather, Launch("forward.1"), Done("gather.1"), move, Launch("backward.2"), Done("k"), sums)
    case = program(axes=(2, 4), strategy=("ring", "all_gather"), direction="both", backward=True)
    report = report_of(case, order)
    said = " ".join("\n".join(text.lines(report)).split())  # however it is wrapped
    for words in (
        "axes 2 x 4: ring over 2, then all_gather over 4; half of every block each way round",
        "all_gather over axis 1: K | forward | await 1 | permute -1 over axis 0: K | backward",
        "reduce_scatter over axis 1", "dK (f32)", "permutes hidden 1/1", "blocks worked on 2 of 2",
        "through a link between neighbours, of axis",
    ):  # fmt: skip
        assert words in said, words
    found = json.loads(json.dumps(report.to_json()))
    assert [line["kind"] for line in found["exchanges"]] == ["all_gather", "reduce_scatter"]
    assert [line["hidden"] for line in found["exchanges"]] == [True, False]
    assert found["wire"]["links"] == [
        {"axis": 0, "up": 2**19, "down": 2**19}, {"axis": 1, "up": 1.5 * 2**20, "down": 1.5 * 2**20},
    ]  # fmt: skip
    spared = program(axes=(2, 4), strategy="all_gather", layout="contiguous", window=(9, 0))
    assert "nothing is gathered" in "\n".join(text.lines(report_of(spared, ())))
