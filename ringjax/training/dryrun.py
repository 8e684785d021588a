"""`ringjax train --dry-run`: traces the step to shapes on an abstract mesh, of any size, on any machine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from rich.console import Console

from ..units import size
from . import devices, pretrained, program
from .config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a configuration is made of; nothing was allocated to find out."""

    num_devices: int
    num_parameters: int
    tokens_per_step: int
    shard_length: int  # tokens of a sequence on one device
    state_bytes_per_device: int  # parameters, moments, counters
    batch_bytes_per_device: int
    bytes_per_hop: int  # of K and V, sent by one device
    parameters: tuple[tuple[str, str, str, str], ...]  # name, shape, mesh axes of each dimension, shape of a shard


def plan(config: Config) -> Plan:
    """Traces init and step.

    Raises:
      ConfigError, ValueError, NotImplementedError: as the run itself would when it traces.
    """
    subject = pretrained.resolve(config)
    shard = config.data.sequence_length // config.mesh.sequence
    # How much documents share is not known without them: as much as can be.
    shared = shard if config.data.packing == "balanced" else None
    made = program.build(config, devices.abstract_mesh(config), subject.decoder, shared_length=shared)
    out_state, _ = made.trace_step().out_info
    for wanted, found in zip(jax.tree.leaves(made.state), jax.tree.leaves(out_state), strict=True):
        assert (wanted.shape, wanted.dtype) == (found.shape, found.dtype)  # a step may not change its own type
    model = subject.decoder
    rows, kv_heads = (
        config.data.batch_size // config.optimizer.accumulate // config.mesh.data,
        model.num_kv_heads // config.mesh.tensor,
    )
    leaves = jax.tree.leaves_with_path(made.state.params)
    return Plan(
        num_devices=config.mesh.num_devices,
        num_parameters=sum(math.prod(leaf.shape) for _, leaf in leaves),
        tokens_per_step=config.data.batch_size * config.data.sequence_length,
        shard_length=shard,
        state_bytes_per_device=_bytes_per_device(made.state),
        batch_bytes_per_device=_bytes_per_device(made.batch),
        bytes_per_hop=2 * rows * shard * kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize,
        parameters=tuple(
            (
                jax.tree_util.keystr(path, simple=True, separator="."),
                str(leaf.shape),
                _axes(leaf.sharding),
                str(leaf.sharding.shard_shape(leaf.shape)),
            )
            for path, leaf in leaves
        ),
    )


def show(config: Config, console: Console) -> None:
    """Prints the plan of a configuration."""
    jax.config.update("jax_platforms", "cpu")  # a look must not seize the accelerator
    made, mesh = plan(config), config.mesh
    rows = [("parameter", "shape", "over mesh axes", "shard of a device"), *made.parameters]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    batch, length = config.data.batch_size, config.data.sequence_length
    for line in (
        *table,
        f"mesh: data {mesh.data} x sequence {mesh.sequence} x tensor {mesh.tensor} = {made.num_devices} devices",
        f"parameters: {made.num_parameters:,}",
        f"tokens per step: {batch} x {length:,} = {made.tokens_per_step:,}",
        f"a device holds: {batch // mesh.data} x {made.shard_length:,} tokens ({size(made.batch_bytes_per_device)} "
        f"of batch), {size(made.state_bytes_per_device)} of parameters and optimizer state",
        f"ring: layout {config.ring.layout}, {mesh.sequence} devices, {_travels(config, made)}",
        f"steps: {config.optimizer.steps:,}; traced to shapes, nothing was run",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _travels(config: Config, made: Plan) -> str:
    if config.ring.strategy != "ring":
        return f"strategy {config.ring.strategy}"
    return f"at most {config.mesh.sequence - 1} hops a layer of {size(made.bytes_per_hop)} forward"


def _axes(sharding: NamedSharding) -> str:
    """The mesh axes that cut each dimension; those of size 1 cut nothing."""
    names = []
    for entry in sharding.spec:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        names.append("*".join(axis for axis in axes if sharding.mesh.shape[axis] > 1) or "-")
    return ", ".join(names)


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
