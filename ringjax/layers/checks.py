"""Checks of a layer's options. Each gives the option in one hashable form, or raises a ValueError that names it."""

import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..config import RingConfig

FLOATS = ("float32", "bfloat16", "float16", "float64")


def positive_integer(name: str, value: Any) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    raise ValueError(f"{name} must be a positive integer. Got {value!r}.")


def positive_number(name: str, value: Any, otherwise: str = "") -> float:
    """``otherwise`` says what else the option may be."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name} must be a positive number{otherwise}. Got {value!r}.")


def finite_number(name: str, value: Any, otherwise: str = "") -> float:
    """The same of any sign."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    raise ValueError(f"{name} must be a finite number{otherwise}. Got {value!r}.")


def rotary_dim(name: str, value: Any, head_dim: int | None = None) -> int | None:
    """How many features of a head turn: even, at most its size where that is known; None is all."""
    if value is None:
        return None
    number = positive_integer(name, value)
    if number % 2 or (head_dim is not None and number > head_dim):
        most = "" if head_dim is None else f" of at most head_dim, {head_dim},"
        raise ValueError(f"{name} must be an even number of features{most} or None. Got {value!r}.")
    return number


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be True or False. Got {value!r}.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {value!r}.")


def bias(name: str, value: Any) -> bool | Literal["qkv"]:
    """Which projections of attention have a bias."""
    if isinstance(value, bool):
        return value
    if value == "qkv":
        return "qkv"
    raise ValueError(f"{name} must be True, False or 'qkv'. Got {value!r}.")


def ring_config(name: str, value: Any) -> RingConfig:
    if isinstance(value, RingConfig):
        return value
    raise ValueError(f"{name} must be a RingConfig. Got {value!r}.")


def required_axes(name: str, value: Any) -> str | tuple[str, ...]:
    """One mesh axis, or several as a tuple. Files give lists."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (tuple, list)) and value and all(isinstance(axis, str) and axis for axis in value):
        return tuple(value)
    raise ValueError(f"{name} must name a mesh axis, or several as a tuple. Got {value!r}.")


def axes(name: str, value: Any) -> str | tuple[str, ...] | None:
    """The same, or None."""
    return None if value is None else required_axes(name, value)


def floating(name: str, dtype: Any) -> jnp.dtype:
    """A dtype that layers compute in, and that this process has."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in FLOATS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, FLOATS))}. Got {dtype!r}.")
    if found.name == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(f"{name} float64 needs jax_enable_x64. Got jax_enable_x64=False.")
    return found


def ids(name: str, given: Any, size: int, counted: Any = None) -> None:
    """Refuses ids outside the vocabulary where they can be seen: not under jit, nor on other hosts.

    Args:
      counted: which of them matter (not 0), or None for all.
    """
    if not visible(given) or not (counted is None or visible(counted)):
        return
    seen = np.asarray(given)
    wrong = seen[((seen < 0) | (seen >= size)) & (True if counted is None else np.asarray(counted) != 0)]
    if wrong.size:
        raise ValueError(
            f"{name} must be in [0, {size}), ids of the vocabulary. Got {wrong.size} outside it, "
            f"from {wrong.min()} to {wrong.max()}."
        )


def as_index(ids: jax.Array) -> jax.Array:
    """At least 32 bits wide: a narrow dtype cannot count up to the size of a vocabulary."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def visible(x: Any) -> bool:
    """Whether the values can be seen: not under jit, nor on other hosts."""
    return not isinstance(x, Tracer) and (not isinstance(x, jax.Array) or x.is_fully_addressable)
