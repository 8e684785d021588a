"""Memory of the compiled program: it halves when the ring doubles and is linear in the sequence, both ways."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ringjax

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
