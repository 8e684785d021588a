"""The backward block kernel for Hopper GPUs: tile sizes, padding, and which kernels run.

One kernel that owns keys computes all in five products a tile, but sums dq in whatever order its programs arrive. Where
the same bits are wanted on every run it leaves dq to a second one that owns queries: seven products. Heads above 128
do not leave it the registers for dk and dv at once: eight products, in three kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._compat import shape_like, vary_like
from ...mask import Mask, block_map, tile_kinds
from ..base import KernelParams
from . import backward_common as gpu
from . import backward_keys, backward_queries
from .backward_common import BLOCK_KV, Inputs, Static
from .backward_queries import BLOCK_Q
from .common import head_size, token_major


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
    """See :class:`ringjax.kernels.base.Kernel`. Tiles are what the registers have room for, whatever block_q says."""
    (_, _, q_length, q_size), (_, k_length, v_size) = q.shape, v.shape[1:]
    size = max(head_size(q.shape[3]), head_size(v.shape[3]))
    rows = gpu.rows_of(lse, delta, params.scale, -(-q_length // BLOCK_Q) * BLOCK_Q)
    q, k, v, dout = (token_major(x, size) for x in (q, k, v, dout))
    x = Inputs(q, k, v, dout, rows, None, None, None, None)
    dq = jnp.zeros(q.shape, jnp.float32) if dq_carry is None else token_major(dq_carry, size)
    dq = vary_like(dq, q, k, v, dout, *jax.tree.leaves(mask))
    dk, dv = (shape_like(t.shape, jnp.float32, t) for t in (k, v))

    plan = functools.partial(_plan, x, mask, params, q_length, k_length)
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
    return cut(dq, q_length, q_size), cut(dk, k_length, q_size), cut(dv, k_length, v_size)


def _plan(
    x: Inputs, mask: Mask, params: KernelParams, q_length: int, k_length: int,
    *, rows: str, block_q: int = BLOCK_Q, block_kv: int = BLOCK_KV,
) -> tuple[Static, Inputs]:  # fmt: skip
    """Tiles of one kernel: rows are what its programs own."""
    num_q, num_kv = -(-q_length // block_q), -(-k_length // block_kv)
    if not mask.is_full or k_length != num_kv * block_kv:
        # Keys that are not there must not add to dq. Queries that are not there have p = 0 through their lse.
        mask = mask.padded(q_length, num_q * block_q, k_length, num_kv * block_kv)
    queries, keys = mask.sides()
    num_rows, num_columns = (num_q, num_kv) if rows == "queries" else (num_kv, num_q)
    # From memory even where it is known: ptxas handles the registers of a loop of unknown length better.
    order, counts = None, jnp.full((1, 2, num_rows), num_columns, jnp.int32)
    if not mask.is_full:
        kinds = tile_kinds(mask, block_q, block_kv)
        visits = block_map(kinds if rows == "queries" else jnp.swapaxes(kinds, 1, 2))
        order, counts = visits.order, jnp.stack([visits.full, visits.visit], axis=1)
    size = x.q.shape[3]
    group = x.q.shape[2] // x.k.shape[2] if rows == "keys" else 1
    stages = 2 if size <= 128 else 1
    static = Static(params, block_q, block_kv, stages, size, group)
    return static, x._replace(queries=queries, keys=keys, order=order, counts=counts)
