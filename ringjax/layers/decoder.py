"""A decoder of the Llama architecture on RingAttention, for sequences that are sharded from tokens to loss.

Public as ringjax.nnx. Letters: B batch, T length, E embedding, M width of the MLP, V vocabulary, C devices on the ring.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .. import partial
from . import checks
from .attention import ParamInfo, layer_rotation, rms_norm
from .decoder_config import DecoderConfig
from .loss import chunked_loss, soft_cap
from .nnx_attention import RingAttention, Weights, partition_shardings, partition_specs, settle
from .placement import BATCH, FSDP, SEQUENCE, TENSOR, Distribution, Mesh, Placement, Role
from .rope import Rotation

# What the ring made is kept; all else in a layer is computed again in backward, without one more hop.
_KEEP = ("ring_out", "ring_lse")


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))) (SwiGLU, arXiv:2002.05202).

    With post_norms, norm(attention(...)) and norm(down(...)) are added. ``place`` is the layer's in a period of the
    pattern.
    """

    def __init__(self, config: DecoderConfig, place: int = 0, *, mesh: Mesh | None, rngs: nnx.Rngs):
        embed, width = config.embed_dim, config.mlp_dim
        window, rope = config.period[place]
        inner = nnx.initializers.lecun_normal()
        # Each layer adds two of these to the stream: with this variance their sum does not grow with depth.
        outer = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        self.attention = RingAttention(
            config.num_heads,
            embed,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            use_bias=config.attention_bias,
            rope_theta=rope.theta,
            rotary_dim=rope.rotary_dim,
            rope_scaling=rope.scaling,
            qk_norm=config.qk_norm,
            use_sinks=config.use_sinks,
            norm_eps=config.norm_eps,
            scale=config.attention_scale,
            is_causal=True,
            local_window_size=window,
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
            inits = {"kernel": inner, "out_kernel": outer, "bias": nnx.initializers.zeros}
            return Weights(table, self.attention.distribution.here(), inits, param_dtype=config.param_dtype, rngs=rngs)

        def projection(kernel: ParamInfo, out: Role) -> Weights:
            bias = {"bias": ParamInfo(kernel.shape[1:], "bias", (out,))} if config.mlp_bias else {}
            return weights(kernel=kernel, **bias)

        norm = ParamInfo((embed,), "ones", (None,))
        self.attention_norm = weights(scale=norm)
        self.mlp_norm = weights(scale=norm)
        if config.post_norms:
            self.attention_post_norm = weights(scale=norm)
            self.mlp_post_norm = weights(scale=norm)
        self.gate = projection(ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed), TENSOR)
        self.up = projection(ParamInfo((embed, width), "kernel", (FSDP, TENSOR), embed), TENSOR)
        self.down = projection(ParamInfo((width, embed), "out_kernel", (TENSOR, FSDP), width), None)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        placement: Placement,
        *,
        rotated_by: Rotation | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        def project(x: jax.Array, part: Weights, *roles: Role) -> jax.Array:
            arrays = part.arrays()
            y = x @ placement.constrain(arrays["kernel"].astype(x.dtype), *roles)
            return y + arrays["bias"].astype(x.dtype)[None, None] if "bias" in arrays else y

        def norm(x: jax.Array, name: str) -> jax.Array:
            return rms_norm(x, getattr(self, name).arrays()["scale"], self.config.norm_eps)

        y = norm(x, "attention_norm")
        y = self.attention.within(y, placement, rotated_by=rotated_by, positions=positions, segment_ids=segment_ids)
        x = x + (norm(y, "attention_post_norm") if self.config.post_norms else y)
        y = norm(x, "mlp_norm")
        act = _ACTIVATIONS[self.config.activation]
        wide = act(project(y, self.gate, None, TENSOR)) * project(y, self.up, None, TENSOR)
        wide = placement.constrain(wide, BATCH, SEQUENCE, TENSOR)
        y = project(wide, self.down, TENSOR, None)
        if self.config.post_norms:
            y = norm(placement.constrain(y, BATCH, SEQUENCE, None), "mlp_post_norm")
        return placement.constrain(x + y, BATCH, SEQUENCE, None)


class LayerGroup(nnx.Module):
    """The first layers of a period of the pattern, one after the other: layer_0, layer_1, ..."""

    def __init__(self, config: DecoderConfig, count: int, *, mesh: Mesh | None, rngs: nnx.Rngs):
        self.count = count
        for place in range(count):
            setattr(self, f"layer_{place}", DecoderLayer(config, place, mesh=mesh, rngs=rngs))


def layers_of(block: DecoderLayer | LayerGroup) -> list[DecoderLayer]:
    """The layers of a period, in order."""
    if isinstance(block, DecoderLayer):
        return [block]
    return [getattr(block, f"layer_{place}") for place in range(block.count)]


def layer_path(config: DecoderConfig, layer: int) -> tuple[tuple[str, ...], int | None]:
    """Where layer number i is in a Decoder's state: its path, and its index there or None where it is no stack."""
    kinds = len(config.period)
    period, place = divmod(layer, kinds)
    if kinds == 1:
        return ("blocks",), period
    stacked = period < config.num_layers // kinds
    return ("blocks" if stacked else "rest", f"layer_{place}"), period if stacked else None


class Decoder(nnx.Module):
    """A decoder of the Llama architecture and its kin: RMSNorm, RoPE, grouped-query ring attention, a gated MLP.

    Tokens, targets, segment ids and masks [B, T] are in the ring order that :func:`ringjax.to_ring_order` makes for
    ``config.layout`` and ``config.num_shards``. They and all activations are sharded over ``config.batch_axis_name``
    and ``config.axis_name``. Layers are stacked and scanned, so compile time does not grow with depth; where
    ``config.layer_pattern`` has several kinds, whole periods of it are, and the layers after the last whole period
    follow one by one. Parameters name their mesh axes in their metadata: embedding features over the batch and sequence
    axes (FSDP), heads, MLP width and vocabulary over ``config.head_axis_name``. Works with Auto and Explicit axes, and
    without a mesh on one device.

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

        kinds = len(config.period)
        periods, rest = divmod(config.num_layers, kinds)

        @nnx.split_rngs(splits=periods)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> DecoderLayer | LayerGroup:
            if kinds == 1:
                return DecoderLayer(config, mesh=mesh, rngs=rngs)
            return LayerGroup(config, kinds, mesh=mesh, rngs=rngs)

        def weights(**table: ParamInfo) -> Weights:
            # Table rows have a norm of about 1 / 50 sqrt(E), as is usual; the first RMSNorm brings them to sqrt(E).
            inits = {"kernel": nnx.initializers.normal(0.02)}
            return Weights(table, self._placement(), inits, param_dtype=config.param_dtype, rngs=rngs)

        rows = ParamInfo((config.vocab_size, config.embed_dim), "kernel", (TENSOR, FSDP))
        self.embedding = weights(kernel=rows)
        self.blocks = stack(rngs)
        if rest:
            self.rest = LayerGroup(config, rest, mesh=mesh, rngs=rngs)
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
            logits = soft_cap(logits, model.config.output_soft_cap)
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
            total = chunked_loss(
                placement,
                x,
                model._output_table(),
                targets,
                mask,
                chunk=model.config.loss_chunk,
                output_soft_cap=model.config.output_soft_cap,
            )
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
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        x = placement.constrain(x, BATCH, SEQUENCE, None)
        rotations = self._rotations(placement, x, positions)
        policy = jax.checkpoint_policies.save_only_these_names(*_KEEP)

        def run(block: DecoderLayer | LayerGroup, x: jax.Array) -> jax.Array:
            """The layers of a period, each of which keeps its input and what the ring returned."""
            for each in layers_of(block):
                rotated_by = rotations[_rope_of(each)]
                graphdef, arrays = nnx.split(each)

                def layer(x: jax.Array, arrays: Any, graphdef: Any = graphdef, by: Any = rotated_by) -> jax.Array:
                    layer = nnx.merge(graphdef, arrays)
                    return layer(x, placement, rotated_by=by, positions=positions, segment_ids=segment_ids)

                if self.config.remat:
                    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
                x = layer(x, arrays)
            return x

        graphdef, stacked = nnx.split(self.blocks)
        x, _ = jax.lax.scan(lambda x, arrays: (run(nnx.merge(graphdef, arrays), x), None), x, stacked)
        if hasattr(self, "rest"):
            x = run(self.rest, x)
        return rms_norm(x, self.norm.arrays()["scale"], self.config.norm_eps)

    def _rotations(
        self, placement: Placement, x: jax.Array, positions: jax.Array | None
    ) -> dict[tuple[Any, ...], Rotation | None]:
        """The rotation of every RoPE that a layer has, computed once."""
        made: dict[tuple[Any, ...], Rotation | None] = {}
        for layer in layers_of(self.blocks):
            rope = _rope_of(layer)
            if rope in made:
                continue
            by = layer_rotation(layer.attention.spec, placement, x, positions)
            if by is not None:
                roles = (BATCH if by[0].shape[0] > 1 else None, SEQUENCE, None, None)
                by = placement.constrain(by[0], *roles), placement.constrain(by[1], *roles)
            made[rope] = by
        return made

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


def _rope_of(layer: DecoderLayer) -> tuple[Any, ...]:
    spec = layer.attention.spec
    return spec.rope_theta, spec.rotary_dim, spec.rope_scaling


def param_specs(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """PartitionSpecs of a Decoder's parameters on this mesh, shaped like ``nnx.state(decoder)``. Allocates nothing."""
    return partition_specs(_abstract_state(config, mesh), mesh)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """NamedShardings of a Decoder's parameters on this mesh (concrete or abstract), shaped like its state."""
    return partition_shardings(_abstract_state(config, mesh), mesh)


def _abstract_state(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
