"""Part of `ringjax bench gpu`: one token against a full cache, which takes as long as reading the cache."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax.bench.timing import Measurement, Shape, Timed, compile_all, in_turns

COLUMNS = ("cached", "devices", "ringjax ms", "reference ms", "times as fast", "of the bandwidth")


@dataclasses.dataclass(frozen=True)
class Row:
    """Median milliseconds of one token; the reference is dense attention on one device, for two ringjax on one."""

    what: str
    num_devices: int
    ours_ms: float
    reference_ms: float
    ratio: float
    bandwidth_share: float  # of what a copy reaches, on all devices together

    def cells(self) -> tuple[str, ...]:
        numbers = (
            f"{self.ours_ms:.3f}",
            f"{self.reference_ms:.3f}",
            f"{self.ratio:.3f}",
            f"{self.bandwidth_share:.3f}",
        )
        return self.what, str(self.num_devices), *numbers


def copy_bandwidth(rounds: int, size: int) -> float:
    """Bytes per second that a copy of an array of ``size`` bytes reads and writes."""
    x = jnp.zeros((size // 2,), jnp.bfloat16)
    (program,) = compile_all([Timed(lambda x: x + jnp.bfloat16(1), (x,))])
    (times,) = in_turns([program], rounds)
    return 2e3 * size / statistics.median(times)


def _row(what: str, num_devices: int, times: Sequence[Sequence[float]], *, floor_ms: float) -> Row:
    ours, theirs = times
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    a = statistics.median(ours)
    return Row(
        what=what,
        num_devices=num_devices,
        ours_ms=a,
        reference_ms=statistics.median(theirs),
        ratio=ratio,
        bandwidth_share=floor_ms / num_devices / a,
    )


def _ours(shape: Shape, config: ringjax.RingConfig, dtype: Any, num_devices: int) -> Timed:
    """Every row is full, which the program does not know: lengths are numbers of the run time."""
    mesh = Mesh(jax.devices()[:num_devices], ("sp",))
    empty = ringjax.KVCache.empty(
        shape.batch, shape.length, shape.kv_heads, shape.head_size, dtype=dtype, mesh=mesh, num_shards=num_devices
    )
    # The sharding of the cache, drawn where it lies: it may be too large for one device.
    placed = NamedSharding(mesh, P(None, "sp", None, None))
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), empty.key.shape, dtype), out_shardings=placed)
    lengths = jax.device_put(jnp.full((shape.batch,), shape.length, jnp.int32), NamedSharding(mesh, P()))
    cache = dataclasses.replace(empty, key=draw(1), value=draw(2), lengths=lengths)
    query = jax.device_put(_query(shape, dtype), NamedSharding(mesh, P()))

    def attend(query: jax.Array, cache: ringjax.KVCache) -> Any:
        return ringjax.cached_attention(query, cache, mesh=mesh, config=config, return_residual=True)

    return Timed(attend, (query, cache))


def _query(shape: Shape, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (shape.batch, 1, shape.heads, shape.head_size), dtype)


def one_token(shape: Shape, config: ringjax.RingConfig, *, dtype: Any, reference: str, bandwidth: float) -> Measurement:
    """``cached_attention`` on one device beside ``jax.nn.dot_product_attention`` on the same keys."""
    ours = _ours(shape, config, dtype, 1)
    query, cache = ours.arguments
    of_jax: Any = jax.nn.dot_product_attention
    theirs = Timed(functools.partial(of_jax, implementation=reference), (query, cache.key, cache.value))
    floor_ms = 1e3 * (cache.key.nbytes + cache.value.nbytes) / bandwidth
    return Measurement((ours, theirs), functools.partial(_row, str(shape), 1, floor_ms=floor_ms))


def on_two_devices(shape: Shape, config: ringjax.RingConfig, *, dtype: Any, bandwidth: float) -> Measurement:
    """The same cache over two devices beside all of it on one."""
    ours, theirs = (_ours(shape, config, dtype, n) for n in (2, 1))
    cache = theirs.arguments[1]
    floor_ms = 1e3 * (cache.key.nbytes + cache.value.nbytes) / bandwidth
    return Measurement((ours, theirs), functools.partial(_row, str(shape), 2, floor_ms=floor_ms))
