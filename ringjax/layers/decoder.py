"""A decoder of the Llama architecture on RingAttention, for sequences that are sharded from tokens to loss.

Public as ringjax.nnx. Letters: B batch, T length, E embedding, M width of the MLP, V vocabulary, C devices on the ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .. import partial
from ..arguments import check_soft_cap, check_window
from ..config import RingConfig
from ..layout import Layout, as_layout
from . import checks
from .attention import ParamInfo, layer_rotation, rms_norm
from .loss import chunked_loss
from .nnx_attention import RingAttention, Weights, partition_shardings, partition_specs, settle
from .placement import BATCH, FSDP, SEQUENCE, TENSOR, AxisNames, Distribution, Mesh, Placement, Role, as_axes
from .rope import Rotation

# What the ring made is kept; all else in a layer is computed again in backward, without one more hop.
_KEEP = ("ring_out", "ring_lse")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Decoder.

    Attributes:
      vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim: sizes; num_heads a multiple of
        num_kv_heads, head_dim even.
      rope_theta: base of the rotary embedding, which turns the pairs (x_i, x_{i + H/2}) of a head, see
        :class:`ringjax.nnx.RingAttention`.
      local_window_size: None, w or (left, right): a token attends to itself and to the w (left) tokens before it only.
      logits_soft_cap: of the attention logits.
      tie_embeddings: the output projection is the embedding table.
      norm_eps: of every RMSNorm.
      loss_chunk: tokens of one shard, of each sequence of the batch, whose logits exist at a time in the loss.
      remat: recompute layers in backward, all but what the ring returned.
      dtype, param_dtype: of the computation and of the parameters, by name.
      axis_name: mesh axis of the sequence.
      batch_axis_name: mesh axis or axes of the batch.
      head_axis_name: mesh axis of heads, MLP width and vocabulary (tensor parallelism).
      layout: "contiguous", "zigzag", "striped" or a Layout object.
      num_shards: C, the number of shards for which the tokens are dealt; None is the number of devices on the ring. A
        ring of another number of devices raises, but one of a single device takes tokens in ring order of any C.
        Without a mesh a layout other than "contiguous" requires it: 1 for tokens in natural order.
      ring: tuning of the ring, the ``config`` of ring_attention.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    loss_chunk: int = 512
    remat: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    axis_name: str = "sp"
    batch_axis_name: AxisNames = None
    head_axis_name: str | None = None
    layout: str | Layout = "zigzag"
    num_shards: int | None = None
    ring: RingConfig = RingConfig()

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        for name in (
            "vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "loss_chunk",
        ):  # fmt: skip
            checked[name] = checks.positive_integer(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps"):
            checked[name] = checks.positive_number(name, getattr(self, name))
        for name in ("tie_embeddings", "remat"):
            checks.flag(name, getattr(self, name))
        for name in ("dtype", "param_dtype"):
            checks.one_of(name, getattr(self, name), checks.FLOATS)
        checked["axis_name"] = checks.required_axes("axis_name", self.axis_name)
        for name in ("batch_axis_name", "head_axis_name"):
            checked[name] = checks.axes(name, getattr(self, name))
        if self.num_shards is not None:
            checked["num_shards"] = checks.positive_integer("num_shards", self.num_shards)
        checked["logits_soft_cap"] = check_soft_cap(self.logits_soft_cap)
        check_window(self.local_window_size, True)
        if isinstance(self.local_window_size, list):  # of a file; a config must be hashable
            checked["local_window_size"] = tuple(self.local_window_size)
        as_layout(self.layout)
        checks.ring_config("ring", self.ring)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads. Got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs). Got {self.head_dim}.")
        axes = [*as_axes(self.batch_axis_name), *as_axes(self.axis_name), *as_axes(self.head_axis_name)]
        if len(set(axes)) != len(axes):
            raise ValueError(f"axis_name, batch_axis_name and head_axis_name must name different axes. Got {axes}.")


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, *, mesh: Mesh | None, rngs: nnx.Rngs):
        embed, width = config.embed_dim, config.mlp_dim
        inner = nnx.initializers.lecun_normal()
        # Each layer adds two of these to the stream: with this variance their sum does not grow with depth.
        outer = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        self.attention = RingAttention(
            config.num_heads,
            embed,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            is_causal=True,
            local_window_size=config.local_window_size,
            logits_soft_cap=config.logits_soft_cap,
            layout=config.layout,
            num_shards=config.num_shards,
            config=config.ring,
            axis_name=config.axis_name,
            batch_axis_name=config.batch_axis_name,
            head_axis_name=config.head_axis_name,
            mesh=mesh,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=inner,
            out_kernel_init=outer,
            rngs=rngs,
        )

        def weights(**table: ParamInfo) -> Weights:
            inits = {"kernel": inner, "out_kernel": outer}
            return Weights(table, self.attention.distribution.here(), inits, param_dtype=config.param_dtype, rngs=rngs)

        self.attention_norm = weights(scale=ParamInfo((embed,), "ones", (None,)))
        self.mlp_norm = weights(scale=ParamInfo((embed,), "ones", (None,)))
        self.gate = weights(kernel=ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed))
        self.up = weights(kernel=ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed))
        self.down = weights(kernel=ParamInfo((width, embed), "out_kernel", (TENSOR, FSDP), width))
        self.norm_eps = config.norm_eps

    def __call__(
        self,
        x: jax.Array,
        placement: Placement,
        *,
        rotated_by: Rotation | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        def kernel(part: Weights, *roles: Role) -> jax.Array:
            return placement.constrain(part.arrays()["kernel"].astype(x.dtype), *roles)

        y = rms_norm(x, self.attention_norm.arrays()["scale"], self.norm_eps)
        x = x + self.attention.within(y, placement, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids)
        y = rms_norm(x, self.mlp_norm.arrays()["scale"], self.norm_eps)
        wide = jax.nn.silu(y @ kernel(self.gate, None, TENSOR)) * (y @ kernel(self.up, None, TENSOR))
        wide = placement.constrain(wide, BATCH, SEQUENCE, TENSOR)
        return placement.constrain(x + wide @ kernel(self.down, TENSOR, None), BATCH, SEQUENCE, None)


class Decoder(nnx.Module):
    """A decoder of the Llama architecture: RMSNorm, RoPE, grouped-query ring attention, SwiGLU.

    Tokens, targets, segment ids and masks [B, T] are in the ring order that :func:`ringjax.to_ring_order` makes for
    ``config.layout`` and ``config.num_shards``. They and all activations are sharded over ``config.batch_axis_name``
    and ``config.axis_name``. Layers are stacked and scanned, so compile time does not grow with depth. Parameters
    name their mesh axes in their metadata: embedding features over the batch and sequence axes (FSDP), heads, MLP
    width and vocabulary over ``config.head_axis_name``. Works with Auto and Explicit axes, and without a mesh on one
    device.

    Every token id lies in [0, V), padding and masked tokens included. Ids that can be seen are checked. Under ``jit``
    they cannot be: an id outside makes the logits of every token that attends to it NaN, and so the loss.

    Args:
      config: sizes and options.
      mesh: the mesh; None takes that of the context (``jax.set_mesh``), or one device if there is none.
      rngs: random streams; "params" is used. All parameters are made on one device first: for large models see
        :meth:`init_sharded`.
    """

    def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs):
        for name in ("dtype", "param_dtype"):
            checks.floating(name, getattr(config, name))
        self.config = config
        self.mesh = mesh

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, mesh=mesh, rngs=rngs)

        def weights(**table: ParamInfo) -> Weights:
            # Table rows have a norm of about 1 / 50 sqrt(E), as is usual; the first RMSNorm brings them to sqrt(E).
            inits = {"kernel": nnx.initializers.normal(0.02)}
            return Weights(table, self._placement(), inits, param_dtype=config.param_dtype, rngs=rngs)

        rows = ParamInfo((config.vocab_size, config.embed_dim), "kernel", (TENSOR, FSDP))
        self.embedding = weights(kernel=rows)
        self.blocks = stack(rngs)
        self.norm = weights(scale=ParamInfo((config.embed_dim,), "ones", (None,)))
        if not config.tie_embeddings:
            self.output = weights(kernel=rows)
        settle(self, mesh)

    @classmethod
    def init_sharded(cls, config: DecoderConfig, *, mesh: jax.sharding.Mesh, seed: int = 0) -> "Decoder":
        """A fresh Decoder whose every parameter is made where it belongs, never whole on one device."""
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: cls(config, mesh=mesh, rngs=nnx.Rngs(seed))))
        make = jax.jit(
            lambda: nnx.state(cls(config, mesh=mesh, rngs=nnx.Rngs(seed))),
            out_shardings=partition_shardings(abstract, mesh),
        )
        return nnx.merge(graphdef, make())

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32 [B, T, V], whole: for evaluation and small use. Training uses `loss`.

        Args:
          tokens: int [B, T] in ring order.
          segment_ids: int [B, T]; tokens attend only to tokens of the same id.
          positions: int [T] or [B, T]; replaces the layout's positions, for RoPE and for the mask.

        Raises:
          ValueError: for shapes that do not fit, ids outside the vocabulary, and where nothing says for how many shards
            the tokens are dealt.
        """
        self._check(tokens, segment_ids=segment_ids)

        def run(model: "Decoder", placement: Placement, tokens: Any, segment_ids: Any, positions: Any) -> jax.Array:
            x = model._features(placement, tokens, segment_ids, positions)
            table = placement.constrain(model._output_table().astype(x.dtype), TENSOR, None)
            wide = partial.wide(x.dtype)
            logits = jnp.einsum("bte,ve->btv", x, table, preferred_element_type=wide)
            return placement.from_natural(placement.constrain(logits, BATCH, SEQUENCE, TENSOR), 1)

        def out_specs(placement: Placement) -> PartitionSpec:
            return placement.spec((*tokens.shape, self.config.vocab_size), BATCH, SEQUENCE, TENSOR)

        return self._on_auto_axes(run, out_specs, tokens, segment_ids, positions)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        loss_mask: Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean cross entropy over the tokens that count; the logits [B, T, V] never exist whole.

        Args:
          tokens, targets: int [B, T] in ring order; targets[b, i] is what follows tokens[b, i] in natural order.
          segment_ids, positions: as in the call.
          loss_mask: bool, int or float [B, T], the weight of each token; None is 1 for all. Where it is 0, the target
            may be anything. A target outside the vocabulary that counts raises, or makes the loss NaN under ``jit``.

        Returns:
          (sum(weight * cross entropy) / sum(weight), {"tokens": sum(weight)}), float32 scalars; a loss of 0 where no
          token counts.

        Raises:
          ValueError: as the call.
        """
        self._check(tokens, targets=targets, segment_ids=segment_ids, loss_mask=loss_mask)

        def run(
            model: "Decoder",
            placement: Placement,
            tokens: Any,
            segments: Any,
            positions: Any,
            targets: Any,
            mask: Any,
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            x = model._features(placement, tokens, segments, positions)
            total = chunked_loss(placement, x, model._output_table(), targets, mask, model.config.loss_chunk)
            count = jnp.float32(tokens.size) if mask is None else jnp.sum(mask.astype(jnp.float32))
            return total / jnp.where(count > 0, count, 1), {"tokens": count}

        def out_specs(placement: Placement) -> Any:
            return PartitionSpec(), {"tokens": PartitionSpec()}

        return self._on_auto_axes(run, out_specs, tokens, segment_ids, positions, targets, loss_mask)

    def _placement(self) -> Placement:
        config = self.config
        placement = Distribution.of(
            axis_name=config.axis_name,
            batch_axis_name=config.batch_axis_name,
            head_axis_name=config.head_axis_name,
            mesh=self.mesh,
            layout=config.layout,
            num_shards=config.num_shards,
        ).here()
        if placement.inside:
            raise ValueError(
                f"Decoder must be called on whole arrays, outside shard_map. Got axis {config.axis_name!r} bound."
            )
        return placement

    def _on_auto_axes(
        self, run: Any, out_specs: Any, tokens: jax.Array, segment_ids: Any, positions: Any, *rest: Any
    ) -> Any:
        """run(model, placement, tokens, ...) with all mesh axes of Auto type; the model goes in as an argument.

        A ring of one device is given everything in natural order.
        """
        placement = self._placement().sharded_like(tokens)
        if positions is None:
            placement.require_num_shards()
        graphdef, state = nnx.split(self)

        def on_arrays(state: Any, *arrays: Any) -> Any:
            return run(nnx.merge(graphdef, state), placement, *(placement.to_natural(x, -1) for x in arrays))

        return placement.with_auto_axes(on_arrays, out_specs(placement), state, tokens, segment_ids, positions, *rest)

    def _output_table(self) -> jax.Array:
        return (self.embedding if self.config.tie_embeddings else self.output).arrays()["kernel"]

    def _features(
        self, placement: Placement, tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
    ) -> jax.Array:
        """What the output table is multiplied with: [B, T, E]."""
        table = placement.constrain(self.embedding.arrays()["kernel"], TENSOR, None)
        # Ids outside the vocabulary give NaN, never the row of another token.
        rows = table.at[checks.as_index(tokens)].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = rows.astype(self.config.dtype)
        x = placement.constrain(x, BATCH, SEQUENCE, None)
        graphdef, layers = nnx.split(self.blocks)
        rotated_by = layer_rotation(self.blocks.attention.spec, placement, x, positions)
        if rotated_by is not None:
            cos, sin = rotated_by
            roles = (BATCH if cos.shape[0] > 1 else None, SEQUENCE, None, None)
            rotated_by = placement.constrain(cos, *roles), placement.constrain(sin, *roles)

        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            block = nnx.merge(graphdef, arrays)
            return block(x, placement, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids), None

        if self.config.remat:
            policy = jax.checkpoint_policies.save_only_these_names(*_KEEP)
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(layer, x, layers)
        return rms_norm(x, self.norm.arrays()["scale"], self.config.norm_eps)

    def _check(self, tokens: jax.Array, **others: jax.Array | None) -> None:
        for name, x in {"tokens": tokens, **others}.items():
            if x is not None and not isinstance(x, (jax.Array, np.ndarray)):
                raise ValueError(f"{name} must be an array. Got {type(x).__name__}.")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T]. Got {tokens.dtype} {tokens.shape}.")
        for name, x in others.items():
            if x is not None and x.shape != tokens.shape:
                raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}. Got {x.shape}.")
        checks.ids("tokens", tokens, self.config.vocab_size)
        targets = others.get("targets")
        if targets is None:
            return
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"targets must be integers. Got dtype {targets.dtype}.")
        checks.ids("targets", targets, self.config.vocab_size, counted=others.get("loss_mask"))


def param_specs(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """PartitionSpecs of a Decoder's parameters on this mesh, shaped like ``nnx.state(decoder)``. Allocates nothing."""
    return partition_specs(_abstract_state(config, mesh), mesh)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """NamedShardings of a Decoder's parameters on this mesh (concrete or abstract), shaped like its state."""
    return partition_shardings(_abstract_state(config, mesh), mesh)


def _abstract_state(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
