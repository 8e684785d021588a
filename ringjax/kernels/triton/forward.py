"""The forward block kernel in Triton: folds one K/V block into the running softmax, which goes in and comes out.

A grid over (tile of queries, query head, batch row). The running softmax of a tile of queries lives in registers while
a loop passes over the tiles of keys that it attends to: FULL ones first, without a predicate, then PARTIAL ones. With
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
from ...mask import QuerySide, Rule, attends
from ...partial import NO_LOGIT, Partial, close, identity
from ..base import Block, Finished, KernelParams
from ..softmax import LOG2_E, Normaliser, clean, factor, scores, to_save
from . import common
from .common import MaskInputs, badness, dot, exp2, load, store, token_major, within
from .tiles import TileSizes, padded_size


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    mask: MaskInputs
    carry: Any  # (acc, max, sum) of [B, T, N, Hv], [B, N, T], [B, N, T]
    sinks: Any  # [N]


@dataclasses.dataclass(frozen=True)
class _Static:
    params: KernelParams
    tiles: TileSizes
    rule: Rule
    q_length: int | None  # None: no tile is ragged
    kv_length: int | None
    num_q: int
    num_kv: int
    sizes: tuple[int, int]  # H, Hv
    finish: bool
    saves: bool  # for backward


def forward(
    block: Block, params: KernelParams, tiles: TileSizes, carry: Partial | None, *, finish: bool
) -> Partial | Finished:
    """See :class:`ringjax.kernels.base.Kernel`. The carry's acc is token-major."""
    q, k, v, mask, sinks = block
    (batch, heads, q_length, size), (k_length, v_size) = q.shape, v.shape[2:]
    of_mask, rule = common.mask_inputs(mask, tiles, q_length, k_length, rows="queries")
    inputs = _Inputs(
        q=token_major(q),
        k=token_major(k),
        v=token_major(v),
        mask=of_mask,
        carry=None if carry is None else tuple(carry),
        sinks=sinks.astype(jnp.float32) if sinks is not None and finish else None,
    )
    static = _Static(
        params=params,
        tiles=tiles,
        rule=rule,
        q_length=q_length if q_length % tiles.block_q else None,
        kv_length=k_length if k_length % tiles.block_kv else None,
        num_q=pl.cdiv(q_length, tiles.block_q),
        num_kv=pl.cdiv(k_length, tiles.block_kv),
        sizes=(size, v_size),
        finish=finish,
        saves=q.dtype == jnp.float32,
    )
    specs, result_specs = _block_specs(inputs, static)
    row = shape_like((batch, heads, q_length), jnp.float32, q)
    acc = shape_like((batch, q_length, heads, v_size), q.dtype if finish else jnp.float32, q)
    aliases = {}
    if carry is not None and not finish:
        before = len(jax.tree.leaves(inputs[:4]))
        aliases = {before + i: i for i in range(3)}
    out = pl.pallas_call(
        functools.partial(_ringjax_forward, static, jax.tree.structure(inputs)),
        out_shape=(acc, *(row for _ in result_specs[1:])),
        grid=(static.num_q, heads, batch),
        in_specs=jax.tree.leaves(specs),
        out_specs=result_specs,
        input_output_aliases=aliases,
        compiler_params=tiles.compiler_params,
        interpret=params.interpret,
        name="ringjax_forward",
    )(*jax.tree.leaves(inputs))
    if not finish:
        return Partial(*out)
    saved = Normaliser(*out[2:4]) if static.saves else None
    sink = out[4] if len(out) == 5 else None
    return Finished(out=token_major(out[0]), lse=out[1], saved=saved, sink=sink)


def _tile(static: _Static, i: Any) -> Any:
    return static.num_q - 1 - i  # under a causal mask the last tiles take longest: start with them


def _block_specs(inputs: _Inputs, static: _Static) -> tuple[_Inputs, tuple[pl.BlockSpec, ...]]:
    """Which block of each array a program sees, and of each result: a tile of queries, and all keys of its K/V head."""
    tiles, group = static.tiles, inputs.q.shape[2] // inputs.k.shape[2]
    size, v_size = map(padded_size, static.sizes)

    def keys_of_head(size: int) -> pl.BlockSpec:
        shape = (None, inputs.k.shape[1], None, size)
        return pl.BlockSpec(shape, lambda i, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), 0))

    queries_of_head = lambda size: pl.BlockSpec(  # noqa: E731
        (None, tiles.block_q, None, size), lambda i, n, b: (b, _tile(static, i), n, 0)
    )
    row = pl.BlockSpec((None, None, tiles.block_q), lambda i, n, b: (b, n, _tile(static, i)))
    rows = (queries_of_head(v_size), row, row)
    specs = _Inputs(
        q=queries_of_head(size),
        k=keys_of_head(size),
        v=keys_of_head(v_size),
        mask=common.mask_specs(inputs.mask, tiles, lambda i, n, b: (b, _tile(static, i)), rows="queries"),
        carry=None if inputs.carry is None else rows,
        sinks=None if inputs.sinks is None else pl.BlockSpec((None,), lambda i, n, b: (n,)),
    )
    if not static.finish:
        return specs, rows
    num_saved = 0 if not static.saves else 2 if inputs.sinks is None else 3
    return specs, (rows[0], row, *(row,) * num_saved)


def _ringjax_forward(static: _Static, structure: Any, *refs: Any) -> None:
    """The kernel's body. ``structure`` is that of what goes in, some of which may be absent."""
    x: _Inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    out = refs[structure.num_leaves :]
    tiles = static.tiles
    first_query = _tile(static, pl.program_id(0)) * tiles.block_q
    of_rows = within(first_query, tiles.block_q, static.q_length)
    of_values = within(first_query, tiles.block_q, static.q_length, static.sizes[1])
    q = load(x.q, within(first_query, tiles.block_q, static.q_length, static.sizes[0]))
    queries = common.query_side(x.mask, static.rule, first_query, tiles.block_q, rows=True)
    queries = jax.tree.map(lambda vector: vector[:, None], queries)
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

    state, poisoned = common.visit(x.mask.visits, static.num_kv, step, (state, jnp.float32(0)))
    state = state._replace(acc=common.revisit(x.mask.visits, poisoned > 0, mark, state.acc))
    results = _finish(x, state, q.dtype, static.params) if static.finish else state
    for ref, value in zip(out, results, strict=True):
        store(ref, value, of_values if value.ndim == 2 else of_rows)


def _init(x: _Inputs, static: _Static, of_rows: Array | None, of_values: Array | None) -> Partial:
    if x.carry is not None:
        acc, top, total = x.carry
        return Partial(load(acc, of_values), load(top, of_rows), load(total, of_rows))
    return identity((static.tiles.block_q,), padded_size(static.sizes[1]), jnp.dtype("float32"))


def _keys(x: _Inputs, queries: QuerySide, j: Array, static: _Static, masked: bool) -> tuple[Array, Array, Any]:
    """A tile of keys and values; for a PARTIAL one also who attends to whom. FULL ones are never ragged."""
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
    """NaN in the output of queries that attend to a value that is NaN or Inf (0 * NaN would reach the others too)."""
    hits = dot(jnp.where(allowed, 1.0, 0.0).astype(v.dtype), badness(v), (1, 0))
    return jnp.where(hits > 0.0, jnp.nan, acc)


def _finish(x: _Inputs, state: Partial, dtype: Any, params: KernelParams) -> tuple[Array, ...]:
    """See :func:`ringjax.partial.finish`; the maximum of the logits is f m."""
    end = close(state.max, state.sum, None if x.sinks is None else x.sinks[...], factor(params))
    saved: Any = to_save(dtype, state.max, state.sum, end.weight)
    of_sink = () if saved is None or end.sink is None else (end.sink,)
    return state.acc * end.weight[:, None], end.lse, *(saved or ()), *of_sink
