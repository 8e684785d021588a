"""The ring: rotates K/V blocks and folds each into a result. The only file with collectives; it owns the gradient.

Every hop is   issue the rotation of the next block -> run the kernel on this block -> optimization_barrier.   The
barrier keeps the order on every TPU generation, so that the wire works behind the kernel. Nothing here knows what a
logit is. What travels is a pytree: K, V, their positions and segments; in backward also the sums of dK and dV, which
stay with the block they belong to. After Liu, Zaharia and Abbeel 2023, arXiv:2310.01889.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .kernels.base import Kernel, KernelParams
from .mask import Mask
from .partial import attends_to_nothing, wide
from .schedule import Schedule, permutation


@dataclasses.dataclass(frozen=True)
class RingSpec:
    """All that is known at trace time."""

    axis_name: str
    schedule: Schedule
    kernel: Kernel
    params: KernelParams
    unroll: int
    dkv_dtype: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(
    spec: RingSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    sinks: Float[Array, " N"] | None,
    mask: Mask,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of this rank's queries to all blocks: the output in q's dtype, the wide log-sum-exp."""
    return _forward(spec, q, k, v, sinks, mask)


def _ring_fwd(
    spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: Mask
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _forward(spec, q, k, v, sinks, mask)
    return (out, lse), (q, k, v, sinks, mask, out, lse)


def _ring_bwd(spec: RingSpec, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, sinks, mask, out, lse = residuals
    dout, dlse = cotangents
    # Else XLA takes the first rotation of backward for that of forward, and keeps its block in memory in between.
    k, v, mask, dout = jax.lax.optimization_barrier((k, v, mask, dout))
    dtype = wide(q.dtype)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1) - dlse
    dsinks = None
    if sinks is not None:  # the sink is a key whose value is zero: dsink = sum of p (0 - delta)
        p = jnp.exp(sinks.astype(dtype)[None, None, :] - lse)
        dsinks = -jnp.sum(jnp.where(attends_to_nothing(lse), 0.0, p * delta), axis=(0, 1)).astype(sinks.dtype)
    rows = (_head_major(q), _head_major(dout), jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2))
    dq, dk, dv = _backward(spec, rows, (_head_major(k), _head_major(v), *_travelling(mask)), mask)
    grads = (_head_major(g).astype(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True))
    return *grads, dsinks, None


ring.defvjp(_ring_fwd, _ring_bwd)


def _forward(spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: Mask) -> tuple[Array, Array]:
    rows = _head_major(q)
    num_hops = len(spec.schedule.hops)

    def hop(index: int, block: tuple[Any, ...], carry: Any) -> Any:
        k, v, *keys = block
        last = index == num_hops - 1
        return spec.kernel.forward(
            rows, k, v, _arrived(mask, keys), spec.params,
            carry=carry, finish=last, sinks=sinks if last else None,
        )  # fmt: skip

    out, lse = _walk(spec, (_head_major(k), _head_major(v), *_travelling(mask)), None, hop)
    # A remat policy that keeps these two never runs the ring again.
    return checkpoint_name(_head_major(out), "ring_out"), checkpoint_name(jnp.swapaxes(lse, 1, 2), "ring_lse")


def _backward(
    spec: RingSpec, rows: tuple[Array, Array, Array, Array], home: tuple[Any, ...], mask: Mask
) -> tuple[Array, Array, Array]:
    """dQ stays and is carried through the kernels; dK and dV travel with their block.

    State: (dq, sums of the current strand, sums that have come home).
    """
    q, dout, lse, delta = rows
    hops = spec.schedule.hops
    dkv_dtype = wide(q.dtype) if spec.dkv_dtype == "float32" else jnp.dtype(spec.dkv_dtype)

    def hop(index: int, block: tuple[Any, ...], state: Any) -> Any:
        (k, v, *keys), here = block, hops[index]
        dq, sums, landed = (None, None, None) if state is None else state
        # Issued before the kernel, used after it: the sums of the previous hop travel while this hop is computed.
        if sums is not None and here.first:
            landed, sums = _add(landed, _rotate(spec, sums, hops[index - 1].homeward)), None
        elif sums is not None:
            sums = _rotate(spec, sums, here.shift)
        dq, dk, dv = spec.kernel.backward(q, k, v, dout, lse, delta, _arrived(mask, keys), spec.params, dq_carry=dq)
        # On the last hop no block arrives, and nothing else orders the sums' rotation before the kernel.
        sums, dq, dk, dv = jax.lax.optimization_barrier((sums, dq, dk, dv))
        fresh = (dk.astype(dkv_dtype), dv.astype(dkv_dtype))
        return dq, _add(sums, fresh), landed

    dq, sums, landed = _walk(spec, home, None, hop)
    dk, dv = _add(landed, _rotate(spec, sums, hops[-1].homeward))
    return dq, dk, dv


def _walk(
    spec: RingSpec,
    home: tuple[Any, ...],
    state: Any,
    run_hop: Callable[[int, tuple[Any, ...], Any], Any],
) -> Any:
    """Run every hop of the schedule: ``run_hop(index, block, state)`` returns the new state.

    The first and the last hop stand alone (nothing to start from, a result to finish). Of those between, equal ones in
    a row become one compiled loop.
    """
    hops = spec.schedule.hops

    def step(index: int, block: tuple[Any, ...], state: Any) -> tuple[tuple[Any, ...], Any]:
        if index == len(hops) - 1:
            return block, run_hop(index, block, state)
        following = hops[index + 1]
        arriving = _rotate(spec, home if following.first else block, following.shift)
        return jax.lax.optimization_barrier((arriving, run_hop(index, block, state)))

    def kind(index: int) -> tuple[Any, ...]:
        if index in (0, len(hops) - 1) or hops[index].first or hops[index + 1].first:
            return (index,)  # alone
        return ("loop", hops[index].shift, hops[index + 1].shift)

    block = home
    for _, group in itertools.groupby(range(len(hops)), kind):
        indices = list(group)
        if len(indices) <= max(spec.unroll, 1):
            for index in indices:
                block, state = step(index, block, state)
        else:
            body = functools.partial(_loop_body, step, indices[0])
            (block, state), _ = jax.lax.scan(body, (block, state), length=len(indices), unroll=spec.unroll)
    return state


def _loop_body(step: Callable[..., Any], index: int, carry: tuple[Any, Any], _: None) -> tuple[Any, None]:
    block, state = carry
    return step(index, block, state), None


def _rotate(spec: RingSpec, tree: Any, shift: int) -> Any:
    """Move every rank's view by ``shift`` offsets. Serves K/V, positions, segments, dK and dV alike."""
    if shift % spec.schedule.num_shards == 0:
        return tree
    pairs = permutation(shift, spec.schedule.num_shards)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, spec.axis_name, pairs), tree)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def _travelling(mask: Mask) -> tuple[Array | None, Array | None]:
    """The part of the mask that belongs to the keys."""
    return mask.kv_positions, mask.kv_segments


def _arrived(mask: Mask, keys: list[Array | None]) -> Mask:
    """The mask between the own queries and the block that is here now."""
    kv_positions, kv_segments = keys
    return dataclasses.replace(mask, kv_positions=kv_positions, kv_segments=kv_segments)


def _head_major(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    """Swap sequence and heads, either way: kernels want the sequence next to the features."""
    return jnp.swapaxes(x, 1, 2)
