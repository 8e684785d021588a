"""Signatures for autodoc, read from the source: jaxtyping's shapes and defaults as written, one for all overloads.

Sphinx would evaluate the annotations, print every overload, and lose the shapes. Names of ringjax become those under
which the reference documents them, so that they are links; aliases of types are written out.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

# Where public names are looked for, the shortest first.
PUBLIC = (
    "ringjax", "ringjax.nnx", "ringjax.linen", "ringjax.models", "ringjax.training", "ringjax.inspect",
    "ringjax.packing", "ringjax.planner",
)  # fmt: skip
# Made by functions, never by callers: their constructors are not shown, and their attributes carry the types.
RESULTS = {
    "ringjax.Plan", "ringjax.planner.Candidate", "ringjax.planner.estimate.Estimate", "ringjax.planner.estimate.Way",
    "ringjax.planner.estimate.Problem",
    "ringjax.planner.documents.Documents", "ringjax.planner.documents.Dealing", "ringjax.planner.documents.Spread",
    "ringjax.planner.topology.Slice", "ringjax.planner.topology.Hosts",
    "ringjax.packing.Packing", "ringjax.packing.Shared", "ringjax.packing.Arrangement",
    "ringjax.inspect.Report", "ringjax.inspect.Program", "ringjax.inspect.Compiled", "ringjax.inspect.Cycles",
    "ringjax.inspect.InspectError", "ringjax.inspect.memory.Term", "ringjax.inspect.report.Scaling",
    "ringjax.inspect.report.Payload", "ringjax.inspect.report.Link",
    "ringjax.models.Range", "ringjax.models.Tokenizer", "ringjax.nnx.DecoderCache", "ringjax.KVCache",
    "ringjax.training.Batches", "ringjax.adapters.AttentionFn",
}  # fmt: skip
_SHAPED = {"Float", "Int", "Int32", "Bool", "PRNGKeyArray", "Literal"}  # their strings are no forward references


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _double_quotes)
    analyze = ModuleAnalyzer.analyze

    def without_overloads(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    ModuleAnalyzer.analyze = without_overloads
    return {"parallel_read_safe": True}


def _signature(_: Sphinx, what: str, name: str, *rest: Any) -> tuple[str, str | None] | None:
    if name in RESULTS:
        return "", None
    if what in ("function", "method", "class"):
        return signature(name)
    return None


def _double_quotes(_: Sphinx, tree: nodes.document) -> None:
    """Strings as the sources write them."""
    for node in tree.findall(nodes.inline):
        text = node.astext()
        is_literal = isinstance(node, addnodes.desc_sig_literal_string) or "default_value" in node["classes"]
        if is_literal and text[:1] == "'" == text[-1:]:
            node.children = [nodes.Text(f'"{text[1:-1]}"')]


def signature(name: str) -> tuple[str, str | None] | None:
    """The arguments and the result of a function, method or class; None: Sphinx knows better."""
    found = definition(name)
    if found is None:
        return None
    node, module = found
    if isinstance(node, ast.ClassDef):
        if is_typed_dict(node):
            return None
        init = _function(node, "__init__")
        if init is not None:
            return _arguments(init, module, drop_first=True), None
        fields = list(_fields(node))
        if not fields:
            return "", None
        star = ["*"] if _is_keyword_only(node) else []
        return f"({', '.join(star + [_field(each, module) for each in fields])})", None
    decorators = {ast.unparse(each) for each in node.decorator_list}
    is_method = found != definition_in_module(name)
    text = _arguments(node, module, drop_first=is_method and "staticmethod" not in decorators)
    return text, None if node.returns is None else annotation(node.returns, module)


def attribute_type(cls: str, attribute: str) -> str | None:
    """The type of a field or property, as it is written."""
    found = definition(cls)
    if found is None or not isinstance(found[0], ast.ClassDef):
        return None
    node, module = found
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and ast.unparse(each.target) == attribute:
            return _short(annotation(each.annotation, module))
        if isinstance(each, ast.FunctionDef) and each.name == attribute and each.returns is not None:
            return _short(annotation(each.returns, module))
    return None


def keys(cls: str) -> dict[str, str]:
    """Name and type of the keys of a TypedDict; nothing for other classes."""
    found = definition(cls)
    if found is None or not isinstance(found[0], ast.ClassDef) or not is_typed_dict(found[0]):
        return {}
    return {ast.unparse(each.target): _short(annotation(each.annotation, found[1])) for each in _fields(found[0])}


def is_typed_dict(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "TypedDict" for base in node.bases)


def _short(text: str) -> str:
    """Without the modules of names."""
    tree = ast.parse(text, mode="eval")

    class Last(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802
            return ast.Name(node.attr)

    return _unparse(Last().visit(tree))


# --- where things are defined ----------------------------------------------------------------------------------------


def definition(name: str) -> tuple[ast.ClassDef | ast.FunctionDef, ModuleType] | None:
    """Its node, and the module that this is in."""
    return definition_in_module(name) or _definition_in_class(name)


@functools.cache
def definition_in_module(name: str) -> tuple[ast.ClassDef | ast.FunctionDef, ModuleType] | None:
    module, _, last = name.rpartition(".")
    try:
        return _find(importlib.import_module(module), last)
    except ImportError:
        return None


def _definition_in_class(name: str) -> tuple[ast.ClassDef | ast.FunctionDef, ModuleType] | None:
    owner, _, last = name.rpartition(".")
    node, module = definition_in_module(owner) or (None, None)
    if not isinstance(node, ast.ClassDef) or module is None:
        return None
    method = _function(node, last)
    if method is not None:
        return method, module
    for base in node.bases:
        if isinstance(base, ast.Name):
            inherited = _definition_in_class(f"{module.__name__}.{base.id}.{last}")
            if inherited is not None:
                return inherited
    return None


def _find(module: ModuleType, name: str) -> tuple[ast.ClassDef | ast.FunctionDef, ModuleType] | None:
    """By way of the imports of ringjax's modules."""
    bound = _bound(module).get(name)
    if isinstance(bound, (ast.ClassDef, ast.FunctionDef)):
        return bound, module
    if isinstance(bound, ast.ImportFrom):
        source = _source(bound, module)
        if source.split(".")[0] == "ringjax":
            return _find(importlib.import_module(source), _original(bound, name))
    return None


@functools.cache
def _bound(module: ModuleType) -> dict[str, ast.AST]:
    """What the names of a module are bound to at its top level; of overloads the last one, the implementation."""
    found: dict[str, ast.AST] = {}

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
            elif isinstance(node, ast.If):
                visit(node.body)

    visit(ast.parse(inspect.getsource(module)).body)
    return found


def _source(node: ast.ImportFrom, module: ModuleType) -> str:
    """The module that is imported from."""
    name = node.module or ""
    if not node.level:
        return name
    is_package = hasattr(module, "__path__")
    parts = module.__name__.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, name] if name else parts)


def _original(node: ast.Import | ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in node.names if name in (alias.asname, alias.name))


def _function(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == name]
    return found[-1] if found else None


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    """Of a dataclass, a NamedTuple or a Linen module."""
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            yield each


def _is_keyword_only(node: ast.ClassDef) -> bool:
    return any("kw_only=True" in ast.unparse(each) for each in node.decorator_list)


# --- text ------------------------------------------------------------------------------------------------------------


def _arguments(node: ast.FunctionDef, module: ModuleType, *, drop_first: bool) -> str:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [_argument(arg, default, module) for arg, default in zip(plain, defaults, strict=True)]
    parts = parts[1:] if drop_first else parts
    if given.kwonlyargs:
        parts.append("*")
    parts += [_argument(*pair, module) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append("**" + _argument(given.kwarg, None, module))
    return f"({', '.join(parts)})"


def _argument(arg: ast.arg, default: ast.expr | None, module: ModuleType) -> str:
    text = arg.arg if arg.annotation is None else f"{arg.arg}: {annotation(arg.annotation, module)}"
    return text if default is None else f"{text} = {_unparse(default)}"


def _field(node: ast.AnnAssign, module: ModuleType) -> str:
    text = f"{ast.unparse(node.target)}: {annotation(node.annotation, module)}"
    return text if node.value is None else f"{text} = {_unparse(node.value)}"


def annotation(node: ast.expr, module: ModuleType) -> str:
    """With names as the reference has them."""
    return _unparse(_Names(module).visit(ast.parse(ast.unparse(node), mode="eval").body))


def _unparse(node: ast.AST) -> str:
    """With strings in double quotes."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


class _Names(ast.NodeTransformer):
    """Writes names in full, and what aliases stand for."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.AST:  # noqa: N802
        bound = _bound(self.module).get(node.id)
        if bound is None:
            return node if hasattr(builtins, node.id) else ast.parse(node.id, mode="eval").body
        if isinstance(bound, ast.Assign):  # an alias
            return _Names(self.module).visit(ast.parse(ast.unparse(bound.value), mode="eval").body)
        if isinstance(bound, ast.Import):
            return _expression(_original(bound, node.id))
        if isinstance(bound, ast.ImportFrom):
            source, name = _source(bound, self.module), _original(bound, node.id)
            if source.split(".")[0] == "ringjax" and f"{source}.{name}" not in sys.modules:
                return _Names(importlib.import_module(source)).visit(ast.Name(name))
            return _expression(f"{source}.{name}")
        return _expression(public_name(getattr(self.module, node.id)))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802
        """As ``ringjax.Layout`` or ``models.Tokenizer``."""
        written = _unparse(self.generic_visit(node))
        module, _, name = written.rpartition(".")
        if module.split(".")[0] == "ringjax":
            return _expression(public_name(getattr(importlib.import_module(module), name)))
        return _expression(written)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:  # noqa: N802
        """A forward reference."""
        return self.visit(_expression(node.value)) if isinstance(node.value, str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:  # noqa: N802
        head = ast.unparse(node.value).split(".")[-1]
        if head == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        if head not in _SHAPED:
            return self.generic_visit(node)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        inner = [
            ast.Constant(each.value.strip()) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            else each if isinstance(each, ast.Constant) else self.visit(each)
            for each in inner
        ]  # fmt: skip
        whole: ast.expr = inner[0] if len(inner) == 1 else ast.Tuple(inner, ast.Load())
        return ast.Subscript(self.visit(node.value), whole, ast.Load())

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:  # noqa: N802
        """A union, each part of it once and None at the end."""
        parts: dict[str, ast.expr] = {}

        def flatten(part: ast.AST) -> None:
            if isinstance(part, ast.BinOp):
                flatten(part.left)
                flatten(part.right)
            else:
                assert isinstance(part, ast.expr)
                parts[ast.unparse(part)] = part

        flatten(self.visit(node.left))
        flatten(self.visit(node.right))
        parts |= {"None": parts.pop("None")} if "None" in parts else {}
        return functools.reduce(lambda a, b: ast.BinOp(a, ast.BitOr(), b), parts.values())


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def public_name(thing: Any) -> str:
    """The name of a class under which the reference has it."""
    for module in PUBLIC:
        if getattr(importlib.import_module(module), getattr(thing, "__name__", ""), None) is thing:
            return f"{module}.{thing.__name__}"
    return f"{thing.__module__}.{thing.__qualname__}"
