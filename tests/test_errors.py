"""Every mistake of the caller is refused, naming the argument, what is required and what was given."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax import RingConfig, _compat
from ringjax.kernels.choose import Target, choose, is_hopper


def call(query: Any = (2, 16, 4, 8), key: Any = (2, 16, 2, 8), value: Any = (2, 16, 2, 8), **options: Any) -> Any:
    """ring_attention on arrays, or on zeros of these shapes, over a ring of four."""
    as_array = lambda x: jnp.zeros(x, jnp.float32) if isinstance(x, tuple) else x  # noqa: E731
    options = {"mesh": cases.mesh_of(4), **options}
    return ringjax.ring_attention(as_array(query), as_array(key), as_array(value), **options)


def of(dtype: Any, *shape: int) -> jax.Array:
    return jnp.zeros(shape, dtype)


def test_the_call_that_all_mistakes_are_made_in_is_right() -> None:
    assert call().shape == (2, 16, 4, 8)


# id: (arguments, pattern). Every pattern holds the argument, the requirement and what was given, in this order.
OUTSIDE: dict[str, tuple[dict[str, Any], str]] = {
    "rank of query": ({"query": (2, 16, 8)}, r"query .*rank 4.*\(2, 16, 8\)"),
    "rank of key": ({"key": (2, 16, 2, 8, 1)}, r"key .*rank 4.*\(2, 16, 2, 8, 1\)"),
    "rank of value": ({"value": (16, 8)}, r"value .*rank 4.*\(16, 8\)"),
    "empty": ({"query": (2, 0, 4, 8)}, r"query .*not be empty.*\(2, 0, 4, 8\)"),
    "not an array": ({"query": object()}, "query must be an array.*object"),
    "heads do not divide": ({"query": (2, 16, 3, 8)}, r"query.*multiple.*N = 3, K = 2"),
    "more kv heads": ({"query": (2, 16, 1, 8)}, r"query.*multiple.*N = 1, K = 2"),
    "batch of query": ({"query": (1, 16, 4, 8)}, r"query.*one batch size.*\(1, 16, 4, 8\)"),
    "batch of value": ({"value": (3, 16, 2, 8)}, r"value.*one batch size.*\(3, 16, 2, 8\)"),
    "length of value": ({"value": (2, 12, 2, 8)}, r"key and value.*one length.*\(2, 12, 2, 8\)"),
    "heads of value": ({"value": (2, 16, 4, 8)}, r"key and value.*number of heads.*\(2, 16, 4, 8\)"),
    "head size of key": ({"key": (2, 16, 2, 4)}, r"query and key.*one head size.*\(2, 16, 2, 4\)"),
    "dtype of key": (
        {"key": of(jnp.bfloat16, 2, 16, 2, 8)},
        "query, key and value .*one dtype.*key bfloat16",
    ),
    "dtype of value": (
        {"value": of(jnp.float16, 2, 16, 2, 8)},
        "query, key and value .*one dtype.*value float16",
    ),
    "integers": ({"query": of(jnp.int32, 2, 16, 4, 8)}, "query must have a dtype.*float32.*int32"),
    "axis unknown": ({"axis_name": "seq"}, "axis 'seq'.*Got axes 'sp'"),
    "axis not a name": ({"axis_name": 3}, "axis_name must be the name.* 3"),
    "mesh not a mesh": ({"mesh": 4}, "mesh must be a .*Mesh.*int"),
    "batch axis unknown": ({"batch_axis_name": "data"}, "batch_axis_name must name.*'data'"),
    "batch axis is the ring": ({"batch_axis_name": "sp"}, "batch_axis_name must .*other.*'sp'"),
    "head axis unknown": ({"head_axis_name": "tp"}, "head_axis_name must name.*'tp'"),
    "negative window": ({"local_window_size": -1}, "local_window_size must be.*non-negative.* -1"),
    "negative side": ({"local_window_size": (3, -2)}, r"local_window_size .*non-neg.*\(3, -2\)"),
    "window of three": ({"local_window_size": (1, 2, 3)}, r"local_window_size .*pair.*\(1, 2, 3\)"),
    "window not whole": ({"local_window_size": 2.5}, "local_window_size .*integer.* 2.5"),
    "causal not a bool": ({"is_causal": "yes"}, "is_causal must be True or False.*'yes'"),
    "float segments": (
        {"segment_ids": of(jnp.float32, 2, 16)},
        "segment_ids must have an integer dtype.*float32",
    ),
    "bool segments": ({"segment_ids": of(bool, 2, 16)}, "segment_ids must .*integer dtype.*bool"),
    "shape of segments": (
        {"segment_ids": of(jnp.int32, 16)},
        r"segment_ids must have shape.*\(2, 16\).*Got.*\(16,\)",
    ),
    "shape of key segments": (
        {"segment_ids": (of(jnp.int32, 2, 16), of(jnp.int32, 2, 12))},
        r"segment_ids \(key\) must have shape.*\(2, 16\).*Got \(2, 12\)",
    ),
    "three segments": (
        {"segment_ids": (of(jnp.int32, 2, 16),) * 3},
        "segment_ids must be one array or a pair.*3",
    ),
    "one segments for two lengths": (
        {"query": (2, 12, 4, 8), "segment_ids": of(jnp.int32, 2, 12)},
        "segment_ids must be a pair.*T = 12, S = 16",
    ),
    "float positions": (
        {"positions": of(jnp.float32, 16), "is_causal": True},
        "positions must have an integer dtype.*float32",
    ),
    "shape of positions": (
        {"positions": of(jnp.int32, 15), "is_causal": True},
        r"positions must have shape.*\(16,\).*Got \(15,\)",
    ),
    "batch of positions": (
        {"positions": (of(jnp.int32, 16), of(jnp.int32, 3, 16)), "is_causal": True},
        r"positions \(key\) must have shape.*\(2, 16\).*Got \(3, 16\)",
    ),
    "shape of sinks": ({"sinks": of(jnp.float32, 2)}, r"sinks must be .*\[N\].*4.*Got.*\(2,\)"),
    "rank of sinks": ({"sinks": of(jnp.float32, 4, 1)}, r"sinks must be .*\[N\].*Got.*\(4, 1\)"),
    "integer sinks": ({"sinks": of(jnp.int32, 4)}, "sinks must be .*floating-point.*int32"),
    "shape of lengths": (
        {"key_value_seq_lengths": of(jnp.int32, 3)},
        r"key_value_seq_lengths must have shape.*\(2,\).*Got \(3,\)",
    ),
    "float lengths": (
        {"query_seq_lengths": of(jnp.float32, 2)},
        "query_seq_lengths must have an integer dtype.*float32",
    ),
    "layout": ({"layout": "spiral"}, "layout must be one of.*'contiguous'.*'zigzag'.*'spiral'"),
    "soft cap": ({"logits_soft_cap": 0.0}, "logits_soft_cap must be a positive number.* 0.0"),
    "scale": ({"scale": float("nan")}, "scale must be a finite number.*nan"),
    "residual": ({"return_residual": 1}, "return_residual must be True or False.* 1"),
    "config": ({"config": {"block_q": 8}}, "config must be a RingConfig.*dict"),
}


@pytest.mark.parametrize("mistake", OUTSIDE)
def test_outside(mistake: str) -> None:
    arguments, words = OUTSIDE[mistake]
    with pytest.raises(ValueError, match=words):
        call(**arguments)


def test_batch_and_heads_that_their_axes_do_not_divide() -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "sp", "tp"), (jax.sharding.AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match="query.*batch size.*multiple of 2.*'data'.*Got 3"):
        shapes = [(3, 16, 4, 8), (3, 16, 2, 8), (3, 16, 2, 8)]
        call(*shapes, mesh=mesh, batch_axis_name="data")
    with pytest.raises(ValueError, match="heads.*multiples of 2.*'tp'.*N = 3, K = 3"):
        shapes = [(2, 16, 3, 8)] * 3
        call(*shapes, mesh=mesh, head_axis_name="tp")


@pytest.mark.parametrize("name", ["segment_ids", "positions"])
def test_integers_beyond_int32(name: str) -> None:
    # Cast in silence, 0 and 2**32 would be one and the same segment.
    wide = np.zeros((2, 16), np.int64)
    wide[:, 8:] = 2**32
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"{name} must fit int32.*4294967296"):
        call(is_causal=True, **{name: wide})


def test_no_mesh_anywhere() -> None:
    with pytest.raises(ValueError, match="axis_name 'sp' must be .*mesh.*Got no mesh"):
        call(mesh=None)


def test_a_context_mesh_without_the_axis() -> None:
    with jax.set_mesh(cases.mesh_of(4)):
        with pytest.raises(ValueError, match="axis_name.*must have an axis 'seq'.*Got axes 'sp'"):
            call(mesh=None, axis_name="seq")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis_name": ("outer", "sp")}, "mesh must have an axis 'outer'. Got axes 'sp'"),
        ({"axis_name": ("sp", "sp")}, r"axis_name must be .*several different ones.*\('sp', 'sp'\)"),
        ({"axis_name": ()}, r"axis_name must be the name of a mesh axis.*Got \(\)"),
        ({"config": RingConfig(strategy=("ring", "ring"))}, "config.strategy must be one word, or 1, .*'ring', 'ring'"),
        (
            {"query": (2, 16, 6, 8), "config": RingConfig(strategy="all_to_all")},
            "'all_to_all' over 'sp' needs a number of heads .* of 4.*N = 6",
        ),
    ],
)
def test_axes_and_their_strategies(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_some_axes_inside_and_some_outside() -> None:
    def inside(x: Any) -> Any:
        return ringjax.ring_attention(x, x, x, axis_name=("outer", "sp"))

    x = np.zeros((4, 1, 4, 2, 8), np.float32)
    with pytest.raises(ValueError, match="axis_name: either all of its axes must be manual.*of which 'sp' is"):
        jax.vmap(inside, axis_name="sp")(x)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pallas_tpu", "must be one that platform 'cpu' has. Got 'pallas_tpu', which runs on 'tpu'.*interpret=True"),
        ("pallas_gpu", "must be one that platform 'cpu' has. Got 'pallas_gpu', which runs on 'gpu'.$"),
        (
            "pallas_triton",
            "must be one that platform 'cpu' has. Got 'pallas_triton', which runs on 'gpu'.*interpret=True",
        ),
    ],
)
def test_an_implementation_that_this_platform_lacks(name: str, words: str) -> None:
    # A named implementation raises; it never falls back.
    with pytest.raises(ValueError, match=f"config.implementation {words}"):
        call(config=RingConfig(implementation=name))


def test_mosaic_cannot_be_interpreted() -> None:
    with pytest.raises(NotImplementedError, match="config.interpret: .* cannot run implementation 'pallas_gpu'"):
        call(config=RingConfig(implementation="pallas_gpu", interpret=True))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA B200", "AMD Instinct MI300X"])
def test_mosaic_on_a_gpu_that_is_no_hopper(kind: str) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=100)
    x = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.bfloat16)
    attend = lambda x: ringjax.ring_attention(x, x, x, config=RingConfig(implementation="pallas_gpu"))  # noqa: E731
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("sp",), abstract_device=device)):
        with pytest.raises(ValueError, match=f"'pallas_triton' or 'xla' on '{kind}'. Got 'pallas_gpu'"):
            jax.eval_shape(attend, x)


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA GH200 480GB", True),
        ("NVIDIA H100 PCIe", True), ("NVIDIA H20", True), ("NVIDIA H800", True),
        ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False), ("NVIDIA GB200", False), ("NVIDIA L40S", False),
        ("AMD Instinct MI300X", False), ("", False),
    ],
)  # fmt: skip
def test_which_gpus_are_hopper(kind: str, hopper: bool) -> None:
    assert is_hopper(Target(platform="gpu", device_kind=kind)) is hopper


H100, A100, L40S, T4 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA T4"


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "dtype", "head_size", "name"),
    [
        ("gpu", H100, "9.0", "bfloat16", 128, "pallas_gpu"),
        ("gpu", "NVIDIA H200", None, "float16", 256, "pallas_gpu"),
        ("gpu", H100, "9.0", "float32", 128, "pallas_triton"),
        ("gpu", H100, "9.0", "bfloat16", 288, "pallas_triton"),
        ("gpu", A100, "8.0", "bfloat16", 128, "pallas_triton"),
        ("gpu", L40S, None, "float32", 64, "pallas_triton"),
        ("gpu", T4, "7.5", "float16", 64, "xla"),
        ("gpu", "AMD Instinct MI300X", None, "bfloat16", 128, "xla"),
        ("gpu", H100, "9.0", "float64", 128, "xla"),
        ("tpu", "TPU v5p", None, "bfloat16", 128, "pallas_tpu"),
        ("cpu", "cpu", None, "bfloat16", 128, "xla"),
    ],
)
def test_what_runs_where_no_kernel_is_named(
    platform: str, kind: str, capability: str | None, dtype: str, head_size: int, name: str
) -> None:
    target = Target(platform=platform, device_kind=kind, capability=capability)
    assert choose(RingConfig(), target, dtype, head_size).name == name


@pytest.fixture
def nvjitlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if JAX 0.12 ran on a GPU, with the wheels of CUDA 13."""
    wheel = type("Distribution", (), {"name": "nvidia-nvjitlink"})
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [wheel])
    monkeypatch.setattr(
        "ringjax.kernels.choose.gpu_registers_are_ignored", _compat.gpu_registers_are_ignored.__wrapped__
    )


@pytest.mark.usefixtures("nvjitlink")
def test_where_registers_are_ignored_another_kernel_runs_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_backend() -> str:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    target = Target(platform="gpu", device_kind=H100, capability="9.0")
    with pytest.warns(UserWarning, match="slow with JAX 0.12"):
        assert choose(RingConfig(), target, "bfloat16", 128).name == "pallas_triton"
    with pytest.warns(UserWarning, match="JAX 0.11 gives the full speed"):
        assert choose(RingConfig(implementation="pallas_gpu"), target, "bfloat16", 128).name == "pallas_gpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(RingConfig(), target, "float32", 128).name == "pallas_triton"
        monkeypatch.setattr(jax, "default_backend", no_backend)
        assert choose(RingConfig(), target, "bfloat16", 128).name == "pallas_gpu"
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
        assert choose(RingConfig(), target, "bfloat16", 128).name == "pallas_gpu"


@pytest.mark.usefixtures("nvjitlink")
@pytest.mark.parametrize("loads", [False, True])
def test_without_wheels_the_library_itself_is_looked_for(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    def library(name: str) -> None:
        if not loads or name != "libnvJitLink.so.13":
            raise OSError(name)

    monkeypatch.setattr("importlib.metadata.distributions", list)
    monkeypatch.setattr("ctypes.CDLL", library)
    target = Target(platform="gpu", device_kind=H100, capability="9.0")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert choose(RingConfig(), target, "bfloat16", 128).name == ("pallas_triton" if loads else "pallas_gpu")
    assert len(said) == loads


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("implementation", "cuda", "implementation must be one of.*'xla'.*'cuda'"),
        ("strategy", "ulysses", "strategy must be one of 'ring', 'all_to_all', 'all_gather', 'auto'. Got 'ulysses'"),
        ("strategy", ("ring", 1), "strategy must be one of 'ring', .*Got 1"),
        ("strategy", ("ring", "auto"), "strategy must be one of 'ring', .*Got 'auto'"),
        ("strategy", (), r"strategy must be one of 'ring', .*Got \(\)"),
        ("direction", "sideways", "direction must be one of.*'forward'.*'sideways'"),
        ("dkv_dtype", "int8", "dkv_dtype must be one of.*'float32'.*'int8'"),
        ("block_q", 0, "block_q must be a positive integer.* 0"),
        ("block_kv", 2.0, "block_kv must be a positive integer.* 2.0"),
        ("unroll", -1, "unroll must be a positive integer.* -1"),
        ("block_q", True, "block_q must be a positive integer.*True"),
        ("interpret", "yes", "interpret must be one of False, True. Got 'yes'"),
        ("deterministic", 2, "deterministic must be one of False, True. Got 2"),
    ],
)
def test_config(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RingConfig(**{field: value})


# ------------------------------------------------------------------------------------------- inside shard_map


def inside(attend: Callable[..., Any], *shapes: tuple[int, ...], mesh: Any = None, **kind: Any) -> None:
    """Traces `attend(query, key, value)` on local shards of these global shapes."""
    mesh = mesh or cases.mesh_of(4)
    spec = P(None, "sp")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, **kind)
    jax.eval_shape(mapped, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


SHAPES = ((2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8))


def test_inside_is_right() -> None:
    inside(ringjax.ring_attention, *SHAPES)


def test_inside_unknown_axis() -> None:
    with pytest.raises(ValueError, match="axis_name must be .*'sp'.*Got 'ring'"):
        inside(functools.partial(ringjax.ring_attention, axis_name="ring"), *SHAPES)


def test_inside_axis_that_is_not_manual() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "sp"), (jax.sharding.AxisType.Auto,) * 2)
    attend = functools.partial(ringjax.ring_attention, axis_name="data")
    with pytest.raises(ValueError, match="axis_name must be a manual axis.*'sp'.*Got 'data'"):
        inside(attend, *SHAPES, mesh=mesh, axis_names={"sp"})


@pytest.mark.parametrize("give_mesh", [True, False])
def test_a_ring_within_a_shard_map_over_another_axis(give_mesh: bool) -> None:
    # JAX runs it, but fails in its own words on the gradient.
    mesh = jax.make_mesh((2, 4), ("data", "sp"), (jax.sharding.AxisType.Auto,) * 2)

    def attend(query: Any, key: Any, value: Any) -> Any:
        # JAX takes the mesh of the context here, and no other.
        here = jax.sharding.get_abstract_mesh() if give_mesh else None
        return ringjax.ring_attention(query, key, value, mesh=here)

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"), axis_names={"data"})
    with pytest.raises(ValueError, match="axis_name must be a manual axis.*'data'.*one shard_map over all.*Got 'sp'"):
        jax.eval_shape(mapped, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES))


@pytest.mark.parametrize("name", ["batch_axis_name", "head_axis_name"])
def test_inside_batch_or_head_axis(name: str) -> None:
    attend = functools.partial(ringjax.ring_attention, **{name: "data"})
    with pytest.raises(ValueError, match=f"{name} must be None.*'sp'.*shard_map.*Got 'data'"):
        inside(attend, *SHAPES)


def test_inside_mesh() -> None:
    attend = functools.partial(ringjax.ring_attention, mesh=cases.mesh_of(4))
    with pytest.raises(ValueError, match="mesh must be None.*'sp'.*shard_map.*Got"):
        inside(attend, *SHAPES)


@pytest.mark.parametrize(
    ("layout", "unit", "query", "key", "culprit"),
    [
        ("zigzag", 2, 12, 16, "query.*Got 3"),
        ("zigzag", 2, 16, 12, "key.*Got 3"),
        (ringjax.Striped(stripe=3), 3, 16, 24, "query.*Got 4"),
    ],
)
def test_inside_length_that_the_layout_cannot_hold(layout: Any, unit: int, query: int, key: int, culprit: str) -> None:
    attend = functools.partial(ringjax.ring_attention, layout=layout)
    name, given = culprit.split(".*")
    with pytest.raises(ValueError, match=f"{name}: .*shard must be a multiple of {unit}.*{given}"):
        inside(attend, (2, query, 4, 8), (2, key, 2, 8), (2, key, 2, 8))


def test_inside_global_positions() -> None:
    # The classic slip inside shard_map: a whole-sequence array beside local shards.
    attend = functools.partial(ringjax.ring_attention, is_causal=True, positions=np.arange(16, dtype=np.int32))
    with pytest.raises(ValueError, match=r"positions must have shape.*\(4,\).*Got \(16,\)"):
        inside(attend, *SHAPES)


def test_traced_scale() -> None:
    scaled = jax.jit(lambda s: call(scale=s))
    with pytest.raises(ValueError, match="scale must be .*known at trace time"):
        scaled(0.5)


# ---------------------------------------------------------------------------------------------- arrays on no device


ABSTRACT = jax.sharding.AbstractMesh((4,), ("sp",), (jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("where", ["argument", "context"])
@pytest.mark.parametrize("kind", ["numpy", "uncommitted", "one device", "gradient"])
def test_an_abstract_mesh_with_arrays_on_none_of_its_devices(kind: str, where: str) -> None:
    arrays = [np.zeros(shape, np.float32) for shape in SHAPES]
    if kind != "numpy":
        arrays = [jax.device_put(x, jax.devices()[0] if kind == "one device" else None) for x in arrays]
    mesh = ABSTRACT if where == "argument" else None
    attend = lambda q, k, v: ringjax.ring_attention(q, k, v, mesh=mesh).sum()  # noqa: E731
    attend = jax.grad(attend) if kind == "gradient" else attend
    with jax.sharding.use_abstract_mesh(ABSTRACT if where == "context" else jax.sharding.AbstractMesh((), ())):
        with pytest.raises(ValueError, match="mesh: with an AbstractMesh the arrays must be placed.*4 devices.*Got"):
            attend(*arrays)


def test_an_abstract_mesh_with_arrays_on_its_devices_is_right() -> None:
    sharding = jax.sharding.NamedSharding(cases.mesh_of(4), P(None, "sp"))
    placed = [jax.device_put(np.ones(shape, np.float32), sharding) for shape in SHAPES]
    np.testing.assert_allclose(ringjax.ring_attention(*placed, mesh=ABSTRACT), 1.0, rtol=1e-6)


def test_an_abstract_mesh_with_nothing_but_shapes_is_right() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in SHAPES]
    attend = jax.jit(lambda q, k, v: ringjax.ring_attention(q, k, v, mesh=ABSTRACT))
    assert attend.lower(*shapes).out_info.shape == SHAPES[0]


# ------------------------------------------------------------------------------------------------ symbolic sizes


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_symbolic_size_over_several_devices(where: str) -> None:
    # Exported, it would kill the process that calls it.
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *shape[1:]), jnp.float32) for shape in SHAPES]
    attend = functools.partial(ringjax.ring_attention, mesh=cases.mesh_of(4) if where == "outside" else None)
    if where == "inside":
        spec = P(None, "sp")
        attend = jax.shard_map(attend, mesh=cases.mesh_of(4), in_specs=(spec,) * 3, out_specs=spec)
    with pytest.raises(NotImplementedError, match=r"query: the sizes must be known.*jax.export.*Got shape \(b,"):
        jax.export.export(jax.jit(attend))(*shapes)
