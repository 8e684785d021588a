"""NVIDIA's Hopper GPUs: which they are, and what XLA is told to hide a ring there. Imports nothing from ringjax."""

from __future__ import annotations

import re

_NAMES = re.compile(r"\bG?H(20|100|200|800)\b")  # in the names that JAX gives devices

# XLA for GPUs lets one operation of the wire run behind a kernel, and joins the arrays of a hop in one only below this
# many bytes: those of a long sequence are larger, and all but one of them would be awaited before the kernel.
COMBINE = "xla_gpu_collective_permute_combine_threshold_bytes"
COMBINE_BYTES = 2**34  # more than a hop sends


def is_hopper(device_kind: str) -> bool:
    return _NAMES.search(device_kind) is not None


def ring_options(device_kind: str, ring: int, xla_flags: str) -> dict[str, int]:
    """Compiler options for a program with a ring, beside what XLA_FLAGS says.

    Args:
      device_kind: of the devices that the program is compiled for, as JAX calls them.
      ring: how many devices K and V travel.
      xla_flags: the environment's XLA_FLAGS: what the user has said there is left alone.

    Returns:
      Options for `compile`, none where they do not help: on an A100 fewer permutes hide with them than without.
    """
    if ring < 2 or not is_hopper(device_kind) or COMBINE in xla_flags:
        return {}
    return {COMBINE: COMBINE_BYTES}
