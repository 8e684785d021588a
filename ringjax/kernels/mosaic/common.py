"""What the Mosaic GPU kernels share: the mask of a tile, the tiles that a row visits, scores, small pieces of a kernel.

GPU terms: a warpgroup is 128 threads, the unit that multiplies (WGMMA): the left operand comes from SMEM or registers,
the right one from SMEM, the float32 result goes to registers. SMEM is the shared memory of a multiprocessor, GMEM the
device memory; TMA copies tiles between the two behind the compute.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...layout import Runs
from ...mask import KeySide, Mask, QuerySide, Rule, SideRule, Vectors, attends
from .. import softmax
from ..base import KernelParams
from ..softmax import LOG2_E as LOG2_E
from ..visits import all_visits, in_parts, longest_first, nth_in_range, plan_visits

LN_2 = math.log(2.0)

# Columns of a matrix that the four threads of one row have between them.
COLUMN_BLOCK = 8

# Layouts of a matrix product in registers, of its rows and of its columns.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


# -------------------------------------------------------------------------------------------------- outside a kernel


def smem_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """SMEM for matrices as WGMMA and TMA want them."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def swizzled(dtype: Any) -> tuple[Any, ...]:
    """How such SMEM lies: in tiles of 8 rows of 128 bytes, swizzled."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, 128 // jnp.dtype(dtype).itemsize)), swizzle(128)


def pad_axis(x: Array, axis: int, length: int) -> Array:
    """Zeros appended along one axis up to ``length``."""
    extra = length - x.shape[axis]
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def token_major(x: Array, size: int, least: int = 0) -> Array:
    """[B, N, L, H] as [B, L, N, H], which is how the ring got it: XLA cancels the two. Heads grow to ``size``.

    TMA moves boxes of 8 tokens: there will be a multiple of them, and at least ``least``.
    """
    x = pad_axis(jnp.swapaxes(x, 1, 2), 3, size)
    return pad_axis(x, 1, max(-(-x.shape[1] // 8) * 8, least))


class MaskArrays(NamedTuple):
    """The mask of a block and what each row of tiles visits: arrays, or refs in GMEM. None: absent."""

    queries: Vectors = Vectors(None, None)  # of [B1, Tp]
    keys: Vectors = Vectors(None, None)  # of [B1, Sp]
    numbers: Any = None  # [B1, 6], see Mask.numbers
    # [B1, 2, rows]: how many tiles are FULL, how many are visited; of ranges [B1, 3 or 4, rows]: also where they start,
    # and where the FULL ones do, if not all are. One array, so that XLA makes one kernel of it. Of lists [B1, 3, rows],
    # longest first: also of which row.
    counts: Any = None
    order: Any = None  # [B1, rows, columns]: the tiles, where they are a list


def prepare_mask(
    mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int], *, rows: str, parts: int | None = None
) -> tuple[Rule | None, MaskArrays]:
    """The rule for PARTIAL tiles and the arrays; without a rule every row visits every column, and all are FULL.

    Args:
      lengths: of the shards of queries and of keys.
      blocks: tiles of queries and of keys.
      rows: which of them are the rows, "queries" or "keys".
      parts: of what a row visits, each a row of the arrays, see :func:`ringjax.kernels.visits.in_parts`. None: one, and
        no arrays without a rule.
    """
    num_tiles = [-(-length // block) for length, block in zip(lengths, blocks, strict=True)]
    num_rows, columns = num_tiles if rows == "queries" else reversed(num_tiles)
    planned = plan_visits(mask, *lengths, *blocks, rows=rows)
    if planned is None and parts is None:
        return None, MaskArrays()
    visits = in_parts(planned or all_visits(num_rows, columns), columns, parts or 1)
    if visits.order is not None:
        visits = longest_first(visits)
    # From memory even where they are known: ptxas handles the registers of a loop of unknown length better.
    counts = [x for x in (visits.full, visits.visit, visits.row, visits.start, visits.full_start) if x is not None]
    arrays = MaskArrays(counts=jnp.stack(counts, axis=1), order=visits.order)
    if planned is None:
        return None, arrays
    totals = [count * block for count, block in zip(num_tiles, blocks, strict=True)]
    # Rows of queries that do not exist are not written: nothing need keep them out.
    ragged_q, ragged_kv = (total != length for total, length in zip(totals, lengths, strict=True))
    rule = mask.rule(*lengths, ragged_q=ragged_q and rows == "keys", ragged_kv=ragged_kv)
    queries, keys = mask.vectors(*totals)
    numbers = mask.numbers(*lengths) if rule.needs_numbers else None
    return rule, arrays._replace(queries=queries, keys=keys, numbers=numbers)


def reach(mask: Mask, length: int, block: int) -> int:
    """How many of ``length`` tokens a tile of ``block`` of the others can visit: a window bounds them on both sides."""
    if mask.left is None or mask.right is None:
        return length
    return min(length, mask.left + mask.right + block)


# ------------------------------------------------------------------------------------------ the mask, inside a kernel


def batch_row(x: Any, b: Array) -> Array:
    """The row of a mask's array that belongs to batch row b."""
    return b if x.shape[0] > 1 else jnp.int32(0)


def row_of(x: MaskArrays, b: Array, n: Array) -> Array:
    """Of which row the n-th counts are."""
    return n if x.order is None else x.counts[batch_row(x.counts, b), 2, n]


def column(x: MaskArrays, b: Array, row: Array, t: Array) -> Array:
    """The column of the t-th tile that a row visits.

    Of a range, the row's numbers are read each time: they would take registers all along, and there are none to spare.
    """
    if x.order is not None:
        return x.order[batch_row(x.order, b), row, t]
    if x.counts is None or x.counts.shape[1] == 2:
        return t
    if x.counts.shape[1] == 3:
        return t + x.counts[batch_row(x.counts, b), 2, row]
    full, start, full_start = (x.counts[batch_row(x.counts, b), n, row] for n in (0, 2, 3))
    return nth_in_range(t, full, start, full_start)


def allowed(
    rule: Rule, x: MaskArrays, b: Array, *, q_start: Array, k_start: Array, shape: tuple[int, int], q_axis: int = 0,
    queries: Vectors | None = None, keys: Vectors | None = None,
) -> Array:  # fmt: skip
    """Who may attend to whom in a matrix of this shape, queries along ``q_axis`` from token ``q_start`` on.

    ``queries`` and ``keys``: their vectors, already loaded; None: load them from GMEM, which takes its time.
    """
    of_queries = query_side(rule, x, b, q_start, shape, q_axis, queries)
    return attends(of_queries, key_side(rule, x, b, k_start, shape, 1 - q_axis, keys))


def query_side(
    rule: Rule, x: MaskArrays, b: Array, start: Array, shape: tuple[int, int], axis: int, loaded: Vectors | None = None
) -> QuerySide:
    """The queries from token ``start`` on, repeated to a matrix that has them along ``axis``."""
    side, numbers = _in_one_run(rule.queries, _Numbers(x, b), start, shape[axis])
    rule = dataclasses.replace(rule, queries=side)
    if loaded is None:
        loaded = load_vectors(x.queries, b, start, shape[axis], axis)
    found = rule.of_queries(loaded, numbers, _index(start, shape, axis))
    return jax.tree.map(lambda values: jax.lax.broadcast_in_dim(values, shape, [axis]), found)


def key_side(
    rule: Rule, x: MaskArrays, b: Array, start: Array, shape: tuple[int, int], axis: int, loaded: Vectors | None = None
) -> KeySide:
    """The same of keys."""
    side, numbers = _in_one_run(rule.keys, _Numbers(x, b, 3), start, shape[axis])
    rule = dataclasses.replace(rule, keys=side)
    if loaded is None:
        loaded = load_vectors(x.keys, b, start, shape[axis], axis)
    found = rule.of_keys(loaded, numbers, _index(start, shape, axis))
    return jax.tree.map(lambda values: jax.lax.broadcast_in_dim(values, shape, [axis]), found)


def one_key(rule: Rule, x: MaskArrays, b: Array, index: Array, shape: tuple[int, int]) -> KeySide:
    """A single key, repeated to a matrix."""
    loaded = jax.tree.map(lambda x_gmem: x_gmem[batch_row(x_gmem, b), index], x.keys)
    found = rule.of_keys(loaded, _Numbers(x, b, 3), index)
    return jax.tree.map(lambda value: jnp.broadcast_to(value, shape), found)


class _Numbers:
    """Numbers of the mask as scalars. Each is loaded where it is looked up, since registers are few."""

    def __init__(self, x: MaskArrays, b: Array, first: int = 0) -> None:
        self._x, self._b, self._first = x, b, first

    def __getitem__(self, n: int) -> Array:
        return self._x.numbers[batch_row(self._x.numbers, self._b), self._first + n]


def _in_one_run(side: SideRule, numbers: Any, start: Array, size: int) -> tuple[SideRule, Any]:
    """Tiles that divide a run lie in one: their positions are one number plus an index, as if all tokens were a run."""
    if side.run is None or side.run >= side.length or side.run % size:
        return side, numbers
    first = Runs(base=numbers[0], step=numbers[1], run=side.run, length=side.length).at(start)
    of_run = {0: first - start, **({2: numbers[2]} if side.counted else {})}
    return dataclasses.replace(side, run=side.length), of_run


def _index(start: Array, shape: tuple[int, int], axis: int) -> Array:
    """Of the tokens along one axis of a matrix, in the layout that repeats to it."""
    return start + plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=(ROWS, COLUMNS)[axis])


def load_vectors(vectors: Vectors, b: Array, start: Array, length: int, axis: int) -> Vectors:
    """From GMEM, as a matrix needs them that has these tokens along ``axis``."""

    def load(x_gmem: Any) -> Array:
        values_gmem = x_gmem.at[batch_row(x_gmem, b), pl.ds(start, length)]
        return gpu_load(values_gmem, (ROWS, COLUMNS)[axis], optimized=False)

    return jax.tree.map(load, vectors)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def scores(products: Array, params: KernelParams) -> Array:
    """Of :func:`ringjax.kernels.softmax.scores`, for both passes: backward's have the same bits as forward's.

    tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's tanh is too coarse.
    """
    cap = params.logits_soft_cap
    if cap is None:
        return softmax.scores(products, params)
    return 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * LOG2_E * params.scale / cap)))


def factor(params: KernelParams) -> float:
    """Logits in base 2 over scores: s * factor - m is one fused multiply-add, in both passes.

    Positive. It is applied in float32: folded into a bfloat16 query it would round every logit.
    """
    return softmax.factor(params) * LOG2_E


def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(shape: tuple[int, ...]) -> Array:
    """To add products to."""
    return full(shape, 0.0, MATRIX)


def row_matrix(x: Array, like: Array) -> Array:
    """A number for each row, repeated along the columns of a matrix."""
    return jax.lax.broadcast_in_dim(x, like.shape, [0])


def column_matrix(x: Array, like: Array) -> Array:
    """A number for each column, repeated along the rows of a matrix."""
    return jax.lax.broadcast_in_dim(x, like.shape, [1])


def is_finite(x: Array) -> Array:
    """NaN fails the comparisons. Not by ``abs``: the compiler then no longer compares bfloat16 in pairs."""
    return (x < jnp.inf) & (x > -jnp.inf)
