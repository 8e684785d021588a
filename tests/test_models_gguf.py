"""GGUF files made of the recorded models, as llama.cpp's converter makes them, and the tokenizers in their metadata."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_models import FOLDER, config_of
from test_models_files import state_of
from tokenizers.pre_tokenizers import ByteLevel

from ringjax import models
from ringjax.models import ModelError
from ringjax.models.gguf import GgufFile
from ringjax.nnx import DecoderConfig, FrequencyDivisors, YarnScaling

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def converted(name: str, architecture: str, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Tensors of a recorded model under GGUF's names and in its order of rows."""
    gemma = architecture.startswith("gemma")
    found = {}
    for full, given in load_file(FOLDER / name / "model.safetensors").items():
        stem, _, leaf = full.rpartition(".")
        x = given.astype(np.float32)
        if gemma and "norm" in stem:
            x = x + 1
        if stem in _REST:
            found[f"{_REST[stem]}.{leaf}"] = x
            continue
        _, _, layer, part = stem.split(".", 3)
        heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(part)
        if architecture == "llama" and heads:
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        found[f"blk.{layer}.{(_LAYER | (_GEMMA_NORMS if gemma else _NORMS))[part]}.{leaf}"] = x
    return found


def write(path: Path, architecture: str, config: DecoderConfig, tensors: dict[str, np.ndarray], **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "context_length": 64,
        "block_count": config.num_layers,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    for key, value in (sizes | keys).items():
        full = key if "." in key and key.split(".")[0] in ("general", "tokenizer") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    if "attention.layer_norm_rms_epsilon" not in keys:
        writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DIVISORS = tuple(float(i + 1) for i in range(8))
WINDOW = {"attention.sliding_window": 8}
# name: architecture, keys, tensors beside the model's own, what the configuration has that the recorded one has not.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], dict[str, Any]]] = {
    "smollm2": ("llama", {"rope.freq_base": 500.0, "rope.dimension_count": 16}, {}, {}),
    "llama_llama3": (
        "llama",
        {"rope.freq_base": 500.0},
        {"rope_freqs.weight": np.asarray(DIVISORS, np.float32)},
        dict(rope_scaling=FrequencyDivisors(divisors=DIVISORS)),
    ),
    "llama_linear_bias": (
        "llama",
        {"rope.freq_base": 500.0, "rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
        {},
        {},
    ),
    "qwen3": ("qwen3", {"rope.freq_base": 10000.0}, {}, {}),
    "qwen2": (
        "qwen2",
        {
            "rope.freq_base": 10000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
        {},
        dict(
            layer_pattern=(),
            rope_scaling=YarnScaling(factor=4.0, original_length=16, attention_factor=0.1 * np.log(4.0) + 1),
        ),
    ),
    "gemma2": (
        "gemma2",
        WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {},
        dict(attention_scale=0.25),
    ),
    "gemma3": (
        "gemma3",
        WINDOW
        | {
            "rope.freq_base": 1e5,
            "rope.freq_base_swa": 1e3,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window_pattern": 2,
        },
        {},
        dict(attention_scale=0.25),
    ),
}


def meaning(config: DecoderConfig) -> Any:
    """Equal for configurations that compute the same: a pattern may be written in more than one way."""
    kinds = [config.period[i % len(config.period)] for i in range(config.num_layers)]
    return kinds, dataclasses.replace(config, layer_pattern=(), local_window_size=None, norm_eps=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_as_the_directory(name: str, tmp_path: Path):
    """Whose logits are those of transformers, in tests/test_models.py."""
    architecture, keys, more, changes = CASES[name]
    want = DecoderConfig(**(config_of(name)[1] | changes))
    path = write(tmp_path / "m.gguf", architecture, want, converted(name, architecture, want) | more, **keys)
    decoder = models.load(path)
    assert meaning(decoder.config) == meaning(want)
    ours, theirs = state_of(decoder), state_of(models.load(FOLDER / name))
    if name == "qwen2":  # recorded with a pattern, which GGUF cannot say: the same layers in one stack
        layers = [f"['layer_{i}']" for i in range(2)]
        theirs = {
            key.replace(layers[0], ""): np.concatenate([theirs[key.replace(layers[0], layer)] for layer in layers])
            if layers[0] in key
            else value
            for key, value in theirs.items()
            if layers[1] not in key
        }
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


SMOL = DecoderConfig(**config_of("smollm2")[1])


def smol(path: Path, **keys: Any) -> Path:
    return write(path, "llama", SMOL, converted("smollm2", "llama", SMOL), **keys)


def smol_that_reads(path: Path) -> Path:
    """With a tokenizer of LETTERS."""
    vocabulary = {"model": "gpt2", "merges": ["t h"], "tokens": LETTERS}
    return smol(path, **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_tensors(kind: str, tmp_path: Path):
    path, type_of = tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind]
    tensors = converted("smollm2", "llama", SMOL)
    writer = gguf.GGUFWriter(path, "llama")
    name = "blk.0.ffn_up.weight"
    writer.add_tensor(name, gguf.quantize(tensors[name], type_of), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GgufFile(path).read(name)
    assert got.dtype == np.float32
    error = {"F16": 2e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_0": 0.15}[kind]
    np.testing.assert_allclose(got, tensors[name], atol=error)


def test_refuses_damaged_files(tmp_path: Path):
    path = smol(tmp_path / "m.gguf")
    whole = path.read_bytes()

    def refused(message: str, data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(ModelError, match=message) as caught:
            models.load(path)
        assert "\n" not in str(caught.value)

    refused("must be a whole GGUF file of version 2 or 3. Got: it begins with b'PK", b"PK" + whole[2:])
    refused("must be a whole GGUF file of version 2 or 3. Got: it has version 1", whole[:4] + b"\1" + whole[5:])
    for cut in (10, 200, 700):
        refused("must be a whole GGUF file", whole[:cut])
    refused("must be whole. It ends before .* does", whole[:-100])
    # The number of a tensor's type follows its name, the number of its axes and their sizes.
    at = whole.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    for number, message in ((9999, "knows. Got type 9999"), (9, "dequantises. Got Q8_1: ")):
        refused(
            f"blk.0.ffn_up.weight must have a type that the gguf package {message}",
            whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :],
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count must be 0: mixtures of experts are not supported"),
        ({"attention.causal": False}, "llama.attention.causal must be absent: ringjax does not honour it. Got False"),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 0.5},
            "must have values as its architecture has them. Got: factor must be at least 1",
        ),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count must be the size of a head, 16. Got 8"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type must be none, linear or yarn. Got 'longrope'"),
        ({"feed_forward_length": 47}, r"ffn_.*.weight must have shape \(.*47.*\). Got \(.*48.*\)"),
    ],
)
def test_refuses_what_is_not_honoured(keys: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ModelError, match=message):
        models.load(smol(tmp_path / "m.gguf", **keys))


def test_refuses_other_architectures(tmp_path: Path):
    path = write(tmp_path / "m.gguf", "phi3", SMOL, {})
    with pytest.raises(ModelError, match="general.architecture must be one of llama, .* Got 'phi3'"):
        models.load(path)
    with pytest.raises(ModelError, match="must hold token_embd.weight. Got none"):
        models.load(write(tmp_path / "n.gguf", "llama", SMOL, {}))


# ------------------------------------------------------------------------------------------------------ tokenizers

BYTES = sorted(ByteLevel.alphabet())
LETTERS = [*BYTES[:100], "th", "Ġ"]
DIGITS = {"merges": ["1 2", "12 3", "4 5"], "tokens": [*BYTES, "12", "123", "45", "<|end|>"]}


def tokenizer_of(path: Path, **keys: Any) -> models.Tokenizer:
    full = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return models.tokenizer(write(path, "llama", SMOL, {}, **full))


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", ["123", "45"]),
        ("llama-bpe", ["123", "45"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
    ],
)
def test_byte_level_tokenizers(cut: str, pieces: list[str], tmp_path: Path):
    found = tokenizer_of(
        tmp_path / "m.gguf", model="gpt2", pre=cut, **DIGITS, token_type=[1] * 259 + [3], eos_token_id=259
    )
    text = "ship 12345, naïve\n\n  été 木"
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert [DIGITS["tokens"][i] for i in found.encode("12345")] == pieces
    assert found.encode("a<|end|>") == [BYTES.index("a"), 259]
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (None, (259,), 260)
    assert found.decode([BYTES.index("a"), 259]) == "a"


@pytest.mark.parametrize(("prefixed", "pieces"), [(True, ["▁ab", "▁b"]), (False, ["ab", "▁b"])])
def test_sentence_piece_tokenizers(prefixed: bool, pieces: list[str], tmp_path: Path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "▁b"]
    found = tokenizer_of(
        tmp_path / "m.gguf",
        model="llama",
        tokens=tokens,
        scores=[0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0],
        token_type=[2, 3, 3] + [6] * 256 + [1] * 7,
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=prefixed,
    )
    assert [tokens[i] for i in found.encode("ab b")] == ["<s>", *pieces]
    assert found.encode("ab b", special_tokens=False) == found.encode("ab b")[1:]
    for text in ("ab b", "b é木", "a  b"):
        assert found.decode(found.encode(text)) == text
    assert (found.bos_id, found.eos_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(model="bert", tokens=["a"]), "tokenizer.ggml.model must be gpt2 or llama. Got 'bert'"),
        (dict(model="gpt2", pre="tekken", **DIGITS), "tokenizer.ggml.pre must be one of .*smollm.* Got 'tekken'"),
        (dict(model="gpt2", tokens=["a"], merges=["a b"]), "must describe a tokenizer in tokenizer.ggml. Got: "),
        (dict(model="gpt2", tokens=["a"]), "must have the key 'tokenizer.ggml.merges'"),
        ({}, "must have the key 'tokenizer.ggml.model'"),
    ],
)
def test_refuses_tokenizers(keys: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ModelError, match=message):
        tokenizer_of(tmp_path / "m.gguf", **keys)


def test_refuses_more_tokens_than_rows(tmp_path: Path):
    full = {f"tokenizer.ggml.{name}": value for name, value in (DIGITS | {"model": "gpt2"}).items()}
    path = smol(tmp_path / "m.gguf", **full)
    with pytest.raises(ModelError, match="the tokenizer must fit the model's vocabulary of 128. Got 260 tokens"):
        models.tokenizer(path)
