"""The running softmax of some queries in VMEM, which the forward kernels for TPU share: begun, folded into, ended.

With logits = f s, where s are the products q.k and f the scale (with a cap: s = tanh(scale q.k / cap), f = cap),

    m = max s,    p = exp2((s - m) f LOG2_E),    l = sum p,    acc = sum p v,    lse = f m + log(l):

one multiplication a logit, after the subtraction, so that rounding grows with s - m and not with s. Online softmax:
Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool

from ...partial import NO_LOGIT, close
from ..base import KernelParams
from ..softmax import clean, factor, is_finite, scores, to_save
from .common import column, dot, repeat_lanes, weights

# In powers of two: sums in this range, either side of 1, are those of weights that float32 holds.
_RANGE = 60


class Running(NamedTuple):
    """The carry between hops: the running softmax, max and sum as rows of lanes. ``max`` is that of the scores."""

    acc: Any  # [B, N, T, Hv]
    max: Any  # [B, N, 1, T]
    sum: Any  # [B, N, 1, T]


class State(NamedTuple):
    """The running softmax of one tile of queries: refs of VMEM."""

    acc: Any  # [rows, Hv]
    max: Any  # [rows, lanes], all lanes equal
    sum: Any  # [rows, lanes], without the carry's, to be summed over lanes at the end


def scratch(shape: tuple[int, ...], v_size: int, lanes: int) -> State:
    """What to allocate for rows of this shape."""
    return State(*(pltpu.VMEM((*shape, n), jnp.float32) for n in (v_size, lanes, lanes)))


def begin(state: State, carry: Running | None) -> None:
    for ref, x in zip(state, _start(state, carry), strict=True):
        ref[...] = x


def _start(state: State, carry: Running | None) -> State:
    """The carry, or what is held over no keys."""
    acc, top, total = (jnp.zeros_like(ref) for ref in state)
    if carry is None:
        return State(acc=acc, max=jnp.full_like(top, NO_LOGIT), sum=total)
    return State(acc=carry.acc[...], max=column(carry.max[...], top.shape[1]), sum=total)


def keep(before: State, state: State, carry: Running | None, first: Array | bool) -> None:
    """The state into ``before``, begun where it is ``first``: a choice, since a branch would keep all else waiting."""
    if first is False:
        for kept, ref in zip(before, state, strict=True):
            kept[...] = ref[...]
        return
    for kept, ref, x in zip(before, state, _start(state, carry), strict=True):
        kept[...] = x if first is True else jnp.where(first, x, ref[...])


def fold(
    state: State,
    rows: Any,
    products: Array,
    weigh: Callable[[Array], Array],
    params: KernelParams,
    allowed: Bool[Array, "rows keys"] | None,
) -> None:
    """One step of the online softmax for some rows of the state.

    Args:
      products: q.k, of these rows and some keys.
      weigh: from weights of these rows and keys to the sum of the values that they weigh.
      allowed: who attends to whom; None: all to all.
    """
    s = scores(products, params)
    old = state.max[rows]
    if allowed is not None:
        s = jnp.where(allowed, s, NO_LOGIT)
    new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
    p = weights(s, repeat_lanes(new, s.shape[1]), params)
    if allowed is not None:
        p = jnp.where(allowed, p, 0.0)  # while nothing is attended, exp2(NO_LOGIT - NO_LOGIT) is 1
    rescale = weights(old, new, params)
    state.max[rows] = new
    state.sum[rows] = rescale * state.sum[rows] + _sum_to_lanes(p, old.shape[1])
    values = weigh(p)
    state.acc[rows] = repeat_lanes(rescale, values.shape[1]) * state.acc[rows] + values


def fold_as_is(
    state: State, before: State, rows: Any, products: Array, weigh: Callable[[Array], Array], params: KernelParams
) -> None:
    """:func:`fold` of ``before``, all to all, with the maximum as it is: right unless :func:`out_of_range`.

    What is subtracted cancels in the end, so it need not be the maximum: that of the keys before will do, or 0 if there
    are none. Then no weight waits for the maximum of its row, and nothing is rescaled.
    """
    old = before.max[rows]
    top = jnp.where(old == NO_LOGIT, jnp.zeros_like(old), old)
    s = scores(products, params)
    p = weights(s, repeat_lanes(top, s.shape[1]), params)
    state.max[rows] = top
    state.sum[rows] = before.sum[rows] + _sum_to_lanes(p, old.shape[1])
    state.acc[rows] = before.acc[rows] + weigh(p)


def out_of_range(state: State, carry: Running | None, params: KernelParams, present: Array | None) -> Array:
    """Whether the state may have lost weights that matter, or may overflow. NaN is out of range.

    Weights below 2^-126 are lost. Beside a sum of 2^-60 each is less than 2^-66 of it.

    Args:
      present: [1, rows], which rows count; None: all.
    """
    _, total = max_and_sum(state, carry, params)
    good = (total >= 2.0**-_RANGE) & (total <= 2.0**_RANGE)
    if present is not None:
        good = good | ~present
    return jnp.max(jnp.where(good, 0.0, 1.0)) > 0.0


def weighed(p: Array, v: Array, allowed: Array | None, v_axis: int = 0) -> Array:
    """p v, of values that lie along this axis of v. Numbers that are not finite: see :func:`mark_poison`."""
    return dot(p.astype(v.dtype), v if allowed is None else clean(v), (1, v_axis))


def _sum_to_lanes(p: Array, lanes: int) -> Array:
    """Partial row sums in as many lanes as a register has: the sum over lanes waits until the end."""
    parts = [p[:, start : start + lanes] for start in range(0, p.shape[1], lanes)]
    return sum(parts[1:], parts[0])


def mark_poison(state: State, rows: Any, v: Array, allowed: Array, v_axis: int = 0) -> None:
    """NaN in the output of the queries that attend to a value that is NaN or Inf (0 * NaN would reach all)."""
    bad = jnp.where(is_finite(v), 0.0, 1.0)

    @pl.when(jnp.max(bad) > 0.0)
    def _() -> None:
        hits = dot(jnp.where(allowed, 1.0, 0.0), bad, (1, v_axis))
        state.acc[rows] = jnp.where(hits > 0.0, jnp.nan, state.acc[rows])


def _row(ref: Any) -> Array:
    """Equal lanes as one row: their diagonals, since the unit that transposes is busy with the sums."""
    rows, lanes = ref.shape
    if rows % lanes:
        return ref[...].T[:1]
    eye = jax.lax.broadcasted_iota(jnp.int32, (lanes, lanes), 0) == jax.lax.broadcasted_iota(
        jnp.int32, (lanes, lanes), 1
    )
    parts = [jnp.where(eye, ref[pl.ds(start, lanes)], -jnp.inf) for start in range(0, rows, lanes)]
    return jnp.concatenate([jnp.max(part, axis=0, keepdims=True) for part in parts], axis=1)


def max_and_sum(state: State, carry: Running | None, params: KernelParams) -> tuple[Array, Array]:
    """Both as rows [1, rows].

    The carry's sum comes in here, not into the lanes of the state: so a hop rounds it once, not once a lane.
    """
    # With a carry the transpose costs less in the compiler's schedule, without one the diagonals do.
    top = _row(state.max) if carry is None else state.max[...].T[:1]
    total = jnp.sum(state.sum[...].T, axis=0, keepdims=True)
    if carry is None:
        return top, total
    return top, carry.sum[...] * weights(carry.max[...], top, params) + total


def num_rows(dtype: Any, has_sinks: bool) -> int:
    """Of :func:`end`: lse, and for backward what float32 needs to have forward's weights again."""
    return 1 if jnp.dtype(dtype).itemsize == 2 else 3 if not has_sinks else 4


def end(
    state: State, carry: Running | None, sinks: Array | None, out: Any, rows: Any, params: KernelParams, dtype: Any
) -> None:
    """out = acc / l,  lse = f m + log(l);  over no keys 0 and -inf.

    Args:
      sinks: a number, or one for each row: [1, rows].
      out: ref of the output [rows, Hv].
      rows: refs of rows of lanes, as many as :func:`num_rows` says.
      dtype: of the queries.
    """
    acc, lanes = state.acc[...], state.max.shape[1]
    top, total = max_and_sum(state, carry, params)
    ended = close(top, total, sinks, factor(params))
    out[...] = (acc * repeat_lanes(column(ended.weight, lanes), acc.shape[1])).astype(out.dtype)
    saved = to_save(dtype, top, total, ended.weight) or ()
    values = (ended.lse, *saved, *(() if ended.sink is None or not saved else (ended.sink,)))
    for ref, row in zip(rows, values, strict=True):
        ref[...] = row
