"""ringjax.pack: every token once, the mask that was asked for, equal work. The truth is counted token by token."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringjax
from ringjax.packing import Arrangement, Packing

# id: (arguments of the mask, prefixes)
MASKS: dict[str, tuple[dict[str, Any], bool]] = {
    "causal": ({}, False),
    "full": ({"is_causal": False}, False),
    "causal window": ({"window": 9}, False),
    "causal window of one": ({"window": (0, None)}, False),
    "window": ({"is_causal": False, "window": (7, 12)}, False),
    "window ahead": ({"is_causal": False, "window": (None, 5)}, False),
    "window back": ({"is_causal": False, "window": (11, None)}, False),
    "prefix": ({}, True),
    "prefix and window": ({"window": 13}, True),
}


def some_lengths(num_shards: int, shard_length: int, seed: int, sequences: float = 3.3) -> np.ndarray:
    """Many short documents, some as long as a shard, some longer, one of one token."""
    rng = np.random.default_rng(seed)
    capacity = num_shards * shard_length
    lengths = np.exp(rng.normal(np.log(shard_length / 4), 1.0, 400)).astype(int).clip(1, capacity)
    lengths[:3] = 1, shard_length, min(capacity, shard_length + 3)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), sequences * capacity))]


def some_prefixes(lengths: np.ndarray) -> np.ndarray:
    """None, a part, one token, all of it."""
    kind = np.arange(len(lengths)) % 4
    return np.select([kind == 0, kind == 1, kind == 2], [0, lengths // 3, 1], lengths)


def packed(num_shards: int, mask: str, shard_length: int = 48, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    lengths = some_lengths(num_shards, shard_length, seed)
    arguments, has_prefix = MASKS[mask]
    prefix = some_prefixes(lengths) if has_prefix else None
    options = {"multiple": 8, "final": True, "prefix": prefix, **arguments, **options}
    return lengths, prefix, ringjax.pack(lengths, num_shards=num_shards, shard_length=shard_length, **options)


def sees(query: np.ndarray, key: np.ndarray, prefix: int, is_causal: bool = True, window: Any = None) -> np.ndarray:
    """The definition, by offsets in a document; where it has a prefix, by where a query then stands."""
    left, right = window if isinstance(window, tuple) else (window, window)
    query = np.maximum(query, prefix - 1)[:, None]
    seen = np.full((len(query), len(key)), True)
    seen &= (key <= query) if is_causal else True
    seen &= (key >= query - left) if left is not None else True
    return seen & ((key <= query + right) if right is not None and not is_causal else True)


def mask_of(arrangement: Arrangement, is_causal: bool = True, window: Any = None) -> np.ndarray:
    """What ring_attention makes of the arrays of a sequence: bool [C L, C L]."""
    positions = arrangement.positions
    query, key = positions if isinstance(positions, tuple) else (positions, positions)
    ids = arrangement.segment_ids
    return (ids[:, None] == ids) & sees(query, key, 0, is_causal, window)


# --- every token, the right mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 8])
def test_every_token_is_there_once_where_it_was_promised(num_shards: int) -> None:
    lengths, prefix, packing = packed(num_shards, "prefix", seed=num_shards)
    assert len(packing) == packing.num_sequences > 2 and not packing.left_over.size
    shared_documents = 0
    seen = np.zeros(len(lengths), int)
    for arrangement in packing:
        document, offset, ids = (
            x.reshape(num_shards, -1) for x in (arrangement.document, arrangement.offset, arrangement.segment_ids)
        )
        present = document >= 0
        for name in ("document", "offset", "segment_ids", "loss_mask"):
            assert getattr(arrangement, name).shape == (num_shards * 48,)
        assert document.dtype == offset.dtype == ids.dtype == np.int32
        assert (np.diff(ids, axis=1) >= 0).all(), "ids grow along a shard"
        padding = ids[~present]
        assert len(set(padding)) == len(padding) and padding.min(initial=10**6) > ids[present].max()
        assert not offset[~present].any()
        held = []
        for which in np.unique(document[present]):
            seen[which] += 1
            there = document == which
            assert len(set(ids[there])) == 1 and ids[there][0] not in ids[~there]
            assert sorted(offset[there]) == list(range(lengths[which]))
            if (there.any(axis=1)).sum() == 1:
                assert (np.diff(offset[there]) == 1).all()
                assert (np.diff(np.flatnonzero(there.any(axis=0))) == 1).all(), "a local document is one run"
                continue
            shared_documents += 1
            held.append(there)
            assert not there[:, packing.shared_length :].any()
            _check_zigzag(there, offset, int(prefix[which]), int(lengths[which]))
        if held:
            each = np.any(held, axis=0).sum(axis=1)
            assert each.max() - each.min() <= 1
            # Shared documents come first, so what is left of the promised places belongs to others.
            assert all((np.diff(np.any(held, axis=0)[rank].astype(int)) <= 0).all() for rank in range(num_shards))
    assert (seen == 1).all()
    assert packing.padding == pytest.approx(1 - lengths.sum() / (len(packing) * num_shards * 48))
    tiny = (lengths < 2) & (num_shards > 1)  # a shared document of one token is in one shard
    assert shared_documents <= packing.shared.documents <= shared_documents + tiny.sum()
    assert num_shards == 1 or shared_documents > 0


def _check_zigzag(there: np.ndarray, offset: np.ndarray, prefix: int, length: int) -> None:
    """Rank r has pieces r and 2C - 1 - r of the prefix and of the rest, all in order, equal but for a token."""
    num_shards = len(there)
    for first, last in ((0, prefix), (prefix, length)):
        inside = there & (offset >= first) & (offset < last)
        pieces: list[np.ndarray] = []
        for rank in range(num_shards):
            own = np.sort(offset[rank][inside[rank]])
            assert (own == offset[rank][inside[rank]]).all(), "in order of offset"
            pieces.append(own)
        # Offsets go round: up the ranks with early pieces, down again with late ones.
        order = np.full(last - first, -1)
        for rank, own in enumerate(pieces):
            order[own - first] = rank
        half = np.flatnonzero(np.diff(order) < 0)
        turn = int(half[0]) + 1 if len(half) else int(np.searchsorted(order, num_shards - 1, side="right"))
        up, down = order[:turn], order[turn:]
        assert (np.diff(up) >= 0).all() and (np.diff(down) <= 0).all()
        counts = np.bincount(order, minlength=num_shards)
        assert counts.max(initial=0) - counts.min(initial=10**9) <= 2 and last - first == counts.sum()


@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_is_that_of_each_document(mask: str) -> None:
    lengths, prefix, packing = packed(3, mask, shard_length=40)
    arguments, _ = MASKS[mask]
    for arrangement in packing:
        seen = mask_of(arrangement, **arguments)
        assert (seen.sum() - (arrangement.document < 0).sum()) == sum(
            seen[arrangement.document == which][:, arrangement.document == which].sum()
            for which in set(arrangement.document) - {-1}
        )
        for which in set(arrangement.document) - {-1}:
            places = np.flatnonzero(arrangement.document == which)
            places = places[np.argsort(arrangement.offset[places])]
            offsets = np.arange(lengths[which])
            wanted = sees(offsets, offsets, 0 if prefix is None else prefix[which], **arguments)
            assert (seen[np.ix_(places, places)] == wanted).all()
            if prefix is not None and "window" not in arguments:
                assert wanted[:, : prefix[which]].all(), "all tokens attend to the prefix"


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_work_is_what_is_counted(num_shards: int, mask: str) -> None:
    arguments, _ = MASKS[mask]
    lengths, _, packing = packed(num_shards, mask, shard_length=56, seed=3)
    for index, arrangement in enumerate(packing):
        present = arrangement.document >= 0
        seen = mask_of(arrangement, **arguments) & present[:, None]
        blocks = seen.reshape(num_shards, 56, num_shards, 56).sum(axis=(1, 3))
        hops = np.array([[blocks[r, (r + o) % num_shards] for o in range(num_shards)] for r in range(num_shards)])
        work = arrangement.work()
        assert work.dtype == np.int64 and (work == hops).all()
        mean = hops.sum() / num_shards
        assert packing.imbalance[index] == pytest.approx(hops.sum(axis=1).max() / mean)
        assert packing.lockstep_imbalance[index] == pytest.approx(hops.max(axis=0).sum() / mean)


def test_long_documents_are_counted_without_overflow() -> None:
    lengths = np.array([2**26, 2**22, 2**22 + 1])
    packing = ringjax.pack(lengths, num_shards=4, shard_length=2**25, final=True)
    assert packing.dealt.work().sum() == sum(n * (n + 1) // 2 for n in lengths.tolist())


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3])
def test_take(num_shards: int) -> None:
    lengths, _, packing = packed(num_shards, "causal", seed=5)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(lengths))  # documents lie in the array in any order
    starts = np.empty(len(lengths), np.uint32)
    starts[order] = np.cumsum(lengths[order]) - lengths[order]
    tokens = rng.integers(1, 2**16, lengths.sum()).astype(np.uint16)
    for arrangement in packing:
        inputs, targets = arrangement.take(tokens, starts)
        assert inputs.dtype == targets.dtype == np.uint16
        for place, (document, offset) in enumerate(zip(arrangement.document, arrangement.offset, strict=True)):
            follows = document >= 0 and offset + 1 < lengths[document]
            assert arrangement.loss_mask[place] == follows
            assert inputs[place] == (tokens[starts[document] + offset] if document >= 0 else 0)
            assert targets[place] == (tokens[starts[document] + offset + 1] if follows else 0)


def test_take_refuses_what_does_not_fit() -> None:
    arrangement = ringjax.pack([5, 3], num_shards=2, shard_length=4)[0]
    tokens = np.arange(8)
    with pytest.raises(ValueError, match=r"tokens must be one array.*rank 1. Got shape \(2, 4\)"):
        arrangement.take(tokens.reshape(2, 4), [0, 5])
    with pytest.raises(ValueError, match=r"starts must be integers \[documents\].*float64 \(2,\)"):
        arrangement.take(tokens, [0.0, 5.0])
    with pytest.raises(ValueError, match="starts must have a number for each document.*document 1.*Got 1"):
        arrangement.take(tokens, [0])
    with pytest.raises(ValueError, match="tokens must hold all tokens of document 1, 3 of them from 6 on. Got 8"):
        arrangement.take(tokens, [0, 6])
    with pytest.raises(ValueError, match="tokens must hold all tokens of document 0, 5 of them from -1 on. Got 8"):
        arrangement.take(tokens, [-1, 5])


# --- balance ---------------------------------------------------------------------------------------------------------

# Two histograms of lengths in thousands (1,024) of tokens, of MagiAttention's benchmark of distributed attention
# (github.com/SandAI-org/MagiAttention, exps/dist_attn/benchmark/utils.py), for short and for long sequences.
SHORT = {
    (0, 0.25): 766, (0.25, 0.5): 1651, (0.5, 0.75): 1246, (0.75, 1): 972, (1, 1.5): 1324, (1.5, 2): 927, (2, 2.5): 720,
    (2.5, 3): 519, (3, 3.5): 379, (3.5, 4): 264, (4, 5): 380, (5, 6): 245, (6, 7): 145, (7, 8): 97, (8, 10): 122,
    (10, 15): 128, (15, 20): 51, (20, 64): 64,
}  # fmt: skip
LONG = {
    (0, 2): 16, (2, 4): 5, (4, 8): 4, (8, 16): 6, (16, 32): 8, (32, 64): 21, (64, 128): 40, (128, 256): 20,
    (256, 512): 5, (512, 1024): 4, (1024, 2048): 1, (2048, 4096): 1,
}  # fmt: skip


def drawn(histogram: dict[tuple[float, float], int], number: int, rng: np.random.Generator) -> np.ndarray:
    edges, weights = np.array(list(histogram)), np.array(list(histogram.values()))
    low, high = (edges[rng.choice(len(weights), number, p=weights / weights.sum())] * 1024).astype(int).T
    return rng.integers(low, high + 1).clip(1)


@functools.cache
def sizes_of_the_standard_library() -> list[int]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    return [size for file in files if "site-packages" not in file.parts and (size := file.stat().st_size)]


def distribution(name: str, capacity: int, shard_length: int, sequences: float) -> np.ndarray:
    """Lengths of documents for so many sequences of ``capacity`` tokens."""
    rng = np.random.default_rng(7)
    wanted = int(sequences * capacity)
    if name == "standard library":
        sizes = np.array(sizes_of_the_standard_library())
        lengths = rng.permutation(np.tile(sizes, 1 + wanted // sizes.sum())).clip(max=capacity)
    elif name == "log-normal":
        lengths = np.exp(rng.normal(np.log(2048), 1.5, 64 + wanted // 1024)).astype(int).clip(1, min(2**20, capacity))
    elif name.startswith("equal "):
        length = int(float(name.removeprefix("equal ")) * shard_length)
        lengths = np.full(1 + wanted // length, length)
    elif name == "one giant":
        small = rng.integers(16, shard_length // 8, 8 * wanted // shard_length)
        each = int(np.searchsorted(np.cumsum(small), capacity // 2))
        number = max(1, int(sequences))
        lengths = np.concatenate(
            [np.append(small[n * each : (n + 1) * each], capacity - capacity // 2) for n in range(number)]
        )
        return np.append(lengths, small[:each])
    else:
        lengths = drawn(SHORT if name == "magi short" else LONG, 64 + wanted // 1024, rng).clip(max=capacity // 4)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), wanted)) + 1]


NAMES = [
    "standard library", "log-normal", "equal 0.1", "equal 0.6", "equal 1.0", "equal 1.7", "one giant", "magi short",
    "magi long",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_shards", "shard_length"), [(2, 8192), (2, 65536), (8, 8192), (64, 8192), (256, 4096)])
def test_balance(name: str, num_shards: int, shard_length: int) -> None:
    capacity = num_shards * shard_length
    sequences = 12.5 if num_shards <= 8 else 2.5
    lengths = distribution(name, capacity, shard_length, sequences)
    packing = ringjax.pack(lengths, num_shards=num_shards, shard_length=shard_length)
    assert len(packing) >= 2
    assert packing.imbalance.max() <= 1.05
    assert packing.lockstep_imbalance.max() <= 1.10
    assert packing.shared_length % 128 == 0
    assert lengths[packing.left_over].sum() < capacity
    if len(lengths) >= 500:
        assert packing.padding < 0.01
    if name == "one giant":  # and hardly any other
        assert packing.shared.documents <= len(packing) + 0.1 * len(lengths)
    if name in ("equal 0.1", "equal 1.0"):
        assert packing.shared.documents == packing.shared_length == 0


@pytest.mark.parametrize("mask", ["full", "causal window", "prefix"])
def test_balance_under_other_masks(mask: str) -> None:
    arguments, has_prefix = MASKS[mask]
    if "window" in arguments:
        arguments = {"window": 512}
    lengths = distribution("log-normal", 8 * 8192, 8192, 8.5)
    prefix = some_prefixes(lengths) if has_prefix else None
    packing = ringjax.pack(lengths, num_shards=8, shard_length=8192, prefix=prefix, **arguments)
    assert packing.imbalance.max() <= 1.05 and packing.lockstep_imbalance.max() <= 1.10


@pytest.mark.parametrize("num_shards", [8, 64])
@pytest.mark.parametrize("two_sided", [False, True])
def test_hops_are_equal_under_windows(num_shards: int, two_sided: bool) -> None:
    """The rows of the page, which are of causal windows; to both sides they are the same but for the last digits."""
    lengths = distribution("log-normal", num_shards * 8192, 8192, 8.5 if num_shards == 8 else 2.5)
    for window in (512, 2048, 4096):
        packing = ringjax.pack(
            lengths, num_shards=num_shards, shard_length=8192, window=window, is_causal=not two_sided
        )
        total, lockstep = packing.imbalance.max(), packing.lockstep_imbalance.max()
        if not two_sided and (num_shards, window) != (64, 512):
            assert f"| {num_shards} | {window} | {total:.3f} | {lockstep:.3f} |" in PAGE
        assert lockstep <= 1.10 or (num_shards == 8 and window >= 2048 and lockstep <= 1.18)


@pytest.mark.parametrize(
    ("name", "num_shards", "shard_length", "sequences", "above"),
    [
        ("magi short", 8, 65536, 4.5, 0.02),
        ("magi short", 8, 8192, 20.5, 0.08),  # few documents per shard: some are shared because they fit nowhere
        ("magi short", 64, 16384, 2.5, 0.02),
        ("log-normal", 64, 32768, 2.5, 0.03),
        ("one giant", 32, 8192, 4.5, 0.01),
        ("one giant", 8, 8192, 12.5, 0.03),
    ],
)
def test_hardly_more_is_shared_than_must_be(
    name: str, num_shards: int, shard_length: int, sequences: float, above: float
) -> None:
    """A document cannot be local that has more pairs than a rank may have beside its part of those that are shared."""
    lengths = distribution(name, num_shards * shard_length, shard_length, sequences)
    packing = ringjax.pack(lengths, num_shards=num_shards, shard_length=shard_length)
    needed = []
    for arrangement in packing:
        sizes = np.sort(lengths[list(set(arrangement.document) - {-1})])[::-1]
        pairs = sizes * (sizes + 1) / 2
        shared = 0
        while shared < len(sizes) and (
            sizes[shared] > shard_length
            or pairs[shared] + pairs[:shared].sum() / num_shards > 1.05 * pairs.sum() / num_shards
        ):
            shared += 1
        needed.append(sizes[:shared].sum() / num_shards)
    assert np.mean(needed) <= packing.shared.tokens * shard_length <= np.mean(needed) + above * shard_length
    # One number for all sequences, which no unlucky one of them decides.
    assert packing.shared_length <= 1.3 * max(needed) + 128


def test_the_tolerance_is_what_is_shared_for() -> None:
    lengths = distribution("magi short", 16 * 8192, 8192, 4.5)
    shared, worst = [], []
    for tolerance in (1.01, 1.05, 1.5):
        packing = ringjax.pack(lengths, num_shards=16, shard_length=8192, tolerance=tolerance)
        shared.append(packing.shared.tokens)
        worst.append(packing.imbalance.max())
        assert worst[-1] <= tolerance
    assert shared == sorted(shared, reverse=True) and shared[0] > 1.2 * shared[2]
    assert worst == sorted(worst) and worst[2] > 1.1


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "packing.md").read_text(encoding="utf-8")


def row(name: str, num_shards: int, shard_length: int = 65536) -> str:
    """A row of the page's table. All of them: python -c "import test_packing; test_packing.table()", in tests."""
    lengths = distribution(name, num_shards * shard_length, shard_length, 20.5 if num_shards < 64 else 4.5)
    packing = ringjax.pack(lengths, num_shards=num_shards, shard_length=shard_length)
    return (
        f"| {name} | {num_shards} | {packing.imbalance.max():.3f} | {packing.lockstep_imbalance.max():.3f} "
        f"| {packing.padding:.1%} | {packing.shared.tokens:.0%} | {packing.shared_length / shard_length:.0%} |"
    )


def table() -> None:
    sys.stdout.writelines(row(name, num_shards) + "\n" for name in NAMES for num_shards in (2, 8, 64, 256))


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "standard library"]
)  # which each Python has its own
def test_figures_of_the_page(name: str) -> None:
    assert row(name, 8) in PAGE


# --- calls -----------------------------------------------------------------------------------------------------------


def same(one: Packing, other: Packing) -> bool:
    return len(one) == len(other) and all(
        (a.document == b.document).all() and (a.offset == b.offset).all() for a, b in zip(one, other, strict=True)
    )


def test_the_seed_decides() -> None:
    lengths = some_lengths(4, 64, 1)
    options: dict[str, Any] = {"num_shards": 4, "shard_length": 64}
    assert same(ringjax.pack(lengths, seed=3, **options), ringjax.pack(list(lengths), seed=3, **options))
    assert not same(ringjax.pack(lengths, seed=3, **options), ringjax.pack(lengths, seed=4, **options))
    places: set[int] = set()
    for seed in range(8):
        longest = [int(lengths[x.document].max()) for x in ringjax.pack(lengths, seed=seed, **options)]
        places.add(longest.index(max(longest)))
    assert len(places) > 1, "sequences are in a random order"


def test_nothing_is_lost_over_several_calls() -> None:
    stream = some_lengths(4, 64, 2, sequences=9.7)
    used: list[Any] = []
    carried = np.empty(0, np.int64)
    for part in np.array_split(np.arange(len(stream)), 5):
        documents = np.concatenate([carried, part])
        packing = ringjax.pack(stream[documents], num_shards=4, shard_length=64, seed=len(used))
        now = [documents[which] for arrangement in packing for which in set(arrangement.document) - {-1}]
        carried = documents[packing.left_over]
        assert stream[carried].sum() < 4 * 64
        assert set(now) | set(carried) == set(documents) and not set(now) & set(carried)
        used += now
    packing = ringjax.pack(stream[carried], num_shards=4, shard_length=64, final=True)
    assert not packing.left_over.size and len(packing) == 1
    used += [carried[which] for which in set(packing[0].document) - {-1}]
    assert sorted(used) == list(range(len(stream)))


def test_those_that_come_first_are_taken_first() -> None:
    packing = ringjax.pack(np.full(100, 16), num_shards=2, shard_length=64)
    assert len(packing) == 12 and packing.left_over.tolist() == [96, 97, 98, 99]


@pytest.mark.parametrize("shared_length", [None, 8, 12, 16])
@pytest.mark.parametrize("length", [1, 8, 12, 16, 24, 32])
def test_equal_documents(length: int, shared_length: int | None) -> None:
    """As many in each sequence as there is room for; a document longer than a shard needs its part of each."""
    if length > 16 and shared_length is not None and length > 2 * shared_length:
        return
    packing = ringjax.pack([length] * 200, num_shards=2, shard_length=16, shared_length=shared_length)
    each = {1: 32, 8: 4, 12: 2, 16: 2, 24: 1, 32: 1}[length]
    tokens = [int((arrangement.document >= 0).sum()) for arrangement in packing]
    assert set(tokens) == {each * length}
    assert len(packing.left_over) == 200 - len(packing) * each and len(packing.left_over) * length < 2 * 16
    assert packing.imbalance.max() == pytest.approx(1, abs=0.05)


def test_a_given_shared_length() -> None:
    lengths = some_lengths(4, 64, 4)
    free = ringjax.pack(lengths, num_shards=4, shard_length=64, multiple=1, final=True)
    for shared_length in (64, free.shared_length, 48):
        packing = ringjax.pack(lengths, num_shards=4, shard_length=64, shared_length=shared_length, final=True)
        assert packing.shared_length == shared_length and not packing.left_over.size
        placed: list[Any] = []
        for arrangement in packing:
            document = arrangement.document.reshape(4, -1)
            placed += set(document.ravel()) - {-1}
            behind = set(document[:, shared_length:].ravel()) - {-1}
            assert all((document == which).any(axis=1).sum() == 1 for which in behind)
        assert sorted(placed) == list(range(len(lengths))), "what did not fit in one sequence is in another"
    local = ringjax.pack(lengths[lengths <= 64], num_shards=4, shard_length=64, shared_length=0, final=True)
    assert local.shared == (0, 0.0) and not local.left_over.size


@pytest.mark.parametrize("final", [False, True])
def test_documents_that_are_nearly_a_sequence(final: bool) -> None:
    """Longer than what a sequence aims at, shorter than what may be shared."""
    packing = ringjax.pack([2036] * 3, num_shards=2, shard_length=1024, shared_length=1020, final=final)
    assert len(packing) == 3 - (not final) and len(packing.left_over) == (not final)
    assert packing.shared == (len(packing), 1.0)


def test_nothing_to_pack() -> None:
    for lengths in ([], [3, 4]):
        packing = ringjax.pack(lengths, num_shards=2, shard_length=4)
        assert len(packing) == 0 and packing.left_over.tolist() == list(range(len(lengths)))
        assert packing.padding == 0 and packing.shared == (0, 0.0) and packing.shared_length == 0
        with pytest.raises(IndexError):
            packing[0]
    assert len(ringjax.pack([], num_shards=2, shard_length=4, final=True)) == 0
    packing = ringjax.pack([3, 4], num_shards=2, shard_length=4, final=True)
    assert len(packing) == 1 and packing[-1].document.tolist().count(-1) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lengths": [3, 0, -1]}, "lengths must be positive. Got 0 of document 1"),
        ({"lengths": [3, 17]}, r"lengths must .*num_shards \* shard_length = 2 \* 8 = 16. Got 17 of document 1"),
        ({"lengths": [3.5]}, r"lengths must be integers \[documents\]. Got float64 \(1,\)"),
        ({"lengths": [[3]]}, r"lengths must be integers \[documents\]. Got int64 \(1, 1\)"),
        ({"num_shards": 0}, "num_shards must be an integer of at least 1. Got 0"),
        ({"num_shards": 2.0}, "num_shards must be an integer of at least 1. Got 2.0"),
        ({"shard_length": True}, "shard_length must be an integer of at least 1. Got True"),
        ({"seed": -1}, "seed must be an integer of at least 0. Got -1"),
        ({"multiple": 0}, "multiple must be an integer of at least 1. Got 0"),
        ({"tolerance": 0.9}, "tolerance must be a number of at least 1.*Got 0.9"),
        ({"tolerance": float("nan")}, "tolerance must be a number of at least 1.*Got nan"),
        ({"final": 1}, "final must be True or False. Got 1"),
        ({"is_causal": 1}, "is_causal must be True or False. Got 1"),
        ({"window": -1}, "window must be None, a non-negative integer or a pair.*Got -1"),
        ({"window": (1, 2, 3)}, r"window must be None.*Got \(1, 2, 3\)"),
        ({"prefix": [1]}, "prefix must have a number for each of 2 documents. Got 1"),
        ({"prefix": [1, 6]}, "prefix must be from 0 to the length of its document. Got 6 of document 1 with 5 tokens"),
        ({"prefix": [1, 2], "is_causal": False}, "prefix must be None where is_causal is False"),
        ({"shared_length": -1}, "shared_length must be an integer of at least 0. Got -1"),
        ({"shared_length": 9}, "shared_length must be at most shard_length, 8. Got 9"),
        ({"lengths": [3, 12], "shared_length": 5},
         r"lengths must .*shard_length, 8, or num_shards \* shared_length = 2 \* 5 = 10. Got 12 of document 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"lengths": [3, 5], "num_shards": 2, "shard_length": 8} | changed
    with pytest.raises(ValueError, match=words):
        ringjax.pack(arguments.pop("lengths"), **arguments)
