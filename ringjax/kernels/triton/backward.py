"""The backward block kernels in Triton: one for dk and dv, one for dq.

Each program owns the gradients of its rows and sums them in registers, so the order of additions is fixed and nothing
is added atomically. dkv: a grid over (tile of keys, K/V head, batch row), a loop over the tiles of queries that see
them, of all query heads of the group; logits are transposed there, keys along rows, so that p and ds are left operands
as they come. dq: a grid over (tile of queries, query head, batch row), a loop over the tiles of keys they see.

FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the equations are in base.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._compat import shape_like
from ...mask import BlockMap, KeySide, Mask, QuerySide, attends
from ..base import KernelParams
from ..softmax import LOG2_E, clean, factor, scores
from . import common
from .common import TileSizes, badness, dot, exp2, load, store, token_major, within


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    dout: Any  # [B, T, N, Hv]
    lse: Any  # [B, N, T]
    delta: Any  # [B, N, T]
    queries: QuerySide  # of [B1, T], whole tiles
    keys: KeySide  # of [B1, S], whole tiles
    visits: BlockMap | None
    dq: Any  # the carry [B, T, N, H]


@dataclasses.dataclass(frozen=True)
class _Static:
    params: KernelParams
    tiles: TileSizes
    q_length: int | None  # None: no tile is ragged
    kv_length: int | None
    num_q: int
    num_kv: int
    group: int
    sizes: tuple[int, int]  # H, Hv


def dkv(
    q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, mask: Mask, params: KernelParams,
    tiles: TileSizes,
) -> tuple[Array, Array]:  # fmt: skip
    """dk and dv of :class:`ringjax.kernels.base.Kernel`."""
    inputs, static = _prepare(q, k, v, dout, lse, delta, mask, params, tiles, rows="keys")
    result = tuple(shape_like(token_major(x).shape, jnp.float32, x) for x in (k, v))
    queries, keys = _sides(inputs, static, rows="keys")
    row = pl.BlockSpec((None, static.group, q.shape[2]), lambda j, h, b: (b, h, 0))
    specs = _Inputs(
        queries(q.shape[3]), keys(k.shape[3]), keys(v.shape[3]), queries(v.shape[3]), row, row,
        jax.tree.map(lambda x: _side(x, x.shape[1], lambda j: 0), inputs.queries),
        jax.tree.map(lambda x: _side(x, tiles.block_kv, lambda j: j), inputs.keys),
        common.map_specs(inputs.visits, lambda j, h, b: (b, j)), None,
    )  # fmt: skip
    dk, dv = pl.pallas_call(
        functools.partial(_ringjax_dkv, static, jax.tree.structure(inputs)),
        out_shape=result,
        grid=(static.num_kv, k.shape[1], k.shape[0]),
        in_specs=jax.tree.leaves(specs),
        out_specs=(specs.k, specs.v),
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_dkv",
    )(*jax.tree.leaves(inputs))
    return token_major(dk), token_major(dv)


def dq(
    q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, mask: Mask, params: KernelParams,
    tiles: TileSizes, *, dq_carry: Array | None,
) -> Array:  # fmt: skip
    """dq_carry + dq of :class:`ringjax.kernels.base.Kernel`."""
    inputs, static = _prepare(q, k, v, dout, lse, delta, mask, params, tiles, rows="queries")
    tile = lambda i: static.num_q - 1 - i  # noqa: E731  see _ringjax_dq
    queries, keys = _sides(inputs, static, rows="queries")
    row = pl.BlockSpec((None, None, tiles.block_q), lambda i, n, b: (b, n, tile(i)))
    specs = _Inputs(
        queries(q.shape[3]), keys(k.shape[3]), keys(v.shape[3]), queries(v.shape[3]), row, row,
        jax.tree.map(lambda x: _side(x, tiles.block_q, tile), inputs.queries),
        jax.tree.map(lambda x: _side(x, x.shape[1], lambda i: 0), inputs.keys),
        common.map_specs(inputs.visits, lambda i, n, b: (b, tile(i))),
        None if dq_carry is None else queries(q.shape[3]),
    )  # fmt: skip
    aliases = {}
    if dq_carry is not None:
        inputs = inputs._replace(dq=token_major(dq_carry))
        aliases = {len(jax.tree.leaves(inputs)) - 1: 0}
    (result,) = pl.pallas_call(
        functools.partial(_ringjax_dq, static, jax.tree.structure(inputs)),
        out_shape=(shape_like(token_major(q).shape, jnp.float32, q),),
        grid=(static.num_q, q.shape[1], q.shape[0]),
        in_specs=jax.tree.leaves(specs),
        out_specs=(specs.q,),
        input_output_aliases=aliases,
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_dq",
    )(*jax.tree.leaves(inputs))
    return token_major(result)


def _prepare(
    q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, mask: Mask, params: KernelParams,
    tiles: TileSizes, *, rows: str,
) -> tuple[_Inputs, _Static]:  # fmt: skip
    q_length, k_length = q.shape[2], k.shape[2]
    mask, visits = common.plan_visits(mask, tiles, q_length, k_length, rows=rows)
    static = _Static(
        params, tiles, q_length if q_length % tiles.block_q else None, k_length if k_length % tiles.block_kv else None,
        pl.cdiv(q_length, tiles.block_q), pl.cdiv(k_length, tiles.block_kv), q.shape[1] // k.shape[1],
        (q.shape[3], v.shape[3]),
    )  # fmt: skip
    q, k, v, dout = (token_major(x) for x in (q, k, v, dout))
    queries, keys = mask.sides()
    return _Inputs(q, k, v, dout, lse, delta, queries, keys, visits, None), static


def _sides(inputs: _Inputs, static: _Static, *, rows: str) -> tuple[Any, Any]:
    """BlockSpecs by head size, of arrays of queries and of keys: a tile of the rows, all of the columns.

    Where keys are rows, a program sees all query heads of its group.
    """
    tiles, group = static.tiles, static.group
    if rows == "keys":
        q_shape, kv_shape = (None, inputs.q.shape[1], group), (None, tiles.block_kv, None)
        q_index = lambda j, h, b: (b, 0, h, 0)  # noqa: E731
        kv_index = lambda j, h, b: (b, j, h, 0)  # noqa: E731
    else:
        q_shape, kv_shape = (None, tiles.block_q, None), (None, inputs.k.shape[1], None)
        q_index = lambda i, n, b: (b, static.num_q - 1 - i, n, 0)  # noqa: E731
        kv_index = lambda i, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), 0)  # noqa: E731
    return (
        lambda size: pl.BlockSpec((*q_shape, common.padded_size(size)), q_index),
        lambda size: pl.BlockSpec((*kv_shape, common.padded_size(size)), kv_index),
    )


def _side(x: Array, block: int, tile: Any) -> pl.BlockSpec:
    """The BlockSpec of one array of the mask."""
    one = x.shape[0] == 1
    return pl.BlockSpec((None, block), lambda i, n, b: (0 if one else b, tile(i)))


def _ringjax_dkv(static: _Static, structure: Any, *refs: Any) -> None:
    """The body of the kernel for dk and dv. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    out = refs[structure.num_leaves :]
    block, start = static.tiles.block_kv, pl.program_id(0) * static.tiles.block_kv
    masks = [within(start, block, static.kv_length, size) for size in static.sizes]
    k, v = (load(ref, mask) for ref, mask in zip((x.k, x.v), masks, strict=True))
    keys = jax.tree.map(lambda ref: ref[...][:, None], x.keys)

    def step(i: Array, g: Array, sums: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
        dk, dv, poisoned = sums
        q, dout, lse, delta, allowed = _queries(x, keys, i, g, static, masked)
        p, ds = _weigh(dot(k, q, (1, 1)), dot(v, dout, (1, 1)), lse[None, :], delta[None, :], allowed, static.params)
        if masked:
            poisoned = jnp.maximum(poisoned, jnp.max(badness(dout).astype(jnp.float32)))
            # An attended NaN or Inf is in p and ds already; one that is masked out must not meet a 0 there.
            q, dout = clean(q), clean(dout)
        dv = dv + dot(p.astype(dout.dtype), dout, (1, 0))
        return dk + dot(ds.astype(q.dtype), q, (1, 0)), dv, poisoned

    def mark(i: Array, g: Array, dv: Array) -> Array:
        _, dout, _, _, allowed = _queries(x, keys, i, g, static, True)
        return _mark_poison(dv, dout, allowed)

    dk, dv = (jnp.zeros(ref.shape, jnp.float32) for ref in (x.k, x.v))
    dk, dv, poisoned = common.visit(x.visits, static.num_q, step, (dk, dv, jnp.float32(0)), repeat=static.group)
    dv = common.revisit(x.visits, poisoned > 0, mark, dv, repeat=static.group)
    for ref, value, mask in zip(out, (dk, dv), masks, strict=True):
        store(ref, value, mask)


def _queries(
    x: _Inputs, keys: KeySide, i: Array, g: Array, static: _Static, masked: bool
) -> tuple[Array, Array, Array, Array, Any]:
    """A tile of queries of head g of the group; of a PARTIAL one also who attends whom. FULL ones are never ragged."""
    block, length = static.tiles.block_q, static.q_length if masked else None
    start = i * block
    rows = pl.ds(start, block)
    q, dout = (
        load(ref.at[rows, g, :], within(start, block, length, n))
        for ref, n in zip((x.q, x.dout), static.sizes, strict=True)
    )
    lse, delta = (load(ref.at[g, rows], within(start, block, length)) for ref in (x.lse, x.delta))
    if not masked:
        return q, dout, lse, delta, None
    queries = jax.tree.map(lambda ref: ref[rows][None, :], x.queries)
    return q, dout, lse, delta, jnp.broadcast_to(attends(queries, keys), (static.tiles.block_kv, block))


def _ringjax_dq(static: _Static, structure: Any, *refs: Any) -> None:
    """The body of the kernel for dq. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    (out,) = refs[structure.num_leaves :]
    block = static.tiles.block_q
    # Under a causal mask the last tiles take longest: they start first.
    start = (static.num_q - 1 - pl.program_id(0)) * block
    of_q, of_dout = (within(start, block, static.q_length, size) for size in static.sizes)
    of_rows = within(start, block, static.q_length)
    q, dout, lse, delta = load(x.q, of_q), load(x.dout, of_dout), load(x.lse, of_rows), load(x.delta, of_rows)
    queries = jax.tree.map(lambda ref: ref[...][:, None], x.queries)

    def step(j: Array, part: Array, total: Array, masked: bool) -> Array:
        del part  # Unused.
        k, v, allowed = _keys(x, queries, j, static, masked)
        _, ds = _weigh(dot(q, k, (1, 1)), dot(dout, v, (1, 1)), lse[:, None], delta[:, None], allowed, static.params)
        return total + dot(ds.astype(k.dtype), clean(k) if masked else k, (1, 0))

    total = common.visit(x.visits, static.num_kv, step, jnp.zeros(x.q.shape, jnp.float32))
    store(out, total if x.dq is None else load(x.dq, of_q) + total, of_q)


def _keys(x: _Inputs, queries: QuerySide, j: Array, static: _Static, masked: bool) -> tuple[Array, Array, Any]:
    """A tile of keys and values; of a PARTIAL one also who attends whom. FULL ones are never ragged."""
    block, length = static.tiles.block_kv, static.kv_length if masked else None
    start = j * block
    rows = pl.ds(start, block)
    k, v = (
        load(ref.at[rows, :], within(start, block, length, n)) for ref, n in zip((x.k, x.v), static.sizes, strict=True)
    )
    if not masked:
        return k, v, None
    keys = jax.tree.map(lambda ref: ref[rows][None, :], x.keys)
    return k, v, jnp.broadcast_to(attends(queries, keys), (static.tiles.block_q, block))


def _weigh(
    products: Array, dp: Array, lse: Array, delta: Array, allowed: Array | None, params: KernelParams
) -> tuple[Array, Array]:
    """p and ds of a tile, either way round; lse and delta as rows or columns."""
    s = scores(products, params)
    p = _probabilities(s, lse, params)
    if params.logits_soft_cap is None:
        ds = p * (dp * params.scale - delta * params.scale)
    else:
        ds = p * (dp - delta) * (params.scale * (1.0 - s * s))
    if allowed is None:
        return p, ds
    return jnp.where(allowed, p, 0.0), jnp.where(allowed, ds, 0.0)


def _probabilities(s: Array, lse: Array, params: KernelParams) -> Array:
    """exp(f s - lse), subtracted before it is multiplied, as in the forward kernel."""
    f = factor(params)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # a query that attends nothing is masked out everywhere: any will do
    if f == 0:
        return jnp.exp(jnp.broadcast_to(-lse, s.shape) + s * f)
    return exp2((s - lse / f) * (f * LOG2_E), params)


def _mark_poison(dv: Array, dout: Array, allowed: Array) -> Array:
    """NaN for the keys that a query attends whose cotangent is NaN or Inf."""
    hits = dot(jnp.where(allowed, 1.0, 0.0).astype(dout.dtype), badness(dout), (1, 0))
    return jnp.where(hits > 0.0, jnp.nan, dv)
