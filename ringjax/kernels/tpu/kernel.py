"""The block kernel for TPU: chooses tile sizes and runs the Pallas kernels, forward and backward.

bfloat16 and float32 go to the matrix unit as they are, float16 as float32 (no TPU multiplies it). Tiles may be ragged:
the arrays are never padded or copied, the mask is extended instead.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...mask import Mask
from ...partial import Partial
from ..base import KernelParams
from . import backward as backward_kernel
from . import common
from . import forward as forward_kernel


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    mask: Mask,
    params: KernelParams,
    *,
    carry: Partial | None,
    finish: bool,
    sinks: Float[Array, " N"] | None,
) -> Partial | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """See :class:`ringjax.kernels.base.Kernel`."""
    dtype = q.dtype
    q, k, v = (_multipliable(x) for x in (q, k, v))
    tiles = common.tile_sizes("forward", q, k, v, params)
    result = forward_kernel.forward(q, k, v, mask, params, tiles, carry=carry, finish=finish, sinks=sinks)
    return (result[0].astype(dtype), result[1]) if finish else result


def backward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    dout: Float[Array, "B N T Hv"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    mask: Mask,
    params: KernelParams,
    *,
    dq_carry: Float[Array, "B N T H"] | None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """See :class:`ringjax.kernels.base.Kernel`."""
    q, k, v, dout = (_multipliable(x) for x in (q, k, v, dout))
    tiles = common.tile_sizes("backward", q, k, v, params)
    return backward_kernel.backward(q, k, v, dout, lse, delta, mask, params, tiles, dq_carry=dq_carry)


def _multipliable(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
