"""Documents of text, of lines of JSON and of token files, what is held out of them, and every file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_models_gguf import BYTES, smol
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from ringjax import models
from ringjax.training import Batches
from ringjax.training.config import Data
from ringjax.training.data import Corpus, DataError, hold_out, read

WORDS = {word: i for i, word in enumerate(("<unk>", "<end>", "a", "b", "c", "d"))}
END = 1


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> models.Tokenizer:
    """Whole words, and an end token; its file asks to cut every text short, as files of some models do."""
    folder = tmp_path_factory.mktemp("words")
    backend = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return models.tokenizer(folder)


def corpus_of(source: str, folder: Path, words: models.Tokenizer | None, **keys: Any) -> Corpus:
    return read(Data(source=source, paths=(str(folder),), **keys), words)


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.text[s : s + n].tolist() for s, n in zip(corpus.starts, corpus.lengths, strict=True)]


def test_text_is_a_document_per_file_that_ends(tmp_path: Path, words: models.Tokenizer):
    texts = {"1.txt": "a b c", "2.txt": "", "3.txt": "\ufeffd <end>", "4.txt": "é"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = corpus_of("text", tmp_path, words)
    assert documents(corpus) == [[2, 3, 4, END], [5, 0, 0, 0, END], [0, END]]  # words are cut at "<" and ">"
    assert corpus.empty.endswith("2.txt") and corpus.unit == "token" and corpus.text.dtype == np.int32


def test_an_end_token_that_stands_there_is_not_doubled(words: models.Tokenizer):
    from ringjax.training.sources import encode

    words.backend.add_special_tokens(["<end>"])
    assert encode("d <end>", words).tolist() == [5, END]


def test_jsonl_is_a_document_per_line(tmp_path: Path, words: models.Tokenizer):
    lines = [{"body": "a b", "id": 1}, {"body": ""}, {"body": "c\nd"}]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "x.jsonl").write_text(text.replace("\n", "\r\n\n", 1), encoding="utf-8")
    corpus = corpus_of("jsonl", tmp_path, words, text_key="body")
    assert documents(corpus) == [[2, 3, END], [4, 5, END]]
    assert corpus.empty.endswith("x.jsonl, line 3")


def test_tokens_are_taken_as_they_are(tmp_path: Path):
    np.save(tmp_path / "1.npy", np.array([7, 300, 7], np.uint16))
    np.save(tmp_path / "2.npy", np.array([2**31 - 1], np.uint64))
    np.save(tmp_path / "3.npy", np.array([], np.int64))
    corpus = corpus_of("tokens", tmp_path, None)
    assert documents(corpus) == [[7, 300, 7], [2**31 - 1]] and corpus.empty.endswith("3.npy")


def test_the_library_with_a_tokenizer_is_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.py").write_text("the th")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    vocabulary = {"model": "gpt2", "merges": ["t h"], "tokens": [*BYTES[:100], "th", "Ġ"]}
    path = smol(tmp_path / "m.gguf", **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    corpus = read(Data(), models.tokenizer(path))
    assert corpus.text.tolist() == [100, BYTES.index("e"), 101, 100]
    assert read(Data()).text.tobytes() == b"the th"


@pytest.mark.parametrize(
    ("source", "content", "says"),
    [
        ("text", b"caf\xe9", r"UTF-8. Got .*bad, where byte 3 \(0xe9\)"),
        ("text", b"", r"nothing but empty files: .*bad"),
        (
            "jsonl",
            b'{"text": "a"}\n{"text": ',
            r"an object whose 'text' is a string. Got .*bad, line 2, where there is no J",
        ),
        ("jsonl", b'{"text": "a"}\n\n["a"]', r"bad, line 3, which is list"),
        ("jsonl", b'{"body": "a"}', r"bad, line 1, with the keys \['body'\]; data\.text_key"),
        ("jsonl", b'{"text": 3}', r"bad, line 1, where it is int"),
        ("jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"UTF-8. Got .*bad, line 2, where byte 10"),
        ("jsonl", b" \n", r"nothing but empty files: .*bad"),
        ("tokens", b"text", r"a \.npy of integers. Got .*bad"),
        ("tokens", np.zeros((2, 3), int), r"bad must be integers of one dimension. Got int64 \(2, 3\)"),
        ("tokens", np.zeros(3), r"bad must be integers of one dimension. Got float64 \(3,\)"),
        ("tokens", np.array([True]), r"bad must be integers of one dimension. Got bool"),
        ("tokens", np.array([[1], [1, 2]], object), r"a \.npy of integers. Got .*bad: Object arrays"),
        ("tokens", np.array([3, -1]), r"bad must be ids in \[0, 2\^31\). Got -1 to 3"),
        ("tokens", np.array([2**31]), r"bad must be ids in \[0, 2\^31\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, words: models.Tokenizer, source: str, content: Any, says: str):
    if isinstance(content, bytes):
        (tmp_path / "bad").write_bytes(content)
    else:
        with (tmp_path / "bad").open("wb") as file:
            np.save(file, content)
    with pytest.raises(DataError, match=says) as refused:
        corpus_of(source, tmp_path, words)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.npy").touch()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(DataError, match=r"readable. Got .*x\.npy \(Permission denied\)"):
        corpus_of("tokens", tmp_path, None)


# ---------------------------------------------------------------------------------------------------- batches of tokens


def test_from_tokens_has_the_batches_of_the_command():
    """Bytes as ids give what the command deals of the bytes, in the same order."""
    texts = [bytes(range(40, 40 + n)) for n in (7, 30, 12, 25)]
    config = Data(sequence_length=16, batch_size=2, seed=3)
    theirs = Batches(Corpus.of(texts), config, layout="zigzag", num_shards=2)
    ours = Batches.from_tokens(
        (np.frombuffer(text, np.uint8) for text in texts), sequence_length=16, batch_size=2, seed=3, num_shards=2
    )
    for step in range(6):
        for name, value in theirs.on_host(step).items():
            assert np.array_equal(ours.on_host(step)[name], value), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"documents": [[1, 2], [[3]]]}, r"documents\[1\] must be integers of one dimension. Got int64 \(1, 1\)"),
        ({"documents": [b"ab"]}, r"documents\[0\] must be integers"),
        ({"documents": [[1, -2]]}, r"documents\[0\] must be ids in \[0, 2\^31\). Got -2 to 1"),
        ({"documents": [[]]}, "at least one document"),
        ({"sequence_length": 0}, "sequence_length must be an integer of at least 1. Got 0"),
        ({"batch_size": 1.0}, "batch_size must be an integer of at least 1. Got 1.0"),
        ({"seed": -1}, "seed must be an integer of at least 0. Got -1"),
        ({"num_shards": True}, "num_shards must be an integer of at least 1. Got True"),
        ({"layout": "spiral"}, "layout"),
        ({"sequence_length": 6, "num_shards": 2}, "6"),
    ],
)
def test_from_tokens_refuses(change: dict[str, Any], says: str):
    good: dict[str, Any] = {"documents": [[1, 2, 3]], "sequence_length": 4, "batch_size": 1}
    keys = good | change
    with pytest.raises(ValueError, match=says):
        Batches.from_tokens(keys.pop("documents"), **keys)


# --------------------------------------------------------------------------------------------------------- held out


def numbered(*lengths: int) -> Corpus:
    """Every token of the corpus is another one."""
    ends = np.cumsum(lengths)
    return Corpus.of([np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths, strict=True)])


@pytest.mark.parametrize("lengths", [(10,) * 40, (400,), (5, 395), (395, 5), (1, 1, 300, 98)])
def test_training_never_sees_what_is_held_out(lengths: tuple[int, ...]):
    corpus = numbered(*lengths)
    training, held = hold_out(corpus, 0.1, seed=0)
    assert sorted([*training.text, *held.text]) == list(range(400))
    assert 20 <= len(held.text) <= 40
    batches = Batches(training, Data(sequence_length=16, batch_size=2), layout="contiguous", num_shards=1)
    seen: set[int] = set()
    for step in range(2 * 400 // 32):
        batch = batches.on_host(step)
        seen |= {*batch["tokens"].ravel()} | {*batch["targets"][batch["loss_mask"]]}
    assert seen and not seen & {*held.text}
    again = hold_out(corpus, 0.1, seed=0)
    assert [x.fingerprint for x in again] == [training.fingerprint, held.fingerprint]


def test_documents_are_held_out_whole_where_they_are_many():
    corpus = numbered(*(10,) * 40)
    training, held = hold_out(corpus, 0.1, seed=0)
    assert held.lengths.tolist() == [10] * 4 and training.lengths.tolist() == [10] * 36
    assert hold_out(corpus, 0.1, seed=1)[1].fingerprint != held.fingerprint
    _, tail = hold_out(numbered(100, 300), 0.1, seed=0)
    assert tail.text.tolist() == list(range(360, 400))


@pytest.mark.parametrize("lengths", [(3,), (1,) * 50])
def test_too_little_to_hold_out(lengths: tuple[int, ...]):
    with pytest.raises(DataError, match=r"data\.eval_fraction: must leave at least 2 tokens.*Got 0.1 of"):
        hold_out(numbered(*lengths), 0.1, seed=0)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_once_has_every_target_once(batch_size: int, shards: int):
    corpus = numbered(9, 30, 1, 13)
    batches = Batches(corpus, Data(sequence_length=16, batch_size=2), layout="zigzag", num_shards=shards)
    once = batches.once(batch_size)
    targets: list[int] = []
    for step in range(len(once)):
        batch = once.on_host(step)
        assert batch["tokens"].shape == (batch_size, 16)
        targets += batch["targets"][batch["loss_mask"]].tolist()
        assert np.array_equal((batch["tokens"] + 1)[batch["loss_mask"]], batch["targets"][batch["loss_mask"]])
    assert sorted(targets) == [i for i in range(53) if i not in (0, 9, 39, 40)]  # all but the first of a document
