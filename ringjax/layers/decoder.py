"""A decoder of the Llama architecture on RingAttention, for sequences that are sharded from tokens to loss.

Public as ringjax.nnx. Letters: B batch, T length, E embedding, M width of the MLP, V vocabulary, C devices on the ring.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .. import partial
from ..arguments import as_integers
from ..cache import KVCache
from ..layout import to_ring_order
from . import checks
from .attention import ParamInfo, layer_rotation
from .decoder_config import DecoderConfig
from .decoder_layer import DecoderLayer, LayerGroup, layers_of, restacked
from .decoding import DecoderCache, empty_cache
from .loss import chunked_loss, soft_cap, token_losses
from .nnx_attention import Weights, partition_shardings, partition_specs, settle
from .norm import rms_norm
from .placement import BATCH, FSDP, SEQUENCE, TENSOR, Distribution, Mesh, Placement
from .rope import Rotation

# What the ring made is kept; all else in a layer is computed again in backward, without one more hop.
_KEEP = ("ring_out", "ring_lse")


class Decoder(nnx.Module):
    """A decoder of the Llama architecture and its kin: RMSNorm, RoPE, grouped-query ring attention, a gated MLP.

    Tokens, targets, segment ids and masks [B, T] are in the ring order that :func:`ringjax.to_ring_order` makes for
    ``config.layout`` and ``config.num_shards``. They and all activations are sharded over ``config.batch_axis_name``
    and ``config.axis_name``. Layers are stacked and scanned unless ``config.scan_layers`` is False, so compile time
    does not grow with depth (but for decoding on accelerators, see :meth:`empty_cache`); where ``config.layer_pattern``
    has several kinds, whole periods of it are, and the layers after the last whole period follow one by one. Parameters
    name their mesh axes in their metadata: embedding features over the batch and sequence axes (FSDP), heads, MLP width
    and vocabulary over ``config.head_axis_name``. Works with Auto and Explicit axes, and without a mesh on one device.

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

        kinds, periods = len(config.period), config.num_stacked
        rest = config.num_layers - periods * kinds

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
        if periods:
            self.blocks = stack(rngs)
        if rest:
            self.rest = LayerGroup(config, rest, mesh=mesh, rngs=rngs)
        self.norm = weights(scale=ParamInfo((config.embed_dim,), "ones", (None,)))
        if not config.tie_embeddings:
            self.output = weights(kernel=rows)
        settle(self, mesh)

    @classmethod
    def init_sharded(cls, config: DecoderConfig, *, mesh: jax.sharding.Mesh, seed: int = 0) -> "Decoder":
        """A fresh Decoder whose every parameter is made where it belongs, never whole on one device.

        Args:
          config: sizes and options.
          mesh: where the parameters go.
          seed: of the parameters.
        """
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: cls(config, mesh=mesh, rngs=nnx.Rngs(seed))))
        make = jax.jit(
            lambda: nnx.state(cls(config, mesh=mesh, rngs=nnx.Rngs(seed))),
            out_shardings=partition_shardings(abstract, mesh),
        )
        return nnx.merge(graphdef, make())

    def with_scan_layers(self, scan_layers: bool) -> "Decoder":
        """A Decoder of the same parameters, their layers stacked or each by itself, see ``config.scan_layers``.

        For what was trained with scanned layers and is to write on GPUs. The layers' parameters are copied: while this
        Decoder is kept, they exist twice.
        """
        config = dataclasses.replace(self.config, scan_layers=scan_layers)
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=self.mesh, rngs=nnx.Rngs(0))))
        held = {path: jax.tree.leaves(leaf)[0] for path, leaf in nnx.to_flat_state(nnx.state(self))}
        found = jax.jit(functools.partial(restacked, before=self.config, after=config))(held)
        state = [(path, leaf.replace(found[path])) for path, leaf in nnx.to_flat_state(abstract)]
        decoder = nnx.merge(graphdef, nnx.from_flat_state(state))
        settle(decoder, self.mesh)
        return decoder

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        max_segment_length: int | None = None,
        shared_length: int | tuple[int, ...] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32 [B, T, V], whole: for evaluation and small use. Training uses :meth:`loss`.

        Args:
          tokens: int [B, T] in ring order.
          segment_ids: int [B, T]; tokens attend only to tokens of the same id.
          max_segment_length, shared_length: promises about segments, as in :func:`ringjax.ring_attention`.
          positions: int [T] or [B, T]; replaces the layout's positions, for RoPE and for the mask.

        Raises:
          ValueError: for shapes that do not fit, ids outside the vocabulary, and where nothing says for how many shards
            the tokens are dealt.
        """
        self._check(tokens, segment_ids=segment_ids)
        promised = self._placement().promised(segment_ids, max_segment_length, shared_length)

        def run(model: "Decoder", placement: Placement, tokens: Any, segment_ids: Any, positions: Any) -> jax.Array:
            x = model._features(placement, tokens, segment_ids, positions, promised)
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
        max_segment_length: int | None = None,
        shared_length: int | tuple[int, ...] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        loss_mask: Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean cross entropy over the tokens that count; the logits [B, T, V] never exist whole.

        Args:
          tokens, targets: int [B, T] in ring order; targets[b, i] is what follows tokens[b, i] in natural order.
            :func:`ringjax.shift_targets` makes them and the mask.
          segment_ids, max_segment_length, shared_length, positions: as in the call.
          loss_mask: bool, int or float [B, T], the weight of each token; None is 1 for all. Where it is 0, the target
            may be anything. A target outside the vocabulary that counts raises, or makes the loss NaN under ``jit``.

        Returns:
          (sum(weight * cross entropy) / sum(weight), {"tokens": sum(weight)}), float32 scalars; a loss of 0 where no
          token counts.

        Raises:
          ValueError: as the call.
        """
        self._check(tokens, targets=targets, segment_ids=segment_ids, loss_mask=loss_mask)
        promised = self._placement().promised(segment_ids, max_segment_length, shared_length)

        def run(
            model: "Decoder",
            placement: Placement,
            tokens: Any,
            segments: Any,
            positions: Any,
            targets: Any,
            mask: Any,
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            x = model._features(placement, tokens, segments, positions, promised)
            total, count = chunked_loss(
                placement,
                x,
                model._output_table(),
                targets,
                mask,
                chunk=model.config.loss_chunk,
                output_soft_cap=model.config.output_soft_cap,
            )
            count = count.astype(jnp.float32)
            return total / jnp.where(count > 0, count, 1), {"tokens": count}

        def out_specs(placement: Placement) -> Any:
            return PartitionSpec(), {"tokens": PartitionSpec()}

        return self._on_auto_axes(run, out_specs, tokens, segment_ids, positions, targets, loss_mask)

    def token_losses(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        max_segment_length: int | None = None,
        shared_length: int | tuple[int, ...] | None = None,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Cross entropy of each token, float32 [B, T] in the order of the tokens: the terms of :meth:`loss`.

        Args:
          tokens, targets: int [B, T] in ring order; targets[b, i] is what follows tokens[b, i] in natural order. A
            target outside the vocabulary, as of tokens without one, gives NaN.
          segment_ids, max_segment_length, shared_length, positions: as in the call.

        Raises:
          ValueError: as the call.
        """
        self._check(tokens, targets=None, segment_ids=segment_ids)
        promised = self._placement().promised(segment_ids, max_segment_length, shared_length)
        if targets.shape != tokens.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"targets must be integers of shape {tokens.shape}. Got {targets.dtype} {targets.shape}.")

        def run(
            model: "Decoder", placement: Placement, tokens: Any, segments: Any, positions: Any, targets: Any
        ) -> jax.Array:
            x = model._features(placement, tokens, segments, positions, promised)
            losses = token_losses(
                placement,
                x,
                model._output_table(),
                targets,
                chunk=model.config.loss_chunk,
                output_soft_cap=model.config.output_soft_cap,
            )
            return placement.from_natural(losses, 1)

        def out_specs(placement: Placement) -> PartitionSpec:
            return placement.spec(tokens.shape, BATCH, SEQUENCE)

        return self._on_auto_axes(run, out_specs, tokens, segment_ids, positions, targets)

    def empty_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        max_new_tokens: int = 1,
        scan_layers: bool | None = None,
    ) -> DecoderCache:
        """Caches without tokens for :meth:`prefill` and :meth:`decode`, sharded over the ring.

        Args:
          batch_size: B, a multiple of the devices on the batch axes.
          capacity: tokens that a row has room for, rounded up to a multiple of 8 per device of the ring. Layers with a
            window keep the window only.
          dtype: of keys and values: the decoder's, which is the default.
          max_new_tokens: the most tokens that one call of :meth:`decode` is given.
          scan_layers: True, layers are scanned, which compiles in the same time whatever their number, but copies each
            layer's cache out of a stack and back. False, they follow one by one and write in place: of a long cache the
            only way to decode as fast as it is read. None: False but on CPU.

        Raises:
          ValueError: naming the argument, what is required and what was given.
          NotImplementedError: rope_scaling is DynamicScaling.
        """
        dtype = jnp.dtype(self.config.dtype if dtype is None else dtype)
        if dtype != jnp.dtype(self.config.dtype):
            raise ValueError(f"dtype must be that of the decoder, {self.config.dtype}. Got {dtype.name}.")
        return empty_cache(self.config, self._placement(), batch_size, capacity, dtype, max_new_tokens, scan_layers)

    def prefill(
        self, tokens: Int[Array, "B T"], cache: DecoderCache, *, lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Reads prompts into a cache, in place of what it held; the prompts are dealt over the ring.

        Args:
          tokens: int [B, T] in natural order, each row padded at its end by any id. A program is compiled for each T:
            pad to few lengths.
          cache: of :meth:`empty_cache`, or of earlier prompts.
          lengths: int [B], 1 to T, tokens of each row; None: all T.

        Returns:
          (logits, cache): float32 [B, V] of what follows the last token of each row, and the cache to decode with.

        Raises:
          ValueError: for shapes that do not fit, prompts longer than the cache, and ids outside the vocabulary.
        """
        lengths = self._check_cached(tokens, cache, "lengths", lengths, grows=False)
        placement = self._placement().sharded_like(tokens).dealt_as(cache.first)
        shards = placement.ring_size

        def run(model: "Decoder", tokens: Any, cache: DecoderCache, lengths: Any) -> Any:
            dealt = to_ring_order(tokens, layout=cache.first.layout, num_shards=shards, pad_value=0)
            positions = placement.positions(dealt.shape[1])
            x, cache = model._cached_features(placement, dealt, positions, cache, lengths, prompt=True)
            return model._last_logits(placement, x, positions[None] == lengths[:, None] - 1), cache

        return self._with_cache(run, placement, tokens, cache, lengths)

    def decode(
        self, tokens: Int[Array, "B T"], cache: DecoderCache, *, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Writes tokens behind those of the cache: usually one per row, sometimes a few.

        One program for all lengths: nothing in it depends on how many tokens there are.

        Args:
          tokens: int [B, T] in their order.
          cache: of :meth:`prefill`, or empty.
          counts: int [B], how many of the T tokens each row has, the first ones; the others are padding. None: all.

        Returns:
          (logits, cache): float32 [B, V] of what follows the last token of each row; of a row with a count of 0, of
          nothing.

        Raises:
          ValueError: for shapes that do not fit, a cache that is full, where it can be seen, and ids outside the
            vocabulary.
        """
        counts = self._check_cached(tokens, cache, "counts", counts, grows=True)
        placement = self._placement().sharded_like(tokens).decoding()

        def run(model: "Decoder", tokens: Any, cache: DecoderCache, counts: Any) -> Any:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            positions = cache.lengths[:, None] + index
            x, cache = model._cached_features(placement, tokens, positions, cache, counts, prompt=False)
            return model._last_logits(placement, x, index == counts[:, None] - 1), cache

        return self._with_cache(run, placement, tokens, cache, counts)

    def _check_cached(
        self, tokens: jax.Array, cache: DecoderCache, name: str, counts: Any, *, grows: bool
    ) -> Int[Array, " B"]:
        self._check(tokens)
        if not isinstance(cache, DecoderCache):
            raise ValueError(f"cache must be of empty_cache. Got {type(cache).__name__}.")
        if cache.scanned and not self.config.scan_layers:
            raise ValueError("cache must be of this decoder's empty_cache. Got one of layers that are stacked.")
        batch, length = tokens.shape
        if cache.lengths.shape != (batch,):
            raise ValueError(f"tokens must have the {cache.lengths.shape[0]} rows of the cache. Got {batch}.")
        counts = jnp.full((batch,), length, jnp.int32) if counts is None else as_integers(name, counts)
        if counts.shape != (batch,):
            raise ValueError(f"{name} must have shape [B] = ({batch},). Got {counts.shape}.")
        wanted = cache.lengths + counts if grows else counts
        if cache.capacity is not None and checks.visible(wanted) and int(np.max(wanted)) > cache.capacity:
            raise ValueError(
                f"tokens: a row must fit the cache's capacity of {cache.capacity}. Got {int(np.max(wanted))} tokens."
            )
        return counts

    def _with_cache(
        self, run: Any, placement: Placement, tokens: jax.Array, cache: DecoderCache, counts: jax.Array
    ) -> Any:
        """run(model, ...) with all mesh axes of Auto type; the model goes in as an argument."""
        graphdef, state = nnx.split(self)
        of_cache = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, cache)
        of_logits = placement.spec((tokens.shape[0], self.config.vocab_size), BATCH, TENSOR)
        on_arrays = lambda state, *rest: run(nnx.merge(graphdef, state), *rest)  # noqa: E731
        return placement.with_auto_axes(on_arrays, (of_logits, of_cache), state, tokens, cache, counts)

    def _cached_features(
        self,
        placement: Placement,
        tokens: jax.Array,
        positions: jax.Array,
        cache: DecoderCache,
        counts: jax.Array,
        *,
        prompt: bool,
    ) -> tuple[jax.Array, DecoderCache]:
        """What the output table is multiplied with, [B, T, E], and the grown cache."""
        x = self._embedded(placement, tokens)
        rotations = self._rotations(placement, x, positions)

        scanned = cache.scanned

        def run(graphdef: Any, arrays: Any, x: jax.Array, own: KVCache, by: Any, counts: Any) -> Any:
            layer: DecoderLayer = nnx.merge(graphdef, arrays)
            return layer.cached(x, placement, own, rotated_by=by, counts=counts, prompt=prompt)

        def run_all(run: Any, layers: list[DecoderLayer], x: jax.Array, caches: tuple[KVCache, ...]) -> Any:
            grown = []
            for layer, own in zip(layers, caches, strict=True):
                if not scanned:  # all have the same, and so XLA computes once what depends on them
                    own = dataclasses.replace(own, lengths=cache.lengths)
                x, own = run(*nnx.split(layer), x, own, rotations[_rope_of(layer)], counts)
                if prompt:  # or XLA for GPUs writes the keys of all layers at the end, and keeps them until then
                    x, own = jax.lax.optimization_barrier((x, own))
                grown.append(own)
            return x, tuple(grown)

        blocks = []
        if self.config.num_stacked:
            graphdef, stacked = nnx.split(self.blocks)
            if scanned:
                body = lambda x, each: run_all(run, layers_of(nnx.merge(graphdef, each[0])), x, each[1])  # noqa: E731
                x, scanned = jax.lax.scan(body, x, (stacked, scanned))
            else:
                periods = range(self.config.num_stacked)
                blocks = [nnx.merge(graphdef, jax.tree.map(lambda x, at=at: x[at], stacked)) for at in periods]
        blocks += [self.rest] if hasattr(self, "rest") else []
        # A function of its own, traced and lowered once for all layers of a kind.
        layers = [layer for block in blocks for layer in layers_of(block)]
        x, rest = run_all(jax.jit(run, static_argnums=0), layers, x, cache.layers)
        x = rms_norm(x, self.norm.arrays()["scale"], self.config.norm_eps)
        return x, DecoderCache(scanned=scanned, layers=rest)

    def _last_logits(self, placement: Placement, x: jax.Array, last: jax.Array) -> jax.Array:
        """Logits [B, V] of one token per row, ``last`` [B, T]; 0 where there is none."""
        wide = partial.wide(x.dtype)
        # A sum, not a gather: of tokens that are dealt, nothing but this one goes over the wire.
        one = jnp.sum(jnp.where(last[:, :, None], x, jnp.zeros_like(x)).astype(wide), axis=1).astype(x.dtype)
        table = placement.gather(self._output_table().astype(x.dtype), TENSOR, FSDP)
        logits = jnp.einsum("be,ve->bv", one, table, preferred_element_type=wide)
        return placement.constrain(soft_cap(logits, self.config.output_soft_cap), BATCH, TENSOR)

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

    def _embedded(self, placement: Placement, tokens: jax.Array) -> jax.Array:
        """The embeddings of tokens, [B, T, E]."""
        # Ids outside the vocabulary give NaN, never the row of another token.
        rows = placement.rows(self.embedding.arrays()["kernel"], checks.as_index(tokens))
        x = rows.astype(self.config.dtype)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        return placement.stream(x)

    def _features(
        self,
        placement: Placement,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        promised: Mapping[str, Any],
    ) -> jax.Array:
        """What the output table is multiplied with: [B, T, E]."""
        x = self._embedded(placement, tokens)
        rotations = self._rotations(placement, x, positions)
        policy = jax.checkpoint_policies.save_only_these_names(*_KEEP)

        def run(block: DecoderLayer | LayerGroup, x: jax.Array) -> jax.Array:
            """The layers of a period, each of which keeps its input and what the ring returned."""
            for each in layers_of(block):
                rotated_by = rotations[_rope_of(each)]
                graphdef, arrays = nnx.split(each)

                def layer(x: jax.Array, arrays: Any, graphdef: Any = graphdef, by: Any = rotated_by) -> jax.Array:
                    layer = nnx.merge(graphdef, arrays)
                    return layer(
                        x, placement, rotated_by=by, positions=positions, segment_ids=segment_ids, promised=promised
                    )

                if self.config.remat:
                    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
                x = layer(x, arrays)
            return x

        if self.config.num_stacked:
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
        for layer in layers_of(self.blocks if self.config.num_stacked else self.rest):
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
    """PartitionSpecs of a Decoder's parameters on this mesh, shaped like ``nnx.state(decoder)``. Allocates nothing.

    Args:
      config: of the decoder.
      mesh: concrete or abstract.
    """
    return partition_specs(_abstract_state(config, mesh), mesh)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """NamedShardings of a Decoder's parameters on this mesh, shaped like ``nnx.state(decoder)``. Allocates nothing.

    Args:
      config: of the decoder.
      mesh: concrete or abstract.
    """
    return partition_shardings(_abstract_state(config, mesh), mesh)


def _abstract_state(config: DecoderConfig, mesh: Mesh) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
