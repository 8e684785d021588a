"""`ringjax bench tpu-static`: the compiler's cycle estimates of the block kernels, beside those of JAX's kernels.

No TPU takes part. Every program is compiled for one TPU core, forward or backward alone, and the estimates of all its
operations are added up, see :mod:`ringjax.bench.static_cycles` and :mod:`ringjax.bench.tpu_programs`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..inspect.compile import InspectError
from ..planner.chips import TPUS
from ..usage import UsageError
from . import document
from .static_cycles import Estimate, Recipe, estimate

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
HEAD_SIZES = (128, 64)
PASSES = ("forward", "backward")
LENGTH = 4096
BEGIN, END = "<!-- ringjax bench tpu-static: begin -->", "<!-- ringjax bench tpu-static: end -->"
_PRODUCTS = {"forward": 2, "backward": 5}
_LANES = 128  # a matrix unit is filled by head sizes that are multiples of it
# What a core's VMEM may hold beside the 16 (v5e) or 32 MiB that XLA gives a kernel that does not ask for more.
_RAISED = {"xla_tpu_scoped_vmem_limit_kib": str(96 * 1024)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. ``implementation`` is a column of the table; the best of its cases goes there."""

    generation: str
    head_size: int
    direction: str
    implementation: str
    tiles: str
    recipe: Recipe = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """Cycles of the best case of each implementation; None where it could not be compiled or estimated."""

    generation: str
    head_size: int
    direction: str
    floor: int  # of the matrix units: the products alone
    cycles: dict[str, int | None]
    tiles: dict[str, str]

    @property
    def ratio(self) -> float | None:
        """ringjax to splash with the compiler's own VMEM limit."""
        ours, splash = self.cycles["ringjax"], self.cycles["splash"]
        return None if ours is None or splash is None else ours / splash


IMPLEMENTATIONS: tuple[str, ...] = ("ringjax", "ringjax, carry", "splash", "splash, raised limit", "flash")


def products(head_size: int, direction: str, length: int) -> int:
    """Multiply-adds for the products alone: 2 forward, 5 backward, each length x length x head size."""
    filled = -(-head_size // _LANES) * _LANES
    return _PRODUCTS[direction] * length * length * filled


# Block sizes that were best in a wide search: (queries, keys, keys worked on at a time), for T = S = 4096.
_SPLASH_FORWARD = {
    "v5e": [(512, 4096, 1024), (1024, 2048, 1024), (1024, 1024, 1024)],
    "v6e": [(2048, 4096, 1024), (1024, 4096, 1024), (1024, 1024, 1024)],
}
_SPLASH_FUSED = {
    "v5e": [(512, 2048, 2048), (1024, 1024, 1024)],
    "v6e": [(1024, 4096, 256), (512, 4096, 4096), (1024, 1024, 1024)],
}
_SPLASH_TWO_KERNELS = (1024, 1024)
_SPLASH_RAISED = {"forward": [(1024, 4096, 1024)], "backward": [(4096, 1024, 1024)]}
# (queries, keys)
_FLASH_FORWARD = [(1024, 2048), (1024, 1024)]
_FLASH_BACKWARD = 512


def _splash_blocks(generation: str, direction: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """With the compiler's own VMEM limit, and with a raised one."""
    if direction == "forward":
        own = [_splash_forward(*sizes) for sizes in _SPLASH_FORWARD[generation]]
        return own, [_splash_forward(*sizes) for sizes in _SPLASH_RAISED[direction]]
    own = [_splash_fused(*sizes) for sizes in _SPLASH_FUSED[generation]]
    own.append(_splash_two_kernels(*_SPLASH_TWO_KERNELS))
    return own, [_splash_fused(*sizes) for sizes in _SPLASH_RAISED[direction]]


def _splash_forward(q: int, kv: int, compute: int) -> dict[str, Any]:
    return {"block_q": q, "block_kv": kv, "block_kv_compute": compute}


def _splash_fused(q: int, kv: int, compute: int) -> dict[str, Any]:
    backward = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": compute, "use_fused_bwd_kernel": True}
    return {"block_q": 512, "block_kv": 512, **backward}


def _splash_two_kernels(q: int, kv: int) -> dict[str, Any]:
    dkv = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": kv}
    return {"block_q": 512, "block_kv": 512, **dkv, "block_q_dq": q, "block_kv_dq": kv}


def _flash_blocks(direction: str) -> list[dict[str, Any]]:
    if direction == "forward":
        return [_flash(q, kv) for q, kv in _FLASH_FORWARD]
    return [{**_flash(512, 512), **_flash_backward(_FLASH_BACKWARD)}]


def _flash(q: int, kv: int) -> dict[str, Any]:
    return {"block_b": 1, "block_q": q, "block_k_major": kv, "block_k": min(kv, 1024)}


def _flash_backward(n: int) -> dict[str, Any]:
    names = ("q_major_dkv", "k_major_dkv", "q_dkv", "k_dkv", "q_dq", "k_major_dq", "k_dq")
    return {f"block_{name}": n for name in names}


def cases(generation: str, head_size: int, direction: str, length: int = LENGTH) -> list[Case]:
    """All programs of one row of the table. Block sizes longer than the sequence are left out."""

    def case(name: str, builder: str, tiles: str, flags: dict[str, str], **options: Any) -> Case:
        options = {"length": length, "head_size": head_size, **options}
        builder = f"ringjax.bench.tpu_programs:{builder}_{direction}"
        recipe = Recipe(builder, options, TOPOLOGIES[generation], flags)
        return Case(generation, head_size, direction, name, tiles, recipe)

    def blocked(name: str, builder: str, blocks: dict[str, Any], flags: dict[str, str]) -> Case:
        ignored = {"block_b"} | (
            {"block_q", "block_kv", "block_k", "block_k_major"} if direction == "backward" else set()
        )
        sizes = [str(size) for key, size in blocks.items() if key not in ignored and not isinstance(size, bool)]
        kind = {True: "fused ", False: ""}[blocks.get("use_fused_bwd_kernel", False)]
        return case(name, builder, kind + "/".join(sizes), flags, blocks=blocks)

    own, raised = _splash_blocks(generation, direction)
    found = [case("ringjax", "ringjax", "", {}), case("ringjax, carry", "ringjax", "", {}, carry=True)]
    found += [blocked("splash", "splash", blocks, {}) for blocks in own]
    found += [blocked("splash, raised limit", "splash", blocks, _RAISED) for blocks in raised]
    found += [blocked("flash", "flash", blocks, {}) for blocks in _flash_blocks(direction)]
    return [c for c in found if _fits(c.recipe.options.get("blocks", {}), length)]


def _fits(blocks: dict[str, Any], length: int) -> bool:
    return all(
        isinstance(size, bool) or (size <= length and length % size == 0) or size == 1 for size in blocks.values()
    )


def bench_tpu_static(
    *,
    generations: Sequence[str] = tuple(TOPOLOGIES),
    head_sizes: Sequence[int] = HEAD_SIZES,
    directions: Sequence[str] = PASSES,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    length: int = LENGTH,
    timeout: float = 600.0,
    progress: Callable[[Case, Estimate], None] | None = None,
) -> list[Row]:
    """Estimates of one head of full attention in bfloat16, [1, length, 1, head_size].

    Args:
      generations: of TPU, of "v5e" and "v6e".
      head_sizes: one row each.
      directions: "forward" and/or "backward".
      implementations: columns wanted.
      length: of queries and keys.
      timeout: seconds for each program.
      progress: called after each program.

    Returns:
      One row for each generation, head size and direction.
    """
    keys = [(g, d, p) for g in generations for d in head_sizes for p in directions]
    todo = [case for key in keys for case in cases(*key, length) if case.implementation in implementations]
    report = None if progress is None else lambda index, found: progress(todo[index], found)
    found = estimate([case.recipe for case in todo], timeout=timeout, progress=report)
    rows = []
    for generation, head_size, direction in keys:
        of_row = [
            (case, result)
            for case, result in zip(todo, found, strict=True)
            if (case.generation, case.head_size, case.direction) == (generation, head_size, direction)
        ]
        rows.append(_row(generation, head_size, direction, length, of_row))
    return rows


def _row(generation: str, head_size: int, direction: str, length: int, results: Sequence[tuple[Case, Estimate]]) -> Row:
    cycles: dict[str, int | None] = dict.fromkeys(IMPLEMENTATIONS)
    tiles: dict[str, str] = dict.fromkeys(IMPLEMENTATIONS, "")
    for case, result in results:
        if result.reason is None:
            best = cycles[case.implementation]
            if best is None or result.total < best:
                cycles[case.implementation], tiles[case.implementation] = result.total, case.tiles
    floor = TPUS[generation].mxu_floor(products(head_size, direction, length))
    return Row(generation, head_size, direction, int(floor), cycles, tiles)


COLUMNS = ("TPU", "head size", "pass", "products", *IMPLEMENTATIONS, "ringjax / splash")


def _cells(row: Row) -> tuple[str, ...]:
    def cell(name: str) -> str:
        cycles = row.cycles[name]
        if cycles is None:
            return "-"
        return f"{cycles:,}" + (f" ({row.tiles[name]})" if row.tiles[name] else "")

    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    fixed = (row.generation, str(row.head_size), row.direction, f"{row.floor:,}")
    return (*fixed, *(cell(name) for name in IMPLEMENTATIONS), ratio)


def describe(length: int) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"Estimated cycles, one head of full attention, T = S = {length}, bfloat16; {versions}"


def render(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 3 else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def write_docs(rows: Sequence[Row], title: str, path: Path) -> None:
    """Replaces the table between the two markers of the file at `path`."""
    table = document.markdown(COLUMNS, [_cells(row) for row in rows], num_left=3)
    document.replace(path, BEGIN, END, [title + ".", "", *table])


def main(
    *,
    generations: Sequence[str],
    head_sizes: Sequence[int],
    directions: Sequence[str],
    length: int,
    timeout: float,
    json_file: Path | None,
    docs: Path | None,
) -> None:
    """`ringjax bench tpu-static`.

    Args:
      generations, head_sizes, directions, length, timeout: see :func:`bench_tpu_static`.
      json_file: also gets the rows.
      docs: a document whose table is replaced.

    Raises:
      UsageError: for arguments that do not fit, and where the compiler is not installed.
    """
    for flag, value in (("--seq-len", length), ("--head-dim", min(head_sizes)), ("--timeout", timeout)):
        if value <= 0:
            raise UsageError(f"{flag} must be positive. Got {value}.")
    if length % _LANES:
        raise UsageError(f"--seq-len must be a multiple of {_LANES}. Got {length}.")
    document.check_files(json_file, docs, BEGIN, END)
    console = Console()

    def progress(case: Case, found: Estimate) -> None:
        outcome = f"{found.total:,} cycles" if found.reason is None else found.reason
        name = f"{case.generation} {case.head_size} {case.direction} {case.implementation} {case.tiles}".rstrip()
        console.print(f"[dim]{name}:[/dim] {outcome}", markup=True, highlight=False)

    try:
        rows = bench_tpu_static(
            generations=generations,
            head_sizes=head_sizes,
            directions=directions,
            length=length,
            timeout=timeout,
            progress=progress,
        )
    except InspectError as error:
        raise UsageError(str(error)) from None
    title = describe(length)
    console.print(render(rows, title))
    if json_file is not None:
        document.write_json(json_file, {"title": title, "rows": [dataclasses.asdict(row) for row in rows]})
    if docs is not None:
        write_docs(rows, title, docs)
