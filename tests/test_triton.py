"""The Triton kernel beyond the conformance suite: lowered for CUDA, tile sizes, refusals."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import ringjax
from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.triton.tiles import TileSizes, tile_sizes
from ringjax.mask import Mask


def check(case: cases.Case, dtype: Any = jnp.float32, **how: Any) -> None:
    inputs = cases.make_inputs(case, dtype)
    cases.assert_matches(case, inputs, cases.run_ring(case, inputs, implementation="pallas_triton", **how))


# -------------------------------------------------------------------------------------------------- lowered

HALF = (jnp.bfloat16, jnp.float16)
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
    assert "collective_permute" not in text


# ------------------------------------------------------------------------------------------------ tile sizes


def sizes(kernel: str, length: int, size: int, dtype: Any = jnp.bfloat16, kind: str = H100.device_kind) -> TileSizes:
    x = jax.ShapeDtypeStruct((1, 2, length, size), dtype)
    return tile_sizes(kernel, Block(x, x, x, Mask()), KernelParams(1.0, device_kind=kind))


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
