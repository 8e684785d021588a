"""Attention to a cache as a problem for the oracle; what tests of the cache share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cases
import jax.numpy as jnp
import numpy as np
from cases import Case, Inputs, Result

import ringjax
from ringjax import KVCache, cached_attention

CAPACITY = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Queries at the end of a cache whose rows have these lengths; of the queries each row has the first ``counts``."""

    shards: int
    layout: Any
    queries: int = 1
    travels: str | None = None  # None: the queries are on every rank
    lengths: tuple[int, int] = (17, 33)
    counts: tuple[int, int] | None = None
    implementation: str = "xla"
    dtype: Any = jnp.float32
    capacity_asked: int = CAPACITY
    head_size: int | None = None  # of keys and values; None: small ones that differ
    options: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()  # where it is not that of the kernel's profile

    @property
    def capacity(self) -> int:
        return ringjax.KVCache.empty(1, self.capacity_asked, 1, 1, layout=self.layout, num_shards=self.shards).capacity

    @property
    def case(self) -> Case:
        sizes = (
            {"value_size": 4} if self.head_size is None else dict.fromkeys(("head_size", "value_size"), self.head_size)
        )
        return Case("cached", self.queries, self.capacity, is_causal=True, **sizes, **dict(self.options))

    def inputs(self) -> Inputs:
        drawn = cases.make_inputs(self.case, self.dtype)
        lengths = np.array(self.lengths, np.int32)
        counts = np.array(self.counts or (self.queries,) * 2, np.int32)
        at = (lengths - counts)[:, None] + np.arange(self.queries)
        keys = np.broadcast_to(np.arange(self.capacity), (2, self.capacity))
        masks = {"query_seq_lengths": counts, "key_value_seq_lengths": lengths, "positions": (at, keys)}
        return Inputs(drawn.arrays, masks)


@functools.cache
def _program(problem: Problem, as_users: bool) -> Any:
    """The compiled program (arrays, lengths, counts) -> out, lse and gradients, all in ring order."""
    case, mesh = problem.case, cases.mesh_of(problem.shards)
    dealt = problem.travels is not None
    layout = KVCache.empty(1, 1, 1, 1, layout=problem.layout).layout
    options: dict[str, Any] = case.static_options()
    options.pop("is_causal")
    config = cases.config_of(problem.implementation, **dict(problem.config))

    def program(arrays: Any, lengths: Any, counts: Any) -> Any:
        def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            cache = KVCache(key=key, value=value, lengths=lengths, layout=layout, num_shards=problem.shards)
            return cached_attention(
                query, cache, counts=counts, dealt=dealt, travels=problem.travels, mesh=mesh, sinks=sinks,
                return_residual=True, config=config, **options,
            )  # fmt: skip

        return cases.value_and_gradients(attend, arrays)

    return cases.compiled(program, as_users=as_users)


def run(problem: Problem, inputs: Inputs, *, as_users: bool = False) -> Result:
    """out, lse and all gradients, in natural order. Who asks alike shares a program."""
    case, dealt = problem.case, problem.travels is not None
    order, key_order = cases.orders(case, problem.layout, problem.shards)
    order = order if dealt else np.arange(problem.queries)
    ring = cases.to_ring(inputs, order, key_order)
    counts = None if problem.counts is None else inputs.masks["query_seq_lengths"]
    got = _program(problem, as_users)(dict(ring.arrays), inputs.masks["key_value_seq_lengths"], counts)
    back = dict.fromkeys(("dkey", "dvalue"), np.argsort(key_order))
    natural = {
        name: np.asarray(x).astype(np.float64)
        if name == "dsinks"
        else np.asarray(x).astype(np.float64)[:, back.get(name, np.argsort(order))]
        for name, x in got.items()
    }
    return Result(natural, {name: x.dtype for name, x in got.items()})
