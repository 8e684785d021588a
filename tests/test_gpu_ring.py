"""The ring around the GPU kernels, traced and lowered for eight H100s: above all its types under check_vma.

Rings of stacked shards are lowered in tests/test_conformance.py and tests/test_triton.py.
Kernels are opaque to the types of shard_map, so a loop over hops can only be trusted once it has been traced.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import ringjax

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
MESH = AbstractMesh((8,), ("sp",), axis_types=(AxisType.Auto,), abstract_device=H100)
# Later JAX versions say so whenever a Triton kernel is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def arrays(length: int, head_size: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, length, heads, head_size), jnp.bfloat16) for heads in (4, 2, 2, 4)]


def with_gradients(attend: Any) -> Any:
    def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    return run


def lowered(run: Any, given: Any, mesh: Any) -> str:
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


CAUSAL, WINDOW, DETERMINISTIC = "causal", "window", "deterministic"
OPTIONS: dict[str, dict[str, Any]] = {
    CAUSAL: {"is_causal": True, "layout": "zigzag"},
    WINDOW: {"local_window_size": (300, 0)},
    DETERMINISTIC: {"deterministic": True},
}


@pytest.mark.parametrize(
    ("implementation", "head_size", "name"),
    [
        # Each head size has a loop of its own kind in Mosaic's kernels. Masks are looked at with small heads, which are
        # lowered sooner.
        ("pallas_gpu", 64, CAUSAL), ("pallas_gpu", 64, WINDOW), ("pallas_gpu", 64, DETERMINISTIC),
        ("pallas_gpu", 128, CAUSAL), ("pallas_gpu", 256, DETERMINISTIC),
        ("pallas_triton", 64, WINDOW), ("pallas_triton", 128, CAUSAL),
    ],
)  # fmt: skip
def test_a_ring_of_eight_under_check_vma(implementation: str, head_size: int, name: str) -> None:
    options = dict(OPTIONS[name])
    # Loops of one hop have fewer kernels to lower; those of two, the default, are looked at with heads of 128.
    unroll = None if head_size == 128 else 1
    config = ringjax.RingConfig(
        implementation=implementation, unroll=unroll, deterministic=options.pop("deterministic", False)
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ringjax.ring_attention(q, k, v, config=config, **options)

    spec = P(None, "sp")
    run = jax.shard_map(with_gradients(attend), mesh=MESH, in_specs=spec, out_specs=(spec,) * 4, check_vma=True)
    text = lowered(run, arrays(length=8 * 256, head_size=head_size), MESH)
    assert "collective_permute" in text
    names = set(re.findall(r"ringjax_[a-z_]+", text))
    assert "ringjax_forward" in names and len(names) >= 2, "kernels of both passes"
