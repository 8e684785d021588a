"""A dense decoder with every option of pretrained families, from the definitions. Imports nothing from ringjax.

Written to be run in float64 (under jax.enable_x64), in natural order, layer by layer; frequencies in plain Python.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dense_layers import softmax_attention


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer has of its own: its parameters, the frequencies [R / 2] and their amplitude, the window."""

    weights: Mapping[str, Any]
    frequencies: Sequence[float]
    amplitude: float = 1.0
    window: int | None = None  # tokens before it that a token attends to


def base_frequencies(theta: float, turning: int) -> list[float]:
    return [theta ** (-2 * i / turning) for i in range(turning // 2)]


def llama3(theta: float, turning: int, factor: float, low: float, high: float, length: int) -> list[float]:
    found = []
    for f in base_frequencies(theta, turning):
        wave = 2 * math.pi / f
        if wave < length / high:
            found.append(f)
        elif wave > length / low:
            found.append(f / factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append((1 - smooth) * f / factor + smooth * f)
    return found


def yarn(
    theta: float, turning: int, factor: float, length: int, fast: float, slow: float, whole: bool = True
) -> list[float]:
    def place(turns: float) -> float:
        """Where theta^(-2 i / R) length = 2 pi turns."""
        return turning * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = place(fast), place(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turning - 1)
    found = []
    for i, f in enumerate(base_frequencies(theta, turning)):
        divided = min(max((i - first) / (last - first), 0.0), 1.0)
        found.append(f * (1 - divided) + f / factor * divided)
    return found


def dynamic(theta: float, turning: int, factor: float, trained: int, length: int) -> list[float]:
    grown = theta * (factor * max(length, trained) / trained - (factor - 1)) ** (turning / (turning - 2))
    return base_frequencies(grown, turning)


def norm(x: jax.Array, weights: Mapping[str, Any], eps: float) -> jax.Array:
    size = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + eps)
    return x / size * weights["scale"].reshape((1,) * (x.ndim - 1) + weights["scale"].shape)


def turn(x: jax.Array, layer: Layer) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + R/2}) of the first R features of x [B, T, N, H]."""
    half = len(layer.frequencies)
    angle = np.arange(x.shape[1])[:, None] * np.asarray(layer.frequencies, np.float64)
    by = jnp.asarray(layer.amplitude * np.exp(1j * angle), np.result_type(np.complex64, x.dtype))[None, :, None, :]
    turned = jax.lax.complex(x[..., :half], x[..., half : 2 * half]) * by
    return jnp.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def project(x: jax.Array, weights: Mapping[str, Any], letters: str) -> jax.Array:
    y = jnp.einsum(letters, x, weights["kernel"])
    if "bias" not in weights:
        return y
    return y + weights["bias"].reshape((1,) * (y.ndim - weights["bias"].ndim) + weights["bias"].shape)


def decoder(
    layers: Sequence[Layer],
    embedding: jax.Array,
    norm_weights: Mapping[str, Any],
    output: jax.Array,
    tokens: jax.Array,
    *,
    eps: float,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    output_soft_cap: float | None = None,
    gelu: bool = False,
    embedding_scale: float = 1.0,
) -> jax.Array:
    """Logits [B, T, V]; what is not among a layer's weights is left out."""
    x = embedding[tokens] * embedding_scale
    for layer in layers:
        w = layer.weights
        y = norm(x, w["attention_norm"], eps)
        attention = w["attention"]
        q, k, v = (project(y, attention[name], "bte,enh->btnh") for name in ("query", "key", "value"))
        if "query_norm" in attention:
            q, k = norm(q, attention["query_norm"], eps), norm(k, attention["key_norm"], eps)
        y = softmax_attention(
            turn(q, layer),
            turn(k, layer),
            v,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            sinks=attention["sinks"]["logit"] if "sinks" in attention else None,
            is_causal=True,
            local_window_size=None if layer.window is None else (layer.window, 0),
        )
        y = project(y, attention["out"], "btnh,nhe->bte")
        x = x + (norm(y, w["attention_post_norm"], eps) if "attention_post_norm" in w else y)
        y = norm(x, w["mlp_norm"], eps)
        gate = project(y, w["gate"], "bte,em->btm")
        if gelu:
            gate = 0.5 * gate * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + jnp.exp(-gate))
        y = project(gate * project(y, w["up"], "bte,em->btm"), w["down"], "btm,me->bte")
        x = x + (norm(y, w["mlp_post_norm"], eps) if "mlp_post_norm" in w else y)
    logits = jnp.einsum("bte,ve->btv", norm(x, norm_weights, eps), output)
    return logits if output_soft_cap is None else output_soft_cap * jnp.tanh(logits / output_soft_cap)
