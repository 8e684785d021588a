"""Flax Linen layers on ring attention. Needs flax."""

from .layers.linen_attention import RingAttention as RingAttention
