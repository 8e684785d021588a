"""The block kernel for NVIDIA GPUs through Pallas' Triton backend: Ampere and later.

bfloat16 and float16 go to the tensor cores, float32 is multiplied in full by the ordinary units.
"""

from jaxtyping import Array

from ...partial import Partial
from ..base import Block, Finished, Gradients, KernelParams, Upstream
from . import backward as backward_kernels
from . import forward as forward_kernel
from .common import token_major
from .tiles import tile_sizes

TOKEN_MAJOR = True  # see ringjax.kernels.base.Kernel


def forward(block: Block, params: KernelParams, carry: Partial | None, *, finish: bool) -> Partial | Finished:
    """See :class:`ringjax.kernels.base.Kernel`."""
    return forward_kernel.forward(block, params, tile_sizes("forward", block, params), carry, finish=finish)


def backward(block: Block, upstream: Upstream, params: KernelParams, carry: Array | None, *, finish: bool) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. Seven products per tile: the logits are computed in either kernel."""
    of_queries, of_keys = (tile_sizes(kernel, block, params) for kernel in ("dq", "dkv"))
    dk, dv = backward_kernels.dkv(block, upstream, params, of_keys)
    dq = backward_kernels.dq(block, upstream, params, of_queries, carry)
    return Gradients(dq=token_major(dq) if finish else dq, dk=dk, dv=dv)
