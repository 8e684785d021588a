"""Imports point downwards only, and each room keeps to what it may know (the wall between ring, mask and kernels)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ringjax"

# Rooms from the top down. A room may import rooms of a lower floor, and itself; rooms of one floor know nothing of
# each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "tune"),
    ("bench",),
    ("training",),
    ("models",),
    ("nnx", "linen"),
    ("layers",),
    ("adapters", "cache"),
    ("inspect",),
    ("attention",),
    ("sharded",),
    ("cached",),
    ("local", "promises", "targets", "torus"),
    ("ring", "planner"),
    ("arguments",),
    ("exchange", "sharing"),
    ("kernels",),
    ("schedule",),
    ("deal", "mask", "partial"),
    ("layout",),
    ("config", "files", "simulate", "mesh", "packing", "units", "usage"),
    ("_compat", "pairs"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The package itself re-exports from here down, and whoever stands above may use it.
PUBLIC = FLOOR["adapters"]
COLLECTIVES = {
    "ppermute", "pshuffle", "psum", "pmax", "pmin", "pmean", "psum_scatter", "all_gather", "all_to_all",
    "ragged_all_to_all", "all_gather_invariant",
}  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The file's room: the first name below the package; "" is the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, wherever in the file; `from x import y` gives x.y."""
    found: set[str] = set()
    package = ["ringjax", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The package's own face names the layers for type checkers, and imports them when they are asked for.
    lazy = {id(node) for node in ast.walk(tree) if room_of(path) == "" for node in _for_type_checkers(node)}
    for node in ast.walk(tree):
        if id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found.update(".".join([*base, alias.name]) for alias in node.names)
    return found


def _for_type_checkers(node: ast.AST) -> list[ast.stmt]:
    """The statements of an `if TYPE_CHECKING:`, without its else."""
    checking = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return node.body if isinstance(node, ast.If) and checking else []


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ringjax that a file imports; "" stands for the package's own names."""
    rooms = set()
    for name in imported_modules(path):
        top, *rest = name.split(".")
        if top == "ringjax":
            rooms.add(rest[0] if rest and rest[0] in FLOOR else "")
    return rooms


def floor_of(room: str) -> int:
    return PUBLIC if room == "" else FLOOR[room]


def upward_edges(path: Path) -> list[str]:
    """Imports of another room that is not on a lower floor."""
    here = room_of(path)
    lowest_above = PUBLIC - 1 if here == "" else floor_of(here)
    edges = [room for room in imported_rooms(path) if room != here and floor_of(room) <= lowest_above]
    return [f"{path.relative_to(PACKAGE)} -> {room or '__init__.py'}" for room in edges]


def test_every_file_has_a_floor():
    unknown = {room_of(path) for path in SOURCES} - set(FLOOR) - {""}
    assert not unknown, f"add to FLOORS: {unknown}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path):
    assert upward_edges(path) == []


@pytest.mark.parametrize(
    ("file", "text", "edges"),
    [
        ("mask.py", "from .ring import x", 1),
        ("mask.py", "import ringjax.attention", 1),
        ("mask.py", "from ringjax import ring_attention", 1),
        ("mask.py", "import ringjax", 1),
        ("mask.py", "from . import ring", 1),
        ("mask.py", "def f():\n    from .partial import x", 1),
        ("mask.py", "from .layout import x\nfrom ringjax.layout import y\nfrom . import layout", 0),
        ("kernels/xla.py", "from ..ring import x", 1),
        ("kernels/xla.py", "from ..mask import x\nfrom .base import y", 0),
        ("attention.py", "from . import ring, layout", 0),
        ("__init__.py", "from .attention import x", 0),
        ("__init__.py", "from .nnx import x", 1),
        ("__init__.py", "if TYPE_CHECKING:\n    from . import nnx", 0),
        ("__init__.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from . import nnx", 1),
        ("mask.py", "if TYPE_CHECKING:\n    from . import ring", 1),
        ("demo.py", "import ringjax\nfrom ringjax import RingConfig", 0),
    ],
)
def test_the_walk_sees_upward_edges(tmp_path, monkeypatch, file: str, text: str, edges: int):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert len(upward_edges(path)) == edges


def names_used(path: Path) -> set[str]:
    """Every identifier and attribute in a file."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.alias):
            used.add(node.name.split(".")[-1])
    return used


# The primitive's files: above them a training loop may well sum over devices.
PRIMITIVE = [path for path in SOURCES if room_of(path) == "" or FLOOR.get(room_of(path), 0) >= PUBLIC]


@pytest.mark.parametrize("path", PRIMITIVE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_ring_and_the_exchange_communicate(path: Path):
    used = names_used(path) & COLLECTIVES
    if path.name == "ring.py":
        assert used == {"ppermute"}
    elif path.name == "exchange.py":
        assert used and "ppermute" not in used
    else:
        assert not used


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if room_of(path) == "kernels"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_kernels_know_no_axis_names(path: Path):
    forbidden = {"axis_name", "axis_names", "axis_size", "shard_map", "Mesh", "PartitionSpec"} | COLLECTIVES
    assert not names_used(path) & forbidden


def test_the_ring_knows_no_pallas():
    modules = imported_modules(PACKAGE / "ring.py")
    assert not [name for name in modules if "pallas" in name]


@pytest.mark.parametrize("name", ["oracle.py", "dense_layers.py", "dense_decoder.py"])
def test_the_oracle_is_independent(name: str):
    tree = ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules and not [name for name in modules if name.split(".")[0] == "ringjax"]


def loaded_by(statement: str) -> set[str]:
    """Top-level names and dotted modules in sys.modules after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nsys.stdout.write(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_ringjax_loads_neither_flax_nor_pallas():
    loaded = loaded_by("import ringjax")
    assert "ringjax.attention" in loaded
    assert not [
        name
        for name in loaded
        if name.split(".")[0] in {"flax", "optax", "orbax", "typer", "matplotlib", "safetensors", "gguf", "tokenizers"}
    ]
    assert not [name for name in loaded if name.startswith("jax.experimental.pallas")]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if room_of(path) == "training"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_training_uses_the_public_surface(path: Path):
    assert imported_rooms(path) <= {"", "nnx", "linen", "models", "training", "files", "simulate", "units"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_production_code_does_not_patch_itself(path: Path):
    """What a program needs to vary is an argument; test doubles belong to tests."""
    tops = {name.partition(".")[0] for name in imported_modules(path)}
    assert not tops & {"unittest", "pytest", "mock"}
    assert "argparse" not in tops, "commands are Typer's: one style of help"
    assert "sys.modules" not in path.read_text(encoding="utf-8")


def test_the_registry_has_the_names_that_users_see():
    from ringjax.config import IMPLEMENTATIONS
    from ringjax.kernels.choose import BY_NAME

    assert set(BY_NAME) == set(IMPLEMENTATIONS)
