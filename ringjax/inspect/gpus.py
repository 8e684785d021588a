"""NVIDIA GPUs and hosts of them: what XLA must be told of a GPU that is absent, and how many there are."""

import dataclasses
import re

_MIB = 2**20
_MOST_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One model. The figures are those of NVIDIA's data sheets and of the target configurations published with XLA.

    Attributes:
      name: in the name of a topology.
      kind: as the driver and JAX call the device.
      capability: the compute capability.
      accelerated: whether code is made for this architecture alone (sm_90a), as WGMMA needs.
      multiprocessors: SMs that are switched on.
      lanes: float32 lanes of an SM.
      clock_ghz: of the SMs, boosted.
      memory_bytes: of the device, what the driver leaves.
      bandwidth: of that memory, in bytes per second.
      l2_bytes: of the second cache.
      shared_bytes: shared memory of an SM.
      block_shared_bytes: the most of it that one block may ask for.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    accelerated: bool
    multiprocessors: int
    lanes: int
    clock_ghz: float
    memory_bytes: int
    bandwidth: int
    l2_bytes: int
    shared_bytes: int
    block_shared_bytes: int


_A100 = Gpu(
    name="a100",
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    accelerated=False,
    multiprocessors=108,
    lanes=64,
    clock_ghz=1.41,
    memory_bytes=85_100_068_864,
    bandwidth=2_039_040_000_000,
    l2_bytes=40 * _MIB,
    shared_bytes=164 * 1024,
    block_shared_bytes=163 * 1024,
)
_H100 = Gpu(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    accelerated=True,
    multiprocessors=132,
    lanes=128,
    clock_ghz=1.98,
    memory_bytes=84_942_979_072,
    bandwidth=3_352_320_000_000,
    l2_bytes=50 * _MIB,
    shared_bytes=228 * 1024,
    block_shared_bytes=227 * 1024,
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
    kind="NVIDIA B200",
    capability=(10, 0),
    multiprocessors=148,
    clock_ghz=1.965,
    memory_bytes=191_514_411_008,
    bandwidth=7_672_320_000_000,
    l2_bytes=132_644_864,
)
GPUS = {gpu.name: gpu for gpu in (_A100, _H100, _H200, _B200)}


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts that each hold as many GPUs, all of one model."""

    gpu: Gpu
    hosts: int
    gpus_a_host: int

    platform = "gpu"

    @property
    def name(self) -> str:
        """Hosts are named where there are several."""
        return f"{self.gpu.name}:{f'{self.hosts}x' if self.hosts > 1 else ''}{self.gpus_a_host}"

    @property
    def num_devices(self) -> int:
        return self.hosts * self.gpus_a_host

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.gpu.memory_bytes

    @property
    def shape(self) -> str:
        """As XLA spells it: partitions, hosts of one, devices of one."""
        return f"1x{self.hosts}x{self.gpus_a_host}"


def parse_hosts(name: str) -> Hosts:
    """The hosts of a name such as "h100:8", or "h100:4x8" for four of them.

    Raises:
      ValueError: for a name that is none, or more GPUs than a host holds.
    """
    match = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", name)
    gpu = match and GPUS.get(match[1])
    if match is None or gpu is None:
        raise ValueError(
            f"topology must be GPU:N or GPU:HOSTSxN for GPUs, GPU one of {', '.join(GPUS)}, as in h100:8 or h100:2x8. "
            f"Got {name!r}."
        )
    hosts, count = int(match[2] or 1), int(match[3])
    if not 1 <= count <= _MOST_A_HOST or hosts < 1:
        raise ValueError(
            f"topology must have 1 to {_MOST_A_HOST} GPUs a host, and a host at least: {gpu.name}:2x8 is two hosts of "
            f"8. Got {name!r}."
        )
    return Hosts(gpu, hosts, count)


def target_config(gpu: Gpu) -> str:
    """The GPU as XLA wants it told: a GpuTargetConfigProto as text.

    Left out are the rates of the single units, which only steer estimates of time and change no order of the ring, and
    what the compiler of JAX 0.10 does not know.
    """
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.block_shared_bytes,
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "device_address_bits": 64,
    }
    lines = [f"  {name}: {value}" for name, value in info.items()]
    lines += [f'  name: "{gpu.kind}"', '  device_vendor: "NVIDIA Corporation"']
    lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}"]
    return "\n".join(
        ["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', f'device_description_str: "{gpu.kind}"', ""]
    )
