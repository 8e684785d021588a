"""A Decoder, and its tokenizer -> a directory that transformers loads."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ..layers.decoder import Decoder
from ..layers.decoder_config import DecoderConfig
from .errors import ModelError
from .families import write_config
from .huggingface import CONFIG, write_json, write_safetensors
from .names import tensors
from .tokens import Tokenizer


def save(decoder: Decoder, path: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
    """Writes config.json and model.safetensors, several files of 5 GB where it is larger; and the tokenizer.

    The directory appears whole or not at all: it is written beside its place and renamed. One tensor is on the host at
    a time. Parameters are written in their own dtype. The family follows from the options: the first of Llama, Mistral,
    Qwen2, Qwen3, Gemma 2, Gemma 3 that has them all.

    Args:
      decoder: whose parameters this process can reach.
      path: of a directory that is empty or does not exist.
      tokenizer: of :func:`ringjax.models.tokenizer`: tokenizer.json, with its special tokens and chat template in
        tokenizer_config.json and generation_config.json. None writes none of the three.

    Raises:
      ModelError: a directory that is not empty, a decoder that no family has a name for, or a tokenizer with more
        tokens than the decoder has.
      NotImplementedError: parameters on devices of other processes.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"path must be an empty directory or none. Got {target}, which holds something.")
    check_savable(decoder.config, tokenizer=tokenizer)
    family, given = write_config(decoder.config)
    state = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(decoder))}
    if not all(isinstance(x, jax.Array) and x.is_fully_addressable for x in state.values()):
        raise NotImplementedError("decoder must have all its parameters on devices of this process. Got others.")
    wanted = list(tensors(decoder.config, family.scheme))

    def shape(tensor: object) -> tuple[int, ...]:
        return state[tensor.path].shape[0 if tensor.index is None else 1 :]  # type: ignore[attr-defined]

    def arrays() -> Iterator[np.ndarray]:
        for tensor in wanted:
            leaf = state[tensor.path]
            yield tensor.to_file(np.asarray(leaf if tensor.index is None else leaf[tensor.index]))

    sizes = [(t.name, state[t.path].dtype.name, t.file_shape(shape(t))) for t in wanted]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_json(scratch / CONFIG, given)
        if tokenizer is not None:
            tokenizer.write(scratch)
        write_safetensors(scratch, sizes, arrays())
        scratch.chmod(0o777 & ~_umask())
        scratch.rename(target)  # over an empty directory too
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_savable(config: DecoderConfig, *, tokenizer: Tokenizer | None = None) -> None:
    """Raises ModelError where :func:`save` would: for a decoder without a family, or a tokenizer that does not fit.

    Args:
      config: of the decoder.
      tokenizer: to be saved with it, or None.

    Raises:
      ModelError: see above.
    """
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ModelError(f"tokenizer must be a ringjax.models.Tokenizer. Got {type(tokenizer).__name__}.")
    words = config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > words:
        raise ModelError(f"tokenizer must fit the decoder's vocabulary of {words}. Got {tokenizer.vocab_size} ids.")
    write_config(config)


def _umask() -> int:
    """What mkdtemp passes over: its directories are for one user alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
