"""`ringjax bench gpu`: the block kernels and the ring's own cost beside cuDNN, in one process on one GPU.

All programs of a line are compiled first and then called in turns; a time is the median over the rounds. What a chip
can do at most, a matrix product, is measured in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import ringjax
from ringjax.bench import cached, document, ring_peers
from ringjax.bench.ring_peers import FLASH_ATTENTION
from ringjax.bench.timing import Measurement, Shape, Timed, compile_all, compile_measurements, in_turns
from ringjax.kernels import tiles as tile_table
from ringjax.kernels.base import Block, Kernel, KernelParams
from ringjax.kernels.choose import BY_NAME
from ringjax.layout import Contiguous, Layout, Zigzag
from ringjax.mask import Mask, Tokens
from ringjax.usage import UsageError, check_at_least_one

PASSES = ("fwd", "fwd+bwd")


SHAPES = (
    Shape(1, 8192, 32, 32, 128),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 32768, 32, 8, 128),
    Shape(4, 8192, 16, 16, 64),
)


CACHED = tuple(
    Shape(batch, length, 32, 8, 128) for batch, length in ((8, 131072), (1, 524288), (32, 8192), (8, 524288))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured.

    Attributes:
      shapes: of the calls.
      cached: of caches against which one token is decoded, on two devices as well where there are two.
      dtype: of query, key and value.
      implementation: the block kernel, "pallas_gpu", "pallas_triton" or "xla".
      reference: of ring_peers.PEERS. "flash_attention_3" is beside packed documents as well, not beside a cache.
      flash_attention: the library of FlashAttention-3; None: the installed package's.
      num_shards: shards of the ring's loop.
      rounds: in which all programs are timed.
      ceiling: side of the matrix product.
    """

    shapes: tuple[Shape, ...]
    cached: tuple[Shape, ...]
    dtype: str
    implementation: str
    reference: str
    num_shards: int
    rounds: int
    ceiling: int
    flash_attention: Path | None = None

    def __post_init__(self) -> None:
        check_at_least_one(num_shards=self.num_shards, rounds=self.rounds, ceiling=self.ceiling)
        if self.reference == FLASH_ATTENTION and self.cached:
            raise UsageError(f"--cached needs --reference cudnn or xla. Got {self.reference}.")
        if self.reference != FLASH_ATTENTION and self.flash_attention is not None:
            raise UsageError(f"--flash-attention needs --reference {FLASH_ATTENTION}. Got {self.reference}.")
        ring_peers.check_library(self.flash_attention)
        unit = 2 * self.num_shards
        for shape in self.shapes:
            if shape.length % unit or shape.length < 32:
                raise UsageError(f"--shape: T must be a multiple of {unit}, and at least 32. Got {shape}.")


def parse_shape(text: str, flag: str = "--shape") -> Shape:
    """The shape that "B,T,N,K,H" names."""
    try:
        shape = Shape(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError):  # no number, or not five
        shape = None
    if shape is None or min(dataclasses.astuple(shape)) < 1 or shape.heads % shape.kv_heads:
        raise UsageError(f"{flag} must be B,T,N,K,H: five positive integers, N a multiple of K. Got {text!r}.")
    return shape


@dataclasses.dataclass(frozen=True)
class Row:
    """Median milliseconds of one call; ``ratio`` is the median over rounds of reference / ours: above 1 is faster."""

    what: str
    mask: str
    direction: str
    ours_ms: float
    reference_ms: float
    ratio: float
    tflops: float
    reference_tflops: float


def draw(shape: Shape, dtype: Any, seed: int = 0) -> tuple[jax.Array, ...]:
    """Query, key, value and cotangent: normal numbers, since zeros would run faster than data."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(shape.batch, shape.length, n, shape.head_size) for n in heads]
    return tuple(jax.random.normal(k, s, jnp.float32).astype(dtype) for k, s in zip(keys, sizes, strict=True))


def directed(attend: Callable[..., Any], direction: str) -> Callable[..., Any]:
    """A program of query, key, value, cotangent and what else ``attend`` takes: its output, and all gradients."""

    def gradients(q: Any, k: Any, v: Any, dout: Any, *rest: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return out, *pull(dout)

    return gradients if direction == "fwd+bwd" else lambda q, k, v, dout, *rest: attend(q, k, v, *rest)


def _ours(config: ringjax.RingConfig, **options: Any) -> Callable[..., Any]:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("sp",))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        return ringjax.ring_attention(q, k, v, segment_ids=segments, mesh=mesh, config=config, **options)

    return attend


def flops(shape: Shape, mask: str, direction: str) -> float:
    """Of the products: two forward, five backward; causal needs half of them."""
    forward = 4.0 * shape.batch * shape.heads * shape.length**2 * shape.head_size
    return forward * (0.5 if mask == "causal" else 1.0) * (3.5 if direction == "fwd+bwd" else 1.0)


def _row(what: str, mask: str, direction: str, times: Sequence[Sequence[float]], *, work: float) -> Row:
    ours, theirs = times
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours), statistics.median(theirs)
    return Row(what, mask, direction, a, b, ratio, work / a / 1e9, work / b / 1e9)


def ceiling(dtype: Any, rounds: int, side: int) -> float:
    """TFLOP/s of a square matrix product."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.float32).astype(dtype) for i in range(2))
    (program,) = compile_all([Timed(lambda a, b: a @ b, (a, b))])
    (times,) = in_turns([program], rounds)
    return 2.0 * side**3 / statistics.median(times) / 1e9


def attention(
    shape: Shape, config: ringjax.RingConfig, *, dtype: Any, reference: ring_peers.Attend
) -> list[Measurement]:
    """One call of ring_attention on one device beside the reference."""
    inputs, found = draw(shape, dtype), []
    for mask, direction in itertools.product(("full", "causal"), PASSES):
        causal = mask == "causal"
        dense = functools.partial(reference, offset=0 if causal else None, window=None)
        ours = Timed(directed(_ours(config, is_causal=causal), direction), inputs)
        theirs = Timed(directed(dense, direction), inputs)
        work = flops(shape, mask, direction)
        row = functools.partial(_row, str(shape), mask, direction, work=work)
        found.append(Measurement((ours, theirs), row))
    return found


def _params(shape: Shape) -> KernelParams:
    return KernelParams(shape.head_size**-0.5, device_kind=jax.devices()[0].device_kind)


def _loop(kernel: Kernel, params: KernelParams, q: Any, blocks: Any, masks: Sequence[Mask]) -> Any:
    """The hops of one rank, forward, without the wire: the running softmax goes from kernel to kernel."""
    carry: Any = None
    for number, ((k, v), mask) in enumerate(zip(blocks, masks, strict=True)):
        q_, k_, v_ = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        block = Block(q=q_, k=k_, v=v_, mask=mask)
        carry = kernel.forward(block, params, carry, finish=number == len(masks) - 1)
    return jnp.swapaxes(carry.out, 1, 2), carry.lse


def ring_cost(shape: Shape, kernel: Kernel, *, dtype: Any, num_shards: int) -> Measurement:
    """Full attention as a loop over blocks with the carry, beside one call over the whole sequence."""
    q, k, v, _ = draw(shape, dtype)
    blocks = tuple(zip(jnp.split(k, num_shards, axis=1), jnp.split(v, num_shards, axis=1), strict=True))
    full = Mask()
    run = functools.partial(_loop, kernel, _params(shape))
    programs = (
        Timed(lambda q, blocks: run(q, blocks, [full] * num_shards), (q, blocks)),
        Timed(lambda q, k, v: run(q, [(k, v)], [full]), (q, k, v)),
    )
    what = f"{shape}: {num_shards} blocks / one call"
    return Measurement(programs, functools.partial(_row, what, "full", "fwd", work=flops(shape, "full", "fwd")))


def zigzag_ranks(shape: Shape, kernel: Kernel, *, dtype: Any, num_shards: int) -> Measurement:
    """A causal zigzag ring, rank by rank, beside one causal call: all times in milliseconds."""
    q, k, v, _ = draw(shape, dtype)
    order = np.asarray(ringjax.ring_positions(shape.length, layout="zigzag", num_shards=num_shards))
    shards = np.split(order, num_shards)
    run = functools.partial(_loop, kernel, _params(shape))

    def causal(layout: Layout, q_rank: Any, kv_rank: Any, shards: int) -> Mask:
        side = lambda rank: Tokens(positions=layout.runs(rank, shape.length // shards, shards))  # noqa: E731
        return Mask(queries=side(q_rank), keys=side(kv_rank), right=0)

    def rank(q: Any, blocks: Any, own: Any, owners: Any) -> Any:
        return run(q, blocks, [causal(Zigzag(), own, owner, num_shards) for owner in owners])

    def arguments(r: int) -> tuple[Any, ...]:
        owners = [(r + hop) % num_shards for hop in range(num_shards)]
        blocks = tuple((k[:, shards[owner]], v[:, shards[owner]]) for owner in owners)
        # Ranks are numbers of the run time, as in a ring.
        return q[:, shards[r]], blocks, jnp.int32(r), tuple(map(jnp.int32, owners))

    one_call = Timed(lambda q, k, v: run(q, [(k, v)], [causal(Contiguous(), 0, 0, 1)]), (q, k, v))

    def conclude(times: list[list[float]]) -> dict[str, Any]:
        *ranks, whole_times = (statistics.median(x) for x in times)
        mean = statistics.mean(ranks)
        return {
            "shape": str(shape),
            "num_shards": num_shards,
            "rank_ms": ranks,
            "one_call_ms": whole_times,
            "slowest_over_mean": max(ranks) / mean,
            "sum_over_one_call": sum(ranks) / whole_times,
        }

    return Measurement((*(Timed(rank, arguments(r)) for r in range(num_shards)), one_call), conclude)


def _document_starts(length: int) -> list[int]:
    """Of documents of 1/32 to 1/4 of the sequence, and where the last one ends."""
    rng, starts = np.random.default_rng(0), [0]
    while starts[-1] < length:
        starts.append(min(length, starts[-1] + int(rng.integers(length // 32, length // 4))))
    return starts


def packed(shape: Shape, config: ringjax.RingConfig, *, dtype: Any) -> list[Measurement]:
    """Documents, causal, beside one document in the same program: what is skipped."""
    starts, inputs, found = _document_starts(shape.length), draw(shape, dtype), []
    segments = np.broadcast_to(_segments(starts), (shape.batch, shape.length))
    what = f"{shape}, {len(starts) - 1} documents: packed / one document"
    for direction in PASSES:
        run = directed(_ours(config, is_causal=True), direction)
        programs = tuple(Timed(run, (*inputs, jnp.asarray(ids))) for ids in (segments, np.zeros_like(segments)))
        row = functools.partial(_row, what, "causal", direction, work=flops(shape, "causal", direction))
        found.append(Measurement(programs, row))
    return found


def documents(
    shape: Shape, config: ringjax.RingConfig, *, dtype: Any, reference: ring_peers.Attend
) -> list[Measurement]:
    """The same documents in one sequence beside a reference that takes where they begin."""
    shape = dataclasses.replace(shape, batch=1)
    starts, inputs, found = _document_starts(shape.length), draw(shape, dtype), []
    segments, places = jnp.asarray(_segments(starts)[None]), jnp.asarray(starts, jnp.int32)
    theirs = functools.partial(reference, offset=0, window=None, longest=int(np.diff(starts).max()))
    work = 4.0 * shape.heads * shape.head_size * float(np.sum(np.diff(starts) ** 2)) / 2
    for direction in PASSES:
        programs = (
            Timed(directed(_ours(config, is_causal=True), direction), (*inputs, segments)),
            Timed(directed(theirs, direction), (*inputs, places, places)),
        )
        what = f"{shape}, {len(starts) - 1} documents"
        row = functools.partial(_row, what, "causal", direction, work=work * (3.5 if direction == "fwd+bwd" else 1))
        found.append(Measurement(programs, row))
    return found


def _segments(starts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))


COLUMNS = ("what", "mask", "pass", "ringjax ms", "reference ms", "times as fast", "TFLOP/s", "reference TFLOP/s")


def markers(reference: str) -> tuple[str, str]:
    """The lines before and after a document's table beside this reference."""
    command = "ringjax bench gpu" if reference == "cudnn" else f"ringjax bench gpu --reference {reference}"
    return f"<!-- {command}: begin -->", f"<!-- {command}: end -->"


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (f"{row.ours_ms:.3f}", f"{row.reference_ms:.3f}", f"{row.ratio:.3f}")
    return row.what, row.mask, row.direction, *numbers, f"{row.tflops:.0f}", f"{row.reference_tflops:.0f}"


def _document(record: dict[str, Any]) -> list[str]:
    """The lines of docs/performance.md."""
    rows = [Row(**row) for row in record["rows"]]
    lines = [record["title"] + ".", "", *document.markdown(COLUMNS, [_cells(row) for row in rows], num_left=3), ""]
    for direction in PASSES:
        ratios = [row.ratio for row in rows if row.direction == direction and ":" not in row.what]
        if ratios:
            lines.append(f"{direction}: median {statistics.median(ratios):.3f}, least {min(ratios):.3f} times as fast.")
    cells = [cached.Row(**row).cells() for row in record["cached"]]
    if cells:
        lines += ["", "One token against a cache whose rows are full; lengths are given.", ""]
        lines += document.markdown(cached.COLUMNS, cells, num_left=1)
    zigzag = record["zigzag"]
    if zigzag:
        lines += [
            "",
            f"Causal zigzag, {zigzag['shape']}, C = {zigzag['num_shards']}, rank by rank: the slowest takes "
            f"{zigzag['slowest_over_mean']:.3f} x the mean, all together {zigzag['sum_over_one_call']:.3f} x one call.",
        ]
    return lines


def _against_caches(
    request: Request, config: ringjax.RingConfig, bandwidth: float, say: Callable[[str], None]
) -> list[cached.Row]:
    """One after another: several caches may not fit."""
    common: Any = {"dtype": jnp.dtype(request.dtype), "bandwidth": bandwidth}
    make: list[Callable[..., Measurement]] = [functools.partial(cached.one_token, reference=request.reference)]
    make += [cached.on_two_devices] * (len(jax.devices()) > 1)
    rows = []
    for measure, shape in itertools.product(make, request.cached):
        (measurement,) = compile_measurements([measure(shape, config, **common)])
        rows.append(measurement.result(request.rounds))
        say("  ".join(rows[-1].cells()))
    return rows


def run(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """All measurements, as they go to the JSON file."""
    shapes, dtype = request.shapes, jnp.dtype(request.dtype)
    config = ringjax.RingConfig(implementation=request.implementation)
    device, rounds = jax.devices()[0], request.rounds
    reference = ring_peers.find(request.reference, device, request.flash_attention)
    if reference.attend is None:
        raise UsageError(f"--reference {request.reference}: {reference.absent}.")
    beside = {"dtype": dtype, "reference": reference.attend}
    kernel: Any = BY_NAME[request.implementation].load()
    top = ceiling(dtype, rounds, request.ceiling)
    title = (
        f"{device.device_kind}, JAX {jax.__version__}, {request.dtype}: implementation {request.implementation} beside "
        f"{request.reference}; medians of {rounds} rounds; a matrix product of {request.ceiling}^3 reaches {top:.0f} "
        f"TFLOP/s{_user_table(device.device_kind, request.implementation, dtype)}"
    )
    say(title)
    long = max(shapes, key=lambda shape: (shape.length, shape.heads == shape.kv_heads))
    bandwidth = cached.copy_bandwidth(rounds, min(request.ceiling**2 * 32, 2**31 - 2**20))
    tokens = _against_caches(request, config, bandwidth, say)
    *of_rows, of_zigzag = compile_measurements(
        [
            *(m for shape in shapes for m in attention(shape, config, **beside)),
            *(documents(long, config, **beside) if request.reference == FLASH_ATTENTION else ()),
            ring_cost(long, kernel, dtype=dtype, num_shards=request.num_shards),
            *packed(long, config, dtype=dtype),
            zigzag_ranks(long, kernel, dtype=dtype, num_shards=request.num_shards),
        ]
    )
    rows = []
    for measurement in of_rows:
        rows.append(measurement.result(rounds))
        say("  ".join(_cells(rows[-1])))
    zigzag = of_zigzag.result(rounds)
    say(f"zigzag: slowest / mean {zigzag['slowest_over_mean']:.3f}, sum / one call {zigzag['sum_over_one_call']:.3f}")
    return {
        "title": title,
        "ceiling_tflops": top,
        "copy_bytes_per_second": bandwidth,
        "cached": [dataclasses.asdict(row) for row in tokens],
        "rows": [dataclasses.asdict(row) for row in rows],
        "zigzag": zigzag,
    }


def _user_table(device_kind: str, implementation: str, dtype: Any) -> str:
    """The end of the title where the user has tiles for some of these kernels; a broken file warns as it is read."""
    file = tile_table.file_with_tiles(device_kind, implementation, dtype)
    return "" if file is None else f"; tiles of {file}"


def _check_platform(request: Request) -> None:
    """Raises UsageError where the kernels asked for cannot run."""
    if jax.default_backend() != "gpu" and (request.implementation, request.reference) != ("xla", "xla"):
        raise UsageError(
            f"needs an NVIDIA GPU, or --implementation xla --reference xla. Got platform {jax.default_backend()!r}."
        )


def main(request: Request, *, json_file: Path | None, docs: Path | None) -> None:
    """`ringjax bench gpu`.

    Args:
      request: what to measure.
      json_file: also gets all figures.
      docs: a document whose table beside this reference is replaced.

    Raises:
      UsageError: no GPU, or files that cannot be written.
    """
    _check_platform(request)
    document.check_files(json_file, docs, *markers(request.reference))
    console = Console()
    record = run(request, lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
    if json_file is not None:
        document.write_json(json_file, record)
    if docs is not None:
        document.replace(docs, *markers(request.reference), _document(record))
