"""The block kernel for TPU: chooses tile sizes and runs the Pallas kernels, forward and backward.

bfloat16 and float32 go to the matrix unit as they are, float16 as float32 (no TPU multiplies it). Tiles may be ragged:
the arrays are never padded or copied, what lies beyond their end is absent.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..base import Block, Finished, Gradients, KernelParams, Upstream
from . import backward as backward_kernel
from . import decode as decode_kernel
from . import forward as forward_kernel
from .online import Running
from .tiles import decode_tiles, tile_sizes

TOKEN_MAJOR = False  # see ringjax.kernels.base.Kernel


def forward(block: Block, params: KernelParams, carry: Running | None, *, finish: bool) -> Running | Finished:
    """See :class:`ringjax.kernels.base.Kernel`."""
    dtype, block = block.q.dtype, _multipliable(block)
    few = decode_tiles(block, params) if carry is None and finish else None
    if few is not None:
        result: Any = decode_kernel.forward(block, params, few)
        return result._replace(out=result.out.astype(dtype))
    tiles = tile_sizes("forward", block.q, block.k, block.v, params)
    result = forward_kernel.forward(block, params, tiles, carry, finish=finish)
    return result._replace(out=result.out.astype(dtype)) if finish else result


def backward(
    block: Block, upstream: Upstream, params: KernelParams, carry: Float[Array, "B N T H"] | None, *, finish: bool
) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`."""
    del finish  # Unused: the carry is dq itself.
    block = _multipliable(block)
    tiles = tile_sizes("backward", block.q, block.k, block.v, params)
    upstream = upstream._replace(dout=_for_products(upstream.dout))
    return backward_kernel.backward(block, upstream, params, tiles, carry)


def _multipliable(block: Block) -> Block:
    return block._replace(q=_for_products(block.q), k=_for_products(block.k), v=_for_products(block.v))


def _for_products(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
