"""RMSNorm and the products it goes into while devices share the features of a token."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_decoder import change, cube, make, ring_mesh

from ringjax.kernels.choose import Target
from ringjax.layers import norm, placement
from ringjax.layers.placement import FSDP, TENSOR, Distribution, Placement
from ringjax.layout import as_layout

E, EPS = 16, 1e-3


def decoding(mesh: Any) -> Placement:
    axes = {name: name if mesh is not None and name in mesh.axis_names else None for name in ("data", "tensor")}
    told = Distribution.of(
        axis_name="sp",
        batch_axis_name=axes["data"],
        head_axis_name=axes["tensor"],
        mesh=mesh,
        layout=as_layout("striped"),
        num_shards=1 if mesh is None else None,
    )
    return told.here().decoding()


def given(rows: int, tokens: int, heads: tuple[int, ...], dtype: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """x, scale, kernels and what the results are multiplied with for a gradient; x is far from 1."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    x, scale = 30 * draw(rows, tokens, E), 1 + draw(E) / 4
    return x, scale, [draw(E, n, 2) for n in heads], [draw(rows, tokens, n, 2) for n in heads]


def oracle(x: Any, scale: Any, kernels: Any, weights: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Results, and the gradient of their weighted sum for x, the scale and each kernel."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    root = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    y = x / root * scale
    results, dy, of_kernels = [], 0.0, []
    for kernel, weight in zip(kernels, weights, strict=True):
        kernel, weight = np.asarray(kernel, np.float64), np.asarray(weight, np.float64)
        results.append(np.einsum("bte,enh->btnh", y, kernel))
        dy = dy + np.einsum("btnh,enh->bte", weight, kernel)
        of_kernels.append(np.einsum("bte,btnh->enh", y, weight))
    dn = dy * scale
    dx = dn / root - x * (dn * x).mean(-1, keepdims=True) / root**3
    return results, [dx, (dy * x / root).sum((0, 1)), *of_kernels]


def shared(here: Placement, x: Any, kernels: Any) -> tuple[Any, Any]:
    """As a decoder has them."""
    return here.stream(x), [here.gather(k, FSDP, TENSOR, None) for k in kernels]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("mesh", "heads", "waits"),
    [
        (None, (4, 2, 2), False),
        (3, (4, 2, 2), False),  # no third of the features
        (4, (4, 2, 2), True),
        ("cube", (4, 2, 2), True),
        ("cube", (4, 1, 1), True),  # one K/V head is whole on both devices: the norm comes first after all
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 3)])
def test_products_of_a_norm(
    mesh: Any, heads: Any, waits: bool, rows: int, tokens: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows == 1:  # as on GPUs, where a single token is joined by another
        monkeypatch.setattr(
            placement, "target_of", lambda mesh: Target(platform="gpu", device_kind="", capability=None)
        )
    here = decoding(cube(AxisType.Auto) if mesh == "cube" else ring_mesh(mesh) if mesh else None)
    x, scale, kernels, weights = given(rows, tokens, heads, dtype)

    def run(x: Any, scale: Any, kernels: Any) -> tuple[Any, Any]:
        x, kernels = shared(here, x, kernels)
        y = norm.normed(here, x, scale, EPS)
        assert isinstance(y, norm.Normed) is (waits and dtype != "float16")
        found = norm.products(here, y, kernels)
        total = sum(jnp.sum(f.astype(jnp.float32) * w.astype(jnp.float32)) for f, w in zip(found, weights, strict=True))
        return total, found

    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
    (dx, dscale, dkernels), found = gradient(x, scale, kernels)
    want, want_gradients = oracle(x, scale, kernels, weights)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    for got, right in zip([*found, dx, dscale, *dkernels], [*want, *want_gradients], strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=0, atol=tolerance * np.abs(right).max())


def test_float16_does_not_wait() -> None:
    """It cannot hold these features times the scale, and holds their norm."""
    here = decoding(ring_mesh(4))
    x, scale = jnp.full((1, 1, E), 3e4, jnp.float16), jnp.full((E,), 8, jnp.float16)
    (found,) = norm.products(here, norm.normed(here, x, scale, EPS), [jnp.ones((E, 2), jnp.float16)])
    np.testing.assert_allclose(np.asarray(found, np.float32), 8 * E)


COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\][^=]*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize(
    ("sizes", "sums", "gathers"),
    [
        ({"sp": 2}, 3, 0),  # queries, keys and values; what was attended to; the MLP
        ({"sp": 2, "tensor": 2}, 5, 0),  # and twice those who have other heads
        ({"data": 2, "sp": 2}, 3, 1),  # what was attended to, of all rows
        ({"data": 2, "sp": 2, "tensor": 2}, 5, 1),
    ],
    ids=lambda x: "-".join(f"{name}{size}" for name, size in x.items()) if isinstance(x, dict) else None,
)
def test_how_often_a_layer_waits_for_other_devices(sizes: dict[str, int], sums: int, gathers: int) -> None:
    """And no kernel travels for a token: all sent together is less than one."""
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
    names = {"batch_axis_name": "data", "head_axis_name": "tensor"}
    axes: dict[str, Any] = {field: name for field, name in names.items() if name in sizes}

    def sent(layers: int) -> list[tuple[str, int]]:
        decoder = make(change(num_layers=layers, embed_dim=64, mlp_dim=256, **axes), mesh)
        cache = decoder.empty_cache(2, 16, scan_layers=False)
        step = jax.jit(lambda decoder, *rest: decoder.decode(*rest), donate_argnums=2)
        text = step.lower(decoder, np.zeros((2, 1), np.int32), cache).compile().as_text()
        return [(name, math.prod(map(int, filter(None, dims.split(","))))) for dims, name in COLLECTIVE.findall(text)]

    one, two = (sent(layers) for layers in (1, 2))
    added = Counter(name for name, _ in two) - Counter(name for name, _ in one)
    assert added == Counter({"all-reduce": sums, "all-gather": gathers})
    assert sum(size for _, size in two) - sum(size for _, size in one) < 64 * 256 / math.prod(sizes.values())


def test_squares_are_summed_before_they_are_concatenated() -> None:
    """XLA for GPUs would have one thread sum them all while the others concatenate."""
    here = decoding(ring_mesh(4))
    x, scale, kernels, _ = given(2, 1, (4, 2), "float32")
    run = jax.jit(lambda x, scale, kernels: norm.products(here, norm.normed(here, x, scale, EPS), kernels))
    text = run.lower(x, scale, kernels).as_text()
    assert re.search(r"stablehlo.optimization_barrier %\S+ : tensor<2x1x4x1x1xf32>", text)


def test_kernels_are_not_transposed() -> None:
    """They are the second operand of every product. XLA for CPUs copies the first, of which a row is not contiguous."""
    here = decoding(ring_mesh(4))
    x, scale, kernels, _ = given(2, 1, (4, 2), "float32")
    run = jax.jit(lambda x, scale, kernels: norm.products(here, norm.normed(here, x, scale, EPS), kernels))
    products = re.findall(r"stablehlo.dot_general.*", run.lower(x, scale, kernels).as_text())
    assert len(products) == 2
    assert all(": (tensor<2x1x4x4xf32>, tensor<4x4x" in product for product in products), products
