"""The registry of block kernels: what each runs on and takes, and which one a call gets.

A new backend is a folder beside this file, with ``kernel.py`` in it, and an entry of ``BACKENDS``.
"""

import dataclasses
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .._compat import gpu_registers_are_ignored, tpu_interpreter_is_forced
from ..config import RingConfig
from .base import Kernel

# In the names that JAX gives devices.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_BLACKWELL = re.compile(r"\bG?B(100|200|300)\b")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a call is compiled for."""

    platform: str
    device_kind: str  # as JAX names it
    capability: str | None = None  # of an NVIDIA GPU


def _anything(target: Target) -> bool:
    del target  # Unused.
    return True


def is_hopper(target: Target) -> bool:
    """Whether it is a GPU of NVIDIA's Hopper generation."""
    return _HOPPER.search(target.device_kind) is not None


def wants_one_operation(target: Target) -> bool:
    """Whether what travels at the same time is sent in one operation, see ringjax._compat.in_one_operation.

    On Hopper and Blackwell all of a hop hides then. On an A100 XLA awaits most such operations before the kernel.
    """
    if target.platform != "gpu" or not target.device_kind.startswith("NVIDIA"):
        return False
    if target.capability is not None:
        return float(target.capability) >= 9
    return is_hopper(target) or _BLACKWELL.search(target.device_kind) is not None


def _is_ampere_or_later(target: Target) -> bool:
    # Triton has no products for what came before Ampere; what is not from NVIDIA is untried.
    return target.device_kind.startswith("NVIDIA") and float(target.capability or 8) >= 8


def _keeps_registers(target: Target) -> bool:
    del target  # Unused.
    return not gpu_registers_are_ignored()


@dataclasses.dataclass(frozen=True)
class Backend:
    """One block kernel. ``module``, below ringjax.kernels, has ``forward`` and ``backward`` of the contract."""

    name: str  # RingConfig.implementation
    module: str
    platform: str | None  # None: every platform
    dtypes: tuple[str, ...]
    largest_head: int | None = None  # of key and value; None: any
    interpretable: bool = False  # JAX's interpreter runs it on every platform
    runs_on: Callable[[Target], bool] = _anything  # devices of the platform that have what it needs
    devices: str = ""  # these devices, in words
    default_on: Callable[[Target], bool] = _anything  # where it is chosen, if no kernel is named

    def load(self) -> Kernel:
        """The kernel. Imported only here: Pallas takes a second to import."""
        module: Any = importlib.import_module(f".{self.module}", __package__)
        return module

    def can(self, target: Target, dtype: Any, largest_head: int) -> bool:
        """Whether it runs there, on such arrays."""
        return (
            self.platform in (None, target.platform)
            and jnp.dtype(dtype).name in self.dtypes
            and (self.largest_head is None or largest_head <= self.largest_head)
            and self.runs_on(target)
        )

    def suits(self, target: Target, dtype: Any, largest_head: int) -> bool:
        """Whether it is the one to choose, if no better one does."""
        return self.can(target, dtype, largest_head) and self.default_on(target)


_HALF = ("bfloat16", "float16")
_UP_TO_32 = ("float32", *_HALF)

# The better ones first.
BACKENDS = (
    Backend(name="pallas_tpu", module="tpu.kernel", platform="tpu", dtypes=_UP_TO_32, interpretable=True),
    Backend(
        name="pallas_gpu", module="mosaic.kernel", platform="gpu", dtypes=_HALF, largest_head=256,
        runs_on=is_hopper, devices="Hopper GPUs (H100, H200)", default_on=_keeps_registers,
    ),
    Backend(
        name="pallas_triton", module="triton.kernel", platform="gpu", dtypes=_UP_TO_32, interpretable=True,
        default_on=_is_ampere_or_later,
    ),
    Backend(name="xla", module="xla", platform=None, dtypes=("float64", *_UP_TO_32)),
)  # fmt: skip
BY_NAME = {backend.name: backend for backend in BACKENDS}

_REGISTERS = (
    "On Hopper GPUs attention is slow with JAX 0.12, whose compiler (nvJitLink) ignores how the kernel 'pallas_gpu' "
    "divides registers: it takes up to 5 times as long. Unless it is named, 'pallas_triton' runs in its place. "
    "JAX 0.11 gives the full speed: pip install 'jax[cuda12]<0.12', or cuda13."
)


def default(target: Target, dtype: Any, largest_head: int) -> Backend:
    """What runs where no kernel is named; ``largest_head`` of key and value."""
    return next(backend for backend in BACKENDS if backend.suits(target, dtype, largest_head))


def choose(config: RingConfig, target: Target, dtype: Any, largest_head: int) -> Backend:
    """The named kernel, or the best one for these arrays on this platform.

    Raises:
      ValueError: the named kernel does not run on this platform or device.
      NotImplementedError: the named kernel cannot do what is asked of it.
    """
    mosaic = BY_NAME["pallas_gpu"]
    wanted = config.implementation in (None, mosaic.name) and mosaic.can(target, dtype, largest_head)
    if wanted and gpu_registers_are_ignored():
        warnings.warn(_REGISTERS, stacklevel=2)
    if config.implementation is None:
        return default(target, dtype, largest_head)
    backend = BY_NAME[config.implementation]
    name, interpreted = backend.name, interprets(config)
    if config.interpret and not backend.interpretable:
        able = " and ".join(repr(other.name) for other in BACKENDS if other.interpretable)
        raise NotImplementedError(
            f"config.interpret: JAX's interpreters cannot run implementation {name!r}. Got interpret=True; they run "
            f"{able}."
        )
    if backend.platform not in (None, target.platform) and not interpreted:
        elsewhere = ", elsewhere only with interpret=True, in JAX's slow interpreter" * backend.interpretable
        raise ValueError(
            f"config.implementation must be one that platform {target.platform!r} has. Got {name!r}, which runs on "
            f"{backend.platform!r}{elsewhere}."
        )
    if not interpreted and not backend.runs_on(target):
        others = " or ".join(
            repr(other.name) for other in BACKENDS
            if other.platform in (None, target.platform) and other.runs_on(target)
        )  # fmt: skip
        raise ValueError(
            f"config.implementation must be {others} on {target.device_kind!r}. Got {name!r}, which runs on "
            f"{backend.devices} alone."
        )
    if jnp.dtype(dtype).name not in backend.dtypes:
        raise NotImplementedError(
            f"config.implementation {name!r} takes {', '.join(backend.dtypes)}. Got {jnp.dtype(dtype).name}; 'xla' "
            "takes it."
        )
    return backend


def interprets(config: RingConfig) -> bool:
    """Whether a Pallas kernel runs in an interpreter: asked for, or inside force_tpu_interpret_mode."""
    return config.interpret or (config.implementation in (None, "pallas_tpu") and tpu_interpreter_is_forced())
