"""Dense layers in plain jnp, written from the definitions, in natural order. Imports nothing from ringjax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

Weights = Mapping[str, Mapping[str, Any]]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    size = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + eps)
    return x / size * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def rope(x: jax.Array, positions: np.ndarray, theta: float) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of x [B, T, N, H], with angles computed in float64."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    at = np.broadcast_to(positions, x.shape[:2]).astype(np.float64)
    angle = (at[:, :, None] * frequency)[:, :, None, :]
    turn = jnp.asarray(np.exp(1j * angle).astype(np.complex64))
    turned = jax.lax.complex(x[..., :half], x[..., half:]) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    **who: Any,
) -> jax.Array:
    """Attention as it is written in the textbook; `who` goes to oracle.attends. Rows with no key give 0."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    mask = oracle.attends(q.shape[0], q.shape[1], k.shape[1], **who)[:, None]
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    extra = None if sinks is None else jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))
    e = jnp.exp(s) * jnp.asarray(mask, s.dtype)
    total = e.sum(-1, keepdims=True) + (0.0 if extra is None else jnp.exp(extra))
    return jnp.einsum("bnts,bsnh->btnh", e / jnp.where(total == 0, 1.0, total), v)


def attention_layer(
    weights: Weights,
    x: jax.Array,
    *,
    rope_theta: float | None = 10000.0,
    norm_eps: float = 1e-6,
    positions: np.ndarray | None = None,
    **options: Any,
) -> jax.Array:
    """Projections, normed heads, RoPE, attention, output projection; what is not among the weights is left out."""

    def project(name: str) -> jax.Array:
        y = jnp.einsum("bte,enh->btnh", x, weights[name]["kernel"])
        return y + weights[name]["bias"][None, None] if "bias" in weights[name] else y

    q, k, v = project("query"), project("key"), project("value")
    if "query_norm" in weights:
        q = rms_norm(q, weights["query_norm"]["scale"], norm_eps)
        k = rms_norm(k, weights["key_norm"]["scale"], norm_eps)
    at = np.arange(x.shape[1]) if positions is None else np.asarray(positions)
    if rope_theta is not None:
        q, k = rope(q, at, rope_theta), rope(k, at, rope_theta)
    if "sinks" in weights:
        options["sinks"] = weights["sinks"]["logit"]
    out = softmax_attention(q, k, v, positions=at, **options)
    out = jnp.einsum("btnh,nhe->bte", out, weights["out"]["kernel"])
    return out + weights["out"]["bias"][None, None] if "bias" in weights["out"] else out


def decoder(params: Mapping[str, Any], tokens: jax.Array, *, norm_eps: float, **options: Any) -> jax.Array:
    """Logits of a Llama-architecture decoder whose blocks' parameters are stacked along their first axis."""

    def layer(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
        y = rms_norm(x, block["attention_norm"]["scale"], norm_eps)
        x = x + attention_layer(block["attention"], y, is_causal=True, **options)
        y = rms_norm(x, block["mlp_norm"]["scale"], norm_eps)
        gate, up = y @ block["gate"]["kernel"], y @ block["up"]["kernel"]
        return x + (gate * jax.nn.sigmoid(gate) * up) @ block["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, params["embedding"]["kernel"][tokens], params["blocks"])
    x = rms_norm(x, params["norm"]["scale"], norm_eps)
    table = params["output" if "output" in params else "embedding"]["kernel"]
    return x @ table.T


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean of -log softmax(logits)[target]."""
    log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights) / jnp.sum(weights)
