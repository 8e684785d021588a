"""The backward kernel that owns keys, for heads of more than 128: dk and dv, and dq on the way. Five products per tile.

Two compute warpgroups cannot hold half of the keys each, as in backward_keys.py: dk and dv of long heads leave no
registers for dq. So a program owns 64 keys, and each of its warpgroups one of the two sums: one computes p and dv, the
other ds and dk, and half of the columns of dq each. p goes from one to the other through SMEM in float32, ds back in 16
bits. Logits are worked on transposed, keys along rows, as there: p^T and ds^T are left operands in registers, and the
logits of the next tile follow at once, as far as there are registers for it.

SMEM is busier than the tensor cores: a product whose operands both lie there takes as long to read as to multiply. That
is why q k^T is not divided between the warpgroups, which would read each operand twice.

The equations are in base.py; what NaN and Inf reach is as in backward_keys.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from . import backward_common as gpu
from . import ptx
from .backward_common import COMPUTE_THREADS, COMPUTE_WARPGROUPS, Inputs, Place, Static, Tile
from .common import COLUMNS, MATRIX, smem_tile, zeros
from .tiles import WARPGROUP_ROWS, WARPGROUP_THREADS

BLOCK = WARPGROUP_ROWS  # of keys and of queries
_LOGITS = plgpu.WGMMAAccumulatorRef((BLOCK, BLOCK), jnp.float32)
_PARTS = 2  # of 64 columns, of a warpgroup's half of dq
_VALUES = 0  # the warpgroup that sums dv. The other sums dk
# Named barriers: p is there; ds is, and p has been read; one for each warpgroup by itself.
_P_READY, _DS_READY, _OWN = 11, 12, 13


def run(static: Static, x: Inputs, dq: Array | None, dk: Any, dv: Any) -> tuple[Array | None, Array, Array]:
    """``dq`` with the share of these keys added (None: not computed), and dk and dv, of the types given."""
    scratch = (smem_tile((BLOCK, BLOCK), jnp.float32), smem_tile((BLOCK, BLOCK), x.q.dtype))
    return gpu.run_over_keys("ringjax_backward_long", _Kernel, static, x, dq, dk, dv, scratch)


def dq_shape(batch: int, heads: int, length: int, size: int) -> tuple[int, ...]:
    """Of dq between hops: parts of 64 x 64, each in the order in which a warpgroup holds a product.

    So dq is added to from registers, by warps that each reach whole lines of memory: through SMEM and by TMA, as in
    backward_keys.py, it took half of the kernel's time (docs/optimisation-log.md).
    """
    return batch, heads, -(-length // BLOCK), size // WARPGROUP_ROWS, BLOCK * WARPGROUP_ROWS


def finished_dq(dq: Array, length: int, size: int) -> Array:
    """[B, N, T, H] of it."""
    batch, heads, _, columns, _ = dq.shape
    dq = jnp.swapaxes(ptx.in_order(dq), 3, 4).reshape(batch, heads, -1, columns * WARPGROUP_ROWS)
    return dq[:, :, :length, :size]


@dataclasses.dataclass(frozen=True)
class _Kernel(gpu.OverKeys):
    p_smem: Any  # [keys, queries], float32: p^T times the slope
    ds_smem: Any  # [keys, queries]: ds^T

    def compute(self, place: Place) -> None:
        static, there = self.static, self.there
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(there.keys_ready)
        products = None
        if self._ahead(place):
            multiply = lambda acc, slot: self._multiply(place, acc, slot)  # noqa: E731
            products = gpu.first_products(static, self.x, there, place, _LOGITS, multiply)
        step = self._add_values if place.warpgroup == _VALUES else self._add_keys
        clean_keys = lambda: gpu.clean(place, there.k_smem)  # noqa: E731
        total, _ = gpu.visit(
            static, self.x, place, lambda now, state: step(place, now, *state),
            (zeros((BLOCK, static.size)), products), before_partial=clean_keys,
        )  # fmt: skip
        if place.warpgroup == _VALUES:
            total = gpu.without_scale(static, total)
        out_gmem, free_smem = ((self.dv, there.v_smem), (self.dk, there.k_smem))[place.warpgroup]
        for turn in range(COMPUTE_WARPGROUPS):  # float32 goes through the SMEM of p, which has room for one at a time
            gpu.join_compute_warpgroups()  # nobody multiplies by these keys and values any more
            if turn == place.warpgroup:
                gpu.store(static, total, out_gmem.at[gpu.keys(static, place)], free_smem, self.p_smem)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _ahead(self, place: Place) -> bool:
        """Whether products of a tile are computed while the one before is at work, if there are registers for it."""
        return place.warpgroup != _VALUES or not self.static.masked

    def _add_values(self, place: Place, now: Tile, dv: Array, products: Array | None) -> tuple[Array, Array | None]:
        """dv with a share added, half of its dq, and k q^T of the next tile. ``products``: of this one."""
        tile = gpu.column(self.x, place, now.n)  # this early, since GMEM takes its time
        there, slot = self.there, gpu.slot_of(self.static, now.index)
        lse_smem, delta_smem = (there.rows_smem.at[slot, n] for n in range(2))
        if not self._ahead(place):
            plgpu.barrier_wait(there.queries_ready.at[slot])
        if now.masked:
            gpu.clean(place, there.q_smem.at[slot], there.dout_smem.at[slot], rows_smem=there.rows_smem.at[slot])
        if not self._ahead(place):
            products = self._products(place, slot)
        assert products is not None
        lse, k_start = gpu_load(lse_smem, COLUMNS), place.tile * BLOCK
        p, slope = gpu.transposed_softmax(self.static, self.x, place, now, tile, products, lse, delta_smem, k_start)
        weights = p.astype(self.x.q.dtype)
        self.p_smem[...] = p if slope is None else p * slope
        ptx.arrive(_P_READY, COMPUTE_THREADS)
        add: Any = pl.run_state(lambda dv_acc: plgpu.wgmma(dv_acc, weights, there.dout_smem.at[slot]))
        dv = add(plgpu.WGMMAAccumulatorRef.init(dv))
        plgpu.barrier_arrive(there.queries_consumed.at[slot])
        ptx.sync(_DS_READY, COMPUTE_THREADS)

        self._add_dq(place, now, tile, 0, None)
        if not self._ahead(place):
            self._add_dq(place, now, tile, 1, None)
            return dv, None

        def products_after(acc: Any) -> Array:
            next_products = lambda: self._multiply(place, acc, gpu.wait_for_next(self.static, there, now))  # noqa: E731
            self._add_dq(place, now, tile, 1, next_products)
            return acc[...]

        return dv, pl.run_scoped(products_after, _LOGITS)

    def _add_keys(self, place: Place, now: Tile, dk: Array, dp: Array) -> tuple[Array, Array]:
        """dk with a share added, half of its dq, and v dout^T of the next tile. ``dp``: of this one."""
        tile = gpu.column(self.x, place, now.n)
        there, slot = self.there, gpu.slot_of(self.static, now.index)
        if now.masked:
            gpu.clean(place, there.q_smem.at[slot], there.dout_smem.at[slot], rows_smem=there.rows_smem.at[slot])
        ptx.sync(_P_READY, COMPUTE_THREADS)
        p = gpu_load(self.p_smem, MATRIX)  # times the slope
        ds = gpu.transposed_ds(now, p, dp, None, there.rows_smem.at[slot, 1]).astype(self.x.q.dtype)
        self.ds_smem[...] = ds
        plgpu.commit_smem()
        ptx.arrive(_DS_READY, COMPUTE_THREADS)

        def multiply(refs: Any) -> None:
            dk_acc, following = refs
            self._add_dq(place, now, tile, 0, lambda: plgpu.wgmma(dk_acc, ds, there.q_smem.at[slot]))

            def products_after(acc: Any) -> Array:
                next_products = lambda: self._multiply(place, acc, gpu.wait_for_next(self.static, there, now))  # noqa: E731
                self._add_dq(place, now, tile, 1, next_products)
                return acc[...]

            following[...] = pl.run_scoped(products_after, _LOGITS)

        results: Any = pl.run_state(multiply)((plgpu.WGMMAAccumulatorRef.init(dk), dp))
        dk, following = results
        plgpu.barrier_arrive(there.queries_consumed.at[slot])
        return dk, following

    def _multiply(self, place: Place, acc: Any, slot: Any) -> None:
        """k q^T or v dout^T, of which p and ds are made."""
        there = self.there
        if place.warpgroup == _VALUES:
            left, right = there.k_smem, there.q_smem.at[slot]
        else:
            left, right = there.v_smem, there.dout_smem.at[slot]
        plgpu.wgmma(acc, left, right.transpose((1, 0)))

    def _products(self, place: Place, slot: Any) -> Array:
        def multiply(acc: Any) -> Array:
            self._multiply(place, acc, slot)
            return acc[...]

        return pl.run_scoped(multiply, _LOGITS)

    def _add_dq(self, place: Place, now: Tile, tile: Any, part: int, beside: Callable[[], None] | None) -> None:
        """Adds 64 of this warpgroup's columns of a tile's dq, while another product is at work."""
        if self.dq is None:
            return None if beside is None else beside()
        column = place.warpgroup * _PARTS + part
        columns = pl.ds(column * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def multiply(acc: Any) -> None:
            plgpu.wgmma(acc, self.ds_smem.transpose((1, 0)), self.there.k_smem.at[:, columns])
            if beside is not None:
                beside()
            dq = plgpu.wgmma_accumulator_load(acc, wait_n=0 if beside is None else 1)
            ptx.add_to_gmem(dq, self.dq.at[place.batch, now.head, tile, column], MATRIX)
            # Otherwise ptxas gives the next product other registers, of which there are too few (C7512).
            ptx.sync(_OWN + place.warpgroup, WARPGROUP_THREADS)

        return pl.run_scoped(multiply, _LOGITS)
