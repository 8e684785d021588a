"""The order in which the ring issues what travels, and how often, as it is traced."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import ringjax
from ringjax.kernels import xla

B, T, N, K, H = 1, 96, 4, 2, 8


def traced(sizes: cases.Sizes, kv_heads: int = K, **config: Any) -> Any:
    """Forward and backward; no hop is in a loop."""
    attend = functools.partial(
        ringjax.ring_attention,
        mesh=cases.mesh_of(sizes),
        axis_name=cases.axes_of(sizes),
        config=cases.config_of("xla", unroll=8, **config),
    )

    def run(query: Any, key: Any, value: Any) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return pull(out)

    return jax.make_jaxpr(run)(
        *(jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, kv_heads, kv_heads))
    )


@pytest.mark.parametrize("sizes", [(3, 2), (2, 2, 2)], ids=str)
def test_sums_of_rounds_within_a_ring_come_home_once(sizes: tuple[int, ...]) -> None:
    """The rounds of an inner ring leave them at the same place: from there each axis brings them home, at the end."""
    found: dict[Any, int] = {}
    for sent in jaxprs.collectives(traced(sizes)):
        if sent.primitive.startswith("ppermute") and sent.dtype == np.float32:
            found[sent.axis] = found.get(sent.axis, 0) + sent.times
    rounds = np.cumprod((1, *sizes[:-1]))
    assert found == {
        f"sp{n}": 2 * (rounds[n] * (size - 1) + 1)  # dK and dV
        for n, size in enumerate(sizes)
    }


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_no_more_permutes_are_under_way_than_every_generation_allows(kv_heads: int) -> None:
    """Four between two barriers, heads halved or tokens: v4, v6e and v7x would have the sixth wait for the first."""
    counts = [0]
    names = [equation.primitive.name for equation, _ in jaxprs.equations(traced(4, kv_heads, direction="both"))]
    for name in names:
        if name == "optimization_barrier":
            counts.append(0)
        counts[-1] += name.startswith("ppermute")
    # K and V, 3 hops in either pass; dK and dV, 3 hops and home; each both ways round.
    assert sum(counts) == 2 * (2 * 2 * 3 + 2 * 4) and max(counts) == 4


@pytest.mark.parametrize(
    ("sizes", "strategy", "final"),
    [((1,), "ring", True), ((2,), "all_to_all", True), ((2,), "ring", False), ((2,), "all_gather", False)],
)
def test_gradients_may_be_rounded_only_where_nothing_is_added_to_them(
    sizes: tuple[int, ...], strategy: str, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, backward = [], xla.backward

    def spy(block: Any, upstream: Any, params: Any, carry: Any, *, finish: bool) -> Any:
        seen.append(params.dkv_final)
        return backward(block, upstream, params, carry, finish=finish)

    monkeypatch.setattr(xla, "backward", spy)
    traced(sizes, strategy=strategy)
    assert seen and set(seen) == {final}
