"""PTX instructions for which Pallas has no operation. JAX's interpreter for GPUs does not know them.

Named barriers: a block of threads has sixteen in hardware, numbers 0 to 15. Number 0 and those from 1 on of each
warpgroup are Mosaic's. Who is to wait syncs, who need not wait arrives; a barrier opens when so many threads have come.
An mbarrier can do the same in SMEM, but there every thread of a warpgroup arrives by itself.
See https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

_NUMBER = plgpu.Layout.WG_SPLAT  # of a scalar that all threads have
# What a thread wrote to SMEM is there for WGMMA and TMA, after a barrier.
FENCE = "fence.proxy.async.shared::cta;"
_VECTOR_BYTES = 16  # that one thread loads at a time
_FOUND = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_NUMBER)


def instruction(text: str) -> None:
    """Instructions without operands, executed by every thread."""

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        _assembly(None, [], text, "")

    emit()  # pyright: ignore[reportCallIssue]


def sync(barrier: Any, threads: int) -> None:
    """Waits at a named barrier until so many threads have come."""
    _bar("sync", barrier, threads)


def arrive(barrier: Any, threads: int) -> None:
    """Comes to a named barrier and goes on."""
    _bar("arrive", barrier, threads)


def any_above(x: jax.Array, layout: Any, bound: float, barrier: Any) -> jax.Array:
    """Whether a float32 number that a warpgroup holds is above ``bound``, as NaN is not. It meets at ``barrier``."""

    def emit(_: Any, held: Any, number: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pairs = held.registers.flat  # vectors of two
        numbers = [llvm.extractelement(pair, utils.c(i, i32)) for pair in pairs for i in range(2)]
        bits = struct.unpack("<I", struct.pack("<f", bound))[0]
        text = "{ .reg .pred above, any; .reg .f32 most; mov.f32 most, $1; "
        text += "".join(f"max.f32 most, most, ${i + 1}; " for i in range(1, len(numbers)))
        text += f"setp.gt.f32 above, most, 0f{bits:08X}; bar.red.or.pred any, ${len(numbers) + 1}, 128, above; "
        text += "selp.u32 $0, 1, 0, any; }"
        found = _assembly(i32, [*numbers, *number.registers.flat], text, "=r" + ",f" * len(numbers) + ",r")
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    call: Any = plgpu.inline_mgpu(arg_types=(layout, _NUMBER), return_type=_FOUND)(emit)
    return call(x, jnp.asarray(barrier, jnp.int32)) > 0


def clean(
    tiles_smem: Sequence[Any],
    transforms: tuple[Any, ...],
    part: int,
    meet: tuple[int, int],
    suspect: tuple[Any, int] | None = None,
) -> None:
    """Zero in place of NaN and Inf in tiles of 16 bits each, by warpgroups that meet before and after.

    All by one piece of assembly: of a branch around other code ptxas makes wgmma synchronous (C7512, C7520).

    Args:
      tiles_smem: without gaps.
      transforms: how they lie.
      part: 0 or 1, the half of each that this warpgroup sees to.
      meet: named barrier, and how many threads come to it.
      suspect: (float32 numbers in SMEM, the warpgroup's own named barrier): only if one of the numbers is NaN or Inf.
    """
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}[jnp.dtype(tiles_smem[0].dtype).name]
    text = "{ .reg .pred bad, any, low, high; .reg .f32 sum, number; .reg .b32 at, thread, t, x<4>; "
    text += f"mov.u32 thread, %tid.x; and.b32 thread, thread, 127; mul.lo.u32 thread, thread, {_VECTOR_BYTES}; "
    barrier = f"{FENCE} bar.sync {meet[0]}, {meet[1]}; "

    def body(first: int) -> str:
        """Of operands from ``first`` on, which say where the tiles are."""
        text = barrier
        for n, x_smem in enumerate(tiles_smem):
            vectors = math.prod(x_smem.shape) * 2 // (_VECTOR_BYTES * 128 * 2)
            text += f"add.u32 at, thread, ${first + n}; "
            for vector in range(part * vectors, (part + 1) * vectors):
                where = f"[at + {_VECTOR_BYTES * 128 * vector}]"
                text += f"ld.shared.v4.b32 {{x0, x1, x2, x3}}, {where}; "
                for i in range(4):
                    for name, shift, other in (("low", 0, 0xFFFF0000), ("high", 16, 0xFFFF)):
                        text += f"and.b32 t, x{i}, {exponent << shift}; setp.eq.u32 {name}, t, {exponent << shift}; "
                        text += f"@{name} and.b32 x{i}, x{i}, {other}; "
                text += f"st.shared.v4.b32 {where}, {{x0, x1, x2, x3}}; "
        return text + barrier

    def starts(refs: Any) -> list[Any]:
        i32 = ir.IntegerType.get_signless(32)
        return [llvm.ptrtoint(i32, utils.memref_ptr(ref)) for ref in refs]

    types = tuple(plgpu.RefType(transforms) for _ in tiles_smem)
    if suspect is None:

        def emit(_: Any, *refs: Any) -> None:
            _assembly(None, starts(refs), text + body(0) + "}", ",".join(["r"] * len(refs)))

        call: Any = plgpu.inline_mgpu(arg_types=types)(emit)
        call(*tiles_smem)
        return
    numbers_smem, own = suspect
    count = math.prod(numbers_smem.shape)
    assert count & (count - 1) == 0, numbers_smem.shape

    def emit_if(_: Any, *refs: Any) -> None:
        asked = text + "mov.u32 at, %tid.x; mov.f32 sum, 0f00000000; "
        asked += f"and.b32 at, at, {min(count, 128) - 1}; mad.lo.u32 at, at, 4, $0; "
        for n in range(0, count, 128):  # x * 0 is NaN for these only
            asked += f"ld.shared.f32 number, [at + {4 * n}]; fma.rn.f32 sum, number, 0f00000000, sum; "
        asked += f"setp.nan.f32 bad, sum, sum; bar.red.or.pred any, {own}, 128, bad; @!any bra CLEAN; "
        _assembly(None, starts(refs), asked + body(1) + "CLEAN: }", ",".join(["r"] * len(refs)))

    call = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *types))(emit_if)
    call(numbers_smem, *tiles_smem)


def any_not_finite_in_smem(x_smem: Any, transforms: tuple[Any, ...], barrier: int) -> jax.Array:
    """Whether SMEM without gaps holds NaN or Inf, 16 bits each. A warpgroup looks, and meets at ``barrier``.

    x * 0 is NaN for these only: x * 0 + 0 has no bit set otherwise.
    """
    vectors, rest = divmod(math.prod(x_smem.shape) * 2, _VECTOR_BYTES * 128)
    assert rest == 0, x_smem.shape
    pair = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(x_smem.dtype).name]

    def emit(_: Any, ref: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        text = "{ .reg .pred bad, any; .reg .b32 at, zero, x<4>, s<4>; mov.u32 at, %tid.x; and.b32 at, at, 127; "
        text += f"mad.lo.u32 at, at, {_VECTOR_BYTES}, $1; mov.b32 zero, 0; "
        text += "".join(f"mov.b32 s{i}, 0; " for i in range(4))
        for n in range(vectors):
            text += f"ld.shared.v4.b32 {{x0, x1, x2, x3}}, [at + {_VECTOR_BYTES * 128 * n}]; "
            text += "".join(f"fma.rn.{pair} s{i}, x{i}, zero, s{i}; " for i in range(4))
        text += "or.b32 s0, s0, s1; or.b32 s2, s2, s3; or.b32 s0, s0, s2; setp.ne.b32 bad, s0, 0; "
        text += f"bar.red.or.pred any, {barrier}, 128, bad; selp.u32 $0, 1, 0, any; }}"
        found = _assembly(i32, [llvm.ptrtoint(i32, utils.memref_ptr(ref))], text, "=r,r")
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    call: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=_FOUND)(emit)
    return call(x_smem) > 0


def draw(counter_gmem: Any, place_smem: Any, barrier: int) -> jax.Array:
    """Adds 1 to an int32 in GMEM, once for the warpgroup; what it was goes to all its threads, and to SMEM.

    The warpgroup meets at ``barrier``.
    """

    def emit(_: Any, counter: Any, place: Any) -> Any:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        text = "{ .reg .pred first; .reg .b32 was; mov.u32 was, %tid.x; and.b32 was, was, 127; "
        text += "setp.eq.u32 first, was, 0; @first atom.relaxed.gpu.global.add.u32 was, [$1], 1; "
        text += f"@first st.shared.b32 [$2], was; bar.sync {barrier}, 128; ld.shared.b32 $0, [$2]; }}"
        starts = (llvm.ptrtoint(t, utils.memref_ptr(ref)) for t, ref in ((i64, counter), (i32, place)))
        return mgpu.FragmentedArray.splat(_assembly(i32, starts, text, "=r,l,r"), (), is_signed=True)

    call: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=_FOUND)(emit)
    return call(counter_gmem, place_smem)


def add_to_gmem(x: jax.Array, out_gmem: Any, layout: Any) -> None:
    """Adds float32 numbers that a warpgroup holds to GMEM without gaps, in the order in which its threads hold them.

    Each thread adds four at a time, so that a warp adds to 512 bytes in a row. There is no order among those that add.
    """

    def emit(_: Any, held: Any, ref: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        # Vectors of two. WGMMA leaves these in registers in a row, of which REDG wants four.
        numbers = [llvm.extractelement(pair, utils.c(i, i32)) for pair in held.registers.flat for i in range(2)]
        text = "{ .reg .u64 at; .reg .u32 thread; mov.u32 thread, %tid.x; and.b32 thread, thread, 127; "
        text += f"mad.wide.u32 at, thread, {_VECTOR_BYTES}, $0; "
        for n in range(0, len(numbers), 4):
            four = ", ".join(f"${n + i + 1}" for i in range(4))
            text += f"red.relaxed.gpu.global.add.v4.f32 [at + {_VECTOR_BYTES * 128 * (n // 4)}], {{{four}}}; "
        at = llvm.ptrtoint(i64, utils.memref_ptr(ref))
        _assembly(None, [at, *numbers], text + "}", ",".join(["l"] + ["f"] * len(numbers)))

    call: Any = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(emit)
    call(x, out_gmem)


def in_order(x: jax.Array) -> jax.Array:
    """What was 64 x 64 numbers, in the order in which a warpgroup holds them: [..., 64 * 64] to [..., 64, 64], by XLA.

    Of 8 columns, a thread has two in each of two rows, 8 apart, of the 16 rows of its warp.
    """
    *outer, _ = x.shape
    x = x.reshape(*outer, 8, 4, 8, 4, 2, 2)
    eight, warp, row, thread, half, column = range(len(outer), x.ndim)
    return x.transpose(*range(len(outer)), warp, half, row, eight, thread, column).reshape(*outer, 64, 64)


def _bar(action: str, barrier: Any, threads: int) -> None:
    def emit(_: Any, number: Any) -> None:
        _assembly(None, number.registers.flat, f"bar.{action} $0, {threads};", "r")

    call: Any = plgpu.inline_mgpu(arg_types=(_NUMBER,))(emit)
    call(jnp.asarray(barrier, jnp.int32))


def _assembly(result: Any, operands: Any, text: str, constraints: str) -> Any:
    result = ir.Type.parse("!llvm.void") if result is None else result
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=True)
