"""Flax Linen's RingAttention: declares the parameters and calls the equation it shares with ringjax.nnx. Needs flax."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..config import RingConfig
from ..layout import Layout
from .attention import AttentionSpec, ParamInfo, initial_value, run_layer
from .placement import AxisNames, Mesh, Place, find_place, fit_spec

Initializer = Callable[..., jax.Array]


class Weights(nn.Module):
    """The parameters of one part of the layer (kernel, bias, scale, logit), as plain arrays."""

    table: Mapping[str, ParamInfo]
    place: Place
    inits: Mapping[str, Initializer]
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self._param(name, info) for name, info in self.table.items()}

    def _param(self, name: str, info: ParamInfo) -> jax.Array:
        def init(key: jax.Array) -> Any:
            value = initial_value(info, key, self.param_dtype, self.inits)
            if not self.place.sizes:
                return value
            # Linen places what its metadata say as they say it, so they are fitted to this mesh.
            names = fit_spec(self.place.names(info.roles), info.shape, self.place.sizes)
            return nn.Partitioned(value, tuple(names))

        # Unboxed without Linen's sharding constraint, which no mesh with Explicit axes accepts.
        param = self.param(name, init, unbox=False)
        return param.value if isinstance(param, nn.Partitioned) else param


class RingAttention(nn.Module):
    """Multi-head self-attention over a sequence that is sharded across devices.

        out = ring_attention(rope(x W_q), rope(x W_k), x W_v) W_o

    The same layer as :class:`ringjax.nnx.RingAttention`, with the same names of options and parameters (query, key,
    value, out; kernel, bias), which are also those of Linen's ``MultiHeadDotProductAttention``. On a mesh, given or of
    the context, parameters come boxed in ``nn.Partitioned`` with the mesh axes of each dimension (``nn.get_sharding``
    reads them); without one they are plain arrays.

    Attributes:
      num_heads, num_kv_heads, head_dim, out_features, use_bias, rope_theta, qk_norm, use_sinks, norm_eps, scale,
        is_causal, local_window_size, logits_soft_cap, layout, axis_name, batch_axis_name, head_axis_name, mesh, config,
        dtype, param_dtype, kernel_init, out_kernel_init, bias_init: as in :class:`ringjax.nnx.RingAttention`. The
        number of input features is that of the first input.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    use_sinks: bool = False
    norm_eps: float = 1e-6
    scale: float | None = None
    is_causal: bool = False
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    layout: str | Layout = "contiguous"
    axis_name: str | tuple[str, ...] = "sp"
    batch_axis_name: AxisNames = None
    head_axis_name: AxisNames = None
    mesh: Mesh | None = None
    config: RingConfig = RingConfig()  # noqa: RUF009  frozen
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Attend. Arguments and result are those of :meth:`ringjax.nnx.RingAttention.__call__`."""
        spec = AttentionSpec.of(
            inputs.shape[-1],
            self.num_kv_heads,
            self.head_dim,
            self.out_features,
            num_heads=self.num_heads,
            use_bias=self.use_bias,
            qk_norm=self.qk_norm,
            use_sinks=self.use_sinks,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            scale=self.scale,
            is_causal=self.is_causal,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            layout=self.layout,
            dtype=self.dtype,
            config=self.config,
        )
        place = find_place(self.axis_name, self.mesh, self.batch_axis_name, self.head_axis_name)
        out_init = self.out_kernel_init or self.kernel_init
        inits = {"kernel": self.kernel_init, "out_kernel": out_init, "bias": self.bias_init}
        weights = {
            name: Weights(table, place, inits, self.param_dtype, name=name)()
            for name, table in spec.parameters().items()
        }
        return run_layer(weights, inputs, spec, place, positions, segment_ids, seq_lengths)
