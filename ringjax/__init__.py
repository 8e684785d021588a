"""ringjax: exact attention over a sequence that is sharded across devices.

``ringjax.nnx`` and ``ringjax.linen``, the layers, ``ringjax.models``, pretrained weights for them, and
``ringjax.training`` are imported when they are first asked for: they need Flax.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from .adapters import attention_fn as attention_fn
from .attention import ring_attention as ring_attention
from .cache import KVCache as KVCache
from .cache import cached_attention as cached_attention
from .config import RingConfig as RingConfig
from .exchange import merge_over_axis as merge_over_axis
from .layout import Contiguous as Contiguous
from .layout import Layout as Layout
from .layout import Striped as Striped
from .layout import Zigzag as Zigzag
from .layout import from_ring_order as from_ring_order
from .layout import ring_positions as ring_positions
from .layout import to_ring_order as to_ring_order
from .mesh import ring_mesh as ring_mesh
from .packing import pack as pack
from .partial import merge_partials as merge_partials
from .planner import Plan as Plan
from .planner import plan as plan
from .promises import check_segments as check_segments
from .targets import shift_targets as shift_targets

__version__ = "0.2.0"

if TYPE_CHECKING:
    from . import linen as linen
    from . import models as models
    from . import nnx as nnx
    from . import training as training
else:  # a __getattr__ that a type checker sees would allow it any name
    _LAZY = ("linen", "models", "nnx", "training")

    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY})
