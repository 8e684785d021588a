"""Files of models: several of them, damaged ones, tokenizers; and what save leaves behind when it cannot."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from test_models import FOLDER, config_of, mesh_of

from ringjax import models
from ringjax.models import ModelError, fill, huggingface, saving
from ringjax.nnx import DecoderConfig, param_shardings

NAME = "smollm2"  # tied, bfloat16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(FOLDER / NAME, tmp_path / "model"))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def state_of(decoder: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(decoder)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def edit(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_lie_where_the_decoder_has_them(kind: AxisType):
    mesh = jax.make_mesh((2, 2, 2), ("data", "sp", "tensor"), axis_types=(kind,) * 3)
    axes = dict(batch_axis_name="data", head_axis_name="tensor", num_shards=2)
    decoder = models.load(FOLDER / NAME, mesh=mesh, **axes, param_dtype="bfloat16")
    shardings = param_shardings(DecoderConfig(**config_of(NAME)[1], **axes), mesh)
    same = jax.tree.map(lambda w, s: w.sharding.is_equivalent_to(s, w.ndim), nnx.state(decoder), shardings)
    assert all(jax.tree.leaves(same))
    alone = state_of(models.load(FOLDER / NAME, param_dtype="bfloat16"))
    for name, value in state_of(decoder).items():
        assert value.dtype.name == "bfloat16"
        np.testing.assert_array_equal(value, alone[name])


def test_the_mesh_of_the_context_is_taken():
    with jax.set_mesh(mesh_of(4)):
        decoder = models.load(FOLDER / NAME)
        assert len(decoder.embedding.arrays()["kernel"].sharding.device_set) == 4


def test_one_tensor_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """And put where it belongs before the next one is."""
    events = []
    read, put = huggingface.SafetensorsSource.read, fill._put
    monkeypatch.setattr(huggingface.SafetensorsSource, "read", lambda self, n: events.append("read") or read(self, n))
    monkeypatch.setattr(fill, "_put", lambda *given: events.append("put") or put(*given))
    models.load(FOLDER / NAME)
    assert events == ["read", "put"] * len(tensors(FOLDER / NAME))


def test_layers_apart_are_loaded_and_saved(tmp_path: Path):
    """Each tensor goes to an array of its own; what is saved of them is the file that was read."""
    decoder = models.load(FOLDER / NAME, scan_layers=False)
    for name, value in state_of(models.load(FOLDER / NAME).with_scan_layers(False)).items():
        np.testing.assert_array_equal(state_of(decoder)[name], value)
    models.save(decoder, tmp_path / "saved")
    given, saved = tensors(FOLDER / NAME), tensors(tmp_path / "saved")
    assert given.keys() == saved.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(saved[name], value)


def test_files_of_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoder = models.load(FOLDER / NAME)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    models.save(decoder, tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    parts = [f"model-{i + 1:05d}-of-00007.safetensors" for i in range(7)]
    assert names == ["config.json", *parts, huggingface.INDEX]
    index = json.loads((tmp_path / "parts" / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.size * 4 for x in tensors(FOLDER / NAME).values())
    assert set(index["weight_map"]) == set(tensors(FOLDER / NAME))
    for path in (tmp_path / "parts").glob("*.safetensors"):
        assert set(load_file(path)) == {name for name, file in index["weight_map"].items() if file == path.name}
    again = state_of(models.load(tmp_path / "parts"))
    for name, value in state_of(decoder).items():
        np.testing.assert_array_equal(value, again[name])
    (tmp_path / "parts" / parts[2]).unlink()
    with pytest.raises(ModelError, match=f"must hold {parts[2]}, which .* names. Got none"):
        models.load(tmp_path / "parts")


def test_a_tied_table_may_be_in_the_file_twice(folder: Path):
    """As some tools write it, if it is the same one."""
    given = tensors(folder)
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    save_file(given, folder / "model.safetensors")
    np.testing.assert_array_equal(
        state_of(models.load(folder))["['embedding']['kernel']"], given["lm_head.weight"].astype(np.float32)
    )
    save_file(given | {"lm_head.weight": given["lm_head.weight"] * 2}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head.weight must equal model.embed_tokens.weight"):
        models.load(folder)


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "the weights must be those of config.json.* misses model.norm.weight"),
        (lambda t: t.update(extra=np.ones(3)), "holds what the configuration does not ask for: extra"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"model.norm.weight must have shape \(32,\). Got \(31,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            "model.norm.weight must have a dtype of F64, F32, F16, BF16. Got I8",
        ),
    ],
)
def test_refuses_other_tensors(folder: Path, change: Any, message: str):
    given = tensors(folder)
    change(given)
    save_file(given, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        models.load(folder)


def test_refuses_damaged_files(folder: Path, tmp_path: Path):
    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            models.load(folder)
        assert "\n" not in str(caught.value)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 100, len(whole) - 10):
        weights.write_bytes(whole[:cut])
        refused("model.safetensors must be a whole safetensors file. Got: ")
    weights.unlink()
    refused("must hold model.safetensors or model.safetensors.index.json. Got none")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("must hold model.safetensors or .* Got only pytorch_model.bin")
    (folder / huggingface.INDEX).write_text("{}")
    refused("must have a weight_map. Got none")
    (folder / "config.json").write_text("{")
    refused("config.json must be JSON. Got: ")
    (folder / "config.json").write_text("[]")
    refused("config.json must be a table. Got list")
    (folder / "config.json").unlink()
    refused("must hold config.json. Got none")
    with pytest.raises(ModelError, match="path must be a directory or a GGUF file. Got .*nothing"):
        models.load(tmp_path / "nothing")


def test_refuses_options_by_their_names():
    with pytest.raises(ValueError, match="^layout must be one of"):
        models.load(FOLDER / NAME, layout="spiral")
    with pytest.raises(ValueError, match="^mesh must be a jax.sharding.Mesh of devices"):
        models.load(FOLDER / NAME, mesh=mesh_of(2).abstract_mesh)
    with pytest.raises(ValueError, match="^param_dtype must be one of"):
        models.load(FOLDER / NAME, param_dtype="int8")


def test_save_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoder = models.load(FOLDER / NAME)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("keep me")
    with pytest.raises(ModelError, match="path must be an empty directory or none. Got .*taken"):
        models.save(decoder, taken)
    with pytest.raises(ModelError, match="path must be an empty directory or none"):
        models.save(decoder, taken / "note")

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space left"):
        models.save(decoder, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert [path.name for path in taken.iterdir()] == ["note"]
    monkeypatch.undo()
    empty = tmp_path / "empty"
    empty.mkdir()
    models.save(decoder, empty)
    assert sorted(path.name for path in empty.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "taken"]


# ------------------------------------------------------------------------------------------------------ tokenizers


def write_tokenizer(folder: Path, words: list[str]) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(words[:3])
    made.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_beside_the_weights(folder: Path):
    write_tokenizer(folder, ["<unk>", "<s>", "</s>", "long", "context"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    found = models.tokenizer(folder)
    assert (found.bos_id, found.eos_ids, found.vocab_size, found.template) == (1, (2, 4), 128, template)
    assert found.encode("long context") == [3, 4]
    assert found.decode([1, 3, 4, 2]) == "long context" and found.decode([3, 2], special_tokens=True) == "long </s>"
    assert found.chat([{"role": "user", "content": "hi"}]) == "<s>user: hi\n"


def test_a_tokenizer_is_saved_beside_the_weights(folder: Path, tmp_path: Path):
    test_a_tokenizer_beside_the_weights(folder)
    decoder, tokenizer = models.load(folder), models.tokenizer(folder)
    models.save(decoder, tmp_path / "saved", tokenizer=tokenizer)
    found = models.tokenizer(tmp_path / "saved")
    for field in ("vocab_size", "bos_id", "eos_ids", "template"):
        assert getattr(found, field) == getattr(tokenizer, field), field
    assert found.backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(ModelError, match="tokenizer must fit the decoder's vocabulary of 128. Got 129 ids"):
        models.save(decoder, tmp_path / "more", tokenizer=dataclasses.replace(tokenizer, vocab_size=129))
    with pytest.raises(ModelError, match="tokenizer must be a ringjax.models.Tokenizer. Got str"):
        models.save(decoder, tmp_path / "more", tokenizer="saved")
    assert not (tmp_path / "more").exists()


def test_refuses_tokenizers(folder: Path):
    with pytest.raises(ModelError, match="must hold tokenizer.json, or be a GGUF file"):
        models.tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer.json must be a tokenizer. Got: "):
        models.tokenizer(folder)
    write_tokenizer(folder, ["<unk>", "<s>", "</s>", "long", "context"])
    edit(folder, vocab_size=4)
    with pytest.raises(ModelError, match="the tokenizer must fit the model's vocabulary of 4. Got 5 tokens"):
        models.tokenizer(folder)
    edit(folder, vocab_size=128)
    with pytest.raises(ModelError, match="the tokenizer must have a chat template. Got none"):
        models.tokenizer(folder).chat([])
