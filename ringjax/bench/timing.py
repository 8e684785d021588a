"""How `ringjax bench gpu` times: programs are compiled first, all at once, and then called in turns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Shape:
    """[batch, length, heads, head_size] of the query; key and value have ``kv_heads``."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch} x {self.length} x {heads} x {self.head_size}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed: a function, compiled or still to be, and its arguments."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]

    def milliseconds(self, calls: int) -> float:
        """Of one call, of so many that are queued one behind the other.

        Not on CPU devices: XLA runs queued programs on a few threads, all of which may end up waiting in collectives
        for a device that has none left.
        """
        queue = jax.default_backend() != "cpu"
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = self.run(*self.arguments)
            if not queue:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3 / calls


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Programs to be timed in turns, and what their times mean: from one list of times for each to a result."""

    programs: tuple[Timed, ...]
    conclude: Callable[[list[list[float]]], Any]

    def result(self, rounds: int) -> Any:
        return self.conclude(in_turns(self.programs, rounds))


def compile_all(programs: Sequence[Timed]) -> list[Timed]:
    """The compiler works on several at once, and not on what is compiled already.

    Programs of one function, whose arguments look alike, share the result.
    """
    unique = {id(program.run): program for program in programs}

    def compiled(program: Timed) -> Any:
        if isinstance(program.run, jax.stages.Compiled):
            return program.run
        return jax.jit(program.run).lower(*program.arguments).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = dict(zip(unique, pool.map(compiled, unique.values()), strict=True))
    return [Timed(runs[id(program.run)], program.arguments) for program in programs]


def compile_measurements(measurements: Sequence[Measurement]) -> list[Measurement]:
    """All their programs at once."""
    rest = iter(compile_all([program for measurement in measurements for program in measurement.programs]))
    return [dataclasses.replace(m, programs=tuple(next(rest) for _ in m.programs)) for m in measurements]


def in_turns(programs: Sequence[Timed], rounds: int, budget_ms: float = 60.0) -> list[list[float]]:
    """Times of every program in every round. As many calls a time as fit into the budget, at least two."""
    calls = []
    for program in programs:
        program.milliseconds(1)
        calls.append(max(2, min(50, int(budget_ms / max(program.milliseconds(2), 1e-3)))))
    times: list[list[float]] = [[] for _ in programs]
    for order in orders(len(programs), rounds):
        for index in order:
            times[index].append(programs[index].milliseconds(calls[index]))
    return times


def orders(count: int, rounds: int) -> Iterator[list[int]]:
    """In which order programs are called in each round, the same on every run.

    A GPU at its power limit runs faster after a program that needed less, by up to 8%: neighbours should change.
    """
    draw = random.Random(0)
    for _ in range(rounds):
        yield draw.sample(range(count), count)
