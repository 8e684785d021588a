"""What the tiles of the Mosaic kernels visit and allow, in JAX's interpreter for GPUs, against the mask elementwise.

Backward's kernels cannot be interpreted; their mask can: it has queries along the columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringjax.kernels.mosaic import common
from ringjax.layout import Runs
from ringjax.mask import Mask, Tokens

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="JAX's interpreter for GPUs comes with 0.11"
)
EVEN, RAGGED = (256, 384), (248, 312)
EMPTY, MASKED_OUT, ALLOWED, FULL = range(4)  # what is written for each pair


def runs(length: int, run: int, base: int, step: int) -> Runs:
    return Runs(base=jnp.int32(base), step=jnp.int32(step), run=run, length=length)


# Positions of the queries (n = 0) and the keys (n = 1).
POSITIONS: dict[str, Any] = {
    "one run": lambda length, n: runs(length, length, 300 - 200 * n, length),
    "two runs": lambda length, n: runs(length, length // 2, 50 * n, 400),  # of whole tiles, if these are 64 x 64
    "three runs": lambda length, n: runs(length, length // 3 + 1, 0, 200),  # a tile may have two
    "stripes": lambda length, n: runs(length, 1, n, 3),
    "arrays": lambda length, n: jnp.sort(jax.random.randint(jax.random.key(n), (2, length), 0, 500, jnp.int32)),
}
# Positions, lengths of the shards, left, right, tokens present, whether there are segments.
CASES: dict[str, tuple[Any, ...]] = {
    "causal": ("one run", EVEN, None, 0, None, False),
    "causal, ragged": ("one run", RAGGED, None, 0, None, False),
    "window": ("one run", EVEN, 100, 20, None, False),
    "zigzag": ("two runs", EVEN, None, 0, None, False),
    "zigzag, window, lengths": ("two runs", EVEN, 150, 3, ([200, 0], [384, 300]), False),
    "a tile across runs": ("three runs", EVEN, 90, 0, None, False),
    "stripes, lengths": ("stripes", RAGGED, None, 0, ([230], [129]), False),
    "arrays": ("arrays", RAGGED, 60, 0, None, False),
    "segments": (None, EVEN, None, None, ([256, 100], [384, 200]), True),
    "lengths": (None, RAGGED, None, None, ([64, 5], [1, 312]), False),
    "nothing but the end": (None, RAGGED, None, None, None, False),
    "everything": ("two runs", EVEN, 200, 0, ([256, 100], [384, 200]), True),
}


def mask_of(name: str) -> tuple[Mask, tuple[int, int]]:
    positions, lengths, left, right, present, segmented = CASES[name]

    def tokens(n: int) -> Tokens:
        length = lengths[n]
        packed = np.arange(2 * length).reshape(2, length) * 5 // length
        return Tokens(
            positions=None if positions is None else POSITIONS[positions](length, n),
            segments=jnp.asarray(packed, jnp.int32) if segmented else None,
            length=None if present is None else jnp.asarray(present[n], jnp.int32),
        )

    return Mask(queries=tokens(0), keys=tokens(1), left=left, right=right), lengths


# Every case with rows of queries and of keys, and with tiles of 64 and of 128 columns; every pair of these as well.
@pytest.mark.parametrize(
    ("name", "rows", "block"),
    [
        (name, rows, (64, 128)[(number + turn) % 2])
        for number, name in enumerate(CASES)
        for turn, rows in enumerate(("queries", "keys"))
    ],
)
def test_what_tiles_visit_and_allow_is_the_mask(name: str, rows: str, block: int) -> None:
    """Tiles of 64 rows, and of 64 or 128 columns; what keys visit in one part with the latter, otherwise in three."""
    mask, lengths = mask_of(name)
    q_axis = 0 if rows == "queries" else 1
    blocks = (64, block) if q_axis == 0 else (block, 64)
    parts = 3 if rows == "keys" and block == 64 else 1
    rules = []

    @jax.jit  # as in a program: operation by operation takes longer to compile
    def prepare(mask: Mask) -> Any:
        rule, arrays = common.prepare_mask(mask, lengths, blocks, rows=rows, parts=parts)
        rules.append(rule)
        return arrays, mask.predicate(*lengths)

    arrays, predicate = prepare(mask)
    (rule,) = rules
    assert rule is not None
    counts = [-(-length // size) for length, size in zip(lengths, blocks, strict=True)]
    num_rows, num_columns = counts if q_axis == 0 else counts[::-1]
    if arrays.order is not None:
        assert (np.diff(arrays.counts[:, 1], axis=1) <= 0).all(), "who visits most starts first"
    leaves, structure = jax.tree.flatten(arrays)
    shape = (64, block)

    def body(*refs: Any) -> None:
        x, out_gmem = jax.tree.unflatten(structure, refs[:-1]), refs[-1]
        b, turn = jax.lax.axis_index("batch"), jax.lax.axis_index("turn")
        at, row = common.batch_row(x.counts, b), common.row_of(x, b, turn)
        full, visit = x.counts[at, 0, turn], x.counts[at, 1, turn]
        constant = lambda value: common.full(shape, float(value), common.MATRIX)  # noqa: E731

        def write(column: Any, values: Any) -> None:
            out_gmem.at[b, row, column][...] = values

        def visited(t: Any, _: None) -> None:
            column = common.column(x, b, row, t)
            starts = (jax.lax.rem(row, num_rows) * 64, column * block)
            may = common.allowed(
                rule, x, b, q_start=starts[q_axis], k_start=starts[1 - q_axis], shape=shape, q_axis=q_axis
            )
            jax.lax.cond(
                t < full,
                lambda: write(column, constant(FULL)),
                lambda: write(column, jnp.where(may, constant(ALLOWED), constant(MASKED_OUT))),
            )

        jax.lax.fori_loop(0, num_columns, lambda column, _: write(column, constant(EMPTY)), None)
        jax.lax.fori_loop(0, visit, visited, None)

    gpu: Any = plgpu
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, parts * num_rows, num_columns, *shape), jnp.float32),
        grid=(2, parts * num_rows),
        grid_names=("batch", "turn"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    with gpu.force_gpu_interpret_mode(gpu.InterpretGPUParams()):
        tiles = np.asarray(jax.block_until_ready(jax.jit(run)(*leaves)))
    each = tiles.reshape(2, parts, num_rows, num_columns, *shape)
    assert ((each[..., 0, 0] != EMPTY).sum(axis=1) <= 1).all(), "no tile is visited twice"
    tiles = each.max(axis=1)
    found = tiles.transpose(0, 1, 3, 2, 4).reshape(2, num_rows * 64, num_columns * block)
    found = found if q_axis == 0 else found.swapaxes(1, 2)
    want = np.broadcast_to(predicate, (2, *lengths))
    inside = found[:, : lengths[0], : lengths[1]]
    np.testing.assert_array_equal(inside >= ALLOWED, want)
    assert not (found[:, :, lengths[1] :] >= ALLOWED).any(), "no key beyond the end"
    if rows == "keys":  # which add to dk and dv; rows of queries that do not exist are not written
        assert not (found[:, lengths[0] :] >= ALLOWED).any(), "no query beyond the end"
    assert (found == EMPTY).any() or (found == FULL).any(), "some tiles need no predicate"
