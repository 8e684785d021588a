"""The shared table of attention problems, and how to run one on the ring, densely, and on the oracle.

A `Case` says what is asked; `make_inputs` draws it in natural order; `run_ring` permutes it to ring order, runs
out, lse and every gradient in one compiled program, and permutes back. `assert_matches` holds the ring to
the house rule: at most twice the error of a dense computation in the same dtype, plus rounding.

Programs are compiled with few optimisations, which takes less time; with `as_users=True`, as users compile them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from profiles import LAYOUTS, NUM_SHARDS, PROFILES

import ringjax

__all__ = ["LAYOUTS", "NUM_SHARDS", "PROFILES"]

# Kernels that compute something on this machine, and those of them that the interpreter runs.
IMPLEMENTATIONS = tuple(name for name, profile in PROFILES.items() if profile.on_cpu != "lowered")
BLOCKS = {"block_q": 8, "block_kv": 8}

# What tests/conftest.py turns off.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):
    AS_USERS["xla_cpu_use_fusion_emitters"] = True

# Rounding allowed on top of twice the reference's error, in units of eps(dtype) * max|oracle|.
ROUNDING = 4.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem. Lengths need not divide by anything."""

    name: str
    query_length: int = 48
    key_length: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 8
    value_size: int = 8
    is_causal: bool = False
    window: int | tuple[int, int] | None = None
    soft_cap: float | None = None
    scale: float | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    segments: str | None = None  # "one" packed array, or a "pair"
    positions: str | None = None  # "one" [T], "batch" [B, T], or a "pair"
    sinks: bool = False
    batch: int = 2

    def static_options(self) -> dict[str, Any]:
        """The options that are Python values."""
        named = {
            "scale": self.scale,
            "local_window_size": self.window,
            "logits_soft_cap": self.soft_cap,
            "is_causal": self.is_causal or None,
        }
        return {name: value for name, value in named.items() if value is not None}


# Each combination of features is as rich as one readable failure allows: every case costs a compilation. Lengths that
# do not divide cost more of it, so only some cases have them: 48 and 96 suit every layout and ring size.
CASES = (
    Case("full_mqa_wide_value", 48, 50, num_heads=3, num_kv_heads=1, value_size=12),
    Case("causal_gqa", is_causal=True, scale=0.5),
    Case("causal_cross_soft_cap", 41, 53, is_causal=True, soft_cap=1.5, scale=0.9, num_heads=2),
    Case("window_cross", 45, 83, window=(7, 9), num_heads=2, num_kv_heads=1, sinks=True),
    Case("causal_window_sinks", is_causal=True, window=(9, 0), sinks=True),
    Case("causal_segments", is_causal=True, segments="one"),
    Case("segment_pair_cross_sinks", 48, 96, segments="pair", sinks=True, num_heads=2),
    Case("lengths", query_lengths=(48, 19), key_lengths=(0, 31), value_size=4),
    Case("positions_causal", is_causal=True, positions="one", num_heads=2),
    Case("position_pair_window", 96, 48, window=(6, 4), positions="pair", num_heads=2),
    Case(
        "everything",
        51,
        51,
        is_causal=True,
        window=(20, 3),
        soft_cap=2.0,
        scale=0.7,
        query_lengths=(51, 30),
        key_lengths=(37, 51),
        segments="one",
        positions="batch",
        sinks=True,
        value_size=12,
    ),
)
BY_NAME = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Natural-order numpy arrays. `arrays` holds query, key, value, dout (the case's dtype), dlse and sinks."""

    arrays: Mapping[str, np.ndarray]
    masks: Mapping[str, Any]  # query_seq_lengths, key_value_seq_lengths, segment_ids, positions

    @property
    def float64(self) -> dict[str, np.ndarray]:
        return {name: x.astype(np.float64) for name, x in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Result:
    """Natural-order float64 copies of everything the attention returns, and the dtypes it returned."""

    values: Mapping[str, np.ndarray]
    dtypes: Mapping[str, Any]


def wide_of(dtype: Any) -> np.dtype:
    """The dtype of accumulators and of the log-sum-exp."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def make_inputs(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> Inputs:
    """Draws random inputs and cotangents; the float64 view is of the already rounded values."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    wide = wide_of(dtype)
    b, t, s, n = case.batch, case.query_length, case.key_length, case.num_heads
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    arrays = {
        "query": draw(b, t, n, case.head_size).astype(dtype),
        "key": draw(b, s, case.num_kv_heads, case.head_size).astype(dtype),
        "value": draw(b, s, case.num_kv_heads, case.value_size).astype(dtype),
        "dout": draw(b, t, n, case.value_size).astype(dtype),
        "dlse": draw(b, t, n).astype(wide),
    }
    if case.sinks:
        arrays["sinks"] = draw(n).astype(dtype)
    return Inputs(arrays, _draw_masks(case, rng))


def with_offset(case: Case, inputs: Inputs, offset: float) -> Inputs:
    """Logits = offset + small: queries and keys have a quarter of their features in common, and large."""
    common = max(case.head_size // 4, 1)
    size = np.sqrt(offset * case.head_size**0.5 / common)
    arrays = dict(inputs.arrays)
    for name in ("query", "key"):
        arrays[name] = arrays[name].copy()
        arrays[name][..., :common] = size
    if case.sinks:
        arrays["sinks"] = (arrays["sinks"].astype(np.float64) + offset).astype(arrays["sinks"].dtype)
    return dataclasses.replace(inputs, arrays=arrays)


def _draw_masks(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    b, t, s = case.batch, case.query_length, case.key_length
    masks: dict[str, Any] = {}
    if case.query_lengths is not None:
        masks["query_seq_lengths"] = np.array(case.query_lengths, np.int32)
    if case.key_lengths is not None:
        masks["key_value_seq_lengths"] = np.array(case.key_lengths, np.int32)
    packed = lambda length: np.sort(rng.integers(0, 4, (b, length)), axis=1).astype(np.int32)  # noqa: E731
    if case.segments == "one":
        masks["segment_ids"] = packed(t)
    elif case.segments == "pair":
        # Unsorted queries, and ids that no key has, so that some rows are fully masked.
        masks["segment_ids"] = (rng.integers(0, 6, (b, t)).astype(np.int32), packed(s))
    if case.positions == "one":
        masks["positions"] = rng.permutation(t).astype(np.int32)
    elif case.positions == "batch":
        starts = rng.integers(-5, 5, (b, 1))
        masks["positions"] = (starts + np.arange(t)).astype(np.int32)
    elif case.positions == "pair":
        masks["positions"] = (
            rng.integers(0, t, (b, t)).astype(np.int32),
            rng.integers(0, t, (b, s)).astype(np.int32),
        )
    return masks


Sizes = int | tuple[int, ...]  # of the axis of the sequence, or of its axes


@functools.cache
def mesh_of(num_shards: Sizes, kind: jax.sharding.AxisType = jax.sharding.AxisType.Auto) -> jax.sharding.Mesh:
    """A mesh of the first simulated devices: an axis "sp", or several of these sizes, see `axes_of`."""
    sizes = (num_shards,) if isinstance(num_shards, int) else num_shards
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, axes_of(num_shards), (kind,) * len(sizes), devices=devices)


def axes_of(num_shards: Sizes) -> tuple[str, ...]:
    """The names of the axes of the sequence."""
    return ("sp",) if isinstance(num_shards, int) else tuple(f"sp{n}" for n in range(len(num_shards)))


def orders(case: Case, layout: Any, num_shards: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The ring order of queries and of keys, as indices into natural order."""
    where = functools.partial(ringjax.ring_positions, layout=layout, num_shards=int(np.prod(num_shards)))
    return np.asarray(where(case.query_length)), np.asarray(where(case.key_length))


def to_ring(inputs: Inputs, query_order: np.ndarray, key_order: np.ndarray) -> Inputs:
    """Permutes the sequence axis of every array."""
    of_keys = ("key", "value")
    arrays = {
        name: x if name == "sinks" else x[:, key_order if name in of_keys else query_order]
        for name, x in inputs.arrays.items()
    }
    masks = dict(inputs.masks)
    for name in ("segment_ids", "positions"):
        if isinstance(masks.get(name), tuple):
            query, key = masks[name]
            masks[name] = (query[..., query_order], key[..., key_order])
        elif name in masks:
            masks[name] = masks[name][..., query_order]
    return Inputs(arrays, masks)


def value_and_gradients(attend: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """out, lse and every gradient of `attend(query, key, value, sinks) -> (out, lse)`."""
    primals = tuple(arrays.get(name) for name in ("query", "key", "value", "sinks"))
    (out, lse), pull = jax.vjp(attend, *primals)
    dq, dk, dv, dsinks = pull((arrays["dout"], arrays["dlse"]))
    got = {"out": out, "lse": lse, "dquery": dq, "dkey": dk, "dvalue": dv}
    return got if dsinks is None else {**got, "dsinks": dsinks}


def config_of(implementation: str, **config: Any) -> ringjax.RingConfig:
    """The configuration under which tests run that kernel on this machine."""
    return PROFILES[implementation].config(**config)


def compiled(run: Any, *, as_users: bool) -> Any:
    """`run` under jit, with the optimisations that users have or with few."""
    if jax.default_backend() != "cpu":  # nothing is turned off there
        return jax.jit(run)
    return jax.jit(run, compiler_options=AS_USERS if as_users else None)


def ring_program(
    case: Case, *, layout: Any, num_shards: Sizes, implementation: str = "xla", as_users: bool = False, **config: Any
) -> Any:
    """The compiled program (arrays, masks) -> out, lse and gradients, all in ring order. Who asks alike shares it."""
    # The cache below takes what is named in another order, or left out, for another call.
    return _ring_program(case, layout, num_shards, implementation, as_users, tuple(sorted(config.items())))


@functools.lru_cache(maxsize=128)
def _ring_program(
    case: Case, layout: Any, num_shards: Sizes, implementation: str, as_users: bool, config: tuple[tuple[str, Any], ...]
) -> Any:
    options = dict(
        case.static_options(),
        mesh=mesh_of(num_shards),
        axis_name=axes_of(num_shards),
        layout=layout,
        return_residual=True,
        config=config_of(implementation, **dict(config)),
    )

    def program(arrays: Mapping[str, Any], masks: Mapping[str, Any]) -> dict[str, Any]:
        def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            return ringjax.ring_attention(query, key, value, sinks=sinks, **masks, **options)

        return value_and_gradients(attend, arrays)

    return compiled(program, as_users=as_users)


def run_ring(
    case: Case,
    inputs: Inputs,
    *,
    layout: Any = "contiguous",
    num_shards: Sizes = 4,
    program: Any = None,
    **config: Any,
) -> Result:
    """Runs the ring on natural-order inputs and returns natural-order results."""
    program = program or ring_program(case, layout=layout, num_shards=num_shards, **config)
    query_order, key_order = orders(case, layout, num_shards)
    ring = to_ring(inputs, query_order, key_order)
    got = program(dict(ring.arrays), dict(ring.masks))
    back = {"dkey": np.argsort(key_order), "dvalue": np.argsort(key_order)}
    values = {
        name: np.asarray(x).astype(np.float64)
        if name == "dsinks"
        else np.asarray(x).astype(np.float64)[:, back.get(name, np.argsort(query_order))]
        for name, x in got.items()
    }
    return Result(values, {name: x.dtype for name, x in got.items()})


def stacked_program(
    case: Case, inputs: Inputs, config: ringjax.RingConfig, *, layout: Any, num_shards: int
) -> tuple[Any, dict[str, Any]]:
    """A ring on one device, whose ranks are rows of one array: arrays -> out, lse and gradients; and the arrays."""
    ring = to_ring(inputs, *orders(case, layout, num_shards))
    stack = lambda x, axis=-1: np.stack(np.split(x, num_shards, axis=axis))  # noqa: E731
    arrays = {name: x if name == "sinks" else stack(x, 1) for name, x in ring.arrays.items()}
    travel = ("segment_ids", "positions")  # with the tokens, lengths do not
    masks = {name: jax.tree.map(stack, x) if name in travel else x for name, x in ring.masks.items()}
    axes = {name: 0 if name in travel else None for name in masks}

    def of_rank(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        return ringjax.ring_attention(
            query, key, value, sinks=sinks, layout=layout, config=config, return_residual=True,
            **case.static_options(), **masks,
        )  # fmt: skip

    def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return jax.vmap(of_rank, in_axes=(0, 0, 0, None, axes), axis_name="sp")(query, key, value, sinks, masks)

    return jax.jit(lambda arrays: value_and_gradients(attend, arrays)), arrays


def stacked_ring(case: Case, inputs: Inputs, config: ringjax.RingConfig, *, layout: Any, num_shards: int) -> Result:
    """Runs it on natural-order inputs and returns natural-order results."""
    program, arrays = stacked_program(case, inputs, config, layout=layout, num_shards=num_shards)
    query_order, key_order = orders(case, layout, num_shards)
    got, values = program(arrays), {}
    for name, x in got.items():
        whole = np.asarray(x).astype(np.float64)
        if name != "dsinks":
            order = key_order if name in ("dkey", "dvalue") else query_order
            whole = np.concatenate(list(whole), axis=1)[:, np.argsort(order)]
        values[name] = whole
    return Result(values, {name: x.dtype for name, x in got.items()})


def run_oracle(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """The truth."""
    return _truth_and_sink_terms(case, inputs)[0]


def _truth_and_sink_terms(case: Case, inputs: Inputs) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    x = inputs.float64
    options = dict(case.static_options(), **inputs.masks, sinks=x.get("sinks"))
    out, lse = oracle.forward(x["query"], x["key"], x["value"], **options)
    grads = oracle.backward(x["query"], x["key"], x["value"], x["dout"], x["dlse"], **options)
    got = {
        "out": out,
        "lse": lse,
        "dquery": grads.query,
        "dkey": grads.key,
        "dvalue": grads.value,
    }
    return (got if grads.sinks is None else {**got, "dsinks": grads.sinks}), grads.sink_terms


def run_dense(case: Case, inputs: Inputs, *, as_users: bool = False) -> dict[str, np.ndarray]:
    """What an ordinary dense implementation makes of the same inputs in their own dtype."""
    mask = oracle.attends(
        case.batch,
        case.query_length,
        case.key_length,
        is_causal=case.is_causal,
        local_window_size=case.window,
        **inputs.masks,
    )
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    got = _dense_program(scale, case.soft_cap, as_users)(dict(inputs.arrays), mask)
    return {name: np.asarray(x).astype(np.float64) for name, x in got.items()}


@functools.cache
def _dense_program(scale: float, cap: float | None, as_users: bool) -> Any:
    return compiled(functools.partial(_dense, scale=scale, cap=cap), as_users=as_users)


def _dense(arrays: Mapping[str, Any], mask: Any, *, scale: float, cap: float | None) -> dict[str, Any]:
    """Logits and softmax in float32 (float64 for float64), probabilities rounded to the dtype, as jax.nn does."""

    def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        wide = wide_of(query.dtype)
        group = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
        s = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=wide) * scale
        s = s if cap is None else cap * jnp.tanh(s / cap)
        # Finite mask value and guarded log: the -inf of a dead row is a constant, and no NaN gets into the vjp.
        s = jnp.where(mask[:, None], s, -1e30)
        top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
        sink = None if sinks is None else sinks.astype(wide)[None, :, None, None]
        top = top if sink is None else jnp.maximum(top, jax.lax.stop_gradient(sink))
        p = jnp.where(mask[:, None], jnp.exp(s - top), 0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - top)
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
        out = jnp.einsum("bnts,bsnv->btnv", (p / safe).astype(value.dtype), value)
        return out, jnp.moveaxis(lse[..., 0], 1, 2)

    return value_and_gradients(attend, arrays)


def errors(got: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square error over the finite entries."""
    finite = np.isfinite(truth)
    difference = got[finite] - truth[finite]
    if difference.size == 0:
        return 0.0, 0.0
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))


def assert_matches(
    case: Case, inputs: Inputs, result: Result, *, rounding: float = ROUNDING, as_users: bool = False
) -> None:
    """Holds every output and gradient of `result` to the house tolerance, and its dtypes to the contract."""
    (truth, sink_terms), dense = _truth_and_sink_terms(case, inputs), run_dense(case, inputs, as_users=as_users)
    dtype = inputs.arrays["query"].dtype
    assert result.values.keys() == truth.keys()
    for name, want in truth.items():
        got = result.values[name]
        wide = wide_of(dtype)
        assert result.dtypes[name] == (wide if name == "lse" else dtype), name
        assert got.shape == want.shape, name
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{name}: -inf rows")
        assert np.isfinite(got[finite]).all(), f"{name} is not finite where the oracle is"
        # The gradient of a sink sums over every row of the batch, and rounding grows with what cancels in it.
        scale = sink_terms if name == "dsinks" and sink_terms is not None else want[finite]
        size = float(np.abs(scale).max(initial=0.0))
        slack = rounding * float(jnp.finfo(result.dtypes[name]).eps) * size
        for kind, ours, theirs in zip(("max", "rms"), errors(got, want), errors(dense[name], want), strict=True):
            limit = 2 * theirs + slack
            assert ours <= limit, f"{name}: {kind} error {ours:.3g} > {limit:.3g} (dense {theirs:.3g})"
