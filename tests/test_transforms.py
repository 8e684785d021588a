"""Under every transformation and in every kind of mesh the ring gives what the oracle gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import cases
import jax
import jax.export
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax

CONFIG = ringjax.RingConfig(**cases.BLOCKS)

# Everything that can be sharded is in it: batch, sequence, heads; lengths, positions and segments.
CASE = cases.Case(
    "sharded",
    32,
    32,
    4,
    2,
    is_causal=True,
    window=(20, 0),
    key_lengths=(27, 32),
    segments="one",
    positions="batch",
    sinks=True,
)
SPECS = {
    "query": P("data", "sp", "tp"),
    "key": P("data", "sp", "tp"),
    "value": P("data", "sp", "tp"),
    "dout": P("data", "sp", "tp"),
    "dlse": P("data", "sp", "tp"),
    "sinks": P("tp"),
    "key_value_seq_lengths": P("data"),
    "segment_ids": P("data", "sp"),
    "positions": P("data", "sp"),
}


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "sp", "tp"), (kind,) * 3)


def options_of(case: cases.Case, **more: Any) -> dict[str, Any]:
    return dict(case.static_options(), return_residual=True, config=CONFIG, **more)


def program_of(attend: Any) -> Any:
    """Compiles `attend(query, key, value, sinks, masks)` with its gradients."""

    @jax.jit
    def program(arrays: Mapping[str, Any], masks: Mapping[str, Any]) -> Any:
        return cases.value_and_gradients(lambda *x: attend(*x, masks), arrays)

    return program


def check(program: Any, case: cases.Case = CASE, num_shards: int = 2, layout: Any = "zigzag") -> None:
    inputs = cases.make_inputs(case)
    result = cases.run_ring(case, inputs, layout=layout, num_shards=num_shards, program=program)
    cases.assert_matches(case, inputs, result)


def placed(program: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same program on inputs that are already sharded over all three axes."""

    def run(*groups: Mapping[str, Any]) -> Any:
        put = lambda name, x: jax.device_put(x, NamedSharding(mesh, SPECS[name]))  # noqa: E731
        with jax.set_mesh(mesh):
            return program(*({name: put(name, x) for name, x in g.items()} for g in groups))

    return run


# ------------------------------------------------------------------------------------------------------ meshes


# Auto axes without check_vma are the next test's, which has more of them.
@pytest.mark.parametrize(
    ("kind", "check_vma"), [(AxisType.Auto, True), (AxisType.Explicit, True), (AxisType.Explicit, False)], ids=str
)
def test_inside_shard_map(kind: AxisType, check_vma: bool) -> None:
    mesh = make_mesh(kind)

    def attend(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        local = lambda q, k, v, s, m: ringjax.ring_attention(  # noqa: E731
            q, k, v, sinks=s, layout="zigzag", **m, **options_of(CASE)
        )
        specs = [SPECS[name] for name in ("query", "key", "value", "sinks")]
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(*specs, {name: SPECS[name] for name in masks}),
            out_specs=(SPECS["dout"], SPECS["dlse"]),
            check_vma=check_vma,
        )(query, key, value, sinks, masks)

    check(placed(program_of(attend), mesh))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_over_the_sequence_axis_alone(check_vma: bool) -> None:
    # Batch and heads stay with the compiler, beside a manual sequence axis.
    mesh = make_mesh(AxisType.Auto)
    only = lambda spec: P(*(name if name == "sp" else None for name in spec))  # noqa: E731

    def attend(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        local = lambda q, k, v, s, m: ringjax.ring_attention(  # noqa: E731
            q, k, v, sinks=s, layout="zigzag", **m, **options_of(CASE)
        )
        specs = [only(SPECS[name]) for name in ("query", "key", "value", "sinks")]
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(*specs, {name: only(SPECS[name]) for name in masks}),
            out_specs=(only(SPECS["dout"]), only(SPECS["dlse"])),
            axis_names={"sp"},
            check_vma=check_vma,
        )(query, key, value, sinks, masks)

    check(placed(program_of(attend), mesh))


@pytest.mark.parametrize("where", ["argument", "context"])
def test_outside_on_auto_axes(where: str) -> None:
    mesh = make_mesh(AxisType.Auto)
    options = options_of(
        CASE,
        layout="zigzag",
        batch_axis_name="data",
        head_axis_name="tp",
        mesh=mesh if where == "argument" else None,
    )
    attend = lambda q, k, v, s, m: ringjax.ring_attention(q, k, v, sinks=s, **m, **options)  # noqa: E731
    check(placed(program_of(attend), mesh))


@pytest.mark.parametrize("placing", ["sharded", "replicated"])
def test_outside_on_explicit_axes(placing: str) -> None:
    # Batch and head axes are read off the types of the inputs; what is not sharded yet is sharded by the call.
    mesh = make_mesh(AxisType.Explicit)
    options = options_of(CASE, layout="zigzag")
    attend = lambda q, k, v, s, m: ringjax.ring_attention(q, k, v, sinks=s, **m, **options)  # noqa: E731
    if placing == "sharded":
        check(placed(program_of(attend), mesh))
    else:
        with jax.set_mesh(mesh):
            check(program_of(attend))


def test_explicit_axes_shard_the_result_as_the_query() -> None:
    mesh = make_mesh(AxisType.Explicit)
    inputs = cases.make_inputs(CASE)
    with jax.set_mesh(mesh):
        q, k, v = (
            jax.device_put(inputs.arrays[name], NamedSharding(mesh, SPECS[name])) for name in ("query", "key", "value")
        )
        traced = jax.eval_shape(ringjax.ring_attention, q, k, v)
        assert traced.sharding.spec == P("data", "sp", "tp", None)
        assert cast(Any, ringjax.ring_attention(q, k, v).sharding).spec[:3] == ("data", "sp", "tp")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_ragged_lengths_outside_beside_other_axes(kind: AxisType) -> None:
    # Padding and cutting happen outside shard_map, where Explicit axes forbid what Auto axes allow.
    case = cases.Case("ragged", 29, 37, 4, 1, is_causal=True, sinks=True)
    mesh = make_mesh(kind)
    options = options_of(case, layout="striped", mesh=mesh, batch_axis_name="data", head_axis_name="tp")
    attend = lambda q, k, v, s, m: ringjax.ring_attention(q, k, v, sinks=s, **m, **options)  # noqa: E731
    with jax.set_mesh(mesh):
        check(program_of(attend), case, layout="striped")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout, length", [("zigzag", 17), ("zigzag", 24), ("striped", 19)])
def test_padding_that_fills_whole_chunks(layout: str, length: int, kind: AxisType) -> None:
    # XLA's partitioner gets gradients of slices and pads wrong here, unless they are kept off the sharded axis.
    case = cases.Case("mostly padding", length, length, 2, 2, is_causal=True)
    mesh = jax.make_mesh((8,), ("sp",), (kind,))
    options = options_of(case, layout=layout, mesh=mesh)
    attend = lambda q, k, v, s, m: ringjax.ring_attention(q, k, v, sinks=s, **m, **options)  # noqa: E731
    check(program_of(attend), case, layout=layout, num_shards=8)


def test_a_ring_of_another_name_and_of_one_device() -> None:
    case = cases.BY_NAME["causal_window_sinks"]
    mesh = jax.make_mesh((1,), ("context",), (AxisType.Auto,), devices=jax.devices()[:1])

    def attend(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        local = functools.partial(ringjax.ring_attention, axis_name="context", **masks, **options_of(case))
        spec = P(None, "context")
        return jax.shard_map(
            lambda q, k, v, s: local(q, k, v, sinks=s),
            mesh=mesh,
            in_specs=(spec, spec, spec, P()),
            out_specs=(spec, spec),
        )(query, key, value, sinks)

    check(program_of(attend), case, num_shards=1)


def test_an_abstract_mesh_of_256_devices() -> None:
    # How a pod's program is checked on a laptop.
    mesh = jax.sharding.AbstractMesh((256,), ("sp",), (AxisType.Auto,))
    array = jax.ShapeDtypeStruct((1, 2**20, 8, 128), jnp.bfloat16)
    attend = functools.partial(ringjax.ring_attention, mesh=mesh, is_causal=True, layout="zigzag", return_residual=True)
    out, lse = jax.eval_shape(attend, array, array, array)
    assert (out.shape, out.dtype) == (array.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((1, 2**20, 8), jnp.float32)


# -------------------------------------------------------------------------------------------- transformations


def ring_attend(case: cases.Case, num_shards: int = 4) -> Any:
    options = options_of(case, layout="zigzag", mesh=cases.mesh_of(num_shards))
    return lambda q, k, v, s, m: ringjax.ring_attention(q, k, v, sinks=s, **m, **options)


def test_without_jit() -> None:
    case = cases.BY_NAME["causal_segments"]
    attend = ring_attend(case)

    def eager(arrays: Mapping[str, Any], masks: Mapping[str, Any]) -> Any:
        return cases.value_and_gradients(lambda *x: attend(*x, masks), arrays)

    check(eager, case, num_shards=4)


def test_one_array_without_the_residual() -> None:
    case = cases.BY_NAME["causal_gqa"]
    x = cases.make_inputs(case).arrays
    call = functools.partial(ringjax.ring_attention, x["query"], x["key"], x["value"], mesh=cases.mesh_of(2))
    out, _ = call(is_causal=True, return_residual=True)
    np.testing.assert_array_equal(call(is_causal=True), out)
    # And the gradient through it is that of a zero cotangent of the lse.
    loss = lambda q: ringjax.ring_attention(  # noqa: E731
        q, x["key"], x["value"], is_causal=True, scale=case.scale, mesh=cases.mesh_of(2)
    )
    (got,) = jax.vjp(loss, x["query"])[1](x["dout"])
    arrays = {**x, "dlse": np.zeros_like(x["dlse"])}
    want = cases.run_oracle(case, cases.Inputs(arrays, {}))["dquery"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def each(result: Any, i: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[i], result)


def test_vmap_of_the_whole_call() -> None:
    case = cases.BY_NAME["causal_window_sinks"]
    program = program_of(ring_attend(case, num_shards=2))
    drawn = [cases.make_inputs(case, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(dict(x.arrays) for x in drawn))
    masks = dict(drawn[0].masks)
    many = jax.jit(jax.vmap(lambda arrays: program(arrays, masks)))(stacked)
    for i, inputs in enumerate(drawn):
        want = program(dict(inputs.arrays), masks)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            each(many, i),
            dict(want),
        )


@pytest.mark.parametrize("num_shards", [1, 8])
def test_vmap_over_stacked_shards_is_a_ring(num_shards: int) -> None:
    # The way to run the true ring on one device.
    case = cases.Case("stacked", 48, 24, 4, 2, is_causal=True, sinks=True, segments="pair")

    def stack(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(x.shape[0], num_shards, -1, *x.shape[2:]), 1, 0)

    def unstack(x: Any) -> Any:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    def attend(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        local = lambda q, k, v, m: ringjax.ring_attention(  # noqa: E731
            q, k, v, sinks=sinks, **m, **options_of(case)
        )
        stacked = jax.tree.map(stack, (query, key, value, masks))
        return jax.tree.map(unstack, jax.vmap(local, axis_name="sp")(*stacked))

    check(program_of(attend), case, num_shards=num_shards, layout="contiguous")


def test_vmap_over_a_mesh_axis_beside_the_ring() -> None:
    case = cases.BY_NAME["lengths"]
    mesh = jax.make_mesh((2, 2), ("d", "sp"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    options = options_of(case, layout="zigzag", mesh=mesh)

    def attend(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
        # What is mapped varies over "d", what is not does not: both kinds meet in the ring's loops.
        local = lambda q, k, v: ringjax.ring_attention(q, k, v, sinks=sinks, **masks, **options)  # noqa: E731
        mapped = jax.vmap(local, in_axes=(0, None, None), spmd_axis_name="d")
        return jax.tree.map(lambda x: x.mean(0), mapped(jnp.stack([query, query]), key, value))

    check(program_of(attend), case)


def dense_lse(q: Any, k: Any, v: Any) -> Any:
    """Attention without a mask in two lines, and its log-sum-exp."""
    logits = jnp.einsum("btnh,bsnh->btns", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(logits), v), jax.nn.logsumexp(logits, axis=-1)


def assert_same_gradients(attend: Any, want: Any, *arrays: Any) -> None:
    """Of a scalar of the output and the log-sum-exp, both with a weight for each element."""

    def loss(attend: Any, *arrays: Any) -> Any:
        out, lse = attend(*arrays)
        weigh = lambda x: jnp.sum(jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x)  # noqa: E731
        return weigh(out) + weigh(lse)

    run = [
        jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=tuple(range(len(arrays)))))
        for f in (attend, want)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), run[0](*arrays), run[1](*arrays))


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_an_axis_of_vmap_within_a_shard_map_gives_the_local_result() -> None:
    # The natural way to a partial result, to be merged by the caller.
    spec = P(None, "sp")
    call = functools.partial(ringjax.ring_attention, axis_name="one", return_residual=True)

    def local(*arrays: Any) -> Any:
        out, lse = jax.vmap(lambda _: call(*arrays), axis_name="one", axis_size=1, in_axes=None)(None)
        return out[0], lse[0]

    attend = jax.shard_map(local, mesh=cases.mesh_of(2), in_specs=(spec,) * 3, out_specs=(spec, spec))

    def want(*arrays: Any) -> Any:
        halves = [dense_lse(*(x[:, half] for x in arrays)) for half in (np.s_[:4], np.s_[4:])]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *halves)

    assert_same_gradients(attend, want, *(normal(2, 8, 2, 4, seed=seed) for seed in range(3)))


def test_a_query_that_all_ranks_share() -> None:
    # As the docstring says: the mean over the ranks is typed as the same on each, and its gradients are right.
    spec = P(None, "sp")

    def local(*arrays: Any) -> Any:
        return jax.lax.pmean(ringjax.ring_attention(*arrays, return_residual=True), "sp")

    attend = jax.shard_map(local, mesh=cases.mesh_of(2), in_specs=(P(), spec, spec), out_specs=(P(), P()))
    arrays = (normal(2, 3, 2, 4), normal(2, 8, 2, 4, seed=1), normal(2, 8, 2, 4, seed=2))
    assert_same_gradients(attend, dense_lse, *arrays)


def test_an_exported_batch_of_any_size_on_one_device() -> None:
    (batch,) = jax.export.symbolic_shape("b")

    def attend(x: Any) -> Any:
        stacked = jnp.moveaxis(x.reshape(x.shape[0], 2, 4, 2, 4), 1, 0)
        return jax.vmap(lambda y: ringjax.ring_attention(y, y, y, is_causal=True), axis_name="sp")(stacked)

    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x)))))
    exported = jax.export.export(gradient)(jax.ShapeDtypeStruct((batch, 8, 2, 4), jnp.float32))
    x = normal(3, 8, 2, 4)
    np.testing.assert_allclose(exported.call(x), gradient(x), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------- looking for NaN and Inf


def ring_with_a_query_alone(x: Any) -> Any:
    lengths = jnp.array([0], jnp.int32)
    return ringjax.ring_attention(x, x, x, key_value_seq_lengths=lengths, mesh=cases.mesh_of(1), return_residual=True)


def test_debug_infs_reports_the_log_sum_exp_of_a_query_without_keys() -> None:
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        ring_with_a_query_alone(normal(1, 4, 1, 4))


def test_debug_nans_finds_none_in_a_query_without_keys() -> None:
    def loss(x: Any) -> Any:
        out, lse = ring_with_a_query_alone(x)
        out, lse = ringjax.merge_partials([(out, lse), (jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))])
        return jnp.sum(out) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse))

    with jax.debug_nans(True):
        np.testing.assert_array_equal(jax.grad(loss)(normal(1, 4, 1, 4)), 0.0)


KEEP = jax.checkpoint_policies.save_only_these_names("ring_out", "ring_lse")


def inside_call(query: Any, key: Any, value: Any, sinks: Any, masks: Any) -> Any:
    """The same ring as ring_attend(causal), but in a shard_map of the caller."""
    spec = P(None, "sp")
    local = lambda q, k, v: ringjax.ring_attention(  # noqa: E731
        q, k, v, layout="zigzag", **options_of(cases.BY_NAME["causal_gqa"])
    )
    del sinks, masks  # This case has none.
    return jax.shard_map(local, mesh=cases.mesh_of(4), in_specs=(spec,) * 3, out_specs=(spec, spec))(query, key, value)


WEIGHTS = {"query": 1.5, "key": 0.5, "value": 2.0}


def block(attend: Any, arrays: Any) -> Any:
    """Something to recompute on either side of the ring."""
    q, k, v = (jnp.sin(weight * arrays[name]) for name, weight in WEIGHTS.items())
    out, lse = attend(q, k, v, None, {})
    return jnp.sum(jnp.cos(out)) + jnp.sum(jnp.sin(lse))


def arrays_of_block() -> dict[str, Any]:
    arrays = cases.make_inputs(cases.BY_NAME["causal_gqa"]).arrays
    return {name: arrays[name] for name in WEIGHTS}


@functools.cache  # the same inside and outside
def not_rematerialized() -> Any:
    attend = ring_attend(cases.BY_NAME["causal_gqa"])
    return jax.jit(jax.value_and_grad(functools.partial(block, attend)))(arrays_of_block())


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize(("policy", "rings"), [(KEEP, 1), (None, 2)], ids=["keep", "nothing"])
def test_checkpoint_names_spare_the_second_ring(where: str, policy: Any, rings: int) -> None:
    attend = inside_call if where == "inside" else ring_attend(cases.BY_NAME["causal_gqa"])
    kept = jax.value_and_grad(jax.checkpoint(functools.partial(block, attend), policy=policy))
    arrays = arrays_of_block()
    # Each ring rotates K and V C - 1 times, backward too; that is where dK and dV travel, C times each.
    permutes = jaxprs.float_permutes(jax.make_jaxpr(kept)(arrays))
    assert sum(permutes.values()) == 2 * 3 * (rings + 1) + 2 * 4
    if policy is KEEP:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
            jax.jit(kept)(arrays),
            not_rematerialized(),
        )


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat: bool) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 32, 16)).astype(np.float32)
    weights = rng.standard_normal((3, 3, 16, 16)).astype(np.float32) / 6  # layer; query, key, value
    heads = lambda y: y.reshape(2, 32, 4, 4)  # noqa: E731

    def layer(attend: Any, x: Any, w: Any) -> Any:
        q, k, v = (heads(jnp.einsum("btd,de->bte", x, w[i])) for i in range(3))
        return x + attend(q, k, v).reshape(x.shape), None

    def scanned(x: Any, weights: Any) -> Any:
        attend = functools.partial(ringjax.ring_attention, is_causal=True, mesh=cases.mesh_of(4), config=CONFIG)
        body = functools.partial(layer, attend)
        body = jax.checkpoint(body, policy=KEEP) if remat else body
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, weights)[0]))

    def looped(x: Any, weights: Any) -> Any:
        dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        for w in weights:
            x, _ = layer(dense, x, w)
        return jnp.sum(jnp.sin(x))

    gradients = [jax.jit(jax.grad(f, argnums=(0, 1)))(x, weights) for f in (scanned, looped)]
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_drop_in_for_jax_nn() -> None:
    # The promise of the names: replace one call by the other and nothing else.
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 31, n, 8)), jnp.float32) for n in (4, 2, 2))
    lengths = jnp.array([31, 17], jnp.int32)
    for options in (
        {"is_causal": True, "scale": 0.3},
        {"local_window_size": (5, 2)},
        {"local_window_size": 4, "is_causal": True, "key_value_seq_lengths": lengths},
    ):
        want = jax.nn.dot_product_attention(q, k, v, **options)
        with jax.set_mesh(cases.mesh_of(4)):
            got = ringjax.ring_attention(q, k, v, **options)
        # A query that sees no key is 0 here; there it is what softmax makes of equal logits.
        live = np.s_[:, :17] if "key_value_seq_lengths" in options else np.s_[:]
        np.testing.assert_allclose(got[live], want[live], atol=2e-6, err_msg=str(options))
