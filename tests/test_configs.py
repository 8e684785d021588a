"""Every file in configs/ is valid, traces to shapes on its mesh, and is what its comments say."""

import re
from pathlib import Path

import jax
import pytest
from test_models_gguf import smol_that_reads

from ringjax.training import dryrun
from ringjax.training.loading import load

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Adam in Optax raises a float to an int32 count
        yield


def named(name: str):
    return load(next(path for path in CONFIGS if path.stem == name))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_step_traces_to_shapes(path, tmp_path):
    config = load(path)
    if config.model.init_from is not None:  # a small one in its place
        config = load(path, [f"model.init_from={smol_that_reads(tmp_path / 'm.gguf')}"])
    plan = dryrun.plan(config)
    assert plan.num_devices == config.mesh.num_devices
    assert plan.shard_length * config.mesh.sequence == config.data.sequence_length
    assert config.output == f"runs/{path.stem}"
    if config.devices.simulate:
        assert config.devices.simulate == plan.num_devices


def test_readme_s_configuration_is_small_and_long():
    config = named("stdlib_tiny")
    assert (config.devices.simulate, config.mesh.sequence) == (8, 8)
    assert config.data.sequence_length >= 8192 and config.data.source == "stdlib"
    assert dryrun.plan(config).num_parameters < 1_000_000


def test_the_mesh_in_three_dimensions_uses_all_of_them():
    config = named("mesh_3d")
    assert (config.mesh.data, config.mesh.sequence, config.mesh.tensor) == (2, 2, 2)
    axes = "; ".join(row[2] for row in dryrun.plan(config).parameters)
    assert "tensor" in axes and "sequence" in axes


def test_v5p_256_is_128_chips_and_a_million_tokens():
    config = named("v5p_256_1m")
    plan = dryrun.plan(config)
    assert (plan.num_devices, plan.tokens_per_step, plan.shard_length) == (128, 2**20, 8192)
    assert plan.num_parameters > 1e9
    # Every matrix is cut over the 128 devices: state is 12 bytes a parameter, a device holds its part and the norms.
    assert plan.state_bytes_per_device < 1.02 * 12 * plan.num_parameters / 128 + 12 * 2e5
    assert plan.bytes_per_hop == 2 * 8192 * config.model.num_kv_heads * config.model.head_dim * 2


def test_the_trace_has_no_array_of_length_squared():
    """On the abstract mesh of the pod: the longest dimensions appear once in any one shape."""
    from ringjax.training import devices, program

    config = named("v5p_256_1m")
    text = str(program.build(config, devices.abstract_mesh(config)).trace_step().jaxpr)
    lengths = (config.data.sequence_length, config.data.sequence_length // config.mesh.sequence)
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert any(lengths[0] in shape for shape in shapes) and any(lengths[1] in shape for shape in shapes)
    assert not [shape for shape in shapes if sum(size in lengths for size in shape) > 1]
