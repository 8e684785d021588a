"""Does more context help? The perplexity of a text by position in the context, in numbers and as a picture."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..files import replacing
from ..layers import checks
from ..layers.decoder import Decoder
from ..layout import as_layout, from_ring_order, padded_length, to_ring_order

_FIRST = 64  # the first range of positions ends here; each later one is twice as long


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Tokens that have at least ``start`` and fewer than ``stop`` tokens before them in their sequence.

    Attributes:
      start, stop: tokens before.
      tokens: how many there are.
      loss: their mean cross entropy, in nats per token.
    """

    start: int
    stop: int
    tokens: int
    loss: float  # mean cross entropy, nats per token

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def perplexity(decoder: Decoder, ids: Sequence[int], *, sequence_length: int) -> tuple[Range, list[Range]]:
    r"""Cuts a text into sequences and measures how well each token is predicted from those before it.

    .. math::  loss = -\frac{1}{n} \sum_t \log p(token_t \mid token_{<t}), \quad perplexity = \exp(loss)

    Args:
      decoder: on any mesh.
      ids: the text, at least two tokens.
      sequence_length: tokens of a sequence; the first token of each has no context and is not counted.

    Returns:
      Of all tokens together, and of each range of positions: [1, 64), [64, 128), [128, 256) and so on.

    Raises:
      ValueError: for a text that is too short, and ids outside the vocabulary.
    """
    checks.positive_integer("sequence_length", sequence_length)
    text = np.asarray(ids, np.int32)
    if text.ndim != 1 or text.size < 2 or sequence_length < 2:
        raise ValueError(
            f"ids must hold at least 2 tokens, and sequence_length be 2 or more. Got {text.size} and {sequence_length}."
        )
    vocab_size = decoder.config.vocab_size
    if text.min() < 0 or text.max() >= vocab_size:
        raise ValueError(f"ids must be in [0, {vocab_size}). Got {text.min()} to {text.max()}.")
    length = min(sequence_length, text.size)
    total, count = np.zeros(length), np.zeros(length, np.int64)
    for losses in _losses(decoder, text, length):
        total[1 : losses.size + 1] += losses
        count[1 : losses.size + 1] += 1
    edges = [1, _FIRST]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    ranges = [_range(total, count, start, min(stop, length)) for start, stop in zip(edges, edges[1:], strict=False)]
    return _range(total, count, 1, length), [each for each in ranges if each.tokens]


def _range(total: np.ndarray, count: np.ndarray, start: int, stop: int) -> Range:
    tokens = int(count[start:stop].sum())
    return Range(start=start, stop=stop, tokens=tokens, loss=float(total[start:stop].sum() / max(tokens, 1)))


def _losses(decoder: Decoder, text: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """For each sequence the cross entropy of its second token, its third and so on."""
    layout, placement = as_layout(decoder.config.layout), decoder._placement()
    shards = placement.num_shards or 1
    padded = padded_length(length, layout, shards)
    run = jax.jit(lambda decoder, tokens, targets: decoder.token_losses(tokens, targets))
    for start in range(0, text.size - 1, length):
        part = text[start : start + length]
        tokens, targets = np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32)
        tokens[0, : part.size], targets[0, : part.size - 1] = part, part[1:]
        dealt: Any = to_ring_order((tokens, targets), layout=layout, num_shards=shards)
        losses = from_ring_order(np.asarray(run(decoder, *dealt)), layout=layout, num_shards=shards)
        yield losses[0, : part.size - 1].astype(np.float64)


def plot(ranges: Sequence[Range], path: Path, *, title: str) -> None:
    """Draws the perplexity of each range over the number of tokens before, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend the user's matplotlibrc names
    axes = figure.subplots()
    edges = [each.start for each in ranges] + [ranges[-1].stop]
    axes.stairs([each.perplexity for each in ranges], edges, baseline=None, color="#1f4e79", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.set_title(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
