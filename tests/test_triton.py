"""The Triton kernel on CPU: interpreted against the oracle (each feature once), lowered for CUDA, what it refuses."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_conformance
import test_poison
from jax.sharding import AbstractDevice, AbstractMesh

import ringjax
from ringjax.kernels.base import KernelParams
from ringjax.kernels.triton.common import TileSizes, tile_sizes

INTERPRETED = {"implementation": "pallas_triton", "interpret": True}
HALF = (jnp.bfloat16, jnp.float16)


def check(case: cases.Case, dtype: Any = jnp.float32, **how: Any) -> None:
    inputs = cases.make_inputs(case, dtype)
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, **{**INTERPRETED, **how}))


# ----------------------------------------------------------------------------------------------- interpreted


@pytest.mark.parametrize(
    ("name", "layout", "num_shards"),
    [
        ("full_mqa_wide_value", "contiguous", 1),
        ("causal_cross_soft_cap", "zigzag", 1),
        ("window_cross", "contiguous", 1),
        ("segment_pair_cross_sinks", "striped", 4),
        ("position_pair_window", "contiguous", 1),
        ("lengths", "contiguous", 1),
        ("everything", "zigzag", 4),
    ],
)
def test_matrix(name: str, layout: str, num_shards: int) -> None:
    check(cases.BY_NAME[name], layout=layout, num_shards=num_shards)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: Any) -> None:
    check(cases.BY_NAME["causal_gqa"], dtype, layout="zigzag", num_shards=1)


def test_ragged_tiles_and_head_sizes() -> None:
    # Nothing divides by anything: neither lengths by tiles, nor head sizes by powers of two.
    case = cases.Case("ragged", 37, 45, 6, 2, 20, 12, is_causal=True, sinks=True)
    check(case, num_shards=1, block_q=16, block_kv=32)


def test_blocks_of_its_own_choice() -> None:
    check(cases.BY_NAME["causal_segments"], num_shards=1, block_q=None, block_kv=None)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests of another file run this kernel, on one shard."""
    program, run = cases.ring_program, cases.run_ring

    def ring_program(case: Any, *, layout: Any, num_shards: int, **config: Any) -> Any:
        del num_shards  # Unused.
        return program(case, layout=layout, num_shards=1, **{**config, **INTERPRETED})

    def run_ring(case: Any, inputs: Any, *, num_shards: int = 1, program: Any = None, **how: Any) -> Any:
        del num_shards  # Unused.
        program = program or ring_program(case, num_shards=1, **{"layout": "contiguous", **how})
        return run(case, inputs, layout=how.get("layout", "contiguous"), num_shards=1, program=program)

    monkeypatch.setattr(cases, "ring_program", ring_program)
    monkeypatch.setattr(cases, "run_ring", run_ring)


@pytest.mark.parametrize("name", ["causal_window", "segments"])
def test_keys_that_nobody_attends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    interpreted(monkeypatch)
    test_poison.test_keys_that_nobody_attends("pallas_triton", name, "contiguous")


def test_queries_beyond_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    test_poison.test_queries_beyond_their_length("pallas_triton", 1)


@pytest.mark.parametrize("name", ["key", "value"])
def test_each_query_sees_what_it_attends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    interpreted(monkeypatch)
    for bad in test_poison.POISONS:  # one compiled program
        test_poison.test_each_query_sees_what_it_attends("pallas_triton", "contiguous", 1, name, bad)


@pytest.mark.parametrize("sinks", [False, True])
def test_fully_masked_rows(monkeypatch: pytest.MonkeyPatch, sinks: bool) -> None:
    interpreted(monkeypatch)
    test_poison.test_fully_masked_rows("pallas_triton", 1, sinks)


def test_logits_of_ten_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding must grow with the distance from the maximum, not with the logits.
    interpreted(monkeypatch)
    test_conformance.test_extreme_scale("pallas_triton")


def test_a_negative_scale_and_none() -> None:
    for scale in (-0.7, 0.0):
        check(cases.Case("scale", 24, 24, 2, 1, is_causal=True, scale=scale, sinks=True), num_shards=1)


def test_same_bits_on_two_runs() -> None:
    case = cases.BY_NAME["causal_gqa"]
    inputs = cases.make_inputs(case, jnp.bfloat16)
    program = cases.ring_program(case, layout="zigzag", num_shards=1, **INTERPRETED)
    first, second = (cases.run_ring(case, inputs, layout="zigzag", num_shards=1, program=program) for _ in range(2))
    for what, value in first.values.items():
        np.testing.assert_array_equal(value, second.values[what], err_msg=what)


# -------------------------------------------------------------------------------------------------- lowered

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
# Later JAX versions say so whenever a Triton kernel is lowered; see the changelog of JAX 0.11.
lowers_triton = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def lowered(dtype: Any, size: int, *, segments: bool = False, backward: bool = False, **options: Any) -> str:
    """The program for CUDA of a ring of two, as stacked shards on one device."""

    options.setdefault("config", ringjax.RingConfig(implementation="pallas_triton"))

    def local(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return ringjax.ring_attention(q, k, v, segment_ids=ids if segments else None, **options)

    def program(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return jnp.sum(jax.vmap(local, axis_name="sp")(q, k, v, ids).astype(jnp.float32))

    if backward:
        program = jax.grad(program, argnums=(0, 1, 2))
    array = lambda heads: jax.ShapeDtypeStruct((2, 1, 200, heads, size), dtype)  # noqa: E731
    ids = jax.ShapeDtypeStruct((2, 1, 200), jnp.int32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(program).trace(array(4), array(2), array(2), ids)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@lowers_triton
@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        (jnp.bfloat16, 128, {"is_causal": True}),
        (jnp.float16, 80, {"local_window_size": 50, "logits_soft_cap": 2.0}),
        (jnp.float32, 64, {"segments": True}),
        (jnp.bfloat16, 256, {}),
    ],
    ids=str,
)
def test_lowers_for_cuda(dtype: Any, size: int, options: dict[str, Any]) -> None:
    text = lowered(dtype, size, backward=True, **options)
    assert text.count("__gpu$xla.gpu.triton") == 6  # forward, dkv, dq: two hops
    for name in ("ringjax_forward", "ringjax_dkv", "ringjax_dq"):
        assert name in text


# ------------------------------------------------------------------------------------------------ tile sizes


def sizes(kernel: str, length: int, size: int, dtype: Any = jnp.bfloat16, kind: str = H100.device_kind) -> TileSizes:
    x = jax.ShapeDtypeStruct((1, 2, length, size), dtype)
    return tile_sizes(kernel, x, x, x, KernelParams(1.0, device_kind=kind))


@pytest.mark.parametrize("kernel", ["forward", "dkv", "dq"])
def test_tiles_shrink_to_fit_a_small_gpu_and_a_short_shard(kernel: str) -> None:
    large, small = (sizes(kernel, 8192, 128, kind=kind) for kind in (H100.device_kind, "NVIDIA GeForce RTX 4090"))
    assert large != small
    assert (small.block_q, small.block_kv, small.num_stages) <= (large.block_q, large.block_kv, large.num_stages)
    for size in (8, 64, 100, 256):
        for dtype in (jnp.float32, *HALF):
            tiles = sizes(kernel, 20, size, dtype)
            assert max(tiles.block_q, tiles.block_kv) <= 32
            for n in (tiles.block_q, tiles.block_kv, tiles.num_warps):
                assert n & (n - 1) == 0


# -------------------------------------------------------------------------------------------------- refusals


def test_a_block_that_triton_cannot_multiply() -> None:
    for name, block in (("block_q", 8), ("block_kv", 48)):
        config = ringjax.RingConfig(implementation="pallas_triton", **{name: block})
        with pytest.raises(ValueError, match=f"config.{name} must be a power of two, 16 or more.* Got {block}"):
            lowered(jnp.bfloat16, 64, config=config)


def test_float64() -> None:
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="'pallas_triton'.*float64.*'xla'"):
        check(cases.BY_NAME["causal_gqa"], jnp.float64, num_shards=1)


def test_another_platform() -> None:
    case = cases.BY_NAME["causal_gqa"]
    with pytest.raises(ValueError, match="'cpu'.*'pallas_triton'.*'gpu'.*interpret=True"):
        check(case, num_shards=1, interpret=False)
