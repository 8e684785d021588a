"""Tables of tiles: what is looked up, what a broken one does, that the kernels use it, how it is written."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_mosaic_forward as mosaic_cases
import test_triton as triton_cases
from tables import CAUSAL, FULL, KIND, MOSAIC, TRITON, entry, key, mosaic_tiles, no_table, triton_tiles

import ringjax
from ringjax.kernels import tiles as tile_table
from ringjax.kernels.mosaic import forward as mosaic_forward
from ringjax.kernels.mosaic import kernel as mosaic
from ringjax.kernels.tiles import FORMAT
from ringjax.tune import space
from ringjax.tune.space import Problem

# ------------------------------------------------------------------------------------------------------ looking up


def test_the_table_goes_before_the_built_in_tiles_and_after_the_configuration(table: Path):
    fixed = mosaic_tiles(block_q=128), triton_tiles("dq", block_kv=16)
    built_in = mosaic_tiles(whole=False), triton_tiles("dq", 64), triton_tiles("dq", dtype=jnp.float32)
    tile_table.merge(table, {key("pallas_gpu", "forward"): entry(MOSAIC), key("pallas_triton", "dq"): entry(TRITON)})
    assert mosaic_tiles() == mosaic_tiles(size=100) == MOSAIC
    assert triton_tiles("dq") == triton_tiles("dq", dtype=jnp.float16) == TRITON
    assert (mosaic_tiles(block_q=128), triton_tiles("dq", block_kv=16)) == fixed
    assert (mosaic_tiles(whole=False), triton_tiles("dq", 64), triton_tiles("dq", dtype=jnp.float32)) == built_in
    assert mosaic_tiles(mask=CAUSAL) != MOSAIC
    with no_table():
        assert mosaic_tiles() != MOSAIC


def test_every_way_of_calling_has_a_key_of_its_own(table: Path):
    ways = [
        ("forward", FULL, True),
        ("forward, masked", CAUSAL, True),
        ("forward, carry", FULL, False),
        ("forward, carry, masked", CAUSAL, False),
    ]
    assert tuple(name for name, *_ in ways) == space.KERNELS["pallas_gpu", "forward"]
    entries = {key("pallas_gpu", name): entry(MOSAIC, group_heads=n + 1) for n, (name, *_) in enumerate(ways)}
    tile_table.merge(table, entries)
    assert [mosaic_tiles(mask=mask, whole=whole).group_heads for _, mask, whole in ways] == [1, 2, 3, 4]


def test_a_file_has_tiles_for_a_gpu_an_implementation_and_a_dtype(table: Path, monkeypatch: pytest.MonkeyPatch):
    tile_table.merge(table, {key("pallas_gpu", "forward, carry", 64): entry(MOSAIC)})
    given = (KIND, "pallas_gpu", jnp.dtype("bfloat16"))
    assert tile_table.file_with_tiles(*given) == table
    for place, other in enumerate(("NVIDIA H200", "pallas_triton", jnp.dtype("float32"))):
        assert tile_table.file_with_tiles(*given[:place], other, *given[place + 1 :]) is None
    table.write_text("broken", encoding="utf-8")
    tile_table.forget()
    with pytest.warns(UserWarning, match=r"must be JSON.* The built-in tiles are used"):
        assert tile_table.file_with_tiles(*given) is None
    monkeypatch.setenv(tile_table.VARIABLE, "")
    assert tile_table.file_with_tiles(*given) is None


def test_the_table_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tile_table.VARIABLE, "")
    assert tile_table.path() is None
    monkeypatch.delenv(tile_table.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tile_table.path() == tmp_path / "ringjax" / "tiles.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tile_table.path() == tmp_path / ".config" / "ringjax" / "tiles.json"
    assert triton_tiles("dq") != TRITON, "no file, no warning"


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"format": 1, "tiles"', "must be JSON"),
    "no text": (b"\xff\xfe\x00", "decode"),
    "other JSON": ([1], "must be a table of `ringjax tune`"),
    "another format": ({"format": FORMAT + 1, "tiles": {}}, f"format must be {FORMAT}.* Got {FORMAT + 1}"),
    "no tiles": ({"format": FORMAT}, "tiles must be an object. Got NoneType"),
    "missing": (None, "RINGJAX_TILES must name a file.*no such file"),
    "no entry": (3, "must be an object with tiles"),
    "unknown field": (entry(MOSAIC, clusters=2), "clusters is not known to this version"),
    "missing field": ({"tiles": {"compute": 2}}, "block_kv is missing"),
    "wrong type": (entry(MOSAIC, stages="3"), r"stages must be of the type of \d. Got '3'"),
    "bool for int": (entry(MOSAIC, stages=True), r"stages must be of the type of \d. Got True"),
    "wrong tuple": (entry(MOSAIC, registers=[24, "x"]), "registers must be of the type"),
    "unknown value": (entry(MOSAIC, turns="never"), "turns must be one of 'issued'.* Got 'never'"),
    "too large": (entry(MOSAIC, block_kv=128, stages=4), "must fit 232448 bytes of SMEM"),
    "too many barriers": (entry(MOSAIC, block_kv=64, stages=4), "must take at most 16 named barriers. They take 17"),
    "three warpgroups": (entry(MOSAIC, compute=3), "registers: .* at most 512 together"),
    "register steps": (entry(MOSAIC, registers=[20, 240]), "registers must be multiples of 8"),
    "negative": (entry(MOSAIC, group_heads=-1), "group_heads must be 0 or more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_warns_once_and_the_built_in_tiles_are_used(table: Path, name: str):
    with no_table():
        built_in = mosaic_tiles()
    content, what = BROKEN[name]
    if isinstance(content, bytes):
        table.write_bytes(content)
    elif content is None:
        table.unlink()
    else:
        one = isinstance(content, int) or (isinstance(content, dict) and "format" not in content)
        content = {"format": FORMAT, "tiles": {str(key("pallas_gpu", "forward")): content}} if one else content
        table.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match=f"{re.escape(str(table))}: .*{what}.* The built-in tiles are used") as warned:
        assert mosaic_tiles() == built_in
        assert mosaic_tiles() == built_in
    assert len(warned) == 1


def test_triton_says_what_it_does_not_know(table: Path):
    for field, value in (("block_q", 48), ("num_warps", 32), ("num_stages", 0)):
        tile_table.merge(table, {key("pallas_triton", "dq"): entry(TRITON, **{field: value})})
        with pytest.warns(UserWarning, match=f"{field} must be .* Got {value}"):
            assert triton_tiles("dq") != TRITON


def test_built_in_tiles_keep_the_rules_of_tables():
    for implementation, direction in space.KERNELS:
        for kernel in space.KERNELS[implementation, direction]:
            for size in space.HEAD_SIZES:
                problem = Problem(implementation, kernel, "bfloat16", size, 8192, 16, KIND)
                assert problem.built_in().refusal(size) is None


# ------------------------------------------------------------------------------------------------------- real calls


def lowered_forward(call: Callable[..., Any]) -> str:
    case = mosaic_cases.CASES["hop"]
    with jax.sharding.use_abstract_mesh(mosaic_cases.H100):
        traced = jax.jit(lambda *args: call(case, *args)).trace(*mosaic_cases.arguments(case))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_mosaic_picks_the_table_up(table: Path, monkeypatch: pytest.MonkeyPatch):
    used = []
    forward = mosaic_forward.forward

    def spy(block: Any, params: Any, tiles: Any, *rest: Any, **options: Any) -> Any:
        used.append(tiles)
        return forward(block, params, tiles, *rest, **options)

    monkeypatch.setattr(mosaic.forward_kernel, "forward", spy)
    with no_table():
        before = lowered_forward(mosaic_cases.run)
    tile_table.merge(table, {key("pallas_gpu", "forward, carry, masked"): entry(MOSAIC)})
    after = lowered_forward(mosaic_cases.run)
    assert used[-1] == MOSAIC != used[0]
    assert after != before, "another program"


@triton_cases.lowers_triton
def test_triton_picks_the_table_up(table: Path):
    def launches(config: Any = None) -> list[tuple[str, int, int, int]]:
        """Name, programs, stages and warps of each Triton call."""
        config = config or ringjax.RingConfig(implementation="pallas_triton")
        text = triton_cases.lowered(jnp.bfloat16, 128, backward=True, config=config)
        grid = r"grid_x = (\d+) : i32, grid_y = (\d+) : i32, grid_z = (\d+) : i32"
        how = r"name = \"(ringjax_\w+)\", num_stages = (\d+) : i32, num_warps = (\d+) : i32"
        found = re.findall(rf"{grid}, ir = [^\n]*?, {how}", text)
        return sorted({(name, int(x) * int(y) * int(z), int(s), int(w)) for x, y, z, name, s, w in found})

    before = launches()
    for kernel in ("forward", "dkv", "dq"):
        tile_table.merge(table, {key("pallas_triton", kernel): entry(TRITON)})
    # Two shards of 200 tokens are 14 tiles of 32; four heads of queries, two of keys.
    wanted = [("ringjax_dkv", 28, 2, 4), ("ringjax_dq", 56, 2, 4), ("ringjax_forward", 56, 2, 4)]
    assert launches() == wanted != before
    fixed = ringjax.RingConfig(implementation="pallas_triton", block_q=64, block_kv=64)
    with no_table():
        without = launches(fixed)
    assert launches(fixed) == without


# ------------------------------------------------------------------------------------------------------ the file


def test_merging_keeps_what_others_have_found(table: Path):
    first, second = key("pallas_triton", "dq"), key("pallas_triton", "dkv")
    foreign = {"format": FORMAT, "tiles": {"of another GPU": {"tiles": "whatever"}}}
    table.write_text(json.dumps(foreign), encoding="utf-8")
    tile_table.merge(table, {first: entry(TRITON)})
    tile_table.merge(table, {second: entry(TRITON)})
    tile_table.merge(table, {first: None})
    assert tile_table.read(table) == {**foreign["tiles"], str(second): entry(TRITON)}
    before = table.stat().st_mtime_ns, table.read_bytes()
    tile_table.merge(table, {first: None, second: entry(TRITON)})
    assert (table.stat().st_mtime_ns, table.read_bytes()) == before, "nothing has changed, nothing is written"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_table_as_it_was(table: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    tile_table.merge(table, {key("pallas_triton", "dq"): entry(TRITON)})
    before = table.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    module, name = (json, "dump") if step == "write" else (os, step)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="No space left"):
        tile_table.merge(table, {key("pallas_triton", "dkv"): entry(TRITON)})
    assert table.read_bytes() == before
    assert list(table.parent.iterdir()) == [table]


def test_a_link_stays_a_link(table: Path):
    elsewhere = table.with_name("elsewhere") / "real.json"
    elsewhere.parent.mkdir()
    table.unlink()
    table.symlink_to(elsewhere)
    tile_table.merge(table, {key("pallas_triton", "dq"): entry(TRITON)})
    assert table.is_symlink() and elsewhere.is_file()
    assert triton_tiles("dq") == TRITON


def test_nobody_overwrites_what_is_no_table(table: Path):
    table.write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="must be JSON"):
        tile_table.merge(table, {key("pallas_triton", "dq"): entry(TRITON)})
    assert table.read_text(encoding="utf-8") == "precious"
