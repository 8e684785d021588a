"""Arrays of zeros that sums start from."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._compat import vary_like

T = TypeVar("T")


def zeros_after(shapes: tuple[tuple[int, ...], ...], operands: T, dtype: Any = jnp.float32) -> tuple[list[Array], T]:
    """Zeros for a kernel to add to, made when its operands are there, which are returned as well.

    Zeros that depend on nothing XLA makes once for all layers of a model, each of which then gets a copy, or all at
    once before the first layer needs them: either way they take memory all along.
    """
    numbers, operands = jax.lax.optimization_barrier(((jnp.zeros((), dtype),) * len(shapes), operands))
    leaves = jax.tree.leaves(operands)
    return [vary_like(jnp.full(shape, zero), *leaves) for shape, zero in zip(shapes, numbers, strict=True)], operands
