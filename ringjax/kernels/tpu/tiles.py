"""Tile sizes of the TPU kernels: the table by generation, and what of it a call gets.

TPU terms: a vector register holds 8 sublanes x 128 lanes; VMEM is the vector memory next to the cores.
"""

import dataclasses

from jaxtyping import Array

from ..._compat import tpu_interpreter_is_forced
from ..base import Block, KernelParams
from ..fold import rows_of

LANES, _SUBLANES = 128, 8


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


def _tiles(
    blocks: tuple[int, int], subs: tuple[int, int], vmem: int, dq: int = 0, *, dq_transposed: bool = False
) -> TileSizes:
    """(queries, keys) each; memory in MiB."""
    return TileSizes(
        block_q=blocks[0],
        block_kv=blocks[1],
        sub_q=subs[0],
        sub_kv=subs[1],
        vmem_bytes=vmem * _MIB,
        dq_bytes=dq * _MIB,
        dq_transposed=dq_transposed,
    )


# By the name that JAX gives the device, for heads of up to 128: best by static cycles (docs/optimisation-log.md) of
# what fits: VMEM is 16 MiB on v4, 64 MiB on v5p and v7x, 128 MiB on v5e and v6e, shared with the pipeline's buffers.
_SMALL = {
    "forward": _tiles((512, 1024), (512, 512), 15),
    "backward": _tiles((512, 512), (256, 512), 15, 1),
}
_MEDIUM = {
    "forward": _tiles((2048, 1024), (2048, 512), 56),
    "backward": _tiles((1024, 1024), (256, 1024), 56, 8),
}
_LARGE = {
    "forward": _tiles((2048, 2048), (2048, 512), 100),
    "backward": _tiles((2048, 1024), (256, 1024), 100, 32),
}
# v6e and v7x: the matrix unit is 256 x 256 there, and would rather transpose k than ds.
_MEDIUM_TRANSPOSING = {**_MEDIUM, "backward": _tiles((1024, 1024), (512, 512), 56, 8, dq_transposed=True)}
_LARGE_TRANSPOSING = {**_LARGE, "backward": _tiles((2048, 1024), (512, 512), 100, 32, dq_transposed=True)}
_TABLE = {
    "TPU v4": _SMALL,
    "TPU v5 lite": _LARGE,
    "TPU v5e": _LARGE,
    "TPU v5": _MEDIUM,
    "TPU v5p": _MEDIUM,
    "TPU v6 lite": _LARGE_TRANSPOSING,
    "TPU v6e": _LARGE_TRANSPOSING,
    "TPU7x": _MEDIUM_TRANSPOSING,
}


# Few queries: a tile of keys and values is to be long enough for the copy to run at the bandwidth, and no longer.
_DECODE_BYTES = 4 * _MIB
_DECODE_KEYS = 2048
_DECODE_LOGITS = 2**19  # of one head


def tile_sizes(direction: str, q: Array, k: Array, v: Array, params: KernelParams) -> TileSizes:
    """Tiles for this call: as requested, otherwise of the table, made even over the shard."""
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


def decode_tiles(block: Block, params: KernelParams) -> TileSizes | None:
    """Tiles for few queries against a cache: all rows of a head, and a tile of keys of some heads at a time.

    None: not for :mod:`ringjax.kernels.tpu.decode`, since queries fill a tile of their own, or do not fit.
    """
    q, k, v, *_ = block
    if q.shape[2] > LANES or params.block_q is not None:
        return None
    largest = _TABLE.get(params.device_kind, _SMALL)["forward"]
    kv_heads, rows = heads_of_a_step(k.shape[1]), -(-rows_of(block) // _SUBLANES) * _SUBLANES
    size, v_size = (-(-x.shape[3] // LANES) * LANES for x in (k, v))
    of_key = kv_heads * (size + v_size) * k.dtype.itemsize
    most = min(_DECODE_KEYS, min(largest.vmem_bytes // 8, _DECODE_BYTES) // of_key, _DECODE_LOGITS // rows)
    block_kv = _block("block_kv", k, most, params)
    # Keys and values, and queries and output, of which there are two; the running softmax; logits, weights, their mask.
    taken = 2 * block_kv * of_key + 2 * kv_heads * rows * (size + v_size) * 4
    taken += kv_heads * rows * (v_size + 2 * LANES) * 4 + 4 * rows * block_kv * 4
    if taken > largest.vmem_bytes:
        return None
    return dataclasses.replace(largest, block_q=rows, block_kv=block_kv, sub_q=rows, sub_kv=block_kv)


def heads_of_a_step(kv_heads: int) -> int:
    """Of :mod:`ringjax.kernels.tpu.decode`: as many as divide all and are no more than the sublanes."""
    return max(n for n in range(1, _SUBLANES + 1) if kv_heads % n == 0)


def _block(name: str, x: Array, largest: int, params: KernelParams) -> int:
    requested = getattr(params, name)
    if requested is None:
        return even_tile(x.shape[2], largest)
    if requested % LANES and not (params.interpret or tpu_interpreter_is_forced()):
        raise ValueError(
            f"config.{name} must be a multiple of {LANES} for implementation 'pallas_tpu'. Got {requested}."
        )
    return requested


def even_tile(length: int, largest: int) -> int:
    """A multiple of 128 such that equal tiles of at most ``largest`` cover the length with little to spare."""
    count = -(-length // max(largest, LANES))
    return -(-length // (count * LANES)) * LANES


def sub_tile(block: int, largest: int) -> int:
    """The largest divisor of the tile that is a multiple of 128 and at most ``largest``; small tiles stay whole."""
    sizes = [size for size in range(LANES, min(block, largest) + 1, LANES) if block % size == 0]
    return max(sizes, default=block)
