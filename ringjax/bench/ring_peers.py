"""Attention of other libraries on one device, as `ringjax bench` calls it, also under collectives written by hand.

Every kernel has one face: ``attend(q, k, v, offset=, window=)``. Query i stands at position i + offset of the keys and
attends to itself, and to the keys before it, at most ``window`` of them; offset None: to all keys.

Packed documents are told by ``attend(q, k, v, q_starts, k_starts, offset=, window=, longest=)``: where each begins
among the queries and among the keys, and where the last one ends, int32 [documents + 1]; ``longest``, tokens of the
longest. Any offset but None is a causal mask, aligned with the last query and key of each document.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ringjax.kernels.choose import Target, is_hopper
from ringjax.usage import UsageError

Attend = Callable[..., jax.Array]  # attend(q, k, v, *, offset, window)
FLASH_ATTENTION = "flash_attention_3"
PEERS = (FLASH_ATTENTION, "cudnn", "xla")

_PACKAGE, _LIBRARY = "dew_flash_attn", "libdew_flash_attn3.so"
_RUNTIME = "libcudart.so.13"


class Refused(ValueError):
    """A peer cannot compute this problem; the text says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A kernel of another library.

    Attributes:
      name: as tables call it.
      attend: see the head of this file; raises Refused for what it cannot compute.
      absent: why it cannot be called here; then attend is None.
    """

    name: str
    attend: Attend | None
    absent: str = ""


def check_library(file: Path | None) -> None:
    """Raises UsageError unless the library of FlashAttention-3 is a file, or not given."""
    if file is not None and not file.is_file():
        raise UsageError(f"--flash-attention must be a file that exists. Got {file}.")


def find(name: str, device: Any, library: Path | None = None) -> Peer:
    """One of PEERS on these devices.

    Args:
      name: "flash_attention_3", "cudnn" or "xla".
      device: one of those that are measured.
      library: of FlashAttention-3; None: the one that the installed package brings.
    """
    if name == FLASH_ATTENTION:
        return _flash_attention_3(device, library)
    if name == "cudnn":
        absent = "" if device.platform == "gpu" else f"needs an NVIDIA GPU. Got platform {device.platform!r}."
        return Peer("cuDNN", None if absent else _cudnn, absent)
    return Peer("XLA", _xla)


def _of_jax(q: Any, k: Any, v: Any, **options: Any) -> jax.Array:
    attend: Any = jax.nn.dot_product_attention
    return attend(q, k, v, **options)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array, offset: int | None, window: int | None,
    longest: int | None = None,
) -> jax.Array:  # fmt: skip
    if starts:
        raise Refused("jax.nn.dot_product_attention takes packed documents as a mask of T x S only")
    if offset:
        raise Refused(
            "its causal mask starts at the first key, and jax.nn.dot_product_attention takes no offset: causal "
            "attention to a prefix that others hold would need a mask of T x S"
        )
    sides = None if window is None else (window, 0)
    return _of_jax(q, k, v, is_causal=offset is not None, local_window_size=sides, implementation="cudnn")


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array, offset: int | None, window: int | None,
    longest: int | None = None,
) -> jax.Array:  # fmt: skip
    if starts:
        return _of_jax(q, k, v, mask=_mask((q.shape[1], k.shape[1]), starts, offset, window), implementation="xla")
    if offset is None:
        return _of_jax(q, k, v, implementation="xla")
    if offset == 0 and window is None:
        return _of_jax(q, k, v, is_causal=True, implementation="xla")
    left = k.shape[1] if window is None else window - offset
    return _of_jax(q, k, v, local_window_size=(left, offset), implementation="xla")


def _mask(
    lengths: tuple[int, int], starts_of: tuple[jax.Array, ...], offset: int | None, window: int | None
) -> jax.Array:
    """Of documents: bool [T, S]. ``starts_of``: those among the queries and those among the keys."""
    places = [jnp.arange(n, dtype=jnp.int32) for n in lengths]
    next_start = [
        jnp.searchsorted(starts, at, side="right").astype(jnp.int32)
        for starts, at in zip(starts_of, places, strict=True)
    ]
    mask = next_start[0][:, None] == next_start[1][None]
    if offset is None:
        return mask
    # Before the end of the document, where a causal mask is aligned.
    before, key_before = (
        starts[following] - at for starts, following, at in zip(starts_of, next_start, places, strict=True)
    )
    behind = key_before[None] - before[:, None]
    mask &= behind >= 0
    return mask if window is None else mask & (behind <= window)


def _flash_attention_3(device: Any, library: Path | None) -> Peer:
    name = "FlashAttention-3"
    if device.platform != "gpu" or not is_hopper(Target(platform=device.platform, device_kind=device.device_kind)):
        return Peer(name, None, f"needs an NVIDIA Hopper GPU. Got {device.device_kind!r}.")
    file = library or _installed()
    if file is None:
        return Peer(name, None, f"the package dew-flash-attn-cu13, which brings {_LIBRARY}, is not installed")
    try:
        _register(file)
    except (OSError, AttributeError) as error:
        return Peer(name, None, f"{file} cannot be loaded: {error}")
    return Peer(name, _flash)


def _installed() -> Path | None:
    """The library in the installed package, which is not imported: it would load another one, of 340 MB."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [Path(folder) / _LIBRARY for folder in folders]
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _register(file: Path) -> None:
    """Makes the library's functions targets of JAX's foreign calls."""
    try:
        found = ctypes.CDLL(str(file.resolve()))
    except OSError as error:
        if _RUNTIME not in str(error):
            raise
        # It names no folder for CUDA's runtime, which JAX has perhaps loaded under another path.
        roots = [*map(Path, _nvidia_folders()), Path("/usr/local"), Path("/opt")]
        runtime = next((path for root in roots for path in sorted(root.rglob(f"{_RUNTIME}*"))), None)
        if runtime is None:
            raise
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL(str(file.resolve()))
    for what in ("fwd", "bwd", "varlen_fwd", "varlen_bwd"):
        target = jax.ffi.pycapsule(getattr(found, f"dew_flash3_mha_{what}"))
        jax.ffi.register_ffi_target(f"ringjax_bench_flash_attention_3_{what}", target, platform="CUDA")


def _nvidia_folders() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array, offset: int | None, window: int | None,
    longest: int | None = None,
) -> jax.Array:  # fmt: skip
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Refused(f"needs bfloat16 or float16. Got {q.dtype.name}")
    if q.shape[-1] not in (64, 128, 192, 256):
        raise Refused(f"needs heads of 64, 128, 192 or 256. Got {q.shape[-1]}")
    if starts:
        assert longest is not None
        packed: Any = _flash_packed
        return packed(q[0], k[0], v[0], *starts, offset is not None, window, longest)[None]
    if offset is not None and offset != k.shape[1] - q.shape[1]:
        raise Refused("its causal mask is aligned with the last key")
    return _flash_call(q, k, v, offset is not None, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flash_call(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, window: int | None) -> jax.Array:
    return _flash_forward(q, k, v, causal, window)[0]


def _flash_options(q: jax.Array, causal: bool, window: int | None) -> dict[str, Any]:
    """A window to the left and none to the right is causal by itself; -1 is no bound."""
    left, right = (-1, -1) if window is None else (window, 0)
    return {
        "softmax_scale": np.float64(q.shape[-1] ** -0.5),
        "is_causal": causal and window is None,
        "window_size_left": np.int64(left),
        "window_size_right": np.int64(right),
    }


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, window: int | None) -> tuple[Any, Any]:
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch, length, heads, _ = q.shape
    results = (_like(q), float32((batch, heads, length)), float32((1, 1, 1, 1)), float32((1, 1, 1)))
    call = jax.ffi.ffi_call("ringjax_bench_flash_attention_3_fwd", results)
    out, lse, *_ = call(q, k, v, **_flash_options(q, causal, window))
    return out, (q, k, v, out, lse)


def _flash_backward(causal: bool, window: int | None, saved: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = saved
    batch, length, heads, _ = q.shape
    # Two buffers of work: rows of every head, each sequence rounded up to the kernel's block.
    rows = jax.ShapeDtypeStruct((heads * (batch * length + 128 * (batch + 1)),), jnp.float32)
    call = jax.ffi.ffi_call("ringjax_bench_flash_attention_3_bwd", (_like(q), _like(k), _like(v), rows, rows))
    dq, dk, dv, *_ = call(dout, q, k, v, out, lse, **_flash_options(q, causal, window))
    return dq, dk, dv


_flash_call.defvjp(_flash_forward, _flash_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, q_starts: jax.Array, k_starts: jax.Array, causal: bool,
    window: int | None, longest: int,
) -> jax.Array:  # fmt: skip
    """Documents one after another, [T, N, D]. One without queries has gradients of 0."""
    return _packed_forward(q, k, v, q_starts, k_starts, causal, window, longest)[0]


def _packed_options(q: jax.Array, causal: bool, window: int | None, longest: int) -> dict[str, Any]:
    lengths = {"max_seqlen": np.int64(longest), "max_seqlen_k": np.int64(longest)}
    return _flash_options(q, causal, window) | lengths


def _packed_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_starts: jax.Array, k_starts: jax.Array, causal: bool,
    window: int | None, longest: int,
) -> tuple[Any, Any]:  # fmt: skip
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    length, heads, _ = q.shape
    results = (_like(q), float32((heads, length)), float32((1, 1, 1, 1)), float32((1, 1, 1)))
    call = jax.ffi.ffi_call("ringjax_bench_flash_attention_3_varlen_fwd", results)
    out, lse, *_ = call(q, k, v, q_starts, k_starts, **_packed_options(q, causal, window, longest))
    return out, (q, k, v, out, lse, q_starts, k_starts)


def _packed_backward(causal: bool, window: int | None, longest: int, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    q, k, v, out, lse, q_starts, k_starts = saved
    length, heads, _ = q.shape
    rows = jax.ShapeDtypeStruct((heads * (length + 128 * q_starts.shape[0]),), jnp.float32)
    results = (_like(q), _like(k), _like(v), rows, rows)
    call = jax.ffi.ffi_call("ringjax_bench_flash_attention_3_varlen_bwd", results)
    options = _packed_options(q, causal, window, longest)
    dq, dk, dv, *_ = call(dout, q, k, v, out, lse, q_starts, k_starts, **options)
    nothing = np.zeros(q_starts.shape, jax.dtypes.float0)
    return dq, dk, dv, nothing, nothing


_flash_packed.defvjp(_packed_forward, _packed_backward)
