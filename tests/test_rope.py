"""RoPE against float64, also where float32 angles are no good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.layers.rope import rotate, rotation

H, THETA = 64, 10000.0


def exact(positions: np.ndarray) -> np.ndarray:
    """Angles [T, H / 2] in float64."""
    return positions[:, None].astype(np.float64) * THETA ** (-np.arange(0, H, 2) / H)


@pytest.mark.parametrize(("start", "bound"), [(0, 1e-6), (8192 - 256, 8e-6), (1 << 20, 1e-3), (-512, 1e-6)])
def test_angles(start: int, bound: float):
    positions = np.arange(start, start + 256)
    cos, sin = rotation(jnp.asarray(positions, jnp.int32), H, THETA, jnp.float32)
    assert cos.shape == (1, 256, 1, H // 2) and cos.dtype == jnp.float32
    angle = exact(positions)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=bound)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=bound)


def test_products_depend_on_distance_alone():
    """Scores of tokens a few places apart are the same at the start of a sequence and a billion tokens later."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 16, 1, H)) for i in range(2))

    def scores(start: int) -> np.ndarray:
        by = rotation(jnp.arange(16, dtype=jnp.int32) + start, H, THETA, jnp.float32)
        return np.einsum("bqnh,bknh->qk", rotate(q, by), rotate(k, by))

    np.testing.assert_allclose(scores(1 << 30), scores(0), atol=2e-5)


def test_positions_of_every_sequence():
    positions = jnp.asarray([[3, 1, 4], [1, 5, 9]], jnp.int32)
    cos, sin = rotation(positions, H, THETA, jnp.bfloat16)
    assert cos.shape == sin.shape == (2, 3, 1, H // 2) and cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[1, :, 0], np.cos(exact(np.array([1, 5, 9]))), atol=1e-6)


def test_weights_of_the_other_pairing_fit_once_reordered():
    """The recipe of RingAttention's docstring, for kernels and biases that were trained with pairs (x_2i, x_2i+1)."""
    rng = np.random.default_rng(0)
    features, kernel, bias = rng.standard_normal((1, 8, 5)), rng.standard_normal((5, 2, H)), rng.standard_normal((2, H))
    angle = exact(np.arange(8))[:, None]

    def theirs(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        x = np.einsum("bte,enh->btnh", features, w) + b
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def reordered(w: np.ndarray) -> np.ndarray:
        return w.reshape(*w.shape[:-1], H // 2, 2).swapaxes(-1, -2).reshape(w.shape)

    x = np.einsum("bte,enh->btnh", features, reordered(kernel)) + reordered(bias)
    by = rotation(jnp.arange(8, dtype=jnp.int32), H, THETA, jnp.float32)
    ours = np.asarray(rotate(jnp.asarray(x, jnp.float32), by))
    # The same head in another order, for queries and keys alike: their products are the same.
    np.testing.assert_allclose(ours, reordered(theirs(kernel, bias)), atol=1e-4)


def test_keeps_the_dtype():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert rotate(x, rotation(jnp.arange(4), 8, THETA, x.dtype)).dtype == jnp.bfloat16


def test_float64_stays_float64():
    with jax.enable_x64(True):
        cos, _ = rotation(jnp.arange(300), H, THETA, jnp.float64)
        assert cos.dtype == jnp.float64
        # What is left is the rounding of the frequencies to 2^-33 turn.
        np.testing.assert_allclose(cos[0, :, 0], np.cos(exact(np.arange(300))), atol=300 * 7.4e-10)


@pytest.mark.parametrize("positions", [jnp.ones((4,)), jnp.ones((1, 2, 3), jnp.int32)])
def test_refuses_other_positions(positions: jax.Array):
    with pytest.raises(ValueError, match="positions must"):
        rotation(positions, H, THETA, jnp.float32)
