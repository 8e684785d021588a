"""NaN and Inf in what is masked out reach nothing; in what is attended they reach exactly those who attend to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import numpy as np
import pytest
from poison import POISONS, assert_equal, attended, check_hidden_keys, poison

# Masks that hide keys, and lengths that divide by nothing, so that shards, tiles and head sizes are padded on either
# side: padding attends to nothing either. Every mask of the conformance suite that hides keys is poisoned there.
HIDDEN = {
    case.name: case
    for case in (
        cases.Case("causal, padded", 5, 8, is_causal=True, num_heads=2, sinks=True),
        cases.Case("causal, padded, sizes too", 37, 61, 3, 1, 5, 6, is_causal=True, sinks=True),
    )
}


def on_rings() -> list[Any]:
    """Each in every layout on XLA's kernel, and once on the others."""
    found = []
    for implementation in cases.IMPLEMENTATIONS:
        for number, name in enumerate(HIDDEN):
            order = cases.LAYOUTS[number:] + cases.LAYOUTS[:number]
            for turn, layout in enumerate(order[: cases.PROFILES[implementation].layouts]):
                of_four = implementation == "xla" or name == "causal, padded"
                marks = pytest.mark.breadth if turn else ()
                found.append(pytest.param(implementation, name, layout, 4 if of_four else 2, marks=marks))
    return found


@pytest.mark.parametrize(("implementation", "name", "layout", "num_shards"), on_rings())
def test_keys_that_nobody_attends(implementation: str, name: str, layout: str, num_shards: int) -> None:
    check_hidden_keys(HIDDEN[name], layout=layout, num_shards=num_shards, implementation=implementation)


def on_sizes(*of_ring: int) -> Any:
    """These rings on XLA's kernel, the one of one shard and a small one on the others."""
    sizes = {name: of_ring if name == "xla" else (1, 2) for name in cases.IMPLEMENTATIONS}
    return pytest.mark.parametrize(
        ("implementation", "num_shards"), [(name, size) for name in sizes for size in sizes[name]]
    )


@on_sizes(1, 8)
def test_queries_beyond_their_length(implementation: str, num_shards: int) -> None:
    # Nobody asks what a query past the end holds; its cotangents are poisoned too.
    case = cases.Case("queries", 42, 42, query_lengths=(42, 23), is_causal=True, num_heads=2, sinks=True)
    clean = cases.make_inputs(case)
    beyond = np.arange(42)[None] >= np.array(case.query_lengths)[:, None]
    poisoned = poison(poison(clean, "query", beyond), "dout", beyond)
    run = lambda x: cases.run_ring(case, x, num_shards=num_shards, implementation=implementation)  # noqa: E731
    got, want = run(poisoned), run(clean)
    assert_equal(got, want)
    assert (got.values["out"][beyond] == 0).all() and (got.values["dquery"][beyond] == 0).all()


RINGS = [("xla", "contiguous", 1), ("xla", "zigzag", 4), ("xla", "striped", 3)]
RINGS += [
    (name, *ring) for name in cases.IMPLEMENTATIONS if name != "xla" for ring in (("contiguous", 1), ("zigzag", 2))
]


@pytest.mark.parametrize("bad", POISONS)
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(("implementation", "layout", "num_shards"), RINGS)
def test_each_query_sees_what_it_attends(
    implementation: str, layout: str, num_shards: int, name: str, bad: float
) -> None:
    # One bad key in the middle, causal window: queries before it and beyond the window stay exact.
    case = cases.Case("query by query", 46, 46, is_causal=True, window=(11, 0), num_heads=2)
    clean = cases.make_inputs(case)
    arrays = dict(clean.arrays)
    arrays[name] = arrays[name].copy()
    arrays[name][0, 21] = bad
    run = lambda x: cases.run_ring(  # noqa: E731
        case, x, layout=layout, num_shards=num_shards, implementation=implementation
    )
    got, want = run(dataclasses.replace(clean, arrays=arrays)), run(clean)
    sees = attended(case, clean)[:, :, 21]
    sees[1] = False  # the bad key is in the first batch row only
    for what in ("out", "lse", "dquery"):
        np.testing.assert_allclose(
            got.values[what][~sees], want.values[what][~sees], rtol=2e-6, atol=2e-6, err_msg=what
        )
    if name == "value":
        np.testing.assert_allclose(got.values["lse"], want.values["lse"], rtol=2e-6, atol=2e-6)
        assert not np.isfinite(got.values["out"][sees]).any()
    elif np.isnan(bad):  # an infinite key may also give a probability of 0 or 1
        assert np.isnan(got.values["lse"][sees]).all()
        assert np.isnan(got.values["out"][sees]).all()
    # A key whose attending queries all stay clear of the bad one has a clean gradient.
    touched = attended(case, clean)[0][sees[0]].any(axis=0)
    for what in ("dkey", "dvalue"):
        np.testing.assert_allclose(got.values[what][0, ~touched], want.values[what][0, ~touched], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got.values[what][1], want.values[what][1], rtol=2e-6, atol=2e-6, err_msg=what)


@pytest.mark.parametrize(
    ("implementation", "num_shards", "sinks"),
    [  # each kernel with and without, each ring too
        (name, size, (number + turn) % 2 == 1)
        for number, name in enumerate(cases.IMPLEMENTATIONS)
        for turn, size in enumerate((1, 3 if name == "xla" else 2))
    ],
)
def test_fully_masked_rows(implementation: str, num_shards: int, sinks: bool) -> None:
    case = cases.Case("dead", 30, 30, is_causal=True, query_lengths=(30, 8), key_lengths=(0, 20), sinks=sinks)
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, num_shards=num_shards, implementation=implementation)
    cases.assert_matches(case, inputs, result)
    dead = ~attended(case, inputs).any(axis=2)
    assert dead[0].all() and dead[1].any() and not dead[1].all()
    got = result.values
    assert (got["out"][dead] == 0).all() and (got["dquery"][dead] == 0).all()
    assert (got["dkey"][0] == 0).all() and (got["dvalue"][0] == 0).all()
    want = inputs.float64["sinks"] if sinks else np.full(case.num_heads, -np.inf)
    lse = got["lse"][dead]
    np.testing.assert_array_equal(lse, np.broadcast_to(want, lse.shape))
