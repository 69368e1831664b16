"""Measured numbers of the blocks, and pages that repeat one of them in their text."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from measured_numbers import measured_numbers, repeated, significant_digits
from planted_claims import REGISTERED
from test_evidence_blocks import CLAIM, OURS, ROOT, cells, other_machine, planted, write
from verdict_tables import Tables

from lorascope.papers.judging import kept_runs
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.verification import derive
from lorascope.papers.registry import PAIRS


def listed(evidence: Evidence) -> pd.DataFrame:
    return measured_numbers(Tables(REGISTERED, ROOT / "data", evidence, derive(evidence, REGISTERED, PAIRS)))


def test_numbers_are_those_that_the_blocks_print() -> None:
    evidence = other_machine(planted(10, effect=-0.001, spread=0.003))
    blocks, found = write(evidence)[0], listed(evidence).set_index("key")
    value = dict(found["value"])
    row = cells(blocks["verdicts"], f"`{CLAIM}`")
    effect, low, high, p, adjusted = (
        value[f"{CLAIM}: {name}"] for name in ("effect", "low", "high", "p", "adjusted p")
    )
    assert row[2] == f"{effect} [{low}, {high}] (99%)"
    assert row[4:6] == [p, adjusted]
    arm = cells(blocks["arms"], f"{OURS} |")
    for cell, score in zip(arm[4:], ("test accuracy (%)", "test loss (nats)"), strict=True):
        assert cell == f"{value[f'{OURS}: {score}']} ± {value[f'{OURS}: {score}, half interval']}"
    assert list(found.loc["all runs: CPU-minutes"]) == ["45", 2, "runs.csv"]
    assert list(found.loc["published.hydralora: effect"]) == ["2.05", 3, "data/published"]
    assert "published.hydralora: low" not in found.index
    assert not [key for key in found.index if key.startswith("published.neft:")]  # printed by the paper
    assert row[-1] == "depends on the machine; all seeds: {} [{}, {}], 10 seeds".format(
        *(value[f"{CLAIM}, all seeds: {name}"] for name in ("effect", "low", "high"))
    )
    assert f"{CLAIM} on AVX512 / 2.6.0 / 1 / cpu: effect" in found.index
    assert found.index.is_unique
    every = " ".join(blocks[name] for name in ("published", "verdicts", "arms", "budget"))
    assert set(value.values()) <= set(re.findall(r"-?[\d.]+(?:e-\d+)?", every))


def test_without_runs_only_published_figures_are_listed() -> None:
    assert set(listed(kept_runs.read_kept(Path("no folder")))["from"]) == {"data/published"}


@pytest.mark.parametrize(
    ("text", "digits"),
    [("-0.0358", 3), ("100.0", 4), ("0.0340", 3), ("0.0", 0), ("1,234", 4), ("1.5e-05", 2), ("-1.27", 3)],
)
def test_significant_digits_are_counted(text: str, digits: int) -> None:
    assert significant_digits(text) == digits


MEASURED = pd.DataFrame({"key": ["a: effect", "b: low", "c: loss"], "value": ["0.167", "-0.0358", "1234.5"]})
BLOCK = "<!-- evidence verdicts -->\n\n| 0.167 |\n\n<!-- /evidence -->\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The effect is 0.167.", "0.167 is a measured number outside a block (a: effect)"),
        ("It is (0.1670) here", "0.1670 is a measured number outside a block (a: effect)"),
        ("It falls by 0.0358 nats", "0.0358 is a measured number outside a block (b: low)"),
        ("It is −0.0358%", "0.0358 is a measured number outside a block (b: low)"),
        ("1,234.5 nats", "1,234.5 is a measured number outside a block (c: loss)"),
        ("![Effect 0.167](../figures/x.png)", "0.167 is a measured number outside a block (a: effect)"),
        ("0.168, 10.167, 0.16, 0.1671, version 0.167.2, 0.167x", ""),
        ("Use `lr=0.167`.", ""),
        ("```text\n0.167\n```", ""),
    ],
)
def test_measured_number_outside_a_block_is_named(tmp_path: Path, text: str, found: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BLOCK}\n{text}\n", encoding="utf-8")
    lines = list(repeated(page, MEASURED))
    assert [line.partition(": leave it out")[0] for line in lines] == ([f"{page}:8: {found}"] if found else [])


def test_pages_without_blocks_may_have_any_number(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It is 0.167.\n", encoding="utf-8")
    assert list(repeated(page, MEASURED)) == []
