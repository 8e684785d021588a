"""Entries of a table of tiles, and what tiles the kernels take with it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.mosaic import tiles as mosaic
from ringjax.kernels.tiles import VARIABLE, Key
from ringjax.kernels.triton import tiles as triton
from ringjax.layout import Contiguous
from ringjax.mask import Mask, Tokens

KIND = "NVIDIA H100 80GB HBM3"
FULL = Mask()
_WHOLE = Tokens(positions=Contiguous().runs(0, 8192, 1))
CAUSAL = Mask(queries=_WHOLE, keys=_WHOLE, right=0)


@contextlib.contextmanager
def no_table() -> Iterator[None]:
    """Inside, the user has no table: the built-in tiles are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "")
        yield


def key(implementation: str, kernel: str, size: int = 128, kind: str = KIND) -> Key:
    return Key(kind, implementation, kernel, "half", size)


def entry(tiles: Any, **changes: Any) -> dict[str, Any]:
    return {"tiles": {**dataclasses.asdict(tiles), **changes}}


def operand(length: int = 8192, size: int = 128, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct((1, 4, length, size), dtype)


def mosaic_tiles(size: int = 128, *, mask: Mask = FULL, whole: bool = True, **config: Any) -> mosaic.TileSizes:
    x = operand(size=size)
    return mosaic.forward_tiles(x, x, mask, KernelParams(1.0, device_kind=KIND, **config), whole=whole)


def triton_tiles(kernel: str, size: int = 128, dtype: Any = jnp.bfloat16, **config: Any) -> triton.TileSizes:
    x = operand(size=size, dtype=dtype)
    return triton.tile_sizes(kernel, Block(x, x, x, FULL), KernelParams(1.0, device_kind=KIND, **config))


MOSAIC = mosaic.TileSizes(2, 64, 3, turns="logits")
TRITON = triton.TileSizes(32, 32, 4, 2)
