"""What a decoder remembers of the tokens so far: a key/value cache for each of its layers."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, Int32

from ..cache import KVCache
from . import checks
from .decoder_config import DecoderConfig
from .placement import Placement
from .rope_scaling import DynamicScaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers",), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderCache:
    """The caches of a decoder's layers; a pytree. Under ``jit`` donate it, so that it is written in place.

    Attributes:
      layers: of each layer, in order. Arrays of their own: a scan over stacked ones copies a layer's cache out of the
        stack and back for every token, five times what attention reads.
    """

    layers: tuple[KVCache, ...]

    @property
    def lengths(self) -> Int32[Array, " B"]:
        """Tokens of each row so far."""
        return self.layers[0].lengths

    @property
    def capacity(self) -> int | None:
        """The tokens that a row has room for; None: any number, since every layer keeps a window only."""
        return min((cache.capacity for cache in self.layers if not cache.rolls), default=None)


def empty_cache(
    config: DecoderConfig, placement: Placement, batch_size: int, capacity: int, dtype: Any, max_new_tokens: int
) -> DecoderCache:
    """Caches without tokens, each where its layer will look for it."""
    if any(isinstance(rope.scaling, DynamicScaling) for _, rope in config.period):
        raise NotImplementedError(
            "rope_scaling: DynamicScaling turns all keys anew as the sequence grows, which a cache cannot do. "
            f"Got {config.rope_scaling!r}."
        )
    checks.positive_integer("batch_size", batch_size)
    checks.positive_integer("capacity", capacity)

    def make() -> DecoderCache:
        windows = [config.period[layer % len(config.period)][0] for layer in range(config.num_layers)]
        one = functools.partial(
            KVCache.empty, batch_size, capacity, config.num_kv_heads, config.head_dim, dtype=dtype, layout="striped",
            num_shards=placement.ring_size, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        return DecoderCache(layers=tuple(one(local_window_size=window) for window in windows))

    mesh = placement.told.mesh  # otherwise that of the context, to which plain specs refer
    if not placement.sizes or isinstance(mesh, AbstractMesh):
        return make()
    where: dict[str, Any] = {
        "axis_name": placement.told.axis_name,
        "batch_axis_name": placement.told.batch_axis_name,
        "head_axis_name": placement.told.head_axis_name,
    }
    specs = DecoderCache(layers=tuple(cache.specs(**where) for cache in jax.eval_shape(make).layers))
    return jax.jit(
        make, out_shardings=specs if mesh is None else jax.tree.map(lambda x: NamedSharding(mesh, x), specs)
    )()
