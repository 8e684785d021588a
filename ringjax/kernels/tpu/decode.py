"""Few queries for TPU: rows folded (:mod:`ringjax.kernels.fold`), and a cache read once, in the order in which it lies.

A grid over (batch row, some K/V heads, visited tile of keys). A step reads a tile of keys and values of these heads, up
to eight, and folds it into the running softmax of each, so that a tile is one copy from HBM, long enough to run at its
bandwidth, and nothing is read again or put in another order. Tiles beyond a row's length are neither read nor computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._compat import shape_like
from ...layout import Runs
from ...mask import Rule, Tokens, attends
from ..base import Block, Finished, KernelParams
from ..fold import fold, present
from ..softmax import Normaliser
from ..visits import FULL, PARTIAL
from . import common, online
from .arrangement import Arrangement, arrangement
from .common import Scalars, dot
from .online import State
from .steps import Step, Walk, plan_steps
from .tiles import LANES, TileSizes, heads_of_a_step

# Rows of several heads that are worked on together.
_ROWS = 64


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any  # [B, K / heads, heads R, H]: the rows of the heads of a step, R those of one head
    k: Any  # a tuple, see Arrangement
    v: Any
    queries: Any  # Vectors of [B1, 1, R]
    keys: Any  # Vectors of [B1, 1, S]
    sinks: Any  # [K / heads, 1, heads R]


@dataclasses.dataclass(frozen=True)
class _Static:
    walk: Walk
    rule: Rule | None
    params: KernelParams
    tiles: TileSizes
    keys: Arrangement
    values: Arrangement
    heads: int  # of one step

    @property
    def together(self) -> int:
        """Heads of which rows are worked on together, so that products of some hide the latency of others."""
        pairs = 2 if self.keys.pairs or self.values.pairs else 1
        most = max(_ROWS // self.tiles.block_q, pairs)
        return max(n for n in range(pairs, self.heads + 1, pairs) if self.heads % n == 0 and n <= most)


def forward(block: Block, params: KernelParams, tiles: TileSizes) -> Finished:
    """Of the only hop; see :class:`ringjax.kernels.base.Kernel`."""
    folded = fold(block)
    (batch, heads, rows, size), (k_length, v_size) = folded.q.shape, folded.v.shape[2:]
    # Visits are those of the rows that there are; the kernel has whole registers of them.
    plan = plan_steps(folded.mask, rows, k_length, dataclasses.replace(tiles, block_q=rows), rows="queries")
    q, k, v, mask, _ = _whole_registers(folded, tiles.block_q)
    steps, num_steps = plan.chunk(0)
    tile_mask = None if steps is None else common.tile_mask(mask, tiles.block_q, k_length, tiles)
    rule, queries, keys, numbers = tile_mask or (None, None, None, None)
    here = heads_of_a_step(heads)
    static = _Static(
        walk=plan.walk,
        rule=rule,
        params=params,
        tiles=tiles,
        keys=arrangement(k),
        values=arrangement(v),
        heads=here,
    )
    prefetch, scalars_tree = jax.tree.flatten(Scalars(steps=steps, numbers=numbers))
    steps_of_heads, rows_of_step = heads // here, here * tiles.block_q
    inputs = _Inputs(
        q=q.reshape(batch, steps_of_heads, rows_of_step, size),
        k=static.keys.operands(k),
        v=static.values.operands(v),
        queries=queries,
        keys=keys,
        sinks=None if block.sinks is None else _sinks_of_rows(block, tiles.block_q).reshape(steps_of_heads, 1, -1),
    )
    specs = _block_specs(inputs, folded, static, scalars_tree)
    of_heads = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, n, *_: (b, n, 0, 0))  # noqa: E731
    num_rows = online.num_rows(q.dtype, block.sinks is not None)
    state = online.scratch((rows_of_step,), v_size, min(LANES, tiles.block_kv))
    products = batch * heads * rows * k_length
    out, *per_query = pl.pallas_call(
        _Kernel(static, scalars_tree, jax.tree.structure(inputs)),
        out_shape=(
            shape_like((batch, steps_of_heads, rows_of_step, v_size), q.dtype, q),
            *(shape_like((batch, steps_of_heads, 1, rows_of_step), jnp.float32, q),) * num_rows,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(batch, steps_of_heads, num_steps),
            in_specs=jax.tree.leaves(specs),
            out_specs=(of_heads(rows_of_step, v_size), *(of_heads(1, rows_of_step),) * num_rows),
            scratch_shapes=tuple(state),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * (q.shape[3] + v_size),
            transcendentals=products,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v)) + 8 * q.size,
        ),
        interpret=params.interpret,
        name="ringjax_decode",
    )(*prefetch, *jax.tree.leaves(inputs))
    by_head = (batch, heads, tiles.block_q)
    out = out.reshape(*by_head, v_size)[:, :, :rows]
    return _finished(block, out, [x.reshape(by_head)[:, :, :rows] for x in per_query])


def _whole_registers(folded: Block, rows: int) -> Block:
    """With more rows, which nobody looks at, whatever they attend to."""
    extra = rows - folded.q.shape[2]
    if not extra:
        return folded
    queries = folded.mask.queries
    positions, segments = folded.mask.vectors(rows)[0]
    if isinstance(queries.positions, Runs):
        positions = dataclasses.replace(queries.positions, length=rows)
    mask = dataclasses.replace(folded.mask, queries=Tokens(positions=positions, segments=segments))
    return folded._replace(q=jnp.pad(folded.q, ((0, 0), (0, 0), (0, extra), (0, 0))), mask=mask)


def _sinks_of_rows(block: Block, rows: int) -> Array:
    """[K, rows]."""
    assert block.sinks is not None
    kv_heads = block.k.shape[1]
    sinks = jnp.repeat(block.sinks.astype(jnp.float32), block.q.shape[2]).reshape(kv_heads, -1)
    return jnp.pad(sinks, ((0, 0), (0, rows - sinks.shape[1])))


def _finished(block: Block, out: Array, per_query: list[Array]) -> Finished:
    """Of the rows. Absent queries, which are rows like others in the kernel, attend to nothing but their sinks."""
    shape, sinks = block.q.shape[:3], block.sinks
    out = out.reshape(*shape, -1)
    lse, *kept = (x.reshape(shape) for x in per_query)
    there = present(block)
    if there is not None:
        there = there[:, None]
        out = jnp.where(there[..., None], out, jnp.zeros_like(out))
        nothing = jnp.log(there.astype(lse.dtype)) if sinks is None else sinks.astype(lse.dtype)[None, :, None]
        lse = jnp.where(there, lse, nothing)
        kept = [jnp.where(there, x, jnp.float32(n == 2)) for n, x in enumerate(kept)]  # the sink has all the weight
    saved = Normaliser(*kept[:2]) if kept else None
    return Finished(out=out, lse=lse, saved=saved, sink=kept[2] if len(kept) == 3 else None)


def _block_specs(inputs: _Inputs, folded: Block, static: _Static, scalars_tree: Any) -> _Inputs:
    """Which block of each array a step works on. Present for all inputs that are."""
    tiles = static.tiles

    def at(b: Any, n: Any, s: Any, *prefetched: Any) -> tuple[Any, Any, Any]:
        steps_smem = jax.tree.unflatten(scalars_tree, prefetched).steps
        return b, n, static.walk.step(steps_smem, b, s).column

    def side(x: Array, block: int, moves: bool) -> pl.BlockSpec:
        def index_map(*step: Any) -> tuple[Any, ...]:
            b, _, tile = at(*step)
            return (0 if x.shape[0] == 1 else b, 0, tile if moves else 0)

        return pl.BlockSpec((None, 1, block), index_map)

    return _Inputs(
        q=pl.BlockSpec((None, None, *inputs.q.shape[2:]), lambda b, n, *_: (b, n, 0, 0)),
        k=static.keys.specs(folded.k, static.heads, tiles.block_kv, at),
        v=static.values.specs(folded.v, static.heads, tiles.block_kv, at),
        queries=jax.tree.map(lambda x: side(x, tiles.block_q, False), inputs.queries),
        keys=jax.tree.map(lambda x: side(x, tiles.block_kv, True), inputs.keys),
        sinks=None
        if inputs.sinks is None
        else pl.BlockSpec((None, *inputs.sinks.shape[1:]), lambda b, n, *_: (n, 0, 0)),
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel's body. ``scalars`` and ``inputs`` are the structures of what goes in, some of which may be absent."""

    static: _Static
    scalars: Any
    inputs: Any

    def __call__(self, *refs: Any) -> None:
        static = self.static
        scalars, x, rest = common.received(refs, self.scalars, self.inputs)
        out, *per_query, acc, top, total = rest
        state = State(acc=acc, max=top, sum=total)
        b, s = pl.program_id(0), pl.program_id(2)
        step = static.walk.step(scalars.steps, b, s)
        pl.when(step.first)(lambda: online.begin(state, None))
        if not static.walk.lists:
            _fold(x, state, static, None)
        else:
            pl.when(step.kind == FULL)(lambda: _fold(x, state, static, None))
            if static.rule is not None:
                pl.when(step.kind == PARTIAL)(lambda: _fold_partial(x, state, static, scalars.numbers, b, step))
        sinks = None if x.sinks is None else x.sinks[...]
        pl.when(step.last)(lambda: online.end(state, None, sinks, out, per_query, static.params, x.q.dtype))


def _fold_partial(x: _Inputs, state: State, static: _Static, numbers_smem: Any, b: Any, step: Step) -> None:
    assert static.rule is not None
    tiles = static.tiles
    which = common.predicate(
        static.rule, numbers_smem, b, first_query=0, first_key=step.column * tiles.block_kv
    )  # fmt: skip
    queries = which.query_columns(x.queries, pl.ds(0, tiles.block_q), tiles.block_kv)
    _fold(x, state, static, attends(queries, which.key_rows(x.keys, pl.ds(0, tiles.block_kv))))


def _fold(x: _Inputs, state: State, static: _Static, allowed: Array | None) -> None:
    """A tile of keys into the rows of each of its heads. ``allowed``: of the rows of one head."""
    together, rows = static.together, static.tiles.block_q
    k_axis, v_axis = static.keys.token_axis, static.values.token_axis
    of_all = None
    if allowed is not None:  # masks do not concatenate
        of_one = jnp.where(allowed, jnp.int32(1), jnp.int32(0))
        of_one = jnp.broadcast_to(of_one, (rows, static.tiles.block_kv))
        of_all = jnp.concatenate([of_one] * together) != 0
    for first in range(0, static.heads, together):
        at = [slice((first + n) * rows, (first + n + 1) * rows) for n in range(together)]
        keys, values = static.keys.load(x.k, first, together), static.values.load(x.v, first, together)

        def weigh(p: Array, values: list[Array] = values) -> Array:
            cut = [p[n * rows : (n + 1) * rows] for n in range(together)]
            parts = zip(cut, values, strict=True)
            return jnp.concatenate([online.weighed(p, v, allowed, v_axis) for p, v in parts])

        products = [dot(x.q[rows_here], k, (1, 1 - k_axis)) for rows_here, k in zip(at, keys, strict=True)]
        whole = slice(at[0].start, at[-1].stop)
        online.fold(state, whole, jnp.concatenate(products), weigh, static.params, of_all)
        if allowed is not None:
            for rows_here, v in zip(at, values, strict=True):
                online.mark_poison(state, rows_here, v, allowed, v_axis)
