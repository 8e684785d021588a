"""Partial softmax results: identity, merge, finish. No ranks, no masks.

For logits s_j and values v_j of a set of keys J the partial result is

    max = max_J s_j,    sum = sum_J exp(s_j - max),    acc = sum_J exp(s_j - max) v_j,

unnormalised and in float32. Partial results of disjoint sets merge into that of their union (Milakov and Gimelshein
2018, arXiv:1805.02867); only non-positive numbers are ever exponentiated, so nothing overflows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# The maximum over no keys. Finite, not -inf: exp(-inf - -inf) is NaN. Below every logit that a masked row could meet.
NO_LOGIT = -0.7 * 3.4e38


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of accumulators: float32, or float64 for float64."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


def attends_to_nothing(lse: Float[Array, "*b"]) -> Bool[Array, "*b"]:
    """Where the log-sum-exp is -inf. Said so since on a constant of -inf jax_debug_infs recurses for minutes."""
    return lse < jnp.finfo(lse.dtype).min


class Partial(NamedTuple):
    """The running softmax of each query, head-major. See the module's equation."""

    acc: Float[Array, "B N T Hv"]
    max: Float[Array, "B N T"]
    sum: Float[Array, "B N T"]


def identity(shape: tuple[int, ...], value_size: int, dtype: jnp.dtype) -> Partial:
    """The partial result over no keys; ``shape`` is that of the maximum."""
    return Partial(jnp.zeros((*shape, value_size), dtype), jnp.full(shape, NO_LOGIT, dtype), jnp.zeros(shape, dtype))


def merge(a: Partial, b: Partial) -> Partial:
    """The partial result over the union of two disjoint sets of keys."""
    top = jnp.maximum(a.max, b.max)
    scale_a, scale_b = jnp.exp(a.max - top), jnp.exp(b.max - top)
    return Partial(
        a.acc * scale_a[..., None] + b.acc * scale_b[..., None],
        top,
        a.sum * scale_a + b.sum * scale_b,
    )


def finish(partial: Partial, sinks: Float[Array, " N"] | None = None) -> tuple[Array, Array]:
    """Normalised output and log-sum-exp: acc / sum, max + log(sum). Over no keys: 0 and -inf.

    Sinks are one more logit per head, whose value is zero; they enter here, once, and nowhere else.
    """
    end = close(partial.max, partial.sum, None if sinks is None else sinks.astype(partial.max.dtype)[None, :, None])
    return partial.acc * end.weight[..., None], end.lse


class End(NamedTuple):
    """What ends a softmax, per query."""

    weight: Array  # what the accumulator is multiplied by
    lse: Array
    sink: Array | None  # the weight of the sink; None without one


def close(top: Array, total: Array, sinks: Array | None, factor: float = 1.0) -> End:
    """The end of a softmax, given the maximum and the sum over all keys. Works in a kernel too.

    Over no keys the log-sum-exp is -inf, which comes from log(0): a constant would make jax_debug_infs recurse.

    Args:
      top: the maximum, in a unit of the kernel's own.
      sinks: logits that broadcast against the maximum, or None.
      factor: logits over ``top``. The product is kept to twice the digits: a sink does not share the error of a maximum
        that is large.
    """
    top, rest = _product(top, factor)
    if sinks is None:
        rescale, sink = jnp.ones_like(top), None
        top = top + rest
    else:
        new_top = jnp.maximum(jnp.maximum(top, sinks), NO_LOGIT)  # finite, even if both are -inf
        rescale, sink = jnp.exp((top - new_top) + rest), jnp.exp(sinks - new_top)
        total, top = total * rescale + sink, new_top
    safe = jnp.where(total != 0, total, jnp.ones_like(total))  # NaN counts as some: it must show
    return End(rescale / safe, top + jnp.log(total), None if sink is None else sink / safe)


def _product(x: Array, factor: float) -> tuple[Array, Array]:
    """x factor as a rounded product and what rounding took off it (Dekker 1971, doi:10.1007/BF01397083)."""
    if factor == 1.0:
        return x, jnp.zeros_like(x)
    bits = 27 if x.dtype == jnp.float64 else 12
    whole = float(np.asarray(factor, x.dtype))  # as the product sees it
    high = _leading_bits(whole, bits)
    low = whole - high
    rounded = x * whole
    split = x * float(2**bits + 1)
    x_high = split - (split - x)
    x_low = x - x_high
    rest = ((x_high * high - rounded) + x_high * low + x_low * high) + x_low * low
    return rounded, jnp.where(jnp.abs(rest) < 1.0, rest, jnp.zeros_like(rest))  # NaN and overflow: of no keys


def _leading_bits(value: float, bits: int) -> float:
    """The number with all but its first bits cut off."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.trunc(math.ldexp(mantissa, bits)), exponent - bits)


def merge_partials(
    partials: Sequence[tuple[Float[Array, "*b H"], Float[Array, "*b"]]],
) -> tuple[Float[Array, "*b H"], Float[Array, "*b"]]:
    r"""Combine attention over disjoint sets of keys.

    .. math::  lse = \log \sum_i \exp(lse_i), \quad out = \sum_i \exp(lse_i - lse) \, out_i

    Differentiable in outputs and log-sum-exps. Rows that attend to nothing anywhere (all lse -inf) give 0 and -inf,
    with zero gradients.

    Args:
      partials: pairs (out [..., H], lse [...]), as ``ring_attention(..., return_residual=True)`` returns.

    Returns:
      (out, lse): out in the dtype of the first output, lse in float32 (float64 for float64).

    Raises:
      ValueError: if there is no pair, or shapes differ.
    """
    pairs = [(jnp.asarray(out), jnp.asarray(lse)) for out, lse in partials]
    if not pairs:
        raise ValueError("partials must hold at least one (out, lse) pair. Got none.")
    for out, lse in pairs:
        if out.shape != pairs[0][0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                "partials: every out must have one shape [..., H] and every lse the shape [...]. "
                f"Got out {out.shape} and lse {lse.shape}; the first out is {pairs[0][0].shape}."
            )
    dtype = wide(pairs[0][1].dtype)
    out, lse = combine(jnp.stack([out for out, _ in pairs]), jnp.stack([lse.astype(dtype) for _, lse in pairs]))
    return out.astype(pairs[0][0].dtype), lse


def combine(
    outs: Float[Array, "P *b H"], lses: Float[Array, "P *b"], sinks: Array | None = None
) -> tuple[Float[Array, "*b H"], Float[Array, "*b"]]:
    """The same of stacked results, in the dtype of ``lses``; ``sinks`` are one more logit each, and broadcast."""
    top = jnp.max(finite_lse(lses), axis=0)
    if sinks is not None:
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    weighed, weights = weigh(outs, lses, top[None])
    total = jnp.sum(weights, axis=0)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return normalise(jnp.sum(weighed, axis=0), total, top)


def finite_lse(lse: Array) -> Array:
    """For the maximum over disjoint sets of keys, which cancels in the result and so needs no gradient."""
    return jax.lax.stop_gradient(jnp.where(attends_to_nothing(lse), NO_LOGIT, lse))


def weigh(out: Array, lse: Array, top: Array) -> tuple[Array, Array]:
    """out and 1 times exp(lse - top): what is summed over disjoint sets of keys, in the dtype of lse."""
    attended = ~attends_to_nothing(lse)  # NaN counts as attended: it must show
    # Replace -inf before the exponential: a where() after it would still give NaN gradients.
    weight = jnp.where(attended, jnp.exp(jnp.where(attended, lse - top, 0.0)), 0.0)
    return jnp.where(attended[..., None], out.astype(lse.dtype), 0.0) * weight[..., None], weight


def normalise(acc: Array, total: Array, top: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp of these sums; over no keys 0 and -inf, without a gradient."""
    some = total != 0
    safe = jnp.where(some, total, 1.0)
    # log(some) is 0 or -inf, without a gradient: that of log(total) would be NaN where total is 0.
    return acc / safe[..., None], top + jnp.log(safe) + jnp.log(some.astype(total.dtype))
