"""Chips: the one table of what the planner and `ringjax inspect` need to know of TPUs and GPUs. Figures only.

Sources, named where a figure comes from:

- [Cloud TPU]: the tables of specifications in Google's documentation of v4, v5e, v5p, v6e and TPU7x.
- [NVIDIA]: data sheets of A100, H100, H200 and B200, and the target configurations published with XLA.
- [docs/performance.md]: measured by `ringjax bench gpu` on one H100, and static cycles by `ringjax bench tpu-static`.
- [assumed]: nobody has measured it here. Such a figure may be replaced by one that was measured: it is one field.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

_GIB, _MIB = 2**30, 2**20
_GB = 10**9
_TERA = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """What attention with heads of one size reaches, in FLOP/s; a causal call counts half of the products.

    Backward is derived from a program of both passes: 3.5 / both = 1 / forward + 2.5 / backward.
    """

    forward: float
    both: float
    causal_forward: float
    causal_both: float

    def of(self, *, backward: bool, is_causal: bool) -> float:
        """FLOP/s of one pass."""
        forward, both = (self.causal_forward, self.causal_both) if is_causal else (self.forward, self.both)
        return 2.5 / (3.5 / both - 1 / forward) if backward else forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What all devices have.

    Attributes:
      name: in the name of a topology.
      memory_bytes: of one device, what the driver leaves.
      bandwidth: of that memory, bytes/s.
      peak: bfloat16 FLOP/s of one device.
      rates: of attention, by head size; a size between two takes the next larger one, whose tiles it pads.
      link_bandwidth: bytes/s that a device sends over one link in one direction: to a neighbour on a torus, into the
        switch otherwise.
      hop_seconds: what one hop of a ring costs besides its products, its bytes on the wire and its carry in memory.
      exchange_seconds: what one collective (all_to_all, all_gather, reduce_scatter of one array) costs besides its
        bytes.
      peer_seconds: the same for each of the other devices of an all_to_all.
      carry_passes: how often a hop reads or writes the unfinished output (float32) in memory: the carry of our kernels
        is read once and written once.
      backward_carry_passes: the same in backward, of the unfinished dq; whatever else a hop costs there that grows with
        the shard may be counted in it.
      backward_wave: keys, counted once for each head and batch row, that the programs of the backward kernel own which
        run at the same time; 0: not known. The last ones of a hop end one after another, and the next hop waits: on the
        average for half of what a program takes.
      backward_part: attended pairs of a query and a key that those programs work on at most, all together: longer ones
        are cut in parts.
      gather_links: links of a torus that a gather uses at most; None: all.
      lanes: a head takes memory in multiples of so many items.
      thrifty: the compiler keeps nothing longer than it is needed, see :func:`ringjax.planner.costs.memory_terms`.
    """

    lanes = 1
    thrifty = False

    name: str
    memory_bytes: int
    bandwidth: float
    peak: float
    rates: Mapping[int, Rate]
    link_bandwidth: float
    hop_seconds: float
    exchange_seconds: float
    peer_seconds: float
    carry_passes: float = 2.0
    backward_carry_passes: float = 2.0
    backward_wave: int = 0
    backward_part: int = 0
    gather_links: int | None = None

    def rate(self, head_size: int, *, backward: bool, is_causal: bool) -> float:
        """FLOP/s of attention, in one pass."""
        size = min((known for known in self.rates if known >= head_size), default=max(self.rates))
        return self.rates[size].of(backward=backward, is_causal=is_causal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """One generation of TPUs; a device is a chip, or where ``devices_per_chip`` is 2 one of its cores.

    Attributes:
      kinds: as JAX names the devices.
      macs_per_cycle: bfloat16 multiply-adds a cycle of one core: its matrix units times their area.
      cores_per_device: 2 where both cores of a chip are one device ("megacore").
      devices_per_chip: 2 where each of the two cores is a device; they share the links of the chip.
      dimensions: of the torus.
      wraps_every: links wrap around a side that is a multiple of so many chips, if no other is shorter.
      longest_side: a longer one aborts the compiler; None: none known.
      chip_config: what to ask libtpu for beside the name.
    """

    platform = "tpu"
    lanes = 128

    kinds: tuple[str, ...]
    macs_per_cycle: int
    cores_per_device: int
    devices_per_chip: int
    dimensions: int
    wraps_every: int
    longest_side: int | None = None
    chip_config: str | None = None

    def mxu_floor(self, macs: int) -> float:
        """Cycles that the matrix units of a device need at least for so many multiply-adds."""
        return macs / (self.macs_per_cycle * self.cores_per_device)


# Cycles of the matrix units over all cycles by the compiler's static estimates, heads of 128 [docs/performance.md]:
# v5e 65,536 / 77,304 forward and 163,840 / 177,629 backward, v6e 32,768 / 44,865 and 81,920 / 84,944.
_STATIC_V5E, _STATIC_V6E = (0.848, 0.922), (0.730, 0.964)
# Of which a chip sustains [assumed]: clocks, waits for memory and masked tiles are not in static cycles. The forward
# share of v5e is then 0.66.
_SUSTAINED = 0.78


def _tpu_rates(peak: float, static: tuple[float, float]) -> dict[int, Rate]:
    """By head size: heads of 64 fill half of a matrix unit's contraction, so they take the time of 128 [assumed]."""
    forward, backward = (peak * share * _SUSTAINED for share in static)
    both = 3.5 / (1 / forward + 2.5 / backward)
    rate = Rate(forward=forward, both=both, causal_forward=forward, causal_both=both)
    half = Rate(forward=forward / 2, both=both / 2, causal_forward=forward / 2, causal_both=both / 2)
    return {64: half, 128: rate, 256: rate}


# Of a link's bidirectional figure [Cloud TPU] a stream one way gets 0.9 of half: 45 of 50 GB/s on v5e, 90 of 100 on v5p
# ("How to Scale Your Model", chapter on TPUs).
_STREAM = 0.9
# [assumed]: a permute or a collective takes some microseconds to start.
_tpu = functools.partial(Tpu, hop_seconds=5e-6, exchange_seconds=5e-6, peer_seconds=1e-6)
_MXU_128, _MXU_256 = 128 * 128, 256 * 256
_V4 = _tpu(
    name="v4",
    kinds=("TPU v4",),
    memory_bytes=32 * _GIB,
    bandwidth=1228 * _GB,
    peak=275 * _TERA,
    rates=_tpu_rates(275 * _TERA, _STATIC_V5E),
    link_bandwidth=_STREAM * 50 * _GB,
    macs_per_cycle=4 * _MXU_128,
    cores_per_device=2,
    devices_per_chip=1,
    dimensions=3,
    wraps_every=4,
    chip_config="megacore",
)
_V5E = _tpu(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    memory_bytes=16 * _GIB,
    bandwidth=819 * _GB,
    peak=197 * _TERA,
    rates=_tpu_rates(197 * _TERA, _STATIC_V5E),
    link_bandwidth=_STREAM * 50 * _GB,
    macs_per_cycle=4 * _MXU_128,
    cores_per_device=1,
    devices_per_chip=1,
    dimensions=2,
    wraps_every=16,
    longest_side=16,
)
_V5P = _tpu(
    name="v5p",
    kinds=("TPU v5", "TPU v5p"),
    memory_bytes=95 * _GIB,
    bandwidth=2765 * _GB,
    peak=459 * _TERA,
    rates=_tpu_rates(459 * _TERA, _STATIC_V5E),
    link_bandwidth=_STREAM * 100 * _GB,
    macs_per_cycle=4 * _MXU_128,
    cores_per_device=2,
    devices_per_chip=1,
    dimensions=3,
    wraps_every=4,
)
_V6E = _tpu(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    memory_bytes=32 * _GIB,
    bandwidth=1640 * _GB,
    peak=918 * _TERA,
    rates=_tpu_rates(918 * _TERA, _STATIC_V6E),
    link_bandwidth=_STREAM * 100 * _GB,
    macs_per_cycle=2 * _MXU_256,
    cores_per_device=1,
    devices_per_chip=1,
    dimensions=2,
    wraps_every=16,
)
_TPU7X = _tpu(
    name="tpu7x",
    kinds=("TPU7x", "TPU v7x"),
    memory_bytes=96 * _GIB,  # half a chip, as all figures but that of the links
    bandwidth=7370 * _GB / 2,
    peak=2307 * _TERA / 2,
    rates=_tpu_rates(2307 * _TERA / 2, _STATIC_V6E),
    link_bandwidth=_STREAM * 100 * _GB,
    macs_per_cycle=2 * _MXU_256,
    cores_per_device=1,
    devices_per_chip=2,
    dimensions=3,
    wraps_every=4,
)
TPUS = {tpu.name: tpu for tpu in (_V4, _V5E, _V5P, _V6E, _TPU7X)}
TPU_ALIASES = {"v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """One model of NVIDIA's GPUs, in hosts whose GPUs a switch connects. The figures are those of [NVIDIA].

    Attributes:
      kind: as the driver and JAX call the device.
      network_bandwidth: bytes/s one way that each GPU has to other hosts.
      capability: the compute capability.
      accelerated: whether code is made for this architecture alone (sm_90a), as WGMMA needs.
      multiprocessors: SMs that are switched on.
      lanes: float32 lanes of an SM.
      clock_ghz: of the SMs, boosted.
      l2_bytes: of the second cache.
      shared_bytes: shared memory of an SM.
      block_shared_bytes: the most of it that one block may ask for.
    """

    platform = "gpu"
    thrifty = True

    kind: str
    network_bandwidth: float
    capability: tuple[int, int]
    accelerated: bool
    multiprocessors: int
    lanes: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    block_shared_bytes: int


# Of one H200 by `ringjax bench gpu` [docs/performance.md]: 4 x 8192 x 16 x 64, 1 x 32768 x 16 x 128; heads of 256 as
# measured beside other kernels on 1 x 16384 x 16 x 256. An H100 has the same multiprocessors and clocks.
_HOPPER_RATES = {
    64: Rate(forward=507e12, both=521e12, causal_forward=458e12, causal_both=476e12),
    128: Rate(forward=691e12, both=603e12, causal_forward=663e12, causal_both=578e12),
    256: Rate(forward=680e12, both=512e12, causal_forward=630e12, causal_both=469e12),
}


def _triton_rates(rate: float) -> dict[int, Rate]:
    """One rate for all, less by what another Triton kernel loses in backward and under a causal mask."""
    both = 0.85 * rate
    return {256: Rate(forward=rate, both=both, causal_forward=0.9 * rate, causal_both=0.9 * both)}


# Of what a data sheet gives a link, and of a network card, NCCL leaves so much [assumed].
_NCCL = 0.8
# [assumed]: to start NCCL's kernel and to wait for it.
_gpu = functools.partial(Gpu, hop_seconds=20e-6, exchange_seconds=20e-6, peer_seconds=0.0)
_A100 = _gpu(
    name="a100",
    kind="NVIDIA A100-SXM4-80GB",
    memory_bytes=85_100_068_864,
    bandwidth=2_039_040_000_000,
    peak=312 * _TERA,
    rates=_triton_rates(156e12),  # half of the peak [assumed]
    link_bandwidth=_NCCL * 300 * _GB,
    network_bandwidth=_NCCL * 25 * _GB,
    capability=(8, 0),
    accelerated=False,
    multiprocessors=108,
    lanes=64,
    clock_ghz=1.41,
    l2_bytes=40 * _MIB,
    shared_bytes=164 * 1024,
    block_shared_bytes=163 * 1024,
)
_H100 = _gpu(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    memory_bytes=84_942_979_072,
    bandwidth=3_352_320_000_000,
    peak=989 * _TERA,
    rates=_HOPPER_RATES,
    link_bandwidth=_NCCL * 450 * _GB,
    # What the second hop of 1 x 8192 x 32/8 x 128, causal, forward, cost on two H200s [docs/performance.md].
    hop_seconds=38e-6,
    network_bandwidth=_NCCL * 50 * _GB,
    capability=(9, 0),
    accelerated=True,
    multiprocessors=132,
    lanes=128,
    clock_ghz=1.98,
    l2_bytes=50 * _MIB,
    shared_bytes=228 * 1024,
    block_shared_bytes=227 * 1024,
    backward_wave=132 * 128,  # a program on each multiprocessor owns 128 keys
    backward_part=132 * 256 * 64 * 128,  # and visits 256 tiles of 64 queries
)
_H200 = dataclasses.replace(
    _H100,
    name="h200",
    kind="NVIDIA H200",
    memory_bytes=141 * 1024 * _MIB,
    bandwidth=4_800_000_000_000,
)
_B200 = dataclasses.replace(
    _H100,
    name="b200",
    backward_wave=0,
    backward_part=0,
    kind="NVIDIA B200",
    memory_bytes=191_514_411_008,
    bandwidth=7_672_320_000_000,
    peak=2250 * _TERA,
    rates=_triton_rates(316e12),  # what a Triton kernel reaches on an H200: ours on B200 is not measured [assumed]
    link_bandwidth=_NCCL * 900 * _GB,
    capability=(10, 0),
    multiprocessors=148,
    clock_ghz=1.965,
    l2_bytes=132_644_864,
)
GPUS = {gpu.name: gpu for gpu in (_A100, _H100, _H200, _B200)}

_GPU_NAMES = {"a100": r"\bA100\b", "h100": r"\bG?H100\b|\bH800\b", "h200": r"\bG?H200\b", "b200": r"\bG?B200\b"}


def find_chip(device_kind: str) -> Tpu | Gpu | None:
    """The chip of a device as JAX names it; None: it is not in the table."""
    for tpu in TPUS.values():
        if device_kind in tpu.kinds:
            return tpu
    for name, pattern in _GPU_NAMES.items():
        if re.search(pattern, device_kind):
            return GPUS[name]
    return None
