"""ringjax.models against transformers: tiny models of every family that tests/record_models.py recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

import ringjax
from ringjax import models
from ringjax.models import ModelError
from ringjax.models.families import FAMILIES, read_config, write_config
from ringjax.nnx import (
    DecoderConfig,
    DynamicScaling,
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)

FOLDER = Path(__file__).parent / "data" / "models"
CASES = sorted(path.name for path in FOLDER.iterdir())


def mesh_of(num_shards: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((num_shards,), ("sp",), axis_types=(kind,), devices=jax.devices()[:num_shards])


def weights(name: str) -> dict[str, np.ndarray]:
    return load_file(FOLDER / name / "model.safetensors")


@jax.jit
def logits_of(decoder: Any, tokens: Any) -> Any:
    return decoder(tokens)


def test_every_family_is_recorded():
    recorded = {json.loads((FOLDER / name / "config.json").read_text())["model_type"] for name in CASES}
    assert recorded == {family.model_type for family in FAMILIES}
    for name in CASES:
        assert sum(file.stat().st_size for file in (FOLDER / name).iterdir()) < 200 * 1024


# On four devices too, but for what differs in RoPE's frequencies or biases alone: those know no devices.
ON_FOUR = ("llama_dynamic", "llama_llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.mark.parametrize(("name", "num_shards"), [(name, 1) for name in CASES] + [(name, 4) for name in ON_FOUR])
def test_logits_are_those_of_transformers(name: str, num_shards: int):
    recorded = load_file(FOLDER / name / "logits.safetensors")
    decoder = models.load(FOLDER / name, mesh=mesh_of(num_shards), num_shards=num_shards)
    tokens = ringjax.to_ring_order(recorded["tokens"], layout="zigzag", num_shards=num_shards)
    got = ringjax.from_ring_order(logits_of(decoder, tokens), layout="zigzag", num_shards=num_shards)
    np.testing.assert_allclose(got, recorded["logits"], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_saved_back_it_is_the_same_file(name: str, tmp_path: Path):
    models.save(models.load(FOLDER / name), tmp_path / "saved")
    ours, theirs = load_file(tmp_path / "saved" / "model.safetensors"), weights(name)
    assert set(ours) == set(theirs)
    for tensor, value in ours.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, theirs[tensor].astype(np.float32), atol=1e-7, err_msg=tensor)
    again = read_config(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert DecoderConfig(**again[1]) == DecoderConfig(**config_of(name)[1])


def config_of(name: str) -> Any:
    return read_config(json.loads((FOLDER / name / "config.json").read_text()))


# ------------------------------------------------------------------------------------------------- configurations

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
}


def fields_of(architecture: str, **keys: Any) -> DecoderConfig:
    return DecoderConfig(**read_config({"architectures": [architecture], **BASE, **keys})[1])


def test_the_older_form_of_rope():
    """transformers 4: rope_theta and rope_scaling, with "type" before "rope_type"."""
    table = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    for kind in ("type", "rope_type"):
        config = fields_of("LlamaForCausalLM", rope_theta=5e5, rope_scaling={kind: "llama3", **table})
        newer = fields_of("LlamaForCausalLM", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **table})
        assert config == newer and config.rope_theta == 5e5
        assert config.rope_scaling == Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64
        )
    linear = fields_of("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": 2.0})
    assert linear.rope_scaling == LinearScaling(factor=2.0)
    dynamic = fields_of("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=99)
    assert dynamic.rope_scaling == DynamicScaling(factor=2.0, original_length=99)
    yarn = fields_of(
        "Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    )
    assert yarn.rope_scaling == YarnScaling(factor=4.0, original_length=32)


def test_gemma_3_in_the_older_form():
    config = fields_of(
        "Gemma3ForCausalLM",
        num_hidden_layers=8,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=512,
        sliding_window_pattern=3,
        query_pre_attn_scalar=100,
        hidden_activation="gelu_pytorch_tanh",
    )
    near = ((511, 0), RopeConfig(theta=1e4))
    assert config.period == (near, near, (None, RopeConfig(theta=1e6, scaling=LinearScaling(factor=8.0))))
    assert config.attention_scale == 0.1 and config.embedding_scale == 8 and config.tie_embeddings
    assert config.head_dim == 256 and config.qk_norm and config.post_norms


def test_windows_count_the_token_itself():
    assert fields_of("MistralForCausalLM", sliding_window=1).local_window_size == (0, 0)
    assert fields_of("MistralForCausalLM", sliding_window=None).local_window_size is None
    qwen = dict(use_sliding_window=True, sliding_window=8)
    assert fields_of("Qwen2ForCausalLM", **qwen, max_window_layers=4).local_window_size is None
    assert fields_of("Qwen2ForCausalLM", **qwen, max_window_layers=0).local_window_size == (7, 0)
    some = fields_of("Qwen2ForCausalLM", **qwen, max_window_layers=3)
    assert [window for window, _ in some.period] == [None, None, None, (7, 0)]
    unused = fields_of("Qwen3ForCausalLM", use_sliding_window=False, sliding_window=8, max_window_layers=0)
    assert unused.local_window_size is None and not unused.layer_pattern


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (
            "GptOssForCausalLM",
            {},
            "architectures must be one of .* Got 'GptOssForCausalLM'. Mixtures of experts are not",
        ),
        ("Qwen3MoeForCausalLM", {}, "Got 'Qwen3MoeForCausalLM'. Mixtures of experts are not supported"),
        (
            "Gemma3ForConditionalGeneration",
            {},
            "Got 'Gemma3ForConditionalGeneration'. Of models that see or hear, none",
        ),
        ("LlamaForSequenceClassification", {}, "architectures must be one of .*Llama.* Got 'LlamaForSequence"),
        ("LlamaForCausalLM", dict(hidden_size=None), "must have the key 'hidden_size'. Got none"),
        ("LlamaForCausalLM", dict(hidden_size=66), "head_dim must be given where num_attention_heads does not divide"),
        ("MistralForCausalLM", dict(num_key_value_heads=None), "must have the key 'num_key_value_heads'"),
        ("LlamaForCausalLM", dict(hidden_act="relu"), "hidden_act must be one of 'silu'.* Got 'relu'"),
        ("LlamaForCausalLM", dict(attention_dropout=0.1), "attention_dropout must be one of 0.* Got 0.1"),
        ("LlamaForCausalLM", dict(partial_rotary_factor=0.5), "partial_rotary_factor must be 1"),
        ("LlamaForCausalLM", dict(rope_interleaved=True), "rope_interleaved must be absent for LlamaForCausalLM"),
        ("LlamaForCausalLM", dict(quantization_config={"bits": 4}), "quantization_config must be absent for Llama"),
        ("LlamaForCausalLM", dict(num_local_experts=8), "num_local_experts must be absent for LlamaForCausalLM"),
        ("LlamaForCausalLM", dict(sliding_window=8), "sliding_window must be absent for LlamaForCausalLM.* Got 8"),
        ("LlamaForCausalLM", dict(rope_scaling={"type": "longrope"}), "rope_type must be one of .* Got 'longrope'"),
        ("LlamaForCausalLM", dict(rope_scaling={"type": "linear"}), "RoPE of type 'linear' must have the key 'factor'"),
        (
            "LlamaForCausalLM",
            dict(rope_scaling={"type": "linear", "factor": 2.0, "attention_factor": 3.0}),
            "attention_factor must be absent for RoPE of type 'linear'",
        ),
        (
            "LlamaForCausalLM",
            dict(rope_scaling={"type": "linear", "factor": 0.1}),
            "factor must be at least 1. Got 0.1",
        ),
        ("Qwen2ForCausalLM", dict(num_hidden_layers="4"), "must have values as Qwen2ForCausalLM has them. Got: "),
        ("Gemma3ForCausalLM", dict(sliding_window_pattern="6"), "must have values as Gemma3ForCausalLM has them"),
        ("MistralForCausalLM", dict(sliding_window=0), "sliding_window must be a positive integer. Got 0"),
        ("Qwen2ForCausalLM", dict(layer_types=["full_attention"]), "layer_types must name 4 layers"),
        (
            "Qwen2ForCausalLM",
            dict(layer_types=["linear_attention"] * 4),
            "layer_types must name 4 layers, each full_att",
        ),
        (
            "Gemma3ForCausalLM",
            dict(use_bidirectional_attention=True),
            "use_bidirectional_attention must be one of False",
        ),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(architecture: str, keys: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=f"config.json.*{message}") as caught:
        fields_of(architecture, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_sinks=True),
        dict(rotary_dim=4),
        dict(post_norms=True),
        dict(rope_scaling=FrequencyDivisors(divisors=(1, 2, 3, 4))),
    ],
)
def test_save_refuses_what_no_family_is(fields: dict[str, Any]):
    with pytest.raises(ModelError, match="must be (one of llama|one that config.json has a name for)"):
        write_config(DecoderConfig(32, 2, 16, 2, 2, 8, 24, **fields))
