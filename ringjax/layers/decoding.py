"""What a decoder remembers of the tokens so far: a key/value cache for each of its layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from ..cache import KVCache
from ..sharded import target_of
from . import checks
from .decoder_config import DecoderConfig
from .placement import Placement
from .rope_scaling import DynamicScaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scanned", "layers"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderCache:
    """The caches of a decoder's layers; a pytree. Under ``jit`` donate it, so that it is written in place.

    Attributes:
      scanned: of the layers that are scanned, one for each kind of the pattern: every array has the periods as its
        first dimension. Empty where no layer is.
      layers: of each layer after them.
    """

    scanned: tuple[KVCache, ...]
    layers: tuple[KVCache, ...]

    @property
    def first(self) -> KVCache:
        """That of the first layer, or of its kind: for what is the same in all."""
        return (*self.scanned, *self.layers)[0]

    @property
    def lengths(self) -> Int32[Array, " B"]:
        """Tokens of each row so far."""
        return self.first.lengths[0] if self.scanned else self.first.lengths

    @property
    def capacity(self) -> int | None:
        """The tokens that a row has room for; None: any number, since every layer keeps a window only."""
        bounded = [
            *(cache.key.shape[2] for cache in self.scanned if not cache.rolls),
            *(cache.capacity for cache in self.layers if not cache.rolls),
        ]
        return min(bounded, default=None)


def empty_cache(
    config: DecoderConfig,
    placement: Placement,
    batch_size: int,
    capacity: int,
    dtype: Any,
    max_new_tokens: int,
    scan_layers: bool | None,
) -> DecoderCache:
    """Caches without tokens, each where its layer will look for it."""
    if any(isinstance(rope.scaling, DynamicScaling) for _, rope in config.period):
        raise NotImplementedError(
            "rope_scaling: DynamicScaling turns all keys anew as the sequence grows, which a cache cannot do. "
            f"Got {config.rope_scaling!r}."
        )
    checks.positive_integer("batch_size", batch_size)
    checks.positive_integer("capacity", capacity)

    if scan_layers is None:
        scan_layers = config.scan_layers and target_of(placement.told.mesh).platform == "cpu"
    if checks.flag("scan_layers", scan_layers) and not config.scan_layers:
        raise ValueError("scan_layers must be False or None, as the decoder's layers are not stacked. Got True.")
    kinds = len(config.period)
    periods = config.num_stacked if scan_layers else 0

    def one(layer: int) -> KVCache:
        return KVCache.empty(
            batch_size, capacity, config.num_kv_heads, config.head_dim, dtype=dtype, layout="striped",
            num_shards=placement.ring_size, local_window_size=config.period[layer % kinds][0],
            max_new_tokens=max_new_tokens,
        )  # fmt: skip

    def make() -> DecoderCache:
        stacked = lambda cache: jax.tree.map(lambda x: jnp.zeros((periods, *x.shape), x.dtype), cache)  # noqa: E731
        return DecoderCache(
            scanned=tuple(stacked(one(kind)) for kind in range(kinds if periods else 0)),
            layers=tuple(one(layer) for layer in range(periods * kinds, config.num_layers)),
        )

    mesh = placement.told.mesh  # otherwise that of the context, to which plain specs refer
    if not placement.sizes or isinstance(mesh, AbstractMesh):
        return make()
    where: dict[str, Any] = {
        "axis_name": placement.told.axis_name,
        "batch_axis_name": placement.told.batch_axis_name,
        "head_axis_name": placement.told.head_axis_name,
    }
    abstract = jax.eval_shape(make)
    specs = DecoderCache(
        scanned=tuple(_stacked_specs(cache, where) for cache in abstract.scanned),
        layers=tuple(cache.specs(**where) for cache in abstract.layers),
    )
    return jax.jit(
        make, out_shardings=specs if mesh is None else jax.tree.map(lambda x: NamedSharding(mesh, x), specs)
    )()


def _stacked_specs(cache: KVCache, where: dict[str, Any]) -> Any:
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cache)
    return jax.tree.map(lambda spec: PartitionSpec(None, *spec), layer.specs(**where))
