"""Names that completion offers: only what a user calls."""

from __future__ import annotations

import html
import inspect
import re
from typing import Any

import pytest

import lorascope as ls
from lorascope import plots

CONSTANTS = {"ROLES", "FORMS", "OBSERVERS", "FIGURES", "METRICS"}
MODULES = [name for name in ls._MODULES if name not in ("analysis", "papers")]  # packages of modules
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
