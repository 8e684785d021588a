"""ringjax.pack for devices on several axes: equal at every hop of rings within rings; only what is shared travels."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from test_packing import distribution, some_lengths

import ringjax


@pytest.mark.parametrize("sizes", [(2, 4), (3, 2), (2, 1, 2), (4,)], ids=str)
def test_work_of_rings_within_rings_is_what_is_counted(sizes: tuple[int, ...]) -> None:
    count = int(np.prod(sizes))
    lengths = some_lengths(count, 48, 3)
    packing = ringjax.pack(lengths, num_shards=sizes, shard_length=48, multiple=8, final=True)
    assert (packing.num_shards, packing.axes) == (count, sizes)
    for index, arrangement in enumerate(packing):
        ids, at = arrangement.segment_ids, arrangement.offset
        seen = (ids[:, None] == ids) & (at[:, None] >= at) & (arrangement.document >= 0)[:, None]
        blocks = seen.reshape(count, 48, count, 48).sum(axis=(1, 3))
        hops = np.zeros((count, count), int)
        for rank, hop in np.ndindex(count, count):
            place, offset = np.unravel_index(rank, sizes), np.unravel_index(hop, sizes)
            there = [(here + away) % size for here, away, size in zip(place, offset, sizes, strict=True)]
            hops[rank, hop] = blocks[rank, np.ravel_multi_index(there, sizes)]
        assert (arrangement.work() == hops).all()
        mean = hops.sum() / count
        assert packing.imbalance[index] == pytest.approx(hops.sum(axis=1).max() / mean)
        assert packing.lockstep_imbalance[index] == pytest.approx(hops.max(axis=0).sum() / mean)


def test_the_arrangement_is_that_of_one_axis() -> None:
    lengths = some_lengths(8, 64, 1)
    one, two = (ringjax.pack(lengths, num_shards=shards, shard_length=64) for shards in (8, (2, 4)))
    assert all((a.document == b.document).all() for a, b in zip(one, two, strict=True))
    assert one.shared_length == two.shared_length and (one.imbalance == two.imbalance).all()


@pytest.mark.parametrize("name", ["log-normal", "one giant", "magi short", "magi long", "equal 1.7"])
@pytest.mark.parametrize(("sizes", "shard_length"), [((2, 4), 8192), ((4, 8), 8192), ((16, 16), 4096)], ids=str)
def test_balance(name: str, sizes: tuple[int, ...], shard_length: int) -> None:
    count = int(np.prod(sizes))
    lengths = distribution(name, count * shard_length, shard_length, 6.5 if count < 64 else 2.5)
    packing = ringjax.pack(lengths, num_shards=sizes, shard_length=shard_length)
    assert packing.imbalance.max() <= 1.05 and packing.lockstep_imbalance.max() <= 1.10


def test_only_what_is_shared_travels_and_every_document_is_whole() -> None:
    sizes, length = (2, 4), 32
    lengths = [24] * 4 + [64] + [24, 20, 4, 22, 2, 24]
    packing = ringjax.pack(lengths, num_shards=sizes, shard_length=length, multiple=8, final=True)
    assert len(packing) == 1 and 0 < packing.shared_length < length
    sequence = packing[0]
    ids = sequence.segment_ids[None]
    ringjax.check_segments(ids, num_shards=sizes, shared_length=packing.shared_length)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return ringjax.ring_attention(
            query, key, value, mesh=cases.mesh_of(sizes), axis_name=cases.axes_of(sizes), is_causal=True,
            positions=sequence.positions, segment_ids=ids, shared_length=packing.shared_length,
            config=cases.config_of("xla"),
        )  # fmt: skip

    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 256, 1, 8))
    sent = [one for one in jaxprs.collectives(jax.make_jaxpr(attend)(query, key, value)) if one.dtype == np.float32]
    assert sum(one.size * one.times for one in sent) == packing.shared_length * 2 * 8 * 7, "K and V, seven other ranks"
    seen = (ids[0][:, None] == ids[0]) & (sequence.offset[:, None] >= sequence.offset)
    dense = jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(seen)[None, None])
    assert jnp.abs(jax.jit(attend)(query, key, value) - dense)[:, sequence.document >= 0].max() < 1e-5


@pytest.mark.parametrize("given", [(), (2, 0), (2, 1.5), (True, 2)], ids=str)
def test_axes_that_are_none(given: Any) -> None:
    with pytest.raises(ValueError, match=r"num_shards must be .* or one for each axis, outermost first. Got \("):
        ringjax.pack([3], num_shards=given, shard_length=8)
