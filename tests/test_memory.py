"""Memory of the compiled program: it halves when the ring doubles and is linear in the sequence, both ways."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_inspect_gpu import needs_cuda

import ringjax
from ringjax.inspect.gpus import Hosts, target_config
from ringjax.inspect.topology import parse_topology

LENGTH, HEADS, SIZE = 2048, 4, 16

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True, "layout": "zigzag"},
    "window": {"local_window_size": (LENGTH - 1, 0), "layout": "striped"},
}
both_ways = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@functools.cache
def footprint(name: str, num_shards: int, backward: bool, length: int = LENGTH) -> int:
    """Bytes a device: arguments, results and everything in between. (On CPU the reported peak leaves that out.)"""
    mesh = cases.mesh_of(num_shards)
    config = ringjax.RingConfig(implementation="xla", block_q=32, block_kv=32)

    def forward(query: Any, key: Any, value: Any) -> Any:
        return ringjax.ring_attention(query, key, value, mesh=mesh, config=config, **OPTIONS[name])

    def gradients(query: Any, key: Any, value: Any, dout: Any) -> Any:
        return jax.vjp(forward, query, key, value)[1](dout)

    sharding = NamedSharding(mesh, PartitionSpec(None, "sp"))
    array = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32, sharding=sharding)
    program = jax.jit(gradients if backward else forward)
    compiled = program.lower(*[array] * (4 if backward else 3)).compile()
    stats = compiled.memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


@both_ways
@pytest.mark.parametrize("name", OPTIONS)
def test_twice_the_devices_is_half_the_memory(name: str, backward: bool) -> None:
    ratio = footprint(name, 8, backward) / footprint(name, 4, backward)
    assert 0.5 / 1.15 <= ratio <= 0.5 * 1.15


@both_ways
@pytest.mark.parametrize("name", OPTIONS)
def test_memory_is_linear_in_the_sequence(name: str, backward: bool) -> None:
    ratio = footprint(name, 4, backward, 2 * LENGTH) / footprint(name, 4, backward)
    assert ratio <= 2.05


@both_ways
def test_memory_is_a_few_shards(backward: bool) -> None:
    # Forward: q, k, v, out, their head-major copies, two receive buffers, the float32 carry.
    # Backward also: dout, dq, dk, dv, and two pairs of travelling sums. A gathered K and V would add 16 in float32.
    shard = LENGTH // 8 * HEADS * SIZE * 4
    assert footprint("full", 8, backward) <= (27 if backward else 14) * shard


@needs_cuda
@pytest.mark.parametrize(
    ("implementation", "backward", "kept"),
    [("pallas_gpu", True, 1), ("pallas_gpu", False, 0), ("xla", True, 3), ("xla", False, 0)],
)
def test_layers_do_not_hold_the_sums_of_others(implementation: str, backward: bool, kept: int) -> None:
    """Temporary memory of a model whose layers are written one after another, by the account of XLA for GPUs.

    ``kept``: arrays of bfloat16 of each layer that its gradient needs: its input, and of the XLA kernel a float32
    output besides.
    """
    chips = parse_topology("h200:8")
    assert isinstance(chips, Hosts)
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(chips.gpu), topology=chips.shape
    )
    mesh = Mesh(np.array(described.devices[:1]), ("sp",))
    config = ringjax.RingConfig(implementation=implementation)
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16, sharding=sharding)

    def temporary(layers: int) -> int:
        def model(x: jax.Array) -> jax.Array:
            for _ in range(layers):
                x = ringjax.ring_attention(x, x, x, is_causal=True, mesh=mesh, config=config)
            return x

        run = (lambda x, dout: jax.vjp(model, x)[1](dout)) if backward else (lambda x, dout: model(x) + dout)
        return jax.jit(run).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    a_layer = (temporary(6) - temporary(2)) / 4
    assert a_layer / (2 * x.size) < kept + 0.1
