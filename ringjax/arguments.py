"""Checks the arguments of ring_attention and brings them into one form.

Every error names the argument, what is required and what was given.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from . import _compat

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_INT32_MAX = 2**31 - 1


class Arrays(NamedTuple):
    """The array arguments of one call, or None where not given. A pytree; batch rows may be 1 for positions, segments.

    Local shards inside shard_map, global arrays outside. B1 is B or 1.
    """

    query: Array  # [B, T, N, H]
    key: Array  # [B, S, K, H]
    value: Array  # [B, S, K, Hv]
    sinks: Array | None  # [N]
    q_positions: Array | None  # int32 [B1, T]
    kv_positions: Array | None  # int32 [B1, S]
    q_segments: Array | None  # int32 [B, T]
    kv_segments: Array | None  # int32 [B, S]
    q_lengths: Array | None  # int32 [B]
    kv_lengths: Array | None  # int32 [B]


def check_qkv(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array]:
    """Query, key and value as arrays of matching shapes and one dtype."""
    names = ("query", "key", "value")
    arrays = tuple(_as_array(name, x) for name, x in zip(names, (query, key, value), strict=True))
    shapes = ", ".join(f"{name} {x.shape}" for name, x in zip(names, arrays, strict=True))
    for name, x, letters in zip(names, arrays, ("[B, T, N, H]", "[B, S, K, H]", "[B, S, K, Hv]"), strict=True):
        if x.ndim != 4:
            raise ValueError(f"{name} must have rank 4, {letters}. Got shape {x.shape}.")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, {letters}. Got shape {x.shape}.")
        if x.dtype.name not in _DTYPES:
            raise ValueError(f"{name} must have a dtype of {', '.join(_DTYPES)}. Got {x.dtype.name}.")
    q, k, v = arrays
    if not q.dtype == k.dtype == v.dtype:
        dtypes = ", ".join(f"{name} {x.dtype.name}" for name, x in zip(names, arrays, strict=True))
        raise ValueError(f"query, key and value must have one dtype. Got {dtypes}.")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"query, key and value must have one batch size (axis 0). Got {shapes}.")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"key and value must have one length (axis 1). Got {shapes}.")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"key and value must have one number of heads (axis 2). Got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "query: the number of heads N must be a multiple of the number of key/value heads K. "
            f"Got N = {q.shape[2]}, K = {k.shape[2]}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have one head size (axis 3). Got {shapes}.")
    return q, k, v


def check_arrays(
    query: Any,
    key: Any,
    value: Any,
    *,
    sinks: Any,
    positions: Any,
    segment_ids: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
) -> Arrays:
    """All array arguments, checked and in one form."""
    q, k, v = check_qkv(query, key, value)
    batch, lengths = q.shape[0], (q.shape[1], k.shape[1])
    sinks = check_sinks(sinks, q.shape[2])
    return Arrays(
        q, k, v, sinks,
        *_pair("positions", positions, batch, lengths, batch_free=True),
        *_pair("segment_ids", segment_ids, batch, lengths, batch_free=False),
        _lengths("query_seq_lengths", query_seq_lengths, batch),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
    )  # fmt: skip


def check_sinks(sinks: Any, heads: int) -> Array | None:
    """One logit for every query head."""
    if sinks is None:
        return None
    sinks = _as_array("sinks", sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks must be a floating-point array of shape [N] = ({heads},), a logit for every query head. "
            f"Got {sinks.dtype.name} {sinks.shape}."
        )
    return sinks


def _pair(
    name: str, given: Any, batch: int, lengths: tuple[int, int], *, batch_free: bool
) -> tuple[Array | None, Array | None]:
    """One integer array for query and key alike, or one for each."""
    if given is None:
        return None, None
    pair = isinstance(given, (tuple, list))
    if pair and len(given) != 2:
        raise ValueError(f"{name} must be one array or a pair (query, key). Got a sequence of {len(given)}.")
    if not pair and lengths[0] != lengths[1]:
        raise ValueError(
            f"{name} must be a pair (query, key) where query and key differ in length. "
            f"Got one array for T = {lengths[0]}, S = {lengths[1]}."
        )
    result = []
    for part, side, length in zip(given if pair else (given, given), ("query", "key"), lengths, strict=True):
        label = f"{name} ({side})" if pair else name
        x = as_integers(label, part)
        shapes = [(batch, length)] + ([(length,)] if batch_free else [])
        if x.shape not in shapes:
            raise ValueError(f"{label} must have shape {' or '.join(map(str, shapes))}. Got {x.shape}.")
        result.append(x if x.ndim == 2 else x[None])
    return result[0], result[1]


def _lengths(name: str, given: Any, batch: int) -> Array | None:
    if given is None:
        return None
    x = as_integers(name, given)
    if x.shape != (batch,):
        raise ValueError(f"{name} must have shape [B] = ({batch},). Got {x.shape}.")
    return x


def _as_array(name: str, x: Any) -> Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array. Got {type(x).__name__}.") from error


def as_integers(name: str, x: Any) -> Array:
    """int32. Wider integers are taken where their values can be seen, and fit: a cast would wrap without a word."""
    return _as_array(name, fitting_integers(name, x)).astype(jnp.int32)


def fitting_integers(name: str, x: Any) -> Array | np.ndarray:
    """The same where it is, of a dtype that int32 holds."""
    given = x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"{name} must have an integer dtype. Got {given.dtype.name}.")
    if not np.can_cast(given.dtype, np.int32):
        if isinstance(given, Tracer):
            raise ValueError(
                f"{name} must fit int32: cast a traced array with .astype('int32'). Got {given.dtype.name}."
            )
        low, high = (int(given.min()), int(given.max())) if given.size else (0, 0)
        if low < -_INT32_MAX - 1 or high > _INT32_MAX:
            raise ValueError(f"{name} must fit int32. Got values from {low} to {high}.")
        given = given.astype(np.int32)
    return given


def check_axis_names(axis_name: Any) -> tuple[str, ...]:
    """The mesh axes of the sequence, outermost first."""
    axes = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if not axes or not all(isinstance(axis, str) for axis in axes) or len(set(axes)) != len(axes):
        raise ValueError(
            f"axis_name must be the name of a mesh axis, or several different ones, outermost first. Got {axis_name!r}."
        )
    return axes


def axes_are_manual(axes: tuple[str, ...]) -> bool:
    """Whether this is inside a shard_map or vmap over all of these axes; False: of none of them."""
    bound = [axis for axis in axes if _compat.axis_is_bound(axis)]
    if bound and len(bound) < len(axes):
        raise ValueError(
            f"axis_name: either all of its axes must be manual here (inside shard_map or vmap) or none. Got {axes!r}, "
            f"of which {', '.join(map(repr, bound))} {'is' if len(bound) == 1 else 'are'}."
        )
    return bool(bound)


def check_axis_name(axis_name: Any) -> str:
    """The one mesh axis of the sequence, where there can be no more."""
    if isinstance(axis_name, (tuple, list)) and len(axis_name) == 1:
        axis_name = axis_name[0]
    if isinstance(axis_name, (tuple, list)) and len(axis_name) > 1:
        raise NotImplementedError(f"axis_name: a cache is sharded over one mesh axis. Got {axis_name!r}.")
    if not isinstance(axis_name, str):
        raise ValueError(f"axis_name must be the name of a mesh axis. Got {axis_name!r}.")
    return axis_name


def check_strategies(strategy: str | tuple[str, ...], axes: tuple[str, ...]) -> tuple[str, ...]:
    """One word for each axis."""
    words = (strategy,) * len(axes) if isinstance(strategy, str) else strategy
    if len(words) != len(axes):
        raise ValueError(
            f"config.strategy must be one word, or {len(axes)}, one for each axis of axis_name {axes!r}. "
            f"Got {strategy!r}."
        )
    return words


def check_window(local_window_size: Any, is_causal: Any) -> tuple[int | None, int | None]:
    """(left, right): a query at p attends to keys in [p - left, p + right]; None is unbounded. Causal is right = 0."""
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal must be True or False. Got {is_causal!r}.")
    sides: Sequence[Any] = (None, None)
    if isinstance(local_window_size, (tuple, list)):
        sides = local_window_size
    elif local_window_size is not None:
        sides = (local_window_size, local_window_size)
    for side in sides:
        if side is not None and not _is_int(side, least=0):
            sides = ()
            break
    if len(sides) != 2:
        raise ValueError(
            "local_window_size must be None, a non-negative integer or a pair (left, right) of non-negative integers "
            f"or None. Got {local_window_size!r}."
        )
    # A bound that no int32 distance can exceed is no bound.
    left, right = (None if side is None or side >= _INT32_MAX else int(side) for side in sides)
    return left, 0 if is_causal else right


def check_max_segment_length(given: Any, segment_ids: Any) -> int | None:
    """M: no two tokens of a segment lie M or more places apart."""
    if given is None:
        return None
    if not _is_int(given, least=1):
        raise ValueError(f"max_segment_length must be a positive integer or None. Got {given!r}.")
    _require_segments("max_segment_length", given, segment_ids)
    return None if given > _INT32_MAX else int(given)  # no two tokens are so far apart


def check_shared_length(given: Any, segment_ids: Any, num_axes: int) -> tuple[int, ...] | None:
    """G for each axis of the sequence, outermost first."""
    if given is None:
        return None
    each = tuple(given) if isinstance(given, (tuple, list)) else (given,) * num_axes
    if len(each) != num_axes or not all(_is_int(length, least=0) for length in each):
        raise ValueError(
            f"shared_length must be a non-negative integer, or {num_axes}, one for each axis of the sequence, or None. "
            f"Got {given!r}."
        )
    if list(each) != sorted(each):
        raise ValueError(
            "shared_length must not be smaller for an inner axis than for an outer one: what is shared along an axis "
            f"may lie anywhere on those within. Got {given!r}."
        )
    _require_segments("shared_length", given, segment_ids)
    return tuple(int(length) for length in each)


def _require_segments(name: str, given: Any, segment_ids: Any) -> None:
    if segment_ids is None:
        raise ValueError(f"{name} must be None without segment_ids, of which it is a promise. Got {given!r}.")


def check_fits_shard(shared_length: tuple[int, ...] | None, shard_length: int) -> None:
    if shared_length is not None and max(shared_length) > shard_length:
        raise ValueError(
            f"shared_length must be at most {shard_length}, the tokens of a shard. Got {max(shared_length)}."
        )


def within_segments(
    left: int | None, right: int | None, max_segment_length: int | None
) -> tuple[int | None, int | None]:
    """How far a query sees where no segment is longer."""
    if max_segment_length is None:
        return left, right
    far = max_segment_length - 1
    return far if left is None else min(left, far), far if right is None else min(right, far)


def check_scale(scale: Any, head_size: int) -> float:
    """The factor on q.k: 1 / sqrt(H) unless given."""
    if scale is None:
        return 1.0 / math.sqrt(head_size)
    return _real("scale", scale, "a finite number or None", lambda x: True)


def check_soft_cap(logits_soft_cap: Any) -> float | None:
    if logits_soft_cap is None:
        return None
    return _real("logits_soft_cap", logits_soft_cap, "a positive number or None", lambda x: x > 0)


def _real(name: str, given: Any, need: str, accept: Any) -> float:
    concrete = not isinstance(given, Tracer) and not isinstance(given, bool)
    if concrete and (isinstance(given, numbers.Real) or getattr(given, "shape", None) == ()):
        number = float(given)
        if math.isfinite(number) and accept(number):
            return number
    raise ValueError(f"{name} must be {need}, known at trace time. Got {given!r}.")


def _is_int(x: Any, *, least: int) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= least
