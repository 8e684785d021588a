"""The backward block kernels in Triton: one for dk and dv, one for dq.

Each program owns the gradients of its rows and sums them in registers, so the order of additions is fixed and nothing
is added atomically. dkv: a grid over (tile of keys, K/V head, batch row), a loop over the tiles of queries that attend
to them, of all query heads of the group; logits are transposed there, keys along rows, so that p and ds are left
operands as they come. dq: a grid over (tile of queries, query head, batch row), a loop over the tiles of keys that they
attend to.

FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the equations are in base.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ..._compat import shape_like
from ...mask import KeySide, QuerySide, Rule, attends
from ..base import Block, KernelParams, Upstream
from ..softmax import LOG2_E, Normaliser, clean, factor, normaliser, scores, slope
from . import common
from .common import MaskInputs, badness, dot, exp2, load, store, token_major, within
from .tiles import TileSizes, padded_size


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    dout: Any  # [B, T, N, Hv]
    by: Normaliser  # of [B, N, T]
    delta: Any  # [B, N, T]
    mask: MaskInputs
    dq: Any  # the carry [B, T, N, H]


@dataclasses.dataclass(frozen=True)
class _Static:
    params: KernelParams
    tiles: TileSizes
    rule: Rule
    q_length: int | None  # None: no tile is ragged
    kv_length: int | None
    num_q: int
    num_kv: int
    group: int
    sizes: tuple[int, int]  # H, Hv


def dkv(block: Block, upstream: Upstream, params: KernelParams, tiles: TileSizes) -> tuple[Array, Array]:
    """dk and dv of :class:`ringjax.kernels.base.Kernel`."""
    inputs, static = _prepare(block, upstream, params, tiles, rows="keys")
    _, _, q_length, _ = block.q.shape
    row = pl.BlockSpec((None, static.group, q_length), lambda j, h, b: (b, h, 0))
    specs = _specs(inputs, static, row, lambda j, h, b: (b, j), rows="keys")
    dk, dv = pl.pallas_call(
        functools.partial(_ringjax_dkv, static, jax.tree.structure(inputs)),
        out_shape=tuple(shape_like(x.shape, jnp.float32, x) for x in (inputs.k, inputs.v)),
        grid=(static.num_kv, *block.k.shape[1::-1]),
        in_specs=jax.tree.leaves(specs),
        out_specs=(specs.k, specs.v),
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_dkv",
    )(*jax.tree.leaves(inputs))
    return token_major(dk), token_major(dv)


def dq(block: Block, upstream: Upstream, params: KernelParams, tiles: TileSizes, carry: Array | None) -> Array:
    """The carry with dq of :class:`ringjax.kernels.base.Kernel` added, both token-major."""
    inputs, static = _prepare(block, upstream, params, tiles, rows="queries")
    inputs = inputs._replace(dq=carry)
    tile = lambda i: static.num_q - 1 - i  # noqa: E731  see _ringjax_dq
    row = pl.BlockSpec((None, None, tiles.block_q), lambda i, n, b: (b, n, tile(i)))
    specs = _specs(inputs, static, row, lambda i, n, b: (b, tile(i)), rows="queries")
    (result,) = pl.pallas_call(
        functools.partial(_ringjax_dq, static, jax.tree.structure(inputs)),
        out_shape=(shape_like(inputs.q.shape, jnp.float32, inputs.q),),
        grid=(static.num_q, *block.q.shape[1::-1]),
        in_specs=jax.tree.leaves(specs),
        out_specs=(specs.q,),
        input_output_aliases={} if carry is None else {len(jax.tree.leaves(inputs)) - 1: 0},
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_dq",
    )(*jax.tree.leaves(inputs))
    return result


def _prepare(
    block: Block, upstream: Upstream, params: KernelParams, tiles: TileSizes, *, rows: str
) -> tuple[_Inputs, _Static]:
    q, k, v, mask, _ = block
    q_length, k_length = q.shape[2], k.shape[2]
    of_mask, rule = common.mask_inputs(mask, tiles, q_length, k_length, rows=rows)
    static = _Static(
        params=params,
        tiles=tiles,
        rule=rule,
        q_length=q_length if q_length % tiles.block_q else None,
        kv_length=k_length if k_length % tiles.block_kv else None,
        num_q=pl.cdiv(q_length, tiles.block_q),
        num_kv=pl.cdiv(k_length, tiles.block_kv),
        group=q.shape[1] // k.shape[1],
        sizes=(q.shape[3], v.shape[3]),
    )
    inputs = _Inputs(
        q=token_major(q),
        k=token_major(k),
        v=token_major(v),
        dout=token_major(upstream.dout),
        by=normaliser(upstream.lse, upstream.saved, params),
        delta=upstream.delta,
        mask=of_mask,
        dq=None,
    )
    return inputs, static


def _specs(
    inputs: _Inputs, static: _Static, row: pl.BlockSpec, place: Callable[..., tuple[Any, Any]], *, rows: str
) -> _Inputs:
    """BlockSpecs: a tile of the rows, all of the columns. ``row`` is that of a number per query.

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
    queries = lambda size: pl.BlockSpec((*q_shape, padded_size(size)), q_index)  # noqa: E731
    keys = lambda size: pl.BlockSpec((*kv_shape, padded_size(size)), kv_index)  # noqa: E731
    size, v_size = static.sizes
    return _Inputs(
        q=queries(size),
        k=keys(size),
        v=keys(v_size),
        dout=queries(v_size),
        by=jax.tree.map(lambda _: row, inputs.by),
        delta=row,
        mask=common.mask_specs(inputs.mask, tiles, place, rows=rows),
        dq=None if inputs.dq is None else queries(size),
    )


def _ringjax_dkv(static: _Static, structure: Any, *refs: Any) -> None:
    """The body of the kernel for dk and dv. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    out = refs[structure.num_leaves :]
    block, start = static.tiles.block_kv, pl.program_id(0) * static.tiles.block_kv
    masks = [within(start, block, static.kv_length, size) for size in static.sizes]
    k, v = (load(ref, mask) for ref, mask in zip((x.k, x.v), masks, strict=True))
    keys = common.key_side(x.mask, static.rule, start, block, rows=True)
    keys = jax.tree.map(lambda vector: vector[:, None], keys)

    def step(i: Array, g: Array, sums: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
        dk, dv, poisoned = sums
        q, dout, by, delta, allowed = _queries(x, keys, i, g, static, masked)
        by = jax.tree.map(lambda row: row[None, :], by)
        p, ds = _weigh(dot(k, q, (1, 1)), dot(v, dout, (1, 1)), by, delta[None, :], allowed, static.params)
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
    dk, dv, poisoned = common.visit(x.mask.visits, static.num_q, step, (dk, dv, jnp.float32(0)), repeat=static.group)
    dv = common.revisit(x.mask.visits, poisoned > 0, mark, dv, repeat=static.group)
    for ref, value, mask in zip(out, (dk, dv), masks, strict=True):
        store(ref, value, mask)


def _queries(
    x: _Inputs, keys: KeySide, i: Array, g: Array, static: _Static, masked: bool
) -> tuple[Array, Array, Normaliser, Array, Any]:
    """A tile of queries of head g of the group; of a PARTIAL one also the predicate. FULL ones are never ragged."""
    block, length = static.tiles.block_q, static.q_length if masked else None
    start = i * block
    rows = pl.ds(start, block)
    q, dout = (
        load(ref.at[rows, g, :], within(start, block, length, n))
        for ref, n in zip((x.q, x.dout), static.sizes, strict=True)
    )
    by, delta = jax.tree.map(lambda ref: load(ref.at[g, rows], within(start, block, length)), (x.by, x.delta))
    if not masked:
        return q, dout, by, delta, None
    queries = common.query_side(x.mask, static.rule, start, block, rows=False)
    queries = jax.tree.map(lambda vector: vector[None, :], queries)
    return q, dout, by, delta, jnp.broadcast_to(attends(queries, keys), (static.tiles.block_kv, block))


def _ringjax_dq(static: _Static, structure: Any, *refs: Any) -> None:
    """The body of the kernel for dq. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    (out,) = refs[structure.num_leaves :]
    block = static.tiles.block_q
    # Under a causal mask the last tiles take longest: they start first.
    start = (static.num_q - 1 - pl.program_id(0)) * block
    of_q, of_dout = (within(start, block, static.q_length, size) for size in static.sizes)
    of_rows = within(start, block, static.q_length)
    q, dout, delta = load(x.q, of_q), load(x.dout, of_dout), load(x.delta, of_rows)
    by = jax.tree.map(lambda ref: load(ref, of_rows)[:, None], x.by)
    queries = common.query_side(x.mask, static.rule, start, block, rows=True)
    queries = jax.tree.map(lambda vector: vector[:, None], queries)

    def step(j: Array, part: Array, total: Array, masked: bool) -> Array:
        del part  # Unused.
        k, v, allowed = _keys(x, queries, j, static, masked)
        _, ds = _weigh(dot(q, k, (1, 1)), dot(dout, v, (1, 1)), by, delta[:, None], allowed, static.params)
        return total + dot(ds.astype(k.dtype), clean(k) if masked else k, (1, 0))

    total = common.visit(x.mask.visits, static.num_kv, step, jnp.zeros(x.q.shape, jnp.float32))
    store(out, total if x.dq is None else load(x.dq, of_q) + total, of_q)


def _keys(x: _Inputs, queries: QuerySide, j: Array, static: _Static, masked: bool) -> tuple[Array, Array, Any]:
    """A tile of keys and values; of a PARTIAL one also who attends to whom. FULL ones are never ragged."""
    block, length = static.tiles.block_kv, static.kv_length if masked else None
    start = j * block
    rows = pl.ds(start, block)
    k, v = (
        load(ref.at[rows, :], within(start, block, length, n)) for ref, n in zip((x.k, x.v), static.sizes, strict=True)
    )
    if not masked:
        return k, v, None
    keys = common.key_side(x.mask, static.rule, start, block, rows=False)
    keys = jax.tree.map(lambda vector: vector[None, :], keys)
    return k, v, jnp.broadcast_to(attends(queries, keys), (static.tiles.block_q, block))


def _weigh(
    products: Array, dp: Array, by: Normaliser, delta: Array, allowed: Array | None, params: KernelParams
) -> tuple[Array, Array]:
    """p and ds of a tile, either way round; numbers per query are rows or columns."""
    s = scores(products, params)
    p = exp2((s - by.top) * (factor(params) * LOG2_E), params)
    p = p if by.weight is None else p * by.weight
    if params.logits_soft_cap is None:
        ds = p * (dp * params.scale - delta * params.scale)
    else:
        ds = p * (dp - delta) * slope(s, params)
    if allowed is None:
        return p, ds
    return jnp.where(allowed, p, 0.0), jnp.where(allowed, ds, 0.0)


def _mark_poison(dv: Array, dout: Array, allowed: Array) -> Array:
    """NaN for the keys that a query attends to whose cotangent is NaN or Inf."""
    hits = dot(jnp.where(allowed, 1.0, 0.0).astype(dout.dtype), badness(dout), (1, 0))
    return jnp.where(hits > 0.0, jnp.nan, dv)
