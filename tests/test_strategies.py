"""Every way to share a sequence against the float64 oracle: out, lse and all gradients, as one call."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import ringjax
from ringjax import schedule as schedules


class Sharing(NamedTuple):
    """Sizes of the axes, a word for each, and the way round."""

    sizes: tuple[int, ...]
    strategy: tuple[str, ...]
    direction: str = "forward"

    def __str__(self) -> str:
        words = [f"{word} {size}" for word, size in zip(self.strategy, self.sizes, strict=True)]
        return " x ".join(words) + (" both ways" if self.direction == "both" else "")

    @property
    def heads_over(self) -> int:
        """Devices over which heads are dealt."""
        pairs = zip(self.strategy, self.sizes, strict=True)
        return math.prod(size for word, size in pairs if word == "all_to_all")

    @property
    def config(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "direction": self.direction}


RING, HEADS, GATHER = "ring", "all_to_all", "all_gather"
SHARINGS = (
    Sharing((4,), (GATHER,)),
    Sharing((4,), (HEADS,)),
    Sharing((3,), (HEADS,)),
    Sharing((3,), (RING,), "both"),
    Sharing((1, 8), (HEADS, RING), "both"),
    Sharing((2, 2), (RING, RING)),
    Sharing((2, 2), (RING, HEADS)),
    Sharing((2, 2), (HEADS, RING), "both"),
    Sharing((2, 2), (GATHER, RING)),
    Sharing((2, 2), (HEADS, GATHER)),
    Sharing((2, 4), (RING, GATHER), "both"),
    Sharing((2, 4), (GATHER, HEADS)),
    Sharing((4, 2), (RING, RING)),
    Sharing((4, 2), (HEADS, RING)),
    Sharing((3, 2), (RING, GATHER)),
    Sharing((3, 2), (RING, HEADS), "both"),
    Sharing((2, 2, 2), (HEADS, RING, GATHER)),
    Sharing((2, 2, 2), (RING, HEADS, RING)),
)


class Cell(NamedTuple):
    feature: str
    layout: str
    sharing: Sharing


def _cells() -> list[Cell]:
    """Every sharing, and with each of its words every feature and every layout: in place of the product what its words
    have met least often. Pairs of feature and layout are tests/test_conformance.py's."""
    # Fewer sharings gather than there are features.
    twice = [sharing for sharing in SHARINGS if GATHER in sharing.strategy and len(sharing.sizes) > 1]
    met: collections.Counter[tuple[str, str]] = collections.Counter()
    cells = []
    for sharing in (*SHARINGS, *twice):
        words = set(sharing.strategy)
        often = lambda value, words=words: sum(met[value, word] for word in words)  # noqa: E731
        cell = Cell(min(cases.BY_NAME, key=often), min(cases.LAYOUTS, key=often), sharing)
        met.update((value, word) for value in cell[:2] for word in words)
        cells.append(cell)
    return cells


CELLS = _cells()


def case_for(sharing: Sharing, case: cases.Case) -> cases.Case:
    """With a number of heads that can be dealt out; K/V heads need not."""
    if case.num_heads % sharing.heads_over == 0:
        return case
    return dataclasses.replace(case, num_heads=sharing.heads_over * case.num_kv_heads)


def test_the_square_holds_every_pair() -> None:
    assert {cell.sharing for cell in CELLS} == set(SHARINGS)
    for values, field in ((cases.BY_NAME, "feature"), (cases.LAYOUTS, "layout")):
        pairs = {(getattr(cell, field), word) for cell in CELLS for word in cell.sharing.strategy}
        assert pairs == set(itertools.product(values, (RING, HEADS, GATHER)))
    ways = {(cell.layout, cell.sharing.direction) for cell in CELLS}
    assert ways == set(itertools.product(cases.LAYOUTS, ("forward", "both")))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.feature}-{cell.layout}-{cell.sharing}")
def test_equals_the_oracle(cell: Cell) -> None:
    sharing = cell.sharing
    case = case_for(sharing, cases.BY_NAME[cell.feature])
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=cell.layout, num_shards=sharing.sizes, **sharing.config)
    cases.assert_matches(case, inputs, result)


@pytest.mark.parametrize(
    ("sharing", "layout"),
    [
        (Sharing((2, 2), (RING, HEADS), "both"), "zigzag"),
        (Sharing((2, 2), (RING, GATHER)), "zigzag"),
    ],
    ids=str,
)
def test_as_users_compile(sharing: Sharing, layout: str) -> None:
    case = cases.BY_NAME["causal_gqa"]
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=sharing.sizes, as_users=True, **sharing.config)
    cases.assert_matches(case, inputs, result, as_users=True)


@pytest.mark.parametrize("sharing", [Sharing((2, 2), (RING, HEADS), "both"), Sharing((2, 2), (RING, GATHER))], ids=str)
def test_bfloat16(sharing: Sharing) -> None:
    case = cases.Case("half", num_heads=8, num_kv_heads=1, is_causal=True, sinks=True)  # one K/V head on every rank
    inputs = cases.make_inputs(case, jnp.bfloat16)
    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=sharing.sizes, **sharing.config)
    cases.assert_matches(case, inputs, result)


@pytest.mark.parametrize("implementation", [name for name in cases.IMPLEMENTATIONS if name != "xla"])
def test_interpreted_kernels(implementation: str) -> None:
    """Parts of blocks, halves of their tokens, merged shards: what only strategies ask of a kernel."""
    sharing = Sharing((2, 2), (RING, HEADS), "both")
    case = cases.Case("kernel", num_heads=2, num_kv_heads=1, is_causal=True, segments="one")
    inputs = cases.make_inputs(case)
    ring = dict(layout="zigzag", num_shards=sharing.sizes, implementation=implementation)
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, **ring, **sharing.config))
    window = cases.Case("window", window=(5, 3), num_heads=2)
    inputs = cases.make_inputs(window)
    ring = dict(layout="contiguous", num_shards=3, implementation=implementation)
    cases.assert_matches(window, inputs, cases.run_ring(window, inputs, **ring))


# Windows on shards of 16 or 32 tokens, 8 tokens being a tile: parts of blocks, some hops of whole ones.
@pytest.mark.parametrize(
    ("window", "layout"),
    [
        (window, layout)
        for number, window in enumerate([(3, 0), (20, 0), (45, 0), (0, 30), (9, 25), (100, 20), (47, 70)])
        for turn, layout in enumerate(cases.LAYOUTS)
        if window == (20, 0) or number % 3 == turn
    ],
    ids=str,
)
def test_windows_that_reach_over_parts_of_shards(window: tuple[int, int], layout: str) -> None:
    case = cases.Case("window", 128, 128, num_heads=2, num_kv_heads=1, window=window, key_lengths=(128, 77), batch=2)
    inputs = cases.make_inputs(case)
    # Rings of rings have every hop by itself: one of them is large.
    sizes = (8,) if sum(window) % 2 else (2, 4) if window == (100, 20) else (2, 2)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=sizes, strategy="ring")
    cases.assert_matches(case, inputs, result)


def _inside(case: cases.Case, sharing: Sharing, **options: Any) -> Any:
    """The call on shards, and out, lse and gradients of it on whole arrays."""
    mesh, axes = cases.mesh_of(sharing.sizes), cases.axes_of(sharing.sizes)
    spec = PartitionSpec(None, axes)
    attend = functools.partial(
        ringjax.ring_attention,
        axis_name=axes,
        return_residual=True,
        config=cases.config_of("xla", **sharing.config),
        **case.static_options(),
        **options,
    )
    sharded = jax.shard_map(lambda q, k, v: attend(q, k, v), mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, spec))
    return lambda q, k, v, sinks: sharded(q, k, v)


INSIDE = (
    Sharing((2, 3), (HEADS, RING), "both"),
    Sharing((2, 2), (RING, GATHER)),
    Sharing((2, 2), (RING, RING)),
)


# The largest program alone as it is: to rematerialize it and to batch it takes it as it is too.
@pytest.mark.parametrize(
    ("sharing", "around"),
    [
        (INSIDE[0], "nothing"), (INSIDE[1], "remat"), (INSIDE[2], "remat"), (INSIDE[0], "vmap"),
    ],
    ids=str,
)  # fmt: skip
def test_inside_shard_map_under_transforms(sharing: Sharing, around: str) -> None:
    """With check_vma, as is the default."""
    case = cases.Case("inside", num_heads=4, num_kv_heads=2, is_causal=True)
    inputs = cases.make_inputs(case)
    attend = _inside(case, sharing, layout="zigzag")
    if around == "remat":
        attend = jax.checkpoint(attend)
    if around == "vmap":
        one = attend
        attend = lambda q, k, v, sinks: jax.tree.map(  # noqa: E731
            lambda x: x[0], jax.vmap(one, in_axes=(0, 0, 0, None))(q[None], k[None], v[None], sinks)
        )
    program = jax.jit(lambda arrays, masks: cases.value_and_gradients(attend, arrays))
    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=sharing.sizes, program=program)
    cases.assert_matches(case, inputs, result)


@pytest.mark.parametrize("sharing", [Sharing((2, 3), (HEADS, RING), "both"), Sharing((2, 2), (GATHER, HEADS))], ids=str)
def test_axes_of_vmap(sharing: Sharing) -> None:
    """Every axis a vmap of its own: a simulation on one device."""
    case = cases.Case("simulated", num_heads=4, num_kv_heads=2, is_causal=True)
    inputs = cases.make_inputs(case)
    axes = cases.axes_of(sharing.sizes)
    attend: Any = functools.partial(
        ringjax.ring_attention,
        axis_name=axes,
        layout="zigzag",
        return_residual=True,
        config=cases.config_of("xla", **sharing.config),
        **case.static_options(),
    )
    for axis in reversed(axes):
        attend = jax.vmap(attend, axis_name=axis)

    def whole(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        shard = lambda x: jnp.moveaxis(x.reshape(x.shape[0], *sharing.sizes, -1, *x.shape[2:]), 0, len(axes))  # noqa: E731
        back = lambda x: jnp.moveaxis(x, len(axes), 0).reshape(x.shape[len(axes)], -1, *x.shape[len(axes) + 2 :])  # noqa: E731
        return jax.tree.map(back, attend(shard(q), shard(k), shard(v)))

    program = jax.jit(lambda arrays, masks: cases.value_and_gradients(whole, arrays))
    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=sharing.sizes, program=program)
    cases.assert_matches(case, inputs, result)


def test_explicit_axes_and_lengths_that_do_not_divide() -> None:
    case = cases.Case("explicit", 45, 45, num_heads=4, num_kv_heads=2, is_causal=True)
    inputs = cases.make_inputs(case)
    sizes = (2, 2)
    mesh = cases.mesh_of(sizes, AxisType.Explicit)

    def program(arrays: Any, masks: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            return ringjax.ring_attention(
                q, k, v, axis_name=cases.axes_of(sizes), layout="zigzag", is_causal=True, return_residual=True,
                config=cases.config_of("xla", strategy=(HEADS, RING)),
            )  # fmt: skip

        return cases.value_and_gradients(attend, arrays)

    with jax.set_mesh(mesh):
        result = cases.run_ring(case, inputs, layout="zigzag", num_shards=sizes, program=jax.jit(program))
    cases.assert_matches(case, inputs, result)


def test_beside_axes_of_batch_and_heads() -> None:
    """Heads of a tensor axis are dealt out once more; one K/V head stays whole."""
    case = cases.Case("cube", num_heads=4, num_kv_heads=1, is_causal=True, sinks=True)
    inputs = cases.make_inputs(case)
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), auto)

    def program(arrays: Any, masks: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            return ringjax.ring_attention(
                q, k, v, sinks=sinks, mesh=mesh, batch_axis_name="data", head_axis_name="tensor", layout="zigzag",
                is_causal=True, return_residual=True, config=cases.config_of("xla", strategy=HEADS),
            )  # fmt: skip

        return cases.value_and_gradients(attend, arrays)

    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=2, program=jax.jit(program))
    cases.assert_matches(case, inputs, result)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5p", "none that the planner knows"])
def test_auto_is_what_the_planner_chooses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At trace time, from the shard's own shapes, on the devices of the mesh."""
    from ringjax import local, planner, sharded

    sharded._compiled.cache_clear()  # programs that asked another planner
    asked = []

    def choose(**options: Any) -> tuple[str, ...]:
        platform = "tpu" if "TPU" in kind else "gpu"
        asked.append(planner.choose_strategy(**{**options, "platform": platform, "device_kind": kind}))
        return asked[-1]

    monkeypatch.setattr(local, "choose_strategy", choose)
    case = cases.Case(f"auto on {kind}", 512, 512, num_heads=8, num_kv_heads=8, is_causal=True)
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout="zigzag", num_shards=(2, 2), strategy="auto", block_q=64)
    cases.assert_matches(case, inputs, result)
    assert asked and (asked[0] == (RING, RING) or "none" not in kind)


# --- what goes over the wire -----------------------------------------------------------------------------------------

B, T, N, K, H = 2, 64, 4, 2, 8


def traced(sharing: Sharing, layout: str = "zigzag", gradients: bool = True, **options: Any) -> Any:
    mesh, axes = cases.mesh_of(sharing.sizes), cases.axes_of(sharing.sizes)
    arrays = [jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]

    def run(*args: Any) -> Any:
        attend = functools.partial(
            ringjax.ring_attention, mesh=mesh, axis_name=axes, layout=layout,
            config=cases.config_of("xla", **sharing.config), **options,
        )  # fmt: skip
        if not gradients:
            return attend(*args)
        out, pull = jax.vjp(attend, *args)
        return pull(out)

    return jax.make_jaxpr(run)(*arrays)


def test_gathered_keys_return_in_float32() -> None:
    sent = jaxprs.float_collectives(traced(Sharing((4,), (GATHER,))))
    shard = (B, T // 4, K, H)
    assert sent == {("all_gather", "bfloat16", shard): 4, ("reduce_scatter", "float32", (B, 4, *shard[1:])): 2}


def test_nothing_is_gathered_where_a_window_leaves_ranks_out() -> None:
    sent = jaxprs.float_collectives(
        traced(Sharing((8,), (GATHER,)), "contiguous", gradients=False, local_window_size=(4, 0))
    )
    assert sent == {("ppermute", "bfloat16", (B, K, 8, H)): 2}  # half of it would do, but 8 keys are a tile


def test_heads_are_sent_to_those_who_need_them_only() -> None:
    sent = jaxprs.float_collectives(traced(Sharing((4,), (HEADS,)), gradients=False))
    # Of the two K/V heads one for each of the four.
    here, there, lse = (B, 1, T // 4, N, H), (B, 4, T // 4, 1, H), (B, 4, T // 4, 1, 1)
    assert sent == {
        ("all_to_all", "bfloat16", here): 3,
        ("all_to_all", "bfloat16", there): 1,
        ("all_to_all", "float32", lse): 1,
    }


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_both_ways_each_permute_carries_half(layout: str) -> None:
    one = jaxprs.float_collectives(traced(Sharing((4,), (RING,)), layout))
    both = jaxprs.float_collectives(traced(Sharing((4,), (RING,), "both"), layout))
    assert both == {(name, dtype, (b, k // 2, *rest)): 2 * n for (name, dtype, (b, k, *rest)), n in one.items()}


def test_the_outer_block_travels_once_per_outer_step() -> None:
    for inner in (2, 4):
        sent = jaxprs.permutes_by_axis(traced(Sharing((2, inner), (RING, RING)), gradients=False))
        assert sent == {"sp0": 2 * 1, "sp1": 2 * 2 * (inner - 1)}  # K and V


def test_a_window_over_two_slices_moves_only_its_keys() -> None:
    sent = jaxprs.float_collectives(traced(Sharing((2, 2), (RING, RING)), "contiguous", local_window_size=(7, 0)))
    assert {shape for _, _, shape in sent} == {(B, K, 8, H)}


@pytest.mark.parametrize("window", [1, 8, 9, 15, 16, 17, 24, 33, 48])
@pytest.mark.parametrize("sides", ["before", "after", "both"])
def test_only_what_a_window_needs_travels(window: int, sides: str) -> None:
    """Forward, and dK and dV in backward: keys of whole tiles, here of 8, in shards of 16."""
    left, right = (window if sides != "after" else 0), (window if sides != "before" else 0)
    mesh, length = cases.mesh_of(8), 16
    arrays = [jax.ShapeDtypeStruct((1, 8 * length, 1, H), jnp.bfloat16)] * 3

    def run(*args: Any) -> Any:
        attend = functools.partial(
            ringjax.ring_attention, mesh=mesh, local_window_size=(left, right), config=cases.config_of("xla")
        )
        out, pull = jax.vjp(attend, *args)
        return pull(out)

    moved = {"bfloat16": 0, "float32": 0}
    for (_, dtype, shape), times in jaxprs.float_collectives(jax.make_jaxpr(run)(*arrays)).items():
        moved[dtype] += shape[2] * times
    needed = sum(-(-side // 8) * 8 for side in (left, right))
    assert moved == {"bfloat16": 2 * 2 * needed, "float32": 2 * needed}


def test_a_window_of_512_in_shards_of_65536() -> None:
    schedule = schedules.plan(8, ringjax.Contiguous(), 65536, 65536, left=512, right=0)
    assert [(hop.offset, hop.keys) for hop in schedule.hops] == [(0, None), (-1, (65536 - 512, 65536))]


def test_more_heads_than_a_rank_needs_and_fewer_than_ranks() -> None:
    """Which query heads meet which K/V head, for every way to deal them out."""
    from ringjax.exchange import HeadExchange

    for num_kv_heads, group, size in [(6, 2, 4), (2, 6, 4), (2, 2, 4), (1, 8, 8), (3, 4, 6), (4, 1, 2), (5, 3, 3)]:
        heads = HeadExchange(("x",), (size,), num_kv_heads * group, num_kv_heads)
        q = jnp.arange(num_kv_heads * group, dtype=jnp.float32)[None, None, :, None]
        k = jnp.arange(num_kv_heads, dtype=jnp.float32)[None, None, :, None]

        def run(q: Any, k: Any, heads: Any = heads) -> Any:
            return heads.queries(q), heads.keys(k), heads.back(heads.queries(q))

        everywhere = [jnp.broadcast_to(x, (size, *x.shape)) for x in (q, k)]
        queries, keys, back = jax.vmap(run, axis_name="x")(*everywhere)
        local_q, local_k = np.asarray(queries)[:, 0, 0, :, 0], np.asarray(keys)[:, 0, 0, :, 0]
        assert sorted(local_q.ravel()) == list(range(num_kv_heads * group))
        for rank in range(size):
            used = np.repeat(local_k[rank], local_q.shape[1] // local_k.shape[1])
            np.testing.assert_array_equal(used, local_q[rank] // group)
        np.testing.assert_array_equal(np.asarray(back), np.broadcast_to(q[None], back.shape))
