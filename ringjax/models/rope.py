"""RoPE of config.json, in the form of transformers 4 (rope_theta, rope_scaling) and of 5 (rope_parameters)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..layers.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from .errors import ModelError

if TYPE_CHECKING:
    from .families import Keys


def read_rope(
    keys: Keys, layer_type: str | None = None, *, theta_key: str = "rope_theta", theta: float = 10000.0
) -> RopeConfig:
    """The rotary embedding of all layers, or of the layers of one type.

    Args:
      keys: of config.json.
      layer_type: as in rope_parameters.
      theta_key: where the older form has the base.
      theta: the base where the file does not say.
    """
    given = keys.take("rope_parameters", None)
    if given is not None and not isinstance(given, Mapping):
        raise ModelError(f"{keys.file}: rope_parameters must be a table. Got {given!r}.")
    if given is not None and layer_type is not None and "rope_theta" not in given and "rope_type" not in given:
        given = given.get(layer_type, {})
    older = keys.take(theta_key, theta)
    scaled = keys.take("rope_scaling", None)
    if keys.take("partial_rotary_factor", 1.0) != 1:
        raise ModelError(f"{keys.file}: partial_rotary_factor must be 1 in this family: whole heads turn.")
    if given is None:
        # The local layers of Gemma 3 are never scaled.
        given = {} if layer_type == "sliding_attention" else scaled or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"{keys.file}: rope_scaling must be a table. Got {given!r}.")
    values = dict(given)
    if values.pop("partial_rotary_factor", 1.0) != 1:
        raise ModelError(f"{keys.file}: partial_rotary_factor must be 1 in this family: whole heads turn.")
    base = values.pop("rope_theta", None)
    scaling = _read_scaling(keys, values)
    try:
        return RopeConfig(theta=older if base is None else base, scaling=scaling)
    except ValueError as error:
        raise ModelError(f"{keys.file}: rope_{error}") from error


def _read_scaling(keys: Keys, values: dict[str, Any]) -> RopeScaling | None:
    older = values.pop("type", None)
    kind = values.pop("rope_type", older) or "default"
    known = ("default", "linear", "dynamic", "llama3", "yarn")
    if kind not in known:
        names = ", ".join(map(repr, known))
        raise ModelError(f"{keys.file}: rope_type must be one of {names}. Got {kind!r}.")
    longest = keys.take("max_position_embeddings", None)

    def take(key: str, *default: Any) -> Any:
        value = values.pop(key, None)
        if value is None and not default:
            raise ModelError(f"{keys.file}: RoPE of type {kind!r} must have the key {key!r}. Got none.")
        return default[0] if value is None else value

    try:
        scaling: RopeScaling | None = None
        if kind == "linear":
            scaling = LinearScaling(factor=take("factor"))
        elif kind == "dynamic":
            # The length that the file as a whole names, whatever this table says.
            values.pop("original_max_position_embeddings", None)
            scaling = DynamicScaling(factor=take("factor"), original_length=longest)
        elif kind == "llama3":
            scaling = Llama3Scaling(
                factor=take("factor"),
                low_freq_factor=take("low_freq_factor"),
                high_freq_factor=take("high_freq_factor"),
                original_length=take("original_max_position_embeddings"),
            )
        elif kind == "yarn":
            scaling = _read_yarn(take, longest)
    except ModelError:
        raise
    except (ValueError, TypeError) as error:
        raise ModelError(f"{keys.file}: RoPE of type {kind!r}: {error}") from error
    for key, value in values.items():
        if value is not None and kind != "default":
            raise ModelError(
                f"{keys.file}: {key} must be absent for RoPE of type {kind!r}: it is not honoured. Got {value!r}."
            )
    return scaling


def _read_yarn(take: Any, longest: int | None) -> YarnScaling:
    original = take("original_max_position_embeddings", longest)
    factor = take("factor", None if longest is None else longest / original)
    attention, mscale, over_all = (take(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and mscale and over_all and factor > 1:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * over_all * math.log(factor) + 1)
    return YarnScaling(
        factor=factor,
        original_length=original,
        beta_fast=take("beta_fast", 32),
        beta_slow=take("beta_slow", 1),
        attention_factor=attention,
        truncate=take("truncate", True),
    )


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Keys of config.json, in the older form, which every version of transformers reads.

    Raises:
      ModelError: config.json has no name for this scaling.
    """
    if rope.rotary_dim is not None:
        raise ModelError(f"rotary_dim must be None in config.json of these families. Got {rope.rotary_dim}.")
    scaling = rope.scaling
    given: dict[str, Any] = {"rope_theta": rope.theta}
    table: dict[str, Any]
    match scaling:
        case None:
            return given
        case LinearScaling():
            table = {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            table = {"rope_type": "dynamic", "factor": scaling.factor}
            given["max_position_embeddings"] = scaling.original_length
        case Llama3Scaling():
            table = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling():
            table = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            if scaling.attention_factor is not None:
                table["attention_factor"] = scaling.attention_factor
        case _:
            raise ModelError(f"rope_scaling must be one that config.json has a name for. Got {scaling}.")
    return given | {"rope_scaling": table}
