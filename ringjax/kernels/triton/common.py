"""What the Triton kernels share: tile sizes, which tiles a program visits, masked loads, small pieces of kernels.

Terms: a program works on one tile of rows (queries, or keys for dK and dV) and loops over the tiles of columns that its
rows see. Arrays are token-major inside, [B, L, heads, size], as the user's are: the swap of axes around a call cancels
against the ring's. Tiles of a ragged length or head size are completed with zeros as they are loaded, nothing is padded
in memory. In Triton everything is a power of two, and at least 16 where it is multiplied.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from ...mask import BlockMap, Mask, block_map, tile_kinds
from .. import tiles as tile_table
from ..base import KernelParams
from ..softmax import is_finite

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


def tile_sizes(kernel: str, q: Array, k: Array, v: Array, params: KernelParams) -> TileSizes:
    """Tiles of "forward", "dkv" or "dq": as requested, else of the tables, the user's first; no larger than needed."""
    size = max(padded_size(q.shape[3]), padded_size(v.shape[3]))
    table = (_FLOAT32 if q.dtype == jnp.float32 else _HALF)[kernel]
    native = min(max(size, 64), 256)
    largest = table[native]
    if params.block_q is None and params.block_kv is None:
        largest = tile_table.chosen(largest, "pallas_triton", kernel, q.dtype, native, params.device_kind)
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


def token_major(x: Array) -> Array:
    """[B, heads, L, size] as [B, L, heads, size], and back."""
    return jnp.swapaxes(x, 1, 2)


# ------------------------------------------------------------------------------------------------- what to visit


def plan_visits(
    mask: Mask, tiles: TileSizes, q_length: int, kv_length: int, *, rows: str
) -> tuple[Mask, BlockMap | None]:
    """The mask of whole tiles, and the tiles that each row of tiles visits; None: all of them, without a predicate.

    ``rows`` are "queries" or "keys". A ragged end of the columns is masked; one of the rows is not written anyway.
    """
    num_q, num_kv = pl.cdiv(q_length, tiles.block_q), pl.cdiv(kv_length, tiles.block_kv)
    ragged = kv_length % tiles.block_kv if rows == "queries" else q_length % tiles.block_q
    if mask.is_full and not ragged:
        return mask, None
    mask = mask.padded(q_length, num_q * tiles.block_q, kv_length, num_kv * tiles.block_kv)
    kinds = tile_kinds(mask, tiles.block_q, tiles.block_kv)
    return mask, block_map(kinds if rows == "queries" else jnp.swapaxes(kinds, 1, 2))


def map_specs(visits: BlockMap | None, tile: Callable[..., Any]) -> Any:
    """BlockSpecs of one row of the map; ``tile`` gives (batch row, row of tiles) of a program."""
    if visits is None:
        return None

    def index(*program: Any) -> tuple[Any, Any]:
        b, i = tile(*program)
        return (b if visits.full.shape[0] > 1 else 0), i

    number: Any = pl.BlockSpec((None, None), index)
    order: Any = pl.BlockSpec((None, None, visits.order.shape[2]), lambda *program: (*index(*program), 0))
    return BlockMap(order, number, number)


def visit(visits: BlockMap | None, num_columns: int, step: Callable[..., Any], state: Any, *, repeat: int = 1) -> Any:
    """Run ``step(column, part, state, masked)`` for every tile that the map lists, FULL ones first.

    Each is visited ``repeat`` times in a row, ``part`` counts them.
    """
    zero = jnp.int32(0)
    if visits is None:
        every = lambda n, state: step(*_split(n, repeat), state, False)  # noqa: E731
        return jax.lax.fori_loop(zero, jnp.int32(num_columns * repeat), every, state)

    def body(masked: bool, n: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        column, state = carry
        # Read one step ahead: loads whose address waits for a load would stall the pipeline.
        following = _column(visits, n + 1, repeat)
        return following, step(column, _split(n, repeat)[1], state, masked)

    full, end = visits.full[...] * repeat, visits.visit[...] * repeat
    carry = jax.lax.fori_loop(zero, full, functools.partial(body, False), (_column(visits, zero, repeat), state))
    return jax.lax.fori_loop(full, end, functools.partial(body, True), carry)[1]


def revisit(visits: BlockMap | None, wanted: Array, step: Callable[..., Any], state: Any, *, repeat: int = 1) -> Any:
    """Run ``step(column, part, state)`` for the PARTIAL tiles once more, where ``wanted``."""
    if visits is None:
        return state

    def body(n: Array, state: Any) -> Any:
        return step(_column(visits, n, repeat), _split(n, repeat)[1], state)

    full, end = visits.full[...] * repeat, visits.visit[...] * repeat
    return jax.lax.fori_loop(full, jnp.where(wanted, end, full), body, state)


def _split(n: Array, repeat: int) -> tuple[Array, Array]:
    return (n, jnp.int32(0)) if repeat == 1 else (jax.lax.div(n, repeat), jax.lax.rem(n, repeat))


def _column(visits: BlockMap, n: Array, repeat: int) -> Array:
    """The tile of step n; of the step after the last any tile that exists."""
    return visits.order[jnp.minimum(_split(n, repeat)[0], visits.order.shape[0] - 1)]


# ---------------------------------------------------------------------------------------------- loads and stores


def iota(size: int) -> Int32[Array, " size"]:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def within(start: Any, block: int, length: int | None, size: int | None = None) -> Array | None:
    """True where a tile [block] or [block, padded size] holds tokens before ``length`` and features before ``size``.

    None: everywhere. ``length`` is None where no tile is ragged.
    """
    conditions = []
    wide = None if size is None else padded_size(size)
    if length is not None:
        tokens = start + iota(block) < length
        conditions.append(tokens if wide is None else jnp.broadcast_to(tokens[:, None], (block, wide)))
    if size is not None and wide is not None and size != wide:
        conditions.append(jnp.broadcast_to(iota(wide)[None, :] < size, (block, wide)))
    return functools.reduce(operator.and_, conditions) if conditions else None


def load(view: Any, mask: Array | None) -> Array:
    """Zero where masked."""
    return plgpu.load(view, mask=mask, other=None if mask is None else 0.0)


def store(ref: Any, value: Array, mask: Array | None) -> None:
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


# ----------------------------------------------------------------------------------------------------- arithmetic


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one axis of each matrix, accumulating in float32; float32 is multiplied in full, not as tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def exp2(x: Array, params: KernelParams) -> Array:
    """2^x in one instruction: the library function spends four more on results below 2^-126, which are 0 here."""
    if params.interpret:
        return jnp.exp2(x)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def badness(x: Array) -> Array:
    """1 where NaN or Inf, else 0, in the dtype of x."""
    return jnp.where(is_finite(x), 0.0, 1.0).astype(x.dtype)
