"""Configuration: TOML -> frozen dataclasses, overrides, and errors that name the key."""

import dataclasses
import json

import pydantic
import pytest

from ringjax import RingConfig
from ringjax.training.config import Config, Ring
from ringjax.training.loading import ConfigError, flatten, from_table, known_keys, load, to_table


def problems(table):
    with pytest.raises(ConfigError) as caught:
        from_table(table)
    return str(caught.value).splitlines()


def test_defaults_are_valid():
    assert from_table({}) == Config()


def test_every_section_reaches_its_field():
    config = from_table({"optimizer": {"steps": 12, "warmup_steps": 2}, "mesh": {"sequence": 4}, "output": "x"})
    assert (config.optimizer.steps, config.mesh.sequence, config.mesh.num_devices, config.output) == (12, 4, 4, "x")
    assert config.optimizer.learning_rate == Config().optimizer.learning_rate


def test_table_round_trip_is_exact():
    config = from_table({"data": {"source": "paths", "paths": ["a", "b*"]}, "model": {"local_window_size": 64}})
    assert from_table(without_none(json.loads(json.dumps(to_table(config))))) == config


def test_a_pretrained_model_s_table_says_nothing_of_the_defaults():
    table = {"model": {"init_from": "m", "dtype": "bfloat16"}, "data": {"source": "text", "paths": ["x"]}}
    config = from_table(table)
    assert sorted(to_table(config)["model"]) == ["dtype", "init_from", "loss_chunk", "param_dtype", "remat"]
    assert from_table(without_none(to_table(config))) == config


def without_none(table):
    return {k: without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def test_ring_has_every_field_of_a_ring_config():
    fields = {field.name for field in dataclasses.fields(RingConfig)}
    assert {field.name for field in dataclasses.fields(Ring)} == fields | {"layout", "stripe"}
    found = from_table({"ring": {"strategy": "all_gather", "direction": "both"}}).ring.tuning
    assert found == RingConfig(strategy="all_gather", direction="both", deterministic=True)


def test_frozen():
    with pytest.raises((dataclasses.FrozenInstanceError, pydantic.ValidationError)):
        Config().optimizer.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {"optimizer": {"lerning_rate": 0.1}},
            "optimizer.lerning_rate: unknown key; the nearest valid key is optimizer.learning_rate. Got 0.1.",
        ),
        ({"optimiser": {"steps": 1}}, "optimiser: unknown section; the nearest valid key is optimizer. Got a table."),
        ({"sequence_length": 5}, "sequence_length: unknown key; the nearest valid key is data.sequence_length. Got 5."),
        ({"model": {"steps": 5}}, "model.steps: unknown key; the nearest valid key is optimizer.steps. Got 5."),
        ({"optimizer": {"steps": "ten"}}, 'optimizer.steps: must be an integer. Got "ten" (str).'),
        ({"optimizer": {"steps": 10.0}}, "optimizer.steps: must be an integer. Got 10.0."),
        ({"optimizer": {"steps": True}}, "optimizer.steps: must be an integer. Got true."),
        ({"optimizer": {"steps": 0}}, "optimizer.steps: must be greater than or equal to 1. Got 0."),
        ({"optimizer": {"clip_norm": "1"}}, 'optimizer.clip_norm: must be a number. Got "1" (str).'),
        ({"optimizer": {"clip_norm": float("nan")}}, "optimizer.clip_norm: must be a finite number. Got nan."),
        ({"model": {"remat": 1}}, "model.remat: must be true or false. Got 1."),
        ({"model": 3}, "model: must be a table. Got 3."),
        ({"ring": {"layout": "zig"}}, "ring.layout: must be 'contiguous', 'zigzag' or 'striped'. Got \"zig\" (str)."),
        ({"data": {"paths": "a.txt"}}, 'data.paths: must be an array. Got "a.txt" (str).'),
        ({"data": {"paths": [1]}}, "data.paths.0: must be a string. Got 1."),
    ],
)
def test_wrong_keys_and_types(table, line):
    assert problems(table) == [line]


def test_dates_are_refused(tmp_path):
    (tmp_path / "c.toml").write_text("output = 2026-01-01\n")
    with pytest.raises(ConfigError, match=r"output: must be a string.*2026-01-01"):
        load(tmp_path / "c.toml")


def test_all_mistakes_are_reported_at_once():
    lines = problems({"optimizer": {"step": 1, "b1": 2.0}, "mush": {}})
    assert [line.split(":")[0] for line in lines] == ["optimizer.b1", "optimizer.step", "mush"]


@pytest.mark.parametrize(
    ("table", "key", "says"),
    [
        ({"model": {"num_heads": 3}}, "model.num_heads", "multiple of model.num_kv_heads = 2"),
        ({"mesh": {"tensor": 4}}, "model.num_kv_heads", "multiple of mesh.tensor = 4"),
        ({"mesh": {"data": 2}}, "data.batch_size", "multiple of mesh.data = 2"),
        ({"model": {"head_dim": 7}}, "model.head_dim", "even"),
        ({"data": {"sequence_length": 24}, "mesh": {"sequence": 8}}, "data.sequence_length", "multiple of 16"),
        (
            {"data": {"sequence_length": 24}, "mesh": {"sequence": 4}, "ring": {"layout": "striped", "stripe": 4}},
            "data.sequence_length",
            "multiple of 16",
        ),
        ({"ring": {"stripe": 4}}, "ring.stripe", "only layout 'striped'"),
        ({"optimizer": {"steps": 5, "warmup_steps": 5}}, "optimizer.warmup_steps", "optimizer.steps = 5"),
        ({"data": {"source": "paths"}}, "data.paths", "at least one"),
        ({"data": {"paths": ["x"]}}, "data.paths", "data.source = 'stdlib'"),
        ({"output": " "}, "output", "directory"),
        ({"export": {"path": ""}}, "export.path", "directory"),
        ({"model": {"init_from": "m", "num_layers": 2}}, "model.num_layers", "absent with model.init_from = 'm'"),
        ({"model": {"init_from": "m", "vocab_size": 300}}, "model.vocab_size", "absent with model.init_from = 'm'"),
        ({"model": {"init_from": " "}}, "model.init_from", "a GGUF file"),
        (
            {"model": {"init_from": "m"}, "data": {"source": "paths", "paths": ["x"]}},
            "data.source",
            "not that of bytes",
        ),
        ({"data": {"source": "text", "paths": ["x"]}}, "data.tokenizer", "no model.init_from"),
        ({"data": {"source": "jsonl", "tokenizer": "m"}}, "data.paths", "data.source = 'jsonl'"),
        ({"data": {"source": "paths", "paths": ["x"], "tokenizer": "m"}}, "data.tokenizer", "which is bytes"),
        ({"data": {"source": "tokens", "paths": ["x"]}}, "model.vocab_size", "no data.tokenizer"),
        ({"data": {"text_key": "body"}}, "data.text_key", "data.source = 'jsonl'"),
        ({"model": {"vocab_size": 255}}, "model.vocab_size", "at least 256"),
        ({"optimizer": {"accumulate": 2}, "mesh": {"data": 2}, "data": {"batch_size": 2}}, "data.batch_size", "2 x 2"),
        ({"optimizer": {"float32_masters": False}}, "optimizer.float32_masters", "param_dtype is 'float32'"),
    ],
)
def test_keys_that_cannot_stand_together(table, key, says):
    (line,) = problems(table)
    assert line.startswith(f"{key}: ") and says in line and "Got " in line


def test_contiguous_needs_no_second_half():
    table = {"data": {"sequence_length": 24}, "mesh": {"sequence": 8}, "ring": {"layout": "contiguous"}}
    assert from_table(table).data.sequence_length == 24


def test_load_overrides_and_default_output(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text("[optimizer]\nsteps = 50\n[data]\nsequence_length = 64\n")
    config = load(
        path, ["optimizer.steps=20", "data.source = paths", 'data.paths=["a", "b"]', "optimizer.learning_rate=1e-2"]
    )
    assert config.output == "runs/small"
    assert config.data.sequence_length == 64
    assert (config.optimizer.steps, config.optimizer.learning_rate) == (20, 0.01)
    assert (config.data.source, config.data.paths) == ("paths", ("a", "b"))
    assert load(path, ["output=runs/other"]).output == "runs/other"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("optimizer.steps=ten", 'optimizer.steps: must be an integer. Got "ten"'),
        ("optimizer.stops=10", "nearest valid key is optimizer.steps"),
        ("output.name=3", "output is no section"),
    ],
)
def test_bad_overrides(tmp_path, override, says):
    path = tmp_path / "c.toml"
    path.write_text('output = "x"\n')
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    assert says in str(caught.value)


def test_missing_file_names_those_beside_it(tmp_path):
    (tmp_path / "right.toml").write_text("")
    with pytest.raises(ConfigError, match=r"wrong\.toml.*right\.toml"):
        load(tmp_path / "wrong.toml")


def test_broken_toml_names_the_place(tmp_path):
    (tmp_path / "c.toml").write_text("[data]\nseed = = 3\n")
    with pytest.raises(ConfigError, match=r"c\.toml.*line 2"):
        load(tmp_path / "c.toml")


def test_known_keys_are_the_flattened_table():
    assert set(flatten(to_table(Config()))) <= set(known_keys())
    assert {"model", "model.num_layers", "output"} <= set(known_keys())
