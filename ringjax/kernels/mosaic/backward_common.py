"""What the two backward kernels for Hopper GPUs share: what goes in, the probabilities, small pieces of their bodies.

GPU terms: see :mod:`ringjax.kernels.mosaic.common`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...mask import Rule
from ...partial import NO_LOGIT
from ..base import KernelParams
from . import common, ptx
from .common import LOG2_E, MATRIX, MaskArrays, batch_row, is_finite
from .tiles import WARPGROUP_ROWS, WARPGROUP_THREADS

COMPUTE_WARPGROUPS = 2
MEMORY_WARPGROUP = 2
BLOCK_KV = WARPGROUP_ROWS * COMPUTE_WARPGROUPS
_COMPUTE_BARRIER = 8  # a named one, see ringjax.kernels.mosaic.ptx: where the compute warpgroups meet

# The last one runs fastest: programs of one head share in the cache what passes by.
GRID_NAMES = ("batch", "head", "tile")

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,  # every store to SMEM is followed by a barrier here
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


class Inputs(NamedTuple):
    """Arrays, or refs in GMEM. None: absent."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    dout: Any  # [B, T, N, H]
    rows: Any  # [B, N, 2, Tp]: lse and delta, see rows_of
    mask: MaskArrays  # rows of tiles are of what a program owns. It always has counts


class Place(NamedTuple):
    """Which program this is, and which part of it."""

    batch: Any
    head: Any  # K/V head of the kernel that owns keys, query head of the one that owns queries
    tile: Any
    warpgroup: int

    @property
    def own(self) -> Any:
        """This warpgroup's part of the tile that the program owns."""
        return pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


@dataclasses.dataclass(frozen=True)
class Static:
    """All that is known at trace time. Rows are tiles of what a program owns, columns of what passes by."""

    params: KernelParams
    rule: Rule | None  # of PARTIAL tiles. None: every row visits every column, and all are FULL
    block_q: int
    block_kv: int
    stages: int
    size: int  # of a head, after padding
    group: int  # query heads that pass by

    @property
    def masked(self) -> bool:
        return self.rule is not None

    @property
    def folds_scale(self) -> bool:
        """Whether lse holds the scale: then p comes out times the scale, and ds needs no product with it."""
        return self.params.scale > 0


def rows_of(lse: Array, delta: Array, scale: float, length: int) -> Array:
    """lse in base 2 and delta, [B, N, 2, length]. Where nothing is attended, p = exp2(-inf) = 0.

    What lies beyond the end is absent, so that its numbers do not matter: the predicate or nobody reads them.
    """
    lse2 = lse * LOG2_E
    lse2 = jnp.where(lse2 < NO_LOGIT, -lse2, lse2)  # -inf to inf, without an infinite constant
    if scale > 0:  # Static.folds_scale
        lse2 = lse2 - math.log2(scale)
    # Otherwise XLA makes one kernel of this and of the sums that are delta, four times slower than those by themselves.
    lse2, delta = jax.lax.optimization_barrier((lse2, delta))
    return common.pad_axis(jnp.stack([lse2, delta], axis=2), 3, length)


def counts(x: Inputs, place: Place) -> tuple[Any, Any]:
    """How many columns of this row are FULL, and how many are visited."""
    b = batch_row(x.mask.counts, place.batch)
    return x.mask.counts[b, 0, place.tile], x.mask.counts[b, 1, place.tile]


def column(x: Inputs, place: Place, n: Any) -> Any:
    """The n-th column that this row visits."""
    return common.column(x.mask, place.batch, place.tile, n)


def allowed(
    static: Static, x: Inputs, place: Place, *, q_start: Any, k_start: Any, shape: tuple[int, int], q_axis: int
) -> Array:
    """The predicate of a PARTIAL tile's matrix, queries along ``q_axis``."""
    assert static.rule is not None
    return common.allowed(
        static.rule, x.mask, place.batch, q_start=q_start, k_start=k_start, shape=shape, q_axis=q_axis
    )


def visit(
    static: Static, place: Place, first: Any, last: Any, step: Callable[..., Any], start: Any, init: Any
) -> Any:  # fmt: skip
    """``step(index, head, n, state)`` for first <= n < last of all heads, numbered from ``start`` on."""
    count = last - first

    def of_head(g: Any, state: Any) -> Any:
        head = place.head * static.group + g
        each = lambda n, state: step(start + g * count + n, head, first + n, state)  # noqa: E731
        return jax.lax.fori_loop(0, count, each, state)

    if static.group == 1:
        return of_head(jnp.int32(0), init)
    return jax.lax.fori_loop(0, static.group, of_head, init)


def run_program(memory: Callable[[Place], None], compute: Callable[[Place], None]) -> None:
    """The memory warpgroup and the compute warpgroups of one program."""
    warpgroup = jax.lax.axis_index("warpgroup")
    batch, head, tile = (jax.lax.axis_index(name) for name in GRID_NAMES)
    pl.when(warpgroup == MEMORY_WARPGROUP)(lambda: memory(Place(batch, head, tile, MEMORY_WARPGROUP)))
    # Compiled once for each, so that addresses are constants: they would not fit into the registers otherwise.
    for w in range(COMPUTE_WARPGROUPS):
        pl.when(warpgroup == w)(lambda w=w: compute(Place(batch, head, tile, w)))


def softmax(static: Static, products: Array, lse: Array) -> tuple[Array, Array | float | None]:
    """From q.k and lse: p (times the scale, if it is folded), and what ds has on top of p (dp - delta), if anything.

    The exponent is s * factor - lse, in one multiply-add as forward's s * factor - m: where all logits have something
    large in common, p then is that of forward times one number per query, and does not err from key to key.
    """
    params = static.params
    s = common.scores(products, params)
    p = jnp.exp2(s * common.factor(params) - lse)
    slope = None if params.logits_soft_cap is None else 1.0 - s * s
    if not static.folds_scale:
        slope = params.scale if slope is None else slope * params.scale
    return p, slope


def clean(x_smem: Any) -> None:
    """Zero in place of NaN and Inf."""
    x = gpu_load(x_smem, MATRIX)
    x_smem[...] = jnp.where(is_finite(x.astype(jnp.float32)), x, jnp.zeros_like(x))


def join_compute_warpgroups() -> None:
    """Both compute warpgroups have come here, and what they wrote to SMEM is there for WGMMA and TMA."""
    ptx.instruction("fence.proxy.async.shared::cta;")
    ptx.sync(_COMPUTE_BARRIER, WARPGROUP_THREADS * COMPUTE_WARPGROUPS)
