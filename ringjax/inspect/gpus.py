"""What XLA must be told of a GPU that is absent."""

from ..planner.chips import GPUS, Gpu
from ..planner.topology import Hosts, parse_hosts

__all__ = ["GPUS", "Gpu", "Hosts", "parse_hosts", "target_config"]


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
