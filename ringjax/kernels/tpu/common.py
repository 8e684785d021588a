"""What the TPU kernels share: tile sizes, the mask as rows of tiles, and small pieces of a kernel's body.

TPU terms: a vector register holds 8 sublanes x 128 lanes; VMEM is the vector memory next to the cores, SMEM the
scalar memory that decides which tile comes next, HBM the device memory.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from ..._compat import tpu_interpreter_is_forced, vary_like
from ...mask import EMPTY, FULL, KeySide, Mask, QuerySide, Step, tile_kinds, tile_list, unpack_step
from ..base import KernelParams

LANES = 128

# Entries of a tile list that go to SMEM (1 MiB on the smallest chip) at once, for all batch rows.
_MAX_STEPS = 2**17


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Tiles of queries and keys, and the part of each that is worked on at a time.

    Sub-tiles let the compiler run the matrix unit on one while the vector unit works on another.
    """

    block_q: int
    block_kv: int
    sub_q: int
    sub_kv: int
    vmem_bytes: int  # the compiler's limit
    dq_bytes: int = 0  # backward: what dq may take of it
    dq_transposed: bool = False  # backward: k^T ds^T, then one transpose, in place of (ds^T)^T k


_MIB = 2**20


def _transposing(table: dict[str, TileSizes]) -> dict[str, TileSizes]:
    backward = dataclasses.replace(table["backward"], sub_q=512, sub_kv=512, dq_transposed=True)
    return {**table, "backward": backward}


# By the name that JAX gives the device, for heads of up to 128: best by static cycles (docs/optimisation-log.md) of
# what fits: VMEM is 16 MiB on v4, 64 MiB on v5p and v7x, 128 MiB on v5e and v6e, shared with the pipeline's buffers.
_SMALL = {
    "forward": TileSizes(512, 1024, 512, 512, 15 * _MIB),
    "backward": TileSizes(512, 512, 256, 512, 15 * _MIB, 1 * _MIB),
}
_MEDIUM = {
    "forward": TileSizes(2048, 1024, 2048, 512, 56 * _MIB),
    "backward": TileSizes(1024, 1024, 256, 1024, 56 * _MIB, 8 * _MIB),
}
_LARGE = {
    "forward": TileSizes(2048, 2048, 2048, 512, 100 * _MIB),
    "backward": TileSizes(2048, 1024, 256, 1024, 100 * _MIB, 32 * _MIB),
}
# v6e and v7x: the matrix unit is 256 x 256 there, and would rather transpose k than ds.
_TABLE = {
    "TPU v4": _SMALL,
    "TPU v5 lite": _LARGE,
    "TPU v5e": _LARGE,
    "TPU v5": _MEDIUM,
    "TPU v5p": _MEDIUM,
    "TPU v6 lite": _transposing(_LARGE),
    "TPU v6e": _transposing(_LARGE),
    "TPU7x": _transposing(_MEDIUM),
}


def tile_sizes(direction: str, q: Array, k: Array, v: Array, params: KernelParams) -> TileSizes:
    """Tiles for this call: as requested, else of the table, made even over the shard."""
    largest = _TABLE.get(params.device_kind, _SMALL)[direction]
    # Wider heads and wider numbers take more room: fewer tokens then.
    room = -(-max(q.shape[3], v.shape[3]) // LANES) * max(q.dtype.itemsize // 2, 1)
    block_q = _block("block_q", q, largest.block_q // room, params)
    block_kv = _block("block_kv", k, largest.block_kv // room, params)
    return dataclasses.replace(
        largest,
        block_q=block_q,
        block_kv=block_kv,
        sub_q=sub_tile(block_q, largest.sub_q),
        sub_kv=sub_tile(block_kv, largest.sub_kv),
    )


def _block(name: str, x: Array, largest: int, params: KernelParams) -> int:
    requested = getattr(params, name)
    if requested is None:
        return even_tile(x.shape[2], largest)
    if requested % LANES and not (params.interpret or tpu_interpreter_is_forced()):
        raise ValueError(
            f"config.{name} must be a multiple of {LANES} for implementation 'pallas_tpu'. Got {requested}."
        )
    return requested


def round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def even_tile(length: int, largest: int) -> int:
    """A multiple of 128 such that equal tiles of at most ``largest`` cover the length with little to spare."""
    count = -(-length // max(largest, LANES))
    return round_up(-(-length // count), LANES)


def sub_tile(block: int, largest: int) -> int:
    """The largest divisor of the tile that is a multiple of 128 and at most ``largest``; small tiles stay whole."""
    sizes = [size for size in range(LANES, min(block, largest) + 1, LANES) if block % size == 0]
    return max(sizes, default=block)


@dataclasses.dataclass(frozen=True)
class Visits:
    """The order in which a grid walks the tiles of one (batch row, head): known at trace time, or read from a list."""

    num_rows: int
    num_columns: int
    lists: int  # how many the batch has: 0 without a mask (every tile is FULL), 1 if it is the same for all rows

    def step(self, prefetched: tuple[Any, ...], b: Any, s: Any) -> Step:
        """Step ``s`` of batch row ``b``; in a kernel or an index map. ``prefetched``: refs in SMEM, the list first."""
        if not self.lists:
            columns = jnp.int32(self.num_columns)
            row, column = jax.lax.div(s, columns), jax.lax.rem(s, columns)
            return Step(row, column, jnp.int32(FULL), column == 0, column == columns - 1)
        steps_smem = prefetched[0]
        start = b * (self.num_rows * self.num_columns) if self.lists > 1 else 0
        return unpack_step(steps_smem[start + s], self.num_columns)


class Plan(NamedTuple):
    """What to visit in each of one or more kernel calls that share the tiles' columns out among them."""

    visits: Visits
    lists: Int32[Array, "chunks B1*rows*columns"] | None  # for SMEM; None where every tile is FULL
    num_steps: Any  # of each chunk [chunks]; an int where every tile is FULL

    def chunk(self, index: Array | int) -> tuple[tuple[Array, ...], Any]:
        """The arrays to prefetch and the number of steps of one call."""
        if self.lists is None:
            return (), self.num_steps
        return (self.lists[index],), self.num_steps[index]


# A kind of step besides those of tiles: a last row of steps that only writes the results of the columns.
FLUSH = 3


def plan_visits(
    mask: Mask, tiles: TileSizes, num_q: int, num_kv: int, *, rows: str, chunks: int = 1, flush: int = 0
) -> Plan:
    """Tiles in rows of "queries" or "keys". A list ends at run time: where the longest one of the batch does.

    With ``flush``, lists have one more row: FLUSH steps for so many columns, those that exist before the last chunk is
    filled up. Without a mask the last row of tiles serves for it.
    """
    num_rows, num_columns = (num_q, num_kv) if rows == "queries" else (num_kv, num_q)
    num_columns //= chunks
    if mask.is_full:
        return Plan(Visits(num_rows, num_columns, 0), None, num_rows * num_columns)
    kinds = tile_kinds(mask, tiles.block_q, tiles.block_kv)
    kinds = kinds if rows == "queries" else jnp.swapaxes(kinds, 1, 2)
    if flush:
        written = jnp.where(jnp.arange(kinds.shape[2]) < flush, jnp.int32(FLUSH), jnp.int32(EMPTY))
        written = jnp.broadcast_to(written, (kinds.shape[0], 1, kinds.shape[2]))
        kinds, num_rows = jnp.concatenate([kinds, written], axis=1), num_rows + 1
    batch = kinds.shape[0]
    if batch * num_rows * num_columns > _MAX_STEPS:
        raise NotImplementedError(
            f"config: a shard may have at most {_MAX_STEPS} tiles (over all batch rows that have masks of their own) "
            "for implementation 'pallas_tpu'; use larger block_q and block_kv, or more devices. "
            f"Got {kinds.size} tiles of {tiles.block_q} x {tiles.block_kv}."
        )
    kinds = jnp.moveaxis(kinds.reshape(batch, num_rows, chunks, num_columns), 2, 0)
    listed = tile_list(kinds.reshape(chunks * batch, num_rows, num_columns))
    # Flat: SMEM pads the last axis of a matrix.
    steps, counts = listed.steps.reshape(chunks, -1), listed.count.reshape(chunks, batch)
    return Plan(Visits(num_rows, num_columns, batch), steps, jnp.max(counts, axis=1))


def zeros_like(x: Array) -> Array:
    """In float32, and of the same type under shard_map."""
    return vary_like(jnp.zeros(x.shape, jnp.float32), x)


def mask_sides(mask: Mask) -> tuple[QuerySide, KeySide]:
    """The two sides of the mask as [B1, 1, L], so that a tile of them is a row of lanes."""
    queries, keys = jax.tree.map(lambda x: x[:, None, :], mask.sides())
    return queries, keys


def column(row: Array, width: int) -> Array:
    """A row [1, n] as a column repeated to [n, width], width at most 128."""
    return jnp.broadcast_to(row, (width, row.shape[1])).T


def repeat_lanes(x: Array, width: int) -> Array:
    """Columns that are all equal, as many as are wanted: [n, lanes] to [n, width]."""
    lanes = x.shape[1]
    if width % lanes == 0:
        return jnp.tile(x, (1, width // lanes))
    return jnp.tile(x, (1, -(-width // lanes)))[:, :width]


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one axis of each matrix, accumulating in float32; float32 operands are multiplied in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
