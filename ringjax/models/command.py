"""What `ringjax generate` and `ringjax eval` do with a pretrained model: continue a text, or measure one."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from ..layers.decoder import Decoder
from ..mesh import ring_mesh
from ..units import size
from .errors import ModelError
from .evaluation import Range, perplexity, plot
from .generation import Sampling, Stats, generate, shard_bytes
from .loading import load
from .tokens import Tokenizer, tokenizer

Write = Callable[[str], None]


def run(
    path: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    chat: bool,
    dtype: str,
    out: Write,
    say: Write,
) -> None:
    """Continues the prompts on all of JAX's devices.

    Args:
      chat: each prompt is what a user says, in the model's own template.
      out: takes the text, piece by piece.
      say: takes a line about the run.

    Raises:
      ModelError: the files are not what they must be, or a prompt is not.
    """
    words = tokenizer(path)
    ids = [_encode(words, prompt, chat) for prompt in prompts]
    decoder = _decoder(path, words, dtype, say, scan_layers=jax.default_backend() == "cpu")
    stats = Stats()
    rows = [_Text(words) for _ in ids]
    steps = generate(
        decoder, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=words.eos_ids, stats=stats
    )
    for step in steps:
        for row, text in zip(step, rows, strict=True):
            piece = "" if row is None else text.add(row)
            if len(rows) == 1:
                out(piece)
    if len(rows) == 1:
        out(rows[0].rest() + "\n")
    else:  # rows would be torn into each other
        for number, (prompt, text) in enumerate(zip(prompts, rows, strict=True)):
            out(f"[{number + 1}] {prompt!r}\n{text.whole()}\n")
    held = _held_bytes(decoder, stats.cache_bytes)
    say(f"prefill {stats.prompt_tokens} tokens, {stats.prefill_rate:.1f} per second with compilation; "
        f"decode {stats.new_tokens} tokens, {stats.decode_rate:.1f} per second; "
        f"{size(held)} per device of parameters and cache")  # fmt: skip


def evaluate(
    path: Path,
    text_file: Path,
    *,
    sequence_length: int,
    max_tokens: int | None,
    dtype: str,
    png: Path | None,
    say: Write,
) -> tuple[Range, list[Range]]:
    """The perplexity of a text on all of JAX's devices; see :func:`ringjax.models.perplexity`.

    Args:
      text_file: UTF-8.
      max_tokens: of the text, from its beginning; None: all.
      png: where to draw it, or None.
      say: takes a line about the run.

    Raises:
      ModelError: the files are not what they must be, or the picture cannot be written.
    """
    if png is not None and (png.is_dir() or not png.absolute().parent.is_dir()):
        raise ModelError(f"{png}: must be a file in a directory that exists.")
    words = tokenizer(path)
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ModelError(f"{text_file}: must be a text in UTF-8. Got {error}.") from error
    ids = words.encode(text)[:max_tokens]
    if len(ids) < 2:
        raise ModelError(f"{text_file}: must hold at least 2 tokens. Got {len(ids)}.")
    whole, ranges = perplexity(_decoder(path, words, dtype, say), ids, sequence_length=sequence_length)
    if png is not None:
        try:
            plot(ranges, png, title=f"{text_file.name} by {path.name}: perplexity {whole.perplexity:.2f}")
        except OSError as error:
            raise ModelError(f"{png}: must be writable. Got {error}.") from error
    return whole, ranges


def _decoder(path: Path, words: Tokenizer, dtype: str, say: Write, *, scan_layers: bool = True) -> Decoder:
    """The model, sharded over all of JAX's devices."""
    start = time.perf_counter()
    mesh = ring_mesh(jax.device_count())
    try:
        decoder = load(path, mesh=mesh, layout="striped", dtype=dtype, param_dtype=dtype, scan_layers=scan_layers)
    except jax.errors.JaxRuntimeError as error:
        raise ModelError(f"{path}: must fit the memory of {mesh.size} devices. Got {_first_line(error)}.") from error
    if words.vocab_size > decoder.config.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer must fit the vocabulary of {decoder.config.vocab_size}. Got {words.vocab_size} ids."
        )
    say(f"{path}: {_parameters(decoder):,} parameters in {dtype} on {mesh.size} {jax.default_backend()} devices, "
        f"read in {time.perf_counter() - start:.1f} s")  # fmt: skip
    return decoder


def _encode(words: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if chat:
        return words.encode(words.chat([{"role": "user", "content": prompt}]), special_tokens=False)
    ids = words.encode(prompt)
    if not ids:
        raise ModelError(f"prompt must hold at least one token. Got {prompt!r}.")
    return ids


class _Text:
    """Ids as text, in pieces that end where a character does."""

    def __init__(self, words: Tokenizer) -> None:
        self._words, self._ids, self._shown = words, [], ""

    def add(self, token: int) -> str:
        """What the token adds; "" while a character is not complete."""
        self._ids.append(token)
        text = self.whole()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._show(text)

    def rest(self) -> str:
        return self._show(self.whole())

    def whole(self) -> str:
        return self._words.decode(self._ids)

    def _show(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        return piece


def _parameters(decoder: object) -> int:
    return sum(x.size for x in jax.tree.leaves(decoder))


def _held_bytes(decoder: object, cache_bytes: int) -> int:
    """On the device that holds most."""
    return cache_bytes + shard_bytes(decoder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
