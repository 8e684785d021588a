"""Rotary position embedding (RoPE, arXiv:2104.09864) for integer positions of any size.

The angle of position p and frequency f is p * f. In float32 that product is off by p * f * 6e-8: 0.03 rad at a million
tokens, and not by the same amount for two tokens that lie equally far apart. So angles are counted here in units of
2^-32 turn, in wrapping 32-bit integers: whole turns drop out exactly, the angle between two tokens depends on their
distance alone, and each frequency is off by at most 2^-33 turn a token (7e-4 rad at a million tokens).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..partial import wide
from .rope_scaling import RopeScaling

Rotation = tuple[jax.Array, jax.Array]

_TURN = 2**32  # units in one turn: the range of the integer, so that wrapping means nothing


def rotation(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    dtype: jax.typing.DTypeLike,
    *,
    rotary_dim: int | None = None,
    scaling: RopeScaling | None = None,
    length: int | None = None,
) -> Rotation:
    """Cosine and sine of every angle, computed once and shared by queries, keys and layers.

    Args:
      positions: integer [T] or [B, T], in the order of the tokens (ring order on a ring).
      head_dim: H.
      theta: base of the frequencies, positive. Frequency i of R / 2 is theta^(-2i / R).
      dtype: the dtype that will be rotated. The rotation is float32, or float64 for float64.
      rotary_dim: R, even: the first R of H features turn. None is H.
      scaling: what becomes of the frequencies, and of the length of what is rotated.
      length: tokens of the whole sequence, for a scaling that depends on it.

    Returns:
      (cos, sin), each [1 or B, T, 1, R / 2], times the scaling's attention factor.
    """
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers. Got dtype {positions.dtype}.")
    if positions.ndim not in (1, 2):
        raise ValueError(f"positions must have shape [T] or [B, T]. Got {positions.shape}.")
    real = wide(dtype)
    turning = head_dim if rotary_dim is None else rotary_dim
    frequency = theta ** (-np.arange(0, turning, 2, dtype=np.float64) / turning)
    factor = 1.0
    if scaling is not None:
        frequency = scaling.frequencies(frequency, theta, length)
        factor = scaling.amplitude
    units = np.round(frequency / (2 * math.pi) * _TURN).astype(np.uint64) % _TURN
    steps = jnp.asarray(units.astype(np.uint32))[None, None, None, :]
    places = jnp.atleast_2d(positions).astype(jnp.uint32)[:, :, None, None]
    # Read as signed, the angle lies in [-half a turn, half a turn), where a float holds it best.
    angle = jax.lax.bitcast_convert_type(places * steps, jnp.int32).astype(real)
    angle = angle * jnp.asarray(2 * math.pi / _TURN, real)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate x [B, T, N, H]: the pair (x_i, x_{i + R/2}) turns by angle i, the pairing of Llama checkpoints.

    R is twice the number of angles; features from R on stay as they are.
    """
    cos, sin = by
    turning = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :turning].astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if turning == x.shape[-1] else jnp.concatenate([turned, x[..., turning:]], axis=-1)
