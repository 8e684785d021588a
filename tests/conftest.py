"""Eight simulated CPU devices and JAX at its strictest, set before any test imports jax."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["RINGJAX_TILES"] = ""  # no tiles that this machine's user has tuned

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of this suite's time, and LLVM's expensive passes are a good part of compiling.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A stale cache entry would hide a change of the compiler or of ours.
jax.config.update("jax_enable_compilation_cache", False)

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
