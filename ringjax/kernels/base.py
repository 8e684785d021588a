"""The contract between the ring and a block kernel.

Everything is head-major. Query head n belongs to K/V head n // G, G = N / K; K and V are never repeated. "Wide" is
float32, or float64 for float64 inputs, see :func:`ringjax.partial.wide`: everything that is summed over hops is wide.
A new argument of the kernels is a field of one of these records.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxtyping import Array, Float

from ..mask import Mask

# What a kernel keeps from hop to hop: a pytree that it alone reads. It may be padded, in blocks, or in base 2.
Carry: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class KernelParams:
    """What a kernel needs to know at trace time.

    logits = soft_cap * tanh(scale * q.k / soft_cap), or scale * q.k without a cap.
    """

    scale: float
    logits_soft_cap: float | None = None
    block_q: int | None = None
    block_kv: int | None = None
    device_kind: str = ""  # as JAX names it; tile sizes depend on it
    interpret: bool = False  # run a Pallas kernel in JAX's interpreter
    deterministic: bool = False  # the same bits on every run, where that costs speed
    dkv_final: bool = False  # nothing is added to dk and dv of a call, so that they may come rounded


class Block(NamedTuple):
    """A shard of queries and the block of keys and values that it meets on this hop."""

    q: Float[Array, "B N T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S Hv"]
    mask: Mask
    sinks: Float[Array, " N"] | None = None  # one more logit per head, in the denominator only


class Finished(NamedTuple):
    """What forward returns from the last hop."""

    out: Float[Array, "B N T Hv"]  # in q's dtype
    lse: Float[Array, "B N T"]  # natural log, wide; -inf where a query attends to nothing
    saved: Any = None  # a pytree that only this kernel's backward reads
    rest: Float[Array, "B N T Hv"] | None = None  # what rounding took off a 16-bit out, for delta. None: done without
    sink: Float[Array, "B N T"] | None = None  # the weight of the sink. None: it follows from lse, less exactly


class Upstream(NamedTuple):
    """What backward is given of the output: its cotangent, what forward kept, and delta = sum(out * dout) - dlse."""

    dout: Float[Array, "B N T Hv"]
    lse: Float[Array, "B N T"]  # wide
    delta: Float[Array, "B N T"]  # wide
    saved: Any = None  # see Finished


class Gradients(NamedTuple):
    """What backward returns: dq as a carry, or as [B, N, T, H] from the last hop; dk and dv of this block.

    All wide; dk and dv may be in the dtype of k and v if ``params.dkv_final``.
    """

    dq: Carry | Float[Array, "B N T H"]
    dk: Float[Array, "B K S H"]  # summed over the G query heads of a K/V head
    dv: Float[Array, "B K S Hv"]


class Kernel(Protocol):
    """One block of attention, forward and backward.

    Must be deterministic: the same bits on every run; where that costs speed, only if ``params.deterministic``. NaN or
    Inf in a key or value reaches only queries that attend to it. Absent tokens take part in nothing.

    Attributes:
      TOKEN_MAJOR: whether it reads its arrays in memory as [B, L, N, H]. What travels has that order where XLA cannot
        choose one.
    """

    TOKEN_MAJOR: bool

    def forward(self, block: Block, params: KernelParams, carry: Carry | None, *, finish: bool) -> Carry | Finished:
        """Fold one block into the running softmax.

        Args:
          carry: what this kernel returned on the hop before. None on the first hop.
          finish: False returns the new carry. True, on the last hop, adds the sinks and returns the result.
        """
        ...

    def backward(
        self, block: Block, upstream: Upstream, params: KernelParams, carry: Carry | None, *, finish: bool
    ) -> Gradients:
        """The gradient of one block; dq is added to the carry. Logits are those of forward, with the same rounding.

        With p = exp(logits - lse) where attended, otherwise 0, and delta = sum(out * dout) - dlse:

            dv = p^T dout,   ds = p (dout v^T - delta) * dlogits/d(q.k),   dq = ds k,   dk = ds^T q.

        Args:
          carry: dq of the hop before. None on the first hop.
          finish: True, on the last hop, returns dq itself, wide and in the shape of q.
        """
        ...
