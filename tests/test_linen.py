"""ringjax.linen.RingAttention: the same layer as ringjax.nnx's, with Linen's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ringjax
import ringjax.linen
import ringjax.nnx

B, T, E = 2, 16, 16
EVERYTHING: dict[str, Any] = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    out_features=6,
    use_bias=True,
    rope_theta=300.0,
    qk_norm=True,
    use_sinks=True,
    norm_eps=1e-3,
    scale=0.3,
    is_causal=True,
    local_window_size=9,
    logits_soft_cap=3.0,
    layout="zigzag",
    bias_init=nn.initializers.normal(0.3),
    out_kernel_init=nn.initializers.normal(0.2),
)
CALL = dict(
    positions=jnp.arange(T) * 2,
    segment_ids=jnp.repeat(jnp.array([[0, 1, 1, 1], [2, 2, 2, 3]]), T // 4, axis=1),
    seq_lengths=jnp.array([T, 11]),
)


def cube(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), axis_types=(kind,) * 3)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, T, E))


def assert_close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=3e-5, rtol=0)


def test_agrees_with_nnx():
    """The same weights give the same output, with every option and argument in use."""
    mesh = jax.make_mesh((4,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    layer = ringjax.linen.RingAttention(mesh=mesh, **EVERYTHING)
    x = inputs()
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
    other = ringjax.nnx.RingAttention(in_features=E, mesh=mesh, rngs=nnx.Rngs(1), **EVERYTHING)
    state = nnx.state(other)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    nnx.replace_by_pure_dict(state, params)
    graphdef = nnx.graphdef(other)

    @jax.jit
    def both(params: Any, state: Any, x: jax.Array) -> Any:
        return layer.apply({"params": params}, x, **CALL), nnx.merge(graphdef, state)(x, **CALL)

    ours, theirs = both(params, state, x)
    assert ours.shape == (B, T, 6) and np.any(ours)
    assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_with_data_and_tensor_axes(kind: AxisType):
    single = ringjax.linen.RingAttention(num_shards=1, **EVERYTHING)
    x = inputs()
    variables = single.init(jax.random.key(0), x)
    assert not any(isinstance(p, nn.Partitioned) for p in jax.tree.leaves(variables, is_leaf=_boxed))
    want = single.apply(variables, x)

    mesh = cube(kind)
    layer = ringjax.linen.RingAttention(batch_axis_name="data", head_axis_name="tensor", **EVERYTHING)
    order = np.asarray(ringjax.ring_positions(T, layout="zigzag", num_shards=2))
    with jax.set_mesh(mesh):
        xs = jax.device_put(x[:, order], NamedSharding(mesh, PartitionSpec("data", "sp")))
        # Shardings before values: nothing is made whole on one device.
        shardings = nn.get_sharding(jax.eval_shape(layer.init, jax.random.key(0), xs), mesh)
        boxed = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), xs)
        # With the boxes and without, as a user may have either.
        out = jax.jit(layer.apply)(boxed if kind == AxisType.Explicit else nn.unbox(boxed), xs)
    kernel = boxed["params"]["query"]["kernel"]
    assert kernel.names == (("data", "sp"), "tensor", None)
    assert tuple(kernel.value.sharding.spec) == (("data", "sp"), "tensor", None)
    assert_close(np.asarray(out)[:, np.argsort(order)], want)


def test_the_order_of_tokens_is_said_not_guessed():
    """num_shards reaches the shared equation: order for four shards on one device, refused where it does not fit."""
    order = np.asarray(ringjax.ring_positions(T, layout="zigzag", num_shards=4))
    x = inputs()
    natural = ringjax.linen.RingAttention(num_shards=1, **EVERYTHING)
    dealt = ringjax.linen.RingAttention(num_shards=4, **EVERYTHING)

    @jax.jit
    def run(x: jax.Array, in_ring: jax.Array) -> Any:
        variables = natural.init(jax.random.key(0), x)
        return variables, natural.apply(variables, x), dealt.apply(variables, in_ring)

    variables, want, got = run(x, x[:, order])
    assert_close(got, want[:, order])
    with pytest.raises(ValueError, match="num_shards must be given"):
        ringjax.linen.RingAttention(**EVERYTHING).apply(variables, x)
    with jax.set_mesh(cube()), pytest.raises(ValueError, match="num_shards must be 2"):
        dealt.apply(variables, x)


OPTIONS = [
    field.name
    for field in dataclasses.fields(ringjax.linen.RingAttention)
    if field.name not in ("parent", "name")  # Linen's own
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_checked(option: str):
    layer = ringjax.linen.RingAttention(**({"num_heads": 4, "head_dim": 4} | {option: object()}))
    with pytest.raises(ValueError, match=f"^{option} must (be|name)"):
        layer.init(jax.random.key(0), inputs())


def _boxed(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def test_axes_that_do_not_divide_are_left_out():
    layer = ringjax.linen.RingAttention(num_heads=2, head_dim=4, out_features=3, mesh=cube(), head_axis_name="tensor")
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, 5)))
    assert shapes["params"]["query"]["kernel"].names == (None, "tensor", None)
    assert shapes["params"]["out"]["kernel"].names == ("tensor", None, None)


def test_weights_of_flax_attention_fit():
    theirs = nn.MultiHeadDotProductAttention(4, qkv_features=E)
    x = inputs()
    variables = theirs.init(jax.random.key(0), x)
    ours = ringjax.linen.RingAttention(4, head_dim=E // 4, use_bias=True, rope_theta=None)
    assert_close(ours.apply(variables, x), theirs.apply(variables, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "head_dim must be given .* 16 features, num_heads=3"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads"),
        (dict(num_heads=4, layout="spiral"), "layout must be one of"),
        (dict(num_heads=4, axis_name="seq", mesh="cube"), "axis_name must name axes of the mesh"),
        (dict(num_heads=4, batch_axis_name="dp", mesh="cube"), "batch_axis_name must name axes of the mesh"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str):
    if "mesh" in options:
        options = dict(options, mesh=cube())  # not while tests are collected
    with pytest.raises(ValueError, match=message):
        ringjax.linen.RingAttention(**options).init(jax.random.key(0), jnp.ones((B, T, E)))


def test_refuses_bad_inputs():
    with pytest.raises(ValueError, match=r"inputs must have shape \[B, T, 16\]"):
        ringjax.linen.RingAttention(4).init(jax.random.key(0), jnp.ones((T, E)))
