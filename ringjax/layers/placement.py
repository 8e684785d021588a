"""Where a layer runs: in shard_map, on a mesh, or on one device. Shardings of a layer's arrays follow from it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._compat import axis_is_bound
from ..attention import ring_attention
from ..layout import Layout, as_layout, ring_positions

AxisNames = str | tuple[str, ...] | None
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Names = tuple[str | tuple[str, ...] | None, ...]

# Roles that a dimension of an array can play; a Place says which mesh axes share it.
BATCH, SEQUENCE, TENSOR, FSDP = "batch", "sequence", "tensor", "fsdp"


def as_axes(names: AxisNames) -> tuple[str, ...]:
    """One name, several or none, as a tuple."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def fit_spec(names: Names, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The part of these names that a mesh has and that divides the shape, so that any size can be placed anywhere."""

    def fit(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        axes = tuple(axis for axis in as_axes(entry) if axis in sizes)
        while axes and size % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        return _entry(axes)

    return PartitionSpec(*(fit(entry, size) for entry, size in zip(names, shape, strict=True)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer runs: in shard_map on local shards, on a mesh with global arrays, or on one device without one.

    ``sizes`` holds the mesh axes that a sharding may name here, and is empty without a mesh.
    """

    axis_name: str | tuple[str, ...]
    batch_axis_name: AxisNames
    head_axis_name: AxisNames
    mesh: Mesh | None  # as given to the layer; None: the context's
    sizes: Mapping[str, int]
    explicit: tuple[str, ...]  # mesh axes of the context with Explicit type
    inside: bool  # the ring's axis is bound: arrays are local shards
    num_shards: int

    def names(self, roles: tuple[str | None, ...]) -> Names:
        """The mesh axes of every dimension, whatever its size: what a parameter's metadata say on every mesh."""
        batch, sequence = as_axes(self.batch_axis_name), as_axes(self.axis_name)
        axes = {
            None: (),
            BATCH: batch,
            SEQUENCE: sequence,
            TENSOR: as_axes(self.head_axis_name),
            FSDP: batch + sequence,
        }
        return tuple(_entry(axes[role]) for role in roles)

    def spec(self, shape: tuple[int, ...], *roles: str | None) -> PartitionSpec:
        """How an array of this shape is sharded here."""
        return fit_spec(self.names(roles), shape, self.sizes)

    def count(self, size: int, role: str) -> int:
        """How many shards a dimension is cut into here."""
        (entry,) = self.spec((size,), role)
        return math.prod(self.sizes[axis] for axis in as_axes(entry))

    def constrain(self, x: jax.Array, *roles: str | None) -> jax.Array:
        """Pin the sharding of an activation; without a mesh, and on local shards, there is nothing to pin."""
        if self.inside or not self.sizes:
            return x
        spec = self.spec(x.shape, *roles)
        in_context = not jax.sharding.get_abstract_mesh().empty
        if in_context or self.mesh is None:
            return jax.lax.with_sharding_constraint(x, spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def positions(self, length: int, layout: str | Layout) -> jax.Array:
        """Global position of every token at hand: of the whole sequence in ring order, or of the local shard."""
        if not self.inside:
            return ring_positions(length, layout=layout, num_shards=self.num_shards)
        # Row-major over the axes of a two-level ring, as shard_map deals the shards.
        rank = jnp.int32(0)
        for axis in as_axes(self.axis_name):
            rank = rank * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return as_layout(layout).positions(rank, jnp.arange(length, dtype=jnp.int32), length, self.num_shards)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, layout: str | Layout, **options: Any
    ) -> Any:
        """ring_attention here."""
        if self.inside or self.sizes:
            return ring_attention(
                query,
                key,
                value,
                axis_name=self.axis_name,
                mesh=self.mesh if jax.sharding.get_abstract_mesh().empty else None,
                batch_axis_name=self.batch_axis_name,
                head_axis_name=self.head_axis_name,
                layout=layout,
                **options,
            )

        # No mesh: a ring of one, on whatever device the arrays are. With one shard every layout is the natural order.
        def ring_of_one(_: jax.Array) -> Any:
            return ring_attention(query, key, value, axis_name=self.axis_name, layout="contiguous", **options)

        run = ring_of_one
        for axis in as_axes(self.axis_name):
            run = jax.vmap(run, axis_name=axis, axis_size=1, in_axes=None, out_axes=0)
        out = run(jnp.zeros(()))
        return out.reshape(out.shape[len(as_axes(self.axis_name)) :])

    def with_auto_axes(self, run: Callable[..., Any], out_specs: Any, *args: Any) -> Any:
        """Call run(*args) with every mesh axis of Auto type, so that ``constrain`` and XLA decide the shardings.

        A layer is full of products whose shardings must be spelled out under Explicit axes; out_specs is all the
        outside gets to see of them.
        """
        if not self.explicit:
            return run(*args)
        if jax.sharding.get_abstract_mesh().empty:
            raise ValueError(
                "mesh must be entered with jax.set_mesh(mesh) when it has axes of Explicit type. "
                f"Got a mesh with Explicit axes {self.explicit} and no mesh in the context."
            )
        return jax.sharding.auto_axes(run, axes=self.explicit, out_sharding=out_specs)(*args)

    def sharded_like(self, x: jax.Array) -> "Place":
        """With the batch axes read off an input on Explicit axes, where none are given."""
        if self.batch_axis_name is not None or not self.explicit:
            return self
        spec = tuple(jax.typeof(x).sharding.spec)
        return dataclasses.replace(self, batch_axis_name=spec[0] if spec else None)


def find_place(
    axis_name: str | tuple[str, ...], mesh: Mesh | None, batch_axis_name: AxisNames, head_axis_name: AxisNames
) -> Place:
    """Look around: is the axis bound, is there a mesh, and does it have the axes?"""
    ring = as_axes(axis_name)
    if all(axis_is_bound(axis) for axis in ring):
        count = math.prod(jax.lax.axis_size(axis) for axis in ring)
        return Place(axis_name, batch_axis_name, head_axis_name, mesh, {}, (), True, count)
    context = jax.sharding.get_abstract_mesh()
    seen = mesh if context.empty else context
    if seen is None:
        return Place(axis_name, batch_axis_name, head_axis_name, None, {}, (), False, 1)
    if mesh is not None and dict(mesh.shape) != dict(seen.shape):
        raise ValueError(f"mesh must be the mesh of the context {dict(seen.shape)}. Got {dict(mesh.shape)}.")
    wanted = {"axis_name": ring, "batch_axis_name": as_axes(batch_axis_name), "head_axis_name": as_axes(head_axis_name)}
    for argument, axes in wanted.items():
        for axis in axes:
            if axis not in seen.shape:
                raise ValueError(f"{argument} must name axes of the mesh, {seen.axis_names}. Got {axis!r}.")
    kinds = dict(zip(seen.axis_names, seen.axis_types, strict=True))
    explicit = tuple(axis for axis, kind in kinds.items() if kind == AxisType.Explicit)
    sizes = {axis: size for axis, size in seen.shape.items() if kinds[axis] != AxisType.Manual}
    count = math.prod(seen.shape[axis] for axis in ring)
    return Place(axis_name, batch_axis_name, head_axis_name, mesh, sizes, explicit, False, count)
