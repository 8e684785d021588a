"""Writing text with a decoder: prompts into a cache, then token by token. Ids in, ids out; text is the caller's."""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from ..layers import checks
from ..layers.decoder import Decoder
from ..layers.decoding import DecoderCache
from ..sharded import reshard, target_of

_SHORTEST = 64  # prompts are padded to this times a power of two, so that few programs are compiled
TOGETHER = 8  # tokens of a row that devices write in one call at most
_AT_ONCE = 0.1  # seconds that a call should take at most, so that text appears evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 takes the most probable token.
      top_p: only the most probable tokens whose probabilities sum to at most this, and always one, are drawn from.
      seed: of the draws. Row b's draw for the token at position p depends on the seed, b and p alone.

    Raises:
      ValueError: for a number out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0.0), ("top_p", None)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name == "temperature" and not (number and 0 <= value < float("inf")):
                raise ValueError(f"temperature must be a number of at least {least:g}. Got {value!r}.")
            if name == "top_p" and not (number and 0 < value <= 1):
                raise ValueError(f"top_p must be a number above 0 and at most 1. Got {value!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2^32 - 1. Got {self.seed!r}.")


@dataclasses.dataclass
class Stats:
    """What a generation took, filled in as it goes on.

    Attributes:
      prompt_tokens: of all rows.
      prefill_seconds: until the first new token, compilation included where the program is new.
      new_tokens: of all rows.
      decode_seconds: of the tokens after it, without the first of them, whose call compiles.
      timed_tokens: those that decode_seconds are of.
      cache_bytes: per device.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # compilation included where the program is new
    new_tokens: int = 0
    decode_seconds: float = 0.0  # without the first of these, whose call compiles
    timed_tokens: int = 0
    cache_bytes: int = 0  # per device

    @property
    def prefill_rate(self) -> float:
        """Tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else float("nan")

    @property
    def decode_rate(self) -> float:
        """Tokens per second, of all rows together."""
        return self.timed_tokens / self.decode_seconds if self.decode_seconds else float("nan")


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    stop_ids: Sequence[int] = (),
    capacity: int | None = None,
    stats: Stats | None = None,
) -> Iterator[list[int | None]]:
    """Continues prompts, a token per row and step. Devices write up to eight steps before the first of them is given.

    The same tokens on any number of devices, up to ties within rounding. On GPUs a decoder whose layers are stacked
    warns: every token copies them.

    Args:
      decoder: on any mesh.
      prompts: ids of each row, at least one each; rows may differ in length.
      max_new_tokens: the most tokens per row.
      sampling: how they are drawn.
      stop_ids: a row ends with one of these, which is still given.
      capacity: of the cache; default: what the longest row needs.
      stats: is filled in.

    Yields:
      For each step the new id of each row, None for rows that have ended.

    Raises:
      ValueError: for prompts that are empty or longer than the cache, and ids outside the vocabulary.
    """
    checks.positive_integer("max_new_tokens", max_new_tokens)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts must hold at least one id each. Got lengths {[len(p) for p in prompts]}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    capacity = longest + max_new_tokens if capacity is None else checks.positive_integer("capacity", capacity)
    if longest + max_new_tokens > capacity:
        raise ValueError(
            f"capacity must have room for the longest prompt and max_new_tokens, {longest} + {max_new_tokens} tokens. "
            f"Got {capacity}."
        )
    if decoder.config.scan_layers and target_of(decoder.mesh).platform == "gpu":
        warnings.warn(
            "decoder: its layers are stacked, and on GPUs every token copies all of them. Load it with "
            "scan_layers=False, or give decoder.with_scan_layers(False), to read them where they are.",
            stacklevel=2,
        )
    return _generate(decoder, prompts, lengths, max_new_tokens, sampling, set(stop_ids), capacity, stats or Stats())


def _generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    lengths: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: set[int],
    capacity: int,
    stats: Stats,
) -> Iterator[list[int | None]]:
    padded = min(_bucket(int(lengths.max())), capacity)
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    checks.ids("prompts", tokens, decoder.config.vocab_size)
    cache = decoder.empty_cache(len(prompts), capacity)
    stats.cache_bytes = shard_bytes(cache)
    start = time.perf_counter()
    chosen, cache = first_token(decoder, tokens, cache, lengths, sampling)
    ids = np.asarray(chosen)
    stats.prompt_tokens, stats.prefill_seconds = int(lengths.sum()), time.perf_counter() - start
    # An id outside the vocabulary is never drawn.
    stops = np.array(sorted(i for i in stop_ids if 0 <= i < decoder.config.vocab_size), np.int32)
    going, left, together = np.ones(len(prompts), bool), max_new_tokens, 1
    steps, going = _rows(ids[None], going, stops)
    while True:
        for step in steps:
            stats.new_tokens += sum(i is not None for i in step)
            yield step
        left -= len(steps)
        if not left or not going.any():
            return
        compiles, count = left == max_new_tokens - 1, min(together, left)
        start = time.perf_counter()
        chosen, cache = next_tokens(decoder, ids, cache, going, np.int32(count), stops, sampling)
        several = np.asarray(chosen)[:count]
        seconds = time.perf_counter() - start
        steps, going = _rows(several, going, stops)
        ids = several[len(steps) - 1]
        if not compiles:
            stats.decode_seconds += seconds
            stats.timed_tokens += sum(i is not None for step in steps for i in step)
            together = _count(seconds / len(steps))


def _rows(ids: np.ndarray, going: np.ndarray, stops: np.ndarray) -> tuple[list[list[int | None]], np.ndarray]:
    """Of ids [steps, B] those of rows that had not ended, until all have; and which rows go on."""
    found: list[list[int | None]] = []
    for step in ids:
        found.append([int(i) if there else None for i, there in zip(step, going, strict=True)])
        going = going & ~np.isin(step, stops)
        if not going.any():
            break
    return found, going


def _count(seconds: float) -> int:
    """How many tokens the next call writes, if one takes so long. Processes must agree, and their clocks do not."""
    return TOGETHER if jax.process_count() > 1 else max(1, int(_AT_ONCE / max(seconds, _AT_ONCE / TOGETHER)))


def shard_bytes(tree: Any) -> int:
    """Bytes of a device's shards of all arrays."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * itemsize for shape, itemsize in shards)


def _bucket(length: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return size


@functools.partial(jax.jit, static_argnames="sampling", donate_argnums=2)
def first_token(decoder: Decoder, tokens: Any, cache: DecoderCache, lengths: Any, sampling: Sampling) -> Any:
    """Prompts of these lengths into the cache: the token that follows each, and the cache."""
    logits, cache = decoder.prefill(tokens, cache, lengths=lengths)
    return draw(logits, cache.lengths, sampling), cache


@functools.partial(jax.jit, static_argnames="sampling", donate_argnums=2)
def next_tokens(
    decoder: Decoder, tokens: Any, cache: DecoderCache, going: Any, count: Any, stop_ids: Any, sampling: Sampling
) -> Any:
    """The last token of each row into the cache, the one that follows it likewise, and so on.

    A loop on the device, since XLA for GPUs records its CUDA graphs anew in every call (docs/optimisation-log.md).

    Args:
      tokens: int [B].
      cache: without them.
      going: bool [B], rows that have not ended. The others take no room in the cache.
      count: int, of tokens of a row, at most TOGETHER. The loop ends earlier when no row goes on.
      stop_ids: int [K]; a row ends with one of these.

    Returns:
      (ids, cache): int [TOGETHER, B], the tokens that follow, of which the last is not in the cache; and the cache.
    """

    def write(state: Any) -> Any:
        step, tokens, cache, going, ids = state
        logits, cache = decoder.decode(tokens[:, None], cache, counts=going.astype(jnp.int32))
        # On Explicit axes a loop's state has one type, and that of the logits is another.
        mesh = jax.sharding.get_abstract_mesh()
        tokens = reshard(draw(logits, cache.lengths, sampling), PartitionSpec(), mesh)
        going = going & ~jnp.any(tokens[:, None] == stop_ids[None], axis=1)
        return step + 1, tokens, cache, going, ids.at[step].set(tokens)

    start = (jnp.int32(0), tokens, cache, going, jnp.zeros((TOGETHER, len(tokens)), jnp.int32))
    *_, cache, _, ids = jax.lax.while_loop(lambda state: (state[0] < count) & jnp.any(state[3]), write, start)
    return ids, cache


def draw(logits: Float[Array, "B V"], positions: Int32[Array, " B"], sampling: Sampling) -> Int32[Array, " B"]:
    """The next token of each row, which will stand at ``positions``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / jnp.asarray(sampling.temperature, logits.dtype)
    if sampling.top_p < 1:
        logits = jnp.where(_within(logits, sampling.top_p), logits, -jnp.inf)
    seed = jax.random.key(sampling.seed)

    def of_row(row: Array, position: Array, logits: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(seed, row), position), logits)

    return jax.vmap(of_row)(jnp.arange(logits.shape[0]), positions, logits).astype(jnp.int32)


def _within(logits: Array, top_p: float) -> Array:
    """The most probable tokens whose probabilities sum to at most top_p, and always the first."""
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    weights = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights
    count = jnp.maximum(jnp.sum(before + weights <= jnp.asarray(top_p, logits.dtype), axis=-1), 1)
    least = jnp.take_along_axis(ranked, count[:, None] - 1, axis=-1)
    return logits >= least
