"""Arithmetic that kernels share: logits as a factor times scores, and numbers that are not finite.

With logits = f s, where s are the products q.k and f the scale (with a cap: s = tanh(scale q.k / cap), f = cap), a
kernel keeps the maximum m of s and computes p = exp((s - m) f): rounding then grows with s - m, not with s. Backward
recomputes s the same way and subtracts in the same place, so that its p is that of forward: an error of p that differed
from key to key would be multiplied by what the keys have in common.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..partial import attends_to_nothing
from .base import KernelParams

LOG2_E = 1.0 / math.log(2.0)  # exp(x) = exp2(LOG2_E * x)


def scores(products: Array, params: KernelParams) -> Array:
    """s: the logits without their factor, growing as they do."""
    if params.logits_soft_cap is not None:
        return jnp.tanh(products * (params.scale / params.logits_soft_cap))
    if params.scale == 0:
        return products * 0.0  # NaN must show
    return products if params.scale > 0 else -products


def factor(params: KernelParams) -> float:
    """f: logits over scores, positive."""
    return (abs(params.scale) or 1.0) if params.logits_soft_cap is None else params.logits_soft_cap


def is_finite(x: Array) -> Array:
    """In float32: not every chip compares bfloat16. NaN fails the comparison."""
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def clean(x: Array) -> Array:
    """Zero in place of NaN and Inf."""
    return jnp.where(is_finite(x), x, jnp.zeros_like(x))


class Normaliser(NamedTuple):
    """What makes weights of scores, per query: p = exp(f (s - top)) * weight.

    In forward ``top`` is the maximum so far, and there is no weight before the end. In backward float32 and float64
    take both from forward, so that p is forward's to the last digit; the log-sum-exp loses them where logits are large.
    16-bit weights are coarser than that: the log-sum-exp, in the unit of the scores, serves as their ``top``.
    """

    top: Array
    weight: Array | None = None


def weights(s: Array, by: Normaliser, params: KernelParams) -> Array:
    """The weights of scores. Of both passes; ``by`` broadcasts against the scores."""
    p = jnp.exp((s - by.top) * factor(params))
    return p if by.weight is None else p * by.weight


def to_save(dtype: jax.typing.DTypeLike, top: Array, total: Array, weight: Array) -> Normaliser | None:
    """What forward keeps for backward besides the log-sum-exp, given its maximum, sum and final weight."""
    if jnp.dtype(dtype).itemsize == 2:
        return None
    return Normaliser(jnp.where(total != 0, top, jnp.zeros_like(top)), weight)


def normaliser(lse: Array, saved: Normaliser | None, params: KernelParams) -> Normaliser:
    """For backward. Any finite number for queries that attend to nothing: they are masked everywhere."""
    if saved is not None:
        return saved
    return Normaliser(jnp.where(attends_to_nothing(lse), 0.0, lse) / factor(params))


def slope(s: Array, params: KernelParams) -> Array | float:
    """dlogits / d(q.k), given the scores."""
    return params.scale if params.logits_soft_cap is None else params.scale * (1.0 - s * s)
