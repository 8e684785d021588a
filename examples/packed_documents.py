"""Packs documents that any data loader delivers, and goes on where it stopped. With Grain:

documents = grain.MapDataset.source(source).shuffle(seed=0).repeat().to_iter_dataset()
sequences = Packed(iter(documents), num_shards=8, shard_length=8192, shared_length=4096)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

import ringjax


class Packed(Iterator[dict[str, np.ndarray]]):
    """Sequences of whole documents, dealt by ``ringjax.pack`` to C devices of L tokens.

    Args:
      documents: an iterator of integer arrays [tokens]. To resume it must have ``get_state`` and ``set_state``, as
        the iterators of Grain have.
      num_shards, shard_length, shared_length: C, L and G. Given G, all batches of a run have one program.
      sequences: for so many of them documents are read at a time. The more, the better they balance.
    """

    def __init__(
        self, documents: Any, *, num_shards: int, shard_length: int, shared_length: int | None = None,
        sequences: int = 16,
    ) -> None:  # fmt: skip
        self.documents = documents
        self.options: Any = {"num_shards": num_shards, "shard_length": shard_length, "shared_length": shared_length}
        self.length, self.wanted = num_shards * shard_length, sequences * num_shards * shard_length
        self.waiting: list[np.ndarray] = []  # read before, and in no sequence yet
        self.part, self.index = 0, 0
        self.packing: Any = None
        self._remember()

    def __next__(self) -> dict[str, np.ndarray]:
        while self.packing is None or self.index == len(self.packing):
            if self.packing is not None:
                self.waiting = [self.held[n] for n in self.packing.left_over]
                self.part, self.index = self.part + 1, 0
                self._remember()
            self._read()
        found = self.packing[self.index]
        self.index += 1
        inputs, targets = found.take(self.text, self.starts)
        names = ("segment_ids", "positions", "loss_mask")
        return {"inputs": inputs, "targets": targets, **{name: getattr(found, name) for name in names}}

    def _read(self) -> None:
        """The next documents; those that are longer than a sequence in parts that are not."""
        self.held, ended = list(self.waiting), False
        tokens = sum(map(len, self.held))
        while tokens < self.wanted and not ended:
            document: Any = next(self.documents, None)
            ended = document is None
            if not ended:
                self.held += [document[start : start + self.length] for start in range(0, len(document), self.length)]
                tokens += len(document)
        if not self.held:
            raise StopIteration
        lengths = np.array(list(map(len, self.held)))
        self.text, self.starts = np.concatenate(self.held), np.cumsum(lengths) - lengths
        self.packing = ringjax.pack(lengths, seed=self.part, final=ended, **self.options)

    def _remember(self) -> None:
        """Where the documents are before a part of them is read."""
        self.state = self.documents.get_state() if hasattr(self.documents, "get_state") else None

    def get_state(self) -> dict[str, Any]:
        """What ``set_state`` needs to go on with the next sequence: small, but for the documents that wait."""
        return {"documents": self.state, "waiting": self.waiting, "part": self.part, "index": self.index}

    def set_state(self, state: dict[str, Any]) -> None:
        self.documents.set_state(state["documents"])
        self.state, self.waiting = state["documents"], state["waiting"]
        self.part, self.packing = state["part"], None
        self._read()
        self.index = state["index"]
