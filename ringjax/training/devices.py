"""From the configuration to a running JAX: simulated devices, processes, the mesh. Must run before JAX's first use."""

from __future__ import annotations

import os

import jax
from jax.sharding import AbstractMesh, AxisType

import ringjax

from ..simulate import set_cpu_devices
from .config import Config, Distributed
from .loading import ConfigError

AXES = ("data", "sequence", "tensor")
_NO_CLUSTER = "coordinator_address should be defined"  # what jax.distributed.initialize says when it detects none


def start(config: Config) -> jax.sharding.Mesh:
    """Starts JAX as the configuration says.

    Returns:
      The mesh over all devices of all processes, axes "data", "sequence", "tensor".

    Raises:
      ConfigError: the mesh does not hold exactly the devices there are, or the processes are not told who they are.
    """
    if config.devices.simulate:
        set_cpu_devices(config.devices.simulate)
    _join(config.distributed, simulated=config.devices.simulate > 0)
    mesh, found = config.mesh, jax.device_count()
    if mesh.num_devices != found:
        hint = ""
        if not config.devices.simulate and jax.default_backend() == "cpu":
            hint = f" For simulated devices on one CPU set devices.simulate = {mesh.num_devices}."
        raise ConfigError(
            f"mesh: data x sequence x tensor must be the number of devices, {found} ({jax.default_backend()}, "
            f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}). "
            f"Got {mesh.data} x {mesh.sequence} x {mesh.tensor} = {mesh.num_devices}.{hint}"
        )
    return ringjax.ring_mesh(_shape(config), AXES, ring_axis="sequence")


def abstract_mesh(config: Config) -> AbstractMesh:
    """The mesh of the configuration without its devices: enough to trace a step."""
    return AbstractMesh(_shape(config), AXES, axis_types=(AxisType.Auto,) * 3)


def _shape(config: Config) -> tuple[int, int, int]:
    return config.mesh.data, config.mesh.sequence, config.mesh.tensor


def _join(config: Distributed, *, simulated: bool) -> None:
    """Calls jax.distributed.initialize when told so, or when the environment is a cluster.

    A key that the configuration lacks is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, and
    otherwise left to JAX, which knows Cloud TPU, Slurm, Open MPI and Kubernetes.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = config.num_processes or _from_environment("JAX_NUM_PROCESSES")
    process = config.process_id if config.process_id is not None else _from_environment("JAX_PROCESS_ID")
    told = config.initialize or coordinator is not None
    # Simulated devices are for one machine: a laptop, a CI container that happens to run under Kubernetes.
    if config.initialize is False or (simulated and not told):
        return
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        if not told and _NO_CLUSTER in str(error):
            return
        raise ConfigError(
            "distributed: needs coordinator ('host:port' of process 0), num_processes and process_id where JAX does "
            "not detect a cluster (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). "
            f"Got {coordinator!r}, {processes}, {process}. JAX says: {error}"
        ) from None


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"{name}: must be a number. Got {text!r}.")
    return int(text)
