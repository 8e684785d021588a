"""What `ringjax tune` searches: keys of the table, the tiles worth a try for each, and the calls that are timed."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import tiles as tile_table
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
        options = _mosaic_options(self) if self.implementation == "pallas_gpu" else _triton_options(self, built_in)
        return [built_in, *(tiles for tiles in options if tiles != built_in and self.accepts(tiles))][:MOST_CANDIDATES]

    def refinements(self, best: Any) -> list[Any]:
        """Variations of the best that are not worth a product with all else."""
        if self.implementation != "pallas_gpu" or best.group_heads:
            return []
        return [dataclasses.replace(best, group_heads=n) for n in (4, 16) if n < self.heads]

    def accepts(self, tiles: Any) -> bool:
        """Whether a call would use exactly these."""
        return tiles.refusal(self.head_size) is None and self._settled(tiles) == tiles

    def _settled(self, tiles: Any) -> Any:
        """What the kernel makes of tiles in the table: it may shrink them."""
        x = jax.ShapeDtypeStruct((1, self.heads, self.length, self.head_size), jnp.dtype(self.dtype))
        x: Any = x
        with tile_table.instead(tiles):
            block = Block(q=x, k=x, v=x, mask=self._mask("masked" in self.kernel))
            if self.implementation == "pallas_triton":
                return triton_tiles.tile_sizes(self.kernel, block, self.params)
            whole = "carry" not in self.kernel
            return mosaic_tiles.forward_tiles(x, x, block.mask, self.params, whole=whole)

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


def _mosaic_options(problem: Problem) -> list[Any]:
    """Those that promise something: all ways to hide waits at the largest tiles that fit, one or two at others."""
    size, options = problem.head_size, []
    largest = 64 if size == 256 else 128
    for compute, block_kv, stages, overlap, turns in itertools.product(
        (2, 3), (largest, 64), (2, 3), (True, False), ("issued", "logits", "none")
    ):
        if turns != "issued" and (block_kv != largest or stages != 2):
            continue
        if block_kv != largest and (stages != 3 or not overlap):
            continue  # small tiles want what hides most
        for registers in _registers(compute, "masked" in problem.kernel):
            tiles = mosaic_tiles.TileSizes(compute, block_kv, stages, turns=turns, overlap=overlap, registers=registers)
            if tiles not in options and _accumulators(tiles, size) <= registers[1]:
                options.append(tiles)
    return options


def _registers(compute: int, masked: bool) -> list[tuple[int, int]]:
    """Of loading and multiplying warpgroups: of masked tiles, the former looks through values and needs more."""
    if compute == 3:
        return [(32, 160)]
    return [(24, 240), (40, 232)] if masked else [(24, 240)]


def _accumulators(tiles: Any, size: int) -> int:
    """Registers of a thread for acc, logits, weights of the tile before, and what else there is."""
    return size // 2 + tiles.block_kv // 2 + (tiles.block_kv // 4 if tiles.overlap else 0) + 24


def _triton_options(problem: Problem, built_in: Any) -> list[Any]:
    """Neighbours of the built-in tiles, the nearest first, whose sums stay in registers."""
    options = []
    float32 = dtype_class(problem.dtype) == "float32"
    blocks, warps = (16, 32, 64, 128, 256), (8,) if float32 else (4, 8)
    size = problem.head_size
    for block_q, block_kv, num_warps, num_stages in itertools.product(blocks, blocks, warps, (1, 2, 3, 4)):
        rows = block_kv if problem.kernel == "dkv" else block_q
        of_rows, logits = {"forward": (1, 1), "dq": (1, 2), "dkv": (2, 2)}[problem.kernel]
        sums = of_rows * rows * size + logits * block_q * block_kv
        if sums > 256 * 32 * num_warps:
            continue
        # float32 products are unrolled in full, which the compiler takes minutes over if there are many.
        if float32 and block_q * block_kv > 2 * built_in.block_q * built_in.block_kv:
            continue
        options.append(triton_tiles.TileSizes(block_q, block_kv, num_warps, num_stages))
    return sorted(filter(problem.accepts, options), key=lambda tiles: _distance(tiles, built_in))


def _distance(tiles: Any, other: Any) -> float:
    """How many doublings and stages lie between the two."""
    names = ("block_q", "block_kv", "num_warps")
    doublings = sum(abs(math.log2(getattr(tiles, name) / getattr(other, name))) for name in names)
    return doublings + abs(tiles.num_stages - other.num_stages)
