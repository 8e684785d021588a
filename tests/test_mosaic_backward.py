"""The backward kernels for GPU, as far as they go without one: they are traced and lowered for an H100."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ringjax.kernels.base import Block, Gradients, KernelParams, Upstream
from ringjax.kernels.mosaic import backward_common, backward_long, ptx
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.kernels.mosaic import tiles as mosaic_tiles
from ringjax.layout import Runs
from ringjax.mask import Mask, Tokens

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)


def shapes(size: int = 64, v_size: int = 64, lengths: tuple[int, int] = (256, 256), dtype: Any = jnp.bfloat16) -> Any:
    (t, s), shape = lengths, jax.ShapeDtypeStruct
    wide = functools.partial(shape, dtype=jnp.float32)
    block = Block(
        q=shape((1, 4, t, size), dtype),
        k=shape((1, 2, s, size), dtype),
        v=shape((1, 2, s, v_size), dtype),
        mask=shape((), jnp.int32),  # see program
    )
    return block, Upstream(dout=shape((1, 4, t, v_size), dtype), lse=wide((1, 4, t)), delta=wide((1, 4, t)))


def mask_of(kind: str, start: Any, q_length: int, k_length: int) -> Mask:
    """``start`` is a traced number."""

    def tokens(length: int) -> Tokens:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        runs = lambda count: Runs(  # noqa: E731
            base=start, step=5 * (length // count), run=length // count, length=length
        )
        return {
            "full": Tokens(),
            "causal": Tokens(positions=runs(1)),
            "zigzag": Tokens(positions=runs(2)),
            "striped": Tokens(positions=runs(length)),
            "lengths": Tokens(length=jnp.stack([start])),
            "documents": Tokens(positions=index, segments=index // 5000),
            "everything": Tokens(positions=index, segments=index // 100, length=jnp.stack([start])),
        }[kind]

    bounds = {"full": {}, "lengths": {}, "everything": {"left": 70, "right": 0}, "striped": {"left": 70, "right": 0}}
    return Mask(queries=tokens(q_length), keys=tokens(k_length), **bounds.get(kind, {"right": 0}))


def program(mask: str, params: KernelParams, *, finish: bool = True) -> Any:
    def run(block: Block, upstream: Upstream, carry: Any) -> Gradients:
        block = block._replace(mask=mask_of(mask, block.mask, block.q.shape[2], block.k.shape[2]))
        return mosaic.backward(block, upstream, params, carry, finish=finish)

    return run


def lower(run: Any, args: Any) -> str:
    with use_abstract_mesh(H100):
        return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# Every size of heads, kind of mask and ragged lengths in one pass or two, by turns.
@pytest.mark.parametrize(
    ("mask", "options", "deterministic"),
    [
        ("full", {"size": 128, "v_size": 128}, False),
        ("full", {"lengths": (203, 335)}, True),
        ("causal", {"size": 64, "v_size": 48, "lengths": (203, 335)}, False),
        ("zigzag", {"size": 128, "v_size": 128}, True),
        ("zigzag", {"lengths": (200, 336)}, False),
        ("striped", {"size": 128, "v_size": 64}, True),
        ("lengths", {"size": 64, "v_size": 64}, False),
        ("everything", {"size": 80, "v_size": 128, "dtype": jnp.float16}, False),
        ("everything", {"size": 80, "v_size": 128, "dtype": jnp.float16}, True),
        ("causal", {"size": 256, "v_size": 200}, False),
        ("everything", {"size": 256, "v_size": 200, "dtype": jnp.float16}, True),
        # In parts.
        ("full", {"size": 128, "v_size": 128, "lengths": (16384, 512)}, False),
        ("zigzag", {"size": 128, "v_size": 128, "lengths": (16384, 512)}, True),
        ("documents", {"size": 80, "v_size": 128, "lengths": (20000, 300), "dtype": jnp.float16}, False),
        ("causal", {"size": 256, "v_size": 256, "lengths": (16384, 512)}, False),
    ],
)
def test_lowers(mask: str, options: dict[str, Any], deterministic: bool) -> None:
    block, upstream = shapes(**options)
    params = KernelParams(
        scale={"lengths": -0.1, "striped": 0.0}.get(mask, 0.1),
        logits_soft_cap=20.0 if mask == "everything" else None,
        deterministic=deterministic,
    )
    hop, last = program(mask, params, finish=False), program(mask, params)
    carry = jax.eval_shape(hop, block, upstream, None).dq
    t, h = block.q.shape[2:]
    native = 64 if max(h, block.v.shape[3]) <= 64 else 128 if h < 256 else 256
    parts = (1, 4, -(-t // 64), 4, 64 * 64)
    assert carry.shape == (parts if native > 128 and not deterministic else (1, -(-t // 8) * 8, 4, native))
    args = (block, upstream, carry)
    text = lower(hop, args)
    assert ("ringjax_backward_queries" in text) is deterministic
    assert ("ringjax_backward_long" in text) is (h == 256)
    assert text.count("output_operand_alias<") == (3 if t > 16000 else 1), "dq, and in parts dk and dv"
    assert jax.eval_shape(hop, *args).dq == carry, "the same on every hop"
    results = jax.eval_shape(last, *args)
    wanted = [(x.shape, jnp.float32) for x in (block.q, block.k, block.v)]
    assert [(x.shape, x.dtype) for x in results] == wanted


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_zeros_are_made_when_the_gradient_has_come(size: int, deterministic: bool) -> None:
    """Not for all layers at once, or once for all: of each layer they depend on its dout."""
    params = KernelParams(scale=0.1, deterministic=deterministic, dkv_final=True)
    text = lower(program("causal", params), (*shapes(size, size, lengths=(32768, 640)), None))
    constants = set(re.findall(r"(%\S+) = stablehlo.constant", text))
    filled = re.findall(
        r"stablehlo.broadcast_in_dim (%[^,]+), dims = \[\] : \(tensor<f32>\) -> tensor<(\S+)xf32>", text
    )
    sizes = {32768 * 4 * size, 640 * 2 * size}
    numbers = [number for number, shape in filled if math.prod(map(int, shape.split("x"))) in sizes]
    assert len(numbers) == 3 and not constants & set(numbers), "dq, and as long programs come in parts dk and dv"
    assert len(set(numbers)) == 3, "XLA makes one array of one number"


@pytest.mark.parametrize("lengths", [(256, 256), (32768, 512)], ids=["whole", "in parts"])
def test_lowers_under_vmap(lengths: tuple[int, int]) -> None:
    run = program("causal", KernelParams(scale=0.1), finish=False)
    given = shapes(lengths=lengths)
    args = (*given, jax.eval_shape(run, *given, None).dq)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args)
    assert lower(jax.vmap(run), stacked).count("output_operand_alias<") == (3 if lengths[0] > 16000 else 1)
    assert jax.eval_shape(jax.vmap(run), *stacked).dk.shape == (3, *given[0].k.shape)


@pytest.mark.parametrize(
    ("mask", "kv_heads", "queries", "block_q", "group", "parts"),
    [
        (Mask(), 8, 32768, 64, 4, 8),  # half of a program in the end is 1/31 of all
        (Mask(right=0), 4, 131072, 128, 4, 8),
        (Mask(right=0), 16, 65536, 64, 1, 2),
        (Mask(right=0), 32, 65536, 64, 1, 2),
        (Mask(right=0), 64, 65536, 64, 1, 1),
        (Mask(right=0), 8, 8192, 64, 4, 2),
        (Mask(), 8, 8064, 64, 4, 1),  # each part would be short
        (Mask(), 1, 64, 64, 1, 1),
        (Mask(left=4096, right=0), 8, 65536, 64, 4, 1),  # as long as the window
        (Mask(left=32768, right=0), 8, 65536, 64, 4, 5),
        (Mask(queries=Tokens(segments=jnp.zeros((1, 32768), jnp.int32))), 8, 32768, 64, 4, 4),
    ],
)
def test_programs_are_neither_long_nor_short(
    mask: Mask, kv_heads: int, queries: int, block_q: int, group: int, parts: int
) -> None:
    rows = -(-queries // 128)
    for heads in ((1, kv_heads), (kv_heads, 1)):
        of = functools.partial(backward_common.programs_of, mask, heads, rows, queries, block_q, group)
        assert of(final=False, deterministic=False).parts == parts
        assert of(final=False, deterministic=True).parts == min(parts, 2)
        if not mask.has_vectors:
            assert of(final=True, deterministic=False) == of(final=False, deterministic=False)


@pytest.mark.parametrize(
    ("tokens", "batch", "kv_heads", "parts", "together"),
    [
        (131072, 1, 8, 1, 1),
        (65536, 1, 8, 1, 2),
        (32768, 1, 8, 1, 4),
        (32768, 2, 6, 1, 6),
        (8192, 8, 8, 1, 4),
        (32768, 1, 2, 8, 1),
    ],
)
def test_the_last_programs_of_many_documents_are_short(
    tokens: int, batch: int, kv_heads: int, parts: int, together: int
) -> None:
    """They start longest first, of so many heads that the last are short: more parts would only cost sums in memory."""
    mask = Mask(queries=Tokens(segments=jnp.zeros((batch, tokens), jnp.int32)))
    of = functools.partial(
        backward_common.programs_of, mask, (batch, kv_heads), tokens // 128, tokens, 64, 4, deterministic=False
    )
    assert of(final=True) == (parts, together)
    assert of(final=False).together == mosaic_tiles.heads_together(kv_heads, tokens // 128, 198)


@pytest.mark.parametrize(
    ("kv_heads", "tiles", "together"), [(8, 32, 8), (8, 64, 4), (6, 64, 6), (16, 128, 2), (8, 256, 1), (1, 1, 1)]
)
def test_every_tile_of_every_head_has_a_program(kv_heads: int, tiles: int, together: int) -> None:
    assert mosaic_tiles.heads_together(kv_heads, tiles, 198) == together
    heads, programs = jnp.indices((kv_heads // together, tiles * together), jnp.int32).reshape(2, -1)
    head, tile = map(np.asarray, backward_common.head_and_tile(heads, programs, together))
    assert sorted(zip(head, tile, strict=True)) == [(h, t) for h in range(kv_heads) for t in range(tiles)]
    side_by_side = head[: tiles * together]
    assert set(side_by_side) == set(range(together)) and (np.diff(tile[: tiles * together]) >= 0).all()


def test_dq_comes_back_in_order() -> None:
    """Where a thread holds which number of a product, as PTX has it: see wgmma, register fragments of D."""
    want = np.arange(2 * 64 * 64, dtype=np.float32).reshape(2, 64, 64)
    held = np.zeros((2, 8, 128, 4), np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for n in range(32):
            row = 16 * warp + lane // 4 + 8 * (n // 2 % 2)
            column = 8 * (n // 4) + lane % 4 * 2 + n % 2
            held[:, n // 4, thread, n % 4] = want[:, row, column]
    np.testing.assert_array_equal(ptx.in_order(jnp.asarray(held.reshape(2, -1))), want)
    dq = jnp.asarray(held.reshape(1, 1, 1, 2, -1))
    whole = np.concatenate(list(want), axis=1)
    np.testing.assert_array_equal(backward_long.finished_dq(dq, 60, 100)[0, 0], whole[:60, :100])


def test_a_query_without_keys_has_no_weight() -> None:
    """exp2(s - inf) = 0, whatever the finite s; what lies beyond the end is left to the predicate."""
    lse = jnp.array([[[-jnp.inf, 0.0, 3.0]]])
    rows = backward_common.rows_of(lse, jnp.ones_like(lse), 0.5, 8)
    assert rows.shape == (1, 1, 2, 8)
    np.testing.assert_allclose(rows[0, 0, 0, :3], [np.inf, 1.0, 3 / np.log(2) + 1], rtol=1e-6)
    np.testing.assert_array_equal(rows[0, 0, 1, :3], 1.0)
    assert jnp.isfinite(rows[..., 3:]).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"dtype": jnp.float32}, "bfloat16 and float16"), ({"size": 320}, "heads of at most 256")]
)
def test_says_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(program("full", KernelParams(scale=0.1)), *shapes(**options), None)
