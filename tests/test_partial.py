"""Partial results: the laws of merge, what finish makes of nothing, and merge_partials with its gradients."""

from __future__ import annotations

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

import ringjax
from ringjax import partial

B, N, T, HV = 1, 2, 3, 4


def summarise(logits: np.ndarray, values: np.ndarray) -> partial.Partial:
    """The partial result of logits [B, N, T, S] over values [S, Hv], in float32."""
    s, v = jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32)
    top = s.max(-1)
    weight = jnp.exp(s - top[..., None])
    return partial.Partial(weight @ v[None, None], top, weight.sum(-1))


def nothing() -> partial.Partial:
    return partial.identity((B, N, T), HV, jnp.float32)


def draw(seed: int, keys: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return size * rng.standard_normal((B, N, T, keys)), rng.standard_normal((keys, HV))


def truth(logits: np.ndarray, values: np.ndarray, sinks: np.ndarray | None = None) -> tuple:
    z = logits.astype(np.float32).astype(np.float64)
    if sinks is not None:
        extra = np.broadcast_to(sinks.astype(np.float64)[None, :, None, None], (*z.shape[:3], 1))
        z = np.concatenate([z, extra], -1)
        values = np.concatenate([values, np.zeros((1, HV))])
    top = z.max(-1, keepdims=True)
    weight = np.exp(z - top)
    total = weight.sum(-1, keepdims=True)
    return weight / total @ values, (top + np.log(total))[..., 0]


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    # Over no keys the maximum times a factor may have overflown to -inf, too.
    sinks = jnp.full((N,), -jnp.inf)
    for top in (partial.NO_LOGIT, -jnp.inf):
        out, lse = partial.finish(nothing()._replace(max=jnp.full((B, N, T), top)), sinks)
        assert not jnp.any(out) and jnp.all(lse == -jnp.inf)
    logits, values = draw(0, 5, 1.0)
    part = summarise(logits, values)
    jax.tree.map(np.testing.assert_array_equal, partial.finish(part, sinks), partial.finish(part))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_merge_into_the_whole(size: float, with_sinks: bool) -> None:
    logits, values = draw(0, 12, size)
    sinks = np.array([0.7, -1.0], np.float32) * np.float32(size) if with_sinks else None
    merged = nothing()
    for start, stop in ((0, 1), (1, 6), (6, 12)):
        part = summarise(logits[..., start:stop], values[start:stop])
        merged = partial.merge(merged, part)
    out, lse = partial.finish(merged, None if sinks is None else jnp.asarray(sinks))
    want_out, want_lse = truth(logits, values, sinks)
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-6)


def test_identity_and_symmetry_hold_to_the_bit() -> None:
    a, b = summarise(*draw(1, 5, 3.0)), summarise(*draw(2, 7, 3.0))
    for x, y in (
        (partial.merge(nothing(), a), a),
        (partial.merge(a, nothing()), a),
        (partial.merge(a, b), partial.merge(b, a)),
        (partial.merge(nothing(), nothing()), nothing()),
    ):
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_nothing_attended_is_zero_and_minus_infinity() -> None:
    out, lse = partial.finish(nothing())
    assert (out == 0).all() and (lse == -jnp.inf).all()


def test_nothing_attended_but_sinks() -> None:
    sinks = jnp.array([3.0, -1e4], jnp.float32)
    out, lse = partial.finish(nothing(), sinks)
    assert (out == 0).all()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[None, :, None], (B, N, T)))


def test_an_attended_nan_shows() -> None:
    logits, values = draw(3, 4, 1.0)
    logits[0, 1, 2, 0] = np.nan
    out, lse = partial.finish(partial.merge(summarise(logits, values), summarise(*draw(4, 4, 1.0))))
    bad = np.zeros((B, N, T), bool)
    bad[0, 1, 2] = True
    np.testing.assert_array_equal(np.isnan(lse), bad)
    np.testing.assert_array_equal(np.isnan(out).all(-1), bad)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(0, 2**20), st.lists(st.integers(0, 3), min_size=8, max_size=8), st.booleans())
def test_merge_partials_joins_any_partition_of_the_keys(seed: int, owner: list[int], dead: bool) -> None:
    case = cases.Case("parts", 3, 8, 2, 2, 4, 4, batch=1)
    x = cases.make_inputs(case, seed=seed).float64
    lengths = np.array([0 if dead else 8])
    whole = oracle.forward(x["query"], x["key"], x["value"], key_value_seq_lengths=lengths)
    parts = []
    for part in range(4):
        # A part that owns no key is all -inf: the identity.
        ids = (np.zeros((1, 3), int), np.array([owner]) - part)
        part_result = oracle.forward(
            x["query"],
            x["key"],
            x["value"],
            segment_ids=ids,
            key_value_seq_lengths=lengths,
        )
        parts.append(tuple(jnp.asarray(y, jnp.float32) for y in part_result))
    out, lse = ringjax.merge_partials(parts)
    np.testing.assert_allclose(out, whole[0], atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-6, atol=1e-6)


def test_merge_partials_gradients() -> None:
    # out = sum_i w_i out_i and w_i = exp(lse_i - lse), differentiated by hand:
    # d out_i = w_i dout,  d lse_i = w_i (dout . (out_i - out) + dlse).
    rng = np.random.default_rng(5)
    outs, lses = rng.standard_normal((3, 2, 5, 4)), 2 * rng.standard_normal((3, 2, 5))
    lses[0, 0, 1] = lses[2, 0, 1] = -np.inf
    lses[:, 1, 3] = -np.inf
    dout, dlse = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5))
    as_f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    parts = [(as_f32(o), as_f32(s)) for o, s in zip(outs, lses, strict=True)]
    (out, lse), pull = jax.vjp(lambda p: ringjax.merge_partials(p), parts)
    (gradients,) = pull((as_f32(dout), as_f32(dlse)))
    dead = np.isinf(lses).all(0)
    assert (np.asarray(lse)[dead] == -np.inf).all() and (np.asarray(out)[dead] == 0).all()
    with np.errstate(invalid="ignore"):
        weight = np.where(np.isinf(lses), 0.0, np.exp(lses - np.asarray(lse, np.float64)))
    for i, (got_out, got_lse) in enumerate(gradients):
        np.testing.assert_allclose(got_out, weight[i][..., None] * dout, atol=1e-6)
        inner = np.sum(dout * (outs[i] - np.asarray(out, np.float64)), -1) + dlse
        np.testing.assert_allclose(got_lse, weight[i] * inner, atol=2e-6)


def test_merge_partials_ignores_a_part_that_attended_nothing() -> None:
    # Its output is arbitrary there, even NaN: weight 0 times NaN must not be NaN.
    good = (jnp.ones((1, 2, 4), jnp.float32), jnp.zeros((1, 2), jnp.float32))
    bad = (jnp.full((1, 2, 4), jnp.nan, jnp.float32), jnp.full((1, 2), -jnp.inf, jnp.float32))
    out, lse = ringjax.merge_partials([good, bad])
    np.testing.assert_array_equal(out, good[0])
    np.testing.assert_array_equal(lse, good[1])


def test_merge_partials_dtypes() -> None:
    half = (jnp.ones((1, 2, 4), jnp.bfloat16), jnp.zeros((1, 2), jnp.float32))
    out, lse = ringjax.merge_partials([half, half])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(2.0), rtol=1e-6)
    with jax.enable_x64(True):
        wide = (jnp.ones((1, 2, 4), jnp.float64), jnp.zeros((1, 2), jnp.float64))
        out, lse = ringjax.merge_partials([wide, wide])
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(lse, np.log(2.0), rtol=1e-15)


def test_merge_partials_mistakes() -> None:
    out, lse = jnp.ones((1, 2, 4), jnp.float32), jnp.zeros((1, 2), jnp.float32)
    with pytest.raises(ValueError, match="at least one.*Got none"):
        ringjax.merge_partials([])
    with pytest.raises(ValueError, match=r"shape.*\(1, 2, 4\).*\(1, 3\)"):
        ringjax.merge_partials([(out, lse), (out, jnp.zeros((1, 3), jnp.float32))])
    with pytest.raises(ValueError, match=r"shape.*\(1, 2, 5\)"):
        ringjax.merge_partials([(out, lse), (jnp.ones((1, 2, 5), jnp.float32), lse)])
