"""Records the peak memory of compiled programs for machines without the compilers: python tests/record_peaks.py

tests/data/peaks.json is what tests/test_planner_costs.py holds the memory of the planner against. Needs
pip install "ringjax[tpu]" for TPUs, "ringjax[cuda]" for GPUs, no accelerator. A program takes some ten seconds; what is
recorded already is not compiled again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringjax.inspect.compile import compile_ring
from ringjax.inspect.program import Program

DATA = Path(__file__).parent / "data" / "peaks.json"
# Axes and words.
WAYS = (
    ((8,), ("ring",)),
    ((8,), ("all_gather",)),
    ((8,), ("all_to_all",)),
    ((2, 4), ("ring", "all_to_all")),
    ((4, 2), ("ring", "all_to_all")),
    ((2, 4), ("ring", "all_gather")),
    ((2, 4), ("all_gather", "all_to_all")),
    ((2, 4), ("ring", "ring")),
)
HEADS = ((32, 8), (16, 16), (8, 1))
TOKENS = 8192  # of a shard


def programs() -> Iterator[dict[str, Any]]:
    """Fields of a Program: those by which the terms were chosen, then others, for which one of them was added."""
    for topology in ("v5p:2x2x2", "h100:8"):
        for axes, words in WAYS:
            for heads in HEADS if words != ("ring", "ring") else HEADS[:1]:
                for backward in (False, True):
                    yield fields(topology, axes, words, heads, backward)
    for backward in (False, True):
        for axes, words in WAYS[:4]:
            yield fields("v5e:2x4", axes, words, (24, 4), backward, head_dim=64)
        yield fields("v6e:2x4", (8,), ("ring",), (8, 8), backward, dtype="float32")
        yield fields("v5p:2x2x2", (8,), ("ring",), (32, 8), backward, batch=3, seq_len=8 * 2048)
        for words in ("ring", "all_to_all"):
            yield fields("h100:2", (2,), (words,), (32, 8), backward, ring=2, seq_len=2 * TOKENS)


def fields(
    topology: str, axes: tuple[int, ...], words: tuple[str, ...], heads: tuple[int, int], backward: bool, **more: Any
) -> dict[str, Any]:
    found = {
        "topology": topology, "ring": 8, "axes": axes, "strategy": words, "seq_len": 8 * TOKENS, "heads": heads[0],
        "kv_heads": heads[1], "head_dim": 128, "is_causal": True, "backward": backward, **more,
    }  # fmt: skip
    return {**found, "value_head_dim": found["head_dim"]}


def key(program: dict[str, Any]) -> str:
    return json.dumps(program, sort_keys=True)


def main() -> None:
    known = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else []
    recorded = {key(row["program"]): row for row in known}
    for program in programs():
        if key(program) in recorded:
            continue
        try:
            compiled = compile_ring(Program(**program), timeout=1200)
        except Exception as error:  # the compiler for this platform is not installed
            print(key(program), error)
            continue
        row = {"program": program, "peak_bytes": compiled.peak_bytes, "versions": compiled.versions}
        recorded[key(program)] = row
        rows = [recorded[key(one)] for one in programs() if key(one) in recorded]
        DATA.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n", encoding="utf-8")
        print(key(program), compiled.peak_bytes, flush=True)


if __name__ == "__main__":
    main()
