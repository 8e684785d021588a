"""A decoder of the Llama architecture on RingAttention, for sequences that are sharded from tokens to loss.

Public as ringjax.nnx. Letters: B batch, T length, E embedding, M width of the MLP, V vocabulary, C devices on the ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from .. import partial
from ..arguments import check_window
from ..config import RingConfig
from ..layout import Layout, as_layout
from .attention import ParamInfo, layer_rotation, rms_norm
from .loss import chunked_loss
from .nnx_attention import RingAttention, Weights, partition_shardings, partition_specs, settle
from .placement import BATCH, FSDP, SEQUENCE, TENSOR, AxisNames, Mesh, Place, as_axes, find_place
from .rope import Rotation

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What the ring made is kept; all else in a block is computed again in backward, without one more hop.
_KEEP = ("ring_out", "ring_lse")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Decoder.

    Attributes:
      vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim: sizes; num_heads a multiple of
        num_kv_heads, head_dim even.
      rope_theta: base of the rotary embedding.
      local_window_size: None, w or (left, right): every layer attends the last w (left) tokens only.
      logits_soft_cap: of the attention logits.
      tie_embeddings: the output projection is the embedding table.
      norm_eps: of every RMSNorm.
      loss_chunk: tokens of one shard, of each sequence of the batch, whose logits exist at a time in the loss.
      remat: recompute blocks in backward, all but what the ring returned.
      dtype, param_dtype: of the computation and of the parameters, by name.
      axis_name: mesh axis of the sequence.
      batch_axis_name: mesh axis or axes of the batch.
      head_axis_name: mesh axis of heads, MLP width and vocabulary (tensor parallelism).
      layout: "contiguous", "zigzag", "striped" or a Layout object.
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
    ring: RingConfig = RingConfig()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            self._positive_integer(name)
        self._positive_integer("loss_chunk")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads. Got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs). Got {self.head_dim}.")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive. Got {getattr(self, name)!r}.")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, _DTYPES))}. Got {getattr(self, name)!r}.")
        if self.logits_soft_cap is not None and not self.logits_soft_cap > 0:
            raise ValueError(f"logits_soft_cap must be positive or None. Got {self.logits_soft_cap!r}.")
        as_layout(self.layout)
        # Files give lists; a config must be hashable.
        for name in ("local_window_size", "batch_axis_name"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_window(self.local_window_size, True)
        axes = [*as_axes(self.batch_axis_name), self.axis_name, *as_axes(self.head_axis_name)]
        if len(set(axes)) != len(axes):
            raise ValueError(f"axis_name, batch_axis_name and head_axis_name must name different axes. Got {axes}.")

    def _positive_integer(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer. Got {value!r}.")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, *, mesh: Mesh | None, rngs: nnx.Rngs):
        embed, width = config.embed_dim, config.mlp_dim
        inner = nnx.initializers.lecun_normal()
        # Each block adds two of these to the stream: with this variance their sum does not grow with depth.
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
            return Weights(table, self.attention.place(), inits, param_dtype=config.param_dtype, rngs=rngs)

        self.attention_norm = weights(scale=ParamInfo((embed,), "ones", (None,)))
        self.mlp_norm = weights(scale=ParamInfo((embed,), "ones", (None,)))
        self.gate = weights(kernel=ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed))
        self.up = weights(kernel=ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed))
        self.down = weights(kernel=ParamInfo((width, embed), "out_kernel", (TENSOR, FSDP), width))
        self.norm_eps = config.norm_eps

    def __call__(
        self,
        x: jax.Array,
        place: Place,
        *,
        rotated_by: Rotation | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        def kernel(part: Weights, *roles: str | None) -> jax.Array:
            return place.constrain(part.arrays()["kernel"].astype(x.dtype), *roles)

        y = rms_norm(x, self.attention_norm.arrays()["scale"], self.norm_eps)
        x = x + self.attention.within(y, place, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids)
        y = rms_norm(x, self.mlp_norm.arrays()["scale"], self.norm_eps)
        wide = jax.nn.silu(y @ kernel(self.gate, None, TENSOR)) * (y @ kernel(self.up, None, TENSOR))
        wide = place.constrain(wide, BATCH, SEQUENCE, TENSOR)
        return place.constrain(x + wide @ kernel(self.down, TENSOR, None), BATCH, SEQUENCE, None)


class Decoder(nnx.Module):
    """A decoder of the Llama architecture: RMSNorm, RoPE, grouped-query ring attention, SwiGLU.

    Tokens, targets, segment ids and masks are in ring order of ``config.layout``. Activations stay sharded over batch
    and sequence throughout. Blocks are stacked and scanned, so compile time does not grow with depth. Parameters name
    their mesh axes in their metadata: embedding features over the batch and sequence axes (FSDP), heads, MLP width and
    vocabulary over ``config.head_axis_name``. Works with Auto and Explicit axes, and without a mesh on one device.

    Args:
      config: sizes and options.
      mesh: the mesh; None takes that of the context (``jax.set_mesh``), or one device if there is none.
      rngs: random streams; "params" is used. All parameters are made on one device first: for large models see
        :meth:`init_sharded`.
    """

    def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs):
        for name in ("dtype", "param_dtype"):
            if getattr(config, name) == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
                raise ValueError(f"{name} float64 needs jax_enable_x64. Got jax_enable_x64=False.")
        self.config = config
        self.mesh = mesh

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, mesh=mesh, rngs=rngs)

        def weights(**table: ParamInfo) -> Weights:
            # Table rows have a norm of about 1 / 50 sqrt(E), as is usual; the first RMSNorm brings them to sqrt(E).
            inits = {"kernel": nnx.initializers.normal(0.02)}
            return Weights(table, self._place(), inits, param_dtype=config.param_dtype, rngs=rngs)

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

    @property
    def data_spec(self) -> PartitionSpec:
        """How tokens, targets, segment ids and masks [B, T] are sharded."""
        return PartitionSpec(self.config.batch_axis_name, self.config.axis_name)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V], whole: for evaluation and small use. Training uses `loss`.

        Args:
          tokens: int [B, T] in ring order.
          segment_ids: int [B, T]; only tokens of equal ids attend each other.
          positions: int [T] or [B, T]; replaces the layout's positions, for RoPE and for the mask.
        """
        self._check(tokens, segment_ids=segment_ids)

        def run(model: "Decoder", place: Place, tokens: Any, segment_ids: Any, positions: Any) -> jax.Array:
            x = model._features(place, tokens, segment_ids, positions)
            table = place.constrain(model._output_table().astype(x.dtype), TENSOR, None)
            wide = partial.wide(x.dtype)
            logits = jnp.einsum("bte,ve->btv", x, table, preferred_element_type=wide)
            return place.constrain(logits, BATCH, SEQUENCE, TENSOR)

        def out_specs(place: Place) -> PartitionSpec:
            return place.spec((*tokens.shape, self.config.vocab_size), BATCH, SEQUENCE, TENSOR)

        return self._on_auto_axes(run, out_specs, tokens, segment_ids, positions)

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        loss_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean cross entropy over the tokens that count; the logits [B, T, V] never exist whole.

        Args:
          tokens, targets: int [B, T] in ring order; targets[b, i] is what follows tokens[b, i] in natural order.
          segment_ids, positions: as in the call.
          loss_mask: bool, int or float [B, T], the weight of each token; None is 1 for all.

        Returns:
          (sum(weight * cross entropy) / sum(weight), {"tokens": sum(weight)}), float32 scalars; a loss of 0 where no
          token counts.
        """
        self._check(tokens, targets=targets, segment_ids=segment_ids, loss_mask=loss_mask)

        def run(model: "Decoder", place: Place, tokens: Any, targets: Any, segments: Any, positions: Any, mask: Any):
            x = model._features(place, tokens, segments, positions)
            total = chunked_loss(place, x, model._output_table(), targets, mask, model.config.loss_chunk)
            count = jnp.float32(tokens.size) if mask is None else jnp.sum(mask.astype(jnp.float32))
            return total / jnp.where(count > 0, count, 1), {"tokens": count}

        def out_specs(place: Place) -> Any:
            return PartitionSpec(), {"tokens": PartitionSpec()}

        return self._on_auto_axes(run, out_specs, tokens, targets, segment_ids, positions, loss_mask)

    def _place(self) -> Place:
        config = self.config
        place = find_place(config.axis_name, self.mesh, config.batch_axis_name, config.head_axis_name)
        if place.inside:
            raise ValueError(
                f"Decoder must be called on whole arrays, outside shard_map. Got axis {config.axis_name!r} bound."
            )
        return place

    def _on_auto_axes(self, run: Any, out_specs: Any, tokens: jax.Array, *rest: Any) -> Any:
        """run(model, place, tokens, ...) with all mesh axes of Auto type; the model goes in as an argument."""
        place = self._place().sharded_like(tokens)
        graphdef, state = nnx.split(self)

        def on_arrays(state: Any, *arrays: Any) -> Any:
            return run(nnx.merge(graphdef, state), place, *arrays)

        return place.with_auto_axes(on_arrays, out_specs(place), state, tokens, *rest)

    def _output_table(self) -> jax.Array:
        return (self.embedding if self.config.tie_embeddings else self.output).arrays()["kernel"]

    def _features(
        self, place: Place, tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
    ) -> jax.Array:
        """What the output table is multiplied with: [B, T, E]."""
        table = place.constrain(self.embedding.arrays()["kernel"], TENSOR, None)
        x = jnp.take(table, tokens, axis=0).astype(self.config.dtype)
        x = place.constrain(x, BATCH, SEQUENCE, None)
        graphdef, layers = nnx.split(self.blocks)
        rotated_by = layer_rotation(self.blocks.attention.spec, place, x, positions)
        if rotated_by is not None:
            cos, sin = rotated_by
            roles = (BATCH if cos.shape[0] > 1 else None, SEQUENCE, None, None)
            rotated_by = place.constrain(cos, *roles), place.constrain(sin, *roles)

        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            block = nnx.merge(graphdef, arrays)
            return block(x, place, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids), None

        if self.config.remat:
            policy = jax.checkpoint_policies.save_only_these_names(*_KEEP)
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(layer, x, layers)
        return rms_norm(x, self.norm.arrays()["scale"], self.config.norm_eps)

    def _check(self, tokens: jax.Array, **others: jax.Array | None) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T]. Got {tokens.dtype} {tokens.shape}.")
        for name, x in others.items():
            if x is not None and x.shape != tokens.shape:
                raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}. Got {x.shape}.")
        targets = others.get("targets")
        if targets is not None and not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"targets must be integers. Got dtype {targets.dtype}.")


def param_specs(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """PartitionSpecs of a Decoder's parameters on this mesh, shaped like ``nnx.state(decoder)``. Allocates nothing."""
    return partition_specs(_abstract_state(config, mesh), mesh)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """NamedShardings of a Decoder's parameters on this mesh (concrete or abstract), shaped like its state."""
    return partition_shardings(_abstract_state(config, mesh), mesh)


def _abstract_state(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
