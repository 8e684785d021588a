"""Eight simulated CPU devices, JAX at its strictest, and one compilation cache per run, before any test imports jax."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["RINGJAX_TILES"] = ""  # no tiles that this machine's user has tuned
if "PYTEST_XDIST_WORKER" not in os.environ:
    # The workers of this run and the programs that tests start share what they compile. The cache ends with the run: an
    # older one could hide a change of the compiler. CI gives its rounds on one Python a folder for them all.
    programs = os.environ.get("RINGJAX_TEST_PROGRAMS")
    if not programs:
        programs = tempfile.mkdtemp(prefix="ringjax-tests-")
        atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)  # JAX locks a cache only if its size is bounded
    # Storing a program takes a tenth of a second, and more with every one that is there: JAX adds up their sizes.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import rounds  # noqa: E402

if jax.__version_info__ < (0, 11) and "PYTEST_XDIST_WORKER" not in os.environ:
    # XLA's emitters of fusions take a third of the time that a program takes to compile. Later versions have no others.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
# Traces and modules are large graphs that die by reference count; looking for cycles in them is a tenth of the time.
gc.set_threshold(200_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of this suite's time, and LLVM's expensive passes are a good part of compiling. What must run as
# users compile it says so: see `as_users` in tests/cases.py.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every example compiles: few of them, the same ones on every machine, and no limit on their time.
hypothesis.settings.register_profile("ringjax", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("ringjax")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table of tiles, empty."""
    from ringjax.kernels import tiles as tile_table

    file = tmp_path / "tiles.json"
    monkeypatch.setenv(tile_table.VARIABLE, str(file))
    tile_table.merge(file, {})
    return file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Instead of xdist's own --dist=loadfile: whole files, but for those that would keep one worker to the end."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return rounds.unit(nodeid)

    return Scheduler(config, log)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests start first, since a worker runs whole files: one that started last would run alone."""
    for item in items:
        breadth = item.get_closest_marker("breadth") or rounds.listed(item.nodeid, rounds.BREADTH)
        if breadth:
            item.add_marker("breadth")
        if rounds.listed(item.nodeid, rounds.ONCE):
            item.add_marker("once")
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.stem in rounds.LONG}
    items.sort(key=lambda item: item.path not in slow)
