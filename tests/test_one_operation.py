"""What travels at the same time is one operation where the GPU wants it: who gets that, what is in it, and its numbers.

A CPU runs such an operation as a call like any other, if JAX knows it (0.11 and later).
"""

from __future__ import annotations

import re
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ringjax
from ringjax.kernels import xla
from ringjax.kernels.choose import Target, wants_one_operation

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
KNOWN = jax.__version_info__ >= (0, 11)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "together"),
    [
        ("gpu", H100, "9.0", True), ("gpu", "NVIDIA H200", None, True), ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "NVIDIA GB200", None, True), ("gpu", "NVIDIA GeForce RTX 5090", "12.0", True),
        ("gpu", A100, "8.0", False), ("gpu", A100, None, False), ("gpu", "NVIDIA L40S", "8.9", False),
        ("gpu", "AMD Instinct MI300X", None, False), ("tpu", "TPU v5p", None, False), ("cpu", "cpu", None, False),
    ],
)  # fmt: skip
def test_who_sends_so(platform: str, kind: str, capability: str | None, together: bool) -> None:
    assert wants_one_operation(Target(platform=platform, device_kind=kind, capability=capability)) is together


def lowered(kind: str) -> str:
    """Both passes of a ring of eight, for such GPUs."""
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=100)
    mesh = AbstractMesh((8,), ("sp",), axis_types=(AxisType.Auto,), abstract_device=device)

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        attend = lambda q, k, v: ringjax.ring_attention(  # noqa: E731
            q, k, v, mesh=mesh, segment_ids=ids, config=ringjax.RingConfig(implementation="xla", unroll=8)
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(out)

    arrays = [jax.ShapeDtypeStruct((1, 8 * 16, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    ids = jax.ShapeDtypeStruct((1, 8 * 16), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(run).trace(*arrays, ids).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(not KNOWN, reason="JAX 0.10 cannot say what belongs together")
def test_everything_of_a_hop_is_in_one() -> None:
    """K, V and segments forward; these, dK and dV backward; dK and dV of the last hop, and on their way home."""
    text = lowered(H100)
    marked = r'call @([\w.]+)\([^)]*\) \{[^}]*_collectives_group = ""[^}]*inlineable = "false"'
    groups = re.findall(marked, text)
    assert len(groups) == 7 + 7 + 2
    bodies = dict(re.findall(r"func\.func private @([\w.]+)\((.*?)\n  \}", text, re.DOTALL))
    sizes = [bodies[name].count("collective_permute") for name in groups]
    assert sizes == [3] * 7 + [3] + [5] * 6 + [2, 2]
    alone = text
    for name in set(groups):
        alone = alone.replace(bodies[name], "")
    assert "collective_permute" not in alone, "nothing travels by itself"
    assert "_collectives_group" not in lowered(A100) and "collective_permute" in lowered(A100)


RINGS = {
    "causal": (cases.Case("causal", 24, 24, 4, 2, 8, 12, is_causal=True), "zigzag", 4, {}),
    "window": (cases.Case("window", 32, 32, 2, 1, 8, 8, is_causal=True, window=(5, 0)), "contiguous", 4, {}),
    "segments, both ways": (
        cases.Case("segments", 24, 24, 4, 2, 8, 8, is_causal=True, segments="pair", sinks=True),
        "striped", 4, {"direction": "both"},
    ),
    "rings within a ring": (cases.Case("full", 24, 24, 4, 2, 8, 8), "contiguous", (2, 3), {}),
}  # fmt: skip


@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
@pytest.mark.parametrize("name", RINGS)
def test_the_same_numbers(name: str, token_major: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations give back what each array asked for, in whatever order its kernel wants it in memory."""
    case, layout, num_shards, config = RINGS[name]
    monkeypatch.setattr("ringjax.attention.wants_one_operation", lambda target: True)
    monkeypatch.setattr(xla, "TOKEN_MAJOR", token_major)
    # No call is like another, so that nothing is traced already. The cache of programs knows nothing of all this.
    options = tuple({**config, "unroll": 2 if token_major else 3}.items())
    program = cases._ring_program.__wrapped__(case, layout, num_shards, "xla", False, options)
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=num_shards, program=program)
    cases.assert_matches(case, inputs, result)


def test_under_transformations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rematerialised, in a loop over layers, over one more axis: gradients as where everything travels by itself."""
    mesh = cases.mesh_of(4)
    arrays = [jax.random.normal(jax.random.key(n), (2, 1, 16, 2, 8)) for n in range(3)]

    def gradients(marked: bool) -> Any:
        attend = lambda q, k, v: ringjax.ring_attention(q, k, v, mesh=mesh, axis_name="sp", is_causal=True)  # noqa: E731

        def loss(q: Any, k: Any, v: Any) -> Any:
            layer = jax.checkpoint(lambda x, scale: (x + attend(x, scale * k, v), None))
            return jnp.sum(jnp.sin(jax.lax.scan(layer, q, jnp.arange(1.0, 3.0))[0]))

        run = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))).lower(*arrays)
        assert ("_collectives_group" in run.as_text()) is marked
        return run.compile()(*arrays)

    alone = gradients(marked=False)
    monkeypatch.setattr("ringjax.attention.wants_one_operation", lambda target: True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), alone, gradients(marked=KNOWN))
