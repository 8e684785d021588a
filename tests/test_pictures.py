"""The picture of the README shows the figures that are committed beside it."""

from __future__ import annotations

import importlib.util
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load_draw() -> Any:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw = load_draw()


def described(picture: Path) -> dict[str, Any]:
    """The numbers in the picture's description."""
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", picture.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(unescape(found))


@pytest.mark.parametrize("picture", [draw.PICTURE, draw.DARK], ids=lambda path: path.stem)
def test_the_committed_picture_is_of_the_committed_figures(picture: Path):
    assert described(picture) == draw.figures(), "run: python docs/draw.py"
    text = picture.read_text(encoding="utf-8")
    for words, milliseconds in draw.figures()["milliseconds"].items():
        assert f">{words}<" in text and f">{milliseconds:.1f}<" in text
    assert f'"docs/images/{picture.name}"' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figures_are_of_the_programs_that_the_caption_names():
    programs = [draw.read(f"inspect_{strategy}.json") for strategy in draw.STRATEGIES]
    for strategy, report in zip(draw.STRATEGIES, programs, strict=True):
        assert report["program"] == {**programs[0]["program"], "strategy": strategy}
        assert report["compiler"]["versions"] == programs[0]["compiler"]["versions"]
    program = programs[0]["program"]
    assert program["backward"] and program["is_causal"] and program["dtype"] == "bfloat16"
    assert (program["heads"], program["kv_heads"], program["head_dim"]) == (32, 8, 128)
    assert 2 * program["heads"] * program["seq_len"] ** 2 == 2**40  # the logits of the caption
    caption = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "libtpu {libtpu}, ".format(**programs[0]["compiler"]["versions"]) in caption
    assert program["topology"].startswith("v5p:") and "TPU v5p" in caption and "two H200s" in caption


def test_another_figure_makes_another_picture(tmp_path: Path):
    drawn = draw.figures()
    drawn["milliseconds"]["ringjax, ring"] = 1.5
    draw.draw(drawn, tmp_path / "picture.svg", draw.LIGHT_INK)
    assert described(tmp_path / "picture.svg") == drawn != draw.figures()
    assert ">1.5<" in (tmp_path / "picture.svg").read_text(encoding="utf-8")
