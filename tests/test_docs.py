"""Pages under docs/ whose figures are those of traced programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import ringjax

DOCS = Path(__file__).parents[1] / "docs"


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def received(strategy: str, num_heads: int, num_kv_heads: int, devices: int) -> tuple[float, float]:
    """Bytes that a device receives from others in forward and in backward, of bfloat16, by what is traced."""
    length, size = 48, 8
    q = jnp.zeros((1, length, num_heads, size), jnp.bfloat16)
    k = jnp.zeros((1, length, num_kv_heads, size), jnp.bfloat16)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("sp",))
    config = ringjax.RingConfig(strategy=strategy, unroll=devices, implementation="xla")

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ringjax.ring_attention(q, k, v, mesh=mesh, config=config)

    share = {"ppermute": 1, "all_gather": devices - 1}  # of what goes in; otherwise all but the own part
    totals = []
    for program in (attend, lambda q, k, v: jax.vjp(attend, q, k, v)[1](q)):
        bytes_ = 0.0
        for sent in jaxprs.collectives(jax.make_jaxpr(program)(q, k, k)):
            if sent.shape[-1] == 1:  # the log-sum-exp, which nobody asked for here: XLA leaves it out
                continue
            part = next((n for name, n in share.items() if sent.primitive.startswith(name)), (devices - 1) / devices)
            bytes_ += sent.size * sent.dtype.itemsize * sent.times * part
        totals.append(bytes_ / (length * size))
    return totals[0], totals[1] - totals[0]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "devices"), [(6, 6, 3), (12, 2, 4)])
def test_bytes_of_the_table_of_strategies(num_heads: int, num_kv_heads: int, devices: int) -> None:
    """In units of S D."""
    n, k, c = num_heads, num_kv_heads, devices
    rest, exchanged = (c - 1) / c, 4 * (n / c + k / math.gcd(k, c)) * (c - 1) / c
    wanted = {
        "ring": (4 * k * rest, 12 * k * rest + 4 * k / c),
        "all_gather": (4 * k * rest, 12 * k * rest),
        "all_to_all": (exchanged, exchanged),
    }
    for strategy, figures in wanted.items():
        assert received(strategy, n, k, c) == pytest.approx(figures), strategy
    for formula in ("12 S K D (C-1)/C + 4 S K D / C", "12 S K D (C-1)/C |", "4 S (N/C + K/g) D (C-1)/C"):
        assert formula in text_of("strategies")
