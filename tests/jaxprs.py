"""Reading traced programs: which collectives run how often on what, and how large the largest array is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

# By the names that JAX gives its primitives; under check_vma some carry a suffix.
COLLECTIVES = ("ppermute", "psum", "pmax", "pmin", "all_gather", "all_to_all", "reduce_scatter")


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective on one array, and how often it runs."""

    primitive: str
    shape: tuple[int, ...]
    dtype: np.dtype
    times: int
    axis: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation at every depth, with the number of times that scans run it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1) if _is_scan(equation) else times
        for value in equation.params.values():
            for child in value if isinstance(value, list | tuple) else (value,):
                if hasattr(child, "eqns") or hasattr(child, "jaxpr"):
                    yield from equations(child, inner)


def _is_scan(equation: Any) -> bool:
    return equation.primitive.name == "scan"


def collectives(jaxpr: Any) -> list[Sent]:
    """All that goes over the wire."""
    found = []
    for equation, times in equations(jaxpr):
        if equation.primitive.name.startswith(COLLECTIVES):
            for variable in equation.invars:
                aval = variable.aval
                found.append(Sent(equation.primitive.name, aval.shape, aval.dtype, times, _axis(equation)))
    return found


def _axis(equation: Any) -> Any:
    """The name of its mesh axis, or the names."""
    names = equation.params.get("axis_name", equation.params.get("axes"))
    return names[0] if isinstance(names, tuple) and len(names) == 1 else names


def float_collectives(jaxpr: Any) -> dict[tuple[str, str, tuple[int, ...]], int]:
    """How often which collective runs on which floating-point arrays: {(primitive, dtype, shape): times}."""
    count: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for sent in collectives(jaxpr):
        if not np.issubdtype(sent.dtype, np.integer):
            key = (sent.primitive, sent.dtype.name, sent.shape)
            count[key] = count.get(key, 0) + sent.times
    return count


def float_permutes(jaxpr: Any) -> dict[tuple[str, tuple[int, ...]], int]:
    """How often which floating-point arrays are permuted: {(dtype, shape): times}."""
    found = float_collectives(jaxpr).items()
    return {(dtype, shape): times for (name, dtype, shape), times in found if name.startswith("ppermute")}


def permutes_by_axis(jaxpr: Any) -> dict[Any, int]:
    """How often floating-point arrays are permuted over which axis."""
    count: dict[Any, int] = {}
    for sent in collectives(jaxpr):
        if sent.primitive.startswith("ppermute") and not np.issubdtype(sent.dtype, np.integer):
            count[sent.axis] = count.get(sent.axis, 0) + sent.times
    return count


def inside_shard_map(jaxpr: Any) -> Iterator[Any]:
    """The bodies that each device runs."""
    for equation, _ in equations(jaxpr):
        if equation.primitive.name == "shard_map":
            yield equation.params["jaxpr"]


def largest_array(jaxpr: Any) -> tuple[int, Any]:
    """The number of elements of the largest intermediate inside shard_map, and the equation that makes it."""
    sizes = [
        (math.prod(variable.aval.shape), str(equation.primitive))
        for body in inside_shard_map(jaxpr)
        for equation, _ in equations(body)
        for variable in equation.outvars
        if hasattr(variable.aval, "shape")
    ]
    return max(sizes)
