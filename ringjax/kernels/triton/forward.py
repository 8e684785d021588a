"""The forward block kernel in Triton: folds one K/V block into the running softmax, which goes in and comes out.

A grid over (tile of queries, query head, batch row). The running softmax of a tile of queries lives in registers while
a loop passes over the tiles of keys that it sees: FULL ones first, without a predicate, then PARTIAL ones. With
logits = f s, where s are the products q.k and f the scale (with a cap: s = tanh(scale q.k / cap), f = cap),

    m = max s,    p = exp2((s - m) f LOG2_E),    l = sum p,    acc = sum p v,    lse = f m + log(l):

the factor comes after the subtraction, so that rounding grows with s - m and not with s. The maximum in the carry is
m, which only this kernel reads. Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
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
from ...partial import NO_LOGIT, Partial, identity
from ..base import KernelParams
from ..softmax import LOG2_E, clean, factor, scores
from . import common
from .common import TileSizes, badness, dot, exp2, load, store, token_major, within


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    queries: QuerySide  # of [B1, T], whole tiles
    keys: KeySide  # of [B1, S], whole tiles
    visits: BlockMap | None
    carry: Any  # (acc, max, sum) of [B, T, N, Hv], [B, N, T], [B, N, T]
    sinks: Any  # [N]


@dataclasses.dataclass(frozen=True)
class _Static:
    params: KernelParams
    tiles: TileSizes
    q_length: int | None  # None: no tile is ragged
    kv_length: int | None
    num_q: int
    num_kv: int
    sizes: tuple[int, int]  # H, Hv
    finish: bool


def forward(
    q: Array, k: Array, v: Array, mask: Mask, params: KernelParams, tiles: TileSizes, *,
    carry: Partial | None, finish: bool, sinks: Array | None,
) -> Partial | tuple[Array, Array]:  # fmt: skip
    """See :class:`ringjax.kernels.base.Kernel`."""
    (batch, heads, q_length, size), (k_length, v_size) = q.shape, v.shape[2:]
    mask, visits = common.plan_visits(mask, tiles, q_length, k_length, rows="queries")
    queries, keys = mask.sides()
    rows = None
    if carry is not None:
        rows = (token_major(carry.acc), carry.max, carry.sum)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    inputs = _Inputs(token_major(q), token_major(k), token_major(v), queries, keys, visits, rows, sinks)
    static = _Static(
        params, tiles, q_length if q_length % tiles.block_q else None, k_length if k_length % tiles.block_kv else None,
        pl.cdiv(q_length, tiles.block_q), pl.cdiv(k_length, tiles.block_kv), (size, v_size), finish,
    )  # fmt: skip
    specs, result_specs = _block_specs(inputs, static)
    row = shape_like((batch, heads, q_length), jnp.float32, q)
    acc = shape_like((batch, q_length, heads, v_size), q.dtype if finish else jnp.float32, q)
    aliases = {}
    if carry is not None and not finish:
        before = len(jax.tree.leaves(inputs[:6]))
        aliases = {before + i: i for i in range(3)}
    out = pl.pallas_call(
        functools.partial(_ringjax_forward, static, jax.tree.structure(inputs)),
        out_shape=(acc, row, row)[: len(result_specs)],
        grid=(static.num_q, heads, batch),
        in_specs=jax.tree.leaves(specs),
        out_specs=result_specs,
        input_output_aliases=aliases,
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_forward",
    )(*jax.tree.leaves(inputs))
    if finish:
        return token_major(out[0]), out[1]
    return Partial(token_major(out[0]), out[1], out[2])


def _block_specs(inputs: _Inputs, static: _Static) -> tuple[_Inputs, tuple[pl.BlockSpec, ...]]:
    """Which block of each array a program sees, and of each result: a tile of queries, and all keys of its K/V head."""
    tiles, group = static.tiles, inputs.q.shape[2] // inputs.k.shape[2]
    size, v_size = map(common.padded_size, static.sizes)

    def tile(i: Any) -> Any:
        return static.num_q - 1 - i  # under a causal mask the last tiles take longest: start with them

    def keys_of_head(size: int) -> pl.BlockSpec:
        shape = (None, inputs.k.shape[1], None, size)
        return pl.BlockSpec(shape, lambda i, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), 0))

    def side(x: Array, block: int, index: Any) -> pl.BlockSpec:
        one = x.shape[0] == 1
        return pl.BlockSpec((None, block), lambda i, n, b: (0 if one else b, index(i)))

    queries_of_head = lambda size: pl.BlockSpec(  # noqa: E731
        (None, tiles.block_q, None, size), lambda i, n, b: (b, tile(i), n, 0)
    )
    row = pl.BlockSpec((None, None, tiles.block_q), lambda i, n, b: (b, n, tile(i)))
    rows = (queries_of_head(v_size), row, row)
    specs = _Inputs(
        queries_of_head(size),
        keys_of_head(size),
        keys_of_head(v_size),
        jax.tree.map(lambda x: side(x, tiles.block_q, tile), inputs.queries),
        jax.tree.map(lambda x: side(x, x.shape[1], lambda i: 0), inputs.keys),
        common.map_specs(inputs.visits, lambda i, n, b: (b, tile(i))),
        None if inputs.carry is None else rows,
        None if inputs.sinks is None else pl.BlockSpec((None,), lambda i, n, b: (n,)),
    )
    return specs, rows[: 2 if static.finish else 3]


def _ringjax_forward(static: _Static, structure: Any, *refs: Any) -> None:
    """The kernel's body. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    out = refs[structure.num_leaves :]
    tiles = static.tiles
    first_query = (static.num_q - 1 - pl.program_id(0)) * tiles.block_q
    of_rows = within(first_query, tiles.block_q, static.q_length)
    of_values = within(first_query, tiles.block_q, static.q_length, static.sizes[1])
    q = load(x.q, within(first_query, tiles.block_q, static.q_length, static.sizes[0]))
    queries = jax.tree.map(lambda ref: ref[...][:, None], x.queries)
    state = _init(x, static, of_rows, of_values)

    def step(j: Array, part: Array, carry: tuple[Partial, Array], masked: bool) -> tuple[Partial, Array]:
        del part  # Unused.
        state, poisoned = carry
        k, v, allowed = _keys(x, queries, j, static, masked)
        if masked:
            poisoned = jnp.maximum(poisoned, jnp.max(badness(v).astype(jnp.float32)))
        return _fold(state, q, k, v, allowed, static.params), poisoned

    def mark(j: Array, part: Array, acc: Array) -> Array:
        del part  # Unused.
        _, v, allowed = _keys(x, queries, j, static, True)
        return _mark_poison(acc, v, allowed)

    state, poisoned = common.visit(x.visits, static.num_kv, step, (state, jnp.float32(0)))
    state = state._replace(acc=common.revisit(x.visits, poisoned > 0, mark, state.acc))
    results = _finish(x, state, static.params) if static.finish else state
    for ref, value in zip(out, results, strict=True):
        store(ref, value, of_values if value.ndim == 2 else of_rows)


def _init(x: _Inputs, static: _Static, of_rows: Array | None, of_values: Array | None) -> Partial:
    if x.carry is not None:
        acc, top, total = x.carry
        return Partial(load(acc, of_values), load(top, of_rows), load(total, of_rows))
    return identity((static.tiles.block_q,), common.padded_size(static.sizes[1]), jnp.dtype("float32"))


def _keys(x: _Inputs, queries: QuerySide, j: Array, static: _Static, masked: bool) -> tuple[Array, Array, Any]:
    """A tile of keys and values; for a PARTIAL one also who attends whom. FULL ones are never ragged."""
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


def _fold(state: Partial, q: Array, k: Array, v: Array, allowed: Array | None, params: KernelParams) -> Partial:
    """One step of the online softmax for a tile of queries and a tile of keys."""
    s, in_base_2 = scores(dot(q, k, (1, 1)), params), factor(params) * LOG2_E
    if allowed is not None:
        s = jnp.where(allowed, s, NO_LOGIT)
    new = jnp.maximum(state.max, jnp.max(s, axis=1))
    p = exp2((s - new[:, None]) * in_base_2, params)
    if allowed is not None:
        p = jnp.where(allowed, p, 0.0)  # while nothing is attended, exp2(NO_LOGIT - NO_LOGIT) is 1
    rescale = exp2((state.max - new) * in_base_2, params)
    values = dot(p.astype(v.dtype), v if allowed is None else clean(v), (1, 0))
    return Partial(state.acc * rescale[:, None] + values, new, state.sum * rescale + jnp.sum(p, axis=1))


def _mark_poison(acc: Array, v: Array, allowed: Array) -> Array:
    """NaN in the output of the queries that attend a value that is NaN or Inf (0 * NaN would reach the others too)."""
    hits = dot(jnp.where(allowed, 1.0, 0.0).astype(v.dtype), badness(v), (1, 0))
    return jnp.where(hits > 0.0, jnp.nan, acc)


def _finish(x: _Inputs, state: Partial, params: KernelParams) -> tuple[Array, Array]:
    """out = acc / l,  lse = f m + log(l);  over no keys 0 and -inf. See :func:`ringjax.partial.finish`."""
    acc, top, total = state
    top = top * factor(params)
    if x.sinks is not None:
        new = jnp.maximum(top, x.sinks[...])
        rescale = jnp.exp(top - new)
        acc, total, top = acc * rescale[:, None], total * rescale + jnp.exp(x.sinks[...] - new), new
    some = total != 0  # NaN counts as some: a NaN logit must show
    safe = jnp.where(some, total, 1.0)
    return acc / safe[:, None], jnp.where(some, top + jnp.log(safe), -jnp.inf)
