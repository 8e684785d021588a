"""ringjax.nnx.Decoder against a dense decoder with the same weights; what it keeps, recomputes, shards and refuses."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import dense_layers
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import ringjax
from ringjax.nnx import Decoder, DecoderConfig, param_shardings, param_specs

B, T, V = 2, 24, 32
SMALL = DecoderConfig(
    vocab_size=V, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, loss_chunk=2
)
SEGMENTS = np.repeat(np.array([[0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 1]]), T // 8, axis=1)


def change(**fields: Any) -> DecoderConfig:
    return dataclasses.replace(SMALL, **fields)


def ring_mesh(num_shards: int) -> jax.sharding.Mesh:
    return jax.make_mesh((num_shards,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])


def cube(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), axis_types=(kind,) * 3)


def batch(length: int = T) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, targets and a loss mask, in natural order."""
    tokens, targets = (jax.random.randint(jax.random.key(i), (B, length), 0, V) for i in range(2))
    return tokens, targets, jax.random.bernoulli(jax.random.key(2), 0.7, (B, length))


@functools.cache
def make(config: DecoderConfig, mesh: Any = None) -> Decoder:
    """A Decoder, made in one compiled program where there is no mesh to make it on."""
    if mesh is not None:
        return Decoder.init_sharded(config, mesh=mesh, seed=0)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))())


@functools.partial(jax.jit, static_argnums=0)
def program(graphdef: Any, state: Any, arrays: Any, call: Any) -> Any:
    given = dict(zip(("tokens", "targets", "loss_mask"), arrays, strict=False))
    return jax.value_and_grad(lambda s: nnx.merge(graphdef, s).loss(**given, **call), has_aux=True)(state)


def loss_and_gradients(decoder: Decoder, *arrays: Any, **call: Any) -> tuple[Any, Any]:
    """((loss, aux), gradients as a plain dict)."""
    graphdef, state = nnx.split(decoder)
    value, grads = program(graphdef, state, arrays, call)
    return value, nnx.to_pure_dict(grads)


def dense_loss(config: DecoderConfig, params: Any, tokens: Any, targets: Any, mask: Any, **call: Any) -> Any:
    logits = dense_layers.decoder(
        params,
        tokens,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        local_window_size=config.local_window_size,
        logits_soft_cap=config.logits_soft_cap,
        **call,
    )
    return dense_layers.cross_entropy(logits, targets, mask.astype(jnp.float32))


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- values

# Every layout, on 1, 4 and 8 devices, all options between them: C, fields of the config, arguments of the loss.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one device, untied": (1, dict(layout="zigzag", tie_embeddings=False), {}),
    "packed documents, window, soft cap": (
        4,
        dict(layout="contiguous", local_window_size=(6, 0), logits_soft_cap=2.0),
        dict(segment_ids=SEGMENTS),
    ),
    "positions, other base, chunk larger than a shard": (
        8,
        dict(layout="zigzag", rope_theta=77.0, loss_chunk=100),
        dict(positions=np.arange(T)[None] * [[1], [3]]),
    ),
    "length that fits nothing, no remat": (4, dict(layout="striped", remat=False, num_layers=1), dict(length=19)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_dense(case: str):
    num_shards, fields, call = CASES[case]
    config = change(**fields)
    call = dict(call)
    natural = batch(call.pop("length", T))
    decoder = make(config, None if num_shards == 1 else ring_mesh(num_shards))
    order = np.asarray(ringjax.ring_positions(natural[0].shape[1], layout=config.layout, num_shards=num_shards))
    in_ring = {name: jnp.asarray(x)[:, order] for name, x in call.items()}
    (loss, aux), grads = loss_and_gradients(decoder, *(x[:, order] for x in natural), **in_ring)
    params = nnx.to_pure_dict(nnx.state(decoder))
    want, want_grads = jax.jit(jax.value_and_grad(lambda p: dense_loss(config, p, *natural, **call)))(params)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    assert float(aux["tokens"]) == float(natural[2].sum())
    assert_close(loss, want)
    assert_close(grads, want_grads)


@functools.cache
def on_one_device() -> tuple[Any, Any, Any]:
    decoder = make(SMALL)
    value, grads = loss_and_gradients(decoder, *batch(), segment_ids=SEGMENTS)
    return value, grads, nnx.jit(lambda m, tokens: m(tokens))(decoder, batch()[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_with_data_and_tensor_axes(kind: AxisType):
    natural = batch()
    want, want_grads, want_logits = on_one_device()
    mesh = cube(kind)
    config = change(batch_axis_name="data", head_axis_name="tensor")
    order = np.asarray(ringjax.ring_positions(T, layout="zigzag", num_shards=2))
    with jax.set_mesh(mesh):
        decoder = Decoder.init_sharded(config, mesh=mesh, seed=0)
        sharding = NamedSharding(mesh, decoder.data_spec)
        *arrays, ids = (jax.device_put(x[:, order], sharding) for x in (*natural, SEGMENTS))
        got, grads = loss_and_gradients(decoder, *arrays, segment_ids=ids)
    assert_close(got, want)
    assert_close(grads, want_grads)
    if kind == AxisType.Auto:
        return
    with jax.set_mesh(mesh):
        logits = nnx.jit(lambda m, tokens: m(tokens))(decoder, arrays[0])
    assert tuple(logits.sharding.spec) == ("data", "sp", "tensor")
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    assert_close(np.asarray(logits)[:, np.argsort(order)], want_logits)


def test_logits_equal_dense():
    tokens, _, _ = batch()
    params = nnx.to_pure_dict(nnx.state(make(SMALL)))
    want = jax.jit(lambda p: dense_layers.decoder(p, tokens, norm_eps=SMALL.norm_eps))(params)
    assert_close(on_one_device()[2], want)


def test_masked_targets_may_be_anything():
    tokens, targets, mask = batch()
    wild = jnp.where(mask, targets, -(10**6))
    assert_close(loss_and_gradients(make(SMALL), tokens, wild, mask, segment_ids=SEGMENTS), on_one_device()[:2], 0)


def test_a_batch_without_targets_has_no_loss():
    tokens, targets, mask = batch()
    (loss, aux), grads = loss_and_gradients(make(SMALL), tokens, targets, mask & False, segment_ids=SEGMENTS)
    assert loss == 0 and aux["tokens"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_mask_may_weigh():
    tokens, targets, mask = batch()
    decoder = make(SMALL)

    @jax.jit
    def losses(tokens: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        weights = (mask, mask.astype(jnp.int32), 2.0 * mask.astype(jnp.float32), None)
        return [decoder.loss(tokens, targets, loss_mask=w) for w in weights]

    (once, count), (as_int, _), (twice, double), (unmasked, all_of_them) = losses(tokens, targets, mask)
    assert_close([as_int, twice], [once, once])
    assert float(double["tokens"]) == 2 * float(count["tokens"]) == 2 * float(mask.sum())
    assert float(all_of_them["tokens"]) == tokens.size
    assert abs(float(unmasked) - math.log(V)) < 0.5  # it knows nothing yet


# -------------------------------------------------------------------------------------------- what a program holds


JAXPRS = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a jaxpr and of those within it, and how often scans run it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, JAXPRS)):
            if isinstance(value, JAXPRS):
                yield from equations(value, inner)


def gradient_jaxpr(config: DecoderConfig, mesh: Any, length: int = T) -> Any:
    """Of the loss and its gradient, traced with shapes alone."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((B, length), jnp.int32)

    def step(state: Any, tokens: Any, targets: Any) -> Any:
        return jax.value_and_grad(lambda s: nnx.merge(graphdef, s).loss(tokens, targets)[0])(state)

    return jax.make_jaxpr(step)(state, tokens, tokens)


def rotations(jaxpr: Any) -> int:
    return sum(times for eqn, times in equations(jaxpr) if eqn.primitive.name == "ppermute")


def test_remat_does_not_run_the_ring_again(monkeypatch):
    mesh = ring_mesh(4)
    kept = rotations(gradient_jaxpr(change(remat=False), mesh))
    assert kept > 0
    assert rotations(gradient_jaxpr(SMALL, mesh)) == kept
    # And it would, were the names not kept.
    monkeypatch.setattr("ringjax.layers.decoder._KEEP", ())
    again = rotations(gradient_jaxpr(SMALL, mesh))
    assert again >= kept + 2 * 3 * SMALL.num_layers  # K and V, 3 rotations, in every layer


def dots(jaxpr: Any) -> int:
    return sum(times for eqn, times in equations(jaxpr) if eqn.primitive.name == "dot_general")


def test_remat_recomputes_the_rest():
    assert dots(gradient_jaxpr(SMALL, None)) > dots(gradient_jaxpr(change(remat=False), None))


def test_logits_never_exist_whole():
    config = change(vocab_size=1009, loss_chunk=2)  # a size that nothing else has
    for mesh in (None, ring_mesh(4)):
        shards = 1 if mesh is None else 4
        sizes = {
            out.aval.size
            for eqn, _ in equations(gradient_jaxpr(config, mesh, length=64))
            for out in eqn.outvars
            if 1009 in getattr(out.aval, "shape", ())
        }
        assert B * shards * 2 * 1009 in sizes, "the walk sees the logits of a chunk"
        # A chunk of every shard, or one copy of the table for every shard.
        assert max(sizes) == max(B * shards * 2 * 1009, shards * 1009 * config.embed_dim) < B * 64 * 1009


def test_program_does_not_grow_with_depth():
    sizes = {n: sum(1 for _ in equations(gradient_jaxpr(change(num_layers=n), ring_mesh(4)))) for n in (2, 9)}
    assert sizes[2] == sizes[9]


def test_table_gradient_is_summed_over_devices_once():
    """Not once a chunk: no loop of the compiled loss reduces anything of the table's size over devices."""
    mesh = ring_mesh(4)
    config = change(num_layers=1, vocab_size=48)
    decoder = make(config, mesh)
    graphdef, state = nnx.split(decoder)
    tokens = jax.device_put(batch()[0], NamedSharding(mesh, decoder.data_spec))
    gradient = jax.jit(jax.grad(lambda s, t: nnx.merge(graphdef, s).loss(t, t)[0]))
    text = gradient.lower(state, tokens).compile().as_text()
    computation, where = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line
        if " all-reduce(" in line and "48,16]" in line.split(" all-reduce(")[0]:
            where.append(computation)
    assert where and all(name.startswith("ENTRY") for name in where)


def test_pod_is_traced_without_allocating():
    """A million tokens on 256 chips, as shapes: arrays known at trace time stay tiny."""
    config = DecoderConfig(
        128256, 32, 4096, 32, 8, 128, 14336, rope_theta=5e5, tie_embeddings=False, dtype="bfloat16",
        batch_axis_name="data", head_axis_name="tensor",
    )  # fmt: skip
    mesh = AbstractMesh((1, 128, 2), ("data", "sp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
    assert 8.0e9 < sum(w.size for w in jax.tree.leaves(state)) < 8.1e9
    state = jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), state, param_shardings(config, mesh)
    )
    data = NamedSharding(mesh, PartitionSpec("data", "sp"))
    tokens = jax.ShapeDtypeStruct((1, 1 << 20), jnp.int32, sharding=data)
    step = jax.jit(jax.value_and_grad(lambda s, t: nnx.merge(graphdef, s).loss(t, t)[0]))
    traced = step.trace(state, tokens)
    assert all(math.prod(c.shape) <= config.head_dim for c in traced.jaxpr.consts)
    loss, grads = traced.out_info
    assert loss.shape == () and grads["embedding"]["kernel"].shape == (128256, 4096)


# --------------------------------------------------------------------------------------------------- partitioning


def test_every_parameter_names_its_axes():
    config = change(batch_axis_name="data", head_axis_name="tensor", tie_embeddings=False)
    mesh = AbstractMesh((2, 4, 2), ("data", "sp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = nnx.to_pure_dict(param_specs(config, mesh))
    fsdp, none = ("data", "sp"), PartitionSpec(None, None)
    assert specs["embedding"]["kernel"] == specs["output"]["kernel"] == PartitionSpec("tensor", fsdp)
    assert specs["norm"]["scale"] == PartitionSpec(None)
    blocks = specs["blocks"]
    assert blocks["attention"]["query"]["kernel"] == PartitionSpec(None, fsdp, "tensor", None)
    assert blocks["attention"]["key"] == blocks["attention"]["value"] == blocks["attention"]["query"]
    assert blocks["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor", None, fsdp)
    assert blocks["gate"]["kernel"] == blocks["up"]["kernel"] == PartitionSpec(None, fsdp, "tensor")
    assert blocks["down"]["kernel"] == PartitionSpec(None, "tensor", fsdp)
    assert blocks["attention_norm"]["scale"] == blocks["mlp_norm"]["scale"] == none


def test_init_sharded_makes_the_same_parameters_in_place():
    mesh = cube()
    config = change(batch_axis_name="data", head_axis_name="tensor")
    made = nnx.state(Decoder.init_sharded(config, mesh=mesh, seed=3))
    moved = nnx.state(Decoder(config, mesh=mesh, rngs=nnx.Rngs(3)))
    shardings = param_shardings(config, mesh)
    for state in (made, moved):
        same = jax.tree.map(lambda w, s: w.sharding.is_equivalent_to(s, w.ndim), state, shardings)
        assert all(jax.tree.leaves(same))
    assert_close(made, moved, 1e-6)
    assert jax.tree.structure(made) == jax.tree.structure(nnx.state(Decoder(config, rngs=nnx.Rngs(3))))


def test_parameters_start_at_their_scales():
    config = change(embed_dim=128, mlp_dim=512, num_heads=16, num_layers=8)
    params = nnx.to_pure_dict(nnx.state(make(config)))
    blocks = params["blocks"]
    std = {
        "table": (params["embedding"]["kernel"], 0.02),
        "query": (blocks["attention"]["query"]["kernel"], 128**-0.5),
        "up": (blocks["up"]["kernel"], 128**-0.5),
        "out": (blocks["attention"]["out"]["kernel"], (16 * 128) ** -0.5),
        "down": (blocks["down"]["kernel"], (16 * 512) ** -0.5),
    }
    for name, (w, want) in std.items():
        assert abs(float(np.std(w)) / want - 1) < 0.06, name
    assert np.all(np.asarray(blocks["attention_norm"]["scale"]) == 1)
    # No two layers are alike.
    assert not np.allclose(blocks["up"]["kernel"][0], blocks["up"]["kernel"][1])


def test_dtypes():
    config = change(dtype="bfloat16")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=None, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def both(state: Any, tokens: Any) -> Any:
        loss = jax.value_and_grad(lambda s: nnx.merge(graphdef, s).loss(tokens, tokens)[0])(state)
        return nnx.merge(graphdef, state)(tokens), loss

    logits, (loss, grads) = jax.eval_shape(both, state, tokens)
    assert logits.dtype == loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    half = nnx.eval_shape(lambda: Decoder(change(param_dtype="bfloat16"), rngs=nnx.Rngs(0)))
    assert {w.dtype for w in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.bfloat16)}


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be a positive integer. Got 0"),
        (dict(num_layers=2.0), "num_layers must be a positive integer. Got 2.0"),
        (dict(mlp_dim=True), "mlp_dim must be a positive integer"),
        (dict(loss_chunk=-1), "loss_chunk must be a positive integer"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads. Got num_heads=4, num_kv_heads=3"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(rope_theta=0.0), "rope_theta must be positive"),
        (dict(norm_eps=-1e-5), "norm_eps must be positive"),
        (dict(dtype="float8"), "dtype must be one of 'float32'.* Got 'float8'"),
        (dict(param_dtype="int32"), "param_dtype must be one of"),
        (dict(logits_soft_cap=0.0), "logits_soft_cap must be positive or None"),
        (dict(layout="spiral"), "layout must be one of"),
        (dict(local_window_size=-1), "local_window_size must be"),
        (dict(batch_axis_name=("data", "sp")), "must name different axes"),
        (dict(head_axis_name="sp"), "must name different axes"),
    ],
)
def test_refuses_bad_configs(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        change(**fields)


def test_lists_of_a_file_become_tuples():
    config = change(local_window_size=[4, 0], batch_axis_name=["replica", "data"])
    assert config.local_window_size == (4, 0) and config.batch_axis_name == ("replica", "data")
    assert hash(config) == hash(change(local_window_size=(4, 0), batch_axis_name=("replica", "data")))


def test_refuses_float64_that_would_not_be():
    for field in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"{field} float64 needs jax_enable_x64"):
            Decoder(change(**{field: "float64"}), rngs=nnx.Rngs(0))


def test_refuses_axes_that_the_mesh_lacks():
    for field in ("axis_name", "batch_axis_name", "head_axis_name"):
        with pytest.raises(ValueError, match=f"{field} must name axes of the mesh"):
            Decoder(change(**{field: "other"}), mesh=ring_mesh(4), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=jnp.ones((B, T))), r"tokens must be integers \[B, T\]. Got float32"),
        (dict(tokens=jnp.ones((T,), jnp.int32)), r"tokens must be integers \[B, T\]"),
        (dict(targets=jnp.ones((B, T - 1), jnp.int32)), "targets must have the shape of tokens"),
        (dict(targets=jnp.ones((B, T))), "targets must be integers"),
        (dict(loss_mask=jnp.ones((B, 1))), "loss_mask must have the shape of tokens"),
        (dict(segment_ids=jnp.ones((T,), jnp.int32)), "segment_ids must have the shape of tokens"),
        (dict(positions=jnp.arange(T + 1)), "positions must have shape"),
    ],
)
def test_refuses_bad_batches(arguments: dict[str, Any], message: str):
    decoder = make(SMALL)
    tokens, targets, _ = batch()
    with pytest.raises(ValueError, match=message):
        decoder.loss(**({"tokens": tokens, "targets": targets} | arguments))


def test_refuses_to_run_inside_shard_map():
    decoder = make(SMALL)
    spec = PartitionSpec(None, "sp")
    local = jax.shard_map(lambda t: decoder(t), mesh=ring_mesh(4), in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="Decoder must be called on whole arrays"):
        local(batch()[0])
