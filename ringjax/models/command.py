"""What `ringjax generate` does: a pretrained model, prompts, and text as it comes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from ..mesh import ring_mesh
from ..units import size
from .errors import ModelError
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
    start = time.perf_counter()
    mesh = ring_mesh(jax.device_count())
    try:
        decoder = load(path, mesh=mesh, layout="striped", dtype=dtype, param_dtype=dtype)
    except jax.errors.JaxRuntimeError as error:
        raise ModelError(f"{path}: must fit the memory of {mesh.size} devices. Got {_first_line(error)}.") from error
    if words.vocab_size > decoder.config.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer must fit the vocabulary of {decoder.config.vocab_size}. Got {words.vocab_size} ids."
        )
    say(f"{path}: {_parameters(decoder):,} parameters in {dtype} on {mesh.size} {jax.default_backend()} devices, "
        f"read in {time.perf_counter() - start:.1f} s")  # fmt: skip
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
