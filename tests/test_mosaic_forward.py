"""The forward kernel for GPU, as far as a machine without one can tell: it lowers for every feature, and it refuses.

What it computes was compared on an H100, see docs/optimisation-log.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from ringjax._compat import GPU_CONCATENATES
from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.mosaic import forward as mosaic_forward
from ringjax.kernels.mosaic import forward_common
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.kernels.mosaic import tiles as mosaic_tiles
from ringjax.layout import Runs
from ringjax.mask import Mask, Tokens, Vectors
from ringjax.partial import Partial

KIND = "NVIDIA H100 80GB HBM3"
H100 = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=KIND, platform="gpu", num_cores=132))


@dataclasses.dataclass(frozen=True)
class Case:
    q_length: int = 384
    k_length: int = 384
    size: int = 128
    v_size: int = 128
    causal: bool = False
    runs: int = 1  # per shard: 1 is contiguous, 2 zigzag, more striped; 0: positions are arrays
    left: int | None = None
    segments: bool = False
    lengths: bool = False
    carry: bool = False
    finish: bool = True
    sinks: bool = False
    scale: float = 0.1
    soft_cap: float | None = None
    dtype: Any = jnp.bfloat16
    kv_heads: int = 2


CASES = {
    "full": Case(),
    "causal": Case(causal=True),
    "zigzag": Case(causal=True, runs=2),  # a tile of keys has two runs
    "zigzag, a run in whole tiles": Case(causal=True, runs=2, q_length=512, k_length=512, carry=True, finish=False),
    "striped window": Case(causal=True, runs=384, left=70),
    "stripes": Case(causal=True, runs=8, carry=True),
    "positions as arrays": Case(causal=True, runs=0, left=70),
    "lengths": Case(lengths=True, scale=-0.1),
    "packed": Case(causal=True, segments=True, sinks=True, soft_cap=20.0, lengths=True),
    "first hop": Case(finish=False),
    "hop": Case(carry=True, finish=False, causal=True),
    "last hop": Case(carry=True, sinks=True),
    "ragged": Case(q_length=301, k_length=333, causal=True, carry=True, finish=False),
    "ragged, full": Case(q_length=301, k_length=333, scale=0.0),
    "tiny": Case(q_length=3, k_length=5, causal=True),
    # Few queries: heads are rows, keys are split.
    "one query": Case(q_length=1, k_length=2000, lengths=True, sinks=True, soft_cap=5.0),
    "few queries": Case(q_length=20, k_length=333, causal=True, left=100, size=64, v_size=64),
    "few queries, as arrays": Case(q_length=5, k_length=333, causal=True, left=100, segments=True, runs=0),
    "few queries of long heads": Case(q_length=7, k_length=512, causal=True, runs=4, size=256, v_size=256),
    "heads of 64": Case(size=64, v_size=64, segments=True, carry=True),
    "heads of 256": Case(size=256, v_size=256, causal=True, carry=True, finish=False),
    "odd heads": Case(size=96, v_size=40, dtype=jnp.float16, kv_heads=4),
}


def tokens(case: Case, length: int, start: Any, index: Any) -> Tokens:
    """One side of the mask. ``start`` is a traced number, ``index`` an array along the sequence."""
    positions = None
    if case.causal:
        run = length // (case.runs or 1)
        positions = Runs(base=start, step=5 * run, run=run, length=length) if case.runs else index
    count = jnp.stack([start, start + 2]) if case.lengths else None
    return Tokens(positions=positions, segments=index if case.segments else None, length=count)


def carry(case: Case) -> Partial:
    """As the first hop leaves it, which this kernel alone reads."""
    first = dataclasses.replace(case, carry=False, finish=False, sinks=False)
    with jax.sharding.use_abstract_mesh(H100):
        return jax.eval_shape(lambda *args: run(first, *args), *arguments(first))


def arguments(case: Case) -> tuple[Any, ...]:
    heads = 4
    shape = lambda *s, dtype=case.dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    return (
        shape(2, heads, case.q_length, case.size),
        shape(2, case.kv_heads, case.k_length, case.size),
        shape(2, case.kv_heads, case.k_length, case.v_size),
        shape(dtype=jnp.int32),
        shape(1, case.q_length, dtype=jnp.int32),
        shape(1, case.k_length, dtype=jnp.int32),
        carry(case) if case.carry else None,
        shape(heads, dtype=jnp.float32) if case.sinks else None,
    )


def mask_of(case: Case, start: Any, q_index: Any, k_index: Any) -> Mask:
    return Mask(
        queries=tokens(case, case.q_length, start, q_index),
        keys=tokens(case, case.k_length, start, k_index),
        left=case.left,
        right=0 if case.causal else None,
    )


def run(case: Case, q: Any, k: Any, v: Any, start: Any, q_index: Any, k_index: Any, carry: Any, sinks: Any) -> Any:
    params = KernelParams(case.scale, case.soft_cap, device_kind=KIND)
    block = Block(q=q, k=k, v=v, mask=mask_of(case, start, q_index, k_index), sinks=sinks)
    return mosaic.forward(block, params, carry, finish=case.finish)


@pytest.mark.parametrize("name", CASES)
def test_lowers(name: str) -> None:
    case = CASES[name]
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(lambda *args: run(case, *args)).trace(*arguments(case))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    shapes = [x.shape for x in jax.tree.leaves(traced.out_info)]
    rows = (2, 4, case.q_length)
    if case.finish:
        assert shapes == [(*rows, case.v_size), rows]
    else:  # as it came in, so that it can be changed in place
        assert shapes == [x.shape for x in carry(case)]


@pytest.mark.parametrize(
    ("name", "by_tma", "acc"),
    [
        ("first hop", False, (2, 4, 6, 16, 64, 8)),
        ("hop", True, (2, 4, 384, 128)),
        ("ragged", True, (2, 4, 320, 128)),
        ("heads of 256", False, (2, 4, 6, 32, 64, 8)),
    ],
)
def test_the_carry_is_padded_and_in_blocks_where_registers_load_it(
    name: str, by_tma: bool, acc: tuple[int, ...]
) -> None:
    if not by_tma and not GPU_CONCATENATES:
        acc = (2, 4, 384, acc[3] * 8)
    rows = acc[:3] if len(acc) == 4 else (2, 4, 384)
    assert [x.shape for x in carry(CASES[name])] == [acc, rows, rows]


@pytest.mark.parametrize("name", ["hop", "packed"])
def test_lowers_under_vmap(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is changed in place as well: the carry, and the counter of blocks that draw."""
    case = CASES[name]
    monkeypatch.setattr(mosaic_tiles, "MULTIPROCESSORS", 5)
    monkeypatch.setattr(mosaic_forward, "ENOUGH_TILES", 1)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arguments(case))
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(jax.vmap(lambda *args: run(case, *args))).trace(*stacked)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_masks_of_a_layout_need_no_array_along_the_sequence() -> None:
    """What enters the kernel besides q, k, v and the carry: numbers of rows of tiles, and six of the mask."""
    case = CASES["zigzag, a run in whole tiles"]
    start, *index = (jnp.zeros(n, jnp.int32) for n in ((), (1, case.q_length), (1, case.k_length)))
    mask = mask_of(case, start, *index)
    rule, arrays = mosaic_forward.common.prepare_mask(mask, (case.q_length, case.k_length), (128, 128), rows="queries")
    assert rule is not None
    assert [x.shape for x in jax.tree.leaves(arrays)] == [(1, 6), (1, 4, 4)]


@pytest.mark.parametrize(
    ("case", "enough", "draws", "heads"),
    [
        (Case(causal=True, segments=True), 1, True, 8),
        (Case(causal=True, runs=0), 1, True, 8),
        (Case(causal=True, runs=0), 14, True, 8),  # 24 rows of 3 tiles for 5 blocks
        (Case(causal=True, runs=0), 15, False, 8),
        (Case(causal=True, segments=True, carry=True, finish=False), 1, True, 8),
        (Case(causal=True), 1, True, 4),  # two K/V heads have 12 rows
        (Case(causal=True), 15, False, 8),
        (Case(causal=True, q_length=1024, k_length=1024), 1, True, 2),
        (Case(causal=True, left=1, q_length=1024, k_length=1024), 38, True, 2),  # 64 rows of at most 3 tiles
        (Case(causal=True, left=1, q_length=1024, k_length=1024), 39, False, 8),
        (Case(), 1, False, 2),
    ],
)
def test_blocks_draw_unequal_rows(
    monkeypatch: pytest.MonkeyPatch, case: Case, enough: int, draws: bool, heads: int
) -> None:
    """Rows of a few heads before those of others, if a layout made them."""
    given = arguments(case)  # before blocks are few
    monkeypatch.setattr(mosaic_tiles, "MULTIPROCESSORS", 5)
    monkeypatch.setattr(mosaic_forward, "ENOUGH_TILES", enough)
    monkeypatch.setattr(mosaic_forward, "ENOUGH_ROWS", 12)
    seen = []

    def launch(static: Any, *rest: Any) -> Any:
        seen.append(static)
        return real(static, *rest)

    real = mosaic_forward.launch
    monkeypatch.setattr(mosaic_forward, "launch", launch)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(lambda *args: run(case, *args)).trace(*given)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    (static,) = seen
    assert (static.draws, static.group_heads, static.num_blocks) == (draws, heads, 5)


@pytest.mark.parametrize(
    ("size", "vectors", "marks"), [(64, 1, 1), (64, 2, 2), (128, 1, 1), (128, 2, 1), (256, 2, 2), (64, 0, 0)]
)
def test_vectors_of_keys_come_to_smem_as_room_allows(size: int, vectors: int, marks: int) -> None:
    x = jax.ShapeDtypeStruct((1, 2, 256, size), jnp.bfloat16)
    vector = jnp.zeros((1, 256), jnp.int32)
    side = Tokens(positions=vector if vectors > 1 else None, segments=vector if vectors else None)
    mask = Mask(queries=side, keys=side, right=0 if vectors > 1 else None)
    tiles = mosaic_tiles.forward_tiles(x, x, mask, KernelParams(1.0, device_kind=KIND), whole=True)
    taken = tiles.smem_bytes(size, size, finish=True)
    of_keys = Vectors(positions=side.positions, segments=side.segments)
    assert forward_common.marks(tiles, of_keys, taken) == marks


def test_refuses_float32() -> None:
    case = Case(dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"query.*bfloat16 and float16.*Got float32"):
        jax.eval_shape(lambda *args: run(case, *args), *arguments(case))


def test_refuses_wide_heads() -> None:
    case = Case(size=264)
    with pytest.raises(NotImplementedError, match=r"query.*at most 256.*Got 264"):
        jax.eval_shape(lambda *args: run(case, *args), *arguments(case))


@pytest.mark.parametrize(
    ("size", "masked", "by_tma"),
    [(64, True, True), (64, False, True), (128, True, True), (128, False, False), (256, True, False)],
)
def test_the_carry_comes_by_tma_where_there_is_room(size: int, masked: bool, by_tma: bool) -> None:
    """A hop in the middle of a ring."""
    x = jax.ShapeDtypeStruct((1, 2, 256, size), jnp.bfloat16)
    side = Tokens(positions=Runs(base=0, step=256, run=256, length=256) if masked else None)
    mask = Mask(queries=side, keys=side, right=0 if masked else None)
    tiles = mosaic_tiles.forward_tiles(x, x, mask, KernelParams(1.0, device_kind=KIND), whole=False)
    assert mosaic_forward._carry_in_smem(tiles, size, size, True, False) == by_tma
