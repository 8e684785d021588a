"""Figures for people: bytes in words."""


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves fewest digits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
