"""The backward kernels for GPU, as far as they go without one: they are traced and lowered for an H100."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ringjax.kernels.base import KernelParams
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.mask import Mask

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)


def shapes(size: int = 64, v_size: int = 64, lengths: tuple[int, int] = (256, 256), dtype: Any = jnp.bfloat16) -> Any:
    (t, s), shape = lengths, jax.ShapeDtypeStruct
    wide = functools.partial(shape, dtype=jnp.float32)
    queries, keys = shape((1, 4, t, size), dtype), shape((1, 2, s, size), dtype)
    values, dout = shape((1, 2, s, v_size), dtype), shape((1, 4, t, v_size), dtype)
    return queries, keys, values, dout, wide((1, 4, t)), wide((1, 4, t)), wide((1, 4, t, size))


def program(mask: str, params: KernelParams) -> Any:
    def run(q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, dq: Any) -> Any:
        places = [jnp.arange(x.shape[2], dtype=jnp.int32)[None] for x in (q, k)]
        what = {
            "full": Mask(None, None, None, None),
            "causal": Mask(*places, None, None, right=0),
            "everything": Mask(*places, *(x // 100 for x in places), left=70, right=0),
        }[mask]
        return mosaic.backward(q, k, v, dout, lse, delta, what, params, dq_carry=dq)

    return run


def lower(run: Any, args: Any) -> str:
    with use_abstract_mesh(H100):
        return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        ("full", {"size": 128, "v_size": 128}),
        ("causal", {"size": 64, "v_size": 48, "lengths": (203, 335)}),
        ("everything", {"size": 80, "v_size": 128, "dtype": jnp.float16}),
        ("causal", {"size": 256, "v_size": 200}),
    ],
)
def test_lowers(mask: str, options: dict[str, Any], deterministic: bool) -> None:
    args = shapes(**options)
    params = KernelParams(
        scale=0.1, logits_soft_cap=20.0 if mask == "everything" else None, deterministic=deterministic
    )
    fused = not deterministic and options["size"] <= 128
    text = lower(program(mask, params), args)
    assert ("ringjax_backward_queries" in text) is not fused
    assert "output_operand_alias" in text
    results = jax.eval_shape(program(mask, params), *args)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, jnp.float32) for x in args[:3]]


def test_lowers_under_vmap() -> None:
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes())
    assert "output_operand_alias" in lower(jax.vmap(program("causal", KernelParams(scale=0.1))), args)


@pytest.mark.parametrize(
    ("options", "message"), [({"dtype": jnp.float32}, "bfloat16 and float16"), ({"size": 320}, "heads of at most 256")]
)
def test_says_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(program("full", KernelParams(scale=0.1)), *shapes(**options))
