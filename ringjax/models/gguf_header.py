"""The header of a GGUF file: metadata, and where each tensor lies.

Read here, not by the gguf package, whose reader makes several arrays for every token of the vocabulary: seconds for a
small model. Little-endian files of versions 2 and 3.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # of the data, unless the file has another


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Attributes: shape, from the innermost axis outwards; type, its number in GGML; start, a byte of the file."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The header.

    Raises:
      ValueError: the file is no GGUF, is cut short within the header, or is of another version.
    """
    with open(path, "rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def header(self) -> Header:
        magic = self._bytes(4)
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}")
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._string()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))
            places[name] = shape, self._number("I"), self._number("Q")
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(self._at / alignment) * alignment
        found = {
            name: TensorInfo(shape=shape, type=kind, start=start + offset)
            for name, (shape, kind, offset) in places.items()
        }
        return Header(metadata=metadata, tensors=found)

    def _bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ValueError("it is cut short")
        found = self._data[self._at : end]
        self._at = end
        return found

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value has type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            code = f"<{count}{_NUMBERS[inner]}"
            return list(struct.unpack(code, self._bytes(struct.calcsize(code))))
        return [self._value(inner) for _ in range(count)]
