"""Arithmetic that kernels share: logits as a factor times scores, and numbers that are not finite.

With logits = f s, where s are the products q.k and f the scale (with a cap: s = tanh(scale q.k / cap), f = cap), a
kernel keeps the maximum m of s and computes p = exp2((s - m) f LOG2_E): rounding then grows with s - m, not with s.
Backward recomputes s the same way and subtracts lse / f in the same place, so that its p is that of forward times one
factor per query: an error of p that differed from key to key would be multiplied by what the keys have in common.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

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
