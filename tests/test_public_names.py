"""Names that completion offers: only what a user calls."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import lorascope as ls
from lorascope import plots

CONSTANTS = {"ROLES", "FORMS", "OBSERVERS", "FIGURES", "METRICS"}
# Without packages of modules, and types that are not called.
MODULES = [name for name in ls._MODULES if name not in ("analysis", "api_types", "papers")]
DRAWING = [
    name
    for name, value in vars(plots).items()
    if inspect.isfunction(value) and value.__annotations__.get("return") in ("Chart", "Panels", "Drawable")
]


@pytest.mark.parametrize("name", MODULES)
def test_completion_offers_only_what_a_user_calls(name: str) -> None:
    module = getattr(ls, name)
    offered = dir(module)
    assert offered
    for public in offered:
        value: Any = getattr(module, public)
        assert callable(value) or public in CONSTANTS, public
        assert not inspect.ismodule(value)


def test_completion_of_plots_offers_the_figures() -> None:
    # Some figures are drawn from other data than runs, and are not in the registry.
    others = {"against_truth", "agreement", "frequency_bias", "head_choice"}
    others |= {"dial", "forks", "learn_forget", "price", "reading"}  # results of instruments
    others |= {"printed_table"}  # the table of a recipe
    assert set(dir(plots)) == {"FIGURES", "Figure", "available", "by_paper", *others, *plots.FIGURES}


@pytest.mark.parametrize("name", ["lora", "full", "adapter"])
def test_advice_names_every_figure_once_and_what_to_do_for_it(name: str) -> None:
    table = plots.available(ls.example(name))
    lines = repr(table).splitlines()
    listed = " ".join(line for line in lines if line.startswith("    "))
    assert sorted(re.findall(r"\w+", listed)) == sorted(table["figure"])
    assert lines[0] == "drawn from this run:"
    assert max(map(len, lines)) <= 100
    for reason in filter(None, "; ".join(table["missing"]).split("; ")):
        advice = reason.partition(": ")[2] or reason
        assert advice in repr(table)
        assert advice in html.unescape(table._repr_html_())


@pytest.mark.parametrize("name", DRAWING)
def test_help_of_a_figure_is_short_and_names_what_can_be_done_with_it(name: str) -> None:
    text = inspect.getdoc(getattr(plots, name)) or ""
    assert len(text.splitlines()) <= 40
    for call in (".save(", ".mpl(ax=", ".plotly()"):
        assert call in text


@pytest.mark.parametrize("name", [*[f"plots.{name}" for name in DRAWING], "load", "example"])
def test_signature_names_classes_as_users_import_them(name: str) -> None:
    function = ls
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    assert "lorascope." not in str(signature)
    classes = [value for value in vars(inspect.getmodule(function)).values() if inspect.isclass(value)]
    for cls in classes:
        if cls.__module__.startswith("lorascope.") and re.search(
            rf"\b{cls.__name__}\b", str(signature.return_annotation)
        ):
            assert getattr(ls, cls.__name__, None) is cls


def public_callables() -> Iterator[Any]:
    """Yield the functions and classes of ``lorascope`` and its modules, and the methods of the classes."""
    found = [getattr(ls, name) for name in ls._PUBLIC]
    for name in MODULES:
        found += [getattr(getattr(ls, name), public) for public in dir(getattr(ls, name))]
    for value in found:
        if inspect.isroutine(value) or inspect.isclass(value):
            yield value
        if inspect.isclass(value):
            for name, member in vars(value).items():
                if inspect.isfunction(member) and not name.startswith("_"):
                    yield member


def own_names(module: str) -> set[str]:
    """Return the names that a module defines or imports from this package, also for type checkers alone."""
    source = inspect.getsource(importlib.import_module(module))
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lorascope"):
            if node.module != "lorascope.array_types":  # jaxtyping's
                names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names.add(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    return names


def test_types_of_all_signatures_can_be_imported() -> None:
    named = set()
    for function in public_callables():
        signature = inspect.signature(function)
        annotations = [parameter.annotation for parameter in signature.parameters.values()]
        for annotation in [*annotations, signature.return_annotation]:
            if isinstance(annotation, str):
                words = re.findall(r"(?<![\w.])[A-Z]\w+", re.sub(r'"[^"]*"', "", annotation))  # not those of shapes
                named |= set(words) & own_names(function.__module__)
    assert named.difference(ls.__all__) == set(ls.api_types.__all__)
    assert all(getattr(ls.api_types, name) for name in ls.api_types.__all__)
