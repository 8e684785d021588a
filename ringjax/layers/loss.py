"""Cross entropy of a sharded sequence, a chunk of every shard at a time, so that the logits never exist whole."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import partial
from . import checks
from .chunks import Chunks
from .placement import BATCH, SEQUENCE, TENSOR, Placement


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(logits / cap); None is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def chunked_loss(
    placement: Placement,
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None,
    *,
    chunk: int,
    output_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""sum_t weight_t (logsumexp_v(z_tv) - z_{t target_t}), z_tv = cap(x_t . table_v), and sum_t weight_t.

    Both in float32 or better; :func:`token_losses` has the terms. They are summed over devices together: the sum of the
    weights alone would wait for nothing, and on simulated devices, where XLA orders no independent collectives, some
    would begin it and others the layers, each waiting for the rest.

    Every shard of the sequence is cut into chunks; a scan takes one chunk of every shard at a time and its backward
    computes the logits of that chunk once more. So B * C * chunk * V logits exist at a time, C shards together.

    Args:
      placement: where this runs.
      x: [B, T, E], sharded over batch and sequence.
      table: [V, E], of the parameter dtype. Cast chunk by chunk, so that its gradient is summed in that dtype.
      targets: int [B, T].
      weights: [B, T] or None for 1. What is not 0 counts: a target outside [0, V) gives NaN then; one of weight 0 may
        be anything.
      chunk: tokens of one shard and sequence at a time.
      output_soft_cap: the cap, or None.
    """
    chunks = Chunks.of(placement, targets.shape, chunk)
    wide = partial.wide(x.dtype)
    weights = jnp.ones(targets.shape, wide) if weights is None else weights.astype(wide)
    cross_entropy = _cross_entropy(placement, chunks, table, output_soft_cap)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        x, targets, weights = part
        loss = cross_entropy(x, targets)
        both = jnp.stack([jnp.where(weights != 0, loss, 0) * weights, weights])
        return total + jnp.sum(both, axis=(2, 4)), None

    start = placement.constrain(jnp.zeros((2, chunks.groups, chunks.shards), wide), None, BATCH, SEQUENCE)
    parts = (chunks.cut(x), chunks.cut(checks.as_index(targets)), chunks.cut(weights))
    sums, _ = jax.lax.scan(step, start, parts)
    total, count = jnp.sum(sums, axis=(1, 2))
    return total, count


def token_losses(
    placement: Placement,
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    output_soft_cap: float | None = None,
) -> jax.Array:
    """The cross entropy of each token, [B, T], by chunks as :func:`chunked_loss`; NaN for a target outside [0, V)."""
    chunks = Chunks.of(placement, targets.shape, chunk)
    cross_entropy = _cross_entropy(placement, chunks, table, output_soft_cap)
    parts = (chunks.cut(x), chunks.cut(checks.as_index(targets)))
    _, losses = jax.lax.scan(lambda _, part: (None, cross_entropy(*part)), None, parts)
    return placement.constrain(chunks.joined(losses), BATCH, SEQUENCE)


def _cross_entropy(
    placement: Placement, chunks: Chunks, table: jax.Array, output_soft_cap: float | None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(x, targets) of one chunk of every shard -> the cross entropy of each token."""
    # One copy of the table for every shard of the tokens. Nothing is copied (each device has its own), but its gradient
    # is now summed over devices once, after the scan, and not chunk by chunk.
    table = placement.constrain(table, TENSOR, None)
    copies = jnp.broadcast_to(table[None, None], (chunks.groups, chunks.shards, *table.shape))
    copies = placement.constrain(copies, BATCH, SEQUENCE, TENSOR, None)

    def of_chunk(x: jax.Array, targets: jax.Array) -> jax.Array:
        wide = partial.wide(x.dtype)
        # To "gbctv" einsum would multiply the table with x, for which XLA for CPUs transposes the logits.
        logits = jnp.einsum("gbcte,gcve->gcbtv", x, copies.astype(x.dtype), preferred_element_type=wide)
        logits = soft_cap(jnp.swapaxes(logits, 1, 2), output_soft_cap)
        logits = placement.constrain(logits, BATCH, None, SEQUENCE, None, TENSOR)
        words = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None, None, None, :]
        # A masked sum, not a gather: it stays local where the vocabulary is sharded.
        hit = jnp.sum(jnp.where(words == targets[..., None], logits, 0), axis=-1)
        known = (targets >= 0) & (targets < logits.shape[-1])  # a target that is no word has no cross entropy
        return jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - hit, jnp.nan)

    return of_chunk
