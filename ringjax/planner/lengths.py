"""Lengths of documents: those of a file, or drawn from a named distribution."""

import json
from pathlib import Path
from typing import Any

import numpy as np

# What may be asked for, as NAME:NUMBER:...
DISTRIBUTIONS = {"lognormal": "MEDIAN:SIGMA:LONGEST", "uniform": "SHORTEST:LONGEST", "equal": "LENGTH"}
_FORMS = [f"{name}:{numbers}" for name, numbers in DISTRIBUTIONS.items()]
GRAMMAR = f"FILE, {', '.join(_FORMS[:-1])} or {_FORMS[-1]}"
SEQUENCES = 16  # for so many of them documents are drawn
_MOST = 2**25  # documents that are drawn


def document_lengths(given: Any, seq_len: int) -> np.ndarray:
    """Lengths as a list, from a file, or drawn, the same for the same words: int64 [documents].

    Args:
      given: integers; the path of a file that has one integer a line, or a list of them in JSON; or a distribution,
        of which documents for 16 sequences are drawn: "lognormal:MEDIAN:SIGMA:LONGEST", exp of a normal distribution
        whose mean is log(MEDIAN), cut at LONGEST; "uniform:SHORTEST:LONGEST", both included; "equal:LENGTH".
      seq_len: T, tokens of a sequence.

    Raises:
      ValueError: for what is none of these, lengths that are not positive, and fewer tokens than a sequence has.
    """
    if isinstance(given, str) and given.partition(":")[0] in DISTRIBUTIONS and ":" in given:
        return _drawn(given, SEQUENCES * seq_len)
    if isinstance(given, (str, Path)):
        given = _read(Path(given))
    try:
        lengths = np.asarray(given)
    except ValueError:  # rows of several lengths
        raise ValueError(f"documents must be integers, the length of each. Got {given!r}.") from None
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"documents must be integers, the length of each. Got {lengths.dtype.name} {lengths.shape}.")
    lengths = lengths.astype(np.int64)
    wrong = np.flatnonzero(lengths < 1)
    if len(wrong):
        raise ValueError(f"documents must have positive lengths. Got {lengths[wrong[0]]} of document {wrong[0]}.")
    if lengths.sum() < seq_len:
        raise ValueError(
            f"documents must have at least {seq_len} tokens in all, those of a sequence. Got {lengths.sum()}."
        )
    return lengths


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError(
            f"documents must be {GRAMMAR}, and the file one that can be read. Got {str(path)!r}."
        ) from None
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except ValueError as error:
        raise ValueError(
            f"documents: {str(path)!r} must have one integer a line, or a list of integers in JSON. Got {error}."
        ) from None
    return found if found else np.empty(0, np.int64)


def _drawn(given: str, tokens: int) -> np.ndarray:
    name, *texts = given.split(":")
    wanted = DISTRIBUTIONS[name]
    whole = [part != "SIGMA" for part in wanted.split(":")]
    try:
        numbers = [int(text) if is_whole else float(text) for text, is_whole in zip(texts, whole, strict=True)]
        fits = all(0 < number < 2**31 for number in numbers) and (name != "uniform" or numbers[0] <= numbers[1])
    except ValueError:
        numbers, fits = [], False
    if not fits:
        raise ValueError(
            f"documents must be {name}:{wanted}, positive integers" + (" and a number" * (not all(whole)))
            + (", the first not above the second" if name == "uniform" else "") + f". Got {given!r}."
        )  # fmt: skip
    rng, found, missing, count = np.random.default_rng(0), [], tokens, 0
    while missing > 0:
        if name == "lognormal":
            drawn = np.exp(rng.normal(np.log(numbers[0]), numbers[1], 4096)).clip(1, numbers[2]).astype(np.int64)
        else:
            drawn = rng.integers(int(numbers[0]), int(numbers[-1]), 4096, endpoint=True)
        found.append(drawn)
        missing, count = missing - int(drawn.sum()), count + len(drawn)
        if count > _MOST:
            raise ValueError(
                f"documents must be at most {_MOST} that fill {SEQUENCES} sequences, {tokens} tokens. Got {given!r}, "
                f"of which {count} have {tokens - missing}."
            )
    lengths = np.concatenate(found)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
