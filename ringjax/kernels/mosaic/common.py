"""What the Mosaic GPU kernels share: tile sizes, the mask as arrays in device memory, and small pieces of a kernel.

GPU terms: a warpgroup is 128 threads, the unit that multiplies (WGMMA): the left operand comes from SMEM or registers,
the right one from SMEM, the float32 result goes to registers. SMEM is the shared memory of a multiprocessor, GMEM the
device memory; TMA copies tiles between the two behind the compute.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...mask import KeySide, Mask, QuerySide
from .. import tiles as tile_table
from ..base import KernelParams
from ..softmax import LOG2_E as LOG2_E

LN_2 = math.log(2.0)

# Queries that one warpgroup multiplies at a time: the height of a WGMMA.
WARPGROUP_ROWS = 64
HEAD_SIZES = (64, 128, 256)
# Columns of a matrix that the four threads of one row have between them.
COLUMN_BLOCK = 8
# Multiprocessors of a Hopper card. On one that has fewer, the surplus blocks of a persistent grid wait their turn.
MULTIPROCESSORS = 132

SMEM_BYTES = 227 * 1024  # what a block of threads may have
# Registers of a thread of each warpgroup, summed over warpgroups, that a block of so many multiplying ones starts
# with: 65536 dealt out to all threads in eights. Who asks for more than there are waits for ever.
_REGISTERS = {2: 3 * 168, 3: 4 * 128}

# Layouts of a matrix product in registers, of its rows and of its columns.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """How a call is cut: ``compute`` warpgroups of 64 queries each, tiles of ``block_kv`` keys in ``stages`` slots."""

    compute: int
    block_kv: int
    stages: int
    # Warpgroups multiply in turn, so that one does its softmax while the other multiplies: the turn passes on when all
    # products are "issued", or when the "logits" have come; "none": no turns.
    turns: str = "issued"
    overlap: bool = True  # forward: a warpgroup multiplies q k^T of a tile beside p v of the one before
    persistent: bool = True  # one block a multiprocessor, which works on many tiles of queries
    stage_out: bool = False  # forward: SMEM of its own for the output, so that the next queries arrive earlier
    group_heads: int = 0  # heads whose tiles of queries alternate; 0: those that share keys, or all if masked
    registers: tuple[int, int] = (24, 240)  # of the loading and of the multiplying warpgroups

    @property
    def block_q(self) -> int:
        return self.compute * WARPGROUP_ROWS

    def has_out_smem(self, size: int, v_size: int) -> bool:
        """Whether the finished output has SMEM of its own; else it goes through that of the queries."""
        return self.stage_out or size != v_size

    def smem_bytes(self, size: int, v_size: int, *, finish: bool) -> int:
        """What a forward call takes for heads of these native sizes, without the carry, which need not be in SMEM."""
        out = v_size if finish and self.has_out_smem(size, v_size) else 0
        numbers = self.block_q * (size + out) + self.stages * self.block_kv * (size + v_size)
        small = 2048 + self.stages * WARPGROUP_ROWS * 4  # barriers and reductions, and flags of each stage
        return 2 * numbers + small

    def refusal(self, size: int) -> str | None:
        """What keeps the forward kernel from running with these tiles; None: nothing."""
        for name, allowed in (
            ("compute", (2,) if size == 256 else (2, 3)),
            ("block_kv", (64, 128)),
            ("stages", (2, 3, 4, 5)),
            ("turns", ("issued", "logits", "none")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                return f"{name} must be one of {choices} for heads of {size}. Got {getattr(self, name)!r}."
        if self.group_heads < 0:
            return f"group_heads must be 0 or more. Got {self.group_heads}."
        loading, multiplying = self.registers
        if any(n % 8 or not 24 <= n <= 256 for n in self.registers):
            return f"registers must be multiples of 8 from 24 to 256. Got {self.registers}."
        if loading + self.compute * multiplying > _REGISTERS[self.compute]:
            return (
                f"registers: of one loading and {self.compute} multiplying warpgroups must be at most "
                f"{_REGISTERS[self.compute]} together. Got {self.registers}."
            )
        taken = self._most_smem(size)
        if taken > SMEM_BYTES:
            return f"block_kv x stages must fit {SMEM_BYTES} bytes of SMEM. They take {taken}."
        return None

    def _most_smem(self, size: int) -> int:
        """Bytes where keys or values have this head size, at most."""
        others = [other for other in HEAD_SIZES if other <= size]
        pairs = [pair for other in others for pair in ((size, other), (other, size))]
        return max(self.smem_bytes(*pair, finish=True) for pair in pairs)


def smem_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """SMEM for matrices as WGMMA and TMA want them: in tiles of 8 rows of 128 bytes, swizzled."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 128 // jnp.dtype(dtype).itemsize)), swizzle(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def check_supported(q: Array, v: Array) -> None:
    """Raises NotImplementedError for what WGMMA or the tiles cannot do."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"query: implementation 'pallas_gpu' takes bfloat16 and float16, the dtypes of WGMMA. Got {q.dtype}."
        )
    for argument, size in (("query", q.shape[3]), ("value", v.shape[3])):
        if size > HEAD_SIZES[-1]:
            raise NotImplementedError(
                f"{argument}: implementation 'pallas_gpu' takes heads of at most {HEAD_SIZES[-1]}. Got {size}."
            )


def head_size(size: int) -> int:
    """The next size that a kernel is written for."""
    return min(native for native in HEAD_SIZES if native >= size)


def pad_axis(x: Array, axis: int, length: int) -> Array:
    """Zeros appended along one axis up to ``length``."""
    extra = length - x.shape[axis]
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def token_major(x: Array, size: int, least: int = 0) -> Array:
    """[B, N, L, H] as [B, L, N, H], which is how the ring got it: XLA cancels the two. Heads grow to ``size``.

    TMA moves boxes of 8 tokens: there will be a multiple of them, and at least ``least``.
    """
    x = pad_axis(jnp.swapaxes(x, 1, 2), 3, size)
    return pad_axis(x, 1, max(-(-x.shape[1] // 8) * 8, least))


def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(shape: tuple[int, ...]) -> Array:
    """To add products to."""
    return full(shape, 0.0, MATRIX)


def row_matrix(x: Array, like: Array) -> Array:
    """A number for each row, repeated along the columns of a matrix."""
    return jax.lax.broadcast_in_dim(x, like.shape, [0])


def column_matrix(x: Array, like: Array) -> Array:
    """A number for each column, repeated along the rows of a matrix."""
    return jax.lax.broadcast_in_dim(x, like.shape, [1])


def is_finite(x: Array) -> Array:
    """NaN fails the comparisons. Not by ``abs``: the compiler then no longer compares bfloat16 in pairs."""
    return (x < jnp.inf) & (x > -jnp.inf)


def batch_row(x: Any, b: Array) -> Array:
    """The row of a mask's array that belongs to batch row b."""
    return b if x.shape[0] > 1 else jnp.int32(0)


def load_queries(side: QuerySide, b: Array, start: Array, shape: tuple[int, ...], axis: int = 0) -> QuerySide:
    """The queries' side of the mask from GMEM, for a matrix that has queries along ``axis``."""
    return jax.tree.map(lambda x_gmem: _load_matrix(x_gmem, b, start, shape, axis), side)


def load_keys(side: KeySide, b: Array, start: Array, shape: tuple[int, ...], axis: int = 1) -> KeySide:
    """The keys' side of the mask from GMEM, for a matrix that has keys along ``axis``."""
    return jax.tree.map(lambda x_gmem: _load_matrix(x_gmem, b, start, shape, axis), side)


def _load_matrix(x_gmem: Any, b: Array, start: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A number for each row (axis 0) or column (axis 1), repeated to a matrix."""
    values_gmem = x_gmem.at[batch_row(x_gmem, b), pl.ds(start, shape[axis])]
    x = gpu_load(values_gmem, (ROWS, COLUMNS)[axis], optimized=False)
    return jax.lax.broadcast_in_dim(x, shape, [axis])


# What was fastest on an H100 (docs/optimisation-log.md), for heads of 64, 128 and 256. Three warpgroups hide each
# other's waits best, but a tile of 192 queries has more PARTIAL tiles along the diagonal, whose mask wants registers.
_THREE = (32, 160)
_FORWARD_FULL = {
    64: TileSizes(3, 128, 2, turns="none", registers=_THREE),
    128: TileSizes(3, 128, 2, turns="none", overlap=False, registers=_THREE),
    256: TileSizes(2, 64, 2),
}
_FORWARD = {
    # Stages enough that the next tiles are there while the values of a PARTIAL one are looked through.
    64: TileSizes(2, 128, 5, turns="none", stage_out=True),
    128: TileSizes(2, 128, 2),
    256: TileSizes(2, 64, 2),
}


def forward_tiles(q: Array, v: Array, mask: Mask, params: KernelParams, *, whole: bool) -> TileSizes:
    """Tiles of a forward call: as requested, else of the tables, the user's first. ``whole``: without a carry."""
    size = max(head_size(q.shape[3]), head_size(v.shape[3]))
    tiles = (_FORWARD_FULL if mask.is_full else _FORWARD)[size]
    if params.interpret:
        return dataclasses.replace(tiles, turns="none", overlap=False)  # all that JAX's interpreter can follow
    if params.block_q is None and params.block_kv is None:
        kernel = "forward" + ("" if whole else ", carry") + ("" if mask.is_full else ", masked")
        return tile_table.chosen(tiles, "pallas_gpu", kernel, q.dtype, size, params.device_kind)
    if params.block_q is not None:
        if params.block_q not in (128, 192) or (params.block_q == 192 and size == 256):
            raise NotImplementedError(
                "config.block_q must be 128 or 192 (heads of up to 128) for implementation 'pallas_gpu'. "
                f"Got {params.block_q}."
            )
        wanted = _FORWARD[128] if params.block_q == 128 else _FORWARD_FULL[128]
        tiles = dataclasses.replace(wanted, block_kv=tiles.block_kv)
    if params.block_kv is not None:
        if params.block_kv not in (64, tiles.block_kv):
            raise NotImplementedError(
                f"config.block_kv must be 64 or {tiles.block_kv} for implementation 'pallas_gpu' and heads of "
                f"{size}. Got {params.block_kv}."
            )
        tiles = dataclasses.replace(tiles, block_kv=params.block_kv)
    return tiles
