"""What `ringjax tune` searches: keys of the table, the tiles worth a try for each, and the calls that are timed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels.base import Block, KernelParams, Upstream
from ..kernels.mosaic import forward as mosaic_forward
from ..kernels.mosaic import tiles as mosaic_tiles
from ..kernels.tiles import Key, dtype_class
from ..kernels.triton import backward as triton_backward
from ..kernels.triton import common as triton_common
from ..kernels.triton import forward as triton_forward
from ..kernels.triton import tiles as triton_tiles
from ..layout import Contiguous
from ..mask import Mask, Tokens
from ..partial import Partial

HEAD_SIZES = mosaic_tiles.HEAD_SIZES
MOST_CANDIDATES = 24  # of one key: each is compiled
# Kernels by implementation and direction. Mosaic's backward kernels have the one tile that their registers allow.
KERNELS = {
    ("pallas_gpu", "forward"): ("forward", "forward, masked", "forward, carry", "forward, carry, masked"),
    ("pallas_triton", "forward"): ("forward",),
    ("pallas_triton", "backward"): ("dkv", "dq"),
}

# A function of one call and its arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One key of the table, and the size of the calls that decide it."""

    implementation: str
    kernel: str
    dtype: str
    head_size: int
    length: int
    heads: int
    device_kind: str
    interpret: bool = False

    @property
    def key(self) -> Key:
        return Key(self.device_kind, self.implementation, self.kernel, dtype_class(self.dtype), self.head_size)

    @property
    def params(self) -> KernelParams:
        return KernelParams(self.head_size**-0.5, device_kind=self.device_kind, interpret=self.interpret)

    def built_in(self) -> Any:
        """The tiles without a table of the user's."""
        return self._settled(None)

    def candidates(self) -> list[Any]:
        """Tiles worth a try, the built-in ones first. Each is what the kernel would use if the table said so."""
        built_in = self.built_in()
        if self.implementation == "pallas_gpu":
            options = mosaic_tiles.candidates(self.kernel, self.head_size)
        else:
            options = triton_tiles.candidates(self.kernel, self.head_size, self.dtype, built_in)
        return [built_in, *(tiles for tiles in options if tiles != built_in and self.accepts(tiles))][:MOST_CANDIDATES]

    def refinements(self, best: Any) -> list[Any]:
        """Variations of the best that are not worth a product with all else."""
        return mosaic_tiles.refinements(best, self.heads) if self.implementation == "pallas_gpu" else []

    def accepts(self, tiles: Any) -> bool:
        """Whether a call would use exactly these."""
        return tiles.refusal(self.head_size) is None and self._settled(tiles) == tiles

    def _settled(self, tiles: Any) -> Any:
        """What the kernel makes of tiles in the table, None for its own: it may shrink them."""
        x = jax.ShapeDtypeStruct((1, self.heads, self.length, self.head_size), jnp.dtype(self.dtype))
        x: Any = x
        look_up = lambda built_in, key: built_in if tiles is None else tiles  # noqa: E731
        block = Block(q=x, k=x, v=x, mask=self._mask("masked" in self.kernel))
        if self.implementation == "pallas_triton":
            return triton_tiles.tile_sizes(self.kernel, block, self.params, look_up=look_up)
        whole = "carry" not in self.kernel
        return mosaic_tiles.forward_tiles(x, x, block.mask, self.params, whole=whole, look_up=look_up)

    def arrays(self) -> tuple[Any, ...]:
        """q, k, v, dout, and a carry: normal numbers, since zeros would run faster than data."""
        keys = jax.random.split(jax.random.key(0), 5)
        shape = (1, self.length, self.heads, self.head_size)
        operands = (jax.random.normal(key, shape, jnp.float32).astype(self.dtype) for key in keys[:4])
        rows = jnp.ones((1, self.heads, self.length), jnp.float32)
        acc = jax.random.normal(keys[4], (1, self.heads, self.length, self.head_size), jnp.float32)
        return *operands, Partial(acc, rows, rows)

    def _mask(self, causal: bool) -> Mask:
        """Causal, of a whole sequence, or full."""
        tokens = Tokens(positions=Contiguous().runs(0, self.length, 1) if causal else None)
        return Mask(queries=tokens, keys=tokens, right=0 if causal else None)

    def calls(self, tiles: Any, arrays: Sequence[Any]) -> list[Call]:
        """One call, or where the table does not tell them apart a full and a causal one."""
        if self.implementation == "pallas_gpu":
            return [self._forward(tiles, arrays, "masked" in self.kernel, "carry" in self.kernel)]
        if self.kernel == "forward":
            return [self._forward(tiles, arrays, masked, False) for masked in (False, True)]
        return [self._backward(tiles, arrays, masked) for masked in (False, True)]

    def _forward(self, tiles: Any, arrays: Sequence[Any], masked: bool, carries: bool) -> Call:
        q, k, v, _, carry = arrays
        module: Any = mosaic_forward if self.implementation == "pallas_gpu" else triton_forward

        def call(q: Any, k: Any, v: Any, carry: Any) -> Any:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            block = Block(q=q, k=k, v=v, mask=self._mask(masked))
            if carry is not None and self.implementation == "pallas_gpu":
                shape = mosaic_forward.carry_shape(tiles, q.shape, v.shape[3])
                carry = carry._replace(acc=carry.acc.reshape(shape))
            result = module.forward(block, self.params, tiles, carry, finish=carry is None)
            return result if carries else (jnp.swapaxes(result.out, 1, 2), result.lse)

        return call, (q, k, v, carry if carries else None)

    def _backward(self, tiles: Any, arrays: Sequence[Any], masked: bool) -> Call:
        q, k, v, dout, carry = arrays

        def call(q: Any, k: Any, v: Any, dout: Any, ones: Any) -> Any:
            lse = ones * math.log(self.length)  # about what it is
            q, k, v, dout = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, dout))
            block = Block(q=q, k=k, v=v, mask=self._mask(masked))
            upstream = Upstream(dout=dout, lse=lse, delta=jnp.zeros_like(lse))
            if self.kernel == "dkv":
                dkv = triton_backward.dkv(block, upstream, self.params, tiles)
                return jax.tree.map(triton_common.token_major, dkv)
            return triton_backward.dq(block, upstream, self.params, tiles, None)

        return call, (q, k, v, dout, carry.max)
