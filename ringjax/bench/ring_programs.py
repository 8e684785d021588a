"""The programs of `ringjax bench ring`: our strategies, and kernels under collectives written by hand.

All attend to the same numbers. Those of causal attention lie in zigzag order where the devices would otherwise have
unequal work, and in natural order where an exchange makes it equal anyway. Packed documents lie as they come, in one of
these orders, and as `ringjax.pack` deals them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax.bench.ring_documents import Documents
from ringjax.bench.ring_peers import Attend, Peer
from ringjax.bench.timing import Shape
from ringjax.layout import as_layout, ring_order

OURS = "ringjax"
ONE_DEVICE = "one device"
# Written by hand around our kernel, to say what a strategy of ours costs beside it.
PLAIN = {"all_gather": "plain all-gather", "all_to_all": "plain Ulysses"}
# Of two axes, outermost first: the outer one may be slow, so that a ring, which hides its wire, suits it.
HYBRIDS = (("ring", "all_to_all"), ("ring", "all_gather"), ("ring", "ring"), ("all_gather", "all_to_all"))
SINGLE = (("ring",), ("all_gather",), ("all_to_all",))
DEALT = "dealt"  # the order of the tokens that ringjax.pack gives


@dataclasses.dataclass(frozen=True)
class Problem:
    """One set of arrays and a mask.

    Attributes:
      shape: of the query.
      is_causal: whether a query attends to nothing behind it.
      window: keys before a query's own that it attends to, causal; None: no bound.
      documents: that are packed in the sequence; None: it is one.
    """

    shape: Shape
    is_causal: bool
    window: int | None = None
    documents: Documents | None = None

    @property
    def mask(self) -> str:
        """As tables call it."""
        mask = "causal" if self.is_causal else "full"
        if self.window is not None:
            mask = f"causal, window {self.window}"
        if self.documents is not None:
            mask += f", {len(self.documents.lengths)} documents of up to {self.documents.longest}"
        return mask

    def flops(self, direction: str) -> float:
        """Of the products, on all devices together: two forward, five backward; causal needs half of them."""
        shape = self.shape
        if self.documents is None:
            pairs = self._pairs(shape.length)
        else:
            pairs = sum(self._pairs(int(length)) for length in self.documents.lengths)
        forward = 4.0 * shape.batch * shape.heads * pairs * shape.head_size
        return forward * (3.5 if direction == "fwd+bwd" else 1.0)

    def _pairs(self, length: int) -> float:
        if self.window is not None and self.window < length:
            return length * (self.window + 1) - self.window * (self.window + 1) / 2
        return length**2 * (0.5 if self.is_causal else 1.0)

    @property
    def balancing(self) -> str:
        """The layout in which all devices have the same work where each keeps its own queries."""
        return "zigzag" if self.is_causal and self.window is None else "contiguous"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled and timed.

    Attributes:
      name: of the strategy, as tables call it.
      kernel: whose kernel, OURS or a peer's name.
      layout: in which the arrays lie.
      sharding: of all arrays.
      attend: of whole arrays.
      strategy: ours, one word for each axis; empty for what is written by hand.
      variant: of a strategy, in its name too: not what a call does by itself.
      sizes: of the axes of the mesh.
      rest: what ``attend`` takes behind query, key and value: where documents are.
    """

    name: str
    kernel: str
    layout: str
    sharding: Sharding
    attend: Callable[..., jax.Array]
    strategy: tuple[str, ...] = ()
    variant: str = ""
    sizes: tuple[int, ...] = ()
    rest: tuple[Any, ...] = ()

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes) if self.sizes else 1

    @property
    def label(self) -> str:
        return f"{self.name}, {self.kernel}"


@dataclasses.dataclass(frozen=True)
class Left:
    """A program that is not timed, and why."""

    name: str
    kernel: str
    reason: str


def strategies_for(num_devices: int) -> tuple[tuple[str, ...], ...]:
    """All that make sense on so many devices: hybrids want two axes of two at least."""
    return SINGLE + (HYBRIDS if factors(num_devices) else ())


def factors(num_devices: int) -> list[tuple[int, int]]:
    """Both sizes at least 2."""
    return [(n, num_devices // n) for n in range(2, num_devices) if num_devices % n == 0 and num_devices // n > 1]


def programs(
    problem: Problem,
    devices: Sequence[Any],
    strategies: Sequence[tuple[str, ...]],
    peers: Sequence[Peer],
    config: ringjax.RingConfig,
) -> tuple[list[Program], list[Left]]:
    """All programs for a problem, ours first, and what cannot be one. Peers that are absent have none."""
    found: list[Program] = []
    left: list[Left] = []
    for words in strategies:
        each, refused = _ours(problem, devices, words, config)
        found += each
        left += refused
    ours = _our_kernel(config)
    plain = {"plain all-gather": _plain_all_gather, "plain Ulysses": _plain_ulysses}
    wanted = {PLAIN[word] for words in strategies for word in words if len(words) == 1 and word in PLAIN}
    if problem.documents is not None:  # our kernel would have to be told where they are by arrays, which takes time
        wanted.discard("plain all-gather")
    kernels = [(OURS, ours, [name for name in plain if name in wanted])]
    for peer in peers:
        if peer.attend is not None:
            kernels.append((peer.name, peer.attend, list(plain)))
    for kernel, attend, names in kernels:
        for name in names:
            if name == "plain Ulysses" and problem.shape.heads % len(devices):
                left.append(Left(name, kernel, _heads_refused(problem, len(devices))))
            else:
                found.append(plain[name](problem, devices, kernel, attend))
        found.append(_one_device(problem, devices, kernel, attend))
    return found, left


def _heads_refused(problem: Problem, size: int) -> str:
    return f"needs a number of query heads that is a multiple of {size}. Got {problem.shape.heads}"


def _ours(
    problem: Problem, devices: Sequence[Any], words: tuple[str, ...], config: ringjax.RingConfig
) -> tuple[list[Program], list[Left]]:
    found, left, count = [], [], len(devices)
    for sizes in [(count,)] if len(words) == 1 else factors(count):
        name = words[0] if len(words) == 1 else " x ".join(f"{w} {n}" for w, n in zip(words, sizes, strict=True))
        exchanged = math.prod(n for word, n in zip(words, sizes, strict=True) if word == "all_to_all")
        if problem.shape.heads % exchanged:
            left.append(Left(name, OURS, _heads_refused(problem, exchanged)))
            continue
        ring = max((n for word, n in zip(words, sizes, strict=True) if word == "ring"), default=1)
        # With two devices both ways lead to the same one, and under a window blocks take the shorter way in any case.
        ways = ("forward", "both") if ring > 2 and problem.window is None else ("forward",)
        layout = "contiguous" if set(words) == {"all_to_all"} else problem.balancing
        found += [_strategy(problem, devices, words, sizes, way, layout, config, name) for way in ways]
        if problem.documents is not None and set(words) != {"all_to_all"}:
            found.append(_strategy(problem, devices, words, sizes, "forward", DEALT, config, name))
    return found, left


def _strategy(
    problem: Problem,
    devices: Sequence[Any],
    words: tuple[str, ...],
    sizes: tuple[int, ...],
    direction: str,
    layout: str,
    config: ringjax.RingConfig,
    name: str,
) -> Program:
    axes = ("sp",) if len(sizes) == 1 else ("outer", "inner")
    mesh = Mesh(np.asarray(devices).reshape(sizes), axes)
    attend = functools.partial(
        ringjax.ring_attention,
        mesh=mesh,
        axis_name=axes,
        layout="contiguous" if layout == DEALT else layout,
        is_causal=problem.is_causal,
        local_window_size=None if problem.window is None else (problem.window, 0),
        config=dataclasses.replace(config, strategy=words, direction=direction),
    )
    variant = ", both ways" if direction == "both" else ", dealt" if layout == DEALT else ""
    attend, rest = _told(problem.documents, attend, layout, mesh, axes)
    return Program(
        name=name + variant,
        kernel=OURS,
        layout=layout,
        sharding=NamedSharding(mesh, P(None, axes)),
        attend=attend,
        strategy=words,
        variant=variant,
        sizes=sizes,
        rest=rest,
    )


def _told(
    documents: Documents | None, attend: Callable[..., jax.Array], layout: str, mesh: Mesh, axes: tuple[str, ...]
) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """Our attention that is also given where documents are, and these arrays."""
    if documents is None:
        return attend, ()
    if layout != DEALT:
        ids = ringjax.to_ring_order(
            jnp.asarray(documents.segment_ids)[None], layout=layout, num_shards=mesh.devices.size
        )
        return (
            lambda q, k, v, segment_ids: attend(q, k, v, segment_ids=segment_ids),
            (jax.device_put(ids, NamedSharding(mesh, P(None, axes))),),
        )
    dealt = documents.dealt
    attend = functools.partial(attend, shared_length=documents.shared_length)
    return (
        lambda q, k, v, segment_ids, positions: attend(q, k, v, segment_ids=segment_ids, positions=positions),
        (
            jax.device_put(dealt.segment_ids[None], NamedSharding(mesh, P(None, axes))),
            jax.device_put(dealt.positions, NamedSharding(mesh, P(axes))),
        ),
    )


def _our_kernel(config: ringjax.RingConfig) -> Attend:
    """Our kernel as peers are called, inside a shard_map that has an axis of one device."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *segment_ids: jax.Array, offset: int | None, window: int | None,
        longest: int | None = None,
    ) -> jax.Array:  # fmt: skip
        sides = None if offset is None else (None if window is None else window - offset, offset)
        return ringjax.ring_attention(
            q, k, v, segment_ids=segment_ids[0] if segment_ids else None, axis_name="one", local_window_size=sides,
            config=config,
        )  # fmt: skip

    return attend


def _whole(problem: Problem, kernel: str) -> tuple[np.ndarray, ...]:
    """Where documents are in the whole sequence, as a kernel is told: ours by segment ids."""
    documents = problem.documents
    if documents is None:
        return ()
    return (documents.segment_ids[None],) if kernel == OURS else (documents.starts, documents.starts)


def _by_hand(
    problem: Problem, devices: Sequence[Any], kernel: str, name: str, layout: str, on_shards: Callable[..., jax.Array],
    rest: tuple[np.ndarray, ...],
) -> Program:  # fmt: skip
    """``rest``: what every device gets besides its shards."""
    count = len(devices)
    mesh = Mesh(np.asarray(devices).reshape(count, 1), ("sp", "one"))
    spec, everywhere = P(None, "sp"), P()
    in_specs = (spec,) * 3 + (everywhere,) * len(rest)
    # Foreign calls are typed by no axes.
    attend = jax.shard_map(on_shards, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return Program(
        name=name,
        kernel=kernel,
        layout=layout,
        sharding=NamedSharding(mesh, spec),  # on that mesh: cuDNN's partitioning takes no other
        attend=attend,
        sizes=(count,) if count > 1 else (),
        rest=tuple(jax.device_put(x, NamedSharding(mesh, everywhere)) for x in rest),
    )


def _options(problem: Problem) -> dict[str, Any]:
    """Of a kernel that is called with all queries and keys."""
    options = {"offset": 0 if problem.is_causal else None, "window": problem.window}
    return options if problem.documents is None else options | {"longest": problem.documents.longest}


def _one_device(problem: Problem, devices: Sequence[Any], kernel: str, attend: Attend) -> Program:
    """The whole problem."""

    alone = functools.partial(attend, **_options(problem))
    return _by_hand(problem, devices[:1], kernel, ONE_DEVICE, "contiguous", alone, _whole(problem, kernel))


def _plain_ulysses(problem: Problem, devices: Sequence[Any], kernel: str, attend: Attend) -> Program:
    """Tokens exchanged for heads. Fewer K/V heads than devices are repeated first."""
    count = len(devices)
    repeats = count // math.gcd(problem.shape.kv_heads, count)

    def on_shards(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
        q, k, v = (jax.lax.all_to_all(x, "sp", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        out = attend(q, k, v, *rest, **_options(problem))
        return jax.lax.all_to_all(out, "sp", split_axis=1, concat_axis=2, tiled=True)

    return _by_hand(problem, devices, kernel, "plain Ulysses", "contiguous", on_shards, _whole(problem, kernel))


def _plain_all_gather(problem: Problem, devices: Sequence[Any], kernel: str, attend: Attend) -> Program:
    """All keys on each device; which of them its queries need depends on its rank, so a switch holds one program each.

    Causal without a window: each of a rank's two chunks attends to the prefix that ends with it. With a window: the
    shard to its own keys and those of the window before it. Documents: the shard to those of its documents, which
    arrays say, so that one program does for all.
    """
    count, length = len(devices), problem.shape.length
    if problem.documents is not None:
        return _gathered_documents(problem, problem.documents, devices, kernel, attend)

    def gathered(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (jax.lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v))
        return k, v

    def full(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, *gathered(k, v), offset=None, window=None)

    def by_rank(rank: Callable[[int], Callable[..., jax.Array]]) -> Callable[..., jax.Array]:
        return lambda q, k, v: jax.lax.switch(jax.lax.axis_index("sp"), [rank(r) for r in range(count)], q, k, v)

    def windowed(r: int) -> Callable[..., jax.Array]:
        shard = length // count
        assert problem.window is not None
        start, stop = max(0, r * shard - problem.window), (r + 1) * shard
        offset = r * shard - start
        return lambda q, k, v: attend(q, k[:, start:stop], v[:, start:stop], offset=offset, window=problem.window)

    def zigzag(r: int) -> Callable[..., jax.Array]:
        chunk = length // (2 * count)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            outs = []
            for part, index in ((q[:, :chunk], r), (q[:, chunk:], 2 * count - 1 - r)):
                stop = (index + 1) * chunk
                outs.append(attend(part, k[:, :stop], v[:, :stop], offset=index * chunk, window=None))
            return jnp.concatenate(outs, axis=1)

        return run

    def on_shards(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if not problem.is_causal:
            return full(q, k, v)
        k, v = gathered(k, v)
        if problem.window is not None:
            return by_rank(windowed)(q, k, v)
        return by_rank(zigzag)(q, *(_natural(x, count) for x in (k, v)))

    return _by_hand(problem, devices, kernel, "plain all-gather", problem.balancing, on_shards, ())


def _gathered_documents(
    problem: Problem, documents: Documents, devices: Sequence[Any], kernel: str, attend: Attend
) -> Program:
    count = len(devices)
    by_rank = [documents.of_rank(rank, count, is_causal=problem.is_causal) for rank in range(count)]
    most = max(len(queries) for queries, _ in by_rank)
    # Whoever has fewer gets empty ones.
    padded = [[np.pad(x, (0, most - len(x)), "edge") for x in side] for side in zip(*by_rank, strict=True)]
    queries, keys = map(np.stack, padded)

    def on_shards(q: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array) -> jax.Array:
        k, v = (jax.lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v))
        own = (x[jax.lax.axis_index("sp")] for x in starts)
        return attend(q, k, v, *own, **_options(problem))

    return _by_hand(problem, devices, kernel, "plain all-gather", "contiguous", on_shards, (queries, keys))


def _natural(x: jax.Array, count: int) -> jax.Array:
    """A whole sequence in zigzag order, by slices of its chunks."""
    chunk = x.shape[1] // (2 * count)
    order = ring_order(x.shape[1], as_layout("zigzag"), count)[::chunk] // chunk
    return jnp.concatenate([x[:, n * chunk : (n + 1) * chunk] for n in np.argsort(order)], axis=1)
