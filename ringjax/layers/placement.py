"""Where a layer runs: in shard_map, on a mesh, or on one device. Shardings and positions follow from it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._compat import axis_is_bound
from ..arguments import check_max_segment_length, check_shared_length
from ..attention import ring_attention
from ..cache import KVCache, cached_attention
from ..layout import Contiguous, Layout, as_layout, ring_positions
from ..promises import Promise, hold_against
from ..sharded import target_of
from . import checks

AxisNames = str | tuple[str, ...] | None
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Names = tuple[str | tuple[str, ...] | None, ...]

# What a dimension of an array can be; a Placement says which mesh axes share it. None: whole on every device.
Role = Literal["batch", "rows", "sequence", "tensor", "fsdp", "features"] | None
BATCH: Final = "batch"
ROWS: Final = "rows"  # of the batch, outside attention
SEQUENCE: Final = "sequence"
TENSOR: Final = "tensor"
FSDP: Final = "fsdp"
FEATURES: Final = "features"

# Numbers of a device's kernel below which XLA's simplifier for GPUs takes a product with one row apart.
_SMALL = 10_000_000


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """What a layer is told of where its arrays lie; checked here, once."""

    axis_name: str | tuple[str, ...]
    batch_axis_name: AxisNames
    head_axis_name: AxisNames
    mesh: Mesh | None  # None: the context's
    layout: Layout
    num_shards: int | None  # for which the tokens are dealt; None: as many as the ring has devices

    @classmethod
    def of(
        cls,
        *,
        axis_name: str | tuple[str, ...],
        batch_axis_name: AxisNames,
        head_axis_name: AxisNames,
        mesh: Mesh | None,
        layout: str | Layout,
        num_shards: int | None,
    ) -> "Distribution":
        if mesh is not None and not isinstance(mesh, Mesh):
            raise ValueError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, or None. Got {mesh!r}.")
        return cls(
            axis_name=checks.required_axes("axis_name", axis_name),
            batch_axis_name=checks.axes("batch_axis_name", batch_axis_name),
            head_axis_name=checks.axes("head_axis_name", head_axis_name),
            mesh=mesh,
            layout=as_layout(layout),
            num_shards=None if num_shards is None else checks.positive_integer("num_shards", num_shards),
        )

    def here(self) -> "Placement":
        """Look around: is the axis bound, is there a mesh, does it have the axes, is the ring as long as was said?"""
        ring = as_axes(self.axis_name)
        if all(axis_is_bound(axis) for axis in ring):
            ring_size = math.prod(jax.lax.axis_size(axis) for axis in ring)
            num_shards = self._dealt_for(ring_size)
            return Placement(told=self, sizes={}, explicit=(), inside=True, ring_size=ring_size, num_shards=num_shards)
        context = jax.sharding.get_abstract_mesh()
        seen = self.mesh if context.empty else context
        if seen is None:
            # One device, and nothing that says how many there were when the tokens were dealt. Only the contiguous
            # layout leaves them in natural order whatever the number.
            num_shards = 1 if isinstance(self.layout, Contiguous) else self.num_shards
            return Placement(told=self, sizes={}, explicit=(), inside=False, ring_size=1, num_shards=num_shards)
        if self.mesh is not None and dict(self.mesh.shape) != dict(seen.shape):
            raise ValueError(f"mesh must be the mesh of the context {dict(seen.shape)}. Got {dict(self.mesh.shape)}.")
        for argument in ("axis_name", "batch_axis_name", "head_axis_name"):
            for axis in as_axes(getattr(self, argument)):
                if axis not in seen.shape:
                    raise ValueError(f"{argument} must name axes of the mesh, {seen.axis_names}. Got {axis!r}.")
        kinds = dict(zip(seen.axis_names, seen.axis_types, strict=True))
        ring_size = math.prod(seen.shape[axis] for axis in ring)
        return Placement(
            told=self,
            sizes={axis: size for axis, size in seen.shape.items() if kinds[axis] != AxisType.Manual},
            explicit=tuple(axis for axis, kind in kinds.items() if kind == AxisType.Explicit),
            inside=False,
            ring_size=ring_size,
            num_shards=self._dealt_for(ring_size),
        )

    def _dealt_for(self, ring_size: int) -> int:
        """The number of shards for which the tokens are dealt: as many as devices, unless one device has them all."""
        if self.num_shards is None:
            return ring_size
        if self.num_shards != ring_size != 1:
            raise ValueError(
                f"num_shards must be {ring_size}, the number of devices on the ring {self.axis_name!r} here, or the "
                f"ring must have one device. Got {self.num_shards}."
            )
        return 1 if isinstance(self.layout, Contiguous) and ring_size == 1 else self.num_shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a layer runs: in shard_map on local shards, on a mesh with global arrays, or on one device without one."""

    told: Distribution
    sizes: Mapping[str, int]  # the mesh axes that a sharding may name here; empty without a mesh
    explicit: tuple[str, ...]  # mesh axes of the context with Explicit type
    inside: bool  # the ring's axis is bound: arrays are local shards
    ring_size: int  # devices on the ring
    num_shards: int | None  # for which the tokens are dealt; None: nothing says
    whole: bool = False  # decoding: the few new tokens are on every device of the ring, in their order

    def names(self, roles: tuple[Role, ...]) -> Names:
        """The mesh axes of every dimension, whatever its size: what a parameter's metadata say on every mesh."""
        batch, sequence = as_axes(self.told.batch_axis_name), as_axes(self.told.axis_name)
        axes = {
            None: (),
            BATCH: batch,
            ROWS: () if self.whole else batch,
            SEQUENCE: () if self.whole else sequence,
            TENSOR: as_axes(self.told.head_axis_name),
            FSDP: batch + sequence,
            FEATURES: batch + sequence if self.whole else (),
        }
        return tuple(_entry(axes[role]) for role in roles)

    def spec(self, shape: tuple[int, ...], *roles: Role) -> PartitionSpec:
        """How an array of this shape is sharded here."""
        return fit_spec(self.names(roles), shape, self.sizes)

    def count(self, size: int, role: Role) -> int:
        """How many shards a dimension is cut into here."""
        (entry,) = self.spec((size,), role)
        return math.prod(self.sizes[axis] for axis in as_axes(entry))

    def constrain(self, x: jax.Array, *roles: Role) -> jax.Array:
        """Pin the sharding of an activation; without a mesh, and on local shards, there is nothing to pin."""
        if self.inside or not self.sizes:
            return x
        spec = self.spec(x.shape, *roles)
        in_context = not jax.sharding.get_abstract_mesh().empty
        if in_context or self.told.mesh is None:
            return jax.lax.with_sharding_constraint(x, spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.told.mesh, spec))

    def gather(self, kernel: jax.Array, *roles: Role) -> jax.Array:
        """A kernel for use. Its FSDP part is gathered; activations never move for it.

        While decoding it stays: one token's activations are less than the kernel.
        """
        kept: list[Role] = [None if role == FSDP and not self.whole else role for role in roles]
        return self.constrain(kernel, *kept)

    def product(self, equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """einsum of activations [B, T, ...] and a gathered kernel.

        Of one row and a small kernel XLA for GPUs makes no product of matrices, but products that it writes to memory
        and sums of them.
        """
        multiply = lambda x: jnp.einsum(equation, x, kernel)  # noqa: E731
        small = kernel.size < _SMALL * math.prod(self.sizes.values())
        return self.never_alone(multiply, x) if small else multiply(x)

    def product_out(self, equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """einsum of activations [B, T, F, ...] and a gathered kernel [F, ..., E], pinned as the stream is.

        F is of the role TENSOR.
        """
        x = self.constrain(x, ROWS, SEQUENCE, TENSOR, *[None] * (kernel.ndim - 2))
        return self.stream(self.product(equation, x, kernel))

    def rows(self, table: jax.Array, index: jax.Array) -> jax.Array:
        """Rows [B, T, E] of a table [V, E] of roles TENSOR and FSDP; NaN where the index is not in [0, V).

        A look-up of one row is a slice to XLA for GPUs, for which it gathers a table that devices share.
        """
        table = self.gather(table, TENSOR, FSDP)
        index = self.constrain(index, ROWS, SEQUENCE) if self.whole else index
        options: dict[str, Any] = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        return self.never_alone(lambda index: table.at[index].get(**options), index)

    def never_alone(self, run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """run(x) of x [B, T, ...], token by token. While decoding on GPUs a single token is joined by one of zeros."""
        if not self.whole or x.shape[0] * x.shape[1] > 1 or target_of(self.told.mesh).platform != "gpu":
            return run(x)
        return run(jnp.concatenate([x, jnp.zeros_like(x)], axis=1))[:, :1]

    def stream(self, x: jax.Array) -> jax.Array:
        """Pins activations [B, T, E]. While decoding, features of all rows are dealt, as the kernels' FSDP part is."""
        return self.constrain(x, ROWS, SEQUENCE, FEATURES)

    def decoding(self) -> "Placement":
        """The same for the tokens of a decoding step."""
        return dataclasses.replace(self, whole=True)

    def dealt_as(self, cache: KVCache) -> "Placement":
        """The same for a prompt that is dealt as the cache is."""
        return dataclasses.replace(
            self, told=dataclasses.replace(self.told, layout=cache.layout), num_shards=self.ring_size
        )

    def require_num_shards(self) -> None:
        """Refuses to guess the order of the tokens. Call it wherever the result depends on that order."""
        if self.num_shards is None:
            raise ValueError(
                f"num_shards must be given where there is no mesh and the layout is {self.told.layout}: the number of "
                "shards for which the tokens were dealt (to_ring_order's), or 1 for tokens in natural order. "
                "Got num_shards=None and no mesh."
            )

    def to_natural(self, x: jax.Array | None, axis: int) -> Any:
        """Natural order for a ring of one device, for however many shards the tokens were dealt.

        A ring of several devices has as many as there are shards: tokens stay in ring order.
        """
        order = self._order(x, axis)
        return x if x is None or order is None else jnp.take(x, jnp.argsort(order), axis=axis)

    def from_natural(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of to_natural."""
        order = self._order(x, axis)
        return x if order is None else jnp.take(x, order, axis=axis)

    def _order(self, x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None or self.num_shards is None or self.num_shards == self.ring_size:
            return None
        return ring_positions(x.shape[axis], layout=self.told.layout, num_shards=self.num_shards)

    def positions(self, length: int) -> jax.Array:
        """Global position of every token at hand: of the whole sequence in ring order, or of the local shard.

        On a ring of one device the tokens are in natural order, see to_natural.
        """
        if not self.inside:
            return ring_positions(length, layout=self.told.layout, num_shards=self.ring_size)
        # Row-major over the axes of a two-level ring, as shard_map deals the shards.
        rank = jnp.int32(0)
        for axis in as_axes(self.told.axis_name):
            rank = rank * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return self.told.layout.positions(rank, jnp.arange(length, dtype=jnp.int32), length, self.ring_size)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """ring_attention here."""
        if self.inside or self.sizes:
            return ring_attention(
                query,
                key,
                value,
                layout=self.told.layout,
                **self._where(),
                **options,
            )

        # With one shard every layout is the natural order.
        return self._alone(
            lambda: ring_attention(query, key, value, axis_name=self.told.axis_name, layout="contiguous", **options)
        )

    def promised(
        self,
        segment_ids: Any,
        max_segment_length: int | None,
        shared_length: int | tuple[int, ...] | None,
        seq_lengths: Any = None,
    ) -> dict[str, Any]:
        """Promises about segments as options of attend, held against whole ids: layers are traced and see no values."""
        axes = as_axes(self.told.axis_name)
        longest = check_max_segment_length(max_segment_length, segment_ids)
        shared = check_shared_length(shared_length, segment_ids, len(axes))
        if self.ring_size == 1:  # nothing travels, whatever the number of shards for which the tokens were dealt
            return {}
        if not self.inside:
            sizes = tuple(self.sizes[axis] for axis in axes)
            hold_against(Promise(self.told.layout, sizes, longest, shared), segment_ids, seq_lengths, seq_lengths)
        return {"max_segment_length": longest, "shared_length": shared}

    def decode(
        self, query: jax.Array, key: jax.Array, value: jax.Array, cache: KVCache, counts: Any, **options: Any
    ) -> tuple[jax.Array, KVCache]:
        """Appends the new keys and values, then cached_attention."""

        def run(**where: Any) -> tuple[jax.Array, KVCache]:
            grown = cache.append(key, value, counts=counts, **where)
            return cached_attention(query, grown, counts=counts, **where, **options), grown

        return run(**self._where()) if self.sizes else self._alone(lambda: run(axis_name=self.told.axis_name))

    def prefill(
        self, query: jax.Array, key: jax.Array, value: jax.Array, cache: KVCache, lengths: Any, **options: Any
    ) -> tuple[jax.Array, KVCache]:
        """ring_attention of a prompt that is dealt as the cache is, and the cache with its keys and values."""
        out = self.attend(query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, **options)
        fill = lambda **where: cache.fill(key, value, lengths=lengths, **where)  # noqa: E731
        return out, fill(**self._where()) if self.sizes else self._alone(lambda: fill(axis_name=self.told.axis_name))

    def _where(self) -> dict[str, Any]:
        return {
            "axis_name": self.told.axis_name,
            "mesh": self.told.mesh if jax.sharding.get_abstract_mesh().empty else None,
            "batch_axis_name": self.told.batch_axis_name,
            "head_axis_name": self.told.head_axis_name,
        }

    def _alone(self, run: Callable[[], Any]) -> Any:
        """Without a mesh: a ring of one, on whatever device the arrays are."""
        axes = as_axes(self.told.axis_name)
        alone: Callable[..., Any] = lambda _: run()  # noqa: E731
        for axis in axes:
            alone = jax.vmap(alone, axis_name=axis, axis_size=1, in_axes=None, out_axes=0)
        return jax.tree.map(lambda x: x.reshape(x.shape[len(axes) :]), alone(jnp.zeros(())))

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

    def sharded_like(self, x: jax.Array) -> "Placement":
        """With the batch axes read off an input on Explicit axes, where none are given."""
        if self.told.batch_axis_name is not None or not self.explicit:
            return self
        spec = tuple(jax.typeof(x).sharding.spec)
        told = dataclasses.replace(self.told, batch_axis_name=spec[0] if spec else None)
        return dataclasses.replace(self, told=told)
