"""The contract between the ring and a block kernel.

Everything is head-major. Shapes: q [B, N, T, H], k [B, K, S, H], v [B, K, S, Hv], dout [B, N, T, Hv];
lse, delta [B, N, T]. Query head n belongs to K/V head n // G, G = N / K; K and V are never repeated. "Wide" is
float32, or float64 for float64 inputs, see :func:`ringjax.partial.wide`: everything that is summed over hops is wide.
"""

import dataclasses
from typing import Protocol

from jaxtyping import Array, Float

from ..mask import Mask
from ..partial import Partial


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


class Kernel(Protocol):
    """One block of attention, forward and backward.

    Must be deterministic: the same bits on every run; where that costs speed, only if ``params.deterministic``.
    """

    def forward(
        self,
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
        """Fold one block into the running softmax.

        Args:
          carry: the partial result over the blocks so far, as this kernel returned it, which alone reads it: it may be
            padded, in blocks, or in base 2. None on the first hop.
          finish: False returns the new Partial (wide, unnormalised). True, on the last hop, returns the output in
            q's dtype and the wide natural-log lse, -inf where nothing was attended.
          sinks: one more logit a head in the denominator; given only where finish is True.

        NaN or Inf in a key or value must reach only rows that attend it.
        """
        ...

    def backward(
        self,
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
        """The gradient of one block, all wide: dq_carry + dq, dk, dv (summed over the G query heads of a K/V head).

        With p = exp(logits - lse) where attended, else 0, and delta = sum(out * dout) - dlse:

            dv = p^T dout,   ds = p (dout v^T - delta) * dlogits/d(q.k),   dq = ds k,   dk = ds^T q.
        """
        ...
