"""ringjax.nnx.RingAttention against a dense layer with the same weights, on every kind of mesh."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import ringjax
from ringjax.nnx import RingAttention, partition_shardings, partition_specs

B, T, E = 2, 32, 16
GQA = dict(num_heads=4, num_kv_heads=2, head_dim=8, is_causal=True)
SEGMENTS = np.repeat(np.array([[0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 1]]), T // 8, axis=1)


def ring_mesh(num_shards: int) -> jax.sharding.Mesh:
    return jax.make_mesh((num_shards,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])


def cube(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), axis_types=(kind,) * 3)


def build(**options: Any) -> RingAttention:
    """A layer whose biases, scales and sinks are not what they start as, drawn by numpy: nothing compiles."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: RingAttention(in_features=E, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(7)

    def draw(path: Any, w: Any) -> Any:
        size = 0.25 if "kernel" in jax.tree_util.keystr(path) else 0.1
        return np.asarray(("scale" in jax.tree_util.keystr(path)) + size * rng.standard_normal(w.shape), w.dtype)

    state = jax.tree.map_with_path(draw, abstract)
    mesh = options.get("mesh") or jax.sharding.get_mesh()
    return nnx.merge(graphdef, jax.device_put(state, None if mesh.empty else partition_shardings(abstract, mesh)))


def inputs(length: int = T) -> tuple[np.ndarray, np.ndarray]:
    """Input and a random cotangent."""
    rng = np.random.default_rng(1)
    x, dout = (rng.standard_normal((B, length, E), np.float32) for _ in range(2))
    return x, dout


def ring_order(length: int, layout: Any, num_shards: int) -> np.ndarray:
    return np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))


def pure(layer: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def run(layer: RingAttention, x: jax.Array, dout: jax.Array, **call: Any) -> tuple[Any, Any, Any]:
    """Output and gradients of parameters and input, in one compiled program."""
    graphdef, state = nnx.split(layer)

    @jax.jit
    def program(state: Any, x: jax.Array, dout: jax.Array, call: Any) -> Any:
        out, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x, **call), state, x)
        return out, *vjp(dout)

    out, dstate, dx = program(state, x, dout, call)
    return out, nnx.to_pure_dict(dstate), dx


def run_dense(weights: Any, x: jax.Array, dout: jax.Array, **options: Any) -> tuple[Any, Any, Any]:
    @jax.jit
    def program(weights: Any, x: jax.Array, dout: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda w, x: dense_layers.attention_layer(w, x, **options), weights, x)
        return out, *vjp(dout)

    return program(weights, x, dout)


def assert_close(got: Any, want: Any, tolerance: float = 3e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1.0, np.abs(theirs).max()), rtol=0)


def check(layer: RingAttention, num_shards: int, layout: Any, call: dict[str, Any], **dense: Any) -> None:
    """The layer in ring order equals the dense layer in natural order; `call` is in natural order."""
    x, dout = inputs(call.pop("length", T))
    dout = dout[..., : layer.spec.out_features]
    order = ring_order(x.shape[1], layout, num_shards)
    in_ring = {name: v if name == "seq_lengths" else v[:, order] for name, v in call.items()}
    out, dweights, dx = run(layer, x[:, order], dout[:, order], **in_ring)
    if "seq_lengths" in call:
        lengths = call.pop("seq_lengths")
        dense |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    want = run_dense(pure(layer), x, dout, **call, **dense)
    back = np.argsort(order)
    assert_close((out[:, back], dweights, dx[:, back]), want)


POSITIONS = np.arange(T)[None] * 3 + np.array([[0], [100]])
FEATURES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # Every layout on 1, 4 and 8 devices, each with a feature of its own:
    # layout, C, what the layer is built with, how it is called, what the dense layer is told.
    "plain": ("zigzag", 1, GQA, {}, dict(is_causal=True)),
    "packed documents": ("zigzag", 4, GQA, dict(segment_ids=SEGMENTS), dict(is_causal=True)),
    "everything learned": (
        "zigzag",
        8,
        dict(GQA, use_bias=True, qk_norm=True, use_sinks=True, logits_soft_cap=4.0, scale=0.5),
        {},
        dict(is_causal=True, logits_soft_cap=4.0, scale=0.5),
    ),
    "other base, odd length": (
        "contiguous",
        1,
        dict(GQA, rope_theta=500.0),
        dict(length=27),
        dict(is_causal=True, rope_theta=500.0),
    ),
    "positions": (
        "contiguous",
        4,
        dict(GQA, local_window_size=(7, 7)),
        dict(positions=POSITIONS),
        dict(is_causal=True, local_window_size=(7, 7)),
    ),
    "window": ("contiguous", 8, dict(GQA, local_window_size=5), {}, dict(is_causal=True, local_window_size=5)),
    "no rope": ("striped", 1, dict(num_heads=2, rope_theta=None), {}, dict(rope_theta=None)),
    "two-sided window, one key head, other sizes": (
        "striped",
        4,
        dict(num_heads=6, num_kv_heads=1, head_dim=10, out_features=5, local_window_size=(3, 2)),
        dict(length=27),
        dict(local_window_size=(3, 2)),
    ),
    "lengths": ("striped", 8, GQA, dict(seq_lengths=np.array([9, 32])), dict(is_causal=True)),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_dense(feature: str):
    layout, num_shards, options, call, dense = FEATURES[feature]
    check(build(mesh=ring_mesh(num_shards), layout=layout, **options), num_shards, layout, dict(call), **dense)


# ------------------------------------------------------------------------------------------------- order of tokens

LENGTHS = np.array([9, 27])
MASKED: dict[str, Any] = dict(GQA, local_window_size=9)


def on_one_device(layout: Any, order: np.ndarray, axis_types: AxisType | None, call: dict[str, Any]) -> Any:
    """`run` with tokens in that order, on a mesh with a ring of one device or without a mesh."""
    x, dout = (a[:, order] for a in inputs(len(order)))
    if axis_types is None:
        return run(build(**MASKED, layout=layout, num_shards=4), x, dout, **call)
    mesh = jax.make_mesh((2, 1), ("data", "sp"), axis_types=(axis_types,) * 2, devices=jax.devices()[:2])
    rows = NamedSharding(mesh, PartitionSpec("data", "sp"))
    with jax.set_mesh(mesh):
        layer = build(**MASKED, layout=layout, num_shards=4, batch_axis_name="data")
        return run(layer, jax.device_put(x, rows), jax.device_put(dout, rows), **call)


@pytest.mark.parametrize(
    ("layout", "length", "axis_types"),
    [("zigzag", T, None), ("zigzag", T, AxisType.Explicit), (ringjax.Striped(stripe=5), 27, AxisType.Auto)],
)
def test_one_device_takes_tokens_dealt_for_several(layout: Any, length: int, axis_types: AxisType | None):
    """Positions of RoPE and of the mask, and lengths, follow the order for four shards, on the one device there is."""
    order = ring_order(length, layout, 4)
    ids = SEGMENTS[:, :length]
    out, dweights, dx = on_one_device(layout, order, axis_types, dict(segment_ids=ids[:, order], seq_lengths=LENGTHS))
    want = run_dense(
        pure(build(**MASKED)), *inputs(length), is_causal=True, local_window_size=9, segment_ids=ids,
        query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS,
    )  # fmt: skip
    back = np.argsort(order)
    assert_close((np.asarray(out)[:, back], dweights, np.asarray(dx)[:, back]), want)


def test_one_device_inside_shard_map_takes_tokens_dealt_for_several():
    layer = build(**MASKED, layout="zigzag", num_shards=4)
    order = ring_order(T, "zigzag", 4)
    graphdef, state = nnx.split(layer)

    def local(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x)

    specs = dict(in_specs=(PartitionSpec(), PartitionSpec(None, "sp")), out_specs=PartitionSpec(None, "sp"))
    out = jax.jit(jax.shard_map(local, mesh=ring_mesh(1), **specs))(state, inputs()[0][:, order])
    dense = jax.jit(lambda w, x: dense_layers.attention_layer(w, x, is_causal=True, local_window_size=9))
    assert_close(np.asarray(out)[:, np.argsort(order)], dense(pure(layer), inputs()[0]))


def test_without_a_mesh_runs_on_one_device():
    # Natural order: nothing is shared out, so a stripe that does not divide T is no matter.
    layer = build(layout=ringjax.Striped(stripe=5), num_shards=1, **GQA)
    x, _ = inputs()
    dense = jax.jit(lambda w, x: dense_layers.attention_layer(w, x, is_causal=True, segment_ids=SEGMENTS))
    want = dense(pure(layer), x)
    assert_close(nnx.jit(lambda m, x: m(x, segment_ids=jnp.asarray(SEGMENTS)))(layer, x), want)


def shape_of(layer: Callable[..., Any], **call: Any) -> Any:
    return jax.eval_shape(lambda x: layer(x, **call), jnp.ones((B, T, E))).shape


ORDERED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope": ({}, {}),
    "causal": (dict(rope_theta=None, is_causal=True), {}),
    "window": (dict(rope_theta=None, local_window_size=3), {}),
    "lengths": (dict(rope_theta=None), dict(seq_lengths=jnp.array([9, 32]))),
    "lengths beside positions": ({}, dict(seq_lengths=jnp.array([9, 32]), positions=jnp.arange(T))),
}


@pytest.mark.parametrize("layout", ["zigzag", "striped", ringjax.Striped(stripe=2)])
@pytest.mark.parametrize("what", ORDERED)
def test_refuses_to_guess_the_order_of_tokens(what: str, layout: Any):
    options, call = ORDERED[what]
    with pytest.raises(ValueError, match="num_shards must be given where there is no mesh .*Got num_shards=None"):
        shape_of(build(num_heads=2, layout=layout, **options), **call)
    # As soon as it is said, by the mesh too, or where every number of shards gives one order, there is no question.
    assert shape_of(build(num_heads=2, layout=layout, num_shards=4, **options), **call) == (B, T, E)
    assert shape_of(build(num_heads=2, layout=layout, mesh=ring_mesh(4), **options), **call) == (B, T, E)
    assert shape_of(build(num_heads=2, layout="contiguous", **options), **call) == (B, T, E)


def test_does_not_ask_for_an_order_that_nothing_depends_on():
    assert shape_of(build(num_heads=2, layout="zigzag", rope_theta=None), segment_ids=jnp.asarray(SEGMENTS))
    assert shape_of(build(**GQA, layout="zigzag"), positions=jnp.arange(T))


def test_refuses_a_ring_of_another_size():
    """However the ring is found: a mesh given, a mesh of the context, inside shard_map, an axis of vmap."""
    message = "num_shards must be 4, the number of devices on the ring 'sp' here.* Got 8"
    with pytest.raises(ValueError, match=message):
        RingAttention(4, E, mesh=ring_mesh(4), num_shards=8, rngs=nnx.Rngs(0))
    layer = build(**GQA, num_shards=8)
    with jax.set_mesh(ring_mesh(4)), pytest.raises(ValueError, match=message):
        shape_of(layer)
    spec = PartitionSpec(None, "sp")
    with pytest.raises(ValueError, match=message):
        shape_of(jax.shard_map(layer, mesh=ring_mesh(4), in_specs=spec, out_specs=spec))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.vmap(layer, axis_name="sp"), jnp.ones((4, B, T // 4, E)))


# ------------------------------------------------------------------------------------------------- meshes, weights


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_with_data_and_tensor_axes(kind: AxisType):
    options: dict[str, Any] = dict(GQA, use_bias=True, use_sinks=True, qk_norm=True, layout="zigzag")
    x, dout = inputs()
    order = ring_order(T, "zigzag", 2)

    mesh = cube(kind)
    with jax.set_mesh(mesh):
        # With Explicit axes the batch axes are read off the input.
        batch = "data" if kind == AxisType.Auto else None
        layer = build(head_axis_name="tensor", batch_axis_name=batch, **options)
        sharding = NamedSharding(mesh, PartitionSpec("data", "sp"))
        xs, douts, ids = (jax.device_put(a[:, order], sharding) for a in (x, dout, SEGMENTS))
        out, dweights, dx = run(layer, xs, douts, segment_ids=ids)
    assert tuple(out.sharding.spec)[:2] == ("data", "sp")
    want = run_dense(jax.tree.map(np.asarray, pure(layer)), x, dout, is_causal=True, segment_ids=SEGMENTS)
    back = np.argsort(order)
    assert_close((np.asarray(out)[:, back], dweights, np.asarray(dx)[:, back]), want)


def test_inside_shard_map():
    layer = build(**GQA, layout="zigzag", local_window_size=9)
    x, _ = inputs()
    mesh = ring_mesh(4)
    order = ring_order(T, "zigzag", 4)
    spec = PartitionSpec(None, "sp")
    graphdef, state = nnx.split(layer)

    def local(state: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x, segment_ids=ids)

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec))
    out = np.asarray(program(state, x[:, order], SEGMENTS[:, order]))[:, np.argsort(order)]
    dense = jax.jit(
        lambda w: dense_layers.attention_layer(w, x, is_causal=True, local_window_size=9, segment_ids=SEGMENTS)
    )
    assert_close(out, dense(pure(layer)))


def test_weights_of_flax_attention_fit():
    theirs = nnx.MultiHeadAttention(4, E, decode=False, rngs=nnx.Rngs(3))
    ours = RingAttention(4, E, use_bias=True, rope_theta=None, mesh=ring_mesh(4), rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    x, _ = inputs()
    assert_close(ours(x), theirs(x))


def test_starts_like_flax_attention():
    """Kernels are drawn as matrices, whatever their rank: the same distribution as Flax's."""
    for use_bias in (False, True):
        layer = RingAttention(8, 256, head_dim=32, use_bias=use_bias, use_sinks=True, rngs=nnx.Rngs(0))
        for part in (layer.query, layer.key, layer.value, layer.out):
            assert abs(float(np.std(part.arrays()["kernel"])) * 16 - 1) < 0.05  # 1 / sqrt(fan in)
            assert ("bias" in part.arrays()) == use_bias
        assert not np.any(pure(layer)["sinks"]["logit"])


def test_dtypes():
    layer = RingAttention(**GQA, in_features=E, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jnp.ones((B, T, E))

    def program(state: Any, x: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return out, *vjp(out)

    out, dstate, dx = jax.eval_shape(program, state, x)
    assert out.dtype == jnp.bfloat16 and dx.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(dstate)} == {jnp.dtype(jnp.float32)}
    half = RingAttention(**GQA, in_features=E, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {w.dtype for w in jax.tree.leaves(pure(half))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# --------------------------------------------------------------------------------------------------- partitioning


def specs_of(**options: Any) -> Any:
    mesh = AbstractMesh((2, 4, 3), ("data", "sp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    make = lambda: RingAttention(  # noqa: E731
        rngs=nnx.Rngs(0), mesh=mesh, batch_axis_name="data", head_axis_name="tensor", **options
    )
    return nnx.to_pure_dict(partition_specs(nnx.state(nnx.eval_shape(make)), mesh))


def test_every_parameter_names_its_axes():
    specs = specs_of(num_heads=6, num_kv_heads=3, in_features=16, head_dim=4, use_bias=True, use_sinks=True)
    features = ("data", "sp")
    assert specs["query"] == {"kernel": PartitionSpec(features, "tensor", None), "bias": PartitionSpec("tensor", None)}
    assert specs["key"] == specs["value"] == specs["query"]
    assert specs["out"] == {"kernel": PartitionSpec("tensor", None, features), "bias": PartitionSpec(None)}
    assert specs["sinks"] == {"logit": PartitionSpec("tensor")}


def test_axes_that_do_not_divide_are_left_out():
    specs = specs_of(num_heads=6, num_kv_heads=2, in_features=6, head_dim=4)
    assert specs["query"]["kernel"] == PartitionSpec("data", "tensor", None)  # 6 features over 2, not over 8
    assert specs["key"]["kernel"] == PartitionSpec("data", None, None)


def test_parameters_are_placed_on_a_real_mesh():
    mesh = cube(AxisType.Auto)
    options: dict[str, Any] = dict(GQA, in_features=E, batch_axis_name="data", head_axis_name="tensor")
    layer = RingAttention(mesh=mesh, rngs=nnx.Rngs(0), **options)
    assert layer.query.arrays()["kernel"].sharding == NamedSharding(mesh, PartitionSpec(("data", "sp"), "tensor", None))
    want = partition_shardings(nnx.state(layer), mesh)
    assert jax.tree.map(lambda w: w.sharding, nnx.state(layer)) == want
    with jax.set_mesh(mesh):
        in_context = RingAttention(rngs=nnx.Rngs(0), **options)
    assert jax.tree.map(lambda w: w.sharding, nnx.state(in_context)) == want


def test_state_has_the_same_structure_on_every_mesh():
    whole = nnx.state(build(**GQA))
    split = nnx.state(build(**GQA, mesh=ring_mesh(8)))
    assert jax.tree.structure(whole) == jax.tree.structure(split)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "head_dim must be given .* 16 features, num_heads=3"),
        (dict(num_heads=0), "num_heads must be a positive integer. Got 0"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads"),
        (dict(num_heads=4, num_kv_heads=0), "num_kv_heads must be a positive integer"),
        (dict(num_heads=4, head_dim=2.0), "head_dim must be a positive integer"),
        (dict(num_heads=4, head_dim=3), "head_dim must be even for RoPE"),
        (dict(num_heads=4, rope_theta=-1.0), "rope_theta must be a positive number, or None for no RoPE. Got -1.0"),
        (dict(num_heads=4, norm_eps=None), "norm_eps must be a positive number. Got None"),
        (dict(num_heads=4, axis_name=None), "axis_name must name a mesh axis"),
        (dict(num_heads=4, dtype="int8"), "dtype must be one of 'float32'"),
        (dict(num_heads=4, param_dtype="float64"), "param_dtype float64 needs jax_enable_x64"),
        (dict(num_heads=4, layout="spiral"), "layout must be one of"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RingAttention(in_features=E, rngs=nnx.Rngs(0), **options)


OPTIONS = [name for name in inspect.signature(RingAttention.__init__).parameters if name not in ("self", "rngs")]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_checked(option: str):
    with pytest.raises(ValueError, match=f"^{option} must (be|name)"):
        RingAttention(**({"num_heads": 4, "in_features": E, "head_dim": 4} | {option: object()}), rngs=nnx.Rngs(0))


def test_refuses_axes_that_the_mesh_lacks():
    for options in (dict(axis_name="seq"), dict(batch_axis_name="dp"), dict(head_axis_name=("sp", "tp"))):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must name axes of the mesh"):
            RingAttention(4, E, mesh=ring_mesh(4), rngs=nnx.Rngs(0), **options)


def test_refuses_a_mesh_that_is_not_the_contexts():
    with jax.set_mesh(ring_mesh(8)), pytest.raises(ValueError, match="mesh must be the mesh of the context"):
        RingAttention(4, E, mesh=ring_mesh(4), rngs=nnx.Rngs(0))


def test_explicit_axes_want_their_mesh_in_the_context():
    layer = RingAttention(4, E, mesh=cube(AxisType.Explicit), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mesh must be entered with jax.set_mesh"):
        layer(jnp.ones((B, T, E)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(inputs=jnp.ones((T, E))), r"inputs must have shape \[B, T, 16\]"),
        (dict(inputs=jnp.ones((B, T, 2 * E))), r"inputs must have shape \[B, T, 16\]"),
        (dict(positions=jnp.arange(T + 1)), r"positions must have shape \[T\] or \[B, T\]"),
        (dict(positions=jnp.ones((T,))), "positions must be integers"),
        (dict(segment_ids=jnp.ones((B, T))), "segment_ids"),
        (dict(seq_lengths=jnp.ones((B, 1), jnp.int32)), "query_seq_lengths"),
    ],
)
def test_refuses_bad_calls(call: dict[str, Any], message: str):
    layer = RingAttention(4, E, mesh=ring_mesh(4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(**({"inputs": jnp.ones((B, T, E))} | call))
