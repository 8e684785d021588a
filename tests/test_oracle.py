"""The oracle against the definition, key by key, and its gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import cases
import numpy as np
import oracle
import pytest

SMALL = {
    case.name: case
    for case in (
        cases.Case("full", 5, 7, 4, 2, 3, 2, scale=0.8),
        cases.Case("causal_cross", 5, 7, 2, 1, 3, 4, is_causal=True, soft_cap=1.3),
        cases.Case("window_sinks", 6, 6, 2, 2, 3, 3, window=(2, 1), sinks=True),
        cases.Case("causal_window", 6, 6, 2, 2, 3, 3, is_causal=True, window=2, segments="one"),
        cases.Case("lengths", 6, 5, 2, 1, 3, 3, query_lengths=(6, 3), key_lengths=(0, 4), sinks=True),
        cases.Case("dead_rows", 6, 5, 2, 1, 3, 3, key_lengths=(0, 4), segments="pair"),
        cases.Case("positions", 6, 5, 2, 1, 3, 3, window=1, positions="pair", soft_cap=0.9),
    )
}


def problem(case: cases.Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    inputs = cases.make_inputs(case, np.float32)
    x = inputs.float64
    return x, dict(case.static_options(), **inputs.masks)


def allowed(case: cases.Case, masks: dict[str, Any], b: int, i: int, j: int) -> bool:
    """Who attends to whom, spelt out for one pair."""
    first, second = lambda x: x[0] if isinstance(x, tuple) else x, lambda x: x[1] if isinstance(x, tuple) else x
    positions = masks.get("positions")
    at_q = i if positions is None else int(first(positions)[b, i])
    at_k = j if positions is None else int(second(positions)[b, j])
    if case.is_causal and at_k > at_q:
        return False
    if case.window is not None:
        left, right = case.window if isinstance(case.window, tuple) else (case.window,) * 2
        if at_k < at_q - left or at_k > at_q + right:
            return False
    ids = masks.get("segment_ids")
    if ids is not None and first(ids)[b, i] != second(ids)[b, j]:
        return False
    if case.query_lengths is not None and i >= case.query_lengths[b]:
        return False
    return case.key_lengths is None or j < case.key_lengths[b]


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_the_definition(name: str) -> None:
    case = SMALL[name]
    x, options = problem(case)
    out, lse = oracle.forward(x["query"], x["key"], x["value"], sinks=x.get("sinks"), **options)
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    for b, i, n in np.ndindex(case.batch, case.query_length, case.num_heads):
        head = n // (case.num_heads // case.num_kv_heads)
        keys = [j for j in range(case.key_length) if allowed(case, options, b, i, j)]
        z = [scale * math.fsum(x["query"][b, i, n] * x["key"][b, j, head]) for j in keys]
        if case.soft_cap is not None:
            z = [case.soft_cap * math.tanh(one / case.soft_cap) for one in z]
        weight = [math.exp(one) for one in z]
        total = sum(weight) + (math.exp(x["sinks"][n]) if case.sinks else 0.0)
        want = sum((w * x["value"][b, j, head] for w, j in zip(weight, keys, strict=True)), 0.0)
        want = want / total if total else want
        np.testing.assert_allclose(out[b, i, n], want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[b, i, n], math.log(total) if total else -math.inf)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_differences(name: str) -> None:
    case = SMALL[name]
    x, options = problem(case)
    inputs = {k: x[k] for k in ("query", "key", "value", "sinks") if k in x}

    def loss(at: dict[str, np.ndarray]) -> float:
        out, lse = oracle.forward(**at, **options)
        live = np.isfinite(lse)
        return float(np.sum(out * x["dout"]) + np.sum(lse[live] * x["dlse"][live]))

    gradients = oracle.backward(**inputs, dout=x["dout"], dlse=x["dlse"], **options)
    rng = np.random.default_rng(1)
    for which in inputs:
        direction = rng.standard_normal(inputs[which].shape)
        step = 1e-5 * direction
        moved = [loss({**inputs, which: inputs[which] + sign * step}) for sign in (1.0, -1.0)]
        want = (moved[0] - moved[1]) / 2e-5
        got = float(np.sum(getattr(gradients, which) * direction))
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8, err_msg=which)


@pytest.mark.parametrize("name", ["window_cross", "everything", "segment_pair_cross_sinks"])
def test_dense_reference_agrees_with_the_oracle(name: str) -> None:
    # The tolerance of every other test is measured from this reference.
    case = cases.BY_NAME[name]
    inputs = cases.make_inputs(case)
    truth, dense = cases.run_oracle(case, inputs), cases.run_dense(case, inputs)
    assert truth.keys() == dense.keys()
    for what, want in truth.items():
        np.testing.assert_allclose(dense[what], want, rtol=1e-5, atol=2e-6, err_msg=what)
