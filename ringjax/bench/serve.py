"""`ringjax bench serve`: the first token of a long prompt and the tokens after it, by a decoder of random parameters.

Prompts are read into a cache whose sequence is sharded over some devices and whose heads over the others, each prompt
in one program, and continued as by :func:`ringjax.models.generate`: some tokens per call, whose ids go to the host.
Programs are compiled before anything is timed, and the prompt is read once before: with the first call memory is taken
and collectives start.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from ringjax.bench import document
from ringjax.layers.decoder import Decoder
from ringjax.layers.decoder_config import DecoderConfig
from ringjax.mesh import ring_mesh
from ringjax.models.generation import TOGETHER, Sampling, first_token, next_tokens, shard_bytes
from ringjax.simulate import simulate_cpu_devices
from ringjax.training.metrics import peak_memory
from ringjax.units import duration, size, table
from ringjax.usage import UsageError, check_at_least_one

# Vocabulary, width, query and K/V heads, size of a head, width of the MLP, layers: as published by its authors.
MODELS = {"llama3-8b": (128_256, 4096, 32, 8, 128, 14_336, 32)}
PROMPTS = (131_072, 1_048_576)
_FIELDS = ("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "num_layers")
_SEQUENCE, _HEADS = "sp", "heads"  # axes of the mesh
_UNTIMED = 2  # tokens after the first, while whatever starts with the first call starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured.

    Attributes:
      model: a key of MODELS, or seven sizes in their order: "V,E,N,K,H,M,L".
      prompts: tokens of the prompts, a measurement each.
      batch_size: prompts that are read and continued side by side.
      new_tokens: that are timed, besides the first ones.
      dtype: of parameters, computation and cache.
      devices: how many CPU devices to simulate; None: all that JAX finds.
      head_devices: how many devices share the heads; it divides the devices, and the others share the sequence.
    """

    model: str
    prompts: tuple[int, ...]
    batch_size: int
    new_tokens: int
    dtype: str
    devices: int | None = None
    head_devices: int = 1

    def __post_init__(self) -> None:
        sizes = {"batch_size": self.batch_size, "new_tokens": self.new_tokens, "head_devices": self.head_devices}
        check_at_least_one(devices=self.devices, **sizes)
        for tokens in self.prompts:
            check_at_least_one(prompt_length=tokens)
        config = self.decoder_config()
        if config.num_kv_heads % self.head_devices:
            raise UsageError(
                f"--head-devices must divide the {config.num_kv_heads} key/value heads. Got {self.head_devices}."
            )

    def decoder_config(self) -> DecoderConfig:
        """Of the model; raises UsageError."""
        try:
            sizes = MODELS.get(self.model) or tuple(int(text) for text in self.model.split(","))
            fields: dict[str, Any] = dict(zip(_FIELDS, sizes, strict=True))
        except ValueError:
            known = ", ".join(MODELS)
            raise UsageError(
                f"--model must be {known} or V,E,N,K,H,M,L: vocabulary, width, query heads, key/value heads, size of a "
                f"head, width of the MLP, layers. Got {self.model!r}."
            ) from None
        options = {"dtype": self.dtype, "param_dtype": self.dtype, "layout": "striped", "tie_embeddings": False}
        options |= {"axis_name": _SEQUENCE, "head_axis_name": _HEADS}
        try:
            return DecoderConfig(**fields, **options)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt length."""

    prompt_tokens: int
    batch_size: int
    first_token_seconds: float | None  # None: see reason
    token_seconds: float | None  # the median over calls of their mean
    cache_bytes: int | None  # per device
    peak_bytes: int | None  # up to now, see peak_memory
    reason: str = ""  # why it was not measured
    compile_seconds: float | None = None  # of both programs
    first_call_seconds: float | None = None  # until the first token of the first of two calls

    def cells(self) -> tuple[str, ...]:
        """As the table shows them."""
        if self.first_token_seconds is None or self.token_seconds is None or self.cache_bytes is None:
            return (f"{self.batch_size} x {self.prompt_tokens:,}", *["-"] * (len(COLUMNS) - 1))
        tokens = self.batch_size * self.prompt_tokens
        return (
            f"{self.batch_size} x {self.prompt_tokens:,}",
            duration(self.first_token_seconds),
            f"{tokens / self.first_token_seconds:,.0f}",
            duration(self.token_seconds),
            f"{self.batch_size / self.token_seconds:,.1f}",
            size(self.cache_bytes),
            "-" if self.peak_bytes is None else size(self.peak_bytes),
        )


COLUMNS = ("prompts", "first token", "tokens read/s", "each token after", "tokens/s", "cache/device", "peak")


def measure(decoder: Decoder, request: Request, prompt_tokens: int, say: Callable[[str], None]) -> Row:
    """The prompts read and continued; a failure of the devices, such as too little memory, becomes the row's reason."""
    try:
        return _measure(decoder, request, prompt_tokens, say)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:240]
        return Row(prompt_tokens, request.batch_size, None, None, None, None, reason=reason)


def _measure(decoder: Decoder, request: Request, prompt_tokens: int, say: Callable[[str], None]) -> Row:
    batch, sampling = request.batch_size, Sampling()
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (batch, prompt_tokens)).astype(np.int32)
    lengths, going, none = np.full(batch, prompt_tokens, np.int32), np.ones(batch, bool), np.zeros(0, np.int32)
    cache = decoder.empty_cache(batch, prompt_tokens + 1 + _UNTIMED + request.new_tokens)
    cache_bytes = shard_bytes(cache)
    start = time.perf_counter()
    first = first_token.lower(decoder, ids, cache, lengths, sampling).compile()
    after = next_tokens.lower(decoder, ids[:, 0], cache, going, np.int32(0), none, sampling).compile()
    compiled = time.perf_counter() - start
    say(f"{batch} x {prompt_tokens:,}: compiled in {duration(compiled)}.")
    token, cache, started = _timed(first, decoder, ids, cache, lengths)
    say(f"{batch} x {prompt_tokens:,}: the first call took {duration(started)}.")
    token, cache, first_seconds = _timed(first, decoder, ids, cache, lengths)
    took = []
    for count in (_UNTIMED, *_calls(request.new_tokens)):
        several, cache, seconds = _timed(after, decoder, token, cache, going, np.int32(count), none)
        token = several[count - 1]
        took.append(seconds / count)
    return Row(
        prompt_tokens=prompt_tokens,
        batch_size=batch,
        first_token_seconds=first_seconds,
        token_seconds=statistics.median(took[1:]),
        cache_bytes=cache_bytes,
        peak_bytes=peak_memory()[0],
        compile_seconds=compiled,
        first_call_seconds=started,
    )


def _calls(tokens: int) -> list[int]:
    """How many tokens each call writes."""
    full, rest = divmod(tokens, TOGETHER)
    return [TOGETHER] * full + ([rest] if rest else [])


def _timed(run: Callable[..., Any], *arguments: Any) -> tuple[np.ndarray, Any, float]:
    """Tokens of each row, on the host, the cache, and the seconds until they were there."""
    start = time.perf_counter()
    chosen, cache = run(*arguments)
    token = np.asarray(chosen)
    return token, cache, time.perf_counter() - start


def mesh_of(request: Request, devices: Sequence[Any]) -> Mesh:
    """Devices that share the heads are neighbours; raises UsageError."""
    ring, rest = divmod(len(devices), request.head_devices)
    if rest:
        raise UsageError(f"--head-devices must divide the {len(devices)} devices. Got {request.head_devices}.")
    return ring_mesh((ring, request.head_devices), (_SEQUENCE, _HEADS), ring_axis=_SEQUENCE, devices=devices)


def run(request: Request, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All measurements, as they go to the JSON file; ``say`` and ``keep`` as in :func:`ringjax.bench.ring.run`."""
    devices = jax.devices() if request.devices is None else simulate_cpu_devices(request.devices)
    mesh = mesh_of(request, devices)
    # As `ringjax generate` loads one.
    config = dataclasses.replace(request.decoder_config(), scan_layers=devices[0].platform == "cpu")
    decoder = Decoder.init_sharded(config, mesh=mesh)
    parameters = sum(x.size for x in jax.tree.leaves(decoder))
    title = (
        f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}, {request.dtype}: {request.model}, "
        f"{parameters:,} random parameters, {size(shard_bytes(decoder))} per device; "
        f"sequence over {mesh.shape[_SEQUENCE]}, heads over {mesh.shape[_HEADS]}; "
        f"{request.new_tokens} tokens, at most {TOGETHER} per call, median of calls"
    )
    say(title)
    record: dict[str, Any] = {"title": title, "rows": []}
    rows = []
    for tokens in request.prompts:
        rows.append(measure(decoder, request, tokens, say))
        record["rows"].append(dataclasses.asdict(rows[-1]))
        keep(record)
        if rows[-1].reason:
            say(f"{rows[-1].batch_size} x {tokens:,} was not measured: {rows[-1].reason}")
    for line in table([COLUMNS, *(row.cells() for row in rows)]):
        say(line)
    return record


def main(request: Request, *, json_file: Path | None) -> None:
    """`ringjax bench serve`.

    Args:
      request: what to measure.
      json_file: also gets all figures, after every prompt length.

    Raises:
      UsageError: sizes that do not fit each other, or a file that cannot be written.
    """
    document.check_files(json_file, None, "", "")
    console = Console()
    say = lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    run(request, say, (lambda record: None) if json_file is None else functools.partial(document.write_json, json_file))
