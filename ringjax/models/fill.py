"""Tensors of a file -> a Decoder, one at a time and each straight to where its shards belong."""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..layers.decoder import Decoder
from ..layers.decoder_config import DecoderConfig
from ..layers.nnx_attention import partition_shardings
from .errors import ModelError
from .names import Path, Tensor


class Source(Protocol):
    """Tensors of one or more files."""

    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


def fill(config: DecoderConfig, mesh: jax.sharding.Mesh | None, tensors: Iterable[Tensor], source: Source) -> Decoder:
    """A Decoder with the parameters of a source.

    On the host there is one tensor at a time; on the devices, the parameters and one tensor.

    Raises:
      ModelError: for a tensor that is missing, surplus or misshapen.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0))))
    wanted = list(tensors)
    abstract: dict[Any, Any] = dict(nnx.to_flat_state(state))
    shapes = {t: abstract[t.path].shape[0 if t.index is None else 1 :] for t in wanted}
    _check(wanted, shapes, source)

    place = jax.sharding.get_mesh() if mesh is None else mesh
    if place.empty:
        (device,) = jnp.zeros(()).devices()  # where arrays go by default
        here = jax.sharding.SingleDeviceSharding(device)
        shardings: dict[Any, Any] = dict.fromkeys(abstract, here)
    else:
        flat = nnx.to_flat_state(partition_shardings(state, place))
        shardings = {path: jax.tree.leaves(x)[0] for path, x in flat}

    filled: dict[Path, jax.Array] = {}
    for tensor in wanted:
        leaf, sharding = abstract[tensor.path], shardings[tensor.path]
        value = tensor.from_file(source.read(tensor.name), shapes[tensor])
        if tensor.index is None:
            filled[tensor.path] = _put(value, leaf.dtype, sharding)
            continue
        if tensor.path not in filled:
            filled[tensor.path] = _zeros(leaf.shape, leaf.dtype, sharding)()
        layer = _put(value[None], leaf.dtype, sharding)
        filled[tensor.path] = _write(filled[tensor.path], layer, np.int32(tensor.index))
    for path, leaf in abstract.items():
        abstract[path] = leaf.replace(filled[path])
    return nnx.merge(graphdef, nnx.from_flat_state(abstract))


def _check(wanted: list[Tensor], shapes: dict[Tensor, tuple[int, ...]], source: Source) -> None:
    names = {tensor.name for tensor in wanted}
    missing, surplus = sorted(names - set(source.names())), sorted(set(source.names()) - names)
    for which, what in ((missing, "misses"), (surplus, "holds what the configuration does not ask for:")):
        if which:
            more = f" and {len(which) - 3} more" if len(which) > 3 else ""
            raise ModelError(
                f"the weights must be those of config.json. This file {what} {', '.join(which[:3])}{more}."
            )
    for tensor in wanted:
        need, got = tensor.file_shape(shapes[tensor]), source.shape(tensor.name)
        if need != got:
            raise ModelError(f"{tensor.name} must have shape {need}. Got {got}.")


def _put(value: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    """Each device's part of a tensor, cast on the host part by part."""

    def part(index: Any) -> np.ndarray:
        return np.ascontiguousarray(value[index]).astype(dtype, copy=False)

    return jax.make_array_from_callback(value.shape, sharding, part)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _written(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, layer, index, 0)


_write = jax.jit(_written, donate_argnums=0)  # in place: a stack never exists twice
