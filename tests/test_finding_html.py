"""HTML of results in a notebook: the finding, the table and the next command, with names from files escaped."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from parsed_pages import Node, Tree
from test_dial_verdicts import planted_dial
from test_hostile_text import EVIL, untreated
from test_rank_prices import made_price
from test_turning_points import alternating, write_series

import lorascope as ls

COMMAND = "lorascope dial 'runs/<b>' --model minilm --task reviews --by module --rows 50"


def cells(page: Node) -> list[list[str]]:
    """Return the rows of the only table, the heading first."""
    (table,) = page.all("table")
    return [[cell.text for cell in row.walk() if cell.tag in ("th", "td")] for row in table.all("tr")]


def test_a_dial_has_its_finding_its_parts_and_the_scale_to_ship() -> None:
    dial = planted_dial()
    dial = replace(dial, receipt=replace(dial.receipt, command=COMMAND))
    page = Tree(dial._repr_html_()).root
    finding, following = page.all("p")
    assert finding.text.startswith("planted: learn 0.3 [")
    assert finding.text.endswith("; 1 keep, 1 idle")
    heading, *rows = cells(page)
    assert [row[heading.index("part")] for row in rows] == ["whole", "a", "b"]
    # Half the scale costs 0.02 nats with a short interval, and the margin is a tenth of 0.3.
    assert following.text == "next: lorascope export 'runs/<b>' --scales whole=0.5 --peft scaled"


def test_a_dial_with_undecided_parts_names_the_command_with_the_rows_that_decide_half_of_them() -> None:
    dial = planted_dial()
    parts = dial.parts.assign(best_scale=1.0, verdict=["", *["undecided"] * 2], rows_needed=[float("nan"), 90, 700])
    dial = replace(dial, parts=parts, receipt=replace(dial.receipt, command=COMMAND))
    assert dial.next_command() == COMMAND.replace("--rows 50", "--rows 395")
    assert "about 395 would decide 1 of 2 undecided parts" in repr(dial)
    # No number of rows, or no command to measure them with.
    hopeless = parts.assign(rows_needed=[float("nan"), float("inf"), float("inf")])
    assert replace(dial, parts=hopeless).next_command() == ""
    assert replace(dial, receipt=replace(dial.receipt, command="")).next_command() == ""


@pytest.mark.parametrize(("angle", "finding"), [(90.0, "turning point at step 80"), (0.0, "no turning point in")])
def test_turns_have_their_finding_their_checkpoints_and_the_figure(angle: float, finding: str, tmp_path: Path) -> None:
    turns = ls.turns(write_series(tmp_path / "out", alternating(angle)))
    page = Tree(turns._repr_html_()).root
    first, following = page.all("p")
    assert first.text.startswith(f"out: {finding}")
    heading, *rows = cells(page)
    assert heading == ["step", "cosine", "drop", "turn"]
    assert [int(row[0]) for row in rows] == turns.table["step"].to_list()
    assert following.text == f"next: lorascope plot turns {tmp_path / 'out'} --series -o turns.pdf"


def test_a_price_has_its_verdict_and_the_retraining() -> None:
    price = made_price(verdict="wasteful", next_command="lorascope price 'a&b' --ranks 2 --retrain 3")
    first, following = Tree(price._repr_html_()).root.all("p")
    assert "wasteful" in first.text
    assert following.text == "next: lorascope price 'a&b' --ranks 2 --retrain 3"
    assert len(Tree(replace(price, next_command="")._repr_html_()).root.all("p")) == 1


def test_names_in_the_html_of_a_result_are_escaped(tmp_path: Path) -> None:
    dial = planted_dial()
    command = shlex.join(["lorascope", "dial", EVIL, "--rows", "50"])
    parts = dial.parts.assign(role=EVIL)
    dial = replace(dial, label=EVIL, parts=parts, receipt=replace(dial.receipt, command=command))
    turns = ls.turns(write_series(tmp_path / "out", alternating(90.0)))
    turns = replace(turns, label=EVIL, receipt=replace(turns.receipt, command=shlex.join(["plot", EVIL, "-o", "x"])))
    price = made_price(label=EVIL, next_command=command)
    assert EVIL in shlex.split(dial.next_command())
    for result in (dial, turns, price):
        text = result._repr_html_()
        assert untreated(text) == set()
        page = Tree(text).root
        assert {node.tag for node in page.walk()} <= {"p", "table", "thead", "tbody", "tr", "th", "td", "code", "div"}
