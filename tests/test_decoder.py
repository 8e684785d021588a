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


ONE = change(num_shards=1)  # for one device, with tokens in natural order


def ring_mesh(num_shards: int) -> jax.sharding.Mesh:
    return jax.make_mesh((num_shards,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])


def cube(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), axis_types=(kind,) * 3)


def batch(length: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and a loss mask, in natural order."""
    rng = np.random.default_rng(7)
    tokens, targets = (rng.integers(0, V, (B, length), np.int32) for _ in range(2))
    return tokens, targets, rng.random((B, length)) < 0.7


def ring_order(length: int, layout: Any, num_shards: int) -> np.ndarray:
    return np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))


@functools.cache
def make(config: DecoderConfig, mesh: Any = None) -> Decoder:
    """A Decoder whose scales are not the ones they start as, drawn by numpy: to compile Decoder() takes seconds."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path: Any, w: Any) -> Any:
        scale = "scale" in jax.tree_util.keystr(path)
        return np.asarray(scale + (0.1 if scale else 0.25) * rng.standard_normal(w.shape), w.dtype)

    state = jax.tree.map_with_path(draw, abstract)
    return nnx.merge(graphdef, jax.device_put(state, None if mesh is None else param_shardings(config, mesh)))


@functools.partial(jax.jit, static_argnums=0)
def program(graphdef: Any, state: Any, arrays: Any, call: Any) -> Any:
    given = dict(zip(("tokens", "targets", "loss_mask"), arrays, strict=False))
    return jax.value_and_grad(lambda s: nnx.merge(graphdef, s).loss(**given, **call), has_aux=True)(state)


@functools.partial(jax.jit, static_argnums=0)
def forward_program(graphdef: Any, state: Any, arrays: Any, call: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return model(arrays[0], **call), model.loss(*arrays[:2], loss_mask=arrays[2], **call)[0]


def logits_and_loss(decoder: Decoder, *arrays: Any, **call: Any) -> Any:
    """Logits and loss of tokens, targets and a loss mask."""
    return forward_program(*nnx.split(decoder), arrays, call)


def loss_and_gradients(decoder: Decoder, *arrays: Any, **call: Any) -> tuple[Any, Any]:
    """((loss, aux), gradients as a plain dict)."""
    graphdef, state = nnx.split(decoder)
    value, grads = program(graphdef, state, arrays, call)
    return value, nnx.to_pure_dict(grads)


def dense_loss(config: DecoderConfig, params: Any, tokens: Any, targets: Any, mask: Any, **call: Any) -> Any:
    """The loss, and the logits beside it."""
    logits = dense_layers.decoder(
        params,
        tokens,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        local_window_size=config.local_window_size,
        logits_soft_cap=config.logits_soft_cap,
        **call,
    )
    return dense_layers.cross_entropy(logits, targets, mask.astype(jnp.float32)), logits


def run_dense(config: DecoderConfig, *natural: Any, **call: Any) -> Any:
    """((loss, logits), gradients) of the dense decoder with the parameters that `make` gives."""
    params = nnx.to_pure_dict(nnx.state(make(dataclasses.replace(config, num_shards=1))))
    return jax.jit(jax.value_and_grad(lambda p: dense_loss(config, p, *natural, **call), has_aux=True))(params)


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- values

# Every layout, on 4 and 8 devices, all options between them: C, fields of the config, arguments of the loss. One device
# is test_one_device_equals_dense.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "packed documents, window, soft cap, untied": (
        4,
        dict(layout="contiguous", local_window_size=(6, 0), logits_soft_cap=2.0, tie_embeddings=False),
        dict(segment_ids=SEGMENTS),
    ),
    "positions, other base, chunk larger than a shard": (
        8,
        dict(layout="zigzag", rope_theta=77.0, loss_chunk=100),
        dict(positions=(np.arange(T)[None] * [[1], [3]]).astype(np.int32)),
    ),
    "length that fits nothing, no remat": (4, dict(layout="striped", remat=False, num_layers=1), dict(length=19)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_dense(case: str):
    num_shards, fields, call = CASES[case]
    config = change(num_shards=num_shards, **fields)
    call = dict(call)
    natural = batch(call.pop("length", T))
    order = ring_order(natural[0].shape[1], config.layout, num_shards)
    in_ring = {name: x[:, order] for name, x in call.items()}
    decoder = make(config, ring_mesh(num_shards))
    (loss, aux), grads = loss_and_gradients(decoder, *(x[:, order] for x in natural), **in_ring)
    (want, _), want_grads = run_dense(config, *natural, **call)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    assert float(aux["tokens"]) == float(natural[2].sum())
    assert_close(loss, want)
    assert_close(grads, want_grads)


@functools.cache
def dense() -> Any:
    """((loss, logits), gradients) that every decoder without options must give for the documents of SEGMENTS."""
    return run_dense(SMALL, *batch(), segment_ids=SEGMENTS)


def test_one_device_equals_dense():
    (loss, logits), grads = dense()
    (got, _), got_grads = loss_and_gradients(make(ONE), *batch(), segment_ids=SEGMENTS)
    assert_close(got, loss)
    assert_close(got_grads, grads)
    assert_close(logits_and_loss(make(ONE), *batch(), segment_ids=SEGMENTS), (logits, loss))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_with_data_and_tensor_axes(kind: AxisType):
    (want, want_logits), want_grads = dense()
    mesh = cube(kind)
    config = change(batch_axis_name="data", head_axis_name="tensor")
    order = ring_order(T, "zigzag", 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "sp"))
    with jax.set_mesh(mesh):
        decoder = make(config, mesh)
        *arrays, ids = (jax.device_put(x[:, order], sharding) for x in (*batch(), SEGMENTS))
        (got, _), grads = loss_and_gradients(decoder, *arrays, segment_ids=ids)
        assert_close(got, want)
        assert_close(grads, want_grads)
        if kind == AxisType.Explicit:  # whose result says how it is sharded
            logits, _ = logits_and_loss(decoder, *arrays, segment_ids=ids)
            assert tuple(logits.sharding.spec) == ("data", "sp", "tensor")
            assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
            assert_close(np.asarray(logits)[:, np.argsort(order)], want_logits)


def test_the_number_of_targets_is_summed_over_devices_with_the_loss():
    """By itself that sum waits for nothing: simulated devices that begin it wait for those that begin the layers."""
    mesh = cube(AxisType.Auto)
    decoder = make(change(batch_axis_name="data", head_axis_name="tensor"), mesh)
    sharding = NamedSharding(mesh, PartitionSpec("data", "sp"))
    tokens, targets, mask = (jax.device_put(x, sharding) for x in batch())
    run = nnx.jit(lambda decoder, *arrays: decoder.loss(*arrays[:2], loss_mask=arrays[2])[0])
    text = run.lower(decoder, tokens, targets, mask).compile().as_text()
    shapes = [line.split(" = ")[1].split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    assert any(shape.startswith("f32[2]") for shape in shapes)
    assert not [shape for shape in shapes if "f32[]" in shape]


def test_masked_targets_may_be_anything():
    tokens, targets, mask = batch()
    wild = np.where(mask, targets, -(10**6))
    got = loss_and_gradients(make(ONE), tokens, wild, mask, segment_ids=SEGMENTS)
    assert_close(got, loss_and_gradients(make(ONE), *batch(), segment_ids=SEGMENTS), 0)


def test_a_batch_without_targets_has_no_loss():
    tokens, targets, mask = batch()
    (loss, aux), grads = loss_and_gradients(make(ONE), tokens, targets, mask & False, segment_ids=SEGMENTS)
    assert loss == 0 and aux["tokens"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_mask_may_weigh():
    tokens, targets, mask = batch()
    decoder = make(ONE)

    @jax.jit
    def losses(tokens: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        weights = (mask, mask.astype(jnp.int32), 2.0 * mask.astype(jnp.float32), None)
        return [decoder.loss(tokens, targets, loss_mask=w) for w in weights]

    (once, count), (as_int, _), (twice, double), (unmasked, all_of_them) = losses(tokens, targets, mask)
    assert_close([as_int, twice], [once, once])
    assert float(double["tokens"]) == 2 * float(count["tokens"]) == 2 * float(mask.sum())
    assert float(all_of_them["tokens"]) == tokens.size
    assert float(unmasked) != float(once)


# ------------------------------------------------------------------------------------------------- order of tokens


@pytest.mark.parametrize(
    ("layout", "length", "on_a_mesh"), [("zigzag", T, False), (ringjax.Striped(stripe=2), 19, True)]
)
def test_one_device_takes_tokens_dealt_for_several(layout: Any, length: int, on_a_mesh: bool):
    """All that goes in, and the logits, are in ring order of four shards: with a mesh of one device and without."""
    order = ring_order(length, layout, 4)
    decoder = make(change(layout=layout, num_shards=4), ring_mesh(1) if on_a_mesh else None)
    ids = SEGMENTS[:, :length]
    logits, loss = logits_and_loss(decoder, *(x[:, order] for x in batch(length)), segment_ids=ids[:, order])
    want, want_loss = logits_and_loss(make(ONE), *batch(length), segment_ids=ids)
    assert_close((logits, loss), (np.asarray(want)[:, order], want_loss))


def test_refuses_to_guess_the_order_of_tokens():
    tokens, targets, _ = batch()
    for layout in ("zigzag", "striped"):
        decoder = make(change(layout=layout))
        for call in (lambda d: d(tokens), lambda d: d.loss(tokens, targets)):
            with pytest.raises(
                ValueError, match="num_shards must be given where there is no mesh.* 1 for tokens in nat"
            ):
                call(decoder)  # noqa: B023
        # Positions of the caller's own leave nothing to guess.
        assert jax.eval_shape(lambda d: d(tokens, positions=jnp.arange(T)), decoder).shape == (B, T, V)  # noqa: B023
    assert jax.eval_shape(lambda d: d(tokens), make(change(layout="contiguous"))).shape == (B, T, V)


def test_refuses_a_ring_of_another_size():
    config = change(num_shards=4)
    message = "num_shards must be 2, the number of devices on the ring 'sp' here.* Got 4"
    with pytest.raises(ValueError, match=message):
        Decoder(config, mesh=ring_mesh(2), rngs=nnx.Rngs(0))
    decoder = make(config)  # knows no mesh yet
    with jax.set_mesh(ring_mesh(2)), pytest.raises(ValueError, match=message):
        decoder(batch()[0])


# ------------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [V, -1])
def test_refuses_ids_outside_the_vocabulary(convert: Any, bad: int):
    tokens, targets, mask = batch()
    wrong = np.where(np.arange(T) == 5, bad, tokens)
    message = rf"must be in \[0, {V}\), ids of the vocabulary. Got 2 outside it, from {bad} to {bad}"
    decoder = make(ONE)
    with pytest.raises(ValueError, match=f"tokens {message}"):
        decoder(convert(wrong))
    with pytest.raises(ValueError, match=f"tokens {message}"):
        decoder.loss(convert(wrong), convert(targets))
    for counted in (None, convert(mask | True), convert(np.full((B, T), 0.5, np.float32))):
        with pytest.raises(ValueError, match=f"targets {message}"):
            decoder.loss(convert(tokens), convert(wrong), loss_mask=counted)


@pytest.mark.parametrize("bad", [V, -1, 10**6])
def test_under_jit_ids_outside_the_vocabulary_give_nan(bad: int):
    """Where a token attends to one of them, and nowhere else; never the row of another token."""
    tokens, targets, mask = batch()
    wrong = tokens.copy()
    wrong[0, 15] = bad
    got, loss = logits_and_loss(make(ONE), wrong, targets, mask, segment_ids=SEGMENTS)
    got = np.asarray(got)
    assert np.isnan(loss)
    reached = np.zeros((B, T), bool)
    reached[0, 15:] = True  # the last document of the first row
    np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(reached[..., None], got.shape))
    (_, want), _ = dense()
    assert_close(got[~reached], np.asarray(want)[~reached])
    wrong_targets = np.where(mask & (np.arange(T) == np.argmax(mask[0])), bad, targets)
    _, loss = logits_and_loss(make(ONE), tokens, wrong_targets, mask, segment_ids=SEGMENTS)
    assert np.isnan(loss)


def test_narrow_ids_and_a_vocabulary_beyond_them():
    config = change(num_shards=1, vocab_size=300, num_layers=1)
    tokens, targets, mask = (x.astype(np.uint8) for x in batch())
    graphdef, state = nnx.split(make(config))

    @jax.jit
    def losses(state: Any, *pairs: Any) -> Any:
        return [nnx.merge(graphdef, state).loss(*pair)[0] for pair in pairs]

    narrow, wide = losses(state, (tokens, targets), (tokens.astype(np.int32), targets.astype(np.int32)))
    assert_close(narrow, wide)


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
    assert dots(gradient_jaxpr(ONE, None)) > dots(gradient_jaxpr(change(num_shards=1, remat=False), None))


def test_logits_never_exist_whole():
    for mesh in (None, ring_mesh(4)):
        shards = 1 if mesh is None else 4
        config = change(vocab_size=1009, loss_chunk=2, num_shards=shards)  # a size that nothing else has
        sizes = {
            out.aval.size
            for eqn, _ in equations(gradient_jaxpr(config, mesh, length=64))
            for out in eqn.outvars
            if 1009 in getattr(out.aval, "shape", ())
        }
        assert B * shards * 2 * 1009 in sizes, "the walk sees the logits of a chunk"
        # A chunk of every shard, or one copy of the table for every shard.
        assert max(sizes) == max(B * shards * 2 * 1009, shards * 1009 * config.embed_dim) < B * 64 * 1009


def test_logits_are_not_transposed():
    """Products have the vocabulary last, as the softmax wants it: XLA for CPUs would move all logits for it."""
    products = [
        eqn.outvars[0].aval.shape
        for eqn, _ in equations(gradient_jaxpr(change(vocab_size=1009, num_shards=1), None, length=64))
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.size == B * 2 * 1009
    ]
    assert len(products) == 2 and all(shape[-1] == 1009 for shape in products), "forward, and again in backward"


def test_program_does_not_grow_with_depth():
    sizes = {n: sum(1 for _ in equations(gradient_jaxpr(change(num_layers=n), ring_mesh(4)))) for n in (2, 9)}
    assert sizes[2] == sizes[9]


def test_table_gradient_is_summed_over_devices_once():
    """Not once a chunk: no loop of the compiled loss reduces anything of the table's size over devices."""
    mesh = ring_mesh(4)
    config = change(num_layers=1, vocab_size=48)
    decoder = make(config, mesh)
    graphdef, state = nnx.split(decoder)
    tokens = jax.device_put(batch()[0], NamedSharding(mesh, PartitionSpec(None, "sp")))
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
    without_a_mesh = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(3)))
    assert jax.tree.structure(made) == jax.tree.structure(nnx.state(without_a_mesh))


def test_parameters_start_at_their_scales():
    config = change(embed_dim=128, mlp_dim=512, num_heads=16, num_layers=8)
    params = nnx.to_pure_dict(jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))())
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
    config = change(num_shards=1, dtype="bfloat16")
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
        (dict(rope_theta=0.0), "rope_theta must be a positive number. Got 0.0"),
        (dict(rope_theta=None), "rope_theta must be a positive number. Got None"),
        (dict(rope_theta=float("nan")), "rope_theta must be a positive number. Got nan"),
        (dict(norm_eps=-1e-5), "norm_eps must be a positive number"),
        (dict(dtype="float8"), "dtype must be one of 'float32'.* Got 'float8'"),
        (dict(param_dtype="int32"), "param_dtype must be one of"),
        (dict(logits_soft_cap=0.0), "logits_soft_cap must be a positive number or None"),
        (dict(num_shards=0), "num_shards must be a positive integer. Got 0"),
        (dict(tie_embeddings=1), "tie_embeddings must be True or False. Got 1"),
        (dict(axis_name=()), "axis_name must name a mesh axis, or several as a tuple. Got \\(\\)"),
        (dict(ring=dict(unroll=2)), "ring must be a RingConfig"),
        (dict(layout="spiral"), "layout must be one of"),
        (dict(local_window_size=-1), "local_window_size must be"),
        (dict(batch_axis_name=("data", "sp")), "must name different axes"),
        (dict(head_axis_name="sp"), "must name different axes"),
    ],
)
def test_refuses_bad_configs(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        change(**fields)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(DecoderConfig)])
def test_every_field_is_checked(field: str):
    with pytest.raises(ValueError, match=f"^{field} must be|^{field} must name"):
        change(**{field: object()})


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
        (dict(tokens=[[0, 1]]), "tokens must be an array. Got list"),
    ],
)
def test_refuses_bad_batches(arguments: dict[str, Any], message: str):
    decoder = make(ONE)
    tokens, targets, _ = batch()
    with pytest.raises(ValueError, match=message):
        decoder.loss(**({"tokens": tokens, "targets": targets} | arguments))


def test_refuses_to_run_inside_shard_map():
    decoder = make(SMALL)
    spec = PartitionSpec(None, "sp")
    local = jax.shard_map(lambda t: decoder(t), mesh=ring_mesh(4), in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="Decoder must be called on whole arrays"):
        local(batch()[0])
