"""The ring to be compiled: its sizes, checked, and what one device holds of it. Written to and read from JSON."""

import dataclasses
import functools
import math
from typing import Any

from ..arguments import (
    check_fits_shard,
    check_max_segment_length,
    check_shared_length,
    check_window,
    within_segments,
)
from ..config import STRATEGIES, RingConfig
from ..layout import Layout, Striped, as_layout
from ..schedule import Schedule, full_schedule
from ..sharing import Sharing, share
from .topology import Slices, Topology, parse_topology

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(_ITEM_BYTES)
DEVICE_ORDERS = ("ring_mesh", "make_mesh")


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of ring_attention for a topology.

    Attributes:
      topology, ring, seq_len, heads, kv_heads, head_dim, value_head_dim, batch, dtype, layout, stripe, is_causal,
        window, segments, max_segment_length, shared_length, backward, implementation, block_q, block_kv, unroll,
        dkv_dtype, device_order, axes, strategy, direction, rings: as in :func:`ringjax.inspect.inspect_ring`, with
        every default filled in.
    """

    topology: str
    ring: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    layout: str = "zigzag"
    stripe: int = 1
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    segments: bool = False
    max_segment_length: int | None = None
    shared_length: int | tuple[int, ...] | None = None
    backward: bool = False
    implementation: str | None = None
    block_q: int | None = None
    block_kv: int | None = None
    unroll: int | None = None
    dkv_dtype: str = "float32"
    device_order: str = "ring_mesh"
    axes: tuple[int, ...] = ()  # of the sequence, outermost first; none given: one of all devices on the ring
    strategy: str | tuple[str, ...] = "ring"
    direction: str = "forward"
    rings: int = 1  # without a common link, through all devices

    def __post_init__(self) -> None:
        self._check_axes()
        for name in ("ring", "seq_len", "heads", "kv_heads", "head_dim", "value_head_dim", "batch", "stripe", "rings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer. Got {value!r}.")
        for name, allowed in (("dtype", DTYPES), ("device_order", DEVICE_ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {getattr(self, name)!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, {self.kv_heads}. Got {self.heads}.")
        if not self.axes:
            object.__setattr__(self, "axes", (self.ring,))
        if math.prod(self.axes) != self.ring:
            raise ValueError(
                f"axes must have the product {self.ring}, the devices on the ring. Got {self.axes}, which is "
                f"{math.prod(self.axes)}."
            )
        if self.stripe != 1 and self.layout != "striped":
            raise ValueError(f"stripe must be 1 unless layout is 'striped'. Got {self.stripe} for {self.layout!r}.")
        devices = self.slice.num_devices
        if self.ring > devices:
            raise ValueError(f"ring must be at most {devices}, the devices of {self.slice.name}. Got {self.ring}.")
        if self.slice.platform == "gpu" and self.device_order != "ring_mesh":
            raise ValueError(
                f"device_order must be 'ring_mesh' for GPUs, which have no coordinates to order them by. Got "
                f"{self.device_order!r}."
            )
        unit = self.layout_object.unit(self.ring)
        if self.seq_len % unit:
            raise ValueError(
                f"seq_len must be a multiple of {unit} for layout {self.layout!r} on a ring of {self.ring}. "
                f"Got {self.seq_len}."
            )
        check_window(self.window, self.is_causal)
        self._check_promises()
        self._check_strategies()
        self.config()

    def _check_axes(self) -> None:
        if isinstance(self.axes, list):
            object.__setattr__(self, "axes", tuple(self.axes))
        fit = isinstance(self.axes, tuple) and all(
            isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in self.axes
        )
        if not fit:
            raise ValueError(f"axes must be a tuple of positive integers. Got {self.axes!r}.")

    def _check_promises(self) -> None:
        for name in ("max_segment_length", "shared_length"):
            if getattr(self, name) is not None and not self.segments:
                raise ValueError(f"segments must be True with {name}, a promise about them. Got False.")
        check_max_segment_length(self.max_segment_length, self.segments)
        check_fits_shard(check_shared_length(self.shared_length, self.segments, len(self.axes)), self.shard_length)

    def _check_strategies(self) -> None:
        if isinstance(self.strategy, list):
            object.__setattr__(self, "strategy", tuple(self.strategy))
        for word in (self.strategy,) if isinstance(self.strategy, str) else self.strategy:
            if word not in STRATEGIES:  # nor "auto": what it stands for depends on the devices
                raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}. Got {word!r}.")
        if not isinstance(self.strategy, str) and len(self.strategy) != len(self.axes):
            raise ValueError(
                f"strategy must be one word, or one for each of the axes {self.axes}. Got {self.strategy!r}."
            )
        if self.heads % self.heads_over:
            raise ValueError(
                f"heads must be a multiple of {self.heads_over}, the devices on axes of strategy 'all_to_all'. "
                f"Got {self.heads}."
            )
        if isinstance(self.slice, Slices) and (self.axes[0], self.ring) != (self.slice.number, self.slice.num_devices):
            raise ValueError(
                f"axes must begin with the {self.slice.number} slices of {self.slice.name} and have all "
                f"{self.slice.num_devices} devices. Got {self.axes}."
            )

    @property
    def slice(self) -> Topology:
        return parse_topology(self.topology)

    @property
    def layout_object(self) -> Layout:
        return Striped(self.stripe) if self.layout == "striped" else as_layout(self.layout)

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right): a query at p attends to keys in [p - left, p + right]."""
        return check_window(self.window, self.is_causal)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """The same, no farther than a segment that keeps its promise is long."""
        return within_segments(*self.bounds, self.max_segment_length)

    @property
    def shard_length(self) -> int:
        return self.seq_len // self.ring

    @property
    def side_by_side(self) -> int:
        """Groups of devices with a sequence each; 1 where they do not divide, and the rest is left alone."""
        devices = self.slice.num_devices
        return devices // self.ring if devices % self.ring == 0 else 1

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    def config(self) -> RingConfig:
        return RingConfig(
            implementation=self.implementation,
            block_q=self.block_q,
            block_kv=self.block_kv,
            unroll=self.unroll,
            dkv_dtype=self.dkv_dtype,
            strategy=self.strategy,
            direction=self.direction,
            rings=self.rings,
        )

    @property
    def words(self) -> tuple[str, ...]:
        """The strategy of each axis."""
        return (self.strategy,) * len(self.axes) if isinstance(self.strategy, str) else self.strategy

    @property
    def heads_over(self) -> int:
        """Devices that share the heads of the same tokens."""
        return math.prod(size for size, word in zip(self.axes, self.words, strict=True) if word == "all_to_all")

    @property
    def kv_heads_here(self) -> int:
        """K/V heads of a device once tokens are exchanged for heads: those that its query heads use."""
        found = self.kv_heads
        for size, word in zip(self.axes, self.words, strict=True):
            found //= math.gcd(found, size) if word == "all_to_all" else 1
        return found

    @functools.cached_property
    def sharing(self) -> Sharing:
        """What ring_attention makes of the strategies."""
        length = self.shard_length
        shared = check_shared_length(self.shared_length, self.segments, len(self.axes))
        return share(self.layout_object, self.axes, self.words, length, length, *self.reach, shared)

    def schedule(self) -> Schedule:
        """The hops that ring_attention plans for this call, on the outermost of its rings."""
        return self.sharing.schedule or full_schedule(())

    @property
    def both(self) -> bool:
        """Half of every block goes each way round: not where a window leaves something out."""
        return self.direction == "both" and self.sharing.several_ways

    def num_rotations(self, schedule: Schedule | None = None) -> int:
        """Rotations of K/V along all axes in the forward pass; the backward pass makes as many."""
        schedule = self.schedule() if schedule is None else schedule
        inner = (hop.inner for hop in schedule.hops if hop.inner is not None)
        return schedule.num_rotations + sum(self.num_rotations(each) for each in inner)

    def with_ring(self, ring: int) -> "Program":
        """The same on another number of devices; with several axes it is the outermost that changes."""
        inner = math.prod(self.axes[1:])
        if ring % inner:
            raise ValueError(f"sweep must be multiples of {inner}, the devices on the inner axes. Got {ring}.")
        return dataclasses.replace(self, ring=ring, axes=(ring // inner, *self.axes[1:]))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Program":
        tuples = {name: tuple(given) for name, given in fields.items() if isinstance(given, list)}
        return cls(**{**fields, **tuples})

    def macs(self, pairs: int, *, backward: bool) -> int:
        """Multiply-adds for so many (query, key) pairs of one batch row, all heads of a device: 2 products forward, 5
        backward."""
        keys, values = (3, 2) if backward else (1, 1)
        return (
            pairs * self.batch * (self.heads // self.heads_over) * (keys * self.head_dim + values * self.value_head_dim)
        )

    def array_bytes(self, heads: int, size: int, item_bytes: int) -> int:
        """Of one device's shard [B, L, heads, size]."""
        return math.prod((self.batch, self.shard_length, heads, size, item_bytes))
