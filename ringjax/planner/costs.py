"""What a strategy costs: products, bytes on the wire, memory. Small formulas, one for each thing; no chip, no seconds.

Letters: B batch, L tokens of a shard (T queries, S keys where they differ), N query heads, K key/value heads, D size of
a query or key head, Dv of a value head, e bytes per item, c devices along an axis. All figures are of one device, one
layer and one call. Bytes are those that a device receives, which are as many as it sends.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from ..pairs import attended_pairs
from ..schedule import Keys, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What one device holds of query, key and value.

    Attributes:
      batch, queries, keys, heads, kv_heads, head_size, value_size: B, T, S, N, K, D, Dv.
      item_bytes: e, of the inputs.
      sum_bytes: of the sums of dK and dV as they travel.
      token_bytes: of what is known of each token and travels beside its key: segment ids and positions, 4 each.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    item_bytes: int
    sum_bytes: int = 4
    token_bytes: int = 0

    def exchanged(self, size: int) -> "Shard":
        """After tokens were exchanged for heads over an axis: N / c heads, and the K/V heads that these use.

        With g = gcd(K, c) that is K / g of them: where c does not divide K several devices have the same ones.
        """
        return dataclasses.replace(
            self,
            queries=self.queries * size,
            keys=self.keys * size,
            heads=self.heads // size,
            kv_heads=self.kv_heads // math.gcd(self.kv_heads, size),
        )

    def gathered(self, size: int) -> "Shard":
        """After the keys of an axis were gathered."""
        return dataclasses.replace(self, keys=self.keys * size)

    @property
    def query_bytes(self) -> int:
        """B T N D e."""
        return self.batch * self.queries * self.heads * self.head_size * self.item_bytes

    @property
    def output_bytes(self) -> int:
        """B T N Dv e."""
        return self.batch * self.queries * self.heads * self.value_size * self.item_bytes

    @property
    def row_bytes(self) -> int:
        """B T N 4: a float32 number for each query and head."""
        return 4 * self.batch * self.queries * self.heads

    def kv_bytes(self, keys: int | None = None) -> int:
        """B S K (D + Dv) e: keys and values, or those of so many keys."""
        return self._kv_items(keys) * self.item_bytes

    def block_bytes(self, keys: int | None = None) -> int:
        """The same with what is known of each token, B S t."""
        tokens = self.keys if keys is None else keys
        return self.kv_bytes(keys) + self.batch * tokens * self.token_bytes

    def sums_bytes(self, keys: int | None = None) -> int:
        """The same of the sums of dK and dV."""
        return self._kv_items(keys) * self.sum_bytes

    def _kv_items(self, keys: int | None) -> int:
        tokens = self.keys if keys is None else keys
        return self.batch * tokens * self.kv_heads * (self.head_size + self.value_size)


# --- products --------------------------------------------------------------------------------------------------------


def document_pairs(length: int, longest: int | None, left: int | None, right: int | None) -> int:
    """The most pairs of so many tokens in documents of at most ``longest``: those of as many long ones as there may be.

    Pairs grow faster than the length of a document, so that no other lengths have more.
    """
    if longest is None or longest >= length:
        return attended_pairs(length, left, right) if length else 0
    count, rest = divmod(length, longest)
    return count * attended_pairs(longest, left, right) + (attended_pairs(rest, left, right) if rest else 0)


def shared_pairs(
    shard_length: int, num_shards: int, shared: int, longest: int | None, left: int | None, right: int | None
) -> int:
    """The most pairs of all shards where documents of several shards take at most the first ``shared`` places of each.

    Either they take all of these places, or none; in between there are fewer, as sums of what grows ever faster.
    """

    def total(taken: int) -> int:
        alone = document_pairs(shard_length - taken, longest, left, right)
        return document_pairs(num_shards * taken, longest, left, right) + num_shards * alone

    return max(total(0), total(shared))


def flops(pairs: float, head_size: int, value_size: int, *, backward: bool) -> float:
    """Of so many pairs: 2 products forward (D, Dv), 5 backward (3 D, 2 Dv), two operations each."""
    return 2 * pairs * ((3 * head_size + 2 * value_size) if backward else (head_size + value_size))


def imbalance(length: int, query_shards: int, left: int | None, right: int | None, *, balanced: bool) -> float:
    """Work of the busiest device over the mean, hop by hop in lockstep.

    A layout that is ``balanced`` gives every device early and late tokens. Otherwise, with R shards of consecutive
    queries: under a causal mask the last one attends to everything, (2 - 1/R) times the mean; under a window all but
    those at the ends attend to a whole one.
    """
    if balanced or query_shards == 1:
        return 1.0
    mean = attended_pairs(length, left, right) / length  # keys per query
    width = 1 + (length if left is None else left) + (length if right is None else right)
    most = length if left is None or right is None else min(width, length)
    if (left is None) != (right is None):  # open to one side: a diagonal through the last shard
        bound = right if left is None else left
        assert bound is not None
        most = min(length, length - (length / query_shards - 1) / 2 + bound)
    return max(1.0, most / mean)


# --- bytes -----------------------------------------------------------------------------------------------------------


def exchange_bytes(shard: Shard, size: int, *, backward: bool, residual: bool = False) -> int:
    """all_to_all over an axis of c: q, k, v there and out back; backward dout there and dq, dk, dv back.

    (c - 1) / c * (T N (D + Dv) + S K' (D + Dv)) e  with  K' = c K / gcd(K, c),  K where c divides it. With ``residual``
    the log-sum-exp too, (c - 1) / c * T N 4, and its cotangent; what nobody asks for is not sent.
    """
    there = shard.exchanged(size)
    rows = there.row_bytes if residual else 0
    del backward  # Its arrays are as large as those of forward.
    return (there.query_bytes + there.output_bytes + there.kv_bytes() + rows) * (size - 1) // size


def gather_bytes(shard: Shard, size: int, *, backward: bool) -> int:
    """all_gather of K and V over an axis of c: (c - 1) S (K (D + Dv) e + t).

    Backward gathers them anew, and brings the sums of dK and dV home in a reduce_scatter of as many float32 numbers.
    """
    sums = shard.sums_bytes() if backward else 0
    return (size - 1) * (shard.block_bytes() + sums)


def token_gather_bytes(shard: Shard, size: int) -> int:
    """What is known of each token, where tokens are exchanged for heads over c: (c - 1) B (T + S) t."""
    return (size - 1) * shard.batch * (shard.queries + shard.keys) * shard.token_bytes


def ring_bytes(shard: Shard, schedule: Schedule, *, backward: bool, gathers: bool) -> tuple[int, ...]:
    """What travels on the rings of a schedule, the outermost first. See :func:`travelled`.

    The sums of dK and dV come home in the dtype of K and V where nothing is added to them there: of one full ring.
    ``gathers``: where a reduce_scatter follows, they are.
    """
    last = shard.keys if narrow_home(schedule, gathers) else 0
    return tuple(
        shard.block_bytes(blocks) + ((shard.sums_bytes(sums - last) + shard.kv_bytes(last)) if backward else 0)
        for blocks, sums in travelled(schedule, shard.keys)
    )


def narrow_home(schedule: Schedule, gathers: bool) -> bool:
    """Whether sums of dK and dV come home in the dtype of K and V, see :class:`ringjax.ring.RingSpec`."""
    return schedule.is_one_ring and schedule.num_shards > 1 and not gathers


def travelled(schedule: Schedule, length: int) -> tuple[tuple[int, int], ...]:
    """Keys that a device receives of blocks, and of sums of dK and dV in backward, on each ring of a schedule.

    A full ring of c moves a block c - 1 times; its sums c times, the last of which brings them home. Rings within it
    do so once for each of its hops.
    """
    levels: dict[int, tuple[int, int]] = {}
    _travel(schedule, 0, length, 1, levels)
    return tuple(levels[level] for level in sorted(levels))


def _travel(schedule: Schedule, level: int, held: int, times: int, levels: dict[int, tuple[int, int]]) -> None:
    size = schedule.num_shards
    if schedule.is_full:  # closed form: a ring may have thousands of hops
        blocks, sums = (size - 1) * held * times, size * held * times if size > 1 else 0
        inner = schedule.hops[0].inner
        if inner is not None:
            _travel(inner, level + 1, held, times * size, levels)
    else:
        blocks = sums = 0
        for moved, strand_moves, kept, inner in _moves(schedule, held):
            blocks += times * moved
            sums += times * strand_moves
            if inner is not None:
                _travel(inner, level + 1, kept, times, levels)
    before = levels.get(level, (0, 0))
    levels[level] = (before[0] + blocks, before[1] + sums)


def _moves(schedule: Schedule, held: int) -> Iterator[tuple[int, int, int, Schedule | None]]:
    """For each hop: keys that it brings, keys whose sums leave after it, keys that it works on, what is within.

    The sums of a hop leave with their block or for home. Those of a block that stays at home for all of a strand do
    not move.
    """
    hops = schedule.hops
    for index, hop in enumerate(hops):
        kept = count(hop.keys, held)
        alone = hop.offset == 0 and (index + 1 == len(hops) or hops[index + 1].first)
        yield (kept if hop.shift else 0), (0 if alone else kept), kept, hop.inner


def count(keys: Keys | None, held: int) -> int:
    """Keys in a range; None: all that are held."""
    return held if keys is None else keys[1] - keys[0]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_terms(
    shard: Shard,
    exchanged: Sequence[int],
    gathered: Sequence[int],
    rings: Sequence[int],
    *,
    backward: bool,
    thrifty: bool = False,
) -> dict[str, int]:
    """Bytes that a compiled program holds on a device for one layer's attention when it needs most, term by term.

    What any program needs, see :func:`ringjax.inspect.memory.floor_terms`, and what compilers keep beside it:

    - a ring: both receive buffers until the output is written, of several rings those of the innermost; in backward the
      gradients that are returned beside the sums that they are made of, that of the query by tokens alone.
    - all_to_all: copies of q, k, v and out with the tokens of all devices and a part of the heads; in backward of dout,
      and q, k, v and out are kept in that form.
    - all_gather: the K/V of all devices of the axis; in backward the float32 sums of their gradients.
    - either, without a ring: the gradients as the kernel writes them, in float32, beside those that are returned.
    - rings within rings: the receive buffers, and in backward the sums, of each.

    Of thrifty ones, as XLA's for GPUs: what is exchanged or gathered goes as soon as the next thing is made of it, a
    block as soon as it has been sent; what is to be returned lends its memory until then. But one of K and V is there
    twice while it arrives, and one of their gradients while it leaves.

    Args:
      shard: before any exchange.
      exchanged, gathered, rings: sizes of the axes with "all_to_all", "all_gather" and "ring".
      backward: both passes, of which the backward one needs more.
      thrifty: the compiler keeps nothing longer than it is needed.
    """
    moments = _thrifty_moments if thrifty else _moments
    return max(
        moments(shard, exchanged, gathered, [size for size in rings if size > 1], backward=backward),
        key=lambda terms: sum(terms.values()),
    )


def _moments(
    shard: Shard, exchanged: Sequence[int], gathered: Sequence[int], rings: Sequence[int], *, backward: bool
) -> Iterator[dict[str, int]]:
    given, output = _given(shard, backward=backward), {"output": shard.output_bytes}
    local, copies = _local(shard, exchanged, gathered)
    if exchanged:
        output["output, exchanged"] = local.output_bytes
    num_blocks = math.prod(rings)
    buffers = _buffers(rings) * local.kv_bytes()
    softmax = _softmax(local)
    if gathered:  # one of K and V is in the order in which it came while it is brought in order
        as_gathered = {"key or value, as gathered": _larger(local)}
        yield {**given, **copies, **as_gathered, **({} if backward or exchanged else output)}
    yield {**given, **copies, **output}
    if num_blocks > 1:
        yield {**given, **copies, "receive buffers": buffers, **softmax}
        last = {**given, **copies, "receive buffers": _buffers(rings[-1:]) * local.kv_bytes(), **softmax}
        # The output may take the accumulator's place where its items are as wide.
        yield last if shard.item_bytes == 4 else {**last, "output": local.output_bytes}
    if not backward:
        return
    if exchanged:
        copies["dout, exchanged"] = local.output_bytes
    gradients = {"dquery, dkey, dvalue": shard.query_bytes + shard.kv_bytes()}
    yield {**given, **copies, **output, **gradients}
    working = _working(local)
    if num_blocks > 1:
        returned = {"dkey, dvalue": shard.kv_bytes()} if exchanged else gradients
        if gathered:  # by the last hop nobody needs the block that has not travelled
            copies.pop("key, value, gathered")
        yield {**given, **copies, **output, **working, **_ring_sums(local, rings), **returned}
    elif exchanged or gathered:  # what the kernel writes is not yet what is returned
        yield {**given, **copies, **output, **working, "dkey, dvalue sums": local.sums_bytes(), **gradients}


def _thrifty_moments(
    shard: Shard, exchanged: Sequence[int], gathered: Sequence[int], rings: Sequence[int], *, backward: bool
) -> Iterator[dict[str, int]]:
    given, output = _given(shard, backward=backward), {"output": shard.output_bytes}
    local, copies = _local(shard, exchanged, gathered)
    own = not (exchanged or gathered)  # the block of the ring is the caller's
    written = {"output, exchanged" if exchanged else "output": local.output_bytes}
    num_blocks = math.prod(rings)
    lse = {"lse, float32": local.row_bytes}
    if gathered:
        as_gathered = {"key or value, as gathered": _larger(local)}
        yield {**given, **copies, **as_gathered, **({} if backward or exchanged else output)}
    if num_blocks == 1:
        as_received = {"key or value, as received": _larger(local)} if exchanged and not gathered else {}
        yield {**given, **copies, **as_received, **written, **lse}
    else:
        arriving = _buffers(rings) if own else max(1, _buffers(rings) - 1)
        yield {**given, **copies, "receive buffers": arriving * local.kv_bytes(), **_softmax(local)}
        current = {"receive buffers": local.kv_bytes()} if own else {}
        yield {**given, **copies, **current, **_softmax(local), **written, **lse}
    if not backward:
        return
    yield {**given, **output, "dquery, dkey, dvalue": shard.query_bytes + shard.kv_bytes()}
    if exchanged:
        copies["dout, exchanged"] = local.output_bytes
    working, returned = _working(local), {"dkey or dvalue": _larger(local)}
    if num_blocks == 1:
        if exchanged and gathered:
            output["output, exchanged"] = local.output_bytes
        if not own:
            yield {**given, **copies, **output, **working, "dkey, dvalue sums": local.sums_bytes(), **returned}
    elif not exchanged:
        copies.pop("key, value, gathered", None)
        yield {**given, **copies, **output, **working, **_ring_sums(local, rings), **returned}
    else:
        first = {"receive buffers": local.kv_bytes(), "dkey, dvalue sums": 2 * local.sums_bytes()}
        yield {**given, **copies, **output, **written, **working, **first}
        if num_blocks > 2:
            middle = {
                "receive buffers": (_buffers(rings) - 1) * local.kv_bytes(),
                "dkey, dvalue sums": (1 + _buffers(rings)) * local.sums_bytes(),
            }
            yield {**given, **copies, **output, **working, **middle, **returned}


def _given(shard: Shard, *, backward: bool) -> dict[str, int]:
    given = {"query": shard.query_bytes, "key, value": shard.kv_bytes()}
    return {**given, "dout": shard.output_bytes} if backward else given


def _local(shard: Shard, exchanged: Sequence[int], gathered: Sequence[int]) -> tuple[Shard, dict[str, int]]:
    """What the rings work on, and the copies that were made on the way."""
    local, copies = shard, {}
    for size in exchanged:
        local = local.exchanged(size)
    if exchanged:
        copies = {"query, exchanged": local.query_bytes, "key, value, exchanged": local.kv_bytes()}
    if gathered:
        local = local.gathered(math.prod(gathered))
        copies.pop("key, value, exchanged", None)
        copies["key, value, gathered"] = local.kv_bytes()
    return local, copies


def _larger(shard: Shard) -> int:
    """The larger one of K and V."""
    return shard.kv_bytes() * max(shard.head_size, shard.value_size) // (shard.head_size + shard.value_size)


def _softmax(local: Shard) -> dict[str, int]:
    return {
        "accumulator, float32": 4 * local.batch * local.queries * local.heads * local.value_size,
        "maximum, sum, float32": 2 * local.row_bytes,
    }


def _working(local: Shard) -> dict[str, int]:
    return {
        "lse, delta, float32": 2 * local.row_bytes,
        "dquery sum, float32": 4 * local.batch * local.queries * local.heads * local.head_size,
    }


def _ring_sums(local: Shard, rings: Sequence[int]) -> dict[str, int]:
    """Of rings in backward: what arrives, and the sums of the last of two hops, or of one in the middle of more.

    Those of the last one are of this hop, sent and received on each ring.
    """
    if math.prod(rings) == 2:
        return {"receive buffers": local.kv_bytes(), "dkey, dvalue sums": 3 * local.sums_bytes()}
    buffers = _buffers(rings)
    return {"receive buffers": buffers * local.kv_bytes(), "dkey, dvalue sums": (1 + buffers) * local.sums_bytes()}


def _buffers(rings: Sequence[int]) -> int:
    """Blocks that are held beside the own one: that which is read and that which arrives, on each ring."""
    return sum(min(2, size - 1) for size in rings)
