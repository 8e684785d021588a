"""The backward block kernel for Hopper GPUs: tile sizes, padding, and which kernels run.

One kernel that owns keys computes all in five products per tile, but sums dq in whatever order its programs arrive.
Where the same bits are wanted on every run it leaves dq to a second one that owns queries: seven products. Heads above
128 do not leave it the registers for dk and dv at once: eight products, in three kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._compat import shape_like, vary_like
from ...mask import Mask
from ..base import Block, Gradients, KernelParams, Upstream
from . import backward_common as gpu
from . import backward_keys, backward_queries
from .backward_common import BLOCK_KV, Inputs, Static
from .backward_queries import BLOCK_Q
from .common import MaskArrays, prepare_mask, token_major
from .tiles import head_size


def backward(
    block: Block, upstream: Upstream, params: KernelParams, carry: Float[Array, "B T8 N H8"] | None, *, finish: bool
) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. Tiles are what the registers have room for, whatever block_q says."""
    q, k, v, mask, _ = block
    (_, _, q_length, q_size), (_, _, k_length, v_size) = q.shape, v.shape
    size = max(head_size(q_size), head_size(v_size))
    rows = gpu.rows_of(upstream.lse, upstream.delta, params.scale, -(-q_length // BLOCK_Q) * BLOCK_Q)
    q, k, v, dout = (token_major(x, size) for x in (q, k, v, upstream.dout))
    x = Inputs(q=q, k=k, v=v, dout=dout, rows=rows, mask=MaskArrays())
    # Between hops dq stays as the kernels want it: padded, and token-major.
    dq = jnp.zeros(q.shape, jnp.float32) if carry is None else carry
    dq = vary_like(dq, q, k, v, dout, *jax.tree.leaves(mask))
    dk, dv = (shape_like(t.shape, t.dtype if params.dkv_final else jnp.float32, t) for t in (k, v))

    plan = functools.partial(_plan, x, mask, params, (q_length, k_length))
    of_keys = plan(rows="keys", block_q=128 if size == 64 else 64)
    if size <= 128 and not params.deterministic:
        dq, dk, dv = backward_keys.run(*of_keys, dq, dk, dv)
    else:
        if size <= 128:
            _, dk, dv = backward_keys.run(*of_keys, None, dk, dv)
        else:
            _, _, dv = backward_keys.run(*of_keys, None, None, dv)
            _, dk, _ = backward_keys.run(*of_keys, None, dk, None)
        dq = backward_queries.run(*plan(rows="queries", block_kv=BLOCK_KV if size <= 128 else 64), dq)
    cut = lambda x, length, width: jnp.swapaxes(x[:, :length, :, :width], 1, 2)  # noqa: E731
    return Gradients(
        dq=cut(dq, q_length, q_size) if finish else dq, dk=cut(dk, k_length, q_size), dv=cut(dv, k_length, v_size)
    )


def _plan(
    x: Inputs, mask: Mask, params: KernelParams, lengths: tuple[int, int],
    *, rows: str, block_q: int = BLOCK_Q, block_kv: int = BLOCK_KV,
) -> tuple[Static, Inputs]:  # fmt: skip
    """Tiles of one kernel: rows are what its programs own."""
    rule, arrays = prepare_mask(mask, lengths, (block_q, block_kv), rows=rows)
    if arrays.counts is None:
        num_q, num_kv = -(-lengths[0] // block_q), -(-lengths[1] // block_kv)
        num_rows, num_columns = (num_q, num_kv) if rows == "queries" else (num_kv, num_q)
        # From memory even where it is known: ptxas handles the registers of a loop of unknown length better.
        arrays = arrays._replace(counts=jnp.full((1, 2, num_rows), num_columns, jnp.int32))
    size = x.q.shape[3]
    static = Static(
        params=params,
        rule=rule,
        block_q=block_q,
        block_kv=block_kv,
        stages=2 if size <= 128 else 1,
        size=size,
        group=x.q.shape[2] // x.k.shape[2] if rows == "keys" else 1,
    )
    return static, x._replace(mask=arrays)
