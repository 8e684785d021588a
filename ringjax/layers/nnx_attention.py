"""RingAttention for Flax NNX: declares the parameters and calls the shared equation. Public as ringjax.nnx."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ..cache import KVCache
from ..config import RingConfig
from ..layout import Layout
from . import checks
from .attention import (
    AttentionSpec,
    Initializer,
    ParamInfo,
    apply_attention,
    apply_cached_attention,
    checked_initializers,
    initial_value,
    run_layer,
)
from .norm import Normed
from .placement import AxisNames, Distribution, Mesh, Placement, fit_spec
from .rope import Rotation
from .rope_scaling import RopeScaling


class Weights(nnx.Module):
    """The parameters of one part of a layer (kernel, bias, scale, logit), with the mesh axes of each dimension."""

    def __init__(
        self,
        table: Mapping[str, ParamInfo],
        placement: Placement,
        inits: Mapping[str, Initializer],
        *,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        for name, info in table.items():
            value = initial_value(info, rngs.params(), param_dtype, inits)
            # Not sharded on creation (eager_sharding): `settle` does that for a whole module, and fits it to the mesh.
            setattr(self, name, nnx.Param(value, out_sharding=placement.names(info.roles), eager_sharding=False))

    def arrays(self) -> dict[str, jax.Array]:
        return {name: x[...] for name, x in vars(self).items() if isinstance(x, nnx.Param)}


@overload
def partition_specs(tree: nnx.State, mesh: Mesh) -> nnx.State: ...
@overload
def partition_specs(tree: PyTree[nnx.Variable], mesh: Mesh) -> PyTree[PartitionSpec]: ...
def partition_specs(tree: PyTree[nnx.Variable], mesh: Mesh) -> PyTree[PartitionSpec]:
    """PartitionSpecs for a tree of parameters, or of what an optimizer makes of them, on this mesh.

    As ``nnx.get_partition_spec``, but leaves out mesh axes that do not divide a dimension. What carries no metadata is
    whole on every device. The mesh may be abstract; nothing is allocated.

    Args:
      tree: an ``nnx.State``, or a pytree with ``nnx.Variable`` leaves.
      mesh: concrete or abstract.

    Returns:
      The tree with a PartitionSpec in place of each value.
    """

    def spec(x: Any) -> Any:
        if not isinstance(x, nnx.Variable):
            return PartitionSpec()
        names = x.get_metadata().get("out_sharding") or (None,) * len(x.shape)
        return x.replace(fit_spec(names, x.shape, dict(mesh.shape)))

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@overload
def partition_shardings(tree: nnx.State, mesh: Mesh) -> nnx.State: ...
@overload
def partition_shardings(tree: PyTree[nnx.Variable], mesh: Mesh) -> PyTree[NamedSharding]: ...
def partition_shardings(tree: PyTree[nnx.Variable], mesh: Mesh) -> PyTree[NamedSharding]:
    """As :func:`partition_specs`, but NamedShardings: for jit's in_shardings and out_shardings or jax.device_put.

    Args:
      tree: an ``nnx.State``, or a pytree with ``nnx.Variable`` leaves.
      mesh: concrete or abstract.

    Returns:
      The tree with a NamedSharding in place of each value.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def settle(module: nnx.Module, mesh: Mesh | None) -> None:
    """Move the parameters of a finished module to where they belong on a real mesh: the given one or the context's."""
    state = nnx.state(module)
    if not all(isinstance(x, jax.Array) and not isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        return  # Under jit or eval_shape: whoever traces decides where the results go.
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if isinstance(mesh, jax.sharding.Mesh) and not mesh.empty:
        nnx.update(module, jax.device_put(state, partition_shardings(state, mesh)))


class RingAttention(nnx.Module):
    r"""Multi-head self-attention over a sequence that is sharded across devices.

    .. math::  out = attention(rope(x W_q), rope(x W_k), x W_v) \, W_o

    Parameters have the names and shapes of ``flax.nnx.MultiHeadAttention`` (query, key, value, out; kernel, bias), so
    its weights fit. Their metadata name mesh axes: features over the batch and sequence axes (FSDP), heads over
    ``head_axis_name``; see :func:`partition_specs`. Without a mesh the layer runs on one device.

    RoPE turns the pairs (x_i, x_{i + H/2}), the two halves of a head, as in Hugging Face's checkpoints of Llama.
    Weights trained with the pairs (x_{2i}, x_{2i+1}), as Meta publishes them, fit once the last axis of the kernels
    and biases of query and key is reordered: ``w.reshape(*w.shape[:-1], H // 2, 2).swapaxes(-1, -2).reshape(w.shape)``.

    Args:
      num_heads: N, query heads.
      in_features: E.
      num_kv_heads: K, key/value heads, a divisor of N; default N.
      head_dim: H; default in_features / num_heads.
      out_features: default in_features.
      use_bias: biases on all four projections, or with "qkv" on all but the output's.
      rope_theta: base of the rotary embedding (pairs as above); None for none.
      rotary_dim: R, even: the first R features of a head turn, in pairs (x_i, x_{i + R/2}); None is all of them.
      rope_scaling: of RoPE's frequencies, for sequences longer than the model was trained for.
      qk_norm: RMSNorm with a learned scale on every query and key head, before RoPE.
      use_sinks: one learned logit per query head in the softmax's denominator, starting at 0.
      norm_eps: of qk_norm.
      scale, is_causal, local_window_size, logits_soft_cap, layout, axis_name, batch_axis_name, head_axis_name, mesh,
        config: as in :func:`ringjax.ring_attention`. With Explicit axes the batch axes are read off the input.
      num_shards: C, the number of shards for which the tokens are dealt; None is the number of devices on the ring. A
        ring of another number of devices raises, but one of a single device takes tokens in ring order of any C (it
        brings them into natural order within). Without a mesh a layout other than "contiguous" requires it, 1 being
        natural order, unless the result depends on no position.
      dtype: of the computation; default: the common dtype of inputs and parameters.
      param_dtype: of the parameters.
      kernel_init, out_kernel_init, bias_init: called as ``init(key, [fan in, fan out], dtype)``; out_kernel_init
        defaults to kernel_init.
      rngs: random streams; "params" is used.

    Raises:
      ValueError: for an option that is not what it must be, sizes that do not fit, axis names that the mesh lacks, or a
        mesh with another number of devices on the ring than num_shards.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool | Literal["qkv"] = False,
        rope_theta: float | None = 10000.0,
        rotary_dim: int | None = None,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        use_sinks: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        is_causal: bool = False,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        logits_soft_cap: float | None = None,
        layout: str | Layout = "contiguous",
        axis_name: str | tuple[str, ...] = "sp",
        batch_axis_name: AxisNames = None,
        head_axis_name: AxisNames = None,
        mesh: Mesh | None = None,
        num_shards: int | None = None,
        config: RingConfig | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer | None = None,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        self.spec = AttentionSpec.of(
            in_features=in_features,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_features=out_features,
            use_bias=use_bias,
            qk_norm=qk_norm,
            use_sinks=use_sinks,
            norm_eps=norm_eps,
            rope_theta=rope_theta,
            rotary_dim=rotary_dim,
            rope_scaling=rope_scaling,
            scale=scale,
            is_causal=is_causal,
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            dtype=dtype,
            config=RingConfig() if config is None else config,
        )
        self.distribution = Distribution.of(
            axis_name=axis_name,
            batch_axis_name=batch_axis_name,
            head_axis_name=head_axis_name,
            mesh=mesh,
            layout=layout,
            num_shards=num_shards,
        )
        checks.floating("param_dtype", param_dtype)
        kernel_init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init
        inits = checked_initializers(kernel_init, out_kernel_init, bias_init)
        placement = self.distribution.here()
        self.query: Weights
        self.key: Weights
        self.value: Weights
        self.out: Weights
        for name, table in self.spec.parameters().items():
            setattr(self, name, Weights(table, placement, inits, param_dtype=param_dtype, rngs=rngs))
        settle(self, mesh)

    def arrays(self) -> dict[str, dict[str, jax.Array]]:
        """The parameters as plain arrays, by part ("query", "key", "value", "out") and name ("kernel", "bias")."""
        return {name: part.arrays() for name, part in vars(self).items() if isinstance(part, Weights)}

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
        """Attend.

        Args:
          inputs: [B, T, E] in ring order of the layout for num_shards; inside shard_map the local shard.
          positions: int [T] or [B, T]; replaces the layout's positions, for RoPE and for the mask.
          segment_ids: int [B, T]; tokens attend only to tokens of the same id (packed documents).
          seq_lengths: int [B]; tokens from there on are padding.
          max_segment_length, shared_length: promises about segments, as in :func:`ringjax.ring_attention`.

        Returns:
          [B, T, out_features], in the order of the inputs and sharded as they are.

        Raises:
          ValueError: for shapes that do not fit, and where nothing says for how many shards the tokens are dealt.
        """
        return run_layer(
            self.arrays(),
            inputs,
            self.spec,
            self.distribution.here(),
            positions,
            segment_ids,
            seq_lengths,
            max_segment_length,
            shared_length,
        )

    def within(
        self,
        inputs: jax.Array,
        placement: Placement,
        *,
        rotated_by: Rotation | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        promised: Mapping[str, Any],
    ) -> jax.Array:
        """The layer inside a model that has already looked around and computed the rotation once for all layers."""
        return apply_attention(
            self.arrays(),
            inputs,
            self.spec,
            placement,
            rotated_by=rotated_by,
            positions=positions,
            segment_ids=segment_ids,
            promised=promised,
        )

    def within_cached(
        self,
        inputs: jax.Array | Normed,
        placement: Placement,
        cache: KVCache,
        *,
        rotated_by: Rotation | None,
        counts: jax.Array | None,
        prompt: bool,
    ) -> tuple[jax.Array, KVCache]:
        """The same while prompts are read and tokens written."""
        return apply_cached_attention(
            self.arrays(),
            inputs,
            self.spec,
            placement,
            cache,
            rotated_by=rotated_by,
            counts=counts,
            prompt=prompt,
        )
