"""A training run inside the test's process, on the devices that the tests have."""

import contextlib
import io
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.sharding import AxisType
from rich.console import Console

from ringjax.training import devices, loop
from ringjax.training.config import Config

Train = Callable[..., tuple[loop.Outcome, str]]


@contextlib.contextmanager
def trainer() -> Iterator[Train]:
    """loop.train on the devices that the tests have, and what it printed."""

    def start(config: Config) -> jax.sharding.Mesh:
        shape = (config.mesh.data, config.mesh.sequence, config.mesh.tensor)
        return jax.make_mesh(shape, devices.AXES, axis_types=(AxisType.Auto,) * 3)

    def run(config: Config, **options) -> tuple[loop.Outcome, str]:
        printed = io.StringIO()
        outcome = loop.train(config, console=Console(file=printed, width=200), **options)
        return outcome, printed.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "start", start)
        with jax.numpy_dtype_promotion("standard"):  # Adam in Optax raises a float to an int32 count
            yield run


@pytest.fixture
def train() -> Iterator[Train]:
    with trainer() as run:
        yield run
