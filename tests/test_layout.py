"""Layouts: every ring order against a plain dealing of tokens to ranks, and the permutations on trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax
from ringjax import layout as layouts

ALL = ("contiguous", "zigzag", "striped", ringjax.Striped(stripe=3), ringjax.Striped(stripe=8))


def deal(length: int, layout: Any, num_shards: int) -> list[list[int]]:
    """The tokens of each rank, dealt out one by one; padding is left out."""
    layout = layouts.as_layout(layout)
    unit = layout.unit(num_shards)
    padded = -(-length // unit) * unit
    shard = padded // num_shards
    hands: list[list[int]] = [[] for _ in range(num_shards)]
    for token in range(padded):
        if isinstance(layout, ringjax.Contiguous):
            rank = token // shard
        elif isinstance(layout, ringjax.Zigzag):
            chunk = token // (shard // 2)
            rank = chunk if chunk < num_shards else 2 * num_shards - 1 - chunk
        else:
            assert isinstance(layout, ringjax.Striped)
            rank = token // layout.stripe % num_shards
        hands[rank].append(token)
    return [[token for token in hand if token < length] for hand in hands]


@pytest.mark.parametrize("num_shards", range(1, 9))
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_ring_positions_deal_the_tokens(layout: Any, num_shards: int) -> None:
    unit = layouts.as_layout(layout).unit(num_shards)
    for length in (0, 1, num_shards, unit - 1, unit, 2 * unit, 3 * unit + 1, 50):
        got = ringjax.ring_positions(length, layout=layout, num_shards=num_shards)
        assert got.dtype == jnp.int32
        want = [token for hand in deal(length, layout, num_shards) for token in hand]
        assert np.asarray(got).tolist() == want


@pytest.mark.parametrize("num_shards", [1, 2, 5, 8])
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_positions_of_a_shard(layout: Any, num_shards: int) -> None:
    # What a rank computes for itself, inside shard_map, from its own index.
    layout = layouts.as_layout(layout)
    length = 2 * layout.unit(num_shards)
    shard = length // num_shards
    assert shard % layout.shard_unit() == 0
    for rank, hand in enumerate(deal(length, layout, num_shards)):
        for xp in (np, jnp):
            got = layout.positions(rank, xp.arange(shard), shard, num_shards)
            assert np.asarray(got).tolist() == hand


@pytest.mark.parametrize("num_shards", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_causal_work_is_balanced(layout: str, num_shards: int) -> None:
    hands = [np.array(hand) for hand in deal(4 * num_shards, layout, num_shards)]
    for hop in range(num_shards):
        work = [
            int((hands[(rank + hop) % num_shards][None, :] <= hands[rank][:, None]).sum()) for rank in range(num_shards)
        ]
        # Striped differs by the diagonal only: a key one stripe away is before or after its query.
        slack = len(hands[0]) if layout == "striped" else 0
        assert max(work) - min(work) <= slack, (hop, work)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_to_and_from_ring_order_are_inverse(layout: Any, axis: int) -> None:
    length = 2 * layouts.as_layout(layout).unit(4)
    rng = np.random.default_rng(0)
    natural = np.moveaxis(rng.integers(0, 99, (length, 3, 2)), 0, axis)
    ring = ringjax.to_ring_order(natural, layout=layout, num_shards=4, axis=axis)
    order = ringjax.ring_positions(length, layout=layout, num_shards=4)
    np.testing.assert_array_equal(ring, np.take(natural, np.asarray(order), axis=axis))
    back = ringjax.from_ring_order(ring, layout=layout, num_shards=4, axis=axis)
    np.testing.assert_array_equal(back, natural)


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_padding_goes_on_at_the_end_and_comes_off_again(layout: Any) -> None:
    tree = {"tokens": np.arange(1, 51)[None], "weights": jnp.ones((1, 50), jnp.float32)}
    pad = {"tokens": 0, "weights": 0.0}
    ring = ringjax.to_ring_order(tree, layout=layout, num_shards=4, pad_value=pad)
    unit = layouts.as_layout(layout).unit(4)
    assert ring["tokens"].shape[1] % unit == 0 and ring["tokens"].shape[1] - 50 < unit
    assert (np.asarray(ring["weights"] == 0) == (ring["tokens"] == 0)).all()
    # Dropping the padding leaves the ring order of the unpadded length.
    order = np.asarray(ringjax.ring_positions(50, layout=layout, num_shards=4))
    np.testing.assert_array_equal(ring["tokens"][ring["tokens"] > 0], order + 1)
    back = ringjax.from_ring_order(ring, layout=layout, num_shards=4, length=50)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_leaves_keep_their_kind_and_dtype() -> None:
    tree = (np.arange(8, dtype=np.int16)[None], jnp.arange(8, dtype=jnp.bfloat16)[None])
    first, second = ringjax.to_ring_order(tree, layout="zigzag", num_shards=2)
    assert isinstance(first, np.ndarray) and first.dtype == np.int16
    assert isinstance(second, jax.Array) and second.dtype == jnp.bfloat16
    assert first[0].tolist() == [0, 1, 6, 7, 2, 3, 4, 5] == second[0].astype(int).tolist()


def test_ring_order_works_under_jit() -> None:
    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        ring = ringjax.to_ring_order(x, layout="striped", num_shards=2)
        return ring, ringjax.ring_positions(6, layout="striped", num_shards=2)

    ring, positions = both(jnp.arange(6)[None] * 10)
    assert ring[0].tolist() == [0, 20, 40, 10, 30, 50]
    assert positions.tolist() == [0, 2, 4, 1, 3, 5]


def test_named_layouts_are_their_objects() -> None:
    assert layouts.as_layout("contiguous") == ringjax.Contiguous()
    assert layouts.as_layout("zigzag") == ringjax.Zigzag()
    assert layouts.as_layout("striped") == ringjax.Striped(stripe=1)
    assert hash(ringjax.Striped(stripe=2)) == hash(ringjax.Striped(stripe=2))
    assert ringjax.Striped(stripe=2) != ringjax.Striped(stripe=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ringjax.to_ring_order(x, layout="spiral", num_shards=2), "layout .*'spiral'"),
        (lambda x: ringjax.to_ring_order(x, layout="zigzag", num_shards=4), "multiple of 8.*6"),
        (lambda x: ringjax.from_ring_order(x, layout="zigzag", num_shards=2), "multiple of 4.*6"),
        (lambda x: ringjax.from_ring_order(x, num_shards=2, length=7), "at most .*6.* 7"),
        (lambda x: ringjax.to_ring_order(x, num_shards=2, axis=2), r"axis.* 2.*\(1, 6\)"),
        (lambda x: ringjax.to_ring_order(x, num_shards=0), "num_shards .*positive.* 0"),
        (lambda x: ringjax.ring_positions(-1, num_shards=2), "length .*non-negative.* -1"),
        (lambda x: ringjax.ring_positions(6, num_shards=2.0), "num_shards .*integer.* 2.0"),
        (lambda x: ringjax.Striped(stripe=0), "stripe .*positive.* 0"),
    ],
)
def test_mistakes(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(np.arange(6)[None])
