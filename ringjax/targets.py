"""Next-token targets of tokens in ring order. Index maths on whole arrays; on shards, runs' first tokens travel."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from . import _compat
from .arguments import axes_are_manual, check_axis_names
from .deal import Deal
from .layout import Layout, as_layout, ring_order
from .ring import rotate
from .schedule import needed_keys

_INT32_MAX = 2**31 - 1


def shift_targets(
    tokens: Int[Array, "... T"],
    *,
    layout: str | Layout = "contiguous",
    num_shards: int | None = None,
    axis_name: str | tuple[str, ...] = "sp",
    segment_ids: Int[Array, "... T"] | None = None,
    seq_lengths: Int[Array, "..."] | None = None,
    fill: int = 0,
) -> tuple[Int[Array, "... T"], Bool[Array, "... T"]]:
    r"""What follows each token of sequences in ring order, in ring order too: the targets of a language model.

    .. math::  target_i = token_j \text{ with } position_j = position_i + 1

    A token has no target if it is the last one of its sequence or of its document.

    One function inside and outside ``shard_map``. Outside, arrays are whole and of any length (in the order that
    :func:`ring_positions` gives), and nothing but ``layout`` and ``num_shards`` is needed. numpy arrays stay numpy
    arrays: in a data pipeline that is all. A whole JAX array that is sharded over devices is permuted by XLA, which may
    gather all tokens on each of them. Inside (or under ``vmap(axis_name=...)``) arrays are this device's shards, and
    only the first token of each run of consecutive ones is sent to the rank that needs it: one or two for each
    sequence, but of a striped layout L / stripe.

    Args:
      tokens: integers [..., T], of any integer dtype, the sequence last.
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of devices on the ring. Inside, it is that of ``axis_name``, and need not be given.
      axis_name: mesh axis of the sequence, or several, outermost first, as in :func:`ring_attention`. If they are
        manual here, the arrays are shards.
      segment_ids: integers [..., T], in ring order: documents. The last token of one has no target.
      seq_lengths: integers [...], lengths of the whole sequences: the last token before that length has no target, nor
        have those beyond it. So padding takes no part.
      fill: what targets are where there is none.

    Returns:
      (targets, mask), both [..., T]: in the dtype of ``tokens``; bool, whether there is a target. They go into
      :meth:`ringjax.nnx.Decoder.loss` as they are.

    Raises:
      ValueError: for arguments that do not fit, naming the argument, what is required and what was given.
      NotImplementedError: inside, for sequences of 2^31 tokens or more.

    Source: runs of layouts, Brandon et al. 2023, arXiv:2311.09431.
    """
    tokens = _integers("tokens", tokens)
    if not tokens.ndim or not tokens.shape[-1]:
        raise ValueError(f"tokens must have shape [..., T], at least one token. Got {tokens.shape}.")
    segments = lengths = None
    if segment_ids is not None:
        segments = _integers("segment_ids", segment_ids)
        if segments.shape != tokens.shape:
            raise ValueError(f"segment_ids must have the shape of tokens, {tokens.shape}. Got {segments.shape}.")
    if seq_lengths is not None:
        lengths = _integers("seq_lengths", seq_lengths)
        if lengths.shape != tokens.shape[:-1]:
            raise ValueError(
                f"seq_lengths must have the shape of tokens but for T, {tokens.shape[:-1]}. Got {lengths.shape}."
            )
    limits = np.iinfo(tokens.dtype)
    if not isinstance(fill, numbers.Integral) or isinstance(fill, bool) or not limits.min <= fill <= limits.max:
        raise ValueError(f"fill must be an integer that {tokens.dtype.name} holds. Got {fill!r}.")
    axes, layout = check_axis_names(axis_name), as_layout(layout)
    if axes_are_manual(axes):
        result = _on_shards(tokens, segments, lengths, layout, axes, num_shards)
    else:
        result = _on_whole(tokens, segments, lengths, layout, axes, num_shards)
    following, there = result
    where: Any = np.where if isinstance(following, np.ndarray) else jnp.where
    return where(there, following, np.asarray(fill, tokens.dtype)), there


def _integers(name: str, x: Any) -> Any:
    """As an array; numpy stays numpy, of whatever width."""
    x = x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must have an integer dtype. Got {x.dtype.name}.")
    return x


def _on_whole(
    tokens: Any, segments: Any, lengths: Any, layout: Layout, axes: tuple[str, ...], num_shards: Any
) -> tuple[Any, Any]:
    """(the following token, whether there is one), by the inverse of the permutation."""
    if not isinstance(num_shards, (int, np.integer)) or isinstance(num_shards, bool) or num_shards < 1:
        raise ValueError(
            "num_shards must be a positive integer outside shard_map (no axis "
            f"{', '.join(map(repr, axes))} is manual here). Got {num_shards!r}."
        )
    length = tokens.shape[-1]
    positions = ring_order(length, layout, int(num_shards))
    place = np.empty_like(positions)
    place[positions] = np.arange(length, dtype=np.int32)
    after = place[np.minimum(positions + 1, length - 1)]
    there: Any = np.broadcast_to(positions + 1 < length, tokens.shape)
    if lengths is not None:
        broadcast = np.broadcast_to if isinstance(lengths, np.ndarray) else jnp.broadcast_to
        there = there & (np.broadcast_to(positions + 1, tokens.shape) < broadcast(lengths[..., None], tokens.shape))
    if segments is not None:
        there = there & (_take(segments, after) == segments)
    following = _take(tokens, after)
    return following, there if isinstance(following, np.ndarray) else jnp.asarray(there)


def _take(x: Any, index: np.ndarray) -> Any:
    return np.take(x, index, axis=-1) if isinstance(x, np.ndarray) else _compat.take(x, index, x.ndim - 1)


def _on_shards(
    tokens: Any, segments: Any, lengths: Any, layout: Layout, axes: tuple[str, ...], num_shards: Any
) -> tuple[Array, Array]:
    """The same for this rank's tokens. Within a run the next one is at hand; what follows a run is the head of one."""
    sizes, length = tuple(jax.lax.axis_size(axis) for axis in axes), tokens.shape[-1]
    _check_shards(layout, axes, sizes, length, num_shards)
    tokens, segments, lengths = _vary_over_ranks((tokens, segments, lengths), axes)
    deal = Deal(layout, sizes, (False,) * len(sizes), length)
    place = tuple(jax.lax.axis_index(axis) for axis in axes)
    runs = _runs(deal, place)
    rows, run = tokens.shape[:-1], runs.run
    by_run = lambda x: x.reshape(*rows, length // run, run)  # noqa: E731
    own = [by_run(x) for x in (tokens, segments) if x is not None]
    heads = [x[..., 0] for x in own]

    @functools.cache
    def arrived(offset: tuple[int, ...]) -> list[Array]:
        """Heads of the device so far away, axis by axis; the innermost first, which several have in common."""
        axis = next((n for n, shift in enumerate(offset) if shift), None)
        if axis is None:
            return heads
        rest = (*offset[:axis], 0, *offset[axis + 1 :])
        return rotate(arrived(rest), axes[axis], offset[axis], sizes[axis])

    starts = runs.at(jnp.arange(length // run, dtype=jnp.int32) * run)  # positions of the own heads
    found, ends = jnp.zeros(starts.shape, bool), [jnp.zeros_like(x) for x in heads]
    for offset in _neighbours(deal):
        owner = tuple((at + shift) % size for at, shift, size in zip(place, offset, sizes, strict=True))
        index = _runs(deal, owner).find(starts + run)
        here = index < length
        ends = [jnp.where(here, jnp.take(x, index // run, axis=-1, mode="clip"), end)
                for x, end in zip(arrived(offset), ends, strict=True)]  # fmt: skip
        found = found | here
    joined = [jnp.concatenate([x[..., 1:], end[..., None]], axis=-1) for x, end in zip(own, ends, strict=True)]
    at = runs.at(jnp.arange(length, dtype=jnp.int32))
    last = (jnp.arange(length, dtype=jnp.int32) % run) == run - 1
    there = jnp.broadcast_to(~last | jnp.repeat(found, run), tokens.shape)
    following = joined[0].reshape(tokens.shape)
    if segments is not None:
        there = there & (joined[1].reshape(tokens.shape) == segments)
    if lengths is not None:
        at, lengths = jnp.broadcast_to(at + 1, tokens.shape), lengths[..., None].astype(jnp.int32)
        there = there & (at < jnp.broadcast_to(lengths, tokens.shape))
    return following, there


def _check_shards(layout: Layout, axes: tuple[str, ...], sizes: tuple[int, ...], length: int, num_shards: Any) -> None:
    count, unit = math.prod(sizes), layout.shard_unit()
    if num_shards is not None and (isinstance(num_shards, bool) or num_shards != count):
        named = ", ".join(map(repr, axes))
        raise ValueError(
            f"num_shards must be None or {count}, the devices on {'axis' if len(axes) == 1 else 'axes'} {named}, "
            f"inside shard_map. Got {num_shards!r}."
        )
    if length % unit:
        raise ValueError(f"tokens: the length of a shard must be a multiple of {unit} for {layout}. Got {length}.")
    if length * count > _INT32_MAX:
        raise NotImplementedError(
            "tokens: the whole sequence must be shorter than 2^31 tokens, whose positions are int32. "
            f"Got {count} shards of {length}."
        )


def _vary_over_ranks(tree: Any, axes: tuple[str, ...]) -> Any:
    """Arrays, typed under check_vma as what follows them is: by rank. An axis of vmap types nothing."""
    typed = frozenset(axes).intersection(_compat.manual_axes() if _compat.checks_varying_axes() else ())
    return jax.tree.map(lambda x: _compat.vary_over(jnp.asarray(x), typed), tree)


def _runs(deal: Deal, place: tuple[Any, ...]) -> Any:
    """Of the device at ``place``; a shard that is merged with no other has them in every layout."""
    runs = deal.runs(place)
    assert runs is not None
    return runs


@functools.lru_cache(maxsize=256)
def _neighbours(deal: Deal) -> tuple[tuple[int, ...], ...]:
    """Where, on the axes, the token after one's own may lie: offsets of devices."""
    return tuple(needed_keys(deal, deal, 0, 1))
