"""The ring: rotates K/V blocks and folds each into a result. The only file with ``ppermute``; it owns the gradient.

Every hop is   issue the rotation of the next block -> run the kernel on this block -> optimization_barrier.   The
barrier keeps the order on every TPU generation, so that the wire works behind the kernel. Nothing here knows what a
logit or a position is. What travels is one pytree: K, V and the part of the mask that no rank can compute; in backward
also the sums of dK and dV, which stay with the block they belong to. After Liu, Zaharia and Abbeel 2023,
arXiv:2310.01889.

Several axes are rings within rings: what a hop of an outer one does with its block is to send it once round the rings
within, while the next block of the outer one is on its way. With several routes a part of every block takes each, in
lockstep: some of the heads if these divide, otherwise some of the tokens.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ._compat import in_one_operation
from .exchange import Gather
from .kernels.base import Block, Carry, Kernel, KernelParams, Upstream
from .partial import attends_to_nothing, wide
from .schedule import Hop, Keys, Route, Schedule, permutation


@dataclasses.dataclass(frozen=True)
class RingSpec:
    """All that is known at trace time."""

    axis_names: tuple[str, ...]  # of the rings, outermost first; none where every key is here
    schedule: Schedule | None  # of the outermost one; None where there is none
    gather: Gather  # brings the keys of the other axes here, before they travel
    kernel: Kernel
    params: KernelParams
    unroll: int
    dkv_dtype: str
    routes: tuple[Route, ...] = (Route(),)  # a part of every block takes each of them
    one_operation: bool = False  # what travels at the same time is sent in one, see _compat.in_one_operation

    @property
    def narrow_home(self) -> bool:
        """Whether sums of dK and dV come home in the dtype of K and V: where nothing is added to them any more."""
        return self.schedule is not None and self.schedule.is_one_ring and not any(self.gather.gathered)


class ShardMask(Protocol):
    """The mask of this rank's queries, whatever it is made of. A pytree of arrays that need no gradient."""

    @property
    def travels(self) -> Any:
        """The part of it that belongs to the keys and that no rank can compute. A pytree, maybe an empty one."""
        ...

    def between(self, owner: tuple[Array, ...], arrived: Any, keys: Keys | None) -> Any:
        """The mask between the own queries and a block, or those of its keys that are given as a range.

        ``owner`` is the place on the axes of the rings of the device whose block it is, of which ``arrived`` has
        travelled.
        """
        ...


class Travelling(NamedTuple):
    """A block on its way: what moves around the ring, and nothing else does."""

    k: Array
    v: Array
    mask: Any


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What takes one route: these heads or keys of every block. ``group`` counts the states that are kept."""

    route: Route
    group: int = 0
    keys: Keys | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(
    spec: RingSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    sinks: Float[Array, " N"] | None,
    mask: ShardMask,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of this rank's queries to all blocks: the output in q's dtype, the wide log-sum-exp."""
    return _forward(spec, q, k, v, sinks, mask)[:2]


def _ring_fwd(
    spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: ShardMask
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse, *kept = _forward(spec, q, k, v, sinks, mask)
    return (out, lse), (q, k, v, sinks, mask, out, lse, *kept)


def _ring_bwd(spec: RingSpec, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, sinks, mask, out, lse, saved, rest, sink = residuals
    dout, dlse = cotangents
    # Otherwise XLA takes the first rotation of backward for that of forward, and keeps its block in memory in between;
    # or it begins with backward's, where dout does not depend on the output, and forward's then hides behind nothing.
    k, v, mask, dout, lse = jax.lax.optimization_barrier((k, v, mask, dout, lse))
    dtype = wide(q.dtype)
    wide_out = out.astype(dtype) if rest is None else out.astype(dtype) + _head_major(rest).astype(dtype)
    delta = jnp.sum(wide_out * dout.astype(dtype), axis=-1) - dlse
    dsinks = None
    if sinks is not None:  # the sink is a key whose value is zero: dsink = sum of p (0 - delta)
        p = jnp.exp(sinks.astype(dtype)[None, None, :] - lse) if sink is None else jnp.swapaxes(sink, 1, 2)
        dsinks = -jnp.sum(jnp.where(attends_to_nothing(lse), 0.0, p * delta), axis=(0, 1)).astype(sinks.dtype)
    rows = _head_major(dout), jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)
    grads = _backward(spec, _head_major(q), rows, saved, k, v, mask)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), dsinks, None


ring.defvjp(_ring_fwd, _ring_bwd)


def _forward(spec: RingSpec, q: Array, k: Array, v: Array, sinks: Array | None, mask: ShardMask) -> tuple[Any, ...]:
    """The output, the log-sum-exp, and what else the kernel keeps for backward."""
    home, streams = _home(spec, k, v, mask)
    groups = 1 + streams[-1].group
    queries, sinks_of = (
        _groups(_head_major(q), groups),
        (None,) * groups if sinks is None else _groups(sinks, groups, 0),
    )

    def work(number: int, here: _Place, keys: Keys | None, state: Any, finish: bool) -> tuple[Any, None]:
        carries: list[Any] = list(state or (None,) * groups)
        stream, block = streams[number], here.blocks[number]
        attended = mask.between(here.owners[number], block.mask, stream.keys or keys)
        n = stream.group
        carries[n] = spec.kernel.forward(
            Block(q=queries[n], k=block.k, v=block.v, mask=attended, sinks=sinks_of[n]),
            spec.params,
            carries[n],
            finish=finish and _is_last(stream, streams),
        )
        return tuple(carries), None

    finished, _ = _walk(spec, streams, spec.schedule, home, None, None, work, finish=True)
    outs, lses, saved, rests, sink_parts = zip(*finished, strict=True)
    # A remat policy that keeps these two names never runs the ring again.
    out, rest = checkpoint_name((_head_major(_joined(outs)), _joined(rests)), "ring_out")
    lse, saved, sink = checkpoint_name((jnp.swapaxes(_joined(lses), 1, 2), saved, _joined(sink_parts)), "ring_lse")
    return out, lse, saved, rest, sink


def _backward(
    spec: RingSpec, q: Array, rows: tuple[Array, ...], saved: Any, k: Array, v: Array, mask: ShardMask
) -> tuple[Array, Array, Array]:
    """dq, dk and dv; wide, or as they have travelled."""
    home, streams = _home(spec, k, v, mask)
    groups = 1 + streams[-1].group
    queries = _groups(q, groups)
    dout, lse, delta = (_groups(x, groups) for x in rows)
    upstream = [Upstream(dout=dout[n], lse=lse[n], delta=delta[n], saved=saved[n]) for n in range(groups)]

    def work(number: int, here: _Place, keys: Keys | None, state: Any, finish: bool) -> tuple[Any, Any]:
        carries: list[Carry] = list(state or (None,) * groups)
        stream, block = streams[number], here.blocks[number]
        attended = mask.between(here.owners[number], block.mask, stream.keys or keys)
        n = stream.group
        carries[n], dk, dv = spec.kernel.backward(
            Block(q=queries[n], k=block.k, v=block.v, mask=attended),
            upstream[n],
            spec.params,
            carries[n],
            finish=finish and _is_last(stream, streams),
        )
        return tuple(carries), (dk, dv)

    dq, sums = _walk(spec, streams, spec.schedule, home, None, None, work, finish=True)
    axis = 1 if groups > 1 else 2
    dk, dv = (_head_major(_joined(parts, axis)) for parts in zip(*_cast(spec, q.dtype, sums), strict=True))
    dk, dv = spec.gather.scatter((dk, dv))
    return _head_major(_joined(dq)), dk, dv


class _Place(NamedTuple):
    """What a device holds: of every stream a block, and whose it is, as the place on the axes from the outermost on."""

    blocks: tuple[Travelling, ...]
    owners: tuple[tuple[Array, ...], ...]


def _home(spec: RingSpec, k: Array, v: Array, mask: ShardMask) -> tuple[_Place, tuple[_Stream, ...]]:
    """The own block, as streams."""
    k, v, travels = spec.gather.collect((k, v, mask.travels))
    whole = Travelling(_head_major(k), _head_major(v), travels)
    (heads, length), routes = whole.k.shape[1:3], spec.routes
    if heads % len(routes) == 0:
        streams = tuple(_Stream(route, group=n) for n, route in enumerate(routes))
        parts = zip(_groups(whole.k, len(routes)), _groups(whole.v, len(routes)), strict=True)
        blocks = tuple(Travelling(part_k, part_v, travels) for part_k, part_v in parts)
    elif length < len(routes):
        streams, blocks = (_Stream(routes[0]),), (whole,)
    else:
        cuts = spec.gather.cuts(length, len(routes))
        streams = tuple(_Stream(route, keys=keys) for route, keys in zip(routes, cuts, strict=True))
        blocks = tuple(_narrow(whole, None, keys) for keys in cuts)
    return _Place(blocks, ((),) * len(streams)), streams


class _Move(NamedTuple):
    """What is to travel by ``shift`` offsets: a tree for every stream."""

    trees: tuple[Any, ...]
    shift: int


class _Departure(NamedTuple):
    """Sums that leave a hop for another, or for home if it is the last that works on these keys."""

    move: _Move
    comes_home: bool
    keys: Keys | None


class _Sums(NamedTuple):
    """Sums of dK and dV of every stream. None: nothing yet, and always in forward."""

    strand: Any = None  # of the current strand, which travel with their block
    landed: Any = None  # those that have come home


Work = Callable[[int, _Place, Keys | None, Any, bool], tuple[Any, Any]]


def _walk(
    spec: RingSpec,
    streams: tuple[_Stream, ...],
    schedule: Schedule | None,
    home: _Place,
    held: Keys | None,
    state: Any,
    work: Work,
    finish: bool,
    come_home: bool = True,
) -> tuple[Any, Any]:
    """Run every hop of a schedule, and those of the axes within.

    Args:
      home: the block, or the part ``held`` of it, that the device has before this axis moves it.
      state: of the kernels; None before the first one.
      work: what a kernel makes of the block of a stream: ``work(number, place, keys, state, finish)`` returns the new
        state, and sums of dK and dV for these keys or None.
      finish: the last hop is the last of all.
      come_home: bring the sums back to whose keys they are for. Full rounds within a ring all leave them at the same
        place, where they are added up: on the way home no kernel would hide them, so they go once, at the end.

    Returns:
      The state, and sums for the keys of ``home``.

    The first and the last hop stand alone (nothing to start from, a result to finish). Of those between, equal ones in
    a row become one compiled loop, in which ``index`` is that of its first hop.
    """
    if schedule is None:
        sums = []
        for number in range(len(streams)):
            state, new = work(number, home, held, state, finish)
            sums.append(new)
        return state, None if sums[0] is None else tuple(sums)
    hops, size = schedule.hops, schedule.num_shards
    axis_name = spec.axis_names[len(home.owners[0])]
    rank = jax.lax.axis_index(axis_name)
    home = home._replace(owners=tuple((*owner, rank) for owner in home.owners))
    rotate = functools.partial(_rotate, spec, axis_name, size, streams)

    def moving(source: _Place, keys: Keys | None, hop: Hop) -> _Move:
        """What a hop wants of the blocks, of which there are these keys."""
        return _Move(tuple(_narrow(block, keys, hop.keys) for block in source.blocks), hop.shift)

    def owners_after(source: _Place, hop: Hop) -> tuple[tuple[Array, ...], ...]:
        return tuple(
            (*owner[:-1], _shifted(owner[-1], stream.route, hop.shift, size))
            for owner, stream in zip(source.owners, streams, strict=True)
        )

    def in_turns(index: int, here: _Place, state: Any, sums: _Sums) -> tuple[_Place, Any, _Sums]:
        """A step of backward with several streams, not the last: a part of what travels behind the kernel of each.

        TPUs v4, v6e and v7x have five permutes under way at most, and K, V, dK and dV of two streams are eight. Each
        kind goes all ways round at the same time. Full rings only, as several streams are.
        """
        hop, following = hops[index : index + 2]
        waiting = {
            "k": ([block.k for block in here.blocks], following.shift),
            "dk": ([dk for dk, _ in sums.strand], hop.shift),
            "v": ([(block.v, block.mask) for block in here.blocks], following.shift),
            "dv": ([dv for _, dv in sums.strand], hop.shift),
        }
        kinds, turns = list(waiting), min(len(streams), len(waiting))
        turn_of = {kind: number * turns // len(kinds) for number, kind in enumerate(kinds)}
        trees = {kind: tree for kind, (tree, _) in waiting.items()}
        arrived: dict[str, Any] = {}
        new = []
        for number in range(len(streams)):
            kinds_now = [kind for kind in trees if turn_of[kind] == number]
            moves = [_Move(trees.pop(kind), waiting[kind][1]) for kind in kinds_now]
            arrived.update(zip(kinds_now, rotate(moves), strict=True))
            state, parts = work(number, here, held, state, False)
            state, parts, arrived, trees = jax.lax.optimization_barrier((state, parts, arrived, trees))
            new.append(parts)
        moved = tuple(zip(arrived["dk"], arrived["dv"], strict=True))
        sums = sums._replace(strand=_add(moved, _cast(spec, here.blocks[0].k.dtype, tuple(new))))
        blocks = tuple(Travelling(k, *rest) for k, rest in zip(arrived["k"], arrived["v"], strict=True))
        return jax.lax.optimization_barrier((_Place(blocks, owners_after(here, following)), state, sums))

    def step(index: int, here: _Place, state: Any, sums: _Sums) -> tuple[_Place, Any, _Sums]:
        hop, last = hops[index], index == len(hops) - 1
        if len(streams) > 1 and hop.inner is None and sums.strand is not None and not last:
            return in_turns(index, here, state, sums)
        # Issued before the kernel, used after it: the next block, and the sums of the previous hop.
        moves, source = [], here
        leaving = [] if sums.strand is None else departures(hops[index - 1], hop, sums.strand)
        if not last:
            from_home = hops[index + 1].first
            source, keys = (home, held) if from_home else (here, hop.keys or held)
            moves.append(moving(source, keys, hops[index + 1]))
        arrived = rotate([*moves, *(one.move for one in leaving)])
        arriving = _Place(arrived.pop(0), owners_after(source, hops[index + 1])) if moves else here
        if leaving:
            sums = sums._replace(strand=None)
        for one, strand in zip(leaving, arrived, strict=True):
            if one.comes_home:
                sums = sums._replace(landed=land(sums.landed, strand, one.keys))
            else:
                sums = sums._replace(strand=strand)
        state, new = _walk(
            spec, streams, hop.inner, here, hop.keys or held, state, work, finish and last, not schedule.is_full
        )
        if new is not None:
            # On the last hop no block arrives, and nothing else orders the sums' rotation before the kernel.
            strand, state, new = jax.lax.optimization_barrier((sums.strand, state, new))
            new = _cast(spec, here.blocks[0].k.dtype, new)
            sums = sums._replace(strand=_add(strand, new))
        if not last:
            arriving, state, sums = jax.lax.optimization_barrier((arriving, state, sums))
        return arriving, state, sums

    def departures(before: Hop, hop: Hop, strand: Any) -> list[_Departure]:
        """How the sums of a hop leave it: to where ``hop`` needs them, or home, those of keys that go no further."""
        if hop.first:
            return [_Departure(move=_Move(strand, before.homeward), comes_home=True, keys=before.keys)]
        if before.keys == hop.keys:
            return [_Departure(move=_Move(strand, hop.shift), comes_home=False, keys=hop.keys)]
        of = lambda keys: tuple(_part(x, before.keys or held, keys) for x in strand)  # noqa: E731
        gone = _beyond(before.keys or held, hop.keys, home.blocks[0].k.shape[2])
        return [
            *(_Departure(move=_Move(of(keys), before.homeward), comes_home=True, keys=keys) for keys in gone),
            _Departure(move=_Move(of(hop.keys), hop.shift), comes_home=False, keys=hop.keys),
        ]

    def land(landed: Any, strand: Any, keys: Keys | None) -> Any:
        return _land(landed, strand, held, keys, [block.k.shape[2] for block in home.blocks])

    def kind(index: int) -> tuple[Any, ...]:
        if index in (0, len(hops) - 1) or hops[index].first or hops[index + 1].first:
            return (index,)  # alone
        before, here, following = hops[index - 1 : index + 2]
        if before.keys != here.keys:
            return (index,)
        return ("loop", here.shift, following.shift, here.keys, following.keys, here.inner)

    here, sums = home, _Sums()
    if hops[0].shift % size:  # an axis within one that brings only what others need
        (blocks,) = rotate([moving(home, held, hops[0])])
        here = _Place(blocks, owners_after(home, hops[0]))
    for _, group in itertools.groupby(range(len(hops)), kind):
        indices = list(group)
        if len(indices) <= max(spec.unroll, 1):
            for index in indices:
                here, state, sums = step(index, here, state, sums)
        else:
            body = functools.partial(_loop_body, step, indices[0])
            (here, state, sums), _ = jax.lax.scan(body, (here, state, sums), length=len(indices), unroll=spec.unroll)
    if sums.strand is None or not come_home:
        return state, sums.strand
    strand = sums.strand
    if spec.narrow_home:  # no kernel hides this trip
        strand = tuple(
            (_narrowed(dk, block.k.dtype), _narrowed(dv, block.v.dtype))
            for (dk, dv), block in zip(strand, home.blocks, strict=True)
        )
    (strand,) = rotate([_Move(strand, hops[-1].homeward)])
    inner = hops[-1].inner if schedule.is_full else None
    for name in spec.axis_names[len(home.owners[0]) :]:
        if inner is not None:
            homeward = _Move(strand, inner.hops[-1].homeward)
            (strand,) = _rotate(spec, name, inner.num_shards, streams, [homeward])
            inner = inner.hops[-1].inner
    return state, land(sums.landed, strand, hops[-1].keys)


def _loop_body(step: Callable[..., Any], index: int, carry: tuple[Any, ...], _: None) -> tuple[Any, None]:
    return step(index, *carry), None


def _shifted(owner: Array, route: Route, shift: int, size: int) -> Array:
    """Whose block it is after a rotation by ``shift`` offsets."""
    if route.cycle is None:
        return jax.lax.rem(owner + jnp.int32(route.sign * shift % size), jnp.int32(size))
    return jnp.asarray(route.sources(shift, size), jnp.int32)[owner]


def _rotate(
    spec: RingSpec, axis_name: str, size: int, streams: tuple[_Stream, ...], moves: list[_Move]
) -> list[tuple[Any, ...]]:
    """Move every device's view of each stream, along its route. Blocks, dK and dV alike, all of them at once."""

    def run(trees: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        ways = [stream.route for stream in streams]
        return [
            tuple(rotate(tree, axis_name, shift, size, way) for tree, way in zip(each, ways, strict=True))
            for each, shift in zip(trees, shifts, strict=True)
        ]

    shifts = [move.shift for move in moves if move.shift % size]
    trees = [move.trees for move in moves if move.shift % size]
    if spec.one_operation and trees:
        # Arguments of an operation of several have the layout of their shape, and XLA would transpose to it.
        order = _by_token if spec.kernel.TOKEN_MAJOR else lambda x: x
        trees = jax.tree.map(order, in_one_operation(run)(jax.tree.map(order, trees)))
    else:
        trees = run(trees)
    arrived = iter(trees)
    return [next(arrived) if move.shift % size else move.trees for move in moves]


def rotate(tree: Any, axis_name: str, shift: int, size: int, route: Route = Route()) -> Any:  # noqa: B008  frozen
    """Every rank r gets what rank (r + shift) mod size has, or whoever is so far ahead on another route."""
    if shift % size == 0:
        return tree
    pairs = permutation(shift, size, route)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def _narrow(block: Travelling, held: Keys | None, keys: Keys | None) -> Travelling:
    """These keys of a block of which there are those ``held``."""
    if keys is None or keys == held:
        return block
    start = 0 if held is None else held[0]
    low, high = keys[0] - start, keys[1] - start
    of_mask = jax.tree.map(lambda x: x[:, low:high], block.mask)
    return Travelling(block.k[:, :, low:high], block.v[:, :, low:high], of_mask)


def _part(sums: Any, held: Keys | None, keys: Keys | None) -> Any:
    """The same of sums of dK and dV."""
    if keys is None:
        return sums
    start = 0 if held is None else held[0]
    return jax.tree.map(lambda x: x[:, :, keys[0] - start : keys[1] - start], sums)


def _beyond(held: Keys | None, keys: Keys | None, length: int) -> list[Keys]:
    """The ranges that are held and are no longer needed."""
    low, high = held or (0, length)
    start, stop = keys or (low, high)
    return [piece for piece in ((low, start), (stop, high)) if piece[0] < piece[1]]


def _land(landed: Any, sums: Any, held: Keys | None, keys: Keys | None, lengths: list[int]) -> Any:
    """Adds sums for these keys to those for all keys of the home block, of which there may be none yet."""
    if keys is None or keys == held:
        return _add(landed, sums)
    start = keys[0] - (0 if held is None else held[0])
    if landed is None:
        ends = [(start, length - start - (keys[1] - keys[0])) for length in lengths]
        return tuple(
            jax.tree.map(lambda x, end=end: jnp.pad(x, ((0, 0), (0, 0), end, (0, 0))), part)
            for part, end in zip(sums, ends, strict=True)
        )

    def add(whole: Array, part: Array) -> Array:
        there = jax.lax.slice_in_dim(whole, start, start + part.shape[2], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(whole, there + part, start, axis=2)

    return jax.tree.map(add, landed, sums)


def _cast(spec: RingSpec, dtype: Any, sums: Any) -> Any:
    """As they are summed and travel."""
    dkv_dtype = wide(dtype) if spec.dkv_dtype == "float32" else jnp.dtype(spec.dkv_dtype)
    return jax.tree.map(lambda x: x.astype(dkv_dtype), sums)


def _narrowed(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if dtype.itemsize < x.dtype.itemsize else x


def _is_last(stream: _Stream, streams: tuple[_Stream, ...]) -> bool:
    """Of those that go into the same state."""
    return stream is [other for other in streams if other.group == stream.group][-1]


def _groups(x: Array, groups: int, axis: int = 1) -> list[Array]:
    """The heads of each group."""
    return [x] if groups == 1 else jnp.split(x, groups, axis=axis)


def _joined(parts: tuple[Any, ...], axis: int = 1) -> Any:
    """The inverse; None stays None."""
    return parts[0] if len(parts) == 1 or parts[0] is None else jnp.concatenate(parts, axis=axis)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def _head_major(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    """Swap sequence and heads, either way: kernels want the sequence next to the features."""
    return jnp.swapaxes(x, 1, 2)


def _by_token(x: Array) -> Array:
    """Blocks and sums with the heads behind the tokens, and back; what is of tokens alone stays."""
    return _head_major(x) if x.ndim == 4 else x
