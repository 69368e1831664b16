"""Report cards: their numbers are those of the inspection, and every change of a page is found."""

from __future__ import annotations

import base64
import json
import os
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from adapter_bits import peft_folder
from hostile import outcome
from parsed_pages import Node, Tree
from test_hostile_text import EVIL, untreated
from test_inspect import llama, plant

import lorascope as ls
from lorascope import cli
from lorascope.diagnosis.inspection import inspect
from lorascope.files.seals import MAX_PAGE, seal
from lorascope.pages.card import MAX_ROWS, collect
from lorascope.pages.report_card import html, markdown, read, report, verify_card
from lorascope.pages.table_cells import format_value
from lorascope.plots.figure_registry import available
from lorascope.runs.loading import load
from lorascope.runs.result import Result

PLANTED = llama(3, [3.0, 1.0]) | {"model.layers.1.self_attn.q_proj": [0.0, 0.0]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("adapters") / "mine", PLANTED)


@pytest.fixture(scope="module")
def card(adapter: Path) -> Path:
    return report(load(adapter), adapter.parent / "card.html")


def section(page: Path, name: str) -> Node:
    root = Tree(page.read_text(encoding="utf-8")).root
    return next(each for each in root.all("section") if each.attributes["id"] == name)


def rows(table: Node) -> list[list[str]]:
    return [[cell.text for cell in row.parts] for row in table.all("tr")]


def main(*words: object) -> int:
    return cli.main.main(list(map(str, words)))


def test_modules_on_the_page_are_those_of_the_inspection(adapter: Path, card: Path):
    measured = inspect(load(adapter)).modules
    (_, table) = section(card, "modules").all("table")
    head, *found = rows(table)
    assert [row[0] for row in found] == list(measured["module"])
    for name in ("update_norm", "energy", "effective_rank", "stable_rank", "rank", "parameters"):
        place = head.index(name.replace("_", " "))
        assert [row[place] for row in found] == [format_value(value) for value in measured[name]]
    # By hand: scale 2, singular values (3, 1) times the layer plus one.
    norms = dict(zip(measured["module"], [row[head.index("update norm")] for row in found], strict=True))
    assert norms["model.layers.2.mlp.up_proj"] == f"{2 * 3 * np.sqrt(10):.4g}"
    assert norms["model.layers.1.self_attn.q_proj"] == "0"
    pd.testing.assert_frame_equal(read(card).table("modules"), measured)


def test_findings_on_the_page_are_those_of_doctor_and_inspect(adapter: Path, card: Path):
    run = load(adapter)
    expected = {(each.id, each.message) for each in [*ls.diagnose(run), *inspect(run).details]}
    found = section(card, "findings").all("li")
    assert {(each.all("h3")[0].text.split()[0], each.all("p")[0].text) for each in found} == expected
    assert any("q_proj" in message for _, message in expected)
    assert [each.attributes["class"] for each in found] == sorted(
        (each.attributes["class"] for each in found), key=["error", "caution", "note"].index
    )


def test_page_has_every_figure_of_one_run_or_the_reason_for_its_absence(adapter: Path, card: Path):
    listed = available(load(adapter)).query("runs == 1")
    drawn = section(card, "figures").all("figure")
    assert len(drawn) == listed["drawable"].sum() > 3
    for each in drawn:
        assert [term.text for term in each.all("dt")] == ["How to read", "Caveat"]
        assert all(text.text for text in each.all("dd"))
    absent = section(card, "unchecked").all("table")[0].text
    assert all(name in absent for name in listed.loc[~listed["drawable"], "figure"])
    assert "no weight norms" in absent


def figure_names(run: Result) -> list[str]:
    return [figure["name"] for figure in collect([run]).document["figures"]]


def test_card_begins_with_where_update_and_rank_went_and_ends_with_figures_of_one_value(train_once: Any, adapter: Path):
    trained, _ = train_once("lora", ls.LoRA(rank=2))
    names = figure_names(trained)
    assert names[:3] == ["update_norm_heat", "rank_allocation", "update_norm"]
    assert figure_names(load(adapter))[:3] == ["update_norm_heat", "rank_allocation", "update_norm"]
    card = collect([trained])
    longest = [max(len(card.table(name)) for name in figure["tables"]) for figure in card.document["figures"]]
    of_one_value = [length <= 1 for length in longest]
    assert of_one_value == sorted(of_one_value)
    assert {"accuracy_by_parameters", "adapted_types"} <= set(names[longest.index(1) :])


def test_equal_cards_give_equal_pages_that_verify(adapter: Path, card: Path, tmp_path: Path):
    assert report(load(adapter), tmp_path / "again.html").read_bytes() == card.read_bytes()
    assert verify_card(card) == []
    assert card.stat().st_size < 6 * 2**20


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('<td class="n">18.97</td>', '<td class="n">18.98</td>'),
        ("LS007", "LS001"),
        ("How to read", "How to write"),
        ("<h1>mine</h1>", "<h1>theirs</h1>"),
        ('"layout":{', '"layout": {'),
        ("</body>", "<p>Approved.</p>\n</body>"),
        ("default-src 'none'", "default-src *"),
    ],
)
def test_every_change_of_the_page_is_found(old: str, new: str, card: Path, tmp_path: Path):
    text = card.read_text(encoding="utf-8")
    assert old in text
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert verify_card(changed)


def test_change_of_a_carried_table_is_found(card: Path, tmp_path: Path):
    text = card.read_text(encoding="utf-8")
    contents = read(card)
    table = contents.table("modules").assign(update_norm=1.0)
    file = tmp_path / "table.parquet"
    table.to_parquet(file)
    stored = base64.b64encode(contents.parquet["modules"]).decode()
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace(stored, base64.b64encode(file.read_bytes()).decode()), encoding="utf-8")
    assert any("18.97" in line for line in verify_card(changed))


def damage(card: Path, path: Path, kind: str) -> Path:
    text = card.read_text(encoding="utf-8")
    carried = json.loads(re.search(r'id="carried">(.*?)</script>', text)[1])  # type: ignore[index]
    if kind == "none":
        path.write_text("<html></html>", encoding="utf-8")
        return path
    if kind == "json":
        path.write_text(text.replace('id="carried">{', 'id="carried">['), encoding="utf-8")
        return path
    if kind == "base64":
        carried["tables"]["modules"] = "%%%"
    elif kind == "parquet":
        carried["tables"]["modules"] = base64.b64encode(b"PAR1 no").decode()
    elif kind == "rows":
        file = BytesIO()
        pd.DataFrame({"module": ["a"] * (MAX_ROWS + 1)}).to_parquet(file)
        carried["tables"]["modules"] = base64.b64encode(file.getvalue()).decode()
    elif kind == "types":
        carried["tables"]["modules"] = 5
    elif kind == "deep":
        path.write_text(re.sub(r'id="carried">.*?</script>', f'id="carried">{"[" * 10**5}</script>', text), "utf-8")
        return path
    elif kind == "document":
        carried["document"] = {"versions": carried["document"]["versions"]}
    elif kind == "chart":
        carried["document"]["figures"][0]["chart"]["rows"][0][0]["marks"][0]["kind"] = "Evil"
    else:
        carried["document"]["versions"]["plotly"] = "1.0"
    block = f'id="carried">{json.dumps(carried)}</script>'
    path.write_text(re.sub(r'id="carried">.*?</script>', lambda _: block, text), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "carries no tables"),
        ("json", "as JSON"),
        ("deep", "nested deeper"),
        ("types", "Expected `str`, got `int`"),
        ("base64", "base64"),
        ("rows", f"must have <= {MAX_ROWS} rows"),
        ("parquet", "cannot build"),
        ("document", "cannot build"),
        ("chart", "cannot build"),
        ("version", "plotly 1.0"),
    ],
)
def test_damaged_page_is_rejected_in_one_line(
    kind: str, message: str, card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main("report", "--verify", damage(card, tmp_path / "x.html", kind)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_hostile_file_is_rejected_with_little_memory(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.html")
    with (tmp_path / "sparse.html").open("wb") as file:
        file.truncate(MAX_PAGE + 1)
    (tmp_path / "starts.html").write_text('<script type="application/json" id="carried">' * 10**5, "utf-8")
    reasons = {"pipe": "not a regular file", "sparse": f"must be <= {MAX_PAGE} bytes", "starts": "Expecting value"}
    for name, reason in reasons.items():
        assert reason in outcome(lambda name=name: verify_card(tmp_path / f"{name}.html"), gigabytes=0.2)


def test_command_verifies_and_fails_on_a_change(card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changed = tmp_path / "changed.html"
    changed.write_text(card.read_text(encoding="utf-8").replace("LS007", "LS001", 1), encoding="utf-8")
    assert main("report", "--verify", card) == 0
    assert main("report", "--verify", card, changed) == 1
    assert "1 difference" in capsys.readouterr().out
    assert main("report", "--verify", card, changed, "--json") == 1
    assert [len(each) for each in json.loads(capsys.readouterr().out).values()] == [0, 1]


def test_several_adapters_are_shown_side_by_side(adapter: Path, tmp_path: Path):
    other = plant(tmp_path / "other", llama(3, [1.0, 1.0]))
    page = report([load(adapter), load(other)], tmp_path / "two.html")
    assert verify_card(page) == []
    kinds, pairs = section(page, "subjects").all("table")
    assert [row[0] for row in rows(kinds)[1:]] == ["mine", "other"]
    assert [row[:2] for row in rows(pairs)[1:]] == [["mine", "other"], ["other", "mine"]]
    modules = section(page, "modules").all("table")[1]
    assert [row[0] for row in rows(modules)[1:]] == ["mine"] * 12 + ["other"] * 12
    shown = section(page, "figures").all(class_="chart")
    assert any("Similarity of adapters" in each.attributes["aria-label"] for each in shown)


def test_adapters_of_different_models_have_no_pairs(adapter: Path, tmp_path: Path):
    factors = np.ones((30, 2), "f4"), np.ones((2, 12), "f4")
    other = peft_folder(tmp_path / "other", {"model.layers.0.mlp.up_proj": factors})
    page = report([load(adapter), load(other)], tmp_path / "two.html")
    assert len(section(page, "subjects").all("table")) == 1
    assert "comparison in pairs" in section(page, "unchecked").text


def test_adapter_cannot_occur_twice(adapter: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="duplicate adapter or run"):
        report([load(adapter), load(adapter)], tmp_path / "two.html")


def test_largest_figure_of_a_too_large_page_is_left_out_and_named(
    adapter: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lorascope.pages.report_card._PAGE_BYTES", card.stat().st_size - 1)
    page = report(load(adapter), tmp_path / "card.html")
    assert page.stat().st_size < card.stat().st_size
    assert verify_card(page) == []
    before, after = read(card).document["figures"], read(page).document["figures"]
    (left_out,) = {each["name"] for each in before} - {each["name"] for each in after}
    sizes = [len(each) for each in re.findall("<figure>.*?</figure>", card.read_text(encoding="utf-8"), re.DOTALL)]
    assert left_out == before[int(np.argmax(sizes))]["name"]
    assert f"lorascope plot {left_out}" in section(page, "unchecked").text
    assert read(page).parquet.keys() == {"modules", "roles"} | {name for each in after for name in each["tables"]}


def test_page_that_is_too_large_without_figures_has_none(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lorascope.pages.report_card._PAGE_BYTES", 0)
    page = report(load(adapter), tmp_path / "card.html")
    assert not section(page, "figures").all("figure")
    assert "lorascope plot spectrum" in section(page, "unchecked").text


def test_figure_with_more_values_than_a_page_can_show_is_not_drawn_on_it(
    adapter: Path, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counts = {}
    for figure in read(card).document["figures"]:
        counts[figure["name"]] = max(len(read(card).table(name)) for name in figure["tables"])
    largest = max(counts.values())
    monkeypatch.setattr("lorascope.pages.card._MOST_VALUES", largest - 1)
    page = report(load(adapter), tmp_path / "card.html")
    left = [name for name, count in counts.items() if count < largest]
    assert [figure["name"] for figure in read(page).document["figures"]] == left
    for name in counts.keys() - set(left):
        assert f"lorascope plot {name}" in read(page).document["unseen"][name]


def test_page_of_many_modules_shows_those_with_the_largest_updates_and_carries_all(tmp_path: Path):
    modules = list(llama(501, []))
    sizes = np.random.default_rng(0).permutation(np.linspace(0.1, 1, len(modules))).tolist()
    adapter = plant(tmp_path / "many", {module: [size] for module, size in zip(modules, sizes, strict=True)})
    page = report(load(adapter), tmp_path / "card.html")
    (_, table) = section(page, "modules").all("table")
    _, *found = rows(table)
    least = sorted(sizes)[-1000]
    assert [row[0] for row in found] == [name for name, size in zip(modules, sizes, strict=True) if size >= least]
    assert "1,000 of 2,004 modules" in section(page, "modules").text
    assert sorted(read(page).table("modules")["module"]) == sorted(modules)
    assert verify_card(page) == []


def test_hostile_names_stay_text(tmp_path: Path):
    name = f"model.layers.0.{EVIL.replace('.', '')}.q_proj"
    adapter = plant(tmp_path / "evil<b>", {name: [1.0, 0.5]}, base_model_name_or_path=EVIL)
    page = report(load(adapter), tmp_path / "card.html")
    text = page.read_text(encoding="utf-8")
    root = Tree(text).root
    assert not root.all("b")
    assert untreated(root.all("main")[0].text) <= {"\xa0"}
    assert verify_card(page) == []
    assert untreated(markdown(read(page))) == set()


def test_markdown_has_the_facts_the_findings_and_the_roles(
    adapter: Path, card: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main("report", adapter, "--markdown") == 0
    text = capsys.readouterr().out
    assert text == markdown(read(card))
    roles = inspect(load(adapter)).roles()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].replace("\\", "") for row in cells[1:]] == list(roles["role"])
    assert [row[cells[0].index("update norm")] for row in cells[1:]] == [f"{norm:.4g}" for norm in roles["update_norm"]]
    assert "LS007" in text
    file = report(load(adapter), tmp_path / "card.md")
    assert file.read_bytes() == seal(text.encode(), "md")
    report(load(adapter), file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PATH is required"),
        (["{adapter}", "-o", "card.txt"], "out must end in .html or .md, got card.txt"),
        (["{adapter}", "--markdown", "-o", "x.md"], "--markdown prints"),
        (["{adapter}", "--markdown", "--json"], "cannot be combined"),
        (["{adapter}", "--verify", "-o", "x.html"], "--verify takes report cards only"),
        (["{adapter}", "--verify"], "not a regular file"),
        (["{adapter}/nothing", "--verify"], "No such file"),
        (["{adapter}/nothing"], "nothing"),
    ],
)
def test_wrong_arguments_are_rejected_in_one_line(
    words: list[str], message: str, adapter: Path, capsys: pytest.CaptureFixture[str]
):
    assert main("report", *(word.format(adapter=adapter) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_foreign_file_is_not_overwritten(adapter: Path, tmp_path: Path):
    for name in ("mine.html", "mine.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match="not written by lorascope"):
            report(load(adapter), tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    with (tmp_path / "mine.html").open("wb") as file:
        file.truncate(20 * 2**30)
    assert "not written by lorascope" in outcome(lambda: report(load(adapter), tmp_path / "mine.html"))


def test_page_of_a_card_that_was_read_is_the_same(card: Path):
    assert seal(html(read(card)).encode(), "html") == card.read_bytes()
