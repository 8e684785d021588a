"""How the suite runs each kernel: one record each, and the matrix of features and rings that follows from it.

A later kernel adds its record here and inherits the conformance suite, the poison tests and the properties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ringjax

LAYOUTS = ("contiguous", "zigzag", "striped")
NUM_SHARDS = (1, 2, 3, 4, 5, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One kernel, as far as the suite is concerned.

    Attributes:
      name: RingConfig.implementation.
      on_cpu: what a machine without an accelerator makes of it. "runs"; "interpreted", by Pallas' interpreter; or
        "lowered", no further than to the module for a GPU, and then numbers come from tests/test_gpu.py alone.
      dtypes: what it takes.
      sizes: of the rings on which features run here. Compiling what the interpreter makes of a kernel takes long, so an
        interpreted kernel has small ones: the ring around it is the same.
      layouts: on how many of the three layouts each feature runs here.
      as_users: the first feature of those, every fourth for an interpreted kernel, that are compiled as users compile.
      block: tokens of a tile here. Small, so that a shard has empty, partial and full tiles.
      half_error: on the hardware, the error with 16-bit inputs over that of a dense computation, root mean square.
    """

    name: str
    on_cpu: str
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...] = (1, 3, 2)
    layouts: int = 1
    as_users: int = 0
    block: int = 8
    half_error: float = 1.2

    @property
    def largest(self) -> int:
        """The largest ring on which it runs here."""
        return max(self.sizes)

    def takes(self, dtype: Any) -> bool:
        return dtype.name in self.dtypes

    def config(self, **changes: Any) -> ringjax.RingConfig:
        """For a machine without an accelerator."""
        blocks = {"block_q": self.block, "block_kv": self.block}
        interpret = self.on_cpu == "interpreted"
        return ringjax.RingConfig(implementation=self.name, **{**blocks, "interpret": interpret, **changes})


_HALF = ("bfloat16", "float16")
PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="xla", on_cpu="runs", dtypes=("float64", "float32", *_HALF), sizes=NUM_SHARDS, layouts=3),
        Profile(name="pallas_tpu", on_cpu="interpreted", dtypes=("float32", *_HALF), as_users=1),
        Profile(name="pallas_triton", on_cpu="interpreted", dtypes=("float32", *_HALF), as_users=2),
        # JAX's interpreter for Mosaic runs its forward kernel alone, see tests/test_mosaic_interpret.py.
        Profile(name="pallas_gpu", on_cpu="lowered", dtypes=_HALF, sizes=(1, 2)),
    )
}


class Cell(NamedTuple):
    """One program of the matrix."""

    implementation: str
    feature: str
    layout: str
    num_shards: int
    as_users: bool  # compiled with the optimisations that users have


def matrix(profile: Profile, features: Sequence[str]) -> Iterator[Cell]:
    """A Latin square of features, layouts and ring sizes in place of their product.

    Every feature runs, and where a profile has all layouts, every pair of feature and layout and of layout and size
    occurs. The first layout of a feature is compiled as users compile, of an interpreted kernel every fourth one.
    """
    for number, feature in enumerate(features):
        first = number % len(LAYOUTS)
        order = (LAYOUTS[first:] + LAYOUTS[:first])[: profile.layouts]
        for turn, layout in enumerate(order):
            size = profile.sizes[(number + number // len(LAYOUTS) + 2 * turn) % len(profile.sizes)]
            as_users = turn == 0 and (profile.on_cpu == "runs" or number % 4 == profile.as_users)
            yield Cell(profile.name, feature, layout, size, as_users)
