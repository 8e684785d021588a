"""The block kernel for NVIDIA GPUs through Pallas' Triton backend: Ampere and later.

bfloat16 and float16 go to the tensor cores, float32 is multiplied in full by the ordinary units.
"""

from jaxtyping import Array, Float

from ...mask import Mask
from ...partial import Partial
from ..base import KernelParams
from . import backward as backward_kernel
from . import forward as forward_kernel
from .common import tile_sizes


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
    tiles = tile_sizes("forward", q, k, v, params)
    return forward_kernel.forward(q, k, v, mask, params, tiles, carry=carry, finish=finish, sinks=sinks)


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
    """See :class:`ringjax.kernels.base.Kernel`. Seven products a tile: the logits are computed in either kernel."""
    of_queries, of_keys = (tile_sizes(kernel, q, k, v, params) for kernel in ("dq", "dkv"))
    rows = (q, k, v, dout, lse, delta, mask, params)
    dk, dv = backward_kernel.dkv(*rows, of_keys)
    return backward_kernel.dq(*rows, of_queries, dq_carry=dq_carry), dk, dv
