"""The list of steps that a TPU grid walks: from ranges by arithmetic, from kinds by a sort, both the same list."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from ringjax.kernels.tpu import steps as tpu_steps
from ringjax.kernels.tpu.steps import FLUSH, Step
from ringjax.kernels.tpu.tiles import TileSizes
from ringjax.kernels.visits import EMPTY, FULL, PARTIAL, Visits
from ringjax.layout import Runs
from ringjax.mask import Mask, Tokens

BATCH, ROWS, COLUMNS = 3, 6, 7


def random_ranges(seed: int) -> Visits:
    """Rows of no tile, of FULL ones alone, of PARTIAL ones alone and of both."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, ROWS)
    start, stop = np.sort(rng.integers(0, COLUMNS + 1, (2, *shape)), axis=0)
    full_start = rng.integers(start, stop + 1)
    full = rng.integers(0, stop - full_start + 1)
    return Visits(
        *(jnp.asarray(x, jnp.int32) for x in (full, stop - start)), None, *map(jnp.int32, (start, full_start))
    )


def kinds_of(visits: Visits, flush: bool) -> np.ndarray:
    """FULL, PARTIAL or EMPTY of every tile, and a last row of FLUSH."""
    ranges = (visits.full, visits.visit, visits.start, visits.full_start)
    full, visit, start, full_start = (np.asarray(x)[:, :, None] for x in ranges)
    at = np.arange(COLUMNS)
    kinds = np.where((at >= start) & (at < start + visit), PARTIAL, EMPTY)
    kinds = np.where((at >= full_start) & (at < full_start + full), FULL, kinds)
    last = np.full((BATCH, 1, COLUMNS), FLUSH)
    return np.concatenate([kinds, last], axis=1) if flush else kinds


# As a program each: operation by operation takes ten times as long to compile.
list_ranges = jax.jit(tpu_steps.list_ranges, static_argnums=(1, 2), static_argnames="flush")
list_kinds = jax.jit(tpu_steps.list_kinds)
unpack = jax.jit(tpu_steps.unpack, static_argnums=1)


def expected_steps(kinds: np.ndarray) -> list[Step]:
    """One batch row of one chunk."""
    steps = []
    for row, of_row in enumerate(kinds):
        columns = [column for column, kind in enumerate(of_row) if kind != EMPTY] or [0]
        for column in columns:
            steps.append(Step(row, column, of_row[column], column == columns[0], column == columns[-1]))
    return steps


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("width", [COLUMNS, 4, 3, 1])
@pytest.mark.parametrize("seed", range(5))
def test_a_list_holds_every_tile_of_its_chunk(seed: int, width: int, flush: bool) -> None:
    visits = random_ranges(seed)
    chunks = -(-COLUMNS // width)
    kinds = np.pad(kinds_of(visits, flush), ((0, 0), (0, 0), (0, chunks * width - COLUMNS)), constant_values=EMPTY)
    kinds = np.moveaxis(kinds.reshape(BATCH, -1, chunks, width), 2, 0)
    steps, counts = list_ranges(visits, width, chunks, flush=COLUMNS if flush else 0)
    by_kinds = list_kinds(jnp.asarray(kinds, jnp.int32))
    np.testing.assert_array_equal(steps, by_kinds[0])
    np.testing.assert_array_equal(counts, by_kinds[1])
    fields = [np.asarray(x) for x in unpack(steps, width)]
    for chunk, b in np.ndindex(chunks, BATCH):
        want = expected_steps(kinds[chunk, b])
        assert counts[chunk, b] == len(want)
        got = [Step(*(x[chunk, b, s] for x in fields)) for s in range(steps.shape[2])]
        assert got[: len(want)] == want
        # Beyond the end nothing is loaded, worked on or written.
        assert all(s == want[-1]._replace(kind=EMPTY, first=False, last=False) for s in got[len(want) :])


def test_masks_of_a_layout_need_no_sort_and_no_vectors() -> None:
    def plan(base: Any, rows: str) -> Any:
        runs = Runs(base=base, step=1024, run=256, length=512)
        side = Tokens(positions=runs, length=jnp.array([500, 300]))
        mask = Mask(queries=side, keys=side, left=700, right=0)
        tiles = TileSizes(block_q=64, block_kv=64, sub_q=64, sub_kv=64, vmem_bytes=0)
        found = tpu_steps.plan_steps(mask, 512, 512, tiles, rows=rows)
        return found.lists, found.num_steps

    for rows in ("queries", "keys"):
        traced = jax.make_jaxpr(functools.partial(plan, rows=rows))(jnp.int32(0))
        used = {str(equation.primitive) for equation, _ in jaxprs.equations(traced)}
        assert "cumsum" in used and not used & {"sort", "gather", "scatter", "dynamic_slice"}
