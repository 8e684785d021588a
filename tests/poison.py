"""Bad numbers in what a mask hides: how tests put them there and what must stay as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import numpy as np
import oracle

POISONS = (np.nan, np.inf, -np.inf)


def attended(case: cases.Case, inputs: cases.Inputs) -> np.ndarray:
    return oracle.attends(
        case.batch,
        case.query_length,
        case.key_length,
        is_causal=case.is_causal,
        local_window_size=case.window,
        **inputs.masks,
    )


def hide(case: cases.Case, inputs: cases.Inputs) -> cases.Inputs:
    """Gives the key side ids and positions that no query reaches, here and there."""
    masks = dict(inputs.masks)
    if case.segments == "pair":
        query, key = masks["segment_ids"]
        masks["segment_ids"] = (query % 3, key)  # keys of the last packed segment have id 3
    if case.positions == "pair":
        query, key = masks["positions"]
        masks["positions"] = (query, key + np.int32(15))
    return dataclasses.replace(inputs, masks=masks)


def poison(inputs: cases.Inputs, name: str, where: np.ndarray) -> cases.Inputs:
    """Every kind of bad number, over the tokens [B, length] that `where` names."""
    return spoilt(inputs, name, where, *POISONS)


def spoilt(inputs: cases.Inputs, name: str, where: np.ndarray, *numbers: float) -> cases.Inputs:
    """These numbers by turns, over the tokens [B, length] that `where` names."""
    x = inputs.arrays[name].copy()
    bad = np.resize(np.array(numbers, x.dtype), x.shape)
    x[where] = bad[where]
    return dataclasses.replace(inputs, arrays={**inputs.arrays, name: x})


def assert_equal(got: cases.Result, want: cases.Result, only: Any = None) -> None:
    for name in want.values if only is None else only:
        np.testing.assert_allclose(got.values[name], want.values[name], rtol=2e-6, atol=2e-6, err_msg=name)


def hidden_keys(case: cases.Case) -> tuple[cases.Inputs, np.ndarray]:
    """Inputs of the case, and which of their keys [B, S] nobody attends to."""
    inputs = hide(case, cases.make_inputs(case))
    return inputs, np.count_nonzero(attended(case, inputs), axis=1) == 0


def check_hidden_keys(case: cases.Case, *, as_users: bool = False, **ring: Any) -> None:
    """Poisons every key that nobody attends to: all results stay as they were, and right."""
    clean, hidden = hidden_keys(case)
    assert hidden.any() and not hidden.all()
    run = lambda inputs: cases.run_ring(case, inputs, as_users=as_users, **ring)  # noqa: E731
    got, want = run(poison(poison(clean, "key", hidden), "value", hidden)), run(clean)
    assert_equal(got, want)
    cases.assert_matches(case, clean, want, as_users=as_users)
    assert (got.values["dkey"][hidden] == 0).all() and (got.values["dvalue"][hidden] == 0).all()
