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

from ..._compat import gpu_kernel, gpu_load
from ...mask import Mask, Rule
from ...partial import NO_LOGIT
from ..base import KernelParams
from ..zeros import zeros_after
from . import common, ptx
from .common import COLUMNS, LOG2_E, MaskArrays, batch_row, column_matrix, is_finite
from .tiles import MULTIPROCESSORS, WARPGROUP_ROWS, WARPGROUP_THREADS, heads_together

COMPUTE_WARPGROUPS = 2
MEMORY_WARPGROUP = 2
COMPUTE_THREADS = WARPGROUP_THREADS * COMPUTE_WARPGROUPS
BLOCK_KV = WARPGROUP_ROWS * COMPUTE_WARPGROUPS
# Named barriers, see ringjax.kernels.mosaic.ptx: where the compute warpgroups meet, and where each meets itself.
_COMPUTE_BARRIER, _OWN_BARRIER = 8, 9

# The last one runs fastest. Of ``heads`` that start side by side, see tiles.heads_together, each has a program in turn.
GRID_NAMES = ("batch", "heads", "program")

_ENOUGH = 3 * MULTIPROCESSORS // 2  # programs of heads side by side
_PART = 256  # tiles of queries that a part has at least
_SHORT_LAST = 7 * MULTIPROCESSORS  # programs side by side, longest first, of which the last are short

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


class Operands(NamedTuple):
    """SMEM of a kernel that owns keys, and its barriers."""

    k_smem: Any  # [keys, H]
    v_smem: Any
    q_smem: Any  # [stages, queries, H]
    dout_smem: Any
    rows_smem: Any  # [stages, 2, queries]: lse and delta
    keys_ready: Any
    queries_ready: Any  # one per stage
    queries_consumed: Any


class Place(NamedTuple):
    """Which program this is, and which part of it."""

    batch: Any
    head: Any  # K/V head of the kernel that owns keys, query head of the one that owns queries
    tile: Any
    row: Any  # what the mask's arrays call it: one of the parts of what the tile visits
    turn: Any  # where its counts are
    warpgroup: int

    @property
    def own(self) -> Any:
        """This warpgroup's part of the tile that the program owns."""
        return pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


class Tile(NamedTuple):
    """One tile to visit."""

    index: Any  # among all that the program visits
    head: Any
    n: Any  # its place among those of a head
    total: Any  # how many are visited
    masked: bool  # PARTIAL, and not FULL


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
    parts: int = 1  # of a tile's visits, each the work of a program
    together: int = 1  # heads side by side

    @property
    def masked(self) -> bool:
        return self.rule is not None

    @property
    def folds_scale(self) -> bool:
        """Whether lse holds the scale: then p comes out times the scale, and ds needs no product with it."""
        return self.params.scale > 0


@dataclasses.dataclass(frozen=True)
class OverKeys:
    """What a program of a kernel that owns keys works on."""

    static: Static
    x: Inputs
    dq: Any  # refs. None: not asked for
    dk: Any
    dv: Any
    there: Operands


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
    return x.mask.counts[b, 0, place.turn], x.mask.counts[b, 1, place.turn]


def column(x: Inputs, place: Place, n: Any) -> Any:
    """The n-th column that this row visits."""
    return common.column(x.mask, place.batch, place.row, n)


def allowed(
    static: Static, x: Inputs, place: Place, *, q_start: Any, k_start: Any, shape: tuple[int, int], q_axis: int
) -> Array:
    """The predicate of a PARTIAL tile's matrix, queries along ``q_axis``."""
    assert static.rule is not None
    return common.allowed(
        static.rule, x.mask, place.batch, q_start=q_start, k_start=k_start, shape=shape, q_axis=q_axis
    )


def visit(
    static: Static, x: Inputs, place: Place, step: Callable[[Tile, Any], Any], state: Any,
    *, before_partial: Callable[[], Any] | None = None,
) -> Any:  # fmt: skip
    """``step(tile, state)`` for all tiles that pass by: FULL ones of all heads first, and then PARTIAL ones."""
    full, visited = counts(x, place)
    total = visited * static.group

    def some(first: Any, last: Any, start: Any, state: Any, masked: bool) -> Any:
        def of_head(g: Any, state: Any) -> Any:
            head, before = place.head * static.group + g, start + g * (last - first)
            each = lambda n, state: step(Tile(before + n, head, first + n, total, masked), state)  # noqa: E731
            return jax.lax.fori_loop(0, last - first, each, state)

        if static.group == 1:
            return of_head(jnp.int32(0), state)
        return jax.lax.fori_loop(0, static.group, of_head, state)

    state = some(jnp.int32(0), full, jnp.int32(0), state, False)
    if static.masked:
        if before_partial is not None:
            pl.when(full < visited)(before_partial)
        state = some(full, visited, full * static.group, state, True)
    return state


class Programs(NamedTuple):
    """How the work of a kernel that owns keys is dealt to programs."""

    parts: int  # of the queries that attend to a tile of keys, each visited by a program of its own
    together: int  # K/V heads that start side by side, see tiles.heads_together


def programs_of(
    mask: Mask, heads: tuple[int, int], rows: int, queries: int, block_q: int, group: int,
    *, final: bool, deterministic: bool,
) -> Programs:  # fmt: skip
    """The programs of a kernel that owns keys.

    At the end of a call multiprocessors wait for the last programs, half of one on average: none should be long. But
    each part adds its dk and dv to sums in memory. If that takes as long as one tile of queries, the time is least for
    the root of half of a program's tiles over the programs of a multiprocessor (docs/optimisation-log.md). Sums of two
    are the same in either order; of more, the last bits depend on it.

    Programs of documents start longest first. Where there are many side by side, the last are short: one part of each
    will do, which needs no sums in memory. Otherwise there are half as many parts as above, since documents leave most
    empty.

    Args:
      mask: of the block.
      heads: batch rows, and K/V heads of each.
      rows: tiles of keys of a head, each the program of a part.
      queries: of the shard.
      block_q: of a tile of them.
      group: query heads that pass by.
      final: nothing else is added to dk and dv.
    """
    batch, kv_heads = heads
    if mask.has_vectors and final and kv_heads * rows >= _SHORT_LAST:
        return Programs(parts=1, together=heads_together(kv_heads, rows, _SHORT_LAST))
    tiles = -(-common.reach(mask, queries, BLOCK_KV) // block_q) * group
    parts = math.isqrt(MULTIPROCESSORS * tiles // (2 * batch * kv_heads * rows)) // (2 if mask.has_vectors else 1)
    parts = max(1, min(parts, tiles // _PART))
    return Programs(parts=min(parts, 2) if deterministic else parts, together=heads_together(kv_heads, rows, _ENOUGH))


def head_and_tile(heads: Any, program: Any, together: int) -> tuple[Any, Any]:
    """Which head a program of so many heads works on, and which of its programs it is: a tile, or a part of one."""
    if together == 1:
        return heads, program
    number = jnp.int32(together)
    return heads * number + jax.lax.rem(program, number), jax.lax.div(program, number)


def place_of(x: Inputs, batch: Any, head: Any, turn: Any, tiles: int | None = None) -> Place:
    """Of the program whose counts are the ``turn``-th. ``tiles``: how many there are, if each is several rows."""
    row = common.row_of(x.mask, batch, turn)
    tile = row if tiles is None else jax.lax.rem(row, jnp.int32(tiles))
    return Place(batch=batch, head=head, tile=tile, row=row, turn=turn, warpgroup=0)


def run_program(place: Place, memory: Callable[[Place], None], compute: Callable[[Place], None]) -> None:
    """The memory warpgroup and the compute warpgroups of the program at ``place``."""
    warpgroup = jax.lax.axis_index("warpgroup")
    pl.when(warpgroup == MEMORY_WARPGROUP)(lambda: memory(place._replace(warpgroup=MEMORY_WARPGROUP)))
    # Compiled once for each, so that addresses are constants: they would not fit into the registers otherwise.
    for w in range(COMPUTE_WARPGROUPS):
        pl.when(warpgroup == w)(lambda w=w: compute(place._replace(warpgroup=w)))


def run_over_keys(
    name: str, kernel: Callable[..., Any], static: Static, x: Inputs, dq: Array | None, dk: Any, dv: Any, scratch: Any
) -> tuple[Array | None, Array, Array]:
    """Runs a kernel that owns keys.

    Args:
      kernel: an :class:`OverKeys`, which takes the scratch besides and has ``compute(place)``.
      dq: what is added to. None: not asked for.
      dk, dv: types.
    """
    batch, k_length, kv_heads, _ = x.k.shape
    tiles, parts, together = -(-k_length // static.block_kv), static.parts, static.together
    leaves, structure = jax.tree.flatten(x)
    operands = _operands(static, x)

    def body(*refs: Any) -> None:
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        given = refs[len(leaves) :]
        dq_gmem, dk_gmem, dv_gmem, *rest = (None, *given) if dq is None else given
        there = Operands(*rest[: len(operands)])
        compute = kernel(static, inputs, dq_gmem, dk_gmem, dv_gmem, there, *rest[len(operands) :]).compute
        batch_row, heads, program = (jax.lax.axis_index(name) for name in GRID_NAMES)
        place = place_of(inputs, batch_row, *head_and_tile(heads, program, together), None if parts == 1 else tiles)
        work = lambda: run_program(place, lambda place: _load(static, inputs, there, place), compute)  # noqa: E731
        if parts == 1:
            work()
        else:
            pl.when(counts(inputs, place)[1] > 0)(work)

    summed = () if dq is None else (dq,)
    if parts > 1:
        sums, (summed, leaves) = zeros_after((dk.shape, dv.shape), (summed, leaves))
        summed += tuple(sums)
    added, written = gpu_kernel(
        body,
        leaves,
        summed,
        out_type=[dk, dv] if parts == 1 else [],
        grid=(batch, kv_heads // together, parts * tiles * together),
        grid_names=GRID_NAMES,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(*operands, *scratch),
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )
    *added, of_keys, of_values = (*added, *written)
    return (added[0] if added else None, of_keys.astype(dk.dtype), of_values.astype(dv.dtype))


def _operands(static: Static, x: Inputs) -> Operands:
    dtype, size, stages = x.q.dtype, static.size, static.stages
    each_stage = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)  # noqa: E731
    return Operands(
        k_smem=common.smem_tile((static.block_kv, size), dtype),
        v_smem=common.smem_tile((static.block_kv, size), dtype),
        q_smem=common.smem_tile((stages, static.block_q, size), dtype),
        dout_smem=common.smem_tile((stages, static.block_q, size), dtype),
        rows_smem=plgpu.SMEM((stages, 2, static.block_q), jnp.float32),
        keys_ready=plgpu.Barrier(num_arrivals=2),
        queries_ready=each_stage(3),
        queries_consumed=each_stage(COMPUTE_WARPGROUPS),
    )


def keys(static: Static, place: Place) -> Any:
    """Of keys and values in GMEM, what the program owns."""
    return place.batch, pl.ds(place.tile * static.block_kv, static.block_kv), place.head


def slot_of(static: Static, index: Any) -> Any:
    """Where the index-th tile of queries lies."""
    return jax.lax.rem(index, jnp.int32(static.stages))


def _load(static: Static, x: Inputs, there: Operands, place: Place) -> None:
    """The memory warpgroup: keys and values, and the tiles of queries as slots come free."""
    plgpu.set_max_registers(24, action="decrease")
    plgpu.copy_gmem_to_smem(x.k.at[keys(static, place)], there.k_smem, there.keys_ready)
    plgpu.copy_gmem_to_smem(x.v.at[keys(static, place)], there.v_smem, there.keys_ready)

    def load(now: Tile, _: None) -> None:
        queries = pl.ds(column(x, place, now.n) * static.block_q, static.block_q)
        slot = slot_of(static, now.index)
        ready = there.queries_ready.at[slot]
        pl.when(now.index >= static.stages)(lambda: plgpu.barrier_wait(there.queries_consumed.at[slot]))
        plgpu.copy_gmem_to_smem(x.q.at[place.batch, queries, now.head], there.q_smem.at[slot], ready)
        plgpu.copy_gmem_to_smem(x.rows.at[place.batch, now.head, :, queries], there.rows_smem.at[slot], ready)
        plgpu.copy_gmem_to_smem(x.dout.at[place.batch, queries, now.head], there.dout_smem.at[slot], ready)

    visit(static, x, place, load, None)


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


def transposed_softmax(
    static: Static, x: Inputs, place: Place, now: Tile, tile: Any, products: Array, lse: Array, delta_smem: Any,
    k_start: Any,
) -> tuple[Array, Array | float | None]:  # fmt: skip
    """The same of k q^T, keys along rows, under the mask of this tile of queries."""
    if now.masked:
        # A NaN or Inf in dout is taken out later on. It has left its trace in delta: NaN to all that it reaches.
        lse = jnp.where(is_finite(gpu_load(delta_smem, COLUMNS)), lse, jnp.nan)
    p, slope = softmax(static, products, column_matrix(lse, products))
    if now.masked:
        q_start = tile * static.block_q
        may = allowed(static, x, place, q_start=q_start, k_start=k_start, shape=(p.shape[0], p.shape[1]), q_axis=1)
        p = jnp.where(may, p, 0.0)
    return p, slope


def transposed_ds(now: Tile, p: Array, dp: Array, slope: Array | float | None, delta_smem: Any) -> Array:
    """ds^T from p^T and dp^T."""
    ds = p * (dp - column_matrix(gpu_load(delta_smem, COLUMNS), p))
    ds = ds if slope is None else ds * slope
    # A NaN of an attended pair is in p already, so p = 0 is where the query does not attend to the key.
    return jnp.where(p == 0.0, 0.0, ds) if now.masked else ds


def first_products(
    static: Static, x: Inputs, there: Operands, place: Place, logits: Any, multiply: Callable[[Any, Any], None]
) -> Array:
    """``multiply(acc, slot)`` of the first tile of queries, by itself."""
    _, visited = counts(x, place)
    slot = slot_of(static, jnp.int32(0))
    pl.when(visited > 0)(lambda: plgpu.barrier_wait(there.queries_ready.at[slot]))

    def products(acc: Any) -> Any:
        multiply(acc, slot)
        return acc[...]

    return pl.run_scoped(products, logits)


def wait_for_next(static: Static, there: Operands, now: Tile) -> Any:
    """Waits for the next tile of queries. After the last one something lies there as well: nobody will look at it."""
    slot = slot_of(static, now.index + 1)
    pl.when(now.index + 1 < now.total)(lambda: plgpu.barrier_wait(there.queries_ready.at[slot]))
    return slot


def without_scale(static: Static, dv: Array) -> Array:
    """Sums of p^T dout, where p was times the scale."""
    return dv * (1.0 / static.params.scale) if static.folds_scale else dv


def store(static: Static, total: Array, out_gmem: Any, free_smem: Any, sums_smem: Any) -> None:
    """Rows of dk or dv of one warpgroup: 16 bits at once through SMEM that is free now, or float32, added if a part."""
    if out_gmem.dtype != free_smem.dtype:
        store_float32(total, out_gmem, sums_smem, reduction_op=None if static.parts == 1 else "add")
        return
    free_smem[...] = total.astype(out_gmem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(free_smem, out_gmem)


def store_float32(x: Array, out_gmem: Any, sums_smem: Any, reduction_op: Any = None) -> None:
    """By 64 columns, through SMEM of one warpgroup, which the copy before has read."""
    for start in range(0, x.shape[1], WARPGROUP_ROWS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums_smem[...] = jax.lax.slice(x, (0, start), (WARPGROUP_ROWS, start + WARPGROUP_ROWS))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_smem, out_gmem.at[:, pl.ds(start, WARPGROUP_ROWS)], reduction_op=reduction_op)


def clean(place: Place, *tiles_smem: Any, rows_smem: Any = None) -> None:
    """Zero in place of NaN and Inf, which must not meet p = 0 and ds = 0 in PARTIAL tiles. Both warpgroups together.

    Where k or q is attended to, lse has it, and delta has what dout has.

    Args:
      rows_smem: lse and delta of tiles of queries: only if one of them is not finite, as where such a number is, and
        where a query has no keys.
    """
    suspect = None
    if rows_smem is not None:
        suspect = (rows_smem, _OWN_BARRIER + place.warpgroup)
    meet = (_COMPUTE_BARRIER, COMPUTE_THREADS)
    ptx.clean(tiles_smem, common.swizzled(tiles_smem[0].dtype), place.warpgroup, meet, suspect)


def join_compute_warpgroups() -> None:
    """Both compute warpgroups have come here, and what they wrote to SMEM is there for WGMMA and TMA."""
    ptx.instruction(ptx.FENCE)
    ptx.sync(_COMPUTE_BARRIER, COMPUTE_THREADS)
