"""Hash of the code that computes and judges a claim: its row in ``JUDGED``, and every function that it reaches."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

_PART_OF_COMPARISON = re.compile(
    r"lorascope\.(analysis|papers\.judging\.(statistics|study_statistics|truth_names)"
    r"|papers\.(?!judging|training|figures)\w+)(\.\w+)*"
)
"""Names of modules, functions and constants that are part of the comparison of a claim."""
_PART_OF_JUDGING = re.compile(
    r"lorascope\.(analysis|papers\.judging\.(words|kept_study|statistics|study_statistics|study_results|study_rates))(\.\w+)*"
)
_JUDGING = (
    ("lorascope.papers.judging.study_results", "compute"),
    ("lorascope.papers.judging.study_rates", "chosen_rates"),
    ("lorascope.papers.judging.study_rates", "planned_seeds"),
)
"""Functions that judge all claims: intervals, words, headroom, learned, rates and seeds are what they reach."""
# Fields that differ between versions of Python or do not change what the code computes.
_IGNORED = {"ctx", "type_comment", "type_params", "type_ignores", "returns", "annotation", "kind"}


@dataclass(frozen=True)
class _Module:
    """Definitions and imports of a module by name."""

    tree: ast.Module
    defined: dict[str, list[ast.stmt]]
    imported: dict[str, str]


@cache
def _module(name: str) -> _Module | None:
    """Parse a module without importing it; None if there is none of this name."""
    # ``find_spec`` of a submodule would import its parents, so only the package is looked up.
    top, *names = name.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*names)
    file = path.with_name(f"{path.name}.py")
    if path.is_dir():
        file = path / "__init__.py"
    if not file.exists():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined: dict[str, list[ast.stmt]] = {}
    imported: dict[str, str] = {}
    for statement in tree.body:
        for bound in _bound_names(statement):
            defined.setdefault(bound, []).append(statement)
    for node in ast.walk(tree):  # also imports inside functions
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
    return _Module(tree, defined, imported)


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def comparison_hash(module: str, claim: str) -> str:
    """Hash the comparison of a claim.

    Parameters
    ----------
    module : str
        Name of the module of ``papers`` whose ``JUDGED`` has the claim.
    claim : str
        Id of the claim.

    Returns
    -------
    str
        ``sha256:`` and the digest of the row of the claim, and of all functions, classes and constants of papers,
        ``analysis`` and ``judging`` that it reaches by name. Paths of modules, names of local variables, docstrings,
        annotations and comments are not part of it.

    Raises
    ------
    KeyError
        The module has no row for the claim.
    """
    row = _row(module, claim)
    reached: dict[str, str] = {}
    _follow(row, module, reached, _PART_OF_COMPARISON)
    return _digest([_canonical(row)], reached)


def judging_hash() -> str:
    """Hash the code that judges all claims, and chooses rates and numbers of seeds."""
    reached: dict[str, str] = {}
    for module, function in _JUDGING:
        _resolve([function], module, reached, _PART_OF_JUDGING)
    return _digest([], reached)


def _row(module: str, claim: str) -> ast.AST:
    """Return the row of a claim in its module."""
    rows = []
    source = _module(module)
    if source is None:
        raise KeyError(f"unknown module {module!r}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Dict):
            items = zip(node.keys, node.values, strict=True)
            rows += [value for key, value in items if isinstance(key, ast.Constant) and key.value == claim]
    if len(rows) != 1:
        raise KeyError(f"{module} must have one row for claim {claim!r}, got {len(rows)}")
    return rows[0]


def _digest(rows: list[str], reached: Mapping[str, str]) -> str:
    # Without the paths of modules, so that moving a function changes no hash.
    bodies = sorted(f"{name.rpartition('.')[2]}: {body}" for name, body in reached.items())
    text = "\n".join([*rows, *bodies])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def module_hash(name: str) -> str:
    """Hash the code of a module, without docstrings, annotations and comments."""
    source = _module(name)
    if source is None:
        raise KeyError(f"unknown module {name!r}; expected the full name of one in lorascope")
    return f"sha256:{hashlib.sha256(_canonical(source.tree).encode()).hexdigest()}"


def _follow(node: ast.AST, module: str, reached: dict[str, str], covered: re.Pattern[str]) -> None:
    """Add everything that a node names, and what that names in turn."""
    for name in _names(node):
        _resolve(name.split("."), module, reached, covered)


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names in a node, the longest of each chain of attributes."""
    attributes, inner = [], node
    while isinstance(inner, ast.Attribute):
        attributes.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield ".".join([inner.id, *reversed(attributes)])
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _resolve(names: list[str], module: str, reached: dict[str, str], covered: re.Pattern[str]) -> None:
    source = _module(module)
    if source is None:
        return
    first = names[0]
    if first in source.imported and first not in source.defined:  # a definition in the module has precedence
        target = source.imported[first]
        if not covered.fullmatch(target):
            return
        if _module(target) is not None:  # ``from package import module``
            if len(names) > 1:
                _resolve(names[1:], target, reached, covered)
            return
        package, _, name = target.rpartition(".")
        _resolve([name], package, reached, covered)
        return
    key = f"{module}.{first}"
    # A definition that was reached is not followed again, which also ends recursion.
    if key in reached or first not in source.defined or not covered.fullmatch(module):
        return
    nodes = source.defined[first]
    reached[key] = "; ".join(_canonical(node, _local_names(node)) for node in nodes)
    for node in nodes:
        _follow(node, module, reached, covered)


def _local_names(definition: ast.stmt) -> dict[str, str]:
    """Number the variables that functions bind in a definition, so that renaming one changes no hash."""
    numbers: dict[str, str] = {}
    for function in ast.walk(definition):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    numbers.setdefault(node.id, f"local {len(numbers)}")
    return numbers


def _canonical(node: Any, local_names: Mapping[str, str] = MappingProxyType({})) -> str:
    """Write a syntax tree without what depends on the version of Python, see ``_IGNORED``, and without local names."""
    if isinstance(node, list):
        return f"[{', '.join(_canonical(child, local_names) for child in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name in node._fields:
        value = getattr(node, name, None)
        if name == "body" and isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            value = [statement for statement in node.body if not _is_docstring(statement)]
        if name == "id" and isinstance(value, str) and value in local_names:
            value = local_names[value]
        if name not in _IGNORED and value not in (None, []):
            fields.append(f"{name}={_canonical(value, local_names)}")
    return f"{type(node).__name__}({', '.join(fields)})"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
