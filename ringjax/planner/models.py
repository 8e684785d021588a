"""What the planner needs to know of a model: heads, their size, layers. By name, from a configuration, or given.

Sources: the config.json that each model's authors publish beside the weights.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import shipped


@dataclasses.dataclass(frozen=True)
class Model:
    """The attention of a decoder.

    Attributes:
      name: as it was given.
      num_heads, num_kv_heads: N and K.
      head_dim: D, of queries, keys and values.
      num_layers: with attention.
      window: tokens before itself that a token attends to, in every layer; None: all.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    window: int | None = None


# Of models that mix windows with full attention (gemma3) the full layers decide: all layers are counted as such.
_TABLE = (
    Model("llama2-7b", 32, 32, 128, 32),
    Model("llama2-13b", 40, 40, 128, 40),
    Model("llama2-70b", 64, 8, 128, 80),
    Model("llama3-8b", 32, 8, 128, 32),
    Model("llama3-70b", 64, 8, 128, 80),
    Model("llama3-405b", 128, 8, 128, 126),
    Model("llama3.2-1b", 32, 8, 64, 16),
    Model("llama3.2-3b", 24, 8, 128, 28),
    Model("mistral-7b", 32, 8, 128, 32),
    Model("qwen2.5-7b", 28, 4, 128, 28),
    Model("qwen2.5-32b", 40, 8, 128, 64),
    Model("qwen2.5-72b", 64, 8, 128, 80),
    Model("qwen3-0.6b", 16, 8, 128, 28),
    Model("qwen3-1.7b", 16, 8, 128, 28),
    Model("qwen3-4b", 32, 8, 128, 36),
    Model("qwen3-8b", 32, 8, 128, 36),
    Model("qwen3-14b", 40, 8, 128, 40),
    Model("qwen3-32b", 64, 8, 128, 64),
    Model("gemma2-2b", 8, 4, 256, 26),
    Model("gemma2-9b", 16, 8, 256, 42),
    Model("gemma2-27b", 32, 16, 128, 46),
    Model("gemma3-1b", 4, 1, 256, 26),
    Model("gemma3-4b", 8, 4, 256, 34),
    Model("gemma3-12b", 16, 8, 256, 48),
    Model("gemma3-27b", 32, 16, 128, 62),
)
MODELS = {model.name: model for model in _TABLE}


def find_model(model: str | Sequence[int] | Model) -> Model:
    """A model by name, as "N,K,D,layers" or four integers, or from the [model] table of a training configuration:
    a file, or the name of one that ships.

    Raises:
      ValueError: for what is none of these, and for numbers that make no model.
    """
    if isinstance(model, Model):
        return _checked(model)
    if isinstance(model, str):
        if model in MODELS:
            return MODELS[model]
        if model.endswith(".toml"):
            return _from_file(Path(model))
        if model in (names := shipped()):
            return _from_file(names[model])
        if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){3}", model):
            model = [int(part) for part in model.split(",")]
    if isinstance(model, str) or not isinstance(model, Sequence) or len(model) != 4:
        near = difflib.get_close_matches(str(model), MODELS, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}; a training configuration, a file or the name of "
            "one that ships, as v5p_256_1m; or "
            f"N,K,D,layers, as 32,8,128,32. Got {model!r}{hint}."
        )
    return _checked(Model(",".join(map(str, model)), *model))


def _checked(model: Model) -> Model:
    for field in ("num_heads", "num_kv_heads", "head_dim", "num_layers"):
        value = getattr(model, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"model: {field} must be a positive integer. Got {value!r}.")
    if model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model: num_heads must be a multiple of num_kv_heads, {model.num_kv_heads}. Got {model.num_heads}."
        )
    return model


# What a key stands for where a training configuration leaves it out (ringjax/training/config.py; a test compares).
DEFAULTS = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}


def _from_file(path: Path) -> Model:
    try:
        with path.open("rb") as file:
            table: Any = tomllib.load(file).get("model", {})
    except OSError as error:
        raise ValueError(f"model must be a file that can be read. Got {str(path)!r}: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"model must be a file in TOML. Got {str(path)!r}: {error}.") from None
    if not isinstance(table, dict):
        raise ValueError(f"model: [model] of {path.name} must be a table. Got {table!r}.")
    if "init_from" in table:
        raise ValueError(
            f"model: {path.name} must give the sizes in [model]: those of init_from are in other files, so say "
            f"N,K,D,layers instead. Got init_from = {table['init_from']!r}."
        )
    sizes = {key: table.get(key, default) for key, default in DEFAULTS.items()}
    return _checked(Model(path.name, window=table.get("local_window_size"), **sizes))
