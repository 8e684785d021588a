"""What `ringjax demo` asks of a compiler by default: each version of JAX has one of its own."""

import jax
import pytest

from ringjax import demo


@pytest.mark.parametrize("length", [2**15, 2**17])
def test_memory_of_dense_attention(length: int) -> None:
    """At least the logits, T x S in float32 for each head, and a few times as much at most."""
    logits = 4 * demo.HEADS * (length - 1) ** 2
    assert logits <= demo.dense_memory(jax.devices("cpu")[0], length) < 8 * logits
