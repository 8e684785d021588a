"""The ring: rotates K/V blocks and folds each into a result. The only file with collectives; it owns the gradient.

Every hop is   issue the rotation of the next block -> run the kernel on this block -> optimization_barrier.   The
barrier keeps the order on every TPU generation, so that the wire works behind the kernel. Nothing here knows what a
logit or a position is. What travels is one pytree: K, V and the part of the mask that no rank can compute; in backward
also the sums of dK and dV, which stay with the block they belong to. After Liu, Zaharia and Abbeel 2023,
arXiv:2310.01889.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .kernels.base import Block, Carry, Kernel, KernelParams, Upstream
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


class ShardMask(Protocol):
    """The mask of this rank's queries, whatever it is made of. A pytree of arrays that need no gradient."""

    @property
    def travels(self) -> Any:
        """The part of it that belongs to the keys and that no rank can compute. A pytree, maybe an empty one."""
        ...

    def between(self, owner: Array, arrived: Any) -> Any:
        """The mask between the own queries and the block of rank ``owner``, of which ``arrived`` has travelled."""
        ...


class Travelling(NamedTuple):
    """A block on its way: what moves around the ring, and nothing else does."""

    k: Array
    v: Array
    mask: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(
    spec: RingSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    sinks: Float[Array, " N"] | None,
    mask: ShardMask,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of this rank's queries to all blocks: the output in q's dtype, the wide log-sum-exp."""
    return _forward(spec, q, k, v, sinks, mask)[:2]


def _ring_fwd(
    spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: ShardMask
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse, *kept = _forward(spec, q, k, v, sinks, mask)
    return (out, lse), (q, k, v, sinks, mask, out, lse, *kept)


def _ring_bwd(spec: RingSpec, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, sinks, mask, out, lse, saved, rest, sink = residuals
    dout, dlse = cotangents
    # Otherwise XLA takes the first rotation of backward for that of forward, and keeps its block in memory in between.
    k, v, mask, dout = jax.lax.optimization_barrier((k, v, mask, dout))
    dtype = wide(q.dtype)
    wide_out = out.astype(dtype) if rest is None else out.astype(dtype) + _head_major(rest).astype(dtype)
    delta = jnp.sum(wide_out * dout.astype(dtype), axis=-1) - dlse
    dsinks = None
    if sinks is not None:  # the sink is a key whose value is zero: dsink = sum of p (0 - delta)
        p = jnp.exp(sinks.astype(dtype)[None, None, :] - lse) if sink is None else jnp.swapaxes(sink, 1, 2)
        dsinks = -jnp.sum(jnp.where(attends_to_nothing(lse), 0.0, p * delta), axis=(0, 1)).astype(sinks.dtype)
    upstream = Upstream(
        dout=_head_major(dout), lse=jnp.swapaxes(lse, 1, 2), delta=jnp.swapaxes(delta, 1, 2), saved=saved
    )
    home = Travelling(_head_major(k), _head_major(v), mask.travels)
    grads = _backward(spec, _head_major(q), upstream, home, mask)
    grads = (_head_major(g).astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return *grads, dsinks, None


ring.defvjp(_ring_fwd, _ring_bwd)


def _forward(spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: ShardMask) -> tuple[Any, ...]:
    """The output, the log-sum-exp, and what else the kernel keeps for backward."""
    queries, num_hops = _head_major(q), len(spec.schedule.hops)

    def hop(index: int, here: Travelling, owner: Array, carry: Carry) -> Carry:
        block = Block(q=queries, k=here.k, v=here.v, mask=mask.between(owner, here.mask), sinks=sinks)
        return spec.kernel.forward(block, spec.params, carry, finish=index == num_hops - 1)

    out, lse, saved, rest, sink = _walk(spec, Travelling(_head_major(k), _head_major(v), mask.travels), hop)
    # A remat policy that keeps these two names never runs the ring again.
    out, rest = checkpoint_name((_head_major(out), rest), "ring_out")
    lse, saved, sink = checkpoint_name((jnp.swapaxes(lse, 1, 2), saved, sink), "ring_lse")
    return out, lse, saved, rest, sink


class _Sums(NamedTuple):
    """State of the backward pass. None: nothing yet."""

    dq: Carry  # stays, and is carried through the kernels
    strand: tuple[Array, Array] | None  # dk and dv of the current strand, which travel with their block
    landed: tuple[Array, Array] | None  # those that have come home


def _backward(
    spec: RingSpec, q: Array, upstream: Upstream, home: Travelling, mask: ShardMask
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, head-major."""
    hops = spec.schedule.hops
    dkv_dtype = wide(q.dtype) if spec.dkv_dtype == "float32" else jnp.dtype(spec.dkv_dtype)

    def hop(index: int, arrived: Travelling, owner: Array, state: _Sums | None) -> _Sums:
        here, finish = hops[index], index == len(hops) - 1
        dq, strand, landed = state or _Sums(None, None, None)
        # Issued before the kernel, used after it: the sums of the previous hop travel while this hop is computed.
        if strand is not None and here.first:
            landed, strand = _add(landed, _rotate(spec, strand, hops[index - 1].homeward)), None
        elif strand is not None:
            strand = _rotate(spec, strand, here.shift)
        block = Block(q=q, k=arrived.k, v=arrived.v, mask=mask.between(owner, arrived.mask))
        dq, dk, dv = spec.kernel.backward(block, upstream, spec.params, dq, finish=finish)
        # On the last hop no block arrives, and nothing else orders the sums' rotation before the kernel.
        strand, dq, dk, dv = jax.lax.optimization_barrier((strand, dq, dk, dv))
        return _Sums(dq, _add(strand, (dk.astype(dkv_dtype), dv.astype(dkv_dtype))), landed)

    dq, strand, landed = _walk(spec, home, hop)
    dk, dv = _add(landed, _rotate(spec, strand, hops[-1].homeward))
    return dq, dk, dv


def _walk(spec: RingSpec, home: Travelling, run_hop: Callable[[int, Travelling, Array, Any], Any]) -> Any:
    """Run every hop of the schedule: ``run_hop(index, block, owner, state)`` returns the new state, None at first.

    The first and the last hop stand alone (nothing to start from, a result to finish). Of those between, equal ones in
    a row become one compiled loop, in which ``index`` is that of its first hop.
    """
    hops, num_shards = spec.schedule.hops, spec.schedule.num_shards
    rank = jax.lax.axis_index(spec.axis_name)

    def step(index: int, block: Travelling, owner: Array, state: Any) -> tuple[Travelling, Array, Any]:
        if index == len(hops) - 1:
            return block, owner, run_hop(index, block, owner, state)
        following = hops[index + 1]
        arriving = _rotate(spec, home if following.first else block, following.shift)
        next_owner = _shifted(rank if following.first else owner, following.shift, num_shards)
        arriving, state = jax.lax.optimization_barrier((arriving, run_hop(index, block, owner, state)))
        return arriving, next_owner, state

    def kind(index: int) -> tuple[Any, ...]:
        if index in (0, len(hops) - 1) or hops[index].first or hops[index + 1].first:
            return (index,)  # alone
        return ("loop", hops[index].shift, hops[index + 1].shift)

    block, owner, state = home, rank, None
    for _, group in itertools.groupby(range(len(hops)), kind):
        indices = list(group)
        if len(indices) <= max(spec.unroll, 1):
            for index in indices:
                block, owner, state = step(index, block, owner, state)
        else:
            body = functools.partial(_loop_body, step, indices[0])
            carry = (block, owner, state)
            (block, owner, state), _ = jax.lax.scan(body, carry, length=len(indices), unroll=spec.unroll)
    return state


def _loop_body(step: Callable[..., Any], index: int, carry: tuple[Any, ...], _: None) -> tuple[Any, None]:
    return step(index, *carry), None


def _shifted(owner: Array, shift: int, num_shards: int) -> Array:
    """Whose block it is after a rotation by ``shift`` offsets."""
    return jax.lax.rem(owner + jnp.int32(shift % num_shards), jnp.int32(num_shards))


def _rotate(spec: RingSpec, tree: Any, shift: int) -> Any:
    """Move every rank's view by ``shift`` offsets. Serves blocks, dK and dV alike."""
    if shift % spec.schedule.num_shards == 0:
        return tree
    pairs = permutation(shift, spec.schedule.num_shards)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, spec.axis_name, pairs), tree)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def _head_major(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    """Swap sequence and heads, either way: kernels want the sequence next to the features."""
    return jnp.swapaxes(x, 1, 2)
