"""Which tokens a device holds once the shards of some mesh axes are merged on it. Index maths only, no devices.

A layout deals a sequence to C ranks, row-major over the axes of the sequence. An exchange over some of these axes
(keys that are gathered, tokens that are exchanged for heads) leaves a device with the shards of all ranks along them.
They are merged into one shard whose positions grow, by a permutation that is the same on every device, so that the
positions stay three integers (:class:`ringjax.layout.Runs`) wherever that is possible at all.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .layout import Layout, Runs


@dataclasses.dataclass(frozen=True)
class Deal:
    """The tokens of one side, queries or keys.

    Attributes:
      layout: that deals the sequence to all C ranks.
      sizes: of the axes of the sequence, outermost first; C is their product.
      merged: for each axis, whether the shards along it are merged on every device.
      shard_length: L, of a shard before they are merged.
    """

    layout: Layout
    sizes: tuple[int, ...]
    merged: tuple[bool, ...]
    shard_length: int

    @property
    def num_ranks(self) -> int:
        """C."""
        return math.prod(self.sizes)

    @property
    def num_merged(self) -> int:
        """Shards on each device."""
        return math.prod(size for size, merged in zip(self.sizes, self.merged, strict=True) if merged)

    @property
    def length(self) -> int:
        """Of the merged shard."""
        return self.num_merged * self.shard_length

    @property
    def ring_sizes(self) -> tuple[int, ...]:
        """Of the axes along which the shards stay apart."""
        return tuple(size for size, merged in zip(self.sizes, self.merged, strict=True) if not merged)

    def runs(self, place: tuple[Any, ...]) -> Runs | None:
        """Positions of the merged shard of the device at ``place`` on the other axes; None: not three integers."""
        if self.num_merged == self.num_ranks:  # the whole sequence, whatever the layout
            return Runs(base=0, step=self.length, run=self.length, length=self.length)
        first, offsets = self._ranks(place)
        return self.layout.merged_runs(first, offsets, self.shard_length, self.num_ranks)

    def positions(self, place: tuple[Any, ...]) -> jax.Array:
        """The same as an array [1, length], ascending."""
        first, offsets = self._ranks(place)
        index = jnp.arange(self.shard_length, dtype=jnp.int32)
        each = [self.layout.positions(first + n, index, self.shard_length, self.num_ranks) for n in offsets]
        return self.merge(jnp.stack(each)[None].astype(jnp.int32))

    def merge(self, x: Any) -> Any:
        """[B, shards, L, ...], the shards in order of their ranks, to [B, length, ...]."""
        if self.num_merged == 1:
            return x.reshape(x.shape[0], *x.shape[2:])
        return self.layout.merge(x)

    def split(self, x: Any) -> Any:
        """The inverse of merge."""
        shape = (x.shape[0], self.num_merged, self.shard_length, *x.shape[2:])
        return x.reshape(shape) if self.num_merged == 1 else self.layout.split(x, self.num_merged)

    def chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """For each chunk along the sequence: which device holds it, and where in its shard it starts."""
        size = self.layout.chunk_length(self.shard_length)
        chunk = np.arange(self.num_ranks * self.shard_length // size)
        device = self.device_of(self.layout.owner(chunk, self.num_ranks))
        # Merged shards grow, so a chunk stands behind all that the same device holds and that come before it.
        order = np.argsort(device, kind="stable")
        start = np.empty_like(chunk)
        start[order] = np.arange(chunk.size) % (chunk.size // math.prod(self.ring_sizes)) * size
        return device, start

    def device_of(self, rank: Any) -> Any:
        """Index, row-major over the axes that are not merged, of the device that holds the shard of this rank."""
        places = np.unravel_index(rank, self.sizes) if self.sizes else ()
        apart = [at for at, merged in zip(places, self.merged, strict=True) if not merged]
        return np.ravel_multi_index(apart, self.ring_sizes) if apart else np.zeros_like(rank)

    def _ranks(self, place: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
        """The first of the ranks whose shards are merged, and how far the others are from it, ascending."""
        strides = [math.prod(self.sizes[n + 1 :]) for n in range(len(self.sizes))]
        apart = [stride for stride, merged in zip(strides, self.merged, strict=True) if not merged]
        first = sum((at * stride for at, stride in zip(place, apart, strict=True)), start=0)
        steps = [range(0, size * stride, stride) if merged else (0,)
                 for size, stride, merged in zip(self.sizes, strides, self.merged, strict=True)]  # fmt: skip
        return first, tuple(sum(each) for each in itertools.product(*steps))
