"""Entries of a table of tiles, and what tiles the kernels take with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ringjax.kernels.base import KernelParams
from ringjax.kernels.mosaic import common as mosaic_common
from ringjax.kernels.tiles import Key
from ringjax.kernels.triton import common as triton_common
from ringjax.mask import Mask

KIND = "NVIDIA H100 80GB HBM3"
FULL = Mask(None, None, None, None)


def key(implementation: str, kernel: str, size: int = 128, kind: str = KIND) -> Key:
    return Key(kind, implementation, kernel, "half", size)


def entry(tiles: Any, **changes: Any) -> dict[str, Any]:
    return {"tiles": {**dataclasses.asdict(tiles), **changes}}


def operand(length: int = 8192, size: int = 128, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct((1, 4, length, size), dtype)


def mosaic_tiles(size: int = 128, *, mask: Mask = FULL, whole: bool = True, **config: Any) -> mosaic_common.TileSizes:
    x = operand(size=size)
    return mosaic_common.forward_tiles(x, x, mask, KernelParams(1.0, device_kind=KIND, **config), whole=whole)


def triton_tiles(kernel: str, size: int = 128, dtype: Any = jnp.bfloat16, **config: Any) -> triton_common.TileSizes:
    x = operand(size=size, dtype=dtype)
    return triton_common.tile_sizes(kernel, x, x, x, KernelParams(1.0, device_kind=KIND, **config))


MOSAIC = mosaic_common.TileSizes(2, 64, 3, turns="logits")
TRITON = triton_common.TileSizes(32, 32, 4, 2)
