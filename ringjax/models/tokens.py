"""Text <-> token ids, through the tokenizers package: from tokenizer.json, or built from a GGUF file's metadata."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ModelError, need
from .gguf import GgufFile
from .gguf_tokens import build
from .huggingface import CONFIG, read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
      vocab_size: ids lie in [0, vocab_size).
      bos_id: of the token that opens a text, or None.
      eos_ids: of the tokens that end one.
      template: of a conversation, in Jinja, or None.
      backend: the tokenizers.Tokenizer.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    template: str | None
    backend: Any = dataclasses.field(repr=False)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        Args:
          text: what to encode.
          special_tokens: with those that the model expects around it (bos, where it has one).
        """
        return list(self.backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Iterable[int], *, special_tokens: bool = False) -> str:
        """The text of ids.

        Args:
          ids: integers in [0, vocab_size).
          special_tokens: special tokens are written out, too.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, open_reply: bool = True) -> str:
        """A conversation as text: encode it with ``special_tokens=False``, since the template writes them itself.

        Args:
          messages: tables with "role" ("system", "user", "assistant") and "content".
          open_reply: the text ends where the assistant's next reply begins.

        Raises:
          ModelError: there is no template, Jinja is not installed, or the template refuses the messages.
        """
        if self.template is None:
            raise ModelError("the tokenizer must have a chat template. Got none.")
        jinja2, sandbox = need("jinja2"), need("jinja2.sandbox")
        world = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        world.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        name = lambda i: "" if i is None else self.backend.id_to_token(i)  # noqa: E731
        try:
            return world.from_string(self.template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=open_reply,
                bos_token=name(self.bos_id),
                eos_token=name(self.eos_ids[0] if self.eos_ids else None),
                raise_exception=refuse,
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"messages must be what the chat template takes. Got: {error}.") from error

    def write(self, folder: Path) -> None:
        """Writes the files of which :func:`ringjax.models.tokenizer`, and transformers, make it.

        Args:
          folder: an existing directory: tokenizer.json, tokenizer_config.json and generation_config.json.
        """
        self.backend.save(str(folder / "tokenizer.json"))
        name = lambda i: None if i is None else self.backend.id_to_token(i)  # noqa: E731
        ends = list(self.eos_ids)
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(self.bos_id),
            "eos_token": name(ends[0]) if ends else None,
            "chat_template": self.template,
        }
        write_json(folder / "tokenizer_config.json", {key: x for key, x in names.items() if x is not None})
        ids = {"bos_token_id": self.bos_id, "eos_token_id": ends or None}
        write_json(folder / "generation_config.json", {key: x for key, x in ids.items() if x is not None})


def tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer beside a model's weights.

    Args:
      path: a Hugging Face directory with tokenizer.json, or a GGUF file, whose tokenizer is built of its metadata.

    Raises:
      ModelError: a file that is damaged or misses something, a tokenizer that is not supported, or more tokens than
        the model has.
    """
    where = Path(path)
    if where.is_file():
        file = GgufFile(where)
        backend, bos, eos = build(file)
        template = file.take("tokenizer.chat_template", None)
        rows = file.shape("token_embd.weight")[0] if "token_embd.weight" in file.names() else None
        return _checked(where, backend, bos, eos, template, rows)
    if not (where / "tokenizer.json").is_file():
        raise ModelError(f"{where} must hold tokenizer.json, or be a GGUF file. Got neither.")
    package = need("tokenizers")
    try:
        backend = package.Tokenizer.from_file(str(where / "tokenizer.json"))
    except Exception as error:  # the package raises Exception itself
        raise ModelError(f"{where / 'tokenizer.json'} must be a tokenizer. Got: {error}.") from error
    backend.no_truncation()  # as the file may say for batches of short texts
    backend.no_padding()
    given = {name: _optional(where / name) for name in ("tokenizer_config.json", "generation_config.json", CONFIG)}
    names = given["tokenizer_config.json"]
    bos = _id_of(backend, names.get("bos_token"))
    if bos is None:
        bos = next(iter(_ids(given, "bos_token_id")), None)
    eos = dict.fromkeys([_id_of(backend, names.get("eos_token")), *_ids(given, "eos_token_id")])
    return _checked(
        where, backend, bos, [i for i in eos if i is not None], _template(where, names), given[CONFIG].get("vocab_size")
    )


def _checked(
    where: Path, backend: Any, bos: int | None, eos: Iterable[int], template: str | None, rows: int | None
) -> Tokenizer:
    size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if rows is not None and size > rows:
        raise ModelError(f"{where}: the tokenizer must fit the model's vocabulary of {rows}. Got {size} tokens.")
    return Tokenizer(
        vocab_size=size if rows is None else rows, bos_id=bos, eos_ids=tuple(eos), template=template, backend=backend
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _id_of(backend: Any, token: Any) -> int | None:
    """Files name a special token by its text, or by a table that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _ids(given: Mapping[str, dict[str, Any]], key: str) -> list[int]:
    """One id or several, of the first file that has the key."""
    for name in ("generation_config.json", CONFIG):
        value = given[name].get(key)
        if value is not None:
            return [int(i) for i in (value if isinstance(value, list) else [value])]
    return []


def _template(folder: Path, names: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    given = names.get("chat_template")
    if isinstance(given, list):  # several by name
        given = next((entry["template"] for entry in given if entry.get("name") == "default"), None)
    return given
