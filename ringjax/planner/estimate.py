"""How long a strategy takes on a chip, from the bytes and products of :mod:`.costs` and the links of :mod:`.network`.

    seconds of a pass = exchanges + round

An exchange (all_to_all, all_gather, reduce_scatter) is awaited: nothing of the same layer can be computed meanwhile. In
a round of n hops the wire works behind the products,

    round = sum over hops of max(products, wire of the next block) + what each hop costs besides

and a hop of an outer ring is a whole round of the rings within it. In backward the sums of dK and dV travel with the
blocks, and the last of their rotations has nothing to hide behind.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from ..arguments import within_segments
from ..layout import Contiguous, Layout
from ..schedule import Hop, Schedule, full_schedule
from ..sharing import share
from . import costs
from .chips import Chip
from .costs import Shard
from .network import Links

EXCHANGES = ("all_to_all", "all_gather")  # in the order in which they are made
# An exchange has its arrays read and written once more, to bring heads and tokens in order.
_COPIES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Attention of one layer over a sequence that is shared by all devices.

    Attributes:
      query_length, key_length: tokens of one shard.
      batch: sequences.
      num_heads, num_kv_heads, head_size, value_size: N, K, H, Hv.
      item_bytes: of one number of query, key and value.
      left, right: a query at p attends to keys in [p - left, p + right]; None: no bound.
      backward: forward and all gradients; False: forward alone.
      sum_bytes: of the sums of dK and dV as they travel.
      max_segment_length, shared_length: what is promised of segments, as in :func:`ringjax.ring_attention`.
      segments, positions: whether segment ids and positions are given, which travel with the keys. Where positions are
        given the mask says nothing of places, so that only promises leave hops out.
      pairs: attended pairs of a whole sequence and one head, those of the busiest device times the number of devices;
        None: as many as the mask and the promises allow.
    """

    query_length: int
    key_length: int
    batch: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    item_bytes: int
    left: int | None
    right: int | None
    backward: bool = True
    sum_bytes: int = 4
    max_segment_length: int | None = None
    shared_length: int | None = None
    segments: bool = False
    positions: bool = False
    pairs: float | None = None

    @property
    def shard(self) -> Shard:
        return Shard(
            batch=self.batch,
            queries=self.query_length,
            keys=self.key_length,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            value_size=self.value_size,
            item_bytes=self.item_bytes,
            sum_bytes=self.sum_bytes,
            token_bytes=4 * (self.segments + self.positions),
        )

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """(left, right) in places of the sequence: a query needs no keys beyond."""
        left, right = (None, None) if self.positions else (self.left, self.right)
        return within_segments(left, right, self.max_segment_length)

    @property
    def spares(self) -> bool:
        """A bound beside that of a causal mask, or a promise: some keys may stay at home."""
        left, right = self.reach
        return left is not None or right not in (None, 0) or self.shared_length is not None


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to share the sequence.

    Attributes:
      words, sizes: strategy and size of each axis, outermost first.
      direction, rings: of the rings, as in :class:`ringjax.RingConfig`.
      layout: where the tokens lie.
    """

    words: tuple[str, ...]
    sizes: tuple[int, ...]
    direction: str
    layout: Layout
    rings: int = 1

    def sizes_of(self, word: str) -> tuple[int, ...]:
        return tuple(size for size, other in zip(self.sizes, self.words, strict=True) if other == word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a way costs one device in one layer, both passes if the problem has both.

    Attributes:
      compute_seconds: the products, at the rate of the chip.
      overhead_seconds: what hops and exchanges cost besides products and bytes.
      exposed_seconds: the wire, where nothing is computed meanwhile.
      wire_bytes: received, by kind: "ring", "all_gather" (with reduce_scatter), "all_to_all".
      link_bytes: over the busiest link, in one direction.
      memory: bytes by what they hold, at the moment that needs most.
    """

    compute_seconds: float
    overhead_seconds: float
    exposed_seconds: float
    wire_bytes: dict[str, int]
    link_bytes: float
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """Products, overheads and what is exposed of the wire."""
        return self.compute_seconds + self.overhead_seconds + self.exposed_seconds

    @property
    def memory_bytes(self) -> int:
        """The sum of ``memory``."""
        return sum(self.memory.values())


@dataclasses.dataclass
class _Spent:
    """Seconds and bytes as they are added up."""

    compute: float = 0.0
    overhead: float = 0.0
    exposed: float = 0.0

    def __post_init__(self) -> None:
        self.loads: dict[int, float] = {}  # bytes over the busiest link of an axis, by the identity of its links

    def carry(self, link: Links, received: int, bandwidth: float) -> None:
        """Bytes that an axis moves at less than what a link has pass several messages at a time over one."""
        self.loads[id(link)] = self.loads.get(id(link), 0.0) + received * link.link / bandwidth


def impossible(problem: Problem, way: Way) -> str | None:
    """Why a way cannot be taken at all, in words; None: it can."""
    ranks = math.prod(way.sizes_of("all_to_all"))
    if problem.num_heads % ranks:
        return f"{problem.num_heads} heads do not divide among {ranks} devices"
    return None


def estimate(problem: Problem, way: Way, chip: Chip, links: Sequence[Links]) -> Estimate:
    """What a possible way costs; ``links`` has an entry for each axis."""
    real = [n for n, size in enumerate(way.sizes) if size > 1]
    way = dataclasses.replace(way, words=tuple(way.words[n] for n in real), sizes=tuple(way.sizes[n] for n in real))
    links = [links[n] for n in real]
    sharing = _share(problem, way)
    way, spent = sharing.way, _Spent()
    shard, backward_too = problem.shard, (False, True) if problem.backward else (False,)
    for word, link in zip(way.words, links, strict=True):
        if word == "all_to_all":
            for backward in backward_too:
                _exchange(spent, chip, link, shard, backward=backward)
            _gather_tokens(spent, link, shard)
            shard = shard.exchanged(link.size)
    for word, link in zip(way.words, links, strict=True):
        if word == "all_gather":
            for backward in backward_too:
                _gather(spent, chip, link, shard, backward=backward)
            shard = shard.gathered(link.size)
    rings = [link for word, link in zip(way.words, links, strict=True) if word == "ring"]
    for backward in backward_too:
        _rings(spent, problem, sharing, chip, rings, shard, backward=backward)
    return Estimate(
        compute_seconds=spent.compute,
        overhead_seconds=spent.overhead,
        exposed_seconds=spent.exposed,
        wire_bytes=received(problem, way),
        link_bytes=max(spent.loads.values(), default=0.0),
        memory=costs.memory_terms(
            _in_memory(problem.shard, chip),
            *(way.sizes_of(word) for word in EXCHANGES),
            rings=way.sizes_of("ring"),
            backward=problem.backward,
            thrifty=chip.thrifty,
        ),
    )


def received(problem: Problem, way: Way) -> dict[str, int]:
    """Bytes that a device receives in both passes, by kind."""
    sharing, shard = _share(problem, way), problem.shard
    backward_too = (False, True) if problem.backward else (False,)
    found: dict[str, int] = dict.fromkeys(("ring", *EXCHANGES), 0)
    for size in sharing.way.sizes_of("all_to_all"):
        found["all_to_all"] += sum(costs.exchange_bytes(shard, size, backward=backward) for backward in backward_too)
        found["all_gather"] += costs.token_gather_bytes(shard, size)
        shard = shard.exchanged(size)
    for size in sharing.way.sizes_of("all_gather"):
        found["all_gather"] += sum(costs.gather_bytes(shard, size, backward=backward) for backward in backward_too)
        shard = shard.gathered(size)
    if "ring" in sharing.way.words:
        found["ring"] = sum(
            sum(costs.ring_bytes(shard, sharing.schedule, backward=backward, gathers=sharing.gathers))
            for backward in backward_too
        )
    return found


def hops(problem: Problem, way: Way) -> tuple[tuple[str, ...], int, int]:
    """The strategies as they are carried out, blocks that a device works on, and blocks that there are."""
    sharing = _share(problem, way)
    return sharing.way.words, sharing.schedule.num_blocks, math.prod(sharing.way.sizes_of("ring"))


def _in_memory(shard: Shard, chip: Chip) -> Shard:
    """Arrays of a TPU have whole lanes: a head of 64 takes the memory of one of 128."""
    lanes = chip.lanes
    whole = lambda size: -(-size // lanes) * lanes  # noqa: E731
    return dataclasses.replace(shard, head_size=whole(shard.head_size), value_size=whole(shard.value_size))


@dataclasses.dataclass(frozen=True)
class _Sharing:
    way: Way  # with the words that a window leaves
    schedule: Schedule
    both: bool

    @property
    def gathers(self) -> bool:
        return "all_gather" in self.way.words


@functools.lru_cache(maxsize=4096)
def _share(problem: Problem, way: Way) -> _Sharing:
    """The hops, as ring_attention plans them."""
    # A causal mask alone leaves no block out.
    bounds = problem.reach if problem.spares else (None, None)
    shared = None if problem.shared_length is None else (problem.shared_length,) * len(way.sizes)
    found = share(way.layout, way.sizes, way.words, problem.query_length, problem.key_length, *bounds, shared)
    both = way.direction == "both" and found.several_ways
    return _Sharing(dataclasses.replace(way, words=found.words), found.schedule or full_schedule(()), both)


def _exchange(spent: _Spent, chip: Chip, link: Links, shard: Shard, *, backward: bool) -> None:
    """q, k and v there and out back, or dout there and dq, dk and dv back: four arrays."""
    received = costs.exchange_bytes(shard, link.size, backward=backward)
    _await(spent, link, received, link.exchange)
    spent.overhead += 4 * (chip.exchange_seconds + (link.size - 1) * chip.peer_seconds)
    spent.overhead += _COPIES * received * link.size / (link.size - 1) / chip.bandwidth


def _gather_tokens(spent: _Spent, link: Links, shard: Shard) -> None:
    """Segment ids and positions of the queries and of the keys, once for both passes."""
    if shard.token_bytes:
        _await(spent, link, costs.token_gather_bytes(shard, link.size), link.gather)


def _gather(spent: _Spent, chip: Chip, link: Links, shard: Shard, *, backward: bool) -> None:
    """K and V; in backward also the sums of their gradients."""
    received = costs.gather_bytes(shard, link.size, backward=backward)
    _await(spent, link, received, link.gather)
    spent.overhead += (4 if backward else 2) * chip.exchange_seconds
    spent.overhead += _COPIES * received * link.size / (link.size - 1) / chip.bandwidth


def _await(spent: _Spent, link: Links, received: int, bandwidth: float) -> None:
    spent.exposed += received / bandwidth
    spent.carry(link, received, bandwidth)


def _rings(
    spent: _Spent,
    problem: Problem,
    sharing: _Sharing,
    chip: Chip,
    links: Sequence[Links],
    shard: Shard,
    *,
    backward: bool,
) -> None:
    """One pass over all blocks. The work of a hop is that of its keys; in all it is that of the busiest device."""
    way, schedule = sharing.way, sharing.schedule
    rings = way.rings if schedule.is_full else 1
    ways = [rings * (link.ways if sharing.both else 1) for link in links]
    streams = rings * (2 if sharing.both else 1)
    num_ranks = math.prod(way.sizes)
    num_shards = num_ranks // math.prod(way.sizes_of("all_to_all"))
    pairs = _busiest(problem, way, num_ranks, num_shards) * problem.batch * problem.num_heads
    is_causal = problem.right == 0
    work = costs.flops(pairs, problem.head_size, problem.value_size, backward=backward)
    size = max(problem.head_size, problem.value_size)
    compute = work / chip.rate(size, backward=backward, is_causal=is_causal)
    blocks = math.prod(way.sizes_of("ring")) if schedule.is_full else schedule.num_blocks
    carry = 4 * shard.batch * shard.queries * shard.heads * (shard.head_size if backward else shard.value_size)
    besides = 0.0
    if blocks > 1:
        besides = blocks * streams * chip.hop_seconds
        # Streams of heads have a carry each of their own heads, streams of tokens one after another the same.
        carries = 1 if shard.kv_heads % streams == 0 else streams
        passes = chip.backward_carry_passes if backward else chip.carry_passes
        besides += (blocks - 1) * carries * passes * carry / chip.bandwidth
        if backward:
            keys = _worked_keys(schedule, shard.keys) * shard.batch * shard.kv_heads
            program = min(chip.backward_wave / keys, chip.backward_part / max(pairs, 1))
            besides += (blocks - 1) * streams * compute * program / 2
    received = costs.ring_bytes(shard, schedule, backward=backward, gathers=sharing.gathers) if links else ()
    for num_bytes, link, n in zip(received, links, ways, strict=True):
        spent.carry(link, num_bytes, link.hop * n)
    per_key = [1 / (link.hop * n) for link, n in zip(links, ways, strict=True)]
    wires = [(shard.kv_bytes(1) * each, shard.sums_bytes(1) * each if backward else 0.0) for each in per_key]
    keys = _worked_keys(schedule, shard.keys) if links else 1
    took = compute + besides
    if links:
        took = _round(schedule, shard.keys, wires, took / keys)
        if backward and costs.narrow_home(schedule, sharing.gathers):
            took -= (shard.sums_bytes() - shard.kv_bytes()) * per_key[0]
    spent.compute += compute
    spent.overhead += besides
    spent.exposed += max(0.0, took - compute - besides)


def _busiest(problem: Problem, way: Way, num_ranks: int, num_shards: int) -> float:
    """Attended pairs of the busiest device, for one head and batch row."""
    if problem.pairs is not None:
        return problem.pairs / num_ranks
    left, right, longest = problem.left, problem.right, problem.max_segment_length
    shard_length, shared = problem.query_length, problem.shared_length
    length = shard_length * num_ranks
    if shared is None:
        pairs = costs.document_pairs(length, longest, left, right) / num_ranks
    else:
        pairs = costs.shared_pairs(shard_length, num_ranks, shared, longest, left, right) / num_ranks
    if problem.key_length != shard_length:  # the same share of another number of keys
        pairs *= problem.key_length / shard_length
    # Shared documents are dealt so that all devices work equally, see ringjax.pack.
    balanced = not isinstance(way.layout, Contiguous) or shared is not None
    return pairs * costs.imbalance(length, num_shards, *within_segments(left, right, longest), balanced=balanced)


def _worked_keys(schedule: Schedule, held: int) -> int:
    """Keys of all blocks that a device works on."""
    if schedule.is_full:
        inner = schedule.hops[0].inner
        return schedule.num_shards * (held if inner is None else _worked_keys(inner, held))
    total = 0
    for hop in schedule.hops:
        kept = costs.count(hop.keys, held)
        total += kept if hop.inner is None else _worked_keys(hop.inner, kept)
    return total


def _round(schedule: Schedule, held: int, wires: Sequence[tuple[float, float]], per_key: float) -> float:
    """Seconds of a schedule: those of each hop, or of the next block on its way if that takes longer.

    Args:
      held: keys of a block before this ring moves it.
      wires: of each ring from this one on, seconds that a key of a block takes, and its sums of dK and dV.
      per_key: seconds that a key keeps a device busy.
    """
    (of_block, of_sums), within = wires[0], wires[1:]

    def busy(inner: Schedule | None, keys: int) -> float:
        return keys * per_key if inner is None else _round(inner, keys, within, per_key)

    if schedule.is_full:
        size, one = schedule.num_shards, busy(schedule.hops[0].inner, held)
        if size == 1:
            return one
        block, sums = of_block * held, of_sums * held
        return max(one, block) + (size - 2) * max(one, block + sums) + max(one, sums) + sums
    took, leaving = 0.0, 0.0
    hops = schedule.hops
    for index, hop in enumerate(hops):
        kept = costs.count(hop.keys, held)
        following = hops[index + 1] if index + 1 < len(hops) else None
        arriving = (
            0.0 if following is None else of_block * costs.count(following.keys, held) * _distance(following, schedule)
        )
        took += max(busy(hop.inner, kept), arriving + leaving)
        leaving = 0.0 if hop.offset == 0 else of_sums * kept
    return took + leaving


def _distance(hop: Hop, schedule: Schedule) -> int:
    """Links that a block passes on its way to this hop, by the shorter way round."""
    shift = abs(hop.shift) % schedule.num_shards
    return min(shift, schedule.num_shards - shift)
