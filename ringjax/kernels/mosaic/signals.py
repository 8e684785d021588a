"""Signals between the warpgroups of the forward kernel: a slot of the ring is free, it is your turn.

By named barriers. Where each thread arrives on an mbarrier in SMEM instead, which WGMMA keeps busy, the kernel takes 1
to 3% longer (docs/optimisation-log.md); JAX's interpreter knows no others, and gets those.
"""

import dataclasses
from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from . import ptx
from .tiles import WARPGROUP_THREADS, TileSizes


@dataclasses.dataclass(frozen=True)
class Signal:
    """Some barriers with one number each, of the same purpose."""

    first: int  # number of the first named barrier
    threads: int  # that come to each, waiting or not
    mbarriers: Any  # for the interpreter; or None

    def give(self, index: Any) -> None:
        if self.mbarriers is None:
            ptx.arrive(self.first + index, self.threads)
        else:
            plgpu.barrier_arrive(self.mbarriers.at[index])

    def wait(self, index: Any) -> None:
        if self.mbarriers is None:
            ptx.sync(self.first + index, self.threads)
        else:
            plgpu.barrier_wait(self.mbarriers.at[index])


class Signals(NamedTuple):
    """All of them, and the numbers of barriers where a warpgroup meets itself."""

    k_free: Signal  # one per slot: all multiplying warpgroups have done with its keys
    v_free: Signal
    turn: Signal  # one per multiplying warpgroup: it may multiply
    look: int  # of the loading warpgroup
    retry: int  # of the first multiplying warpgroup; the others' follow


def signals(tiles: TileSizes, scratch: Any) -> Signals:
    """With the numbers that Mosaic leaves. ``scratch`` has mbarriers instead, or None."""
    numbers, of_slot = tiles.named_barriers, WARPGROUP_THREADS * (tiles.compute + 1)
    return Signals(
        k_free=Signal(first=numbers.k_free, threads=of_slot, mbarriers=scratch.k_free),
        v_free=Signal(first=numbers.v_free, threads=of_slot, mbarriers=scratch.v_free),
        turn=Signal(first=numbers.turn, threads=2 * WARPGROUP_THREADS, mbarriers=scratch.turn),
        look=numbers.look,
        retry=numbers.retry,
    )
