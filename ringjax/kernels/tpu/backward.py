"""The backward block kernel for TPU: dq, dk and dv in one pass over the tiles, five products each.

A grid over (batch row, K/V head, visited tile, query head of the group), tiles in rows of keys. dk and dv of a tile of
keys gather in the output while the queries that see it pass by; dq of all queries stays in VMEM all the while, and is
written, a tile at a time, in the last row. Where dq does not fit, the queries are cut into units, one kernel call each,
and dk and dv are carried from call to call. Logits are worked on transposed, keys along sublanes: then lse and delta,
one number per query, are rows of lanes as they lie in memory, and of the five products only dq's needs a transpose.

FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the equations are in base.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..._compat import shape_like
from ...mask import Rule, attends
from ..base import Block, Gradients, KernelParams, Upstream
from ..softmax import clean, is_finite, normaliser, scores, slope
from ..visits import EMPTY, FULL, PARTIAL
from . import common
from .common import Predicate, Scalars, dot, weights
from .steps import FLUSH, Step, Walk, plan_steps
from .tiles import TileSizes, sub_tile

# Queries and keys of a PARTIAL tile worked on at a time.
_PARTIAL = 256


class _Inputs(NamedTuple):
    """Refs (or arrays, or BlockSpecs) of what goes in. None: absent."""

    q: Any
    k: Any
    v: Any
    dout: Any
    by: Any  # Normaliser of [B, N, 1, T]
    delta: Any  # [B, N, 1, T]
    queries: Any  # Vectors of [B1, 1, T]
    keys: Any  # Vectors of [B1, 1, S]
    dq: Any  # the carry
    dk: Any  # of the units before
    dv: Any


@dataclasses.dataclass(frozen=True)
class _Units:
    """How the query heads of a K/V head and their tiles are cut, so that dq of one unit fits into VMEM."""

    heads: int  # query heads of a unit; divides the group
    tiles: int  # tiles of queries of a unit
    num_heads: int
    num_chunks: int

    @property
    def count(self) -> int:
        return self.num_heads * self.num_chunks


@dataclasses.dataclass(frozen=True)
class _Static:
    walk: Walk
    rule: Rule | None
    params: KernelParams
    tiles: TileSizes
    units: _Units


def backward(block: Block, upstream: Upstream, params: KernelParams, tiles: TileSizes, dq: Array | None) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. The carry is dq itself."""
    q, k, v, mask, _ = block
    (_, heads, q_length, size), (kv_heads, k_length) = q.shape, k.shape[1:3]
    num_q = pl.cdiv(q_length, tiles.block_q)
    units = _cut(heads // kv_heads, num_q, tiles.block_q * size * 4, tiles.dq_bytes)
    plan = plan_steps(mask, q_length, k_length, tiles, rows="keys", width=units.tiles)
    tile_mask = None if plan.lists is None else common.tile_mask(mask, q_length, k_length, tiles)
    rule, queries, keys, numbers = tile_mask or (None, None, None, None)
    static = _Static(walk=plan.walk, rule=rule, params=params, tiles=tiles, units=units)
    inputs = _Inputs(
        q=q,
        k=k,
        v=v,
        dout=upstream.dout,
        by=jax.tree.map(lambda x: x[:, :, None], normaliser(upstream.lse, upstream.saved, params)),
        delta=upstream.delta[:, :, None],
        queries=queries,
        keys=keys,
        dq=dq,
        dk=None,
        dv=None,
    )
    if units.count == 1:
        steps, num_steps = plan.chunk(0)
        return _call(static, inputs, Scalars(steps=steps, numbers=numbers), num_steps)

    def unit(index: Array, grads: Gradients) -> Gradients:
        chunk = jax.lax.rem(index, units.num_chunks)
        steps, num_steps = plan.chunk(chunk)
        place = jnp.stack([jax.lax.div(index, units.num_chunks), chunk])
        scalars = Scalars(steps=steps, numbers=numbers, place=place)
        return _call(static, inputs._replace(**grads._asdict()), scalars, num_steps)

    zeros = Gradients(*(common.zeros_like(x) for x in (q, k, v)))
    return jax.lax.fori_loop(0, units.count, unit, zeros if dq is None else zeros._replace(dq=dq))


def _cut(group: int, num_q: int, tile_bytes: int, budget: int) -> _Units:
    """As many tiles of one head as fit, then as many heads as fit. At least one tile."""
    fitting = max(budget // tile_bytes, 1)
    num_chunks = -(-num_q // fitting)
    tiles = -(-num_q // num_chunks)
    heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * tiles <= fitting))
    return _Units(heads=heads, tiles=tiles, num_heads=group // heads, num_chunks=-(-num_q // tiles))


def _call(static: _Static, inputs: _Inputs, scalars: Scalars, num_steps: Any) -> Gradients:
    """One unit; ``scalars.place`` is its index among the heads and among the chunks, None where there is but one."""
    units = static.units
    prefetch, scalars_tree = jax.tree.flatten(scalars)
    specs = _block_specs(static, inputs, scalars_tree)
    present = _Inputs(*(None if x is None else spec for x, spec in zip(inputs, specs, strict=True)))
    leaves = jax.tree.leaves(inputs)
    # dq, dk and dv are the last of the inputs, in that order, as far as they are there.
    carried = [name for name in Gradients._fields if getattr(inputs, name) is not None]
    start = len(prefetch) + len(leaves) - len(carried)
    products = inputs.q[..., 0].size * inputs.k.shape[2]
    grads = pl.pallas_call(
        _Kernel(static, scalars_tree, jax.tree.structure(inputs)),
        out_shape=tuple(shape_like(x.shape, jnp.float32, x) for x in (inputs.q, inputs.k, inputs.v)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(inputs.q.shape[0], inputs.k.shape[1], num_steps, units.heads),
            in_specs=jax.tree.leaves(present),
            out_specs=(specs.dq, specs.dk, specs.dv),
            scratch_shapes=[
                pltpu.VMEM((units.heads, units.tiles * static.tiles.block_q, inputs.q.shape[3]), jnp.float32)
            ],
        ),
        input_output_aliases={start + i: Gradients._fields.index(name) for i, name in enumerate(carried)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=static.tiles.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * (3 * inputs.q.shape[3] + 2 * inputs.v.shape[3]) // units.count,
            transcendentals=products // units.count,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
        ),
        interpret=static.params.interpret,
        name="ringjax_backward",
    )(*prefetch, *leaves)
    return Gradients(*grads)


def _block_specs(static: _Static, inputs: _Inputs, scalars_tree: Any) -> _Inputs:
    """Which block of each array a step works on, the carries' specs serving the results too."""
    tiles, units = static.tiles, static.units
    group = inputs.q.shape[1] // inputs.k.shape[1]
    size, v_size = inputs.q.shape[3], inputs.v.shape[3]

    def spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        """``index(b, K/V head, query head, first tile of the unit, step)``."""

        def index_map(b: Any, h: Any, s: Any, g: Any, *prefetched: Any) -> tuple[Any, ...]:
            scalars = jax.tree.unflatten(scalars_tree, prefetched)
            head = chunk = 0
            if scalars.place is not None:
                head, chunk = scalars.place[0], scalars.place[1]
            step = static.walk.step(scalars.steps, b, s)
            return index(b, h, h * group + head * units.heads + g, chunk * units.tiles, step)

        return pl.BlockSpec(shape, index_map)

    def side(x: Array, block: int, tile: Any) -> pl.BlockSpec:
        one = x.shape[0] == 1
        return spec((None, 1, block), lambda b, h, n, start, step: (0 if one else b, 0, tile(start, step)))

    def q_rows(width: int) -> pl.BlockSpec:
        return spec((None, None, tiles.block_q, width), lambda b, h, n, start, step: (b, n, start + step.column, 0))

    last = pl.cdiv(inputs.k.shape[2], tiles.block_kv) - 1

    def kv_rows(width: int) -> pl.BlockSpec:
        # A row of FLUSH steps lies beyond the last tile of keys, and stays there.
        shape = (None, None, tiles.block_kv, width)
        return spec(shape, lambda b, h, n, start, step: (b, h, jnp.minimum(step.row, last), 0))

    def dq_rows(b: Any, h: Any, n: Any, start: Any, step: Step) -> tuple[Any, ...]:
        # While the index stays the same nothing is read or written.
        now = _writes_dq(static, step)
        return b, jnp.where(now, n, n - n % units.heads), start + jnp.where(now, step.column, 0), 0

    row = spec((None, None, 1, tiles.block_q), lambda b, h, n, start, step: (b, n, 0, start + step.column))
    return _Inputs(
        q=q_rows(size),
        k=kv_rows(size),
        v=kv_rows(v_size),
        dout=q_rows(v_size),
        by=jax.tree.map(lambda _: row, inputs.by),
        delta=row,
        queries=jax.tree.map(lambda x: side(x, tiles.block_q, lambda start, step: start + step.column), inputs.queries),
        keys=jax.tree.map(lambda x: side(x, tiles.block_kv, lambda _, step: jnp.minimum(step.row, last)), inputs.keys),
        dq=spec((None, None, tiles.block_q, size), dq_rows),
        dk=kv_rows(size),
        dv=kv_rows(v_size),
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
        *results, dq_scratch = rest
        out = Gradients(*results)
        b, s, g = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        step = static.walk.step(scalars.steps, b, s)
        first = step.first & (g == 0)
        block = static.tiles.block_q
        dq = dq_scratch.at[g, pl.ds(pl.multiple_of(step.column * block, block), block)]
        if not static.walk.lists:
            _add_full(x, dq, out, static, first, dq_first=step.row == 0)
            # Each time, since a branch would cost more than it saves.
            _flush(x, jnp.where(_writes_dq(static, step), dq[...], 0.0), out)
            return
        pl.when((s == 0) & (g == 0))(lambda: _copy(None, dq_scratch))
        pl.when(step.kind == FULL)(lambda: _add_full(x, dq, out, static, first))
        if static.rule is not None:
            pl.when(step.kind == PARTIAL)(
                lambda: _add_partial(x, dq, out, static, first, _which(static, scalars, b, step))
            )
        pl.when((step.kind == EMPTY) & first)(lambda: _start(x, out))
        pl.when(step.kind == FLUSH)(lambda: _flush(x, dq[...], out))


def _which(static: _Static, scalars: Scalars, b: Any, step: Step) -> Predicate:
    """The mask of this step's tile."""
    assert static.rule is not None
    column = step.column if scalars.place is None else scalars.place[1] * static.units.tiles + step.column
    return common.predicate(
        static.rule,
        scalars.numbers,
        b,
        first_query=column * static.tiles.block_q,
        first_key=step.row * static.tiles.block_kv,
    )


def _writes_dq(static: _Static, step: Step) -> Any:
    return step.kind == FLUSH if static.walk.lists else step.row == static.walk.num_rows - 1


def _flush(x: _Inputs, dq: Array, out: Gradients) -> None:
    out.dq[...] = dq if x.dq is None else x.dq[...] + dq


def _start(x: _Inputs, out: Gradients) -> None:
    """dk and dv of a tile of keys before any queries."""
    _copy(x.dk, out.dk)
    _copy(x.dv, out.dv)


def _copy(before: Any, ref: Any) -> None:
    ref[...] = jnp.zeros_like(ref) if before is None else before[...]


def _add_full(x: _Inputs, dq: Any, out: Gradients, static: _Static, first: Array, *, dq_first: Any = False) -> None:
    """A FULL tile. No branch inside, so that the compiler has all sub-tiles at once to overlap.

    ``first``: nothing is in dk and dv yet, ``dq_first``: nor in dq.
    """
    tiles = static.tiles

    def add(ref: Any, at: Any, new: Array, is_first: Any, before: Any) -> None:
        old = ref[at]
        if is_first is not False:
            old = jnp.where(is_first, jnp.zeros_like(old) if before is None else before[at], old)
        ref[at] = old + new

    keys = [pl.ds(start, tiles.sub_kv) for start in range(0, x.k.shape[0], tiles.sub_kv)]
    queries = [pl.ds(start, tiles.sub_q) for start in range(0, x.q.shape[0], tiles.sub_q)]
    for j, rows in enumerate(keys):
        for i, columns in enumerate(queries):
            dq_part, dk, dv = _gradients(x, rows, columns, static, None)
            add(out.dk, rows, dk, first if i == 0 else False, x.dk)
            add(out.dv, rows, dv, first if i == 0 else False, x.dv)
            add(dq, columns, dq_part, dq_first if j == 0 else False, None)


def _add_partial(x: _Inputs, dq: Any, out: Gradients, static: _Static, first: Array, which: Predicate) -> None:
    """A PARTIAL tile, in a compiled loop over pieces: few tiles are, and unrolled they would be most of the program."""
    pl.when(first)(lambda: _start(x, out))
    sub_q, sub_kv = (sub_tile(n, _PARTIAL) for n in (x.q.shape[0], x.k.shape[0]))
    num_columns = x.q.shape[0] // sub_q

    def piece(index: Array, _: None) -> None:
        of_keys, of_queries = jax.lax.div(index, num_columns) * sub_kv, jax.lax.rem(index, num_columns) * sub_q
        rows = pl.ds(pl.multiple_of(of_keys, sub_kv), sub_kv)
        columns = pl.ds(pl.multiple_of(of_queries, sub_q), sub_q)
        dq_part, dk, dv = _gradients(x, rows, columns, static, which)
        out.dk[rows] += dk
        out.dv[rows] += dv
        dq[columns] += dq_part

    jax.lax.fori_loop(0, x.k.shape[0] // sub_kv * num_columns, piece, None)


def _gradients(
    x: _Inputs, rows: Any, columns: Any, static: _Static, which: Predicate | None
) -> tuple[Array, Array, Array]:
    """dq, dk and dv of some keys (rows) and queries (columns); logits are [keys, queries]."""
    params = static.params
    q, k, v, dout = x.q[columns], x.k[rows], x.v[rows], x.dout[columns]
    s = scores(dot(k, q, (1, 1)), params)
    p = weights(s, x.by.top[:, columns], params)
    p = p if x.by.weight is None else p * x.by.weight[:, columns]
    ds = p * (dot(v, dout, (1, 1)) - x.delta[:, columns]) * slope(s, params)
    allowed = None
    if which is not None:
        keys = which.key_columns(x.keys, rows, columns.size)
        allowed = attends(which.query_rows(x.queries, columns), keys)
        p, ds = jnp.where(allowed, p, 0.0), jnp.where(allowed, ds, 0.0)
        # An attended NaN or Inf is in p and ds already; one that is masked out must not meet a 0 there.
        q, k = clean(q), clean(k)
    ds = ds.astype(q.dtype)
    dv = dot(p.astype(dout.dtype), dout if allowed is None else clean(dout), (1, 0))
    if allowed is not None:
        dv = _mark_poison(dv, dout, allowed)
    dq = dot(k, ds, (0, 0)).T if static.tiles.dq_transposed else dot(ds, k, (0, 0))
    return dq, dot(ds, q, (1, 0)), dv


def _mark_poison(dv: Array, dout: Array, allowed: Array) -> Array:
    """NaN for the keys that a query attends to whose cotangent is NaN or Inf."""
    bad = jnp.where(is_finite(dout), 0.0, 1.0)

    def mark() -> Array:
        return jnp.where(dot(jnp.where(allowed, 1.0, 0.0), bad, (1, 0)) > 0.0, jnp.nan, dv)

    return jax.lax.cond(jnp.max(bad) > 0.0, mark, lambda: dv)
