"""GGUF files: metadata as fields of DecoderConfig, and tensors, dequantised one at a time."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..layers.decoder_config import LayerKind
from ..layers.rope_scaling import FrequencyDivisors, LinearScaling, RopeConfig, RopeScaling, YarnScaling
from .errors import ModelError, need
from .gguf_header import read_header

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
_FREQUENCIES = "rope_freqs.weight"
_SILENT = frozenset({"context_length", "vocab_size"})
# The models of these depths divide by the features of a head that their width would give, not by the head's size.
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}


class GgufFile:
    """Metadata and tensors of a file; a tensor is read when it is asked for, and only then."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._header = read_header(path)
        except (OSError, ValueError, OverflowError) as error:
            raise ModelError(f"{path} must be a whole GGUF file of version 2 or 3. Got: {error}.") from error
        self._taken: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        """A value of the metadata; without a default it must be there."""
        self._taken.add(key)
        value = self._header.metadata.get(key)
        if value is not None:
            return value
        if default:
            return default[0]
        raise ModelError(f"{self.path} must have the key {key!r}. Got none.")

    def left_over(self, prefix: str) -> dict[str, Any]:
        """What nobody took."""
        given = self._header.metadata.items()
        return {name: value for name, value in given if name.startswith(prefix) and name not in self._taken}

    def names(self) -> Collection[str]:
        return self._header.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[name].shape[::-1]  # GGUF counts from the innermost

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32."""
        gguf, info = need("gguf"), self._header.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(info.type)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{name} must have a type that the gguf package knows. Got type {info.type}.") from error
        *rows, columns = self.shape(name)
        shape = (*rows, columns // block * size)
        if columns % block or info.start + math.prod(shape) > self.path.stat().st_size:
            raise ModelError(f"{self.path} must be whole. It ends before {name} does.")
        data = np.memmap(self.path, np.uint8, "r", offset=info.start, shape=shape)
        try:
            return gguf.dequantize(data, kind).reshape(self.shape(name))
        except Exception as error:
            raise ModelError(
                f"{name} must have a type that the gguf package dequantises. Got {kind.name}: {error}."
            ) from error


class Weights:
    """The tensors of a model in a GGUF file, with the rows of query and key in the order of Hugging Face's files.

    Of the architecture llama they are stored for a RoPE that turns the pairs (x_{2i}, x_{2i+1}).
    """

    def __init__(self, file: GgufFile, heads: dict[str, int]):
        self._file, self._heads = file, heads  # heads: part -> number, of what is to be reordered

    def names(self) -> Collection[str]:
        return set(self._file.names()) - {_FREQUENCIES}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(name)

    def read(self, name: str) -> np.ndarray:
        x = self._file.read(name)
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), None)
        if heads is None:
            return x
        return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def open_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """Fields of a DecoderConfig, and the tensors.

    Raises:
      ModelError: an architecture or a key that is not supported, or a file that is none.
    """
    file = GgufFile(path)
    try:
        return _read(file)
    except ModelError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:  # a word where a number belongs, or a 0
        raise ModelError(f"{path} must have values as its architecture has them. Got: {error}.") from error


def _read(file: GgufFile) -> tuple[dict[str, Any], Weights]:
    path, name = file.path, file.take("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(f"{path}: general.architecture must be one of {', '.join(ARCHITECTURES)}. Got {name!r}.")

    def take(key: str, *default: Any) -> Any:
        return file.take(f"{name}.{key}", *default)

    for key in _SILENT:
        take(key, None)
    if take("expert_count", 0):
        raise ModelError(f"{path}: {name}.expert_count must be 0: mixtures of experts are not supported.")
    heads, embed = take("attention.head_count"), take("embedding_length")
    head_dim = take("attention.key_length", embed // heads if isinstance(heads, int) and heads else None)
    tensors = file.names()
    fields: dict[str, Any] = {
        "vocab_size": _vocab_size(file),
        "num_layers": take("block_count"),
        "embed_dim": embed,
        "num_heads": heads,
        "num_kv_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_dim": take("feed_forward_length"),
        "norm_eps": take("attention.layer_norm_rms_epsilon"),
        "tie_embeddings": "output.weight" not in tensors,
        "attention_bias": _bias(tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if take(key, head_dim) != head_dim:
            raise ModelError(f"{path}: {name}.{key} must be the size of a head, {head_dim}. Got {take(key)}.")
    rope = RopeConfig(theta=take("rope.freq_base", 1e6 if name == "gemma3" else 1e4), scaling=_scaling(file, take))
    fields |= {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
    if name.startswith("gemma"):
        fields |= _gemma(name, fields, take)
    left = file.left_over(f"{name}.")
    if left:
        key, value = next(iter(left.items()))
        raise ModelError(f"{path}: {key} must be absent: ringjax does not honour it. Got {value!r}.")
    counts = {"attn_q": heads, "attn_k": fields["num_kv_heads"]} if name == "llama" else {}
    return fields, Weights(file, counts)


def _vocab_size(file: GgufFile) -> int:
    if "token_embd.weight" not in file.names():
        raise ModelError(f"{file.path} must hold token_embd.weight. Got none: it has no weights of a decoder.")
    return file.shape("token_embd.weight")[0]


def _bias(tensors: Collection[str]) -> bool | str:
    if "blk.0.attn_q.bias" not in tensors:
        return False
    return True if "blk.0.attn_output.bias" in tensors else "qkv"


def _scaling(file: GgufFile, take: Any) -> RopeScaling | None:
    kind = take("rope.scaling.type", "none")
    if _FREQUENCIES in file.names():
        if kind != "none":
            raise ModelError(f"{file.path}: rope.scaling.type must be absent beside {_FREQUENCIES}. Got {kind!r}.")
        return FrequencyDivisors(divisors=tuple(float(x) for x in file.read(_FREQUENCIES).ravel()))
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{file.path}: rope.scaling.type must be none, linear or yarn. Got {kind!r}.")
    if kind == "none":
        return None
    factor = take("rope.scaling.factor")
    if kind == "linear":
        return LinearScaling(factor=factor)
    return YarnScaling(
        factor=factor,
        original_length=take("rope.scaling.original_context_length"),
        # The file's is a factor on YaRN's own.
        attention_factor=take("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1),
        beta_fast=take("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=take("rope.scaling.yarn_beta_slow", 1.0),
    )


def _gemma(name: str, fields: dict[str, Any], take: Any) -> dict[str, Any]:
    embed, heads, layers = (fields[key] for key in ("embed_dim", "num_heads", "num_layers"))
    divisor = embed / heads if (name, layers) in _SCALED_BY_WIDTH else fields["head_dim"]
    window = take("attention.sliding_window") - 1, 0  # the token itself is counted
    own = {
        "activation": "gelu_tanh",
        "post_norms": True,
        "embedding_scale": math.sqrt(embed),
        "attention_scale": divisor**-0.5,
        "logits_soft_cap": take("attn_logit_softcapping", None),
        "output_soft_cap": take("final_logit_softcapping", None),
    }
    if name == "gemma2":
        return own | {"layer_pattern": (LayerKind(local_window_size=window), LayerKind())}
    near = LayerKind(local_window_size=window, rope=RopeConfig(theta=take("rope.freq_base_swa", 1e4)))
    every = take("attention.sliding_window_pattern", 6)
    if not isinstance(every, int) or every < 1:
        raise ModelError(f"gemma3.attention.sliding_window_pattern must be a positive integer. Got {every!r}.")
    return own | {"layer_pattern": (near,) * (every - 1) + (LayerKind(),)}
