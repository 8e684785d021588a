"""What the Mosaic kernels take, and the tiles of the forward one: a table, what fits, what `ringjax tune` searches.

GPU terms: see :mod:`ringjax.kernels.mosaic.common`. The backward kernels have the one tile that their registers allow.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ...mask import Mask
from .. import tiles as tile_table
from ..base import KernelParams
from ..tiles import Key, dtype_class

# Queries that one warpgroup multiplies at a time: the height of a WGMMA.
WARPGROUP_ROWS = 64
WARPGROUP_THREADS = 128
HEAD_SIZES = (64, 128, 256)
# Multiprocessors of a Hopper card. On one that has fewer, the surplus blocks of a persistent grid wait their turn.
MULTIPROCESSORS = 132

NAMED_BARRIERS = 16  # of a block of threads

SMEM_BYTES = 227 * 1024  # what a block of threads may have
# Registers of a thread of each warpgroup, summed over warpgroups, that a block of so many multiplying ones starts
# with: 65536 dealt out to all threads in eights. Who asks for more than there are waits for ever.
_REGISTERS = {2: 3 * 168, 3: 4 * 128}


class BarrierNumbers(NamedTuple):
    """Of the named barriers of a forward kernel, each the first of its kind; ``end`` is how many there are."""

    k_free: int  # one for each stage
    v_free: int
    turn: int  # one for each multiplying warpgroup, as retry
    look: int  # of the loading warpgroup
    retry: int
    end: int


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
    persistent: bool = True  # one block per multiprocessor, which works on many tiles of queries
    stage_out: bool = False  # forward: SMEM of its own for the output, so that the next queries arrive earlier
    group_heads: int = 0  # heads whose tiles of queries alternate; 0: see ringjax.kernels.mosaic.forward
    # Of the loading and of the multiplying warpgroups. None: as the block starts with, as many each.
    registers: tuple[int, int] | None = (24, 240)

    @property
    def block_q(self) -> int:
        return self.compute * WARPGROUP_ROWS

    @property
    def guesses(self) -> bool:
        """Whether the registers have room to guess at a maximum, see Compute.guess."""
        return self.overlap and self.compute == 2

    @property
    def named_barriers(self) -> BarrierNumbers:
        k_free = 1 + self.compute + 1  # the first ones are Mosaic's
        v_free = k_free + self.stages
        turn = v_free + self.stages
        look = turn + (0 if self.turns == "none" else self.compute)
        end = look + 1 + (self.compute if self.guesses else 0)
        return BarrierNumbers(k_free=k_free, v_free=v_free, turn=turn, look=look, retry=look + 1, end=end)

    def has_out_smem(self, size: int, v_size: int) -> bool:
        """Whether the finished output has SMEM of its own; otherwise it goes through that of the queries."""
        return self.stage_out or size != v_size

    def smem_bytes(self, size: int, v_size: int, *, finish: bool) -> int:
        """What a forward call takes for heads of these native sizes, without the carry, which need not be in SMEM."""
        out = v_size if finish and self.has_out_smem(size, v_size) else 0
        numbers = self.block_q * (size + out) + self.stages * self.block_kv * (size + v_size)
        small = 3072  # barriers, and of PARTIAL tiles what the mask wants
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
        if self.registers is None:
            return "registers must be two numbers. Got None."
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
        if self.named_barriers.end > NAMED_BARRIERS:
            taken = self.named_barriers.end
            return f"stages and turns must take at most {NAMED_BARRIERS} named barriers. They take {taken}."
        return None

    def _most_smem(self, size: int) -> int:
        """Bytes where keys or values have this head size, at most."""
        others = [other for other in HEAD_SIZES if other <= size]
        pairs = [pair for other in others for pair in ((size, other), (other, size))]
        return max(self.smem_bytes(*pair, finish=True) for pair in pairs)


# What was fastest on an H100 (docs/optimisation-log.md), for heads of 64, 128 and 256. With heads of 64 the softmax is
# what takes longest, and three warpgroups hide it best. With longer ones two have the registers to guess at a maximum,
# see Compute.guess.
_THREE = (32, 160)
_TWO_128 = TileSizes(compute=2, block_kv=128, stages=3)
_TWO_256 = TileSizes(compute=2, block_kv=64, stages=2)
_THREE_64 = TileSizes(compute=3, block_kv=128, stages=2, turns="none", registers=_THREE)
# One product after the other leaves the registers for heads of 128, not those to guess.
_THREE_128 = dataclasses.replace(_THREE_64, overlap=False)
_FORWARD_FULL = {64: dataclasses.replace(_THREE_64, stages=4), 128: _TWO_128, 256: _TWO_256}
_FORWARD = {
    # A stage more, so that the next tiles are there while the values of a PARTIAL one are looked through.
    64: dataclasses.replace(_THREE_64, stages=3, stage_out=True),
    128: _TWO_128,
    256: _TWO_256,
}
# With a carry. Under a mask there is SMEM for it.
_CARRY_FULL = {64: _THREE_64, 128: _THREE_128, 256: _TWO_256}
_CARRY = {
    64: TileSizes(compute=2, block_kv=128, stages=4, turns="none", stage_out=True),
    128: dataclasses.replace(_TWO_128, stages=2),
    256: _TWO_256,
}

# Of few queries. Two warpgroups have half of a tile each; what matters is how many bytes are on their way.
_PLAIN = TileSizes(compute=2, block_kv=128, stages=2, turns="none", overlap=False, stage_out=True)
_DECODE = {
    64: dataclasses.replace(_PLAIN, stages=4),
    128: _PLAIN,
    256: dataclasses.replace(_PLAIN, compute=1, block_kv=64, registers=None),
}


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


def heads_together(kv_heads: int, rows: int, enough: int) -> int:
    """Of how many K/V heads rows of tiles, so many each, are worked on side by side, those that visit most first.

    What visits least comes last of all heads side by side, so that multiprocessors end at about the same time. But rows
    of one head share in the cache what passes by. So as few heads as have ``enough`` rows.
    """
    return min(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == kv_heads or n * rows >= enough))


def forward_tiles(
    q: Array, v: Array, mask: Mask, params: KernelParams, *, whole: bool, look_up: tile_table.LookUp = tile_table.chosen
) -> TileSizes:
    """Tiles of a forward call: as requested, otherwise of the tables, the user's first. ``whole``: without a carry."""
    size = max(head_size(q.shape[3]), head_size(v.shape[3]))
    if whole:
        tiles = (_FORWARD_FULL if mask.is_full else _FORWARD)[size]
    else:
        tiles = (_CARRY_FULL if mask.is_full else _CARRY)[size]
    if params.interpret:
        return dataclasses.replace(tiles, turns="none", overlap=False)  # all that JAX's interpreter can follow
    if params.block_q is None and params.block_kv is None:
        kernel = "forward" + ("" if whole else ", carry") + ("" if mask.is_full else ", masked")
        return look_up(tiles, Key(params.device_kind, "pallas_gpu", kernel, dtype_class(q.dtype), size))
    if params.block_q is not None:
        if params.block_q not in (128, 192) or (params.block_q == 192 and size == 256):
            raise NotImplementedError(
                "config.block_q must be 128 or 192 (heads of up to 128) for implementation 'pallas_gpu'. "
                f"Got {params.block_q}."
            )
        wanted = _TWO_128 if params.block_q == 128 else _THREE_128
        tiles = dataclasses.replace(wanted, block_kv=tiles.block_kv)
    if params.block_kv is not None:
        if params.block_kv not in (64, tiles.block_kv):
            raise NotImplementedError(
                f"config.block_kv must be 64 or {tiles.block_kv} for implementation 'pallas_gpu' and heads of "
                f"{size}. Got {params.block_kv}."
            )
        tiles = dataclasses.replace(tiles, block_kv=params.block_kv)
    return tiles


def decode_tiles(q: Array, v: Array) -> TileSizes:
    """Tiles of a call with few queries."""
    return _DECODE[max(head_size(q.shape[3]), head_size(v.shape[3]))]


# ----------------------------------------------------------------------------------------- what `ringjax tune` searches


def candidates(kernel: str, size: int) -> list[TileSizes]:
    """Those that promise something: all ways to hide waits at the largest tiles that fit, one or two at others."""
    options: list[TileSizes] = []
    largest = 64 if size == 256 else 128
    for compute, block_kv, stages, overlap, turns in itertools.product(
        (2, 3), (largest, 64), (2, 3), (True, False), ("issued", "logits", "none")
    ):
        if turns != "issued" and (block_kv != largest or stages != 2):
            continue
        if block_kv != largest and (stages != 3 or not overlap):
            continue  # small tiles want what hides most
        for registers in _registers(compute, "masked" in kernel):
            tiles = TileSizes(
                compute=compute, block_kv=block_kv, stages=stages, turns=turns, overlap=overlap, registers=registers
            )
            if tiles not in options and _accumulators(tiles, size) <= registers[1]:
                options.append(tiles)
    return options


def refinements(best: TileSizes, heads: int) -> list[TileSizes]:
    """Variations of the best that are not worth a product with all else."""
    return [] if best.group_heads else [dataclasses.replace(best, group_heads=n) for n in (4, 16) if n < heads]


def _registers(compute: int, masked: bool) -> list[tuple[int, int]]:
    """Of loading and multiplying warpgroups: of masked tiles, the former looks through values and needs more."""
    if compute == 3:
        return [(32, 160)]
    return [(24, 240), (40, 232)] if masked else [(24, 240)]


def _accumulators(tiles: TileSizes, size: int) -> int:
    """Registers of a thread for acc, logits, weights of the tile before, and what else there is."""
    return size // 2 + tiles.block_kv // 2 + (tiles.block_kv // 4 if tiles.overlap else 0) + 24
