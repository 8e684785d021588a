"""Draws the picture of the README from the figures beside this file: `python docs/draw.py`, from anywhere.

Left, memory per device that the compiler reports, written for each strategy in turn by

    ringjax inspect --topology v5p:4x4x2 --seq-len 131072 --heads 32 --kv-heads 8 --head-dim 128 --causal \\
        --pass backward --sweep 1,2,4,8,16,32 --strategy ring --json > docs/inspect_ring.json

Right, times of two GPUs, from the file that `ringjax bench ring --json docs/performance_ring.json` writes. The numbers
that are drawn are in the picture's description, where a test compares them with the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).parent
PICTURE = DOCS / "images" / "memory_and_time.svg"
DARK = DOCS / "images" / "memory_and_time_dark.svg"
STRATEGIES = ("ring", "all_to_all", "all_gather")
SHAPE, MASK, DIRECTION = "1 x 65536 x 32/8 x 128", "causal", "fwd+bwd"
BARS = {  # (program, kernel) in the file: the words in the picture
    ("one device", "FlashAttention-3"): "one GPU, FlashAttention-3",
    ("one device", "ringjax"): "one GPU, ringjax",
    ("plain Ulysses", "FlashAttention-3"): "Ulysses + FlashAttention-3",
    ("plain all-gather", "FlashAttention-3"): "all-gather + FlashAttention-3",
    ("all_to_all", "ringjax"): "ringjax, all_to_all",
    ("all_gather", "ringjax"): "ringjax, all_gather",
    ("ring", "ringjax"): "ringjax, ring",
}
LIGHT_INK = {"ink": "#1f2328", "faint": "#d1d9e0", "ring": "#0969da", "all_to_all": "#9a6700", "all_gather": "#59636e"}
DARK_INK = {"ink": "#e6edf3", "faint": "#3d444d", "ring": "#58a6ff", "all_to_all": "#d29922", "all_gather": "#9198a1"}


def read(name: str) -> Any:
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


def figures() -> dict[str, Any]:
    """What is drawn: GiB per device by strategy and number of devices, milliseconds by program."""
    memory = {}
    for strategy in STRATEGIES:
        rows = read(f"inspect_{strategy}.json")["memory"]["scaling"]
        memory[strategy] = [[row["ring"], round(row["peak_bytes"] / 2**30, 3)] for row in rows if row["peak_bytes"]]
    (group,) = (
        group
        for group in read("performance_ring.json")["groups"]
        if (group["shape"], group["mask"], group["direction"]) == (SHAPE, MASK, DIRECTION)
    )
    times = {(row["name"], row["kernel"]): row["milliseconds"] for row in group["rows"]}
    return {"gib_per_device": memory, "milliseconds": {words: round(times[key], 1) for key, words in BARS.items()}}


def draw(drawn: dict[str, Any], path: Path, colours: dict[str, str]) -> None:
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ringjax",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{name: colours["ink"] for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
        "axes.edgecolor": colours["faint"],
        "grid.color": colours["faint"],
        "grid.linewidth": 0.5,
    }
    with plt.rc_context(style):
        picture, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), width_ratios=(1, 0.85), layout="constrained")
        _memory(left, drawn["gib_per_device"], colours)
        _times(right, drawn["milliseconds"], colours)
        described = json.dumps(drawn, separators=(",", ":"))
        about = {"Title": "Memory per device, and time", "Description": described, "Date": None, "Creator": None}
        picture.savefig(path, transparent=True, metadata=about)
        plt.close(picture)


def _memory(axes: Any, memory: dict[str, list[list[float]]], colours: dict[str, str]) -> None:
    for strategy, points in memory.items():
        devices, gib = zip(*points, strict=True)
        axes.loglog(devices, gib, "o-", color=colours[strategy], markersize=4, linewidth=2 if strategy == "ring" else 1)
        where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(strategy, (devices[-1], gib[-1]), color=colours[strategy], **where)
    devices = [int(number) for number, _ in memory["ring"]]
    axes.set_xticks(devices, [str(number) for number in devices])
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlim(right=devices[-1] * 4)
    axes.set_xlabel("devices that share the sequence")
    axes.set_ylabel("GiB per device")
    axes.set_title("Memory, 131,072 tokens (TPU v5p)", fontsize=10, loc="left")


def _times(axes: Any, milliseconds: dict[str, float], colours: dict[str, str]) -> None:
    ours = [colours["ring"] if "ringjax" in words else colours["all_gather"] for words in milliseconds]
    bars = axes.barh(list(milliseconds), list(milliseconds.values()), color=ours, height=0.65)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlim(right=max(milliseconds.values()) * 1.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("milliseconds")
    axes.set_title("Time, 65,536 tokens (two H200s)", fontsize=10, loc="left")


def main() -> None:
    drawn = figures()
    draw(drawn, PICTURE, LIGHT_INK)
    draw(drawn, DARK, DARK_INK)


if __name__ == "__main__":
    main()
