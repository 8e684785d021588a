"""The forward block kernel for TPU: folds one K/V block into the running softmax, which goes in and comes out.

A grid over (batch row, query head, visited tile). The running softmax of a tile of queries lives in VMEM while the
tiles of keys that it sees pass by: FULL ones without a predicate, EMPTY ones not at all. The arithmetic is that of
:mod:`ringjax.kernels.tpu.online`; the maximum in the carry is that of its scores, or whatever has served in its place,
and only this kernel reads it.

With 16-bit numbers a FULL tile takes the maximum as it finds it, and is done again if that was too far off.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._compat import shape_like
from ...mask import Rule, attends
from ..base import Block, Finished, KernelParams
from ..softmax import Normaliser
from ..visits import FULL, PARTIAL
from . import common, online
from .common import Predicate, Scalars, dot
from .online import Running, State
from .steps import Step, Walk, plan_steps
from .tiles import LANES, TileSizes, sub_tile

# Queries worked on at a time, where not all of a tile are.
_ROWS = 256


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any
    k: Any
    v: Any
    queries: Any  # Vectors of [B1, 1, T]
    keys: Any  # Vectors of [B1, 1, S]
    carry: Any  # Running
    sinks: Any  # [N] in SMEM


@dataclasses.dataclass(frozen=True)
class _Static:
    walk: Walk
    rule: Rule | None
    params: KernelParams
    tiles: TileSizes
    finish: bool
    q_length: int
    num_states: int  # 2: one is kept while a FULL tile tries the maximum as it is


def forward(
    block: Block, params: KernelParams, tiles: TileSizes, carry: Running | None, *, finish: bool
) -> Running | Finished:
    """See :class:`ringjax.kernels.base.Kernel`."""
    q, k, v, mask, sinks = block
    (batch, heads, q_length, _), (k_length, v_size) = q.shape, v.shape[2:]
    plan = plan_steps(mask, q_length, k_length, tiles, rows="queries")
    steps, num_steps = plan.chunk(0)
    # Rows beyond the last query are not written, so a tile may be ragged there and still be FULL.
    tile_mask = None if steps is None else common.tile_mask(mask, q_length, k_length, tiles)
    rule, queries, keys, numbers = tile_mask or (None, None, None, None)
    # float32 always takes the maximum: its rounding grows with how far below what is subtracted the logits are.
    num_states = 2 if q.dtype.itemsize == 2 else 1
    static = _Static(
        walk=plan.walk, rule=rule, params=params, tiles=tiles, finish=finish, q_length=q_length, num_states=num_states
    )
    scalars = Scalars(steps=steps, numbers=numbers)
    prefetch, scalars_tree = jax.tree.flatten(scalars)
    sinks = sinks.astype(jnp.float32) if sinks is not None and finish else None
    inputs = _Inputs(q=q, k=k, v=v, queries=queries, keys=keys, carry=carry, sinks=sinks)
    specs = _block_specs(inputs, static, scalars_tree)

    row = shape_like((batch, heads, 1, q_length), jnp.float32, q)
    acc = shape_like((batch, heads, q_length, v_size), q.dtype if finish else jnp.float32, q)
    num_rows = online.num_rows(q.dtype, sinks is not None) if finish else 2
    aliases = {}
    if carry is not None and not finish:
        before = len(prefetch) + len(jax.tree.leaves(inputs[:5]))
        aliases = {before + i: i for i in range(3)}
    lanes = min(LANES, tiles.sub_kv)
    state = online.scratch((tiles.block_q,), v_size, lanes)
    products = batch * heads * q_length * k_length
    out = pl.pallas_call(
        _Kernel(static, scalars_tree, jax.tree.structure(inputs)),
        out_shape=(acc, *(row,) * num_rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(batch, heads, num_steps),
            in_specs=jax.tree.leaves(specs if carry is not None else specs._replace(carry=None)),
            out_specs=(specs.carry.acc, *(specs.carry.max,) * num_rows),
            scratch_shapes=tuple(state) * num_states,
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * (q.shape[3] + v_size),
            transcendentals=products,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v)) + 8 * q.size,
        ),
        interpret=params.interpret,
        name="ringjax_forward",
    )(*prefetch, *jax.tree.leaves(inputs))
    if not finish:
        return Running(*out)
    lse, *kept = (x[:, :, 0] for x in out[1:])
    saved = Normaliser(*kept[:2]) if kept else None
    return Finished(out=out[0], lse=lse, saved=saved, sink=kept[2] if len(kept) == 3 else None)


def _block_specs(inputs: _Inputs, static: _Static, scalars_tree: Any) -> _Inputs:
    """Which block of each array a step works on. Present for all inputs that are; the carry's serve the result too."""
    group, tiles = inputs.q.shape[1] // inputs.k.shape[1], static.tiles

    def spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        def index_map(b: Any, n: Any, s: Any, *prefetched: Any) -> tuple[Any, ...]:
            steps_smem = jax.tree.unflatten(scalars_tree, prefetched).steps
            return index(b, n, static.walk.step(steps_smem, b, s))

        return pl.BlockSpec(shape, index_map)

    def side(x: Array, block: int, tile: Any) -> pl.BlockSpec:
        one = x.shape[0] == 1
        return spec((None, 1, block), lambda b, n, step: (0 if one else b, 0, tile(step)))

    q_rows = lambda size: spec((None, None, tiles.block_q, size), lambda b, n, step: (b, n, step.row, 0))  # noqa: E731
    kv_rows = lambda size: spec(  # noqa: E731
        (None, None, tiles.block_kv, size), lambda b, n, step: (b, jax.lax.div(n, jnp.int32(group)), step.column, 0)
    )
    row = spec((None, None, 1, tiles.block_q), lambda b, n, step: (b, n, 0, step.row))
    return _Inputs(
        q=q_rows(inputs.q.shape[3]),
        k=kv_rows(inputs.k.shape[3]),
        v=kv_rows(inputs.v.shape[3]),
        queries=jax.tree.map(lambda x: side(x, tiles.block_q, lambda step: step.row), inputs.queries),
        keys=jax.tree.map(lambda x: side(x, tiles.block_kv, lambda step: step.column), inputs.keys),
        carry=Running(acc=q_rows(inputs.v.shape[3]), max=row, sum=row),
        sinks=None if inputs.sinks is None else pl.BlockSpec(memory_space=pltpu.SMEM),
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
        held = [State(*refs) for refs in zip(*[iter(rest[-3 * static.num_states :])] * 3, strict=True)]
        out, state = list(rest[: -3 * static.num_states]), held[0]
        before = held[1] if len(held) > 1 else None
        b, n, s = (pl.program_id(axis) for axis in range(3))
        step = static.walk.step(scalars.steps, b, s)
        end = _finish if static.finish else _carry_on

        def finish() -> None:
            end(x, n, state, out, static.params)

        if not static.walk.lists and before is not None:
            # All in one go, so that it runs beside the products; what the last step of a row writes stays.
            _fold_full(x, state, before, static, step, step.first if static.walk.num_columns > 1 else True, finish)
            return
        pl.when(step.first)(lambda: online.begin(state, x.carry))
        if not static.walk.lists:
            _fold_full(x, state, before, static, step)
        else:
            pl.when(step.kind == FULL)(lambda: _fold_full(x, state, before, static, step))
            if static.rule is not None:
                pl.when(step.kind == PARTIAL)(lambda: _fold_partial(x, state, static, scalars.numbers, b, step))
        pl.when(step.last)(finish)


def _fold_full(
    x: _Inputs,
    state: State,
    before: State | None,
    static: _Static,
    step: Step,
    first: Any = False,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """A FULL tile of keys. ``first``: whether the state begins here; ``finish``: what is to be done with it."""
    params, tiles = static.params, static.tiles
    if before is None:
        for start in range(0, tiles.block_kv, tiles.sub_kv):
            _fold(x, state, params, slice(None), pl.ds(start, tiles.sub_kv), None)
        finish()
        return
    online.keep(before, state, x.carry, first)
    k, v = x.k[...], x.v[...]
    num_rows = sub_tile(tiles.block_q, _ROWS)
    for start in range(0, tiles.block_q, num_rows):
        rows = pl.ds(start, num_rows)
        products = dot(x.q[rows], k, (1, 1))
        online.fold_as_is(state, before, rows, products, lambda p: online.weighed(p, v, None), params)
    finish()
    present = None
    if static.q_length % tiles.block_q:
        row = jax.lax.broadcasted_iota(jnp.int32, (1, tiles.block_q), 1)
        present = row < static.q_length - step.row * tiles.block_q

    @pl.when(online.out_of_range(state, x.carry, params, present))
    def _() -> None:
        """Once more, with the maximum."""
        online.keep(state, before, None, False)
        _by_pieces(tiles, lambda rows, columns: _fold(x, state, params, rows, columns, None))
        finish()


def _by_pieces(tiles: TileSizes, fold: Callable[[Any, Any], None]) -> None:
    """In a compiled loop: few tiles come here, and unrolled they would be most of the program."""
    rows, sub = sub_tile(tiles.block_q, _ROWS), tiles.sub_kv
    pieces = tiles.block_kv // sub

    def piece(index: Array, _: None) -> None:
        of_queries, of_keys = jax.lax.div(index, pieces) * rows, jax.lax.rem(index, pieces) * sub
        fold(pl.ds(pl.multiple_of(of_queries, rows), rows), pl.ds(pl.multiple_of(of_keys, sub), sub))

    jax.lax.fori_loop(0, tiles.block_q // rows * pieces, piece, None)


def _fold_partial(x: _Inputs, state: State, static: _Static, numbers_smem: Any, b: Any, step: Step) -> None:
    """A PARTIAL tile, in a compiled loop over pieces: few tiles are, and unrolled they would be most of the program."""
    assert static.rule is not None
    tiles = static.tiles
    which = common.predicate(
        static.rule, numbers_smem, b, first_query=step.row * tiles.block_q, first_key=step.column * tiles.block_kv
    )
    _by_pieces(tiles, lambda rows, columns: _fold(x, state, static.params, rows, columns, which))


def _fold(x: _Inputs, state: State, params: KernelParams, rows: Any, columns: Any, which: Predicate | None) -> None:
    """One step of the online softmax for some of the tile's queries (rows) and keys (columns)."""
    allowed = None
    if which is not None:
        allowed = attends(which.query_columns(x.queries, rows, columns.size), which.key_rows(x.keys, columns))
    v = x.v[columns]
    online.fold(
        state, rows, dot(x.q[rows], x.k[columns], (1, 1)), lambda p: online.weighed(p, v, allowed), params, allowed
    )
    if allowed is not None:
        online.mark_poison(state, rows, v, allowed)


def _carry_on(x: _Inputs, n: Any, state: State, out: list[Any], params: KernelParams) -> None:
    del n  # Unused.
    out[0][...] = state.acc[...]
    out[1][...], out[2][...] = online.max_and_sum(state, x.carry, params)


def _finish(x: _Inputs, n: Any, state: State, out: list[Any], params: KernelParams) -> None:
    sink = None if x.sinks is None else x.sinks[n]
    online.end(state, x.carry, sink, out[0], out[1:], params, x.q.dtype)
