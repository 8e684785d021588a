"""What the Triton kernels share: the mask, which tiles a program visits, masked loads, small pieces of kernels.

Terms: a program works on one tile of rows (queries, or keys for dK and dV) and loops over the tiles of columns that its
rows attend to, or that attend to them. Arrays are token-major inside, [B, L, heads, size], as the user's are: the swap
of axes around a call cancels against the ring's. Tiles of a ragged length or head size are completed with zeros as they
are loaded, nothing is padded in memory.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from ...mask import KeySide, Mask, QuerySide, Rule, Vectors
from ..base import KernelParams
from ..softmax import is_finite
from ..visits import Visits, nth_in_range, plan_visits
from .tiles import TileSizes, padded_size


def token_major(x: Array) -> Array:
    """[B, heads, L, size] as [B, L, heads, size], and back."""
    return jnp.swapaxes(x, 1, 2)


# ------------------------------------------------------------------------------------------------------------- mask


class MaskInputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of the mask between a shard of queries and a block. None: absent."""

    queries: Vectors  # of [B1, T], whole tiles
    keys: Vectors  # of [B1, S], whole tiles
    numbers: Any  # [B1, 6]
    visits: Visits | None  # None: all tiles, each FULL


def mask_inputs(mask: Mask, tiles: TileSizes, q_length: int, kv_length: int, *, rows: str) -> tuple[MaskInputs, Rule]:
    """``rows`` are "queries" or "keys". Their own ragged end is masked too if they are keys."""
    visits = plan_visits(mask, q_length, kv_length, tiles.block_q, tiles.block_kv, rows=rows)
    ragged_q, ragged_kv = q_length % tiles.block_q != 0, kv_length % tiles.block_kv != 0
    rule = mask.rule(q_length, kv_length, ragged_q=ragged_q and rows == "keys", ragged_kv=ragged_kv)
    whole = lambda length, block: pl.cdiv(length, block) * block  # noqa: E731
    vectors = mask.vectors(whole(q_length, tiles.block_q), whole(kv_length, tiles.block_kv))
    numbers = mask.numbers(q_length, kv_length) if rule.needs_numbers and visits is not None else None
    return MaskInputs(*vectors, numbers, visits), rule


def mask_specs(inputs: MaskInputs, tiles: TileSizes, place: Callable[..., tuple[Any, Any]], *, rows: str) -> MaskInputs:
    """BlockSpecs: a tile of the rows, all of the columns. ``place`` gives (batch row, row of tiles) of a program."""

    def row_of(x: Array, *program: Any) -> Any:
        return place(*program)[0] if x.shape[0] > 1 else 0

    def side(x: Array, block: int | None) -> pl.BlockSpec:
        if block is None:
            return pl.BlockSpec((None, x.shape[1]), lambda *program: (row_of(x, *program), 0))
        return pl.BlockSpec((None, block), lambda *program: (row_of(x, *program), place(*program)[1]))

    def of_visits(x: Array) -> pl.BlockSpec:
        at = lambda *program: (row_of(x, *program), place(*program)[1])  # noqa: E731
        if x.ndim == 2:
            return pl.BlockSpec((None, None), at)
        return pl.BlockSpec((None, None, x.shape[2]), lambda *program: (*at(*program), 0))

    by_queries = rows == "queries"
    return MaskInputs(
        queries=jax.tree.map(lambda x: side(x, tiles.block_q if by_queries else None), inputs.queries),
        keys=jax.tree.map(lambda x: side(x, None if by_queries else tiles.block_kv), inputs.keys),
        numbers=jax.tree.map(lambda x: side(x, None), inputs.numbers),
        visits=jax.tree.map(of_visits, inputs.visits),
    )


def query_side(inputs: MaskInputs, rule: Rule, start: Any, block: int, *, rows: bool) -> QuerySide:
    """The queries of a tile, as a vector. ``rows``: they are the program's own."""
    loaded = _load_side(inputs.queries, start, block, rows)
    return rule.of_queries(loaded, _numbers(inputs), start + iota(block))


def key_side(inputs: MaskInputs, rule: Rule, start: Any, block: int, *, rows: bool) -> KeySide:
    """The same of keys."""
    loaded = _load_side(inputs.keys, start, block, rows)
    return rule.of_keys(loaded, _numbers(inputs)[3:], start + iota(block))


def _load_side(vectors: Vectors, start: Any, block: int, rows: bool) -> Vectors:
    return jax.tree.map(lambda ref: ref[...] if rows else ref[pl.ds(start, block)], vectors)


def _numbers(inputs: MaskInputs) -> tuple[Any, ...]:
    return () if inputs.numbers is None else tuple(inputs.numbers[n] for n in range(6))


# ------------------------------------------------------------------------------------------------- what to visit


def visit(visits: Visits | None, num_columns: int, step: Callable[..., Any], state: Any, *, repeat: int = 1) -> Any:
    """Run ``step(column, part, state, masked)`` for every tile that the row visits, FULL ones first.

    Each is visited ``repeat`` times in a row, ``part`` counts them.
    """
    zero = jnp.int32(0)
    if visits is None:
        every = lambda n, state: step(*_split(n, repeat), state, False)  # noqa: E731
        return jax.lax.fori_loop(zero, jnp.int32(num_columns * repeat), every, state)

    def body(masked: bool, n: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        column, state = carry
        # Read one step ahead: loads whose address waits for a load would stall the pipeline.
        following = _column(visits, n + 1, repeat)
        return following, step(column, _split(n, repeat)[1], state, masked)

    full, end = visits.full[...] * repeat, visits.visit[...] * repeat
    carry = jax.lax.fori_loop(zero, full, functools.partial(body, False), (_column(visits, zero, repeat), state))
    return jax.lax.fori_loop(full, end, functools.partial(body, True), carry)[1]


def revisit(visits: Visits | None, wanted: Array, step: Callable[..., Any], state: Any, *, repeat: int = 1) -> Any:
    """Run ``step(column, part, state)`` for the PARTIAL tiles once more, where ``wanted``."""
    if visits is None:
        return state

    def body(n: Array, state: Any) -> Any:
        return step(_column(visits, n, repeat), _split(n, repeat)[1], state)

    full, end = visits.full[...] * repeat, visits.visit[...] * repeat
    return jax.lax.fori_loop(full, jnp.where(wanted, end, full), body, state)


def _split(n: Array, repeat: int) -> tuple[Array, Array]:
    return (n, jnp.int32(0)) if repeat == 1 else (jax.lax.div(n, repeat), jax.lax.rem(n, repeat))


def _column(visits: Visits, n: Array, repeat: int) -> Array:
    """The tile of step n; of the step after the last any number, or a tile that exists where it is read."""
    n = _split(n, repeat)[0]
    if visits.order is None:
        assert visits.start is not None and visits.full_start is not None
        return nth_in_range(n, visits.full[...], visits.start[...], visits.full_start[...])
    return visits.order[jnp.minimum(n, visits.order.shape[0] - 1)]


# ---------------------------------------------------------------------------------------------- loads and stores


def iota(size: int) -> Int32[Array, " size"]:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def within(start: Any, block: int, length: int | None, size: int | None = None) -> Array | None:
    """True where a tile [block] or [block, padded size] holds tokens before ``length`` and features before ``size``.

    None: everywhere. ``length`` is None where no tile is ragged.
    """
    conditions = []
    wide = None if size is None else padded_size(size)
    if length is not None:
        tokens = start + iota(block) < length
        conditions.append(tokens if wide is None else jnp.broadcast_to(tokens[:, None], (block, wide)))
    if size is not None and wide is not None and size != wide:
        conditions.append(jnp.broadcast_to(iota(wide)[None, :] < size, (block, wide)))
    return functools.reduce(operator.and_, conditions) if conditions else None


def load(view: Any, mask: Array | None) -> Array:
    """Zero where masked."""
    return plgpu.load(view, mask=mask, other=None if mask is None else 0.0)


def store(ref: Any, value: Array, mask: Array | None) -> None:
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


# ----------------------------------------------------------------------------------------------------- arithmetic


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one axis of each matrix, accumulating in float32; float32 is multiplied in full, not as tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def exp2(x: Array, params: KernelParams) -> Array:
    """2^x in one instruction: the library function spends four more on results below 2^-126, which are 0 here."""
    if params.interpret:
        return jnp.exp2(x)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def badness(x: Array) -> Array:
    """1 where NaN or Inf, else 0, in the dtype of x."""
    return jnp.where(is_finite(x), 0.0, 1.0).astype(x.dtype)
