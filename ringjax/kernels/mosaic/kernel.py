"""The block kernel for Hopper GPUs: chooses tile sizes and runs the Pallas Mosaic kernels, forward and backward.

bfloat16 and float16, heads of up to 256. Tiles may be ragged: TMA clips at the end of an array, the mask is extended.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from ..._compat import vary_like
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
    common.check_supported(q, v)
    tiles = common.forward_tiles(q, v, mask, params, whole=carry is None and finish)
    result = forward_kernel.forward(q, k, v, mask, params, tiles, carry=carry, finish=finish, sinks=sinks)
    return _typed(result, q, k, v, mask)


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
    common.check_supported(q, v)
    dq, dk, dv = backward_kernel.backward(q, k, v, dout, lse, delta, mask, params, dq_carry=dq_carry)
    return _typed((dq, dk, dv), q, k, v, mask)


def _typed(results: Any, *references: Any) -> Any:
    """What comes out of a Mosaic kernel is not known to vary, and a loop over hops wants one type throughout."""
    return jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves(references)), results)
