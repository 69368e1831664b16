"""Names that completion offers: only what a user calls."""

from __future__ import annotations

import html
import inspect
from typing import Any

import pytest
from planted import profile

import lorascope as ls
from lorascope import plots

CONSTANTS = {"ROLES", "FORMS", "OBSERVERS", "FIGURES"}
MODULES = [name for name in ls._MODULES if name not in ("analysis", "papers")]  # packages of modules


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
    # Four figures are drawn from other data than runs, and are not in the registry.
    others = {"against_truth", "agreement", "frequency_bias", "head_choice"}
    assert set(dir(plots)) == {"FIGURES", "Figure", "available", *others, *plots.FIGURES}


def test_advice_of_available_figures_is_displayed_whole(write: Any) -> None:
    table = plots.available(write("a", profile(1, 3, 4)))
    longest = max(table["missing"], key=len)
    assert len(longest) > 50
    assert longest in repr(table)
    assert longest in html.unescape(table._repr_html_())
