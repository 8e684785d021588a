"""The forward block kernel for TPU: folds one K/V block into the running softmax, which goes in and comes out.

A grid over (batch row, query head, visited tile). The running softmax of a tile of queries lives in VMEM while the
tiles of keys that it sees pass by: FULL ones without a predicate, EMPTY ones not at all. With logits = f s, where s
are the products q.k and f the scale (with a cap: s = tanh(scale q.k / cap), f = cap),

    m = max s,    p = exp2((s - m) f LOG2_E),    l = sum p,    acc = sum p v,    lse = f m + log(l):

one multiplication a logit, after the subtraction, so that rounding grows with s - m and not with s. The maximum in the
carry is m, which only this kernel reads. Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._compat import shape_like
from ...mask import FULL, PARTIAL, Mask, attends
from ...partial import NO_LOGIT, Partial
from ..base import KernelParams
from ..softmax import LOG2_E, clean, factor, is_finite, scores
from . import common
from .common import LANES, Visits, column, dot, repeat_lanes

# Queries of a PARTIAL tile worked on at a time.
_PARTIAL_ROWS = 256


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any
    k: Any
    v: Any
    queries: Any  # QuerySide of [B1, 1, T]
    keys: Any  # KeySide of [B1, 1, S]
    carry: Any  # (acc, max, sum) of [B, N, T, Hv], [B, N, 1, T], [B, N, 1, T]
    sinks: Any  # [N] in SMEM


class _State(NamedTuple):
    """The running softmax of one tile of queries, in VMEM."""

    acc: Any  # [block_q, Hv]
    max: Any  # [block_q, lanes], all lanes equal
    sum: Any  # [block_q, lanes], without the carry's, to be summed over lanes at the end


@dataclasses.dataclass(frozen=True)
class _Static:
    visits: Visits
    params: KernelParams
    sub: int
    finish: bool


def forward(
    q: Array, k: Array, v: Array, mask: Mask, params: KernelParams, tiles: common.TileSizes, *,
    carry: Partial | None, finish: bool, sinks: Array | None,
) -> Partial | tuple[Array, Array]:  # fmt: skip
    """See :class:`ringjax.kernels.base.Kernel`."""
    (batch, heads, q_length, _), (_, _, k_length, v_size) = q.shape, (*k.shape[:3], v.shape[3])
    num_q, num_kv = pl.cdiv(q_length, tiles.block_q), pl.cdiv(k_length, tiles.block_kv)
    if not mask.is_full or k_length % tiles.block_kv:
        # What lies beyond the last key of a ragged tile is nobody's key.
        mask = mask.padded(q_length, num_q * tiles.block_q, k_length, num_kv * tiles.block_kv)
    plan = common.plan_visits(mask, tiles, num_q, num_kv, rows="queries")
    visits, (prefetch, num_steps) = plan.visits, plan.chunk(0)
    queries, keys = common.mask_sides(mask)
    rows = None
    if carry is not None:
        rows = (carry.acc, carry.max[:, :, None], carry.sum[:, :, None])
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    inputs = _Inputs(q, k, v, queries, keys, rows, sinks)
    specs = _block_specs(inputs, visits, tiles)

    acc_dtype = q.dtype if finish else jnp.float32
    row = shape_like((batch, heads, 1, q_length), jnp.float32, q)
    result = (shape_like((batch, heads, q_length, v_size), acc_dtype, q), row, row)
    num_results = 2 if finish else 3
    aliases = {}
    if carry is not None and not finish:
        before = len(prefetch) + len(jax.tree.leaves(inputs[:5]))
        aliases = {before + i: i for i in range(3)}
    lanes = min(LANES, tiles.sub_kv)
    state = _State(*(pltpu.VMEM((tiles.block_q, n), jnp.float32) for n in (v_size, lanes, lanes)))
    products = batch * heads * q_length * k_length
    out = pl.pallas_call(
        _Kernel(_Static(visits, params, tiles.sub_kv, finish), jax.tree.structure(inputs)),
        out_shape=result[:num_results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(batch, heads, num_steps),
            in_specs=jax.tree.leaves(specs if carry is not None else specs._replace(carry=None)),
            out_specs=specs.carry[:num_results],
            scratch_shapes=tuple(state),
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * (q.shape[3] + v_size),
            transcendentals=products,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v)) + 8 * q.size,
        ),
        interpret=params.interpret,
        name="ringjax_forward",
    )(*prefetch, *jax.tree.leaves(inputs))
    if finish:
        return out[0], out[1][:, :, 0]
    return Partial(out[0], out[1][:, :, 0], out[2][:, :, 0])


def _block_specs(inputs: _Inputs, visits: Visits, tiles: common.TileSizes) -> _Inputs:
    """Which block of each array a step works on. Present for all inputs that are; the carry's serve the result too."""
    group = inputs.q.shape[1] // inputs.k.shape[1]

    def spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        def index_map(b: Any, n: Any, s: Any, *prefetched: Any) -> tuple[Any, ...]:
            return index(b, n, visits.step(prefetched, b, s))

        return pl.BlockSpec(shape, index_map)

    def side(x: Array, block: int, tile: Any) -> pl.BlockSpec:
        one = x.shape[0] == 1
        return spec((None, 1, block), lambda b, n, step: (0 if one else b, 0, tile(step)))

    q_rows = lambda size: spec((None, None, tiles.block_q, size), lambda b, n, step: (b, n, step.row, 0))  # noqa: E731
    kv_rows = lambda size: spec(  # noqa: E731
        (None, None, tiles.block_kv, size), lambda b, n, step: (b, jax.lax.div(n, jnp.int32(group)), step.column, 0)
    )
    row = spec((None, None, 1, tiles.block_q), lambda b, n, step: (b, n, 0, step.row))
    return _Inputs(
        q_rows(inputs.q.shape[3]),
        kv_rows(inputs.k.shape[3]),
        kv_rows(inputs.v.shape[3]),
        jax.tree.map(lambda x: side(x, tiles.block_q, lambda step: step.row), inputs.queries),
        jax.tree.map(lambda x: side(x, tiles.block_kv, lambda step: step.column), inputs.keys),
        (q_rows(inputs.v.shape[3]), row, row),
        None if inputs.sinks is None else pl.BlockSpec(memory_space=pltpu.SMEM),
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel's body. ``inputs`` is the structure of what goes in, some of which may be absent."""

    static: _Static
    inputs: Any

    def __call__(self, *refs: Any) -> None:
        visits = self.static.visits
        split = min(visits.lists, 1)
        prefetched, refs = refs[:split], refs[split:]
        x = jax.tree.unflatten(self.inputs, refs[: self.inputs.num_leaves])
        *out, acc, top, total = refs[self.inputs.num_leaves :]
        state = _State(acc, top, total)
        b, n, s = (pl.program_id(axis) for axis in range(3))
        step = visits.step(prefetched, b, s)
        pl.when(step.first)(lambda: _init(x, state))
        if not visits.lists:
            _fold_full(x, state, self.static)
        else:
            pl.when(step.kind == FULL)(lambda: _fold_full(x, state, self.static))
            pl.when(step.kind == PARTIAL)(lambda: _fold_partial(x, state, self.static))
        end = _finish if self.static.finish else _carry_on
        pl.when(step.last)(lambda: end(x, n, state, out, self.static.params))


def _init(x: _Inputs, state: _State) -> None:
    state.sum[...] = jnp.zeros_like(state.sum)
    if x.carry is None:
        state.acc[...] = jnp.zeros_like(state.acc)
        state.max[...] = jnp.full_like(state.max, NO_LOGIT)
    else:
        acc, top, _ = x.carry
        state.acc[...] = acc[...]
        state.max[...] = column(top[...], state.max.shape[1])


def _fold_full(x: _Inputs, state: _State, static: _Static) -> None:
    """A FULL tile of keys, ``sub`` at a time, all queries at once."""
    for start in range(0, x.k.shape[0], static.sub):
        _fold(x, state, static, slice(None), pl.ds(start, static.sub), masked=False)


def _fold_partial(x: _Inputs, state: _State, static: _Static) -> None:
    """A PARTIAL tile, in a compiled loop over pieces: few tiles are, and unrolled they would be most of the program."""
    rows, sub = common.sub_tile(x.q.shape[0], _PARTIAL_ROWS), static.sub
    pieces = x.k.shape[0] // sub

    def piece(index: Array, _: None) -> None:
        of_queries, of_keys = jax.lax.div(index, pieces) * rows, jax.lax.rem(index, pieces) * sub
        at = (pl.ds(pl.multiple_of(of_queries, rows), rows), pl.ds(pl.multiple_of(of_keys, sub), sub))
        _fold(x, state, static, *at, masked=True)

    jax.lax.fori_loop(0, x.q.shape[0] // rows * pieces, piece, None)


def _fold(x: _Inputs, state: _State, static: _Static, rows: Any, columns: Any, *, masked: bool) -> None:
    """One step of the online softmax for some of the tile's queries (rows) and keys (columns)."""
    k, v = x.k[columns], x.v[columns]
    s = scores(dot(x.q[rows], k, (1, 1)), static.params)
    in_base_2 = factor(static.params) * LOG2_E
    old = state.max[rows]
    if masked:
        allowed = _allowed(x, rows, columns, old.shape[1])
        s = jnp.where(allowed, s, NO_LOGIT)
    new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
    p = jnp.exp2((s - repeat_lanes(new, s.shape[1])) * in_base_2)
    if masked:
        p = jnp.where(allowed, p, 0.0)  # while nothing is attended, exp2(NO_LOGIT - NO_LOGIT) is 1
    rescale = jnp.exp2((old - new) * in_base_2)
    state.max[rows] = new
    state.sum[rows] = rescale * state.sum[rows] + _sum_to_lanes(p, old.shape[1])
    values = dot(p.astype(v.dtype), clean(v) if masked else v, (1, 0))
    state.acc[rows] = repeat_lanes(rescale, values.shape[1]) * state.acc[rows] + values
    if masked:
        _mark_poison(state, v, allowed, rows)


def _allowed(x: _Inputs, rows: Any, columns: Any, lanes: int) -> Array:
    """The predicate of these queries and keys."""
    as_columns = lambda ref: repeat_lanes(column(ref[:, rows], lanes), columns.size)  # noqa: E731
    return attends(jax.tree.map(as_columns, x.queries), jax.tree.map(lambda ref: ref[:, columns], x.keys))


def _sum_to_lanes(p: Array, lanes: int) -> Array:
    """Partial row sums in as many lanes as a register has: the sum over lanes waits until the end."""
    parts = [p[:, start : start + lanes] for start in range(0, p.shape[1], lanes)]
    return sum(parts[1:], parts[0])


def _mark_poison(state: _State, v: Array, allowed: Array, rows: Any) -> None:
    """NaN in the output of the queries that attend a value that is NaN or Inf (0 * NaN would reach the others too)."""
    bad = jnp.where(is_finite(v), 0.0, 1.0)

    @pl.when(jnp.max(bad) > 0.0)
    def _() -> None:
        hits = dot(jnp.where(allowed, 1.0, 0.0), bad, (1, 0))
        state.acc[rows] = jnp.where(hits > 0.0, jnp.nan, state.acc[rows])


def _carry_on(x: _Inputs, n: Any, state: _State, out: list[Any], params: KernelParams) -> None:
    del n  # Unused.
    out[0][...] = state.acc[...]
    out[1][...], out[2][...] = _max_and_sum(x, state, params)


def _max_and_sum(x: _Inputs, state: _State, params: KernelParams) -> tuple[Array, Array]:
    """Both as rows [1, block_q].

    The carry's sum comes in here, not into the lanes of the state: so a hop rounds it once, not once a lane.
    """
    top = state.max[...].T[:1]
    total = jnp.sum(state.sum[...].T, axis=0, keepdims=True)
    if x.carry is None:
        return top, total
    _, old_top, old_total = x.carry
    return top, old_total[...] * jnp.exp2((old_top[...] - top) * (factor(params) * LOG2_E)) + total


def _finish(x: _Inputs, n: Any, state: _State, out: list[Any], params: KernelParams) -> None:
    """out = acc / l,  lse = f m + log(l);  over no keys 0 and -inf. See :func:`ringjax.partial.finish`."""
    acc, lanes = state.acc[...], state.max.shape[1]
    top, total = _max_and_sum(x, state, params)
    top = top * factor(params)
    if x.sinks is not None:
        sink = x.sinks[n]
        new_top = jnp.maximum(top, sink)
        rescale = jnp.exp(top - new_top)
        total, top = total * rescale + jnp.exp(sink - new_top), new_top
        acc = acc * repeat_lanes(column(rescale, lanes), acc.shape[1])
    some = total != 0  # NaN counts as some: a NaN logit must show
    safe = jnp.where(some, total, 1.0)
    out[0][...] = (acc / repeat_lanes(column(safe, lanes), acc.shape[1])).astype(out[0].dtype)
    out[1][...] = jnp.where(some, top + jnp.log(safe), -jnp.inf)
