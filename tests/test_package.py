"""What is published: contents of sdist and wheel, the wheel away from the repository, versions, workflows."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hatchling.build
import pathspec  # hatchling's
import pytest
import yaml
from packaging.metadata import Metadata
from typer.testing import CliRunner

import ringjax
from ringjax.cli import app
from ringjax.files import shipped
from ringjax.training.loading import ConfigError, load

ROOT = Path(__file__).parents[1]
VERSION = ringjax.__version__
CONFIGS = {path.name: path.read_bytes() for path in sorted((ROOT / "configs").glob("*.toml"))}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def sources(folder: str) -> set[str]:
    """Files of a folder, without what tools leave behind."""
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in found if not ignored.match_file(name)}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist and wheel, as `python -m build` makes them: the wheel out of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    with contextlib.chdir(ROOT):
        sdist = folder / hatchling.build.build_sdist(str(folder))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    with contextlib.chdir(folder / f"ringjax-{VERSION}"):
        wheel = folder / hatchling.build.build_wheel(str(folder))
    return sdist, wheel


def test_the_wheel_has_the_package_and_its_configurations_alone(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert wheel.name == f"ringjax-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"ringjax-{VERSION}.dist-info"
        names = {name for name in archive.namelist() if not name.startswith(f"{info}/")}
        assert names == sources("ringjax") | {f"ringjax/configs/{name}" for name in CONFIGS}
        assert "ringjax/py.typed" in names
        assert all(archive.read(f"ringjax/configs/{name}") == text for name, text in CONFIGS.items())
        assert archive.read(f"{info}/entry_points.txt").decode().split("\n")[:2] == [
            "[console_scripts]",
            "ringjax = ringjax.cli:main",
        ]
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"), validate=True)
    assert str(metadata.version) == VERSION and metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert str(metadata.requires_python) == ">=3.11"
    assert metadata.provides_extra is not None and {"models", "cuda", "tpu", "test", "docs"} <= set(
        metadata.provides_extra
    )


def test_the_sdist_has_what_tests_and_site_need(distributions: tuple[Path, Path]) -> None:
    sdist = distributions[0]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("ringjax", "tests", "configs", "docs", "examples", "notebooks", ".ci", ".github")
    wanted = set().union(*map(sources, folders))
    files = {name for name in names if name.partition("/")[0] in folders}
    assert files == wanted
    assert names - files == {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "pyproject.toml", "PKG-INFO",
        ".gitignore", ".pre-commit-config.yaml",
    }  # fmt: skip
    assert sdist.stat().st_size < 5e6


def test_an_editable_install_copies_nothing(tmp_path: Path) -> None:
    with contextlib.chdir(ROOT):
        wheel = tmp_path / hatchling.build.build_editable(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        assert path.endswith(".pth") and archive.read(path).decode().strip() == str(ROOT)
    assert not (ROOT / "ringjax" / "configs").exists()


def test_the_wheel_works_away_from_the_repository(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Before any other ringjax of this environment, which has what it depends on."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": str(site)}
    subprocess.run([*pip, "--target", site, distributions[1]], check=True, env=environment)
    assert (site / "bin" / "ringjax").is_file()
    code = (
        "import sys, ringjax.cli\nfrom ringjax.files import shipped\nfrom ringjax.training.loading import load\n"
        "sys.stdout.write(' '.join(load(name).output for name in shipped()))\nringjax.cli.main()"
    )
    command = [sys.executable, "-c", code, "train", "--config", "mine"]
    away = tmp_path / "away"
    away.mkdir()
    result = subprocess.run(command, capture_output=True, text=True, cwd=away, env=environment)
    assert result.stdout == " ".join(f"runs/{Path(name).stem}" for name in CONFIGS)
    names = ", ".join(Path(name).stem for name in CONFIGS)
    folder = site / "ringjax" / "configs"
    assert result.stderr == f"error: config: must be a TOML file, or a name in {folder}: {names}. Got 'mine'.\n"
    assert result.returncode == 2 and list(away.iterdir()) == []


def test_a_configuration_by_name_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f"{name}.toml" for name in shipped()} == set(CONFIGS)
    config = load(ROOT / "configs" / "stdlib_tiny.toml")
    monkeypatch.chdir(tmp_path)
    assert load("stdlib_tiny") == config and config.output == "runs/stdlib_tiny"
    (tmp_path / "stdlib_tiny").mkdir()
    assert load("stdlib_tiny") == config, "a directory is no configuration"
    (tmp_path / "mesh_3d").write_text('output = "mine"', encoding="utf-8")
    assert load("mesh_3d").output == "mine", "a file of the user's comes first"


def test_an_unknown_name_says_which_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ", ".join(shipped())
    with pytest.raises(ConfigError, match=rf"name in .*configs: {names}\. Got 'stdlib_tiney'\.") as caught:
        load("stdlib_tiney")
    result = CliRunner().invoke(app, ["train", "stdlib_tiney"])
    assert (result.exit_code, result.stderr) == (2, f"error: {caught.value}\n")
    with pytest.raises(ConfigError, match=r"No such file.*\. stdlib_tiny ships with ringjax: give its name alone\."):
        load("configs/stdlib_tiny.toml")


def test_the_configuration_is_given_once() -> None:
    result = CliRunner().invoke(app, ["train", "mesh_3d", "--config", "stdlib_tiny"])
    assert result.exit_code == 2
    assert result.stderr == "error: CONFIG must be given once. Got 'mesh_3d' and --config 'stdlib_tiny'.\n"


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]  # read from ringjax/__init__.py
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1] == (VERSION, citation["date-released"])
    assert citation["version"] == VERSION and citation["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors", "type"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def workflow(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in workflow(path)["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        yield from job["steps"]


def runs(name: str) -> list[str]:
    return [step["run"] for step in steps(ROOT / ".github" / "workflows" / f"{name}.yml") if "run" in step]


def test_workflows_call_what_there_is() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]
    assert runs("tests") == ["bash .ci/run"]
    assert runs("docs") == ['pip install -e ".[docs]"', "python docs/build.py"]
    assert runs("release")[:3] == ["pip install build twine", "python -m build", "twine check --strict dist/*"]
    assert (ROOT / ".ci" / "run").is_file() and (ROOT / "docs" / "build.py").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_wait_for_a_maintainer(path: Path) -> None:
    """By hand alone, until the comment marks are taken off. Actions are those of a major version."""
    text = path.read_text(encoding="utf-8")
    on: Any = True  # the word `on` in YAML 1.1
    assert list(workflow(path)[on]) == ["workflow_dispatch"]
    turned_on = yaml.safe_load(re.sub(r"^  # ", "  ", text, flags=re.MULTILINE))
    assert "push" in turned_on[on] and turned_on["jobs"] == workflow(path)["jobs"]
    assert workflow(path)["permissions"] == {"contents": "read"}
    for step in steps(path):
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])


def test_publishing_is_trusted_and_from_a_tag() -> None:
    job = workflow(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["publish"]
    assert job["permissions"] == {"id-token": "write"} and job["environment"] == "release"
    assert job["if"] == "startsWith(github.ref, 'refs/tags/v')" and job["needs"] == "build"
    assert job["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}
