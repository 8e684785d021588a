"""The recipes of ring_attention's docstring: what cannot be said by a flag is said by positions and segments."""

from __future__ import annotations

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax

B, T, S, N, H, C = 2, 6, 12, 2, 8, 3


def draw(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, length, N, H)).astype(np.float32)


def check(q_length: int, wanted: np.ndarray, layout: str, **options) -> None:
    """The ring in a layout against dense attention with a mask given pair by pair, both in natural order."""
    q, k, v = draw(q_length, 0), draw(S, 1), draw(S, 2)
    at_q, at_k = (np.asarray(ringjax.ring_positions(n, layout=layout, num_shards=C)) for n in (q_length, S))
    out = ringjax.ring_attention(q[:, at_q], k[:, at_k], v[:, at_k], mesh=cases.mesh_of(C), layout=layout, **options)
    s = np.einsum("btnh,bsnh->bnts", *(x.astype(np.float64) for x in (q, k))) / np.sqrt(H)
    p = np.where(wanted, np.exp(s - s.max(-1, keepdims=True)), 0)
    want = np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v.astype(np.float64))
    np.testing.assert_allclose(out, want[:, at_q], atol=2e-6)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_queries_at_the_end_of_the_keys(layout: str) -> None:
    at_q, at_k = (ringjax.ring_positions(n, layout=layout, num_shards=C) for n in (T, S))
    wanted = np.arange(S)[None] <= np.arange(T)[:, None] + S - T
    check(T, wanted, layout, is_causal=True, positions=(at_q + S - T, at_k))


def test_without_positions_the_first_query_stands_at_0_as_in_jax_nn() -> None:
    check(T, np.tri(T, S, dtype=bool), "contiguous", is_causal=True)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_prefix_that_all_attend_to(layout: str) -> None:
    at, prefix = ringjax.ring_positions(S, layout=layout, num_shards=C), 5
    wanted = np.tri(S, dtype=bool) | (np.arange(S)[None] < prefix)
    check(S, wanted, layout, is_causal=True, positions=(jnp.maximum(at, prefix - 1), at))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_chunks_that_attend_to_themselves(layout: str) -> None:
    at, width = ringjax.ring_positions(S, layout=layout, num_shards=C), 4
    same = np.arange(S)[:, None] // width == np.arange(S)[None] // width
    ids = jnp.broadcast_to(at // width, (B, S))
    check(S, same & np.tri(S, dtype=bool), layout, is_causal=True, segment_ids=ids)
