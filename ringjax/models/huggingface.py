"""Directories of Hugging Face: config.json and safetensors, one file or several with an index."""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import ModelError, need

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _DTYPES.items()}
SHARD_BYTES = 5 * 10**9


def read_json(path: Path) -> dict[str, Any]:
    """A table."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} must hold {path.name}. Got none.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be JSON. Got: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must be a table. Got {type(value).__name__}.")
    return value


class SafetensorsSource:
    """The tensors of a directory. A tensor is read when it is asked for, and only then."""

    def __init__(self, folder: Path):
        opened = need("safetensors").safe_open
        files = _weight_files(folder)
        self._where: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for name in sorted(set(files)):
            try:
                file = opened(folder / name, framework="numpy")
                self._files[name] = file
            except Exception as error:  # the package's error is no subclass of anything narrower
                raise ModelError(f"{folder / name} must be a whole safetensors file. Got: {error}.") from error
            for key in file.keys():  # noqa: SIM118  not a dict
                if key in self._where:
                    raise ModelError(f"{folder}: {key} must lie in one file. Got {self._where[key]} and {name}.")
                self._where[key] = name

    def names(self) -> Collection[str]:
        # Angles that old files keep as a buffer; they are computed here.
        return {name for name in self._where if not name.endswith("rotary_emb.inv_freq")}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise ModelError(f"{name} must have a dtype of {', '.join(_DTYPES)}. Got {code}.")
        return self._files[self._where[name]].get_tensor(name)

    def drop_copy(self, name: str, original: str) -> None:
        """Forget a tensor, if it is there, that must be a copy of another one."""
        if name not in self._where or original not in self._where:
            return
        if self.shape(name) != self.shape(original) or not np.array_equal(self.read(name), self.read(original)):
            raise ModelError(f"{name} must equal {original}: config.json says that they are tied. Got another table.")
        del self._where[name]

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise ModelError(f"{folder / INDEX} must have a weight_map. Got none.")
        files = sorted(set(table.values()))
        absent = [name for name in files if Path(name).name != name or not (folder / name).exists()]
        if absent:
            raise ModelError(f"{folder} must hold {absent[0]}, which {INDEX} names. Got none.")
        return files
    if (folder / SINGLE).exists():
        return [SINGLE]
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.gguf"))
    shown = f" only {others[0]}" if others else " none"
    raise ModelError(f"{folder} must hold {SINGLE} or {INDEX}. Got{shown}.")


def write_safetensors(
    folder: Path, sizes: Iterable[tuple[str, str, tuple[int, ...]]], arrays: Iterator[np.ndarray]
) -> None:
    """Files of at most SHARD_BYTES each, and the index of several. One tensor is on the host at a time.

    Args:
      sizes: (name, dtype, shape) of every tensor.
      arrays: the tensors, in that order.
    """
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, dtype, shape in sizes:
        length = int(np.prod(shape, dtype=np.int64)) * (
            2 if dtype in ("bfloat16", "float16") else 4 * (1 + (dtype == "float64"))
        )
        if filled and filled + length > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [filled, filled + length]}
        filled, total = filled + length, total + length
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file_name, header in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            _write_header(file, header)
            for entry in header.values():
                data = np.ascontiguousarray(next(arrays)).reshape(-1).view(np.uint8)
                assert data.size == entry["data_offsets"][1] - entry["data_offsets"][0]
                file.write(data.data)
    if count > 1:
        where = {name: file for file, header in zip(names, shards, strict=True) for name in header}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_header(file: BinaryIO, entries: dict[str, Any]) -> None:
    """Its length in 8 bytes, then JSON, padded so that the data start at a multiple of 8."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
