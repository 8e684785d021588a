"""examples/: documents that a data loader delivers, every token once, and exact resume."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringjax

FILE = Path(__file__).parents[1] / "examples" / "packed_documents.py"
rng = np.random.default_rng(0)
SIZES = [1, 300, 64, *rng.integers(1, 40, 60).tolist()]  # 300 is longer than a sequence
DOCUMENTS = [1000 * number + np.arange(1, size + 1) for number, size in enumerate(SIZES)]
GIVEN: dict[str, Any] = {"num_shards": 4, "shard_length": 64, "sequences": 2}


def example() -> Any:
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Packed


class Loader:
    """What of a data loader is asked for."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents, self.at = documents, 0

    def __next__(self) -> np.ndarray:
        if self.at == len(self.documents):
            raise StopIteration
        self.at += 1
        return self.documents[self.at - 1]

    def get_state(self) -> Any:
        return {"next": self.at}

    def set_state(self, state: Any) -> None:
        self.at = state["next"]


def of_grain(documents: list[np.ndarray]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it imports
        import grain

        return iter(grain.MapDataset.source(documents).shuffle(seed=0).to_iter_dataset())


GRAIN = pytest.param(
    of_grain, marks=pytest.mark.skipif(sys.platform != "linux", reason="the test extra has Grain on Linux alone")
)


@pytest.mark.parametrize("loader", [Loader, iter, GRAIN])
def test_every_token_once(loader: Any) -> None:
    found = list(example()(loader(DOCUMENTS), **GIVEN))
    tokens = np.concatenate([sequence["inputs"] for sequence in found])
    assert sorted(tokens[tokens > 0]) == sorted(np.concatenate(DOCUMENTS))
    for sequence in found:
        counts = sequence["loss_mask"]
        assert (sequence["targets"][counts] == sequence["inputs"][counts] + 1).all() and counts.any()
        ids, present = sequence["segment_ids"], sequence["inputs"] > 0
        assert {len(set(sequence["inputs"][ids == one] // 1000)) for one in ids[present]} == {1}
    assert sum(int(sequence["loss_mask"].sum()) for sequence in found) == sum(SIZES) - len(SIZES) - 1  # one is cut


@pytest.mark.parametrize("loader", [Loader, GRAIN])
def test_it_goes_on_where_it_stopped(loader: Any) -> None:
    make = example()
    whole = list(make(loader(DOCUMENTS), **GIVEN))
    assert len(whole) > 5
    for done in range(len(whole)):
        stopped = make(loader(DOCUMENTS), **GIVEN)
        for _ in range(done):
            next(stopped)
        going_on = make(loader(DOCUMENTS), **GIVEN)
        going_on.set_state(stopped.get_state())
        rest = list(going_on)
        assert len(rest) == len(whole) - done
        for sequence, wanted in zip(rest, whole[done:], strict=True):
            assert all(np.array_equal(sequence[name], wanted[name]) for name in wanted)


def test_one_shared_length_for_all() -> None:
    for sequence in example()(Loader(DOCUMENTS), shared_length=64, **GIVEN):
        ringjax.check_segments(sequence["segment_ids"][None], num_shards=4, shared_length=64)


def test_no_documents() -> None:
    assert list(example()(Loader([]), **GIVEN)) == [] == list(example()(Loader([np.empty(0, int)]), **GIVEN))
