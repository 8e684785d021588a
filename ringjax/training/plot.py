"""metrics.jsonl -> loss.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import replacing


def plot_loss(records: Sequence[dict[str, Any]], path: Path, *, title: str, unit: str = "byte") -> None:
    """Draws loss by step, raw, smoothed and held-out, in nats (left) and bits (right); below it the learning rate.

    Args:
      records: of metrics.jsonl, at least one.
      path: the PNG.
      title: above the picture.
      unit: what the loss is of, "byte" or "token".
    """
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend the user's matplotlibrc names
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

    marker = "o" if len(steps) < 3 else None
    upper.plot(steps, losses, color="#9bb7d4", linewidth=1, marker=marker, label="each step")
    if len(steps) >= 20:
        window = max(5, len(steps) // 20)
        upper.plot(steps, _smooth(losses, window), color="#1f4e79", linewidth=2, label=f"mean of {window} steps")
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if held_out:
        upper.plot(*zip(*held_out, strict=True), color="#a03030", linewidth=1.5, marker="o", label="held out")
    upper.set_ylabel(f"loss (nats per {unit})")
    bits = upper.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda b: b * math.log(2)))
    bits.set_ylabel(f"bits per {unit}")
    upper.grid(alpha=0.3)
    upper.legend(frameon=False)
    upper.set_title(title)

    lower.plot(steps, [record["learning_rate"] for record in records], color="#b5651d", linewidth=1.5, marker=marker)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})  # the same bits for the same run


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
