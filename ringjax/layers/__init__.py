"""Flax layers on ring attention, and what they share. Public through the faces ringjax.nnx and ringjax.linen."""
