"""The ring to be compiled: its sizes, checked, and what one device holds of it. Written to and read from JSON."""

import dataclasses
import math
from typing import Any

from ..arguments import check_window
from ..config import RingConfig
from ..layout import Layout, Striped, as_layout
from ..schedule import Schedule, plan
from .topology import Topology, parse_topology

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(_ITEM_BYTES)
DEVICE_ORDERS = ("ring_mesh", "make_mesh")


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of ring_attention for a topology, see :func:`ringjax.inspect.inspect_ring`."""

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
    backward: bool = False
    implementation: str | None = None
    block_q: int | None = None
    block_kv: int | None = None
    unroll: int | None = None
    dkv_dtype: str = "float32"
    device_order: str = "ring_mesh"

    def __post_init__(self) -> None:
        for name in ("ring", "seq_len", "heads", "kv_heads", "head_dim", "value_head_dim", "batch", "stripe"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer. Got {value!r}.")
        for name, allowed in (("dtype", DTYPES), ("device_order", DEVICE_ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {getattr(self, name)!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, {self.kv_heads}. Got {self.heads}.")
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
        self.config()

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
    def shard_length(self) -> int:
        return self.seq_len // self.ring

    @property
    def rings(self) -> int:
        """Rings side by side; 1 where the devices do not divide, and the rest of the slice is left alone."""
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
        )

    def schedule(self) -> Schedule:
        """The hops that ring_attention plans for this call."""
        left, right = self.bounds
        length = self.shard_length
        return plan(self.ring, self.layout_object, length, length, left=left, right=right)

    def with_ring(self, ring: int) -> "Program":
        return dataclasses.replace(self, ring=ring)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Program":
        window = fields["window"]
        return cls(**{**fields, "window": None if window is None else tuple(window)})

    def macs(self, pairs: int, *, backward: bool) -> int:
        """Multiply-adds for so many (query, key) pairs of one batch row, all heads: 2 products forward, 5 backward."""
        keys, values = (3, 2) if backward else (1, 1)
        return pairs * self.batch * self.heads * (keys * self.head_dim + values * self.value_head_dim)

    def array_bytes(self, heads: int, size: int, item_bytes: int) -> int:
        """Of one device's shard [B, L, heads, size]."""
        return math.prod((self.batch, self.shard_length, heads, size, item_bytes))
