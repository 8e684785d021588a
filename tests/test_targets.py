"""shift_targets against the obvious: shift in natural order, then bring into ring order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ringjax
from ringjax.layout import as_layout

LAYOUTS: dict[str, Any] = {
    "contiguous": "contiguous", "zigzag": "zigzag", "striped": "striped", "stripes of 3": ringjax.Striped(3)
}  # fmt: skip
FILL = -7


def natural_targets(tokens: np.ndarray, segments: np.ndarray | None, lengths: np.ndarray | None) -> tuple[Any, Any]:
    """Token by token, from the definition."""
    targets, mask = np.full(tokens.shape, FILL, tokens.dtype), np.zeros(tokens.shape, bool)
    for row in np.ndindex(tokens.shape[:-1]):
        for i in range(tokens.shape[-1] - 1):
            same_document = segments is None or segments[row][i] == segments[row][i + 1]
            if same_document and (lengths is None or i + 1 < lengths[row]):
                targets[row][i], mask[row][i] = tokens[row][i + 1], True
    return targets, mask


def problem(shape: tuple[int, ...], what: str, dtype: Any = np.int32) -> dict[str, np.ndarray]:
    """Tokens, and what else the words of ``what`` name, in natural order. Documents end at shards' borders too."""
    draw = np.random.default_rng([*shape, len(what)])
    given = {"tokens": draw.integers(1, 100, shape).astype(dtype)}
    if "documents" in what:
        new = draw.random(shape) < 0.3
        given["segment_ids"] = np.cumsum(new, axis=-1).astype(np.int32)
    if "lengths" in what:
        given["seq_lengths"] = draw.integers(0, shape[-1] + 2, shape[:-1]).astype(np.int32)
    return given


def truth(given: dict[str, np.ndarray], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    targets, mask = natural_targets(given["tokens"], given.get("segment_ids"), given.get("seq_lengths"))
    return targets[..., order], mask[..., order]


def in_order(given: dict[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    return {name: x if name == "seq_lengths" else x[..., order] for name, x in given.items()}


def assert_same(result: tuple[Any, Any], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    targets, mask = result
    assert targets.dtype == wanted[0].dtype and mask.dtype == bool
    np.testing.assert_array_equal(targets, wanted[0])
    np.testing.assert_array_equal(mask, wanted[1])


def order_of(length: int, layout: Any, num_shards: int) -> np.ndarray:
    return np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_whole_numpy_arrays(layout: Any, num_shards: int) -> None:
    for length in (1, 2, 24, 47, 48):
        order = order_of(length, layout, num_shards)
        for shape in ((length,), (2, length), (2, 3, length)):
            for what in ("", "documents", "lengths", "documents and lengths"):
                given = problem(shape, what)
                result = ringjax.shift_targets(
                    **in_order(given, order), layout=layout, num_shards=num_shards, fill=FILL
                )
                assert all(isinstance(x, np.ndarray) for x in result)
                assert_same(result, truth(given, order))


@pytest.mark.parametrize("length", [46, 48])
def test_whole_arrays_on_a_mesh_under_jit(length: int) -> None:
    """Sharded by the partitioner, and on Explicit axes, where the types say how."""
    order, given = order_of(length, "zigzag", 8), problem((2, length), "documents and lengths")
    dealt = in_order(given, order)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("sp",), axis_types=(kind,))
        spec = PartitionSpec(None, "sp" if length % 8 == 0 else None)
        with jax.set_mesh(mesh):
            arrays = {
                name: jax.device_put(x, NamedSharding(mesh, PartitionSpec() if name == "seq_lengths" else spec))
                for name, x in dealt.items()
            }
            run = jax.jit(lambda given: ringjax.shift_targets(**given, layout="zigzag", num_shards=8, fill=FILL))
            assert_same(run(arrays), truth(given, order))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_integers_keep_their_type(dtype: Any) -> None:
    tokens = np.array([[3, 1, 4, 1]], dtype)
    targets, mask = ringjax.shift_targets(tokens, num_shards=2)
    assert (
        targets.dtype == dtype and targets.tolist() == [[1, 4, 1, 0]] and mask.tolist() == [[True, True, True, False]]
    )


def mesh_of(sizes: tuple[int, ...], axes: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), axes)


def on_shards(axes: tuple[str, ...], layout: Any, given: dict[str, np.ndarray], **options: Any) -> Any:
    """The program on shards over these axes: of a dictionary of whole arrays in ring order."""
    rows = given["tokens"].ndim - 1
    shard = PartitionSpec(*(None,) * rows, axes)
    specs = {name: PartitionSpec() if name == "seq_lengths" else shard for name in given}

    def local(given: dict[str, Any]) -> Any:
        return ringjax.shift_targets(**given, layout=layout, axis_name=axes, fill=FILL, **options)

    return jax.shard_map(local, in_specs=(specs,), out_specs=(shard, shard))  # check_vma is on


@pytest.mark.parametrize("sizes", [(1,), (2,), (8,), (3, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shards(layout: Any, sizes: tuple[int, ...]) -> None:
    num_shards, axes = int(np.prod(sizes)), ("a", "b", "c")[: len(sizes)]
    length = as_layout(layout).unit(num_shards) * (2 if layout == LAYOUTS["stripes of 3"] else 4)
    order = order_of(length, layout, num_shards)
    shape, what = ((2, length), "documents and lengths") if len(sizes) != 2 else ((length,), "")
    given = problem(shape, what)
    with jax.set_mesh(mesh_of(sizes, axes)):
        result = jax.jit(on_shards(axes, layout, given))(in_order(given, order))
    assert_same(result, truth(given, order))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shards_of_one_run(layout: Any) -> None:
    """The shortest shards that there are: every next token lies elsewhere."""
    length = as_layout(layout).unit(4)
    order, given = order_of(length, layout, 4), problem((1, length), "documents")
    with jax.set_mesh(mesh_of((4,), ("sp",))):
        result = jax.jit(on_shards(("sp",), layout, given))(in_order(given, order))
    assert_same(result, truth(given, order))


def test_an_axis_of_vmap() -> None:
    order, given = order_of(24, "zigzag", 3), problem((2, 24), "documents")
    stacked = {name: x[:, order].reshape(2, 3, 8).swapaxes(0, 1) for name, x in given.items()}
    run = jax.vmap(lambda given: ringjax.shift_targets(**given, layout="zigzag", fill=FILL), axis_name="sp")
    result = [np.asarray(x).swapaxes(0, 1).reshape(2, 24) for x in jax.jit(run)(stacked)]
    assert_same((result[0], result[1]), truth(given, order))


def test_whole_arrays_in_a_shard_map_over_another_axis() -> None:
    order, given = order_of(10, "zigzag", 4), problem((2, 10), "")
    run = jax.shard_map(
        lambda tokens: ringjax.shift_targets(tokens, layout="zigzag", num_shards=4, fill=FILL),
        mesh=mesh_of((2,), ("data",)), in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"),
    )  # fmt: skip
    assert_same(jax.jit(run)(given["tokens"][:, order]), truth(given, order))


def test_tokens_that_are_the_same_on_every_rank() -> None:
    """Typed as varying over no axis; what follows them differs by rank all the same."""
    run = jax.shard_map(
        lambda tokens: ringjax.shift_targets(tokens, fill=FILL),
        mesh=mesh_of((2,), ("sp",)), in_specs=PartitionSpec(), out_specs=PartitionSpec("sp"),
    )  # fmt: skip
    targets, mask = jax.jit(run)(np.array([5, 6], np.int32))
    assert targets.tolist() == [6, 5, 6, FILL] and mask.tolist() == [True, True, True, False]


# By layout: how far the heads of runs go, and how many of a shard's 24 tokens they are. A step along two axes is two.
SENT = {
    ("contiguous", (8,)): (1, 1),  # the next rank's
    ("zigzag", (8,)): (2, 2),  # the next and the previous one's
    ("striped", (8,)): (1, 24),
    ("stripes of 3", (8,)): (1, 8),
    ("contiguous", (2, 4)): (2, 1),  # the next rank on the inner axis; of the last one, the next on the outer too
    ("zigzag", (2, 4)): (4, 2),
    ("zigzag", (1, 4)): (2, 2),  # nothing goes along an axis of one device
}


@pytest.mark.parametrize(("layout", "sizes"), SENT, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_only_the_first_token_of_each_run_travels(layout: str, sizes: tuple[int, ...], documents: bool) -> None:
    num_shards, axes = int(np.prod(sizes)), ("a", "b")[: len(sizes)]
    given = problem((2, 24 * num_shards), "documents" if documents else "")
    with jax.set_mesh(mesh_of(sizes, axes)):
        sent = jaxprs.collectives(jax.make_jaxpr(on_shards(axes, LAYOUTS[layout], given))(given))
    permutes, heads = SENT[layout, sizes]
    assert [x.shape for x in sent] == [(2, heads)] * permutes * (2 if documents else 1)
    assert all(x.primitive.startswith("ppermute") for x in sent)


TOKENS = np.arange(8, dtype=np.int32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tokens": TOKENS.astype(np.float32)}, r"tokens must have an integer dtype\. Got float32\."),
        ({"tokens": np.int32(3)}, r"tokens must have shape \[\.\.\., T\], at least one token\. Got \(\)\."),
        ({"tokens": TOKENS[:0]}, r"tokens must have shape \[\.\.\., T\], at least one token\. Got \(0,\)\."),
        ({"num_shards": None}, r"num_shards must be a positive integer outside shard_map .*'sp'.*\. Got None\."),
        ({"num_shards": 0}, r"num_shards must be a positive integer outside shard_map .*\. Got 0\."),
        ({"num_shards": True}, r"num_shards must be a positive integer outside shard_map .*\. Got True\."),
        ({"layout": "spiral"}, r"layout must be one of .*\. Got 'spiral'\."),
        ({"axis_name": 3}, r"axis_name must be the name of a mesh axis.*\. Got 3\."),
        ({"segment_ids": TOKENS[:4]}, r"segment_ids must have the shape of tokens, \(8,\)\. Got \(4,\)\."),
        ({"segment_ids": TOKENS * 1.0}, r"segment_ids must have an integer dtype\. Got float64\."),
        ({"seq_lengths": TOKENS}, r"seq_lengths must have the shape of tokens but for T, \(\)\. Got \(8,\)\."),
        ({"seq_lengths": 2.5}, r"seq_lengths must have an integer dtype\. Got float64\."),
        ({"fill": 0.5}, r"fill must be an integer that int32 holds\. Got 0\.5\."),
        ({"fill": True}, r"fill must be an integer that int32 holds\. Got True\."),
        ({"fill": -1, "tokens": TOKENS.astype(np.uint16)}, r"fill must be an integer that uint16 holds\. Got -1\."),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ringjax.shift_targets(**{"tokens": TOKENS, "num_shards": 2, **arguments})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_shards": 4}, r"num_shards must be None or 2, the devices on axis 'sp', .*\. Got 4\."),
        ({"layout": ringjax.Striped(3)}, r"tokens: the length of a shard must be a multiple of 3 for .*\. Got 4\."),
        ({"axis_name": ("sp", "tp")}, r"axis_name: either all of its axes must be manual here .*\('sp', 'tp'\)"),
    ],
)
def test_wrong_arguments_inside_are_named(options: dict[str, Any], said: str) -> None:
    run = jax.vmap(lambda tokens: ringjax.shift_targets(tokens, **options), axis_name="sp")
    with pytest.raises(ValueError, match=said):
        run(jnp.reshape(TOKENS, (2, 4)))


def test_the_same_options_serve_inside_and_outside() -> None:
    ring = {"layout": "zigzag", "num_shards": 2}
    run = jax.vmap(lambda tokens: ringjax.shift_targets(tokens, **ring), axis_name="sp")
    inside = jax.jit(run)(TOKENS.reshape(2, 4))
    outside = ringjax.shift_targets(TOKENS, **ring)
    assert [x.reshape(8).tolist() for x in inside] == [x.tolist() for x in outside]
