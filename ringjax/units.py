"""Figures for people: bytes and seconds in words, tables."""

from collections.abc import Iterable, Iterator, Sequence


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves fewest digits."""
    for unit in ("B", "KiB", "MiB"):
        if float(f"{abs(num_bytes):.4g}") < 1024:  # as it would be printed
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def duration(seconds: float) -> str:
    """Seconds in the unit that leaves fewest digits."""
    seconds = float(f"{seconds:.3g}")  # first, so that 999.7 us become 1 ms
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * factor >= 1 or unit == "us":
            break
    return f"{seconds * factor:.3g} {unit}"


def table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Columns under each other: the first to the left, the rest to the right."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()
