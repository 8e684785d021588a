"""Tile sizes of the Triton kernels: tables, what fits, what a call gets, what `ringjax tune` searches.

In Triton everything is a power of two, and at least 16 where it is multiplied.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .. import tiles as tile_table
from ..base import Block, KernelParams
from ..tiles import Key, dtype_class

_MIN_TILE = 16  # of any side of a product


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Tiles of queries and keys, and how Triton compiles the loop over them."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int  # tiles of columns on their way at a time

    @property
    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)

    def refusal(self, size: int) -> str | None:
        """What keeps the kernels from running with these tiles; None: nothing. What does not fit they shrink."""
        del size  # Unused.
        for name, least, most in (("block_q", _MIN_TILE, 256), ("block_kv", _MIN_TILE, 256), ("num_warps", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                return f"{name} must be a power of two from {least} to {most}. Got {value}."
        if not 1 <= self.num_stages <= 8:
            return f"num_stages must be 1 to 8. Got {self.num_stages}."
        return None


# By kernel and head size: the best on an H100 of those tried, see docs/optimisation-log.md.
_HALF = {
    "forward": {64: TileSizes(128, 64, 4, 3), 128: TileSizes(128, 64, 8, 3), 256: TileSizes(64, 64, 8, 2)},
    "dkv": {64: TileSizes(32, 128, 4, 3), 128: TileSizes(64, 128, 8, 3), 256: TileSizes(32, 32, 4, 2)},
    "dq": {64: TileSizes(128, 64, 4, 3), 128: TileSizes(128, 64, 8, 3), 256: TileSizes(128, 32, 8, 2)},
}
# float32 is multiplied in full by the ordinary units, and every product is unrolled: small tiles, many warps.
_FLOAT32 = {
    "forward": {64: TileSizes(64, 32, 8, 2), 128: TileSizes(64, 32, 8, 2), 256: TileSizes(32, 16, 8, 1)},
    "dkv": {64: TileSizes(32, 64, 8, 1), 128: TileSizes(32, 64, 8, 1), 256: TileSizes(16, 32, 8, 1)},
    "dq": {64: TileSizes(64, 32, 8, 1), 128: TileSizes(64, 32, 8, 1), 256: TileSizes(32, 16, 8, 1)},
}

# Bytes of shared memory that a program may take, by a word of the device's name; the least of all others.
_SHARED_MEMORY = {
    **dict.fromkeys(("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300"), 227 * 1024),
    **dict.fromkeys(("A100", "A800", "A30"), 163 * 1024),
}
_LEAST_SHARED_MEMORY = 99 * 1024


def tile_sizes(
    kernel: str, block: Block, params: KernelParams, *, look_up: tile_table.LookUp = tile_table.chosen
) -> TileSizes:
    """Tiles of "forward", "dkv" or "dq": as requested or of the tables, the user's first; no larger than needed."""
    q, k, v = block[:3]
    size = max(padded_size(q.shape[3]), padded_size(v.shape[3]))
    table = (_FLOAT32 if q.dtype == jnp.float32 else _HALF)[kernel]
    native = min(max(size, 64), 256)
    largest = table[native]
    if params.block_q is None and params.block_kv is None:
        largest = look_up(largest, Key(params.device_kind, "pallas_triton", kernel, dtype_class(q.dtype), native))
    tiles = dataclasses.replace(
        largest,
        block_q=_block("block_q", q.shape[2], largest.block_q, params),
        block_kv=_block("block_kv", k.shape[2], largest.block_kv, params),
    )
    rows, columns = ("block_kv", "block_q") if kernel == "dkv" else ("block_q", "block_kv")
    fixed = {name for name in (rows, columns) if getattr(params, name) is not None}
    words = params.device_kind.replace("-", " ").split()
    limit = max((_SHARED_MEMORY.get(word, 0) for word in words), default=0) or _LEAST_SHARED_MEMORY
    while _shared_memory(kernel, tiles, size, q.dtype.itemsize) > limit:
        smaller = _smaller(tiles, rows, columns, fixed)
        if smaller is None:
            break  # Triton says by how much it is too large
        tiles = smaller
    if q.dtype == jnp.float32:
        return tiles  # the more warps the less each of them unrolls
    warps = max(1, largest.num_warps * getattr(tiles, rows) // getattr(largest, rows))
    return dataclasses.replace(tiles, num_warps=min(largest.num_warps, warps))


def _smaller(tiles: TileSizes, rows: str, columns: str, fixed: set[str]) -> TileSizes | None:
    """The next smaller tiles, giving up last what costs most: loads in flight behind products, full tensor cores."""
    stages = "num_stages"
    for name, least in ((stages, 2), (columns, 32), (rows, 64), (stages, 1), (columns, _MIN_TILE), (rows, _MIN_TILE)):
        value = getattr(tiles, name)
        if name not in fixed and value > least:
            return dataclasses.replace(tiles, **{name: value - 1 if name == stages else value // 2})
    return None


def _shared_memory(kernel: str, tiles: TileSizes, size: int, itemsize: int) -> int:
    """An upper bound of what Triton takes: the rows' tiles, the columns' in flight, the logits once or twice."""
    rows, columns = tiles.block_q, tiles.block_kv
    if kernel == "dkv":
        rows, columns = columns, rows
    tiles_of_rows, logits = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2)}[kernel]
    return itemsize * (size * (tiles_of_rows * rows + 2 * tiles.num_stages * columns) + logits * rows * columns)


def _block(name: str, length: int, largest: int, params: KernelParams) -> int:
    requested = getattr(params, name)
    if requested is None:
        return min(largest, max(_MIN_TILE, pl.next_power_of_2(length)))
    if (requested < _MIN_TILE or requested & (requested - 1)) and not params.interpret:
        raise ValueError(
            f"config.{name} must be a power of two, {_MIN_TILE} or more, for implementation 'pallas_triton'. "
            f"Got {requested}."
        )
    return requested


def padded_size(size: int) -> int:
    """A head size as the kernels see it."""
    return max(_MIN_TILE, pl.next_power_of_2(size))


# ----------------------------------------------------------------------------------------- what `ringjax tune` searches


def candidates(kernel: str, size: int, dtype: str, built_in: TileSizes) -> list[TileSizes]:
    """Neighbours of the built-in tiles, the nearest first, whose sums stay in registers."""
    options: list[TileSizes] = []
    float32 = dtype_class(dtype) == "float32"
    blocks, warps = (16, 32, 64, 128, 256), (8,) if float32 else (4, 8)
    for block_q, block_kv, num_warps, num_stages in itertools.product(blocks, blocks, warps, (1, 2, 3, 4)):
        rows = block_kv if kernel == "dkv" else block_q
        of_rows, logits = {"forward": (1, 1), "dq": (1, 2), "dkv": (2, 2)}[kernel]
        sums = of_rows * rows * size + logits * block_q * block_kv
        if sums > 256 * 32 * num_warps:
            continue
        # float32 products are unrolled in full, which the compiler takes minutes over if there are many.
        if float32 and block_q * block_kv > 2 * built_in.block_q * built_in.block_kv:
            continue
        options.append(TileSizes(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages))
    return sorted(options, key=lambda tiles: _distance(tiles, built_in))


def _distance(tiles: TileSizes, other: TileSizes) -> float:
    """How many doublings and stages lie between the two."""
    names = ("block_q", "block_kv", "num_warps")
    doublings = sum(abs(math.log2(getattr(tiles, name) / getattr(other, name))) for name in names)
    return doublings + abs(tiles.num_stages - other.num_stages)
