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

from ringjax.kernels.base import KernelParams
from ringjax.kernels.mosaic import common as mosaic_common
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.kernels.mosaic.forward_compute import Compute
from ringjax.mask import Mask

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="JAX's interpreter for GPUs finds races from 0.11 on"
)
BF16 = jnp.dtype(jnp.bfloat16)
RACE = "RACE DETECTED"  # as JAX prints it; what it keeps of races is of the last block alone


@dataclasses.dataclass(frozen=True)
class Case:
    q_length: int = 256
    blocks: int = 2  # of keys, each a hop
    block_length: int = 128
    size: int = 64
    v_size: int = 64
    causal: bool = False
    segments: bool = False
    sinks: bool = False
    soft_cap: float | None = None
    bad_value: int | None = None  # index of a key whose value is NaN


CASES = {
    "one block": Case(blocks=1),
    # 192 queries a tile: of a last one with fewer, warpgroups without queries read what others write, and drop it.
    "a hop between": Case(q_length=384, blocks=3),
    "causal": Case(causal=True),
    "rows with nothing to visit on the last hop": Case(q_length=512, blocks=4, causal=True, size=128, v_size=128),
    "packed, sinks, cap": Case(causal=True, segments=True, sinks=True, soft_cap=2.0),
    "slots used again": Case(blocks=1, block_length=1024, causal=True),
    "ragged": Case(q_length=200, block_length=136, causal=True),
    "values of another size": Case(v_size=128, causal=True),
    "carry through registers": Case(size=256, v_size=256, causal=True, blocks=3, q_length=128, block_length=64),
    "a NaN that some attend": Case(causal=True, bad_value=100),
}


def run(case: Case, q: Any, k: Any, v: Any, segments: Any, sinks: Any) -> Any:
    """The hops of one rank, keys in the order of the sequence."""
    params = KernelParams(case.size**-0.5, case.soft_cap, device_kind="NVIDIA H100", interpret=True)
    carry: Any = None
    for hop in range(case.blocks):
        at = slice(hop * case.block_length, (hop + 1) * case.block_length)
        k_length = case.blocks * case.block_length
        q_at, kv_at = (jnp.arange(n, dtype=jnp.int32)[None] for n in (case.q_length, k_length))
        mask = Mask(
            *((q_at, kv_at[:, at]) if case.causal else (None, None)),
            *((segments[0], segments[1][:, at]) if case.segments else (None, None)),
            right=0 if case.causal else None,
        )
        last = hop == case.blocks - 1
        carry = mosaic.forward(
            q, k[:, :, at], v[:, :, at], mask, params, carry=carry, finish=last, sinks=sinks if last else None
        )
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
    if case.bad_value is not None:
        v[0, case.bad_value, 0, 3] = np.nan
    return q, k, v, rng.standard_normal(2).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle_without_races(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    monkeypatch.setattr(mosaic_common, "MULTIPROCESSORS", 2)
    q, k, v, sinks = draw(case)
    segments = tuple(np.sort(np.arange(n) * 3 // n)[None].astype(np.int32) for n in (q.shape[1], k.shape[1]))
    options: dict[str, Any] = {"is_causal": case.causal, "logits_soft_cap": case.soft_cap}
    if case.segments:
        options["segment_ids"] = segments
    wide = [np.nan_to_num(x.astype(np.float64)) for x in (q, k, v)]
    want, want_lse = oracle.forward(*wide, sinks=sinks.astype(np.float64) if case.sinks else None, **options)

    head_major = [jnp.swapaxes(jnp.asarray(x), 1, 2) for x in (q, k, v)]
    with interpreted():
        program = jax.jit(lambda *x: run(case, *x, segments, jnp.asarray(sinks) if case.sinks else None))
        out, lse = jax.block_until_ready(program(*head_major))
    assert RACE not in capfd.readouterr().out
    got = np.asarray(jnp.swapaxes(out, 1, 2)).astype(np.float64)
    np.testing.assert_allclose(np.asarray(jnp.swapaxes(lse, 1, 2)), want_lse, atol=1e-5)
    if case.bad_value is not None:
        sees = np.arange(case.q_length) >= case.bad_value
        assert np.isnan(got[0, sees][..., 3]).all(), "NaN where it is attended"
        assert np.isfinite(got[0, ~sees]).all(), "and nowhere else"
        got[0, sees] = want[0, sees]
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7)  # weights, and the output, rounded to bfloat16


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Keys of the other slot, which nobody waited for."""
    products = Compute.products
    monkeypatch.setattr(Compute, "products", lambda self, slot: products(self, 1 - slot))
    case = Case(blocks=1, block_length=512)
    head_major = [jnp.swapaxes(jnp.asarray(x), 1, 2) for x in draw(case)[:3]]
    said = ""
    try:
        with interpreted():
            jax.block_until_ready(jax.jit(lambda *x: run(case, *x, None, None))(*head_major))
    except Exception as error:  # JAX 0.12 ends at the first race, 0.11 prints it and goes on
        said = str(error)
        importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks").reset_gpu_interpret_mode_state()
    assert RACE in said + capfd.readouterr().out
