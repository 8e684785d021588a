"""PTX instructions for which Pallas has no operation. JAX's interpreter for GPUs does not know them.

Named barriers: a block of threads has sixteen in hardware, numbers 0 to 15. Number 0 and those from 1 on of each
warpgroup are Mosaic's. Who is to wait syncs, who need not wait arrives; a barrier opens when so many threads have come.
An mbarrier can do the same in SMEM, but there every thread of a warpgroup arrives by itself.
See https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

import math
import struct
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

_NUMBER = plgpu.Layout.WG_SPLAT  # of a scalar that all threads have
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


def any_not_finite(x_smem: Any, transforms: tuple[Any, ...], barrier: int) -> jax.Array:
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


def _bar(action: str, barrier: Any, threads: int) -> None:
    def emit(_: Any, number: Any) -> None:
        _assembly(None, number.registers.flat, f"bar.{action} $0, {threads};", "r")

    call: Any = plgpu.inline_mgpu(arg_types=(_NUMBER,))(emit)
    call(jnp.asarray(barrier, jnp.int32))


def _assembly(result: Any, operands: Any, text: str, constraints: str) -> Any:
    result = ir.Type.parse("!llvm.void") if result is None else result
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=True)
