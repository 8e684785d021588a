"""How `ringjax bench ring` measures the programs of one problem: compiled together, checked, then called in turns.

Whatever fails on the way leaves with its reason, and the others go on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax.bench.gpu import directed
from ringjax.bench.ring_programs import DEALT, Left, Problem, Program
from ringjax.bench.timing import Timed, orders

# Two kernels that round the same numbers differently: of the norm of an array, and of its largest entry.
NORM_BOUND = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
LARGEST_BOUND = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Programs that were called in turns: their times in milliseconds, round by round, and what they computed."""

    programs: list[Program]
    times: list[list[float]]
    differences: list[tuple[float, float]]  # from the first: by norm, and by largest entry
    same: list[Program | None]  # the earlier one that compiles to the same program, and so is timed for both


class Data:
    """The arrays of a problem, normal numbers, as each program wants them."""

    def __init__(self, problem: Problem, devices: Sequence[Any], dtype: Any) -> None:
        self._whole = NamedSharding(Mesh(np.asarray(devices), ("sp",)), P(None, "sp"))
        self._count = len(devices)
        shape = problem.shape
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        sizes = [(shape.batch, shape.length, n, shape.head_size) for n in heads]
        self._documents = problem.documents

        def draw() -> tuple[jax.Array, ...]:
            keys = jax.random.split(jax.random.key(0), len(sizes))
            return tuple(jax.random.normal(k, s, jnp.float32).astype(dtype) for k, s in zip(keys, sizes, strict=True))

        self._natural = jax.jit(draw, out_shardings=self._whole)()
        self._placed: dict[tuple[str, Sharding], tuple[jax.Array, ...]] = {}

    def of(self, program: Program) -> tuple[jax.Array, ...]:
        """Query, key, value and cotangent, and what else it takes."""
        key = program.layout, program.sharding
        if key not in self._placed:
            arrays = self._permuted(self._natural, program.layout, ringjax.to_ring_order)
            self._placed[key] = tuple(jax.device_put(x, program.sharding) for x in arrays)
        return (*self._placed[key], *program.rest)

    def natural(self, program: Program, results: Any) -> tuple[jax.Array, ...]:
        """Results of a program in the order of the tokens, sharded alike; 0 where there is padding."""
        placed = tuple(jax.device_put(x, self._whole) for x in jax.tree.leaves(results))
        found = self._permuted(placed, program.layout, ringjax.from_ring_order)
        if self._documents is None:
            return found
        present = (jnp.arange(self._documents.places) < self._documents.tokens)[:, None, None]
        return jax.jit(lambda *xs: tuple(jnp.where(present, x, 0) for x in xs), out_shardings=self._whole)(*found)

    def _permuted(self, arrays: tuple[jax.Array, ...], layout: str, order: Callable[..., Any]) -> tuple[jax.Array, ...]:
        if layout == "contiguous":
            return arrays
        if layout == DEALT:
            assert self._documents is not None
            there = self._documents.order
            places = jnp.asarray(there if order is ringjax.to_ring_order else np.argsort(there))
            permute: Callable[..., Any] = lambda arrays: tuple(x[:, places] for x in arrays)  # noqa: E731
        else:
            permute = functools.partial(order, layout=layout, num_shards=self._count)
        return jax.jit(permute, out_shardings=self._whole)(arrays)


@jax.jit
def _difference(ours: tuple[jax.Array, ...], theirs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The worst over all arrays of |a - b| / |a|, by norm and by largest entry. NaN stays NaN."""

    def both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        norm = lambda x: jnp.sqrt(jnp.sum(x * x))  # noqa: E731
        return norm(a - b) / norm(a), jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))

    norms, largest = zip(*(both(a, b) for a, b in zip(ours, theirs, strict=True)), strict=True)
    return jnp.max(jnp.stack(norms)), jnp.max(jnp.stack(largest))


def reason_of(error: BaseException) -> str:
    """In one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def compile_group(
    found: Sequence[Program], data: Data, direction: str
) -> tuple[dict[int, Timed], dict[int, int], list[Left]]:
    """Compiled programs by their index, which of them stand for which others, and those that do not compile."""
    compiled: dict[int, Timed] = {}
    same: dict[int, int] = {}
    left: list[Left] = []
    waiting: dict[int, concurrent.futures.Future[Any]] = {}
    first: dict[Any, int] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for index, program in enumerate(found):
            try:
                run = jax.jit(directed(program.attend, direction), out_shardings=program.sharding)
                lowered = run.lower(*data.of(program))
                # One mesh or two of the same sizes: the text says which devices talk to which.
                key = lowered.as_text(), program.layout, program.num_devices
                if first.setdefault(key, index) != index:
                    same[index] = first[key]
                    continue
                waiting[index] = pool.submit(lowered.compile)
            except Exception as error:  # whatever it is, the others go on
                left.append(Left(program.name, program.kernel, reason_of(error)))
        for index, future in waiting.items():
            try:
                compiled[index] = Timed(future.result(), data.of(found[index]))
            except Exception as error:
                left.append(Left(found[index].name, found[index].kernel, reason_of(error)))
    return compiled, same, left


def check_group(
    found: Sequence[Program], compiled: dict[int, Timed], data: Data, dtype: str
) -> tuple[dict[int, tuple[float, float]], list[Left]]:
    """Each program's difference from the first, and those that compute something else or cannot run."""
    differences: dict[int, tuple[float, float]] = {}
    left: list[Left] = []
    reference: tuple[jax.Array, ...] | None = None
    first = ""
    for index, timed in compiled.items():
        program = found[index]
        try:
            results = data.natural(program, timed.run(*timed.arguments))
            if reference is None:
                reference, first = results, program.label
            norm, largest = (float(x) for x in _difference(reference, results))
        except Exception as error:
            left.append(Left(program.name, program.kernel, reason_of(error)))
            continue
        del results
        if norm <= NORM_BOUND[dtype] and largest <= LARGEST_BOUND[dtype]:
            differences[index] = norm, largest
        else:
            reason = f"differs from {first}: by {norm:.1e} in norm, by {largest:.1e} of the largest entry"
            left.append(Left(program.name, program.kernel, reason))
    return differences, left


def time_group(
    found: Sequence[Program], compiled: dict[int, Timed], *, rounds: int, seconds: float
) -> tuple[dict[int, list[float]], list[Left]]:
    """Milliseconds of every program in every round, in turns; one that fails leaves, and the others go on."""
    calls: dict[int, int] = {}
    times: dict[int, list[float]] = {}
    left: list[Left] = []
    indices = list(compiled)
    turns = [(indices[place], False) for order in orders(len(indices), rounds) for place in order]
    for index, first in [(index, True) for index in indices] + turns:
        timed = compiled[index]
        try:
            if first:  # this call pays for what the one before has left
                timed.milliseconds(1)
                each = max(timed.milliseconds(2), 1e-3)
                calls[index], times[index] = max(1, min(50, int(1e3 * seconds / rounds / each))), []
            elif index in calls:
                times[index].append(timed.milliseconds(calls[index]))
        except Exception as error:
            calls.pop(index, None)
            left.append(Left(found[index].name, found[index].kernel, reason_of(error)))
    return {index: times[index] for index in calls}, left


def measure(
    found: Sequence[Program], data: Data, direction: str, *, dtype: str, rounds: int, seconds: float
) -> tuple[Measured, list[Left]]:
    """Compiles, checks and times the programs of one problem and pass, "fwd" or "fwd+bwd"."""
    compiled, same, left = compile_group(found, data, direction)
    differences, wrong = check_group(found, compiled, data, dtype)
    kept = {index: compiled[index] for index in differences}
    times, failed = time_group(found, kept, rounds=rounds, seconds=seconds)
    shared = {index: first for index, first in same.items() if first in times}
    lost = [
        Left(found[index].name, found[index].kernel, f"is the program of {found[first].label}")
        for index, first in same.items()
        if first not in times
    ]
    order = sorted([*times, *shared])
    measured = Measured(
        programs=[found[index] for index in order],
        times=[times[shared.get(index, index)] for index in order],
        differences=[differences[shared.get(index, index)] for index in order],
        same=[found[shared[index]] if index in shared else None for index in order],
    )
    return measured, [*left, *wrong, *failed, *lost]
