"""What the TPU kernels share: what they read from scalar memory, the predicate of a tile, pieces of a kernel's body.

TPU terms: a vector register holds 8 sublanes x 128 lanes; VMEM is the vector memory next to the cores, SMEM the
scalar memory that decides which tile comes next, HBM the device memory.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..._compat import vary_like
from ...mask import KeySide, Mask, QuerySide, Rule, Vectors
from ..base import KernelParams
from ..softmax import LOG2_E, factor
from .tiles import LANES, TileSizes


class Scalars(NamedTuple):
    """What a call reads from SMEM, prefetched: arrays, or refs of them. None: absent."""

    steps: Any  # the list of steps
    numbers: Any  # [B1 * 6], see :meth:`ringjax.mask.Mask.numbers`
    place: Any = None  # backward: which unit this is


def received(refs: tuple[Any, ...], scalars: Any, inputs: Any) -> tuple[Scalars, Any, tuple[Any, ...]]:
    """A kernel's refs, by the structures of what goes in: those in SMEM, the inputs, and all after them."""
    split = scalars.num_leaves
    rest = split + inputs.num_leaves
    return jax.tree.unflatten(scalars, refs[:split]), jax.tree.unflatten(inputs, refs[split:rest]), refs[rest:]


class TileMask(NamedTuple):
    """The mask of a block as its PARTIAL tiles apply it. None where it has none."""

    rule: Rule
    queries: Vectors  # of [B1, 1, T]: a tile of them is a row of lanes
    keys: Vectors  # of [B1, 1, S]
    numbers: Array | None  # flat: SMEM pads the last axis of a matrix


def tile_mask(mask: Mask, q_length: int, kv_length: int, tiles: TileSizes) -> TileMask | None:
    """What a kernel needs to tell which queries of a tile attend to which keys; None: no tile can be PARTIAL."""
    rule = mask.rule(
        q_length, kv_length, ragged_q=q_length % tiles.block_q != 0, ragged_kv=kv_length % tiles.block_kv != 0
    )
    if not rule.needs_numbers and not mask.has_vectors:
        return None
    queries, keys = jax.tree.map(lambda x: x[:, None, :], mask.vectors())
    numbers = mask.numbers(q_length, kv_length).reshape(-1) if rule.needs_numbers else None
    return TileMask(rule=rule, queries=queries, keys=keys, numbers=numbers)


class Predicate(NamedTuple):
    """The mask within one tile, in a kernel's body. Ends of a ragged tile are absent, whatever lies there."""

    rule: Rule
    numbers: tuple[Any, ...]
    first_query: Any  # of the tile, in the shard
    first_key: Any

    def query_columns(self, refs: Vectors, at: Any, width: int) -> QuerySide:
        """Queries ``at`` of the tile as columns, repeated to [n, width]."""
        return _columns(self._of_queries, refs, at, self.first_query, width)

    def query_rows(self, refs: Vectors, at: Any) -> QuerySide:
        """The same as rows [1, n]."""
        return _rows(self._of_queries, refs, at, self.first_query)

    def key_columns(self, refs: Vectors, at: Any, width: int) -> KeySide:
        """Keys ``at`` of the tile as columns, repeated to [n, width]."""
        return _columns(self._of_keys, refs, at, self.first_key, width)

    def key_rows(self, refs: Vectors, at: Any) -> KeySide:
        """The same as rows [1, n]."""
        return _rows(self._of_keys, refs, at, self.first_key)

    def _of_queries(self, loaded: Vectors, index: Array) -> QuerySide:
        return self.rule.of_queries(loaded, self.numbers, index)

    def _of_keys(self, loaded: Vectors, index: Array) -> KeySide:
        return self.rule.of_keys(loaded, self.numbers[3:], index)


def predicate(rule: Rule, numbers_smem: Any, b: Any, first_query: Any, first_key: Any) -> Predicate:
    """That of a tile of batch row ``b``; inside the kernel."""
    numbers: tuple[Any, ...] = ()
    if numbers_smem is not None:
        start = b * 6 if numbers_smem.shape[0] > 6 else 0
        numbers = tuple(numbers_smem[start + n] for n in range(6))
    return Predicate(rule=rule, numbers=numbers, first_query=first_query, first_key=first_key)


def _columns(side: Callable[[Vectors, Array], Any], refs: Vectors, at: Any, first: Any, width: int) -> Any:
    """Worked out in the lanes of one register, which then repeat."""
    lanes = math.gcd(width, LANES)
    index = first + at.start + jax.lax.broadcasted_iota(jnp.int32, (at.size, lanes), 0)
    loaded = jax.tree.map(lambda ref: column(ref[:, at], lanes), refs)

    def repeat(x: Array) -> Array:
        if x.dtype != jnp.bool_:
            return repeat_lanes(x, width)
        return repeat_lanes(jnp.where(x, jnp.int32(1), jnp.int32(0)), width) != 0  # masks do not repeat

    return jax.tree.map(repeat, side(loaded, index))


def _rows(side: Callable[[Vectors, Array], Any], refs: Vectors, at: Any, first: Any) -> Any:
    index = first + at.start + jax.lax.broadcasted_iota(jnp.int32, (1, at.size), 1)
    return side(jax.tree.map(lambda ref: ref[:, at], refs), index)


def weights(s: Array, top: Array, params: KernelParams) -> Array:
    """exp(f (s - top)), see :func:`ringjax.kernels.softmax.weights`, in base 2: the chip has no other exponential."""
    return jnp.exp2((s - top) * (factor(params) * LOG2_E))


def zeros_like(x: Array) -> Array:
    """In float32, and of the same type under shard_map."""
    return vary_like(jnp.zeros(x.shape, jnp.float32), x)


def column(row: Array, width: int) -> Array:
    """A row [1, n] as a column repeated to [n, width], width at most 128."""
    return jnp.broadcast_to(row, (width, row.shape[1])).T


def repeat_lanes(x: Array, width: int) -> Array:
    """Columns that are all equal, as many as are wanted: [n, lanes] to [n, width]."""
    lanes = x.shape[1]
    if width % lanes == 0:
        return jnp.tile(x, (1, width // lanes))
    return jnp.tile(x, (1, -(-width // lanes)))[:, :width]


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one axis of each matrix, accumulating in float32; float32 operands are multiplied in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
