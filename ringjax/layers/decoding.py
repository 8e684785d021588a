"""What a decoder remembers of the tokens so far: a key/value cache for each of its layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from ..cache import KVCache
from . import checks
from .decoder_config import DecoderConfig
from .placement import Placement
from .rope_scaling import DynamicScaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks", "rest"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderCache:
    """The caches of a decoder's layers; a pytree. Under ``jit`` donate it, so that it is written in place.

    Attributes:
      blocks: of the layers that are scanned, one for each kind of the pattern: every array has the periods as its first
        dimension.
      rest: of the layers after the last whole period.
    """

    blocks: tuple[KVCache, ...]
    rest: tuple[KVCache, ...] = ()

    @property
    def lengths(self) -> Int32[Array, " B"]:
        """Tokens of each row so far."""
        return self.blocks[0].lengths[0]

    @property
    def capacity(self) -> int | None:
        """The tokens that a row has room for; None: any number, since every layer keeps a window only."""
        bounded = [
            *(cache.key.shape[2] for cache in self.blocks if not cache.rolls),
            *(cache.capacity for cache in self.rest if not cache.rolls),
        ]
        return min(bounded, default=None)


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
    periods, rest = divmod(config.num_layers, len(config.period))

    def one(place: int) -> KVCache:
        return KVCache.empty(
            batch_size, capacity, config.num_kv_heads, config.head_dim, dtype=dtype, layout="striped",
            num_shards=placement.ring_size, local_window_size=config.period[place][0], max_new_tokens=max_new_tokens,
        )  # fmt: skip

    def make() -> DecoderCache:
        stacked = lambda cache: jax.tree.map(lambda x: jnp.zeros((periods, *x.shape), x.dtype), cache)  # noqa: E731
        return DecoderCache(
            blocks=tuple(stacked(one(place)) for place in range(len(config.period))),
            rest=tuple(one(place) for place in range(rest)),
        )

    mesh = placement.told.mesh if placement.told.mesh is not None else jax.sharding.get_mesh()
    if not placement.sizes or not isinstance(mesh, jax.sharding.Mesh):
        return make()
    abstract = jax.eval_shape(make)
    where: dict[str, Any] = {
        "axis_name": placement.told.axis_name,
        "batch_axis_name": placement.told.batch_axis_name,
        "head_axis_name": placement.told.head_axis_name,
    }
    specs = DecoderCache(
        blocks=tuple(_stacked_specs(cache, where) for cache in abstract.blocks),
        rest=tuple(cache.specs(**where) for cache in abstract.rest),
    )
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def _stacked_specs(cache: KVCache, where: dict[str, Any]) -> Any:
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cache)
    return jax.tree.map(lambda spec: PartitionSpec(None, *spec), layer.specs(**where))
