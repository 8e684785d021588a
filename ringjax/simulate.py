"""Simulated CPU devices: what XLA must be told before JAX starts. Imports nothing from ringjax."""

from __future__ import annotations

import os
import re
from typing import Any

import jax

_COUNT = "--xla_force_host_platform_device_count"
# XLA:CPU warns about, then aborts, a program whose simulated devices reach a collective too far apart. Few cores and
# long hops do that, and nothing is wrong with them.
_PATIENCE = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 1200,
}


def set_cpu_devices(count: int) -> None:
    """Tells JAX to run on `count` simulated CPU devices. Starts nothing: `jax.distributed.initialize` may follow.

    Args:
      count: how many devices this process shows, at least 1.

    Raises:
      ValueError: `count` is below 1.
      RuntimeError: JAX has already started in this process.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1. Got {count}.")
    jax.config.update("jax_num_cpu_devices", count)  # The RuntimeError comes from here, before anything has changed.
    jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(rf"{_COUNT}=\d+", "", flags)  # one place says how many
    flags = " ".join([*flags.split(), *(f"{name}={value}" for name, value in _PATIENCE.items() if name not in flags)])
    os.environ["XLA_FLAGS"] = flags


def simulate_cpu_devices(count: int) -> list[Any]:
    """Returns `count` CPU devices, simulated ones if JAX has not started yet.

    Args:
      count: how many devices are needed, at least 1.

    Raises:
      ValueError: `count` is below 1.
      RuntimeError: JAX has already started with fewer devices; that cannot be changed in the same process.
    """
    try:
        set_cpu_devices(count)
    except RuntimeError:  # JAX has started: perhaps with enough devices.
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise RuntimeError(
            f"{count} simulated CPU devices are needed, but JAX has already started with {len(devices)}. "
            "Ask before the first JAX computation of the process."
        )
    return devices[:count]
