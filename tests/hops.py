"""A block kernel by itself, as a ring of two would call it: a hop of some keys, then one of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

from ringjax.kernels.base import Block, Upstream
from ringjax.layout import Runs
from ringjax.mask import Mask, Tokens

# Lengths that few tiles divide; a mask that is the same in all rows, ranges of tiles, and lists of them.
LARGE = {
    "full": cases.Case("full", 600, 700, 4, 2, 64, 32, batch=1),
    "full, whole tiles": cases.Case("full, whole tiles", 512, 1024, 4, 2, 64, 32, batch=2),  # known to need no list
    "ranges": cases.Case(
        "ranges", 600, 700, 4, 2, 64, 32, is_causal=True, window=(400, 0), query_lengths=(600, 350),
        key_lengths=(700, 290), batch=2,
    ),
    "lists": cases.Case(
        "lists", 600, 700, 4, 2, 64, 32, is_causal=True, window=(400, 0), segments="pair", soft_cap=1.5, batch=2
    ),
}  # fmt: skip


def in_two_hops(
    case: cases.Case, inputs: cases.Inputs, forward: Callable[..., Any], backward: Callable[..., Any]
) -> cases.Result:
    """Both passes in one program: ``forward(block, carry, finish=)`` and ``backward(block, upstream, carry)``."""
    names = ("query", "key", "value", "dout", "dlse")
    run = jax.jit(lambda arrays, segments: _run(case, arrays, segments, forward, backward))
    got = run({name: inputs.arrays[name] for name in names}, inputs.masks.get("segment_ids"))
    values = {name: np.swapaxes(np.asarray(x), 1, 2).astype(np.float64) for name, x in got.items()}
    return cases.Result(values, {name: x.dtype for name, x in got.items()})


def _run(
    case: cases.Case, arrays: dict[str, jax.Array], segments: Any, forward: Callable[..., Any], backward: Any
) -> dict[str, Any]:
    """out, lse and gradients, heads before tokens. Segments are of queries and of keys."""
    heads = {name: jnp.swapaxes(x, 1, 2) for name, x in arrays.items()}
    cut = 300 if case.key_length % 512 else 512
    blocks = [
        Block(
            q=heads["query"],
            k=heads["key"][:, :, start:stop],
            v=heads["value"][:, :, start:stop],
            mask=mask_of(case, segments, start, stop),
        )
        for start, stop in ((0, cut), (cut, case.key_length))
    ]
    carry: Any = None
    for number, block in enumerate(blocks):
        carry = forward(block, carry, finish=number == 1)
    out, lse, saved, rest, _ = carry
    wide_out = out.astype(lse.dtype) + (0.0 if rest is None else rest.astype(lse.dtype))
    delta = jnp.sum(wide_out * heads["dout"].astype(lse.dtype), axis=-1) - heads["dlse"]
    dq, sums = None, []
    for block in blocks:
        dq, dk, dv = backward(block, Upstream(heads["dout"], lse, delta, saved), dq)
        sums.append((dk, dv))
    dk, dv = (jnp.concatenate(parts, axis=2) for parts in zip(*sums, strict=True))
    grads = {"dquery": dq, "dkey": dk, "dvalue": dv}
    return {"out": out, "lse": lse, **{name: x.astype(out.dtype) for name, x in grads.items()}}


def mask_of(case: cases.Case, segments: Any, start: int, stop: int) -> Mask:
    """Between all queries and the keys from ``start`` to ``stop``."""
    left = case.window[0] if isinstance(case.window, tuple) else None
    queries, keys = (None, None) if segments is None else segments
    lengths = lambda given: None if given is None else jnp.asarray(given, jnp.int32)  # noqa: E731
    kv_lengths = lengths(case.key_lengths)

    def side(first: int, last: int, segments: Any, length: Any) -> Tokens:
        runs = Runs(base=first, step=last - first, run=last - first, length=last - first)
        return Tokens(
            positions=runs if case.is_causal else None,
            segments=None if segments is None else segments[:, first:last],
            length=length,
        )

    return Mask(
        queries=side(0, case.query_length, queries, lengths(case.query_lengths)),
        keys=side(start, stop, keys, None if kv_lengths is None else jnp.clip(kv_lengths - start, 0, stop - start)),
        left=left,
        right=0 if case.is_causal else None,
    )
