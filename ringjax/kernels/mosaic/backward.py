"""The backward block kernel for Hopper GPUs: tile sizes, padding, and which kernels run.

One kernel that owns keys computes all in five products per tile, but sums dq in whatever order its programs arrive, and
dk and dv as well where many queries are visited in several parts. Where the same bits are wanted on every run it leaves
dq to a second one that owns queries: seven products. Heads above 128 have a kernel of their own that owns keys, which
divides the work otherwise between its warpgroups.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._compat import shape_like, vary_like
from ...mask import Mask
from ..base import Block, Gradients, KernelParams, Upstream
from ..zeros import zeros_after
from . import backward_common as gpu
from . import backward_keys, backward_long, backward_queries
from .backward_common import BLOCK_KV, Inputs, Static
from .backward_queries import BLOCK_Q
from .common import MaskArrays, prepare_mask, token_major
from .tiles import head_size


def backward(
    block: Block,
    upstream: Upstream,
    params: KernelParams,
    carry: Float[Array, "..."] | None,
    *,
    finish: bool,
) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. Tiles are what the registers have room for, whatever block_q says."""
    q, k, v, mask, _ = block
    (_, _, q_length, q_size), (_, _, k_length, v_size) = q.shape, v.shape
    size = max(head_size(q_size), head_size(v_size))
    rows = gpu.rows_of(upstream.lse, upstream.delta, params.scale, -(-q_length // BLOCK_Q) * BLOCK_Q)
    q, k, v, dout = (token_major(x, size) for x in (q, k, v, upstream.dout))
    # Between hops dq stays as the kernels want it: padded, and token-major or in parts.
    in_parts = size > 128 and not params.deterministic
    dq = carry
    if dq is None:
        of_parts = backward_long.dq_shape(q.shape[0], q.shape[2], q_length, size)
        (dq,), dout = zeros_after((of_parts if in_parts else q.shape,), dout)
    dq = vary_like(dq, q, k, v, dout, *jax.tree.leaves(mask))
    x = Inputs(q=q, k=k, v=v, dout=dout, rows=rows, mask=MaskArrays())
    dk, dv = (shape_like(t.shape, t.dtype if params.dkv_final else jnp.float32, t) for t in (k, v))

    plan = functools.partial(_plan, x, mask, params, (q_length, k_length))
    kernel = backward_keys if size <= 128 else backward_long
    block_q = 128 if size == 64 else 64
    of_keys = plan(rows="keys", block_q=block_q, block_kv=BLOCK_KV if size <= 128 else backward_long.BLOCK)
    added, dk, dv = kernel.run(*of_keys, None if params.deterministic else dq, dk, dv)
    if added is None:
        added = backward_queries.run(*plan(rows="queries", block_kv=BLOCK_KV if size <= 128 else 64), dq)
    cut = lambda x, length, width: jnp.swapaxes(x[:, :length, :, :width], 1, 2)  # noqa: E731
    if finish:
        added = (backward_long.finished_dq if in_parts else cut)(added, q_length, q_size)
    return Gradients(dq=added, dk=cut(dk, k_length, q_size), dv=cut(dv, k_length, v_size))


def _plan(
    x: Inputs, mask: Mask, params: KernelParams, lengths: tuple[int, int],
    *, rows: str, block_q: int = BLOCK_Q, block_kv: int = BLOCK_KV,
) -> tuple[Static, Inputs]:  # fmt: skip
    """Tiles of one kernel: rows are what its programs own."""
    group, programs = 1, gpu.Programs(parts=1, together=1)
    if rows == "keys":
        group = x.q.shape[2] // x.k.shape[2]
        programs = gpu.programs_of(
            mask, (x.k.shape[0], x.k.shape[2]), -(-lengths[1] // block_kv), lengths[0], block_q, group,
            final=params.dkv_final, deterministic=params.deterministic,
        )  # fmt: skip
    rule, arrays = prepare_mask(mask, lengths, (block_q, block_kv), rows=rows, parts=programs.parts)
    size = x.q.shape[3]
    static = Static(
        params=params,
        rule=rule,
        block_q=block_q,
        block_kv=block_kv,
        stages=2 if size <= 128 or rows == "keys" else 1,
        size=size,
        group=group,
        parts=programs.parts,
        together=1 if rule is None else programs.together,
    )
    return static, x._replace(mask=arrays)
