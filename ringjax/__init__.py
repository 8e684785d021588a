"""ringjax: exact attention over a sequence that is sharded across devices."""

from .adapters import attention_fn as attention_fn
from .attention import ring_attention as ring_attention
from .config import RingConfig as RingConfig
from .layout import Contiguous as Contiguous
from .layout import Layout as Layout
from .layout import Striped as Striped
from .layout import Zigzag as Zigzag
from .layout import from_ring_order as from_ring_order
from .layout import ring_positions as ring_positions
from .layout import to_ring_order as to_ring_order
from .mesh import ring_mesh as ring_mesh
from .partial import merge_partials as merge_partials

__version__ = "0.1.0"
