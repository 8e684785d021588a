"""Keys and values of what was read and written so far, sharded over the ring, and attention to them.

Decoding with a sharded cache moves no keys: the query is on every rank, each attends to its part of the cache, and one
maximum and one sum over the ring, or one sum, make one result of theirs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32

from . import _compat
from .arguments import (
    as_integers,
    check_axis_name,
    check_qkv,
    check_scale,
    check_sinks,
    check_soft_cap,
    check_window,
)
from .cached import Cached, Shards, Way, append_shard, attend_cached, fill_shard
from .config import RingConfig
from .kernels.choose import choose, interprets, wants_one_operation
from .layout import Layout, Striped, as_layout
from .local import Call, hops_per_iteration, refuse_interpreter
from .sharded import AxisNames, find_mesh, reshard, target_of

# A device's slots are a multiple of it: Hopper's copy engine moves boxes of 8 tokens, and of a cache with other slots
# its kernel would copy all for every token. The other layouts have the slots of the prompts that they are filled with.
_SLOTS = 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "lengths"),
    meta_fields=("layout", "num_shards", "rolls"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far, sharded over the ring along the sequence. Methods return new caches.

    A pytree. Slots lie in the ring order of ``layout`` for ``num_shards`` ranks; "striped" deals the tokens evenly
    however many there are. Outside ``shard_map`` the arrays are whole, inside they are this rank's shards. Make one
    with :meth:`empty`. Under ``jit`` donate it, so that it is written in place.

    Attributes:
      key, value: [B, S, K, H] and [B, S, K, Hv]; S slots, the capacity.
      lengths: int32 [B], tokens of each row so far. What lies beyond is unspecified and attended to by nothing. A
        length beyond the capacity makes the row's attention NaN: under ``jit`` nothing can raise.
      layout, num_shards: where the slots lie.
      rolls: the cache of a window: a new token takes the slot of the one S before it, and there is always room.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    lengths: Int32[Array, " B"]
    layout: Layout
    num_shards: int
    rolls: bool = False

    @classmethod
    def empty(
        cls,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        layout: str | Layout = "striped",
        num_shards: int | None = None,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        max_new_tokens: int = 1,
        mesh: Mesh | None = None,
        axis_name: str = "sp",
        batch_axis_name: AxisNames | None = None,
        head_axis_name: AxisNames | None = None,
    ) -> "KVCache":
        """A cache without tokens.

        Args:
          batch_size, capacity, num_kv_heads, head_dim: B, S, K, H. The capacity is rounded up to the layout's unit;
            "striped", to a multiple of 8 slots per device.
          value_head_dim: Hv; default H.
          dtype: of keys and values.
          layout: "striped", "contiguous", "zigzag" or a Layout object.
          num_shards: C; default the size of ``axis_name`` in the mesh, or 1 without one.
          local_window_size: of a layer whose tokens attend to so many before them: only these are kept.
          max_new_tokens: with a window, the most tokens that one call appends.
          mesh, axis_name, batch_axis_name, head_axis_name: where the arrays go. Without a mesh they are on one device.

        Raises:
          ValueError: naming the argument, what is required and what was given.
        """
        layout = as_layout(layout)
        sizes = {"batch_size": batch_size, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                 "value_head_dim": head_dim if value_head_dim is None else value_head_dim,
                 "max_new_tokens": max_new_tokens}  # fmt: skip
        for name, size in sizes.items():
            if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive integer. Got {size!r}.")
        on_mesh = None if mesh is None else find_mesh((check_axis_name(axis_name),), mesh).shape[axis_name]
        shards = (on_mesh or 1) if num_shards is None else num_shards
        if not isinstance(shards, int) or shards < 1:
            raise ValueError(f"num_shards must be a positive integer. Got {num_shards!r}.")
        if on_mesh not in (None, shards):
            raise ValueError(f"num_shards must be {on_mesh}, the size of {axis_name!r}. Got {num_shards}.")
        left, _ = check_window(local_window_size, True)
        wanted = capacity if left is None else min(capacity, left + max_new_tokens)
        unit = layout.unit(shards) * (_SLOTS if isinstance(layout, Striped) else 1)
        slots = -(-wanted // unit) * unit
        shape = (batch_size, slots, num_kv_heads)
        dtype = jnp.dtype(dtype)
        make = lambda: cls(  # noqa: E731
            key=jnp.zeros((*shape, head_dim), dtype),
            value=jnp.zeros((*shape, sizes["value_head_dim"]), dtype),
            lengths=jnp.zeros((batch_size,), jnp.int32),
            layout=layout,
            num_shards=shards,
            rolls=wanted < capacity,
        )
        if mesh is None:
            return make()
        abstract = jax.eval_shape(make)
        specs = abstract.specs(axis_name=axis_name, batch_axis_name=batch_axis_name, head_axis_name=head_axis_name)
        return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()

    @property
    def capacity(self) -> int:
        """S, the slots. Inside ``shard_map``, where the arrays are shards, it is that of the shard."""
        return self.key.shape[1]

    def specs(
        self,
        *,
        axis_name: str = "sp",
        batch_axis_name: AxisNames | None = None,
        head_axis_name: AxisNames | None = None,
    ) -> Any:
        """The cache with a PartitionSpec in place of each array: for shard_map's and jit's specs.

        Args:
          axis_name, batch_axis_name, head_axis_name: mesh axes of the sequence, of the batch and of the heads. A single
            K/V head stays whole.
        """
        heads = head_axis_name if self.key.shape[2] > 1 else None  # a single K/V head stays whole
        spec = P(batch_axis_name, axis_name, heads, None)
        return dataclasses.replace(self, key=spec, value=spec, lengths=P(batch_axis_name))

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        *,
        counts: Int[Array, " B"] | None = None,
        dealt: bool = False,
        axis_name: str = "sp",
        mesh: Mesh | AbstractMesh | None = None,
        batch_axis_name: AxisNames | None = None,
        head_axis_name: AxisNames | None = None,
    ) -> "KVCache":
        """The cache with new tokens behind those of each row. Each rank writes what it owns, and nothing is sent.

        Args:
          key, value: of the new tokens, in their order, the same on every rank.
          counts: int [B], how many of the T tokens each row takes, the first ones; None: all.
          dealt: the tokens are dealt over the ring, in ring order of the layout (a chunk of a long prompt). They are
            gathered first, T tokens on every rank.
          axis_name, mesh, batch_axis_name, head_axis_name: as in :func:`ringjax.ring_attention`.

        Returns:
          The new cache, whose lengths are those before plus the tokens taken.

        Raises:
          ValueError: naming the argument, what is required and what was given; also where rows have no room, if that
            can be seen.
        """
        key, value = self._checked("append", key, value, dealt)
        counts = _checked_counts("counts", counts, key)
        inside, axis, whole = self._around(axis_name, mesh, batch_axis_name, head_axis_name)
        length = key.shape[1] * (self.num_shards if inside and dealt else 1)
        slots = self.capacity * (self.num_shards if inside else 1)
        _check_dealt("key", self, dealt, length)
        if self.rolls and length > slots:
            raise ValueError(f"key: a cache that rolls takes at most its {slots} slots at once. Got {length} tokens.")
        added = jnp.full_like(self.lengths, length) if counts is None else counts
        lengths = self.lengths + added
        if not self.rolls and not isinstance(lengths, Tracer) and lengths.is_fully_addressable:
            if int(jnp.max(lengths)) > slots:
                raise ValueError(
                    f"key: every row must have room, of a capacity of {slots}. Got {int(jnp.max(self.lengths))} tokens "
                    f"in a row and {length} new ones."
                )

        how = _Writing(fills=False, dealt=dealt, axis_name=axis)
        written = self._written(how, whole, Shards(key, value), counts, batch_axis_name, head_axis_name)
        return dataclasses.replace(written, lengths=lengths)

    def fill(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        *,
        lengths: Int[Array, " B"] | None = None,
        axis_name: str = "sp",
        mesh: Mesh | AbstractMesh | None = None,
        batch_axis_name: AxisNames | None = None,
        head_axis_name: AxisNames | None = None,
    ) -> "KVCache":
        """The cache with the tokens of a prompt in place of all that it had. Nothing is sent.

        Args:
          key, value: in ring order of the cache's layout, sharded like the cache. A layout other than "striped" deals
            a prompt as it deals the cache only if they are equally long: T = S.
          lengths: int [B], tokens of each row; what lies beyond is padding. None: all T.
          axis_name, mesh, batch_axis_name, head_axis_name: as in :func:`ringjax.ring_attention`.

        Raises:
          ValueError: naming the argument, what is required and what was given.
        """
        key, value = self._checked("fill", key, value, True)
        lengths = _checked_counts("lengths", lengths, key)
        inside, axis, whole = self._around(axis_name, mesh, batch_axis_name, head_axis_name)
        given, slots = key.shape[1], self.capacity
        _check_dealt("key", self, True, given * (self.num_shards if inside else 1))
        if given > slots and not self.rolls:
            raise ValueError(f"key: a prompt must fit the {slots} slots. Got {given} tokens.")
        if given != slots and not isinstance(self.layout, Striped):
            raise ValueError(f"key: layout {self.layout} takes prompts of {slots} tokens, its slots. Got {given}.")
        counted = jnp.full_like(self.lengths, given * (self.num_shards if inside else 1))
        counted = counted if lengths is None else lengths

        how = _Writing(fills=True, dealt=True, axis_name=axis)
        written = self._written(how, whole, Shards(key, value), counted, batch_axis_name, head_axis_name)
        return dataclasses.replace(written, lengths=counted)

    def _checked(self, what: str, key: Any, value: Any, dealt: bool) -> tuple[Array, Array]:
        key, value = jnp.asarray(key), jnp.asarray(value)
        for name, x, held in (("key", key, self.key), ("value", value, self.value)):
            if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (held.shape[0], *held.shape[2:]) or not x.shape[1]:
                batch, _, heads, size = held.shape
                raise ValueError(f"{what}: {name} must have shape [{batch}, T, {heads}, {size}]. Got {x.shape}.")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"{what}: key and value must have one length. Got {key.shape}, {value.shape}.")
        return key, value

    def _around(
        self, axis_name: str, mesh: Mesh | AbstractMesh | None, batch: AxisNames | None, heads: AxisNames | None
    ) -> tuple[bool, str, Mesh | AbstractMesh | None]:
        """Whether the arrays are shards, the axis, and outside the mesh."""
        axis = check_axis_name(axis_name)
        if _compat.axis_is_bound(axis):
            for name, given in (("mesh", mesh), ("batch_axis_name", batch), ("head_axis_name", heads)):
                if given is not None:
                    raise ValueError(f"{name} must be None where axis {axis!r} is already manual. Got {given!r}.")
            size, whole = jax.lax.axis_size(axis), None
        else:
            whole = find_mesh((axis,), mesh)
            size = whole.shape[axis]
        if size != self.num_shards:
            raise ValueError(f"cache: axis {axis!r} must have {self.num_shards} devices, its num_shards. Got {size}.")
        return whole is None, axis, whole

    def _written(
        self,
        how: "_Writing",
        mesh: Mesh | AbstractMesh | None,
        new: Shards,
        counts: Array | None,
        batch: AxisNames | None,
        heads: AxisNames | None,
    ) -> "KVCache":
        if mesh is None:
            return how(self, new, counts)
        cache = self.specs(axis_name=how.axis_name, batch_axis_name=batch, head_axis_name=heads)
        of_new: Any = P(batch, how.axis_name if how.dealt else None, cache.key[2], None)
        in_specs = (cache, Shards(of_new, of_new), None if counts is None else P(batch))
        return _on_shards(how, mesh, in_specs, cache, True)(self, new, counts)


@dataclasses.dataclass(frozen=True)
class _Writing:
    """How new tokens come into the part of a cache that a rank has."""

    fills: bool  # in place of what was there
    dealt: bool
    axis_name: str

    def __call__(self, cache: KVCache, new: Shards, counts: Array | None) -> KVCache:
        here = Shards(cache.key, cache.value)
        common: dict[str, Any] = {"axis_name": self.axis_name, "layout": cache.layout, "rolls": cache.rolls}
        if self.fills:
            assert counts is not None
            here = fill_shard(here, new, counts, **common)
        else:
            here = append_shard(here, new, cache.lengths, counts, dealt=self.dealt, **common)
        return dataclasses.replace(cache, key=here.key, value=here.value)


@dataclasses.dataclass(frozen=True)
class _Attending:
    """A call of cached_attention as a rank does it."""

    call: Call
    way: Way

    def __call__(self, query: Array, cache: KVCache, counts: Array | None, sinks: Array | None) -> tuple[Array, Array]:
        arrays = Cached(query, cache.key, cache.value, cache.lengths, counts, sinks)
        return attend_cached(self.call, self.way, arrays, rolls=cache.rolls)


@functools.lru_cache(maxsize=256)
def _on_shards(
    work: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any, check_vma: bool
) -> Callable[..., Any]:
    """The work under shard_map and jit. Cached, or every eager call would compile anew."""
    run = jax.shard_map(work, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

    def placed(*trees: Any) -> Any:
        put = lambda spec, x: reshard(x, spec, mesh)  # noqa: E731
        return run(*(jax.tree.map(put, spec, tree) for spec, tree in zip(in_specs, trees, strict=True)))

    return jax.jit(placed)


class CacheOptions(TypedDict, total=False):
    """Options of a call, as :func:`ringjax.cached_attention` documents them; the result's type depends on none.

    For functions that pass them on: ``def attend(query, cache, **options: Unpack[CacheOptions])``.
    """

    counts: Int[Array, " B"] | None
    dealt: bool
    travels: Literal["queries", "keys"] | None
    axis_name: str
    mesh: Mesh | AbstractMesh | None
    batch_axis_name: AxisNames | None
    head_axis_name: AxisNames | None
    scale: float | None
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    sinks: Float[Array, " N"] | None
    config: RingConfig


@overload
def cached_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Float[Array, "B T N Hv"]: ...


@overload
def cached_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    return_residual: Literal[True],
    **options: Unpack[CacheOptions],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]: ...


def cached_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    counts: Int[Array, " B"] | None = None,
    dealt: bool = False,
    travels: Literal["queries", "keys"] | None = None,
    axis_name: str = "sp",
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis_name: AxisNames | None = None,
    head_axis_name: AxisNames | None = None,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_residual: bool = False,
    config: RingConfig = RingConfig(),  # noqa: B008  frozen
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Causal attention of the newest tokens to all that is cached, themselves included: append them first.

    Query t of a row of n tokens, m of which are queries, has position n - m + t and attends to the keys at its position
    and before. One function inside and outside ``shard_map``; exact, and differentiable in query, keys and values.

    Args:
      query: [B, T, N, H] in the cache's dtype, N a multiple of its K heads. In order and the same on every rank, as in
        decoding: each rank attends to its part of the cache, then one maximum of B T N float32 numbers and one sum of
        B T N (Hv + 1) merge the results, or one sum alone as in :func:`ringjax.merge_over_axis`. No key is sent.
      cache: after :meth:`KVCache.append`.
      counts: int [B], the queries m of each row, the first ones; the others are absent. None: all T.
      dealt: the queries are dealt over the ring, in ring order of the cache's layout: a chunk of a long prompt.
      travels: of dealt queries: "keys", the blocks of the cache go round the ring; "queries", these are gathered, and
        the results scattered by a sum; None, whichever moves fewer bytes.
      axis_name, mesh, batch_axis_name, head_axis_name, scale, local_window_size, logits_soft_cap, sinks, config: as in
        :func:`ringjax.ring_attention`. The right side of a window has no meaning here.
      return_residual: also return the log-sum-exp.

    Returns:
      out [B, T, N, Hv] in the dtype of query, in its order and dealt as it is; with return_residual also lse
      [B, T, N] in float32 (float64 for float64). Absent queries give 0 and -inf (with sinks: the sink). A row with more
      tokens than the cache has room for gives NaN.

    Raises:
      ValueError: for arguments that do not fit, naming the argument, what is required and what was given.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be a ringjax.KVCache. Got {type(cache).__name__}.")
    query, key, value = check_qkv(query, cache.key, cache.value)
    counts, sinks = _checked_counts("counts", counts, query), check_sinks(sinks, query.shape[2])
    for name, given in (("dealt", dealt), ("return_residual", return_residual)):
        if not isinstance(given, bool):
            raise ValueError(f"{name} must be True or False. Got {given!r}.")
    if travels not in (None, "queries", "keys") or (travels is not None and not dealt):
        raise ValueError(f"travels must be 'queries', 'keys' or None, and None unless dealt. Got {travels!r}.")
    if not isinstance(config, RingConfig):
        raise ValueError(f"config must be a RingConfig. Got {type(config).__name__}.")
    left, _ = check_window(local_window_size, True)
    inside, axis, whole = cache._around(axis_name, mesh, batch_axis_name, head_axis_name)
    shards = cache.num_shards
    total, slots = ((query.shape[1] * (shards if dealt else 1), key.shape[1] * shards) if inside
                    else (query.shape[1], key.shape[1]))  # fmt: skip
    if cache.rolls and (left is None or left + total > slots):
        raise ValueError(
            f"local_window_size: a cache that rolls must have slots for the {total} queries and the keys on their left "
            f"side. Got {slots} slots, local_window_size={local_window_size!r}."
        )
    _check_dealt("query", cache, dealt, total)
    target = target_of(mesh)
    backend = choose(config, target, query.dtype, max(query.shape[3], value.shape[3]))
    call = Call(
        axis_names=(axis,),
        strategies=("ring",),
        layout=cache.layout,
        left=left,
        right=0,
        scale=check_scale(scale, query.shape[3]),
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        config=config,
        kernel=backend.load(),
        unroll=hops_per_iteration(config, (axis,), inside, target.platform),
        platform=target.platform,
        device_kind=target.device_kind,
        one_operation=wants_one_operation(target),
        interpreted=backend.interpretable and interprets(config),
    )
    way: Way = "merge" if not dealt else travels or _lighter(query, key, value, total, slots)
    work = _Attending(call, way)
    if whole is None:
        refuse_interpreter(call)
        out, lse = work(query, cache, counts, sinks)
    else:
        specs = cache.specs(axis_name=axis, batch_axis_name=batch_axis_name, head_axis_name=head_axis_name)
        of_query = P(batch_axis_name, axis if dealt else None, head_axis_name, None)
        in_specs = (of_query, specs, None if counts is None else P(batch_axis_name),
                    None if sinks is None else P(head_axis_name))  # fmt: skip
        out_specs = (of_query, P(*of_query[:3]))
        check_vma = not call.interpreted and not _compat.inside_spmd_vmap()
        out, lse = _on_shards(work, whole, in_specs, out_specs, check_vma)(query, cache, counts, sinks)
    return (out, lse) if return_residual else out


def _lighter(query: Array, key: Array, value: Array, total: int, slots: int) -> Way:
    """What of the two moves fewer bytes: each rank receives all of it but its own part."""
    number, wide = query.dtype.itemsize, 8 if query.dtype == jnp.float64 else 4
    queries = total * query.shape[2] * (query.shape[3] * number + (value.shape[3] + 1) * wide)
    keys = slots * key.shape[2] * (key.shape[3] + value.shape[3]) * number
    return "queries" if queries < keys else "keys"


def _check_dealt(name: str, cache: KVCache, dealt: bool, length: int) -> None:
    unit = cache.layout.unit(cache.num_shards)
    if dealt and length % unit:
        raise ValueError(
            f"{name}: dealt over {cache.num_shards} ranks the length must be a multiple of {unit} ({cache.layout}). "
            f"Got {length}."
        )


def _checked_counts(name: str, given: Any, tokens: Array) -> Array | None:
    if given is None:
        return None
    counts = as_integers(name, given)
    if counts.shape != tokens.shape[:1]:
        raise ValueError(f"{name} must have shape [B] = {tokens.shape[:1]}. Got {counts.shape}.")
    return counts
