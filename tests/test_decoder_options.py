"""Options of the decoder that pretrained families need, against a dense decoder in float64: logits, loss, gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import dense_decoder
import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoder import SMALL, T, assert_close, batch, change, make, ring_mesh, ring_order

from ringjax.layers.decoder_layer import layer_path
from ringjax.layers.rope import rotation
from ringjax.nnx import (
    Decoder,
    DecoderConfig,
    DynamicScaling,
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    RingAttention,
    RopeConfig,
    YarnScaling,
)
from ringjax.nnx import LayerKind as Kind

H = SMALL.head_dim
# Fields of the config; then what the dense decoder is told: for each kind of layer (frequencies, amplitude, window).
CASES: dict[str, tuple[dict[str, Any], list[tuple[Any, float, int | None]], dict[str, Any]]] = {
    "as Gemma: pattern with a remainder, post-norms, q/k norm, caps, scales, gelu": (
        dict(
            num_layers=3,
            layer_pattern=(Kind(local_window_size=(5, 0), rope=RopeConfig(theta=50.0)), Kind()),
            rope_theta=900.0,
            rope_scaling=YarnScaling(factor=4.0, original_length=12, beta_fast=3.0, beta_slow=0.5, truncate=False),
            post_norms=True,
            qk_norm=True,
            attention_scale=0.6,
            logits_soft_cap=2.0,
            output_soft_cap=1.5,
            activation="gelu_tanh",
            embedding_scale=4.0,
        ),
        [
            (dense_decoder.base_frequencies(50.0, H), 1.0, 5),
            (dense_decoder.yarn(900.0, H, 4.0, 12, 3.0, 0.5, whole=False), 0.1 * math.log(4.0) + 1, None),
        ],
        dict(scale=0.6, logits_soft_cap=2.0, output_soft_cap=1.5, gelu=True, embedding_scale=4.0),
    ),
    "as gpt-oss: sinks, all biases, untied; part of a head turns, with a base that grows": (
        dict(
            num_layers=1,
            use_sinks=True,
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=False,
            rotary_dim=6,
            rope_scaling=DynamicScaling(factor=2.0, original_length=10),
            layout="striped",
        ),
        [(dense_decoder.dynamic(10000.0, 6, 2.0, 10, T), 1.0, None)],
        {},
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def program(graphdef: Any, state: Any, tokens: Any, targets: Any, mask: Any) -> Any:
    return jax.value_and_grad(lambda s: nnx.merge(graphdef, s).loss(tokens, targets, loss_mask=mask)[0])(state)


def dense(case: str, params: Any, **options: Any) -> Any:
    """((loss, logits), gradients) in float64."""
    fields, kinds, told = CASES[case]
    config = change(**fields, **options)

    def loss(params: Any, tokens: Any, targets: Any, mask: Any) -> Any:
        layers = []
        for i in range(config.num_layers):
            path, index = layer_path(config, i)
            weights = functools.reduce(lambda tree, name: tree[name], path, params)
            if index is not None:
                weights = jax.tree.map(lambda w: w[index], weights)  # noqa: B023
            frequencies, amplitude, window = kinds[i % len(kinds)]
            layers.append(dense_decoder.Layer(weights, frequencies, amplitude, window))
        table = params["embedding"]["kernel"]
        output = table if config.tie_embeddings else params["output"]["kernel"]
        logits = dense_decoder.decoder(layers, table, params["norm"], output, tokens, eps=config.norm_eps, **told)
        return dense_layers.cross_entropy(logits, targets, mask), logits

    with jax.enable_x64(True):
        tokens, targets, mask = batch()
        wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float64), params)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return jax.tree.map(np.asarray, run(wide, tokens, targets, jnp.asarray(mask, jnp.float64)))


@functools.cache
def wanted(case: str) -> Any:
    return dense(case, nnx.to_pure_dict(nnx.state(make(change(num_shards=1, **CASES[case][0])))))


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_options_equal_dense(case: str, num_shards: int):
    # Recomputation is what test_decoder.py is about, and doubles what is compiled: once here, with a pattern.
    remat = num_shards == 1 and "Gemma" in case
    config = change(num_shards=num_shards, remat=remat, **CASES[case][0])
    order = ring_order(T, config.layout, num_shards)
    decoder = make(config, None if num_shards == 1 else ring_mesh(num_shards))
    graphdef, state = nnx.split(decoder)
    loss, grads = program(graphdef, state, *(x[:, order] for x in batch()))
    (want, want_logits), want_grads = wanted(case)
    assert_close(loss, want)
    assert_close(nnx.to_pure_dict(grads), want_grads)
    if num_shards == 1:  # logits of the same stack of layers, with the cap of their own
        assert_close(jax.jit(lambda d, t: d(t))(decoder, batch()[0]), want_logits)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_layers_apart_equal_dense(num_shards: int):
    """Each with arrays of its own, in the order of the pattern; and back, bit by bit."""
    case = next(iter(CASES))
    config = change(num_shards=num_shards, **CASES[case][0])
    stacked = make(config, None if num_shards == 1 else ring_mesh(num_shards))
    decoder = stacked.with_scan_layers(False)
    graphdef, state = nnx.split(decoder)
    params = nnx.to_pure_dict(state)
    assert "blocks" not in params and list(params["rest"]) == ["layer_0", "layer_1", "layer_2"]
    order = ring_order(T, config.layout, num_shards)
    loss, grads = program(graphdef, state, *(x[:, order] for x in batch()))
    (want, _), want_grads = dense(case, params, scan_layers=False)
    assert_close(loss, want)
    assert_close(nnx.to_pure_dict(grads), want_grads)
    assert_close(loss, wanted(case)[0][0])
    again = nnx.state(decoder.with_scan_layers(True))
    for got, given in zip(jax.tree.leaves(again), jax.tree.leaves(nnx.state(stacked)), strict=True):
        assert got.sharding == given.sharding
        np.testing.assert_array_equal(got, given)


def test_a_pattern_is_stacked_and_what_is_left_is_not():
    config = change(num_layers=8, layer_pattern=(Kind(local_window_size=4), Kind(), Kind(local_window_size=2)))
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))))
    assert sorted(state["blocks"]) == ["layer_0", "layer_1", "layer_2"] and sorted(state["rest"]) == [
        "layer_0",
        "layer_1",
    ]
    assert state["blocks"]["layer_2"]["up"]["kernel"].shape == (2, 16, 24)
    assert state["rest"]["layer_1"]["up"]["kernel"].shape == (16, 24)
    places = [layer_path(config, i) for i in range(8)]
    assert places[4] == (("blocks", "layer_1"), 1) and places[7] == (("rest", "layer_1"), None)
    assert len(set(places)) == 8


def test_a_pattern_longer_than_the_decoder_is_cut():
    kinds = (Kind(local_window_size=4), Kind(local_window_size=3), Kind())
    config = change(num_layers=2, layer_pattern=kinds)
    assert [window for window, _ in config.period] == [4, 3]


# --------------------------------------------------------------------------------------------------------- scaling

R, THETA, LENGTH = 64, 5e5, 300
SCALINGS: dict[str, tuple[Any, list[float]]] = {
    "linear": (LinearScaling(factor=8.0), [f / 8 for f in dense_decoder.base_frequencies(THETA, R)]),
    "dynamic, longer": (
        DynamicScaling(factor=3.0, original_length=100),
        dense_decoder.dynamic(THETA, R, 3.0, 100, LENGTH),
    ),
    "dynamic, not longer": (
        DynamicScaling(factor=3.0, original_length=512),
        dense_decoder.base_frequencies(THETA, R),
    ),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        dense_decoder.llama3(THETA, R, 8.0, 1.0, 4.0, 8192),
    ),
    "yarn": (
        YarnScaling(factor=32.0, original_length=4096, attention_factor=1.0),
        dense_decoder.yarn(THETA, R, 32.0, 4096, 32.0, 1.0),
    ),
    "divisors": (
        FrequencyDivisors(divisors=tuple(range(1, 33))),
        [f / (i + 1) for i, f in enumerate(dense_decoder.base_frequencies(THETA, R))],
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("start", [0, 1 << 20])
def test_scaled_angles(name: str, start: int):
    """Within 2^-33 turn a token of float64, at a million tokens too; hashable, since a config holds them."""
    scaling, frequencies = SCALINGS[name]
    positions = np.arange(start, start + 64)
    cos, sin = rotation(jnp.asarray(positions, jnp.int32), R, THETA, jnp.float32, scaling=scaling, length=LENGTH)
    angle = positions[:, None] * np.asarray(frequencies, np.float64)
    bound = 1e-6 + 7.4e-10 * (start + 64)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=bound)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=bound)
    assert hash(change(rope_scaling=scaling)) == hash(change(rope_scaling=scaling))


def test_dynamic_scaling_needs_a_length():
    decoder = make(change(num_shards=1, num_layers=1, rope_scaling=DynamicScaling(factor=2.0, original_length=10)))
    with pytest.raises(NotImplementedError, match="DynamicScaling needs the length of the sequence.* positions="):
        decoder(batch()[0], positions=jnp.arange(T))


def test_the_attention_layer_takes_part_of_a_head_and_biases_of_qkv():
    layer = RingAttention(2, 8, use_bias="qkv", rotary_dim=2, rngs=nnx.Rngs(0))
    assert [name for name, part in layer.arrays().items() if "bias" in part] == ["query", "key", "value"]
    assert layer.spec.rotary_dim == 2


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LinearScaling(factor=0.5), "factor must be at least 1. Got 0.5"),
        (lambda: LinearScaling(factor="2"), "factor must be a positive number. Got '2'"),
        (lambda: DynamicScaling(factor=2.0, original_length=0), "original_length must be a positive integer. Got 0"),
        (
            lambda: Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_length=8),
            "high_freq_factor must be larger than low_freq_factor, 4.0. Got 4.0",
        ),
        (
            lambda: YarnScaling(factor=8.0, original_length=8, beta_fast=1.0, beta_slow=2.0),
            "beta_fast must be at least beta_slow, 2.0. Got 1.0",
        ),
        (lambda: YarnScaling(factor=8.0, original_length=8, attention_factor=-1.0), "attention_factor must be a pos"),
        (lambda: FrequencyDivisors(divisors=()), r"divisors must be a tuple of positive numbers. Got \(\)"),
        (lambda: RopeConfig(rotary_dim=3), "rotary_dim must be an even number of features or None. Got 3"),
        (lambda: Kind(local_window_size=-1), "local_window_size must be"),
        (lambda: Kind(rope=5), "rope must be a RopeConfig or None. Got 5"),
        (lambda: change(rotary_dim=10), "rotary_dim must be an even number of features of at most head_dim, 8,"),
        (lambda: change(layer_pattern=(Kind(),), local_window_size=3), "local_window_size must be None where"),
        (lambda: change(layer_pattern=(Kind(rope=RopeConfig(rotary_dim=10)),)), "layer_pattern: rotary_dim must be"),
        (lambda: change(attention_bias="all"), "attention_bias must be True, False or 'qkv'. Got 'all'"),
        (lambda: change(activation="relu"), "activation must be one of 'silu', 'gelu_tanh'. Got 'relu'"),
        (lambda: change(embedding_scale=0), "embedding_scale must be a positive number. Got 0"),
        (lambda: change(output_soft_cap=0.0), "output_soft_cap must be a positive number or None. Got 0.0"),
        (lambda: change(attention_scale=math.inf), "attention_scale must be a finite number or None. Got inf"),
        (
            lambda: RingAttention(2, 8, rope_theta=None, rotary_dim=2, rngs=nnx.Rngs(0)),
            "rotary_dim must be None where rope_theta is None: there is no RoPE. Got 2",
        ),
    ],
)  # fmt: skip
def test_refuses_bad_options(make_it: Any, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_it()


def test_simple_configurations_stay_simple():
    assert DecoderConfig(32, 1, 16, 4, 2, 8, 24).period == ((None, RopeConfig()),)
