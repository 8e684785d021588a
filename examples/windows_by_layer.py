"""Packed documents through layers of which some attend to a window and others to the whole document.

Run ``python examples/windows_by_layer.py``: on all devices there are, or four that a CPU simulates. ``ringjax.pack``
puts whole documents into sequences so that every device works equally. Most documents are whole on one device. Those
that are not take the first ``shared_length`` places of each shard: with that promise only these keys travel, in layers
with a window and without. (``examples/packed_documents.py`` packs what a data loader delivers.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P

import ringjax

WINDOWS = (16, 16, None)  # of each layer: its tokens attend to so many before them; None: to all of their document
VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_SIZE, TOKENS_PER_DEVICE = 64, 32, 4, 2, 8, 64


def init(rng):
    normal = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
