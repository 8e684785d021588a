"""The tokenizer that a GGUF file's metadata describe, as a tokenizers.Tokenizer: byte-level BPE, or SentencePiece's."""

from typing import Any

from .errors import ModelError, need
from .gguf import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is cut before bytes are merged, by the name in the file: as GPT-2 does, with digits apart, or by a pattern.
_CUTS: dict[str, str | None] = {
    "gpt-2": None,
    "default": None,
    "smollm": "digits",
    "llama-bpe": f"{_ENGLISH}|{_WORDS % '{1,3}'}",
    "llama3": f"{_ENGLISH}|{_WORDS % '{1,3}'}",
    "qwen2": f"{_ENGLISH}|{_WORDS % ''}",
}


def build(file: GgufFile) -> tuple[Any, int | None, list[int]]:
    """(tokenizer, bos, eos) of a file.

    Raises:
      ModelError: for a kind of tokenizer that is not supported, or metadata that make none.
    """
    try:
        return _build(file)
    except ModelError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise ModelError(f"{file.path} must describe a tokenizer in tokenizer.ggml. Got: {error}.") from error


def _build(file: GgufFile) -> tuple[Any, int | None, list[int]]:
    take = lambda key, *default: file.take(f"tokenizer.ggml.{key}", *default)  # noqa: E731
    kind, tokens, kinds = take("model"), take("tokens"), take("token_type", None)
    package = need("tokenizers")
    if kind == "gpt2":
        made, opens = _byte_level(file.path, take, tokens), False
    elif kind == "llama":
        made, opens = _sentence_piece(take, tokens), True
    else:
        raise ModelError(f"{file.path}: tokenizer.ggml.model must be gpt2 or llama. Got {kind!r}.")
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [t for t, k in zip(tokens, kinds or (), strict=False) if k == wanted]
        new = [package.AddedToken(t, special=special, normalized=False) for t in chosen]
        made.add_special_tokens(new) if special else made.add_tokens(new)
    bos, eos = take("bos_token_id", None), take("eos_token_id", None)
    if take("add_bos_token", opens) and bos is not None:
        made.post_processor = package.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    ends = dict.fromkeys([eos, take("eot_token_id", None)])
    return made, bos, [i for i in ends if i is not None]


def _byte_level(path: Any, take: Any, tokens: list[str]) -> Any:
    package = need("tokenizers")
    cuts, name = package.pre_tokenizers, take("pre", "default")
    if name not in _CUTS:
        raise ModelError(f"{path}: tokenizer.ggml.pre must be one of {', '.join(_CUTS)}. Got {name!r}.")
    cut = _CUTS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in take("merges")]
    # Llama 3 takes a word that is a token as it is, whatever the merges would make of it.
    whole = name in ("llama-bpe", "llama3")
    vocab = {token: i for i, token in enumerate(tokens)}
    made = package.Tokenizer(package.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    bytes_of = cuts.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))
    if cut is None:
        made.pre_tokenizer = bytes_of
    else:
        first = cuts.Digits(individual_digits=True)
        if cut != "digits":
            first = cuts.Split(package.Regex(cut), behavior="isolated", invert=False)
        made.pre_tokenizer = cuts.Sequence([first, bytes_of])
    if name == "qwen2":
        made.normalizer = package.normalizers.NFC()
    made.decoder = package.decoders.ByteLevel()
    return made


def _sentence_piece(take: Any, tokens: list[str]) -> Any:
    """Pieces merge in the order of their scores, so a merge is every pair whose union is a piece."""
    package = need("tokenizers")
    scores = take("scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:], score)
        for piece, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[2])
    unknown = take("unknown_token_id", 0)
    made = package.Tokenizer(
        package.models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, right, _ in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = package.normalizers.Replace(" ", "▁")
    prefixed = take("add_space_prefix", True)
    made.normalizer = package.normalizers.Sequence([package.normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    parts = [package.decoders.Replace("▁", " "), package.decoders.ByteFallback(), package.decoders.Fuse()]
    if prefixed:
        parts.append(package.decoders.Strip(" ", 1, 0))
    made.decoder = package.decoders.Sequence(parts)
    return made
