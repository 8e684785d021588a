"""The backward kernel that owns keys: dk and dv of a tile, and dq on the way. Hopper GPUs, five products per tile.

A program owns 128 keys of one K/V head: 64 each for two compute warpgroups, which keep their rows of dk and dv in
registers while the queries that attend to them pass by, or a part of these, brought by a memory warpgroup. Logits are
worked on transposed, keys along rows: then p^T and ds^T lie in registers as dv = p^T dout and dk = ds^T q want their
left operands, and only dq = ds k takes ds through SMEM. It sums over the keys of both warpgroups; each computes one
half of it and has TMA add it to dq in GMEM. Those sums come in the order in which programs get there: dq differs in its
last bits from run to run.

The tensor cores should never wait, and SMEM is as busy as they are, least under dv and dk, whose left operands it need
not bring. So exponentials are taken under v dout^T, and dq is stored under ds^T q and the logits of the next tile,
which follow at once. p^T dout runs under ds, or with heads of 64, where ds is soon there, while one warpgroup waits for
the other. They meet once per tile: then ds of both is there for dq, and dq of the tile before for TMA. An accumulator
is made where it is needed, since from there on it takes registers.

NaN or Inf in dout, or in the output, reaches whole rows of dv in PARTIAL tiles, for the keys that its query attends to;
other kernels confine it to a column.

FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the division of work after FlashAttention-3, Shah et al.
2024, arXiv:2407.08608; the equations are in base.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from . import backward_common as gpu
from . import ptx
from .backward_common import BLOCK_KV, COMPUTE_WARPGROUPS, Inputs, Place, Static, Tile
from .common import COLUMNS, smem_tile, zeros
from .tiles import WARPGROUP_ROWS

_THERE = 11  # named barrier: ds of the first warpgroup is there. The next one: of the second


class _State(NamedTuple):
    """What a compute warpgroup keeps in registers from tile to tile, beside dk and dv."""

    head: Any  # of the tile before, whose dq is in SMEM and still to be sent
    n: Any  # which of those visited it was. -1: none
    products: Any  # k q^T of the next tile. All are None where there is no dq, which they are computed beside


def run(static: Static, x: Inputs, dq: Array | None, dk: Any, dv: Any) -> tuple[Array | None, Array, Array]:
    """``dq`` with the share of these keys added (None: not computed), and dk and dv, of the types given."""
    scratch = (
        smem_tile((8, 64) if dq is None else (2, BLOCK_KV, static.block_q), x.q.dtype),
        smem_tile((1 if dq is None else 2, COMPUTE_WARPGROUPS, WARPGROUP_ROWS, WARPGROUP_ROWS), jnp.float32),
    )
    return gpu.run_over_keys("ringjax_backward_keys", _Kernel, static, x, dq, dk, dv, scratch)


@dataclasses.dataclass(frozen=True)
class _Kernel(gpu.OverKeys):
    ds_smem: Any  # [2, keys, queries]: ds^T
    sums_smem: Any  # [2, warpgroups, 64, 64]: float32 on its way to GMEM

    @property
    def waits_under_dv(self) -> bool:
        """Whether p^T dout runs while a warpgroup waits for ds of the other, in place of under its own ds."""
        return self.dq is not None and self.static.size == WARPGROUP_ROWS

    def compute(self, place: Place) -> None:
        static, x, there = self.static, self.x, self.there
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(there.keys_ready)
        _, visited = gpu.counts(x, place)

        def visit(sums: Any) -> None:
            head = n = products = None
            if self.dq is not None:
                head = n = jnp.int32(-1)
                multiply = lambda acc, slot: self._multiply_logits(place, acc, slot)  # noqa: E731
                products = gpu.first_products(static, x, there, place, self._logits, multiply)
            add = lambda now, state: self._add(now, place, state, *sums)  # noqa: E731
            clean_keys = lambda: gpu.clean(place, there.k_smem)  # noqa: E731
            state = gpu.visit(static, x, place, add, _State(head, n, products), before_partial=clean_keys)
            gpu.join_compute_warpgroups()  # nobody multiplies by these keys any more
            if self.dq is not None:
                self._send_dq(place, visited * static.group, state, self._tile_before(place, state))

        start = plgpu.WGMMAAccumulatorRef.init
        nothing = zeros((WARPGROUP_ROWS, static.size))
        sums: Any = pl.run_state(visit)((start(nothing), start(nothing)))
        dk, dv = sums
        keys = (place.batch, pl.ds(place.tile * BLOCK_KV + place.own.start, WARPGROUP_ROWS), place.head)
        sums_smem = self.sums_smem.at[0, place.warpgroup]
        gpu.store(static, dk, self.dk.at[keys], there.k_smem.at[place.own], sums_smem)
        gpu.store(static, gpu.without_scale(static, dv), self.dv.at[keys], there.v_smem.at[place.own], sums_smem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _add(self, now: Tile, place: Place, state: _State, dk_acc: Any, dv_acc: Any) -> _State:
        """One tile of queries: dk and dv with its share added, its dq in SMEM, that of the tile before sent off."""
        static, there = self.static, self.there
        slot = gpu.slot_of(static, now.index)
        tile = gpu.column(self.x, place, now.n) if now.masked else None  # this early, since GMEM takes its time
        if self.dq is None:
            plgpu.barrier_wait(there.queries_ready.at[slot])
        if now.masked:  # here, where registers are free
            gpu.clean(place, there.q_smem.at[slot], there.dout_smem.at[slot], rows_smem=there.rows_smem.at[slot])
        # p^T dout comes after ds in PARTIAL tiles as well: ds has the registers to itself there.
        at_once = None if self.waits_under_dv or now.masked else dv_acc

        def with_logits(acc: Any) -> tuple[Array, Array]:
            self._multiply_logits(place, acc, slot)
            product = lambda: plgpu.wgmma_accumulator_load(acc, wait_n=0 if now.masked else 1)  # noqa: E731
            return self._weights_and_ds(now, place, tile, product, at_once)

        if self.dq is None:
            weights, ds = pl.run_scoped(with_logits, self._logits)
        else:
            weights, ds = self._weights_and_ds(now, place, tile, lambda: state.products, at_once)
        multiply_dk = lambda: plgpu.wgmma(dk_acc, ds, there.q_smem.at[slot])  # noqa: E731
        multiply_dv = lambda: plgpu.wgmma(dv_acc, weights, there.dout_smem.at[slot])  # noqa: E731
        if now.masked and not self.waits_under_dv:
            multiply_dv()
        following = None
        if self.dq is None:
            multiply_dk()
            plgpu.wgmma_wait(0)
        else:
            following = self._add_dq(now, place, state, ds, multiply_dv, multiply_dk)
        plgpu.barrier_arrive(there.queries_consumed.at[slot])
        before = (None, None) if self.dq is None else (now.head, now.n)
        return _State(*before, following)

    def _weights_and_ds(
        self, now: Tile, place: Place, tile: Any, product: Callable[[], Array], dv_acc: Any
    ) -> tuple[Array, Array]:
        """p^T and ds^T of a tile. ``product()`` waits for its logits. ``dv_acc``: to add to as soon as p is there."""
        static, there, dtype = self.static, self.there, self.x.q.dtype
        slot = gpu.slot_of(static, now.index)
        dout_smem, (lse_smem, delta_smem) = there.dout_smem.at[slot], (there.rows_smem.at[slot, n] for n in range(2))

        def work(dp_acc: Any) -> tuple[Array, Array]:
            multiply_dp = lambda: plgpu.wgmma(dp_acc, there.v_smem.at[place.own], dout_smem.transpose((1, 0)))  # noqa: E731
            if not now.masked:
                multiply_dp()
            lse, logits = gpu_load(lse_smem, COLUMNS), product()
            k_start = place.tile * BLOCK_KV + place.own.start
            p, slope = gpu.transposed_softmax(static, self.x, place, now, tile, logits, lse, delta_smem, k_start)
            weights = p.astype(dtype)
            if now.masked:  # one after the other: the predicate takes the registers
                multiply_dp()
            if dv_acc is not None:
                plgpu.wgmma(dv_acc, weights, dout_smem)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0 if dv_acc is None else 1)
            return weights, gpu.transposed_ds(now, p, dp, slope, delta_smem).astype(dtype)

        return pl.run_scoped(work, self._logits)

    def _add_dq(
        self, now: Tile, place: Place, state: _State, ds: Array, multiply_dv: Callable[[], None],
        multiply_dk: Callable[[], None],
    ) -> Array:  # fmt: skip
        """Half of a tile's dq, and the logits of the next tile. ``multiply_dv``: only if it is still to be done."""
        static, there = self.static, self.there
        self.ds_smem.at[now.index & 1, place.own][...] = ds
        # Before the barrier: the half of sums_smem that is written next has been read.
        ptx.instruction("cp.async.bulk.wait_group.read 0;")
        if self.waits_under_dv:
            ptx.instruction(ptx.FENCE)
            ptx.arrive(_THERE + place.warpgroup, gpu.COMPUTE_THREADS)
            multiply_dv()
            ptx.sync(_THERE + 1 - place.warpgroup, gpu.COMPUTE_THREADS)
        else:
            gpu.join_compute_warpgroups()
        tile_before = self._tile_before(place, state)  # this early, since GMEM takes its time
        queries, columns = self._half(place)
        ds_smem = self.ds_smem.at[now.index & 1, :, queries]

        def multiply_dq(acc: Any) -> Array:
            plgpu.wgmma(acc, ds_smem.transpose((1, 0)), there.k_smem.at[:, columns])
            multiply_dk()
            return plgpu.wgmma_accumulator_load(acc, wait_n=1)

        dq = pl.run_scoped(multiply_dq, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, WARPGROUP_ROWS), jnp.float32))
        # Before the accumulator is made: the first product takes zeros at no cost. Heads of 128 are slower that way.
        following = gpu.wait_for_next(static, there, now) if static.size == WARPGROUP_ROWS else None

        def send_under_logits(acc: Any) -> Array:
            slot = gpu.wait_for_next(static, there, now) if following is None else following
            self._multiply_logits(place, acc, slot)
            self._send_dq(place, now.index, state, tile_before)
            self._sums(place, now.index)[...] = dq
            return acc[...]

        return pl.run_scoped(send_under_logits, self._logits)

    @property
    def _logits(self) -> Any:
        return plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self.static.block_q), jnp.float32)

    def _multiply_logits(self, place: Place, acc: Any, slot: Any) -> None:
        plgpu.wgmma(acc, self.there.k_smem.at[place.own], self.there.q_smem.at[slot].transpose((1, 0)))

    def _tile_before(self, place: Place, state: _State) -> Any:
        return gpu.column(self.x, place, jnp.maximum(state.n, 0))

    def _half(self, place: Place) -> tuple[Any, Any]:
        """Which queries and columns of a tile's dq this warpgroup computes: 64 x 64."""
        first = pl.ds(0, WARPGROUP_ROWS)
        return (place.own, first) if self.static.size == WARPGROUP_ROWS else (first, place.own)

    def _sums(self, place: Place, index: Any) -> Any:
        """Where dq of the index-th tile waits in SMEM."""
        return self.sums_smem.at[index & 1, place.warpgroup]

    def _send_dq(self, place: Place, index: Any, state: _State, tile: Any) -> None:
        """Adds dq of the tile before the index-th: a barrier later, every thread has stored its part."""
        queries, columns = self._half(place)
        rows = pl.ds(tile * self.static.block_q + queries.start, WARPGROUP_ROWS)
        out_gmem = self.dq.at[place.batch, rows, state.head, columns]
        plgpu.copy_smem_to_gmem(self._sums(place, index - 1), out_gmem, state.n >= 0, reduction_op="add")
