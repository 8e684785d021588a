"""`ringjax bench cpu`: times ring attention beside dense attention, interleaved in one process."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import ringjax
from ringjax.bench import document
from ringjax.layout import as_layout
from ringjax.simulate import simulate_cpu_devices
from ringjax.usage import UsageError, check_at_least_one

LAYOUTS = ("contiguous", "zigzag", "striped")
PASSES = {"forward": "fwd", "backward": "fwd+bwd"}  # and what tables call them
BEGIN, END = "<!-- ringjax bench cpu: begin -->", "<!-- ringjax bench cpu: end -->"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The arrays of one benchmark: [batch, length, heads, head_size] for query, key and value alike."""

    batch: int = 1
    length: int = 8192
    heads: int = 4
    head_size: int = 64
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled program and the arrays it is called with."""

    implementation: str  # "dense" or "ring"
    mask: str  # "full" or "causal"
    layout: str  # "-" for dense
    direction: str  # as tables call it
    run: Callable[..., Any] = dataclasses.field(repr=False)
    arguments: tuple[jax.Array, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case took: the median over the rounds, and the median of the ratios within a round."""

    mask: str
    layout: str
    direction: str
    seconds: float
    dense_seconds: float
    ratio: float
    difference: float  # max |ring - dense| / max |dense|, over all outputs of the program


def _program(attend: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """`attend(q, k, v)` alone, or its gradients for the cotangent `g`."""
    if direction == "fwd":
        return jax.jit(lambda q, k, v, g: attend(q, k, v))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v) * g)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def _inputs(shape: Shape, seed: int = 0) -> list[np.ndarray]:
    """Query, key, value and cotangent, standard normal."""
    rng = np.random.default_rng(seed)
    size = (shape.batch, shape.length, shape.heads, shape.head_size)
    return [rng.standard_normal(size, np.float32).astype(shape.dtype) for _ in range(4)]


def _dense_case(inputs: Sequence[np.ndarray], mask: str, direction: str, device: Any) -> Case:
    causal = mask == "causal"
    run = _program(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal), direction)
    return Case("dense", mask, "-", direction, run, tuple(jax.device_put(x, device) for x in inputs))


def _ring_case(
    inputs: Sequence[np.ndarray],
    mask: str,
    layout: str,
    direction: str,
    mesh: Mesh,
    config: ringjax.RingConfig,
) -> Case:
    order = _ring_order(inputs[0].shape[1], layout, mesh.size)
    sharding = NamedSharding(mesh, P(None, "sp", None, None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ringjax.ring_attention(
            q, k, v, mesh=mesh, axis_name="sp", is_causal=mask == "causal", layout=layout, config=config
        )

    arguments = tuple(jax.device_put(x[:, order], sharding) for x in inputs)
    return Case("ring", mask, layout, direction, _program(attend, direction), arguments)


def _ring_order(length: int, layout: str, num_shards: int) -> np.ndarray:
    return np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))


def _seconds(case: Case) -> float:
    """Time of one call that follows an untimed one: no program pays for the memory that another has just freed."""
    jax.block_until_ready(case.run(*case.arguments))
    start = time.perf_counter()
    jax.block_until_ready(case.run(*case.arguments))
    return time.perf_counter() - start


def _difference(dense: Any, ring: Any, order: np.ndarray) -> float:
    """Largest |ring - dense| relative to the largest |dense|, after undoing the ring order."""
    worst = 0.0
    for expected, got in zip(jax.tree.leaves(dense), jax.tree.leaves(ring), strict=True):
        want = np.asarray(expected, np.float32)[:, order]
        worst = max(worst, float(np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()))
    return worst


def bench_cpu(
    *,
    shape: Shape = Shape(),  # noqa: B008  frozen
    num_devices: int = 8,
    layouts: Sequence[str] = LAYOUTS,
    masks: Sequence[str] = ("full", "causal"),
    passes: Sequence[str] = tuple(PASSES),
    rounds: int = 5,
    config: ringjax.RingConfig | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Times ring attention over simulated devices against dense attention on the same cores.

    Both run in this process. Dense is `jax.nn.dot_product_attention` compiled for one device, whose operations XLA
    spreads over all cores. Every round times every program once, so that drift and neighbours hit both alike.

    Args:
      shape: the arrays.
      num_devices: devices on the ring.
      layouts: ring layouts timed with the causal mask; full attention is timed in the first of them only.
      masks: "full" and/or "causal".
      passes: "forward" and/or "backward", which is forward and all gradients in one program.
      rounds: how many times each program is timed, after one call that compiles and warms up.
      config: tuning of the ring; the default is `RingConfig()`.
      progress: called with a line of text now and then.

    Returns:
      One row for each ring program.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1. Got {rounds}.")
    config = ringjax.RingConfig() if config is None else config
    devices = simulate_cpu_devices(num_devices)
    mesh = Mesh(np.asarray(devices), ("sp",))
    inputs = _inputs(shape)
    groups = []
    for direction in (PASSES[name] for name in passes):
        for mask in masks:
            dense = _dense_case(inputs, mask, direction, devices[0])
            used = layouts if mask == "causal" else layouts[:1]
            groups.append((dense, [_ring_case(inputs, mask, name, direction, mesh, config) for name in used]))
    differences = []
    for dense, rings in groups:  # Compiles, warms up and checks.
        progress(f"compiling {dense.mask} {dense.direction}")
        expected = jax.device_get(dense.run(*dense.arguments))
        for ring in rings:
            order = _ring_order(shape.length, ring.layout, num_devices)
            differences.append(_difference(expected, jax.device_get(ring.run(*ring.arguments)), order))
    times: list[list[tuple[float, list[float]]]] = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        times.append([(_seconds(dense), [_seconds(ring) for ring in rings]) for dense, rings in groups])
    return _rows(groups, times, differences)


def _rows(
    groups: list[tuple[Case, list[Case]]],
    times: list[list[tuple[float, list[float]]]],
    differences: list[float],
) -> list[Row]:
    remaining = iter(differences)
    rows = []
    for g, (_, rings) in enumerate(groups):
        dense_times = [round_[g][0] for round_ in times]
        for r, ring in enumerate(rings):
            ring_times = [round_[g][1][r] for round_ in times]
            rows.append(
                Row(
                    mask=ring.mask,
                    layout=ring.layout,
                    direction=ring.direction,
                    seconds=statistics.median(ring_times),
                    dense_seconds=statistics.median(dense_times),
                    ratio=statistics.median(a / b for a, b in zip(ring_times, dense_times, strict=True)),
                    difference=next(remaining),
                )
            )
    return rows


def processor() -> str:
    """The processor's name, as far as the operating system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(shape: Shape, num_devices: int, rounds: int) -> str:
    """One line that says what is about to be measured, where, and how busy the machine is with other things."""
    busy = f", load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return (
        f"B {shape.batch}, S {shape.length}, {shape.heads} heads x {shape.head_size}, {shape.dtype}; ring over "
        f"{num_devices} simulated devices against jax.nn.dot_product_attention on the same cores; median of {rounds} "
        f"interleaved rounds; JAX {jax.__version__}, Python {platform.python_version()}, {processor()}{busy}. "
        "Ratios move with the processor: compare those of one machine only"
    )


COLUMNS = ("pass", "mask", "layout", "ring s", "dense s", "ring/dense", "difference")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.direction,
        row.mask,
        row.layout,
        f"{row.seconds:.3f}",
        f"{row.dense_seconds:.3f}",
        f"{row.ratio:.3f}",
        f"{row.difference:.1e}",
    )


def render(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:3] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def write_docs(rows: Sequence[Row], title: str, path: Path) -> None:
    """Replaces the table between the two markers of the file at `path`."""
    table = document.markdown(COLUMNS, [_cells(row) for row in rows], num_left=3)
    document.replace(path, BEGIN, END, [title + ".", "", *table])


def main(
    *,
    shape: Shape,
    num_devices: int,
    rounds: int,
    layouts: Sequence[str],
    masks: Sequence[str],
    passes: Sequence[str],
    block_q: int | None,
    block_kv: int | None,
    json_file: Path | None,
    docs: Path | None,
) -> None:
    """`ringjax bench cpu`.

    Args:
      shape, num_devices, rounds, layouts, masks, passes: see :func:`bench_cpu`.
      block_q, block_kv: see :class:`ringjax.RingConfig`.
      json_file: also gets the rows.
      docs: a document whose table is replaced.

    Raises:
      UsageError: for arguments that do not fit.
    """
    check_at_least_one(seq_len=shape.length, heads=shape.heads, head_dim=shape.head_size)
    check_at_least_one(devices=num_devices, rounds=rounds, block_q=block_q, block_kv=block_kv)
    for layout in layouts if "causal" in masks else layouts[:1]:
        unit = as_layout(layout).unit(num_devices)
        if shape.length % unit:
            raise UsageError(
                f"--seq-len must be a multiple of {unit} for --layout {layout} on {num_devices} devices. "
                f"Got {shape.length}."
            )
    document.check_files(json_file, docs, BEGIN, END)
    console = Console()
    title = describe(shape, num_devices, rounds)
    rows = bench_cpu(
        shape=shape,
        num_devices=num_devices,
        layouts=layouts,
        masks=masks,
        passes=passes,
        rounds=rounds,
        config=ringjax.RingConfig(block_q=block_q, block_kv=block_kv),
        progress=lambda text: console.print(f"[dim]{text}[/dim]"),
    )
    console.print(render(rows, title))
    if json_file is not None:
        document.write_json(json_file, {"title": title, "rows": [dataclasses.asdict(row) for row in rows]})
    if docs is not None:
        write_docs(rows, title, docs)
