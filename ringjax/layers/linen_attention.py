"""Flax Linen's RingAttention: declares the parameters and calls the equation it shares with ringjax.nnx. Needs flax."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ..config import RingConfig
from ..layout import Layout
from . import checks
from .attention import AttentionSpec, Initializer, ParamInfo, checked_initializers, initial_value, run_layer
from .placement import AxisNames, Distribution, Mesh, Placement, fit_spec
from .rope_scaling import RopeScaling


class Weights(nn.Module):
    """The parameters of one part of the layer (kernel, bias, scale, logit), as plain arrays."""

    table: Mapping[str, ParamInfo]
    placement: Placement
    inits: Mapping[str, Initializer]
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self._param(name, info) for name, info in self.table.items()}

    def _param(self, name: str, info: ParamInfo) -> jax.Array:
        def init(key: jax.Array) -> Any:
            value = initial_value(info, key, self.param_dtype, self.inits)
            if not self.placement.sizes:
                return value
            # Linen places what its metadata say as they say it, so they are fitted to this mesh.
            names = fit_spec(self.placement.names(info.roles), info.shape, self.placement.sizes)
            return nn.Partitioned(value, tuple(names))

        # Unboxed without Linen's sharding constraint, which no mesh with Explicit axes accepts.
        param = self.param(name, init, unbox=False)
        return param.value if isinstance(param, nn.Partitioned) else param


class RingAttention(nn.Module):
    r"""Multi-head self-attention over a sequence that is sharded across devices.

    .. math::  out = attention(rope(x W_q), rope(x W_k), x W_v) \, W_o

    The same layer as :class:`ringjax.nnx.RingAttention`, with the same names of options and parameters (query, key,
    value, out; kernel, bias), which are also those of Linen's ``MultiHeadDotProductAttention``. On a mesh, given or of
    the context, parameters come boxed in ``nn.Partitioned`` with the mesh axes of each dimension (``nn.get_sharding``
    reads them); without one they are plain arrays.

    Attributes:
      num_heads, num_kv_heads, head_dim, out_features, use_bias, rope_theta, rotary_dim, rope_scaling, qk_norm,
        use_sinks, norm_eps, scale, is_causal, local_window_size, logits_soft_cap, layout, axis_name, batch_axis_name,
        head_axis_name, mesh, num_shards, config, dtype, param_dtype, kernel_init, out_kernel_init, bias_init: as in
        :class:`ringjax.nnx.RingAttention`, RoPE's pairs of the weights too. The number of input features is that of
        the first input. ``init`` outside a mesh is a call without a mesh: give num_shards, or set the mesh.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool | Literal["qkv"] = False
    rope_theta: float | None = 10000.0
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
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
    num_shards: int | None = None
    config: RingConfig = RingConfig()  # noqa: RUF009  frozen
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B T E"],
        *,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        seq_lengths: Int[Array, " B"] | None = None,
        max_segment_length: int | None = None,
        shared_length: int | tuple[int, ...] | None = None,
    ) -> Float[Array, "B T O"]:
        """Attend, as :meth:`ringjax.nnx.RingAttention.__call__`, which says what ``inputs``, ``positions``,
        ``segment_ids``, ``seq_lengths``, ``max_segment_length`` and ``shared_length`` are, the result and the errors.
        """
        spec = AttentionSpec.of(
            in_features=inputs.shape[-1],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            out_features=self.out_features,
            use_bias=self.use_bias,
            qk_norm=self.qk_norm,
            use_sinks=self.use_sinks,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rotary_dim=self.rotary_dim,
            rope_scaling=self.rope_scaling,
            scale=self.scale,
            is_causal=self.is_causal,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            dtype=self.dtype,
            config=self.config,
        )
        checks.floating("param_dtype", self.param_dtype)
        placement = Distribution.of(
            axis_name=self.axis_name,
            batch_axis_name=self.batch_axis_name,
            head_axis_name=self.head_axis_name,
            mesh=self.mesh,
            layout=self.layout,
            num_shards=self.num_shards,
        ).here()
        inits = checked_initializers(self.kernel_init, self.out_kernel_init, self.bias_init)
        weights = {
            name: Weights(table, placement, inits, self.param_dtype, name=name)()
            for name, table in spec.parameters().items()
        }
        return run_layer(
            weights,
            inputs,
            spec,
            placement,
            positions,
            segment_ids,
            seq_lengths,
            max_segment_length,
            shared_length,
        )
