"""ringjax.attention_fn in Flax's attention layers and in place of jax.nn.dot_product_attention."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import ringjax

B, T, E, N, H = 2, 16, 16, 4, 8


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("sp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


def qkv(batch: tuple[int, ...] = (B,), kv_heads: int = N, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    shapes = [(*batch, T, heads, H) for heads in (N, kv_heads, kv_heads)]
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))


def assert_close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ in layers


def test_nnx_attention():
    """Flax's own attention and the ring's, same weights: outputs and gradients."""
    x = jax.random.normal(jax.random.key(0), (B, T, E))
    default = nnx.MultiHeadAttention(N, E, decode=False, dropout_rate=0.3, deterministic=True, rngs=nnx.Rngs(0))
    ring = nnx.MultiHeadAttention(
        N,
        E,
        decode=False,
        dropout_rate=0.3,  # inactive, since deterministic
        deterministic=True,
        attention_fn=ringjax.attention_fn(mesh=mesh()),
        rngs=nnx.Rngs(0),
    )

    def gradients(layer: nnx.Module) -> Any:
        return nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(x, is_causal=True)))))(layer)

    (value, grads), (value_default, grads_default) = gradients(ring), gradients(default)
    assert_close(value, value_default)
    jax.tree.map(assert_close, grads, grads_default)


def test_nnx_cross_attention():
    x, y = (jax.random.normal(jax.random.key(i), (B, length, E)) for i, length in enumerate((T, 11)))
    layers = [
        nnx.MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0), **fn)
        for fn in ({}, dict(attention_fn=ringjax.attention_fn(mesh=mesh())))
    ]
    assert_close(layers[1](x, y), layers[0](x, y))


def test_linen_attention():
    x = jax.random.normal(jax.random.key(0), (B, T, E))
    ids = jnp.repeat(jnp.array([[0, 1], [0, 0]]), T // 2, axis=1)
    default = nn.MultiHeadDotProductAttention(N, dropout_rate=0.3, deterministic=True)
    fn = ringjax.attention_fn(mesh=mesh(), is_causal=True, segment_ids=ids)
    ring = nn.MultiHeadDotProductAttention(N, dropout_rate=0.3, deterministic=True, attention_fn=fn)
    variables = default.init(jax.random.key(1), x)
    mask = nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(ids, ids, jnp.equal))

    def gradients(layer: nn.Module, **call: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, x, **call)))))(variables)

    value, grads = gradients(ring)
    value_default, grads_default = gradients(default, mask=mask)
    assert_close(value, value_default)
    jax.tree.map(assert_close, grads, grads_default)


def test_model_on_a_sharded_sequence():
    """A model of the user's own, one argument changed, sequence and heads sharded under jit."""
    square = jax.make_mesh((4, 2), ("sp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (B, T, E))
    order = np.asarray(ringjax.ring_positions(T, layout="striped", num_shards=4))
    fn = ringjax.attention_fn(head_axis_name="tensor", layout="striped")
    default, ring = (
        nnx.MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0), **a) for a in ({}, dict(attention_fn=fn))
    )
    with jax.set_mesh(square):
        sharding = jax.sharding.NamedSharding(square, jax.sharding.PartitionSpec(None, "sp"))
        out = nnx.jit(lambda m, x: m(x, is_causal=True))(ring, jax.device_put(x[:, order], sharding))
    assert_close(out, default(x, is_causal=True)[:, order])


# ------------------------------------------------------------------------------------- in place of jax.nn's function


def test_in_place_of_jax_nn():
    q, k, v = qkv(kv_heads=2)
    fn = ringjax.attention_fn(mesh=mesh(), scale=9.0, local_window_size=2)  # both replaced by the call
    options: dict[str, Any] = dict(
        scale=0.4,
        is_causal=True,
        local_window_size=(5, 0),
        query_seq_lengths=jnp.array([T, 9]),
        key_value_seq_lengths=jnp.array([12, T]),
    )
    (got, lse), want = fn(q, k, v, return_residual=True, **options), jax.nn.dot_product_attention(q, k, v, **options)
    # Queries that attend to nothing are 0 here and some mean of values there.
    assert_close(got[0, :12], want[0, :12])
    assert_close(got[1, :9], want[1, :9])
    assert not np.any(got[1, 9:])
    assert lse.shape == (B, T, N) and np.all(np.isneginf(lse[1, 9:]))
    given_before = ringjax.attention_fn(mesh=mesh(), **options)
    assert_close(given_before(q, k, v), got)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_dimensions(batch: tuple[int, ...]):
    q, k, v = qkv(batch)
    out, lse = ringjax.attention_fn(mesh=mesh())(q, k, v, return_residual=True)
    assert out.shape == q.shape and lse.shape == (*batch, T, N)
    assert_close(out, nnx.dot_product_attention(q, k, v))


def test_dtype_is_promoted_as_in_flax():
    q, k, v = qkv()
    fn = ringjax.attention_fn(mesh=mesh())
    assert fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    asked = []

    def promote(arrays: tuple[jax.Array, ...], *, dtype: Any) -> tuple[jax.Array, ...]:
        asked.append(dtype)
        return tuple(x * 2 for x in arrays)

    assert_close(fn(q, k, v, dtype=jnp.float32, promote_dtype=promote), fn(q * 2, k * 2, v * 2))
    assert asked == [jnp.float32]


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("theirs", [nnx.dot_product_attention, nn.dot_product_attention, jax.nn.dot_product_attention])
def test_every_argument_of_the_functions_it_replaces_is_named(theirs: Any):
    """Linen drops what a signature does not name; a new argument of Flax or JAX shows up here."""
    given = inspect.signature(theirs).parameters
    ours = inspect.signature(ringjax.attention_fn()).parameters
    assert set(given) - set(ours) == set()
    order = [n for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    theirs_in_order = [n for n, p in given.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert all(a == b for a, b in zip(order, theirs_in_order, strict=False))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "mask": (
        dict(mask=jnp.ones((B, 1, T, T), bool)),
        r"mask must be None.*is_causal=True.*segment_ids.*\(2, 1, 16, 16\)",
    ),
    "bias": (dict(bias=jnp.ones((B, 1, T, T))), "bias must be None"),
    "dropout": (dict(dropout_rate=0.1, dropout_rng=jax.random.PRNGKey), "dropout_rate must be 0 or deterministic"),
    "precision": (dict(precision="highest"), "precision must be None.*default_matmul_precision.*'highest'"),
    "sown weights": (dict(module=object()), "module must be None.*sow_weights=False"),
    "dot_general": (dict(einsum_dot_general=jax.lax.dot_general), "einsum_dot_general must be None"),
    "einsum of q and k": (dict(qk_attn_weights_einsum=jnp.einsum), "qk_attn_weights_einsum must be None"),
    "einsum of values": (dict(attn_weights_value_einsum=jnp.einsum), "attn_weights_value_einsum must be None"),
    "rope positions": (dict(input_positions=jnp.arange(T)), "input_positions must be None.*RingAttention"),
    "implementation": (dict(implementation="cudnn"), "implementation must be None.*RingConfig"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses(what: str):
    call, message = REFUSALS[what]
    with pytest.raises(NotImplementedError, match=f"(?s){message}"):
        ringjax.attention_fn(mesh=mesh())(*qkv(), **call)


def test_refuses_shapes_that_do_not_match():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"value must have shape \[batch..., length, heads, head size\]"):
        ringjax.attention_fn(mesh=mesh())(q, k, v[0])


def test_layers_pass_refusals_on():
    """What the layers are asked for reaches the ring, which says no: nothing is dropped on the way."""
    x = jnp.ones((B, T, E))
    fn = ringjax.attention_fn(mesh=mesh())
    layer = nnx.MultiHeadAttention(N, E, dropout_rate=0.5, attention_fn=fn, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer(x, deterministic=False)
    with pytest.raises(NotImplementedError, match="module"):
        layer(x, deterministic=True, sow_weights=True)
    with pytest.raises(NotImplementedError, match="mask"):
        layer(x, deterministic=True, mask=nnx.make_causal_mask(x[..., 0]))
    layer.init_cache((B, T, E))
    with pytest.raises(NotImplementedError, match="Decoding"):
        layer(x[:, :1], deterministic=True, decode=True)

    key = jax.random.key(0)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        nn.MultiHeadDotProductAttention(N, dropout_rate=0.5, attention_fn=fn).init(
            {"params": key, "dropout": key}, x, deterministic=False
        )
    with pytest.raises(NotImplementedError, match="precision"):
        nn.MultiHeadDotProductAttention(N, precision="highest", attention_fn=fn).init(key, x)
    with pytest.raises(NotImplementedError, match="module"):
        nn.MultiHeadDotProductAttention(N, attention_fn=fn).init(key, x, sow_weights=True)
    einsums = dict(qk_attn_weights_einsum_cls=lambda: jnp.einsum, attn_weights_value_einsum_cls=lambda: jnp.einsum)
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        nn.MultiHeadDotProductAttention(N, attention_fn=fn, **einsums).init(key, x)
