"""`ringjax demo`: shows on simulated devices what the ring does. Nothing it prints is a constant."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import ringjax
from ringjax import units
from ringjax.layout import as_layout
from ringjax.schedule import plan
from ringjax.simulate import simulate_cpu_devices
from ringjax.usage import UsageError, check_at_least_one

LAYOUTS = ("contiguous", "zigzag", "striped")
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64


@dataclasses.dataclass(frozen=True)
class Hop:
    """One rank at one hop: the block it works on and the share of that block's (query, key) pairs that attend."""

    block: int
    share: float


def hop_table(
    num_devices: int, shard_length: int, *, layout: str, left: int | None, right: int | None
) -> list[list[Hop]]:
    """Who works on which block: one list of hops for each rank, as the schedule plans them.

    Args:
      num_devices: C.
      shard_length: L; small will do, the shares are counted pair by pair.
      layout: "contiguous", "zigzag" or "striped".
      left, right: a query at position p attends to keys in [p - left, p + right]; None is unbounded.
    """
    schedule = plan(num_devices, as_layout(layout), shard_length, shard_length, left=left, right=right)
    order = np.asarray(ringjax.ring_positions(num_devices * shard_length, layout=layout, num_shards=num_devices))
    shards = order.reshape(num_devices, shard_length)

    def share(rank: int, block: int) -> float:
        distance = shards[block][None, :] - shards[rank][:, None]
        attends = np.ones(distance.shape, bool)
        if left is not None:
            attends &= distance >= -left
        if right is not None:
            attends &= distance <= right
        return float(attends.mean())

    return [[Hop(block, share(rank, block)) for block in schedule.holds(rank)] for rank in range(num_devices)]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Largest difference from dense attention, relative to dense's largest entry."""

    name: str
    output: float
    gradients: tuple[float, float, float]  # query, key, value


def _arrays(length: int, seed: int = 0) -> list[np.ndarray]:
    """Query, key, value and cotangent, float32 standard normal."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [rng.standard_normal((1, length, n, HEAD_SIZE), np.float32) for n in heads]


def _with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The output of `attend(q, k, v)` and its gradients for the cotangent `g`."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    return run


def _ring(mesh: Mesh, layout: str, options: dict[str, Any]) -> Callable[..., jax.Array]:
    return lambda q, k, v: ringjax.ring_attention(q, k, v, axis_name="sp", mesh=mesh, layout=layout, **options)


@functools.cache
def _dense(**options: Any) -> Callable[..., Any]:
    return jax.jit(_with_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)))


def _relative(want: Any, got: Any) -> float:
    return float(np.abs(np.asarray(want) - np.asarray(got)).max() / np.abs(np.asarray(want)).max())


def agreement(mesh: Mesh, length: int, name: str, layout: str, **options: Any) -> Agreement:
    """Runs the ring and `jax.nn.dot_product_attention` with the same options on the same numbers.

    Args:
      mesh: one axis, "sp".
      length: a multiple of 2C, so that it fits every layout.
      name: for the table.
      layout: the ring's layout. Dense attention sees the sequence in its natural order.
      options: arguments that both functions know (`is_causal`, `local_window_size`).
    """
    arrays = _arrays(length)
    order = np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=mesh.size))
    want = jax.device_get(_dense(**options)(*arrays))
    sharding = NamedSharding(mesh, P(None, "sp"))
    ring_arrays = [jax.device_put(x[:, order], sharding) for x in arrays]
    got = jax.device_get(jax.jit(_with_gradients(_ring(mesh, layout, options)))(*ring_arrays))
    want, got = jax.tree.leaves(want), jax.tree.leaves(got)
    output, *gradients = (_relative(w[:, order], g) for w, g in zip(want, got, strict=True))
    return Agreement(name, output, (gradients[0], gradients[1], gradients[2]))


def _shapes(length: int, sharding: Any) -> list[jax.ShapeDtypeStruct]:
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jax.ShapeDtypeStruct((1, length, n, HEAD_SIZE), jnp.float32, sharding=sharding) for n in heads]


def _bytes(compiled: Any) -> int:
    """What the compiled program needs on one device: arguments, results and everything in between."""
    analysis = compiled.memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return held + analysis.temp_size_in_bytes


def ring_memory(devices: Sequence[Any], length: int, layout: str = "zigzag") -> int:
    """Bytes a device of causal ring attention with its gradients, from the compiled program; nothing is run."""
    mesh = Mesh(np.asarray(devices), ("sp",))
    run = jax.jit(_with_gradients(_ring(mesh, layout, {"is_causal": True})))
    return _bytes(run.lower(*_shapes(length, NamedSharding(mesh, P(None, "sp")))).compile())


def dense_memory(device: Any, length: int) -> int:
    """The same for dense attention on one device, but for a token.

    XLA on CPUs, as of JAX 0.12, divides by zero where T x S is a large power of two.
    """
    run: Any = _dense(is_causal=True)
    return _bytes(run.lower(*_shapes(length - 1, jax.sharding.SingleDeviceSharding(device))).compile())


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in one pass."""

    permutes: int
    bytes: int


def traffic(mesh: Mesh, length: int, layout: str, *, gradients: bool, **options: Any) -> Traffic:
    """Counts the `ppermute`s of the traced program and the bytes that each moves, loops included."""
    attend = _ring(mesh, layout, options)
    run = _with_gradients(attend) if gradients else lambda q, k, v, g: attend(q, k, v)
    sent = list(_permutes(jax.make_jaxpr(run)(*_shapes(length, None)).jaxpr))
    return Traffic(sum(times for times, _ in sent), sum(times * size for times, size in sent))


def _permutes(jaxpr: Any) -> Iterator[tuple[int, int]]:
    """(how often, bytes) of every ppermute in a jaxpr. Inside shard_map shapes are those of one device."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            yield 1, sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # A ClosedJaxpr holds a Jaxpr.
                if hasattr(inner, "eqns"):
                    yield from ((repeats * times, size) for times, size in _permutes(inner))


def _table(console: Console, title: str, *columns: str) -> Table:
    """An empty table; its title, which may be wider than it, is printed at once."""
    console.print(f"\n[bold]{title}[/bold]")
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show_hops(console: Console, num_devices: int) -> None:
    """Three tables of hops: causal contiguous, causal zigzag and a sliding window."""
    console.rule("Who holds which block")
    console.print(
        "K/V blocks travel, queries stay. A cell is the block that a rank works on at that hop: [green]■[/green] every "
        "pair attends, [yellow]◧[/yellow] some do, [dim]·[/dim] none do, and its tiles are skipped.\n"
    )
    length = 16
    cases: list[tuple[str, str, int | None]] = [
        ("causal, contiguous: later ranks work more", "contiguous", None),
        ("causal, zigzag: every rank works the same", "zigzag", None),
        ("causal, window of one shard, contiguous: hops that nobody needs are not made", "contiguous", length),
    ]
    for title, layout, left in cases:
        rows = hop_table(num_devices, length, layout=layout, left=left, right=0)
        total = sum(hop.share for row in rows for hop in row)
        table = _table(console, title, "rank", *(f"hop {t}" for t in range(len(rows[0]))), "work")
        for rank, row in enumerate(rows):
            work = sum(hop.share for hop in row) / total
            table.add_row(str(rank), *(_cell(hop) for hop in row), f"{work:.0%}")
        console.print(table)


def _cell(hop: Hop) -> str:
    if hop.share == 0:
        return f"[dim]{hop.block} ·[/dim]"
    return f"{hop.block} [green]■[/green]" if hop.share == 1 else f"{hop.block} [yellow]◧[/yellow]"


def show_agreement(console: Console, mesh: Mesh, length: int) -> None:
    """Outputs and gradients against dense attention."""
    console.rule("The same numbers as dense attention")
    cases: list[tuple[str, str, dict[str, Any]]] = [("full, contiguous", "contiguous", {})]
    cases += [(f"causal, {layout}", layout, {"is_causal": True}) for layout in LAYOUTS]
    window = {"is_causal": True, "local_window_size": (length // 8, 0)}
    cases += [(f"window {length // 8}, contiguous", "contiguous", window)]
    title = f"largest difference / largest entry; length {length}, {HEADS} heads on {KV_HEADS} K/V heads, float32"
    table = _table(console, title, "case", "output", "d query", "d key", "d value")
    for name, layout, options in cases:
        row = agreement(mesh, length, name, layout, **options)
        table.add_row(row.name, *(f"{x:.1e}" for x in (row.output, *row.gradients)))
    console.print(table)


def show_memory(console: Console, devices: Sequence[Any], length: int) -> None:
    """Memory per device as the sequence doubles, and as the number of devices doubles."""
    console.rule("Memory per device, from the compiled program (forward and backward, causal)")
    count = len(devices)
    table = _table(
        console, f"the sequence doubles, {count} devices", "length", "ring", "growth", "dense, one device", "growth"
    )
    before: tuple[int, int] | None = None
    lengths = [length * 2**power for power in range(3)]
    ring = {tokens: ring_memory(devices, tokens) for tokens in lengths}
    for tokens in lengths:
        now = ring[tokens], dense_memory(devices[0], tokens)
        growth = ("", "") if before is None else tuple(f"x {a / b:.2f}" for a, b in zip(now, before, strict=True))
        table.add_row(str(tokens), units.size(now[0]), growth[0], units.size(now[1]), growth[1])
        before = now
    console.print(table)
    table = _table(console, f"the devices double, length {lengths[-1]}", "devices", "ring", "growth")
    last = None
    for power in range(count.bit_length()):
        size = ring[lengths[-1]] if 2**power == count else ring_memory(devices[: 2**power], lengths[-1])
        table.add_row(str(2**power), units.size(size), "" if last is None else f"x {size / last:.2f}")
        last = size
    console.print(table)


def show_traffic(console: Console, mesh: Mesh, length: int) -> None:
    """What one device sends."""
    count = mesh.size
    console.rule("What one device sends")
    block = 2 * (length // count) * KV_HEADS * HEAD_SIZE * 4
    console.print(
        f"A block is the K and V of {length // count} tokens, {KV_HEADS} heads x {HEAD_SIZE}, float32: "
        f"{units.size(block)}. Nothing else travels: no positions, none of the {HEADS} query heads. "
        "Backward: dK and dV too."
    )
    table = _table(console, f"counted in the traced program, length {length}", "case", "permutes", "bytes", "blocks")
    window = {"is_causal": True, "local_window_size": (length // count, 0)}
    cases: list[tuple[str, bool, dict[str, Any]]] = [
        ("causal, forward", False, {"is_causal": True}),
        ("causal, forward and backward", True, {"is_causal": True}),
        (f"window {length // count}, forward", False, window),
        (f"window {length // count}, forward and backward", True, window),
    ]
    for name, gradients, options in cases:
        sent = traffic(mesh, length, "contiguous", gradients=gradients, **options)
        table.add_row(name, str(sent.permutes), units.size(sent.bytes), f"{sent.bytes / block:.2f}")
    console.print(table)


def show(*, num_devices: int, length: int) -> None:
    """`ringjax demo`: prints every part.

    Args:
      num_devices: simulated devices on the ring.
      length: tokens of the sequence.

    Raises:
      UsageError: for sizes that do not fit.
    """
    check_at_least_one(devices=num_devices)
    if length < 1 or length % (2 * num_devices):
        raise UsageError(
            f"--seq-len must be a multiple of {2 * num_devices} (2 x devices, the zigzag layout's unit). Got {length}."
        )
    devices = simulate_cpu_devices(num_devices)
    mesh = Mesh(np.asarray(devices), ("sp",))
    console = Console()
    show_hops(console, num_devices)
    show_agreement(console, mesh, length)
    show_memory(console, devices, 8 * length)  # long enough for a shard to outweigh a kernel's tiles
    show_traffic(console, mesh, length)
