"""How a cache lies in the memory of a TPU, and how a kernel reads it as it lies: any other order costs a copy of it.

XLA gives an array [B, S, K, H] the order in which its tiles (8 sublanes x 128 lanes) are padded least:

    "tokens"     [B, S, K, H]   H fills lanes and K fills sublanes: the heads of a token are neighbours
    "heads"      [B, K, S, H]   H fills lanes, K does not fill sublanes
    "features"   [B, K, H, S]   H does not fill lanes: tokens do

If XLA decides otherwise, a program copies, and is right all the same; a test reads what it decides.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from .tiles import LANES

_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Of keys or of values.

    Attributes:
      order: see the module.
      pairs: of 16-bit numbers a sublane holds two, here of two heads, which are read together.
    """

    order: Literal["tokens", "heads", "features"]
    pairs: bool = False

    @property
    def token_axis(self) -> int:
        """Of a head's matrix."""
        return 1 if self.order == "features" else 0

    def operands(self, x: Array) -> tuple[Array, ...]:
        """What a kernel is given of [B, K, S, H]; a transpose of it that XLA takes for the array as it lies.

        In the order "tokens" once for every 128 features: strided loads have no more lanes.
        """
        if self.order == "heads":
            return (x,)
        if self.order == "features":
            return (jnp.swapaxes(x, 2, 3),)
        return (jnp.swapaxes(x, 1, 2),) * (x.shape[3] // LANES)

    def specs(
        self, x: Array, heads: int, block: int, at: Callable[..., tuple[Any, Any, Any]]
    ) -> tuple[pl.BlockSpec, ...]:
        """Tiles of some heads and ``block`` tokens. ``at``: batch row, which heads, and tile of a step."""
        size = x.shape[3]
        # Of an operand, without the batch.
        shape = {"tokens": (block, heads, LANES), "heads": (heads, block, size), "features": (heads, size, block)}

        def spec(features: int) -> pl.BlockSpec:
            def index_map(*step: Any) -> tuple[Any, ...]:
                b, n, tile = at(*step)
                where = {"tokens": (tile, n, features), "heads": (n, tile, 0), "features": (n, 0, tile)}
                return (b, *where[self.order])

            return pl.BlockSpec((None, *shape[self.order]), index_map)

        return tuple(spec(n) for n in range(size // LANES if self.order == "tokens" else 1))

    def load(self, refs: tuple[Any, ...], first: int, count: int) -> list[Array]:
        """The matrices of ``count`` heads of a tile from ``first`` on, [tokens, H] or [H, tokens]; whole pairs."""
        heads = range(first, first + count)
        if self.order != "tokens":
            return [refs[0][n] for n in heads]
        if not self.pairs:
            return [_joined([_strided(ref, n) for ref in refs]) for n in heads]
        found = []
        for pair in heads[::2]:
            words = [_strided(ref, pair, jnp.int32) for ref in refs]
            found += [_joined([half(x).astype(refs[0].dtype) for x in words]) for half in (_low, _high)]
        return found


def arrangement(x: Array) -> Arrangement:
    """That of keys or values [B, K, S, H] of a cache."""
    heads, size, number = x.shape[1], x.shape[3], x.dtype.itemsize
    if size % LANES:
        return Arrangement(order="features")
    # Fewer than 8 heads make smaller tiles, of at least one sublane.
    if heads % _SUBLANES and heads not in {2: (2, 4), 4: (1, 2, 4)}[number]:
        return Arrangement(order="heads")
    return Arrangement(order="tokens", pairs=number == 2)


def _strided(ref: Any, head: int, words: Any = None) -> Array:
    """One head of [tokens, heads, 128]: rows at a stride. As ``words``: this one and the next in one number."""
    tokens, heads, lanes = ref.shape
    rows = ref.reshape(tokens * heads, lanes)
    if words is not None:
        rows, head, heads = rows.bitcast(words), head // 2, heads // 2
    return rows[pl.ds(head, tokens, stride=heads), :]


def _low(words: Array) -> Array:
    """The bfloat16 numbers in the lower halves, in float32."""
    return jax.lax.bitcast_convert_type(words << 16, jnp.float32)


def _high(words: Array) -> Array:
    return jax.lax.bitcast_convert_type(words & jnp.int32(-(2**16)), jnp.float32)


def _joined(parts: list[Array]) -> Array:
    """Side by side."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
