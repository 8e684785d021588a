"""The block kernel for Hopper GPUs: chooses tile sizes and runs the Pallas Mosaic kernels, forward and backward.

bfloat16 and float16, heads of up to 256. Tiles may be ragged: TMA clips at the end of an array, and what lies beyond it
is absent.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from ..._compat import vary_like
from ...partial import Partial
from ..base import Block, Finished, Gradients, KernelParams, Upstream
from . import backward as backward_kernel
from . import decode as decode_kernel
from . import forward as forward_kernel
from . import tiles as tile_sizes

TOKEN_MAJOR = True  # see ringjax.kernels.base.Kernel


def forward(block: Block, params: KernelParams, carry: Partial | None, *, finish: bool) -> Partial | Finished:
    """See :class:`ringjax.kernels.base.Kernel`. The carry's maximum is in base 2, its acc padded."""
    tile_sizes.check_supported(block.q, block.v)
    if carry is None and finish and decode_kernel.suits(block, params):
        return _typed(decode_kernel.forward(block, params, tile_sizes.decode_tiles(block.q, block.v)), block)
    tiles = tile_sizes.forward_tiles(block.q, block.v, block.mask, params, whole=carry is None and finish)
    return _typed(forward_kernel.forward(block, params, tiles, carry, finish=finish), block)


def backward(
    block: Block,
    upstream: Upstream,
    params: KernelParams,
    carry: Float[Array, "..."] | None,
    *,
    finish: bool,
) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. The carry is dq, padded and token-major."""
    tile_sizes.check_supported(block.q, block.v)
    return _typed(backward_kernel.backward(block, upstream, params, carry, finish=finish), block)


def _typed(results: Any, block: Block) -> Any:
    """What comes out of a Mosaic kernel is not known to vary, and a loop over hops wants one type throughout."""
    references = jax.tree.leaves((block.q, block.k, block.v, block.mask))
    return jax.tree.map(lambda x: vary_like(x, *references), results)
