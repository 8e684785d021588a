"""Dense attention in float64 numpy, forward and backward, written from the definition.

Everything here is in natural order and imports neither jax nor ringjax: a mistake in the library's masks,
merges or gradients cannot cancel itself out against this file.

With s = scale * q.k, z = cap * tanh(s / cap) (or z = s), and A_i the set of keys that query i attends:

    lse_i = log(sum_{j in A_i} exp(z_ij) + exp(sink))      out_i = sum_{j in A_i} exp(z_ij - lse_i) v_j
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Pair = Any  # one array for both sides, or a (query, key) pair of arrays


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Cotangents of the inputs; `sinks` is None when there were no sinks."""

    query: Array
    key: Array
    value: Array
    sinks: Array | None
    sink_terms: Array | None  # sum of the magnitudes of what `sinks` sums over all rows


def attends(
    batch: int,
    query_length: int,
    key_length: int,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: Sequence[int] | Array | None = None,
    key_value_seq_lengths: Sequence[int] | Array | None = None,
    segment_ids: Pair = None,
    positions: Pair = None,
) -> Array:
    """Returns the boolean [B, T, S] of who attends to whom."""
    row, column = np.arange(query_length), np.arange(key_length)
    mask = np.ones((batch, query_length, key_length), bool)

    where = (row, column) if positions is None else _pair(positions)
    query_at = np.broadcast_to(where[0], (batch, query_length))[:, :, None].astype(np.int64)
    key_at = np.broadcast_to(where[1], (batch, key_length))[:, None, :].astype(np.int64)
    if is_causal:
        mask &= key_at <= query_at
    if local_window_size is not None:
        one = local_window_size
        left, right = one if isinstance(one, tuple) else (one, one)
        mask &= (key_at >= query_at - left) & (key_at <= query_at + right)

    if segment_ids is not None:
        query_id, key_id = _pair(segment_ids)
        mask &= np.asarray(query_id)[:, :, None] == np.asarray(key_id)[:, None, :]
    if query_seq_lengths is not None:
        mask &= row[None, :, None] < np.asarray(query_seq_lengths)[:, None, None]
    if key_value_seq_lengths is not None:
        mask &= column[None, None, :] < np.asarray(key_value_seq_lengths)[:, None, None]
    return mask


def forward(query: Array, key: Array, value: Array, **options: Any) -> tuple[Array, Array]:
    """Returns out [B, T, N, Hv] and lse [B, T, N]."""
    p, lse, _ = _probabilities(query, key, options)
    out = np.einsum("bnts,bsnv->btnv", p, _per_query_head(value, query))
    return out, lse.transpose(0, 2, 1)


def backward(query: Array, key: Array, value: Array, dout: Array, dlse: Array, **options: Any) -> Gradients:
    """Returns the gradients for cotangents dout [B, T, N, Hv] and dlse [B, T, N].

    dP = dout v^T and dz = P (dP - delta + dlse) with delta = sum_j P dP; a sink is one more logit whose value
    vector is zero, so its dP is 0.
    """
    scale, cap = _scale(query, options), options.get("logits_soft_cap")
    p, lse, slope = _probabilities(query, key, options)
    k, v = _per_query_head(key, query), _per_query_head(value, query)
    dlse = np.asarray(dlse, np.float64).transpose(0, 2, 1)[..., None]

    dv = np.einsum("bnts,btnv->bsnv", p, dout)
    dp = np.einsum("btnv,bsnv->bnts", dout, v)
    delta = np.sum(p * dp, axis=-1, keepdims=True)
    dz = p * (dp - delta + dlse)
    ds = dz if cap is None else dz * slope
    dq = scale * np.einsum("bnts,bsnh->btnh", ds, k)
    dk = scale * np.einsum("bnts,btnh->bsnh", ds, query)

    dsinks = sink_terms = None
    if options.get("sinks") is not None:
        sinks = np.asarray(options["sinks"], np.float64)[None, :, None]
        terms = np.exp(sinks - lse)[..., None] * (dlse - delta)
        dsinks, sink_terms = np.sum(terms, axis=(0, 2, 3)), np.sum(np.abs(terms), axis=(0, 2, 3))
    return Gradients(dq, _sum_groups(dk, key), _sum_groups(dv, value), dsinks, sink_terms)


def _probabilities(query: Array, key: Array, options: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Returns P [B, N, T, S], lse [B, N, T] and dz/ds [B, N, T, S]."""
    options = dict(options)
    scale, cap = _scale(query, options), options.pop("logits_soft_cap", None)
    sinks = options.pop("sinks", None)
    options.pop("scale", None)
    mask = attends(query.shape[0], query.shape[1], key.shape[1], **options)[:, None]

    s = scale * np.einsum("btnh,bsnh->bnts", query, _per_query_head(key, query))
    slope = np.ones_like(s)
    if cap is not None:
        slope = 1.0 - np.tanh(s / cap) ** 2
        s = cap * np.tanh(s / cap)
    s = np.where(mask, s, -np.inf)

    top = np.max(s, axis=-1, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, np.asarray(sinks, np.float64)[None, :, None])
    shift = np.where(np.isfinite(top), top, 0.0)
    unnormalised = np.exp(s - shift[..., None])
    total = unnormalised.sum(-1)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[None, :, None] - shift)
    dead = total == 0
    lse = np.where(dead, -np.inf, shift + np.log(np.where(dead, 1.0, total)))
    return unnormalised / np.where(dead, 1.0, total)[..., None], lse, slope


def _scale(query: Array, options: dict[str, Any]) -> float:
    scale = options.get("scale")
    return query.shape[-1] ** -0.5 if scale is None else scale


def _pair(value: Pair) -> tuple[Array, Array]:
    both = value if isinstance(value, tuple | list) else (value, value)
    return np.asarray(both[0]), np.asarray(both[1])


def _per_query_head(x: Array, query: Array) -> Array:
    """Gives query head n its key/value head n // G."""
    assert query.dtype == x.dtype == np.float64, "the oracle takes float64 only"
    return np.repeat(x, query.shape[2] // x.shape[2], axis=2)


def _sum_groups(x: Array, like: Array) -> Array:
    """The transpose of `_per_query_head`: sums the query heads that share a key/value head."""
    batch, length, heads = x.shape[:3]
    return x.reshape(batch, length, like.shape[2], heads // like.shape[2], -1).sum(3)
