"""What a run trains: the decoder that `[model]` describes, or the one in the files that it names; and its tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ringjax import models
from ringjax.nnx import DecoderConfig

from . import program
from .config import NUM_BYTES, Config
from .data import Corpus, DataError
from .loading import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A decoder, not yet made, and who makes its tokens."""

    decoder: DecoderConfig
    tokenizer: models.Tokenizer | None  # None: bytes, or ids that the files hold
    notes: list[str]  # what there is to tell


def resolve(config: Config) -> Subject:
    """Reads the architecture and the tokenizer; no weights.

    Raises:
      ConfigError: a path that names no model or no tokenizer, sizes that do not fit the mesh, or a vocabulary that does
        not cover the tokenizer's.
    """
    model, notes = config.model, []
    if model.init_from is None:
        tokenizer = _tokenizer("data.tokenizer", config.data.tokenizer)
        decoder = program.decoder_config(config, NUM_BYTES if tokenizer is None else tokenizer.vocab_size)
        owner = "model.vocab_size"
    else:
        decoder = _architecture(config)
        _check_mesh(config, decoder)
        tokenizer, notes = _beside(config)
        owner = f"the vocabulary of model.init_from = {model.init_from!r}"
    if tokenizer is not None and tokenizer.vocab_size > decoder.vocab_size:
        raise ConfigError(
            f"data.tokenizer: must fit {owner}, {decoder.vocab_size} ids. "
            f"Got {config.data.tokenizer or model.init_from} with {tokenizer.vocab_size}."
        )
    return Subject(decoder=decoder, tokenizer=tokenizer, notes=notes)


def check_tokens(corpus: Corpus, config: Config, decoder: DecoderConfig) -> None:
    """Raises DataError where the files hold ids that the decoder does not know."""
    largest = int(corpus.text.max())
    if largest >= decoder.vocab_size:
        owner = "model.vocab_size" if config.model.init_from is None else "the vocabulary of model.init_from"
        raise DataError(f"data.paths: must hold ids below {owner}, {decoder.vocab_size}. Got {largest}.")


def load_state(config: Config, made: program.Functions) -> program.TrainState:
    """The state before the first step, with the weights of `model.init_from`, each read to where its shards belong.

    Raises:
      ConfigError: the weights are not those of the architecture, or do not fit the memory.
    """
    path = config.model.init_from
    held = jax.tree.leaves(made.state.params)[0].dtype.name  # masters come from the file, not from rounded parameters
    options = _options(config) | {"param_dtype": held}
    try:
        decoder = models.load(str(path), mesh=made.mesh, **options)  # pyright: ignore[reportArgumentType]
        return made.begin(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), donate=True)
    except models.ModelError as error:
        raise _refusal("model.init_from", error) from error
    except jax.errors.JaxRuntimeError as error:
        said = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise ConfigError(f"model.init_from: {path} must fit the memory of the devices. Got: {said}.") from error


def _options(config: Config) -> dict[str, Any]:
    model = config.model
    beside = {name: getattr(model, name) for name in ("loss_chunk", "remat", "dtype", "param_dtype")}
    return beside | program.placing(config)


def _architecture(config: Config) -> DecoderConfig:
    try:
        return models.config_of(str(config.model.init_from), **_options(config))
    except models.ModelError as error:
        raise _refusal("model.init_from", error) from error


def _check_mesh(config: Config, decoder: DecoderConfig) -> None:
    for name in ("num_heads", "num_kv_heads", "mlp_dim"):
        size = getattr(decoder, name)
        if size % config.mesh.tensor:
            raise ConfigError(
                f"mesh.tensor: must divide {name} = {size} of model.init_from = {config.model.init_from!r}. "
                f"Got {config.mesh.tensor}."
            )


def _beside(config: Config) -> tuple[models.Tokenizer | None, list[str]]:
    """The tokenizer of a run that starts from a pretrained model."""
    if config.data.tokenizer is not None:
        return _tokenizer("data.tokenizer", config.data.tokenizer), []
    try:
        return models.tokenizer(str(config.model.init_from)), []
    except models.ModelError as error:
        if config.data.source == "tokens":  # nothing is to be encoded
            return None, [f"no tokenizer: {error}"]
        raise ConfigError(
            f"data.tokenizer: must name a tokenizer where there is none beside model.init_from. Got none: {error}"
        ) from error


def _tokenizer(key: str, path: str | None) -> models.Tokenizer | None:
    if path is None:
        return None
    if not Path(path).exists():
        raise ConfigError(f"{key}: must be a Hugging Face directory or a GGUF file. Got {path}, where there is none.")
    try:
        return models.tokenizer(path)
    except models.ModelError as error:
        raise _refusal(key, error) from error


def _refusal(key: str, error: Exception) -> ConfigError:
    return ConfigError(f"{key}: {str(error).removeprefix('path ')}")
