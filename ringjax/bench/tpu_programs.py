"""The programs that `ringjax bench tpu-static` compares: this package's block kernels and those that come with JAX.

Each builder takes a TPU device and sizes, and returns a function of arrays with their shapes. One batch row, one head,
T = S, bfloat16, full attention. All start from the arrays of a layer and end with its results; a backward program
includes the row sums of out * dout. JAX's kernels give gradients in bfloat16; ours in float32, as a ring needs them.
Masks of JAX's splash kernel are taken out: they go to it by scalar prefetch, which the compiler's profiler cannot read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels.base import Block, KernelParams, Upstream
from ..kernels.tpu import kernel as tpu
from ..mask import Mask
from .static_cycles import Built


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def ringjax_forward(device: Any, *, length: int, head_size: int, carry: bool = False) -> Built:
    """``carry``: a hop in the middle of a ring, which takes and gives the running softmax."""
    params = KernelParams(head_size**-0.5, device_kind=device.device_kind)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, before: Any = None, *, finish: bool) -> Any:
        return tpu.forward(Block(q=q, k=k, v=v, mask=Mask()), params, before, finish=finish)

    x = _array(1, 1, length, head_size)
    if not carry:
        return Built(functools.partial(forward, finish=True), (x, x, x))
    hop = functools.partial(forward, finish=False)
    return Built(hop, (x, x, x, jax.eval_shape(hop, x, x, x)), donated=(3,))


def ringjax_backward(device: Any, *, length: int, head_size: int, carry: bool = False) -> Built:
    """``carry``: with the dq of the hops before."""
    params = KernelParams(head_size**-0.5, device_kind=device.device_kind)

    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array, *dq: jax.Array
    ) -> Any:
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        block, upstream = Block(q=q, k=k, v=v, mask=Mask()), Upstream(dout=dout, lse=lse, delta=delta)
        return tpu.backward(block, upstream, params, dq[0] if dq else None, finish=not dq)

    x = _array(1, 1, length, head_size)
    arguments = (x, x, x, x, _array(1, 1, length, dtype=jnp.float32), x)
    if not carry:
        return Built(backward, arguments)
    return Built(backward, (*arguments, _array(*x.shape, dtype=jnp.float32)), donated=(6,))


def ringjax_cached(
    device: Any, *, batch: int, length: int, heads: int, kv_heads: int, head_size: int, queries: int = 1
) -> Built:
    """Queries against keys and values as a cache has them, [B, S, K, H], all of them attended to."""
    params = KernelParams(head_size**-0.5, device_kind=device.device_kind)

    def forward(q: jax.Array, *kv: jax.Array) -> Any:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, *kv))
        return tpu.forward(Block(q=q, k=k, v=v, mask=Mask()), params, None, finish=True)[:2]

    cached = _array(batch, length, kv_heads, head_size)
    return Built(forward, (_array(batch, queries, heads, head_size), cached, cached))


def splash_forward(device: Any, *, length: int, head_size: int, blocks: dict[str, Any]) -> Built:
    """``blocks`` are the fields of splash's BlockSizes."""
    del device  # Unused.
    x = _array(1, length, head_size)
    return Built(_splash(length, blocks), (x, x, x))


def splash_backward(device: Any, *, length: int, head_size: int, blocks: dict[str, Any]) -> Built:
    del device  # Unused.
    return _backward_of(_splash(length, blocks), _array(1, length, head_size))


def flash_forward(device: Any, *, length: int, head_size: int, blocks: dict[str, Any]) -> Built:
    """``blocks`` are the fields of flash's BlockSizes."""
    del device  # Unused.
    x = _array(1, 1, length, head_size)
    return Built(_flash(head_size, blocks), (x, x, x))


def flash_backward(device: Any, *, length: int, head_size: int, blocks: dict[str, Any]) -> Built:
    del device  # Unused.
    return _backward_of(_flash(head_size, blocks), _array(1, 1, length, head_size))


def _backward_of(attend: Any, x: jax.ShapeDtypeStruct) -> Built:
    """The backward pass alone: what it takes from the forward pass comes in as arrays."""
    out, pull = jax.eval_shape(lambda q, k, v: jax.vjp(attend, q, k, v), x, x, x)
    return Built(lambda pull, dout: pull(dout), (pull, out))


def _splash(length: int, blocks: dict[str, Any]) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    made = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((length, length))]),
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
    )
    none = mask_info.MaskInfo(None, None, None, None, None, None)
    return splash.SplashAttentionKernel(none, none, none, **made.kwargs)


def _flash(head_size: int, blocks: dict[str, Any]) -> Any:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = flash.BlockSizes(**blocks)
    return lambda q, k, v: flash.flash_attention(q, k, v, sm_scale=head_size**-0.5, block_sizes=sizes)
