"""The forward kernel for Hopper GPUs in JAX's interpreter for them, which follows TMA and barriers and finds races.

Products are ordinary ones there, and warpgroups do not take turns: what is tested is everything else. Few blocks of
threads have many rows of tiles each, as on a GPU, so that what one row leaves behind meets the next.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.kernels.mosaic import tiles as mosaic_tiles
from ringjax.kernels.mosaic.forward_compute import Compute
from ringjax.layout import Runs, as_layout
from ringjax.mask import Mask, Tokens

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="JAX's interpreter for GPUs finds races from 0.11 on"
)
BF16 = jnp.dtype(jnp.bfloat16)
RACE = "RACE DETECTED"  # as JAX prints it; what it keeps of races is of the last block alone


@dataclasses.dataclass(frozen=True)
class Case:
    q_length: int = 256
    q_start: int = 0  # position of the first query
    blocks: int = 2  # of keys, each a hop
    block_length: int = 128
    size: int = 64
    v_size: int = 64
    causal: bool = False
    window: int | None = None  # how far back a query attends, if causal
    layout: str = "contiguous"  # of the keys: the queries have the whole sequence
    as_arrays: bool = False  # positions that the user gives
    segments: bool = False
    q_present: int | None = None  # the first so many queries and keys of the sequence. None: all
    k_present: int | None = None
    sinks: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    bad_value: int | None = None  # position of a key whose value is NaN
    bad_key: int | None = None  # position of a key that is NaN itself
    growth: float | None = None  # of the keys, from nothing to so many times their size


CASES = {
    # 192 queries a tile: of a last one with fewer, warpgroups without queries read what others write, and drop it.
    "a hop between": Case(q_length=384, blocks=3, block_length=256, growth=25.0),
    "striped window": Case(causal=True, layout="striped", window=90, scale=-0.2),
    "positions as arrays": Case(causal=True, window=70, as_arrays=True),
    "zigzag and lengths": Case(causal=True, layout="zigzag", q_present=150, k_present=140, soft_cap=2.0),
    "rows with nothing to visit on the last hop": Case(q_length=384, blocks=3, causal=True, size=128, v_size=128),
    "packed, sinks, cap": Case(causal=True, segments=True, sinks=True, soft_cap=2.0),
    # The maximum of the first tile is far from that of the others: what was guessed is taken back.
    "slots used again, logits that grow": Case(blocks=1, block_length=1024, growth=25.0),
    "ragged, values of another size": Case(q_length=200, block_length=136, causal=True, v_size=128),
    "carry through registers": Case(size=256, v_size=256, causal=True, blocks=3, q_length=128, block_length=64),
    "a NaN that some attend to": Case(causal=True, bad_value=100),
    "NaN that absent queries alone attend to": Case(
        causal=True, layout="zigzag", bad_value=160, bad_key=160, q_present=150
    ),
    "lengths and an absent NaN": Case(bad_value=180, bad_key=180, q_present=150, k_present=170),
    "a NaN among the logits": Case(causal=True, layout="striped", bad_key=99),
    # Few queries: heads are rows, keys are split.
    "one query, ragged": Case(q_length=1, blocks=1, block_length=600, k_present=500, sinks=True, size=128, v_size=128),
    "few queries": Case(q_length=5, q_start=595, blocks=1, block_length=600, causal=True, soft_cap=2.0, window=300),
    "few queries, as arrays": Case(q_length=5, q_start=400, blocks=1, block_length=600, causal=True, as_arrays=True),
    "few queries, packed": Case(
        q_length=7, q_start=500, blocks=1, block_length=600, causal=True, segments=True, q_present=4, sinks=True
    ),
    "few queries, long heads": Case(
        q_length=3, q_start=300, blocks=1, block_length=320, causal=True, size=256, v_size=256
    ),
    "nothing is there": Case(q_length=2, blocks=1, block_length=600, k_present=0),
    "few queries and a NaN": Case(q_length=9, q_start=92, blocks=1, block_length=600, causal=True, bad_value=96),
    "few queries and an absent NaN": Case(
        q_length=4, blocks=1, block_length=600, k_present=300, bad_value=310, bad_key=310
    ),
}


def tokens(case: Case, runs: Runs, segments: Any, present: int | None) -> Tokens:
    """One side of the mask of a block."""
    index = jnp.arange(runs.length, dtype=jnp.int32)
    return Tokens(
        positions=None if not case.causal else runs.at(index)[None] if case.as_arrays else runs,
        segments=segments[:, runs.at(index)] if case.segments else None,
        length=None if present is None else runs.count_below(jnp.array([present], jnp.int32)),
    )


def run(case: Case, q: Any, k: Any, v: Any, segments: Any, sinks: Any) -> Any:
    """The hops of one rank, which has all queries."""
    scale = case.size**-0.5 if case.scale is None else case.scale
    params = KernelParams(scale, case.soft_cap, device_kind="NVIDIA H100", interpret=True)
    layout, of_queries = as_layout(case.layout), as_layout("contiguous").runs(jnp.int32(0), case.q_length, 1)
    of_queries = dataclasses.replace(of_queries, base=of_queries.base + case.q_start)
    carry: Any = None
    for hop in range(case.blocks):
        runs = layout.runs(jnp.int32(hop), case.block_length, case.blocks)
        at = runs.at(jnp.arange(case.block_length, dtype=jnp.int32))
        mask = Mask(
            queries=tokens(
                case, of_queries, segments and segments[0], case.q_present and case.q_start + case.q_present
            ),
            keys=tokens(case, runs, segments and segments[1], case.k_present),
            left=case.window,
            right=0 if case.causal else None,
        )
        block = Block(q=q, k=k[:, :, at], v=v[:, :, at], mask=mask, sinks=sinks)
        carry = mosaic.forward(block, params, carry, finish=hop == case.blocks - 1)
    return carry


def interpreted() -> Any:
    """What is traced inside runs in the interpreter."""
    gpu: Any = plgpu
    return gpu.force_gpu_interpret_mode(gpu.InterpretGPUParams(detect_races=True))


def draw(case: Case) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    k_length = case.blocks * case.block_length
    q, k, v = (
        rng.standard_normal((1, length, heads, size)).astype(BF16)
        for length, heads, size in (
            (case.q_length, 2, case.size),
            (k_length, 1, case.size),
            (k_length, 1, case.v_size),
        )
    )
    if case.growth is not None:
        k = (k * np.linspace(0.0, case.growth, k_length)[:, None, None]).astype(BF16)
    if case.bad_value is not None:
        v[0, case.bad_value, 0, 3] = np.nan
    if case.bad_key is not None:
        k[0, case.bad_key, 0, 3] = np.nan
    return q, k, v, rng.standard_normal(2).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle_without_races(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    monkeypatch.setattr(mosaic_tiles, "MULTIPROCESSORS", 2)
    q, k, v, sinks = draw(case)
    segments = tuple(jnp.arange(n, dtype=jnp.int32)[None] * 3 // n for n in (case.q_start + q.shape[1], k.shape[1]))
    options: dict[str, Any] = {"is_causal": case.causal, "logits_soft_cap": case.soft_cap, "scale": case.scale}
    if case.window is not None:
        options["local_window_size"] = (case.window, 0)
    if case.segments:
        options["segment_ids"] = tuple(np.asarray(x)[:, -n:] for x, n in zip(segments, (q.shape[1], 0), strict=True))
    if case.q_start:
        options["positions"] = tuple(
            first + np.arange(n)[None] for first, n in ((case.q_start, q.shape[1]), (0, k.shape[1]))
        )
    for name, present in (("query_seq_lengths", case.q_present), ("key_value_seq_lengths", case.k_present)):
        if present is not None:
            options[name] = np.array([present])
    wide = [np.nan_to_num(x.astype(np.float64)) for x in (q, k, v)]
    want, want_lse = oracle.forward(*wide, sinks=sinks.astype(np.float64) if case.sinks else None, **options)

    head_major = [jnp.swapaxes(jnp.asarray(x), 1, 2) for x in (q, k, v)]
    with interpreted():
        program = jax.jit(lambda *x: run(case, *x, segments, jnp.asarray(sinks) if case.sinks else None))
        out, lse = jax.block_until_ready(program(*head_major))[:2]
    assert RACE not in capfd.readouterr().out
    got = np.asarray(jnp.swapaxes(out, 1, 2)).astype(np.float64)
    got_lse = np.array(jnp.swapaxes(lse, 1, 2))
    for bad in (case.bad_value, case.bad_key):
        if bad is None:
            continue
        at = case.q_start + np.arange(case.q_length)
        present = bad < (case.k_present or k.shape[1])
        attends = (
            present & (at >= bad if case.causal else at >= 0) & (at - case.q_start < (case.q_present or case.q_length))
        )
        assert np.isnan(got[0, attends][..., 3]).all(), "NaN where it is attended to"
        assert np.isfinite(got[0, ~attends]).all(), "and nowhere else"
        if bad == case.bad_key:
            assert np.isnan(got_lse[0, attends]).all()
            got_lse[0, attends] = want_lse[0, attends]
        got[0, attends] = want[0, attends]
    np.testing.assert_allclose(got_lse, want_lse, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7)  # weights, and the output, rounded to bfloat16


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Keys of the next slot, which nobody waited for."""
    products = Compute.products

    def of_the_next(self: Compute, slot: Any, **options: Any) -> Any:
        return products(self, jax.lax.rem(slot + 1, self.static.tiles.stages), **options)

    monkeypatch.setattr(Compute, "products", of_the_next)
    case = Case(blocks=1, block_length=1024)  # twice as many tiles as slots
    head_major = [jnp.swapaxes(jnp.asarray(x), 1, 2) for x in draw(case)[:3]]
    said = ""
    try:
        with interpreted():
            jax.block_until_ready(jax.jit(lambda *x: run(case, *x, None, None))(*head_major))
    except Exception as error:  # JAX 0.12 ends at the first race, 0.11 prints it and goes on
        said = str(error)
        importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks").reset_gpu_interpret_mode_state()
    assert RACE in said + capfd.readouterr().out
