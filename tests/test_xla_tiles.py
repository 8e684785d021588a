"""The readable kernel where it takes many heads and rows at a time: on GPUs; CPUs and TPUs take one head."""

from __future__ import annotations

import re
from typing import Any

import cases
import hops
import jax
import jax.numpy as jnp
import pytest

from ringjax.kernels import xla
from ringjax.kernels.base import Block, KernelParams, Upstream
from ringjax.mask import Mask, Tokens

GPU = "NVIDIA H100 80GB HBM3"


def params_of(case: cases.Case, **options: Any) -> KernelParams:
    return KernelParams(case.head_size**-0.5, case.soft_cap, device_kind=GPU, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("name", "most"), [(name, 2**26) for name in hops.LARGE] + [("full, whole tiles", 2**17)])
def test_many_heads_at_a_time(name: str, most: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where memory leaves room for one. Weights of 16-bit arrays are rounded, as dense attention rounds them."""
    monkeypatch.setattr(xla, "_LOGITS", most)
    check(hops.LARGE[name], cases.make_inputs(hops.LARGE[name], dtype))


@pytest.mark.parametrize("name", ["full, whole tiles", "ranges"])
def test_rounded_weights_cost_no_more_than_in_dense_attention_where_logits_share_an_offset(name: str) -> None:
    case = hops.LARGE[name]
    check(case, cases.with_offset(case, cases.make_inputs(case, jnp.bfloat16), 9000.0))


def check(case: cases.Case, inputs: cases.Inputs) -> None:
    params = params_of(case, block_q=128, block_kv=256)
    result = hops.in_two_hops(
        case,
        inputs,
        lambda block, carry, *, finish: xla.forward(block, params, carry, finish=finish),
        lambda block, upstream, carry: xla.backward(block, upstream, params, carry, finish=False),
    )
    cases.assert_matches(case, inputs, result)


def block(batch: int, heads: int, kv_heads: int, lengths: tuple[int, int], of_keys: Any = None) -> Block:
    empty = lambda heads, length: jax.ShapeDtypeStruct((batch, heads, length, 64), jnp.bfloat16)  # noqa: E731
    keys = Tokens(None, None, of_keys)
    mask = Mask(queries=Tokens(None, None, None), keys=keys, left=None, right=None)
    return Block(empty(heads, lengths[0]), empty(kv_heads, lengths[1]), empty(kv_heads, lengths[1]), mask)


@pytest.mark.parametrize(
    ("given", "full", "masked"),
    [
        # (batch, heads, K/V heads, (queries, keys)): rows and K/V heads in a tile, its queries and keys
        ((1, 32, 8, (4096, 4096)), (1, 4, 1024, 4096), (1, 8, 1024, 1024)),
        ((8, 32, 8, (4096, 4096)), (1, 4, 1024, 4096), (2, 8, 1024, 1024)),
        ((8, 32, 8, (1, 131072)), (8, 8, 1, 131072), (8, 8, 1, 131072)),
        ((1, 256, 128, (4096, 4096)), (1, 8, 1024, 4096), (1, 32, 1024, 1024)),
        ((1, 128, 1, (4096, 4096)), (1, 1, 1024, 512), (1, 1, 1024, 512)),
        ((3, 12, 12, (700, 1400)), (3, 12, 700, 1400), (3, 12, 700, 1400)),
    ],
)
def test_a_tile_is_as_large_as_memory_allows(given: Any, full: tuple[int, ...], masked: tuple[int, ...]) -> None:
    """Under a mask smaller ones, of which more can be left out."""
    for of_keys, tiles in ((None, full), (jnp.full((1,), 700, jnp.int32), masked)):
        asked = block(*given, of_keys)
        found = xla._tiling(asked, KernelParams(1.0, device_kind=GPU))
        assert (found.rows, found.heads, found.block_q, found.block_kv) == tiles
        assert found.rows * found.heads * found.group * found.block_q * found.block_kv <= xla._LOGITS
        for kind in ("cpu", "TPU v5 lite"):
            one = xla._tiling(asked, KernelParams(1.0, device_kind=kind))
            assert (one.rows, one.heads) == (1, 1) and max(one.block_q, one.block_kv) <= 256


def test_rows_of_several_masks_are_worked_on_one_by_one() -> None:
    given = block(8, 32, 8, (4096, 4096), jnp.arange(8, dtype=jnp.int32))
    found = xla._tiling(given, KernelParams(1.0, device_kind=GPU))
    assert (found.rows, found.heads) == (1, 8)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_sums_start_from_zeros_that_are_made_in_their_layer(backward: bool) -> None:
    """They depend on its queries or its dout: otherwise XLA for GPUs makes those of all layers at once."""
    given, params = block(2, 4, 4, (300, 300)), KernelParams(0.125, device_kind=GPU)
    if backward:
        rows = jax.ShapeDtypeStruct(given.q.shape[:3], jnp.float32)
        upstream = Upstream(dout=given.q, lse=rows, delta=rows)
        run = lambda arrays, upstream: xla.backward(  # noqa: E731
            given._replace(q=arrays[0], k=arrays[1], v=arrays[2]), upstream, params, None, finish=True
        )
        text = jax.jit(run).lower(given[:3], upstream).as_text()
    else:
        run = lambda *arrays: xla.forward(Block(*arrays, given.mask), params, None, finish=True)  # noqa: E731
        text = jax.jit(run).lower(*given[:3]).as_text()
    text, *_ = text.split("stablehlo.while")
    constants = set(re.findall(r"(%\S+) = stablehlo.constant", text))
    filled = re.findall(r"broadcast_in_dim (%[^,]+), dims = \[\] : \(tensor<f32>\) -> tensor<2x4x\d+x64xf32>", text)
    assert len(filled) == len(set(filled)) == (3 if backward else 1) and not constants & set(filled)
