"""Tuning of a ring attention call. Nothing here changes what is computed, only how fast and in how much memory."""

import dataclasses

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu", "pallas_triton")
DIRECTIONS = ("forward", "both")
STRATEGIES = ("ring", "all_to_all", "all_gather")
AUTO = "auto"
DKV_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """Tuning only; the defaults are good.

    Attributes:
      implementation: the block kernel: "xla", "pallas_tpu", "pallas_gpu" or "pallas_triton". A named one that the
        platform lacks raises. None: the best one for the platform; on NVIDIA GPUs "pallas_gpu" on Hopper for 16-bit
        inputs and heads of up to 256, otherwise "pallas_triton". All multiply float32 in full: "xla" does not take TF32
        on GPUs, where logits that share an offset would lose their digits.
      strategy: how the sequence is shared along each axis of ``axis_name``: one word for all of them, or one for each.
        "ring": K/V blocks travel; memory O(n / C). "all_to_all": tokens are exchanged for heads (Ulysses), N must be a
        multiple of the size of the axis. "all_gather": K/V of the axis are gathered; where a window leaves ranks out,
        only what it needs is fetched, as "ring" does. Exchanges come first, then what is left goes round the rings;
        several are rings within rings, the outermost with the fewest transfers. "auto": for all axes what
        :func:`ringjax.plan` predicts to be fastest for forward and backward within a quarter of the device's memory;
        "ring" on devices that it does not know. A cache is sharded over its keys
        whatever the strategy, so :func:`ringjax.cached_attention` needs none.
      direction: of the rings. "forward": every block travels the same way round. "both": half of it each way, of the
        K/V heads if their number is even, otherwise of the tokens, so that each direction of a link carries half. Under
        a window blocks take the shorter way in any case.
      rings: so many rings without a common link on a torus of TPUs, a part of every block on each: 2 on a torus of two
        dimensions, up to 3 on one of three. One axis with the strategy "ring" must go round the whole torus. With
        ``direction="both"`` each ring is used in both directions.
      block_q, block_kv: tile sizes in tokens; None chooses, on GPU from the table that `ringjax tune` has written, if
        there is one. A kernel may pad a shard up to a multiple of them. The backward pass of "pallas_gpu" has tiles of
        its own, for which the registers leave no choice.
      unroll: hops per iteration of the compiled loop. None chooses: 1 on CPU, where compile time counts, else 2,
        which spares the copies of K and V that a rolled loop makes. At least the number of hops: no loop.
      dkv_dtype: dtype in which dK and dV are summed and travel. "float32" loses nothing (float64 inputs stay in
        float64); the 16-bit ones halve the bytes of these on the wire, and cost precision with every hop. On the last
        trip of one ring, home, where nothing is added, they have the dtype of the inputs if that is narrower.
      interpret: run the named Pallas kernel in JAX's interpreter, which any platform has: slow, to debug and to test.
      deterministic: the same bits on every run, also where that costs speed: "pallas_gpu" sums dQ, and dK and dV of
        long sequences, in the order in which its programs arrive unless it is set. All else, and every other
        implementation, is deterministic anyway.

    Raises:
      ValueError: for a field that is not what it must be, naming it, what is required and what was given.
    """

    implementation: str | None = None
    strategy: str | tuple[str, ...] = "ring"
    direction: str = "forward"
    rings: int = 1
    block_q: int | None = None
    block_kv: int | None = None
    unroll: int | None = None
    dkv_dtype: str = "float32"
    interpret: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        _one_of("implementation", self.implementation, (None, *IMPLEMENTATIONS))
        if isinstance(self.strategy, list):
            object.__setattr__(self, "strategy", tuple(self.strategy))
        several = isinstance(self.strategy, tuple) and self.strategy
        for word in several or (self.strategy,):
            _one_of("strategy", word, STRATEGIES if several else (*STRATEGIES, AUTO))
        _one_of("direction", self.direction, DIRECTIONS)
        _one_of("dkv_dtype", self.dkv_dtype, DKV_DTYPES)
        for name in ("interpret", "deterministic"):
            _one_of(name, getattr(self, name), (False, True))
        if self.interpret and not str(self.implementation).startswith("pallas"):
            raise ValueError(
                f"RingConfig: interpret=True needs implementation to name a Pallas kernel. Got {self.implementation!r}."
            )
        if self.rings is None:
            raise ValueError("RingConfig: rings must be a positive integer. Got None.")
        for name in ("block_q", "block_kv", "unroll", "rings"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"RingConfig: {name} must be a positive integer or None. Got {value!r}.")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"RingConfig: {name} must be one of {choices}. Got {value!r}.")
