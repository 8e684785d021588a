"""Few queries against a cache on TPU: against the oracle, in the interpreter; what is read, from the traced program.

`tests/test_tpu_kernel.py` compiles programs for TPUs, and reads from them that nothing puts the cache in another order.
"""

from __future__ import annotations

import itertools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from caches import Problem, run
from cases import Case, Inputs
from jax.core import eval_jaxpr

from ringjax.kernels.base import Block, KernelParams
from ringjax.kernels.tpu import decode
from ringjax.kernels.tpu import kernel as tpu
from ringjax.kernels.tpu.arrangement import arrangement
from ringjax.mask import Mask

# No tile of queries is asked for, that of keys is small.
FEW: dict[str, Any] = {"implementation": "pallas_tpu", "config": (("block_q", None),)}
MQA, SINKS = ("num_kv_heads", 1), ("sinks", True)
# Every order in which a cache lies, with all that a mask of cached queries can hold.
PROBLEMS = {
    "features": Problem(shards=2, layout="striped", queries=2, **FEW),
    "tokens, pairs": Problem(
        shards=2, layout="zigzag", queries=3, counts=(0, 3), dtype=jnp.bfloat16, head_size=128,
        options=(("window", (9, 0)), SINKS), **FEW,
    ),
    "tokens": Problem(shards=1, layout="striped", head_size=256, options=(("soft_cap", 1.5), MQA), **FEW),
    "heads": Problem(
        shards=1, layout="contiguous", queries=2, counts=(1, 2), head_size=128,
        options=(("num_heads", 3), ("num_kv_heads", 3), SINKS), **FEW,
    ),
}  # fmt: skip


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """What the kernel is traced with."""
    calls, forward = [], decode.forward
    monkeypatch.setattr(decode, "forward", lambda block, *rest: (calls.append(block), forward(block, *rest))[1])
    return calls


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_the_oracle(name: str, folded: list[Block]) -> None:
    problem = PROBLEMS[name]
    inputs = problem.inputs()
    cases.assert_matches(problem.case, inputs, run(problem, inputs))
    assert arrangement(folded[0].k).order == name.partition(",")[0]


def test_every_mask(folded: list[Block]) -> None:
    """Few queries of ``ring_attention`` on one device: segments and positions too, and lists of tiles."""
    case = Case(
        "few", 5, 53, is_causal=True, window=(30, 3), soft_cap=2.0, query_lengths=(5, 2), key_lengths=(37, 53),
        segments="pair", positions="pair", sinks=True, value_size=12,
    )  # fmt: skip
    inputs = cases.make_inputs(case)
    got = cases.run_ring(case, inputs, num_shards=1, implementation="pallas_tpu", block_q=None)
    cases.assert_matches(case, inputs, got)
    assert folded


@pytest.mark.parametrize("name", ["features", "tokens, pairs"])  # shares the programs of the test above
def test_a_bad_value_reaches_those_who_attend_to_it(name: str) -> None:
    """And one beyond the length of a row, or in a query that is absent, reaches nobody."""
    problem = PROBLEMS[name]
    clean, counts = problem.inputs(), problem.counts or (problem.queries,) * 2
    arrays = {name: np.array(x) for name, x in clean.arrays.items()}
    for row, (length, count) in enumerate(zip(problem.lengths, counts, strict=True)):
        arrays["key"][row, length:] = arrays["value"][row, length:] = np.nan
        arrays["query"][row, count:] = np.nan
    last = problem.lengths[1] - 1  # the key of the last query, to which no other attends
    arrays["value"][1, last, 0, 2] = np.inf
    got, want = (run(problem, Inputs(x, clean.masks)).values["out"] for x in (arrays, clean.arrays))
    heads = problem.case.num_heads // problem.case.num_kv_heads
    assert np.isnan(got[1, problem.queries - 1, :heads, 2]).all()
    got[1, problem.queries - 1, :heads, 2] = want[1, problem.queries - 1, :heads, 2]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("kv_heads", "size"), [(16, 128), (2, 256), (3, 128), (16, 64)])
def test_each_tile_of_the_cache_is_read_once(kv_heads: int, size: int) -> None:
    """By the index maps of the grid, over all of it: as many copies as there are tiles."""
    shape = lambda heads, length: jax.ShapeDtypeStruct((2, heads, length, size), jnp.bfloat16)  # noqa: E731
    q, k = shape(2 * kv_heads, 3), shape(kv_heads, 4096)  # whole tiles: the grid is known
    params = KernelParams(1.0, block_kv=512)
    attend = lambda q, k, v: tpu.forward(Block(q=q, k=k, v=v, mask=Mask()), params, None, finish=True)[:2]  # noqa: E731
    (call,) = [e for e, _ in jaxprs.equations(jax.make_jaxpr(attend)(q, k, k)) if e.primitive.name == "pallas_call"]
    grid = call.params["grid_mapping"].grid
    caches = [m for m in call.params["grid_mapping"].block_mappings if m.array_aval.size == k.size]
    assert len(caches) == 2 * (size // 128 if arrangement(k).order == "tokens" else 1)
    bytes_read = 0
    for mapping in caches:
        closed = mapping.index_map_jaxpr
        index_map = jax.jit(lambda *step, closed=closed: eval_jaxpr(closed.jaxpr, closed.consts, *step))
        steps = [tuple(map(int, index_map(*map(np.int32, step)))) for step in itertools.product(*map(range, grid))]
        copies = [here for here, _ in itertools.groupby(steps)]
        assert len(copies) == len(set(copies))
        bytes_read += len(copies) * mapping.block_aval.size * k.dtype.itemsize
    assert bytes_read == 2 * k.size * k.dtype.itemsize
