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
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu import needs_libtpu

import ringjax
from ringjax.inspect.process import ENVIRONMENT
from ringjax.kernels.base import KernelParams
from ringjax.kernels.tpu import backward as tpu_backward
from ringjax.kernels.tpu import common as tpu_common
from ringjax.kernels.tpu import forward as tpu_forward
from ringjax.kernels.tpu.common import TileSizes
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
LARGE = {
    "full": cases.Case("full", 600, 700, 4, 2, 64, 32, batch=1),
    "full, whole tiles": cases.Case("full, whole tiles", 512, 1024, 4, 2, 64, 32, batch=2),  # known to need no list
    "masked": cases.Case(
        "masked", 600, 700, 4, 2, 64, 32, is_causal=True, window=(400, 0), segments="pair", soft_cap=1.5, batch=2
    ),
}


def in_two_hops(case: cases.Case, inputs: cases.Inputs, tiles: TileSizes) -> cases.Result:
    """Both kernels, called as a ring of two would: a hop of some keys, then one of the rest."""
    heads = {name: jnp.swapaxes(inputs.arrays[name], 1, 2) for name in ("query", "key", "value", "dout", "dlse")}
    q, dout = heads["query"], heads["dout"]
    params = KernelParams(case.head_size**-0.5, case.soft_cap, interpret=True)
    mask = mask_of(case, inputs)
    cut = 300 if case.key_length % 512 else 512
    blocks = [
        (heads["key"][:, :, at], heads["value"][:, :, at], keys_of(mask, at)) for at in (slice(cut), slice(cut, None))
    ]
    carry: Any = None
    for number, (k, v, seen) in enumerate(blocks):
        carry = tpu_forward.forward(
            q, k, v, seen, params, tiles, carry=carry, finish=number == 1, sinks=None
        )  # fmt: skip
    out, lse = carry
    delta = jnp.sum(out * dout, axis=-1) - heads["dlse"]
    dq, sums = None, []
    for k, v, seen in blocks:
        dq, dk, dv = tpu_backward.backward(q, k, v, dout, lse, delta, seen, params, tiles, dq_carry=dq)
        sums.append((dk, dv))
    dk, dv = (jnp.concatenate(parts, axis=2) for parts in zip(*sums, strict=True))
    got = {"out": out, "lse": lse, "dquery": dq, "dkey": dk, "dvalue": dv}
    values = {name: np.swapaxes(np.asarray(x), 1, 2).astype(np.float64) for name, x in got.items()}
    return cases.Result(values, {name: x.dtype for name, x in got.items()})


def mask_of(case: cases.Case, inputs: cases.Inputs) -> Mask:
    left = case.window[0] if isinstance(case.window, tuple) else None
    if not case.is_causal:
        return Mask(None, None, None, None)
    at = lambda length: jnp.arange(length, dtype=jnp.int32)[None]  # noqa: E731
    queries, keys = (jnp.asarray(x) for x in inputs.masks["segment_ids"])
    return Mask(at(case.query_length), at(case.key_length), queries, keys, left=left, right=0)


def keys_of(mask: Mask, at: slice) -> Mask:
    cut = lambda x: None if x is None else x[:, at]  # noqa: E731
    return dataclasses.replace(mask, kv_positions=cut(mask.kv_positions), kv_segments=cut(mask.kv_segments))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", LARGE)
def test_tiles_of_a_chip(name: str, tiles: str) -> None:
    case = LARGE[name]
    inputs = cases.make_inputs(case)
    cases.assert_matches(case, inputs, in_two_hops(case, inputs, TILES[tiles]))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-30])
def test_scales_that_are_no_ordinary_ones(scale: float) -> None:
    case = cases.Case("scale", 40, 40, is_causal=True, scale=scale, num_heads=2, segments="one", sinks=True)
    inputs = cases.make_inputs(case)
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, num_shards=2, implementation="pallas_tpu"))


def test_units_hold_all_queries_and_fit() -> None:
    for group, num_q, fitting in ((4, 7, 2), (4, 3, 9), (6, 3, 12), (1, 1, 0), (8, 5, 40)):
        units = tpu_backward._cut(group, num_q, 100, 100 * fitting)
        assert units.heads * units.num_heads == group
        assert units.tiles * units.num_chunks >= num_q > units.tiles * (units.num_chunks - 1)
        assert units.heads * units.tiles <= max(fitting, 1)


def test_tile_sizes_are_even_and_of_the_generation() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 4100, 128), jnp.bfloat16)
    for kind in tpu_common._TABLE:
        for direction in ("forward", "backward"):
            tiles = tpu_common.tile_sizes(direction, x, x, x, KernelParams(1.0, device_kind=kind))
            largest = tpu_common._TABLE[kind][direction]
            for size, most, sub in (
                (tiles.block_q, largest.block_q, tiles.sub_q),
                (tiles.block_kv, largest.block_kv, tiles.sub_kv),
            ):
                assert size % 128 == 0 and size <= most + 128 and size % sub == 0
                assert -(-4100 // size) * size - 4100 < size
    wide = jax.ShapeDtypeStruct((1, 4, 4096, 256), jnp.float32)
    small = tpu_common.tile_sizes("forward", wide, wide, wide, KernelParams(1.0, device_kind="TPU v5p"))
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
    case = dataclasses.replace(cases.BY_NAME[name], query_length=64, key_length=64, batch=1)
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
            tpu_common.tile_sizes("forward", x, x, x, params)


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


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_feature_compiles_for_every_generation(topology: str) -> None:
    """The matrix of tests/compile_tpu.py; each line of its answer is one program."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).with_name("compile_tpu.py")
    run = subprocess.run([sys.executable, script, topology], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    assert len(answers) >= 6
    assert {name: said for name, said in answers.items() if said != "compiled"} == {}
