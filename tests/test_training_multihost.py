"""More than one process: the losses of one, a stop that all hear, a checkpoint that any number continues."""

import re
import signal
import socket

import numpy as np
import pytest
import tiny_run
from in_process import train as train

from ringjax.training import devices
from ringjax.training.config import Distributed
from ringjax.training.loading import ConfigError, load

SIX_STEPS = "optimizer.steps=6"
# Process 1 alone is told to stop, in the middle of a step that both do.
STOP_THE_OTHER = """
import os, signal
from ringjax.training import progress
step = progress.Reporter.step
def stopped(self, record):
    step(self, record)
    if record["step"] == {step} and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.{signal})
progress.Reporter.step = stopped
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pair(config, *arguments, driver="") -> list[tuple[int, str]]:
    """Two processes of four devices each."""
    coordinator = f"distributed.coordinator=127.0.0.1:{free_port()}"
    command = ("train", config, "--set", "devices.simulate=4", "--set", coordinator, *arguments)
    pair = [
        tiny_run.start(*command, driver=driver, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number)) for number in (0, 1)
    ]
    return [tiny_run.finish(process) for process in pair]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path, train):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train(load(tiny_run.write_config(one), [SIX_STEPS]))

    config = tiny_run.write_config(two)
    stop = STOP_THE_OTHER.format(step=2, signal="SIGTERM")
    (status, leader), (other_status, other) = run_pair(config, "--set", SIX_STEPS, driver=stop)
    assert (status, other_status) == (128 + signal.SIGTERM,) * 2, leader + other
    assert "in 2 processes" in leader and "stopped by SIGTERM after step 2 of 6" in leader
    assert not re.search(r"^step|loss", other, re.MULTILINE)  # only process 0 speaks

    stop = STOP_THE_OTHER.format(step=4, signal="SIGINT")
    (status, leader), (other_status, other) = run_pair(config, "--set", SIX_STEPS, driver=stop)
    assert (status, other_status) == (128 + signal.SIGINT,) * 2, leader + other
    assert "resuming after step 2" in leader and "stopped by SIGINT after step 4" in leader
    assert "Traceback" not in leader + other
    outcome, said = train(load(config, [SIX_STEPS]))  # eight devices of one process go on from there
    assert outcome.step == 6
    assert "resuming after step 4" in said and "devices.simulate = 8 (was 4)" in said

    expected, found = np.array(tiny_run.learned(one / "out")), np.array(tiny_run.learned(two / "out"))
    assert expected.shape == found.shape == (6, 3)
    assert np.array_equal(expected[:, 0], found[:, 0])
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    assert (two / "out" / "loss.png").exists()


# Not to the bit: between processes gloo adds the terms of a sum in another order.
RTOL = 2e-5


@pytest.mark.slow
def test_different_text_on_two_processes_is_an_error(tmp_path):
    config = tiny_run.write_config(tmp_path)
    driver = """
import os
from ringjax.training import data
read = data.read
data.read = lambda *_: data.Corpus.of([os.environ["JAX_PROCESS_ID"].encode() * 999])
"""
    for status, said in run_pair(config, driver=driver):
        assert status == 1, said
        assert "error: the text that the processes read must be the same" in said


def test_not_told_and_no_cluster_is_one_process(monkeypatch):
    called = []

    def refuse(*arguments):
        called.append(arguments)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(devices.jax.distributed, "initialize", refuse)
    monkeypatch.setattr(devices.jax.distributed, "is_initialized", lambda: False)
    devices._join(Distributed(), simulated=False)
    assert called == [(None, None, None)]  # JAX was asked whether this is a cluster
    devices._join(Distributed(), simulated=True)
    devices._join(Distributed(initialize=False, coordinator="a:1"), simulated=False)
    assert len(called) == 1
    with pytest.raises(ConfigError, match="distributed: needs coordinator"):
        devices._join(Distributed(initialize=True), simulated=True)


def test_environment_fills_what_the_configuration_leaves_open(monkeypatch):
    called = []
    monkeypatch.setattr(devices.jax.distributed, "initialize", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(devices.jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    devices._join(Distributed(), simulated=True)
    devices._join(Distributed(coordinator="other:2", process_id=0), simulated=True)
    assert called == [("host:1", 3, 2), ("other:2", 3, 0)]
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID: must be a number. Got 'two'"):
        devices._join(Distributed(), simulated=True)
