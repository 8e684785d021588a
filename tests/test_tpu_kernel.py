"""The TPU kernels beyond the conformance suite: tiles as large as a chip's, carries, races, refusals, compilation."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import compile_tpu
import hops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu import needs_libtpu

import ringjax
from ringjax.inspect.process import ENVIRONMENT
from ringjax.kernels.base import Block, Finished, KernelParams
from ringjax.kernels.tpu import backward as tpu_backward
from ringjax.kernels.tpu import forward as tpu_forward
from ringjax.kernels.tpu import tiles as tpu_tiles
from ringjax.kernels.tpu.tiles import TileSizes
from ringjax.mask import Mask

MIB = 2**20
# What the small tiles of the conformance suite do not reach: several sub-tiles and pieces of a tile, ragged last
# tiles, all 128 lanes, dq in several units of heads and of queries, the transposed product.
TILES = {
    "sub-tiles": TileSizes(256, 512, 256, 128, MIB, dq_bytes=64 * MIB),
    "pieces": TileSizes(512, 512, 128, 256, MIB, dq_bytes=64 * MIB, dq_transposed=True),
    "units of heads": TileSizes(128, 256, 128, 256, MIB, dq_bytes=5 * 128 * 64 * 4),
    "units of tiles": TileSizes(128, 128, 128, 128, MIB, dq_bytes=2 * 128 * 64 * 4, dq_transposed=True),
}


def in_two_hops(case: cases.Case, inputs: cases.Inputs, tiles: TileSizes) -> cases.Result:
    params = KernelParams(case.head_size**-0.5, case.soft_cap, interpret=True)
    return hops.in_two_hops(
        case,
        inputs,
        lambda block, carry, *, finish: tpu_forward.forward(block, params, tiles, carry, finish=finish),
        lambda block, upstream, carry: tpu_backward.backward(block, upstream, params, tiles, carry),
    )


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        *(("lists", tiles) for tiles in TILES),
        ("ranges", "sub-tiles"), ("ranges", "units of tiles"),
        ("full", "units of tiles"), ("full", "units of heads"),
        ("full, whole tiles", "sub-tiles"), ("full, whole tiles", "pieces"),
    ],
)  # fmt: skip
def test_tiles_of_a_chip(name: str, tiles: str) -> None:
    case = hops.LARGE[name]
    if not name.endswith("whole tiles"):  # these alone have more K/V heads than one: the interpreter takes its time
        case = dataclasses.replace(case, num_heads=2, num_kv_heads=1)
    inputs = cases.make_inputs(case)
    cases.assert_matches(case, inputs, in_two_hops(case, inputs, TILES[tiles]))


# What is added to the logits of the first keys and of the rest, and which key stands out.
FAR = {
    "near": (0.0, 0.0, 1.0),
    "low": (-300.0, -300.0, 1.0),
    "high": (300.0, 300.0, 1.0),
    "falling": (300.0, -300.0, 1.0),
    "rising": (-300.0, 300.0, 1.0),
    "at the edge": (-45.0, 45.0, 1.0),
    "outlier": (0.0, 0.0, 200.0),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("hops", [1, 2])
def test_logits_far_from_zero(name: str, hops: int) -> None:
    """16-bit tiles are tried with the maximum as it is; where that loses weights or overflows nobody can tell."""
    before, after, outlier = FAR[name]
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(1, 2, 256, 64)).astype(np.float32) for _ in range(3))
    q[..., 0] = 8.0  # times the scale 1/8: what a key has in its first place is added to all its logits
    k[..., :128, 0], k[..., 128:, 0] = before, after
    k[..., 7, :] *= outlier
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    tiles = TileSizes(256, 128, 256, 128, MIB)
    params = KernelParams(0.125, interpret=True)
    carry: Any = None
    for hop in range(hops):
        keys = slice(256 * hop // hops, 256 * (hop + 1) // hops)
        block = Block(q=q, k=k[:, :, keys], v=v[:, :, keys], mask=Mask())
        carry = tpu_forward.forward(block, params, tiles, carry, finish=hop == hops - 1)
    assert isinstance(carry, Finished)
    exact_q, exact_k, exact_v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    logits = exact_q @ np.swapaxes(exact_k, 2, 3) * 0.125
    p = np.exp(logits - logits.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    lse = logits.max(-1) + np.log(total[..., 0])
    np.testing.assert_allclose(np.asarray(carry.lse), lse, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.asarray(carry.out).astype(np.float64), p / total @ exact_v, rtol=2**-7, atol=2**-7)


def test_a_query_that_is_not_finite_spoils_no_other() -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(6).normal(size=(3, 1, 1, 256, 64)))
    q = q.at[0, 0, 3, 0].set(jnp.nan)
    tiles, params = TileSizes(256, 128, 256, 128, MIB), KernelParams(0.125, interpret=True)
    found = tpu_forward.forward(Block(q=q, k=k, v=v, mask=Mask()), params, tiles, None, finish=True)
    assert isinstance(found, Finished)
    spoilt = np.isnan(np.asarray(found.out).astype(np.float32)).any(-1)[0, 0]
    assert np.flatnonzero(spoilt).tolist() == [3]


def test_units_hold_all_queries_and_fit() -> None:
    for group, num_q, fitting in ((4, 7, 2), (4, 3, 9), (6, 3, 12), (1, 1, 0), (8, 5, 40)):
        units = tpu_backward._cut(group, num_q, 100, 100 * fitting)
        assert units.heads * units.num_heads == group
        assert units.tiles * units.num_chunks >= num_q > units.tiles * (units.num_chunks - 1)
        assert units.heads * units.tiles <= max(fitting, 1)


def test_tile_sizes_are_even_and_of_the_generation() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 4100, 128), jnp.bfloat16)
    for kind in tpu_tiles._TABLE:
        for direction in ("forward", "backward"):
            tiles = tpu_tiles.tile_sizes(direction, x, x, x, KernelParams(1.0, device_kind=kind))
            largest = tpu_tiles._TABLE[kind][direction]
            for size, most, sub in (
                (tiles.block_q, largest.block_q, tiles.sub_q),
                (tiles.block_kv, largest.block_kv, tiles.sub_kv),
            ):
                assert size % 128 == 0 and size <= most + 128 and size % sub == 0
                assert -(-4100 // size) * size - 4100 < size
    wide = jax.ShapeDtypeStruct((1, 4, 4096, 256), jnp.float32)
    small = tpu_tiles.tile_sizes("forward", wide, wide, wide, KernelParams(1.0, device_kind="TPU v5p"))
    assert small.block_q * 4 == 2048


# --- races ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def races():
    """Runs what is inside in the interpreter that simulates DMAs and semaphores, and says whether it saw a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its verdict has no public name

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield lambda: interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_gqa", "everything"])
def test_no_races(races: Any, name: str) -> None:
    # Whole tiles: the simulating interpreter gives aliased results with ragged ones the wrong shape (JAX 0.10 to 0.12).
    case = dataclasses.replace(
        cases.BY_NAME[name], query_length=64, key_length=64, num_heads=2, num_kv_heads=1, batch=1
    )
    if case.key_lengths is not None:
        case = dataclasses.replace(case, query_lengths=(60,), key_lengths=(37,))
    inputs = cases.make_inputs(case)
    result = cases.run_ring(
        case, inputs, layout="zigzag", num_shards=2, implementation="pallas_tpu", interpret=False, block_q=16,
        block_kv=16,
    )  # fmt: skip
    assert races() is False
    cases.assert_matches(case, inputs, result)


def test_a_missing_wait_would_be_seen(races: Any) -> None:
    def kernel(x_ref: Any, y_ref: Any, scratch: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(x_ref, scratch, arrived)
        copy.start()
        y_ref[...] = scratch[...]  # before the copy has arrived
        copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )
    try:
        jax.block_until_ready(jax.jit(run)(x))
        seen = races()
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12 stops at a race
        seen = "RACE DETECTED" in str(error)
    assert seen is True


# --- refusals ------------------------------------------------------------------------------------------------------


def test_blocks_that_no_chip_has() -> None:
    x = jnp.ones((1, 1, 256, 8))
    for name in ("block_q", "block_kv"):
        params = KernelParams(1.0, device_kind="TPU v5e", **{name: 96})
        with pytest.raises(ValueError, match=f"config.{name} must be a multiple of 128 .*'pallas_tpu'. Got 96"):
            tpu_tiles.tile_sizes("forward", x, x, x, params)


def test_more_tiles_than_scalar_memory_holds() -> None:
    x = jnp.ones((1, 4096, 1, 8))
    config = ringjax.RingConfig(implementation="pallas_tpu", interpret=True, block_q=8, block_kv=8)
    with pytest.raises(NotImplementedError, match="at most 131072 tiles.*larger block_q.*Got 262144 tiles of 8 x 8"):
        ringjax.ring_attention(x, x, x, mesh=cases.mesh_of(1), is_causal=True, config=config)


def test_the_interpreter_under_check_vma() -> None:
    config = ringjax.RingConfig(implementation="pallas_tpu", interpret=True)
    spec = jax.sharding.PartitionSpec(None, "sp")
    inside = lambda x: ringjax.ring_attention(x, x, x, config=config)  # noqa: E731
    x = jnp.ones((1, 256, 1, 8))
    for checked in (True, False):
        run = jax.shard_map(inside, mesh=cases.mesh_of(2), in_specs=spec, out_specs=spec, check_vma=checked)
        if checked:
            with pytest.raises(NotImplementedError, match="implementation: .*check_vma=False"):
                run(x)
        else:
            np.testing.assert_allclose(run(x), 1.0, rtol=1e-6)


def test_interpret_names_a_pallas_kernel() -> None:
    for name in (None, "xla"):
        with pytest.raises(ValueError, match="interpret=True needs implementation to name a Pallas kernel"):
            ringjax.RingConfig(implementation=name, interpret=True)


# --- compilation ---------------------------------------------------------------------------------------------------


# "everything" on all generations, every other program on one: see PROGRAMS in tests/compile_tpu.py.
COMPILED = {
    "v4:2x2x1": ("head size 256",),
    "v5e:2x2": ("cross, odd lengths",),
    "v5p:2x2x1": ("float32",),
    "v6e:2x2": ("float32, head size 256",),
    "tpu7x:2x2x1": ("float16",),
}

# Of a cache, see CACHED there: each on a generation of another size of VMEM or of the matrix unit.
CACHED = {
    "v4:2x2x1": "one token, heads of 256",
    "v5e:2x2": "one token",
    "v5p:2x2x1": "a few tokens",
    "v6e:2x2": "a chunk, heads of 64",
    "tpu7x:2x2x1": "a few tokens, float32",
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", COMPILED)
def test_every_feature_compiles_for_every_generation(topology: str) -> None:
    """Programs of tests/compile_tpu.py; each line of its answer is one of them."""
    names = ("everything", *COMPILED[topology], CACHED[topology])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).with_name("compile_tpu.py")
    command = [sys.executable, script, topology, *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == dict.fromkeys(names, "compiled")


def test_every_program_is_compiled() -> None:
    assert {name for names in COMPILED.values() for name in names} == set(compile_tpu.PROGRAMS) - {"everything"}
    assert set(CACHED.values()) == set(compile_tpu.CACHED)
