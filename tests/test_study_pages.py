"""Blocks of README and docs: their numbers are in the results, and a page that differs is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import write_pages
from made_up_study import made_up, planted
from page_blocks import format_table
from question_pages import question_blocks
from study_pages import StudyPages, study_blocks
from test_study_judging import SITUATIONS, effects_of, with_all_seeds

from lorascope.papers.judging import kept_study, registered_study
from lorascope.papers.judging.csv_tables import to_csv
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.study_results import compute
from lorascope.papers.registry import COMPARISONS

ROOT = Path(__file__).parents[1]
REGISTERED = with_all_seeds(registered_study.read())
UNLEARNED = "HydraLoRA, 4 experts of rank 4, tasks share A"


def copy_clone(root: Path) -> Path:
    """Copy the pages, and the data that their blocks follow from."""
    shutil.copytree(ROOT / "data", root / "data")
    (root / "figures").symlink_to(ROOT / "figures")
    (root / "docs" / "papers").mkdir(parents=True)
    for page in write_pages.pages(ROOT):
        shutil.copy(page, root / page.relative_to(ROOT))
    return root


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = copy_clone(tmp_path / "clone")
    assert write_pages.main([], root) == 0
    return root


def complete_study() -> tuple[StudyEvidence, pd.DataFrame]:
    """Return evidence and results of all claims, which are as claimed except where one arm did not learn."""
    pieces, results = [], []
    for id in REGISTERED.claims:
        comparison, kind = COMPARISONS[id], REGISTERED.claims[id].rule.kind
        effects = effects_of(REGISTERED, id, comparison, SITUATIONS[kind]["true"])
        piece = made_up(REGISTERED, id, comparison, effects)
        is_unlearned = (piece.runs["arm"] == UNLEARNED) & (piece.runs["seed"] == FIRST_SEED + 7)
        piece.runs.loc[is_unlearned, "gap"] = piece.runs.loc[is_unlearned, "base_gap"]
        pieces.append(piece)
        results.append(compute(REGISTERED, {id: planted(comparison)}, piece).results)
    runs = pd.concat([piece.runs for piece in pieces]).drop_duplicates(["arm", "seed"], ignore_index=True)
    return StudyEvidence(runs), pd.concat(results, ignore_index=True)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clone with a made-up study of all claims."""
    root = copy_clone(tmp_path_factory.mktemp("complete") / "clone")
    evidence, results = complete_study()
    folder = root / "data" / "evidence-2"
    for file in folder.glob("*.parquet"):
        file.unlink()
    kept_study.write(folder, evidence)
    (folder / "results.csv").write_bytes(to_csv(results))
    return root


def cells(block: str, first: str) -> dict[str, str]:
    """Return the cells of the only row whose first cell starts so, by their column."""
    found = []
    for table in block.split("\n\n"):
        header, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        found += [dict(zip(header, row, strict=True)) for row in rows if row[0].startswith(first)]
    (row,) = found
    return row


def test_answered_question_has_its_numbers(tmp_path: Path) -> None:
    root = copy_clone(tmp_path / "clone")
    file = root / "data" / "instruments" / "evidence" / "results.csv"
    results = pd.read_csv(file).set_index("claim")
    answer = {"n": 32, "effect": 1.254, "low": 1.113, "high": 1.395, "word": "gain"}
    answer |= {"positive_effect": 2.5, "positive_low": 2.0, "positive_high": 3.0}
    for name, value in answer.items():
        results[name] = results[name].astype(object)
        results.loc["instruments.forks", name] = value
    file.write_bytes(to_csv(results.reset_index()))
    row = cells(question_blocks(root)["questions"], "`instruments.forks`")
    assert (row["effect [95%]"], row["positive control"]) == ("+1.25 [1.11, 1.40]", "+2.50 [2.00, 3.00]")
    assert (row["instrument"], row["bound"], row["word"]) == ("[forks](forks.md)", "gain 0.5 doublings", "gain")


def test_pages_of_the_repository_agree_with_its_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_pages.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_pages_of_a_complete_study_have_its_numbers(complete: Path) -> None:
    assert write_pages.main([], complete) == 0
    for page in (complete / "docs" / "papers").glob("*.md"):
        assert len(page.read_text("utf-8").splitlines()) <= 120, page.name
    blocks = study_blocks(complete)
    results = StudyPages(complete).by_claim
    for id, result in results.items():
        row = cells(blocks["results"], f"`{id}`")
        seeds = REGISTERED.claims[id].rule.seeds
        assert row["seeds"] == f"{seeds} of {seeds}"
        if result["word"] == "not learned":
            assert row["word"] == "not learned: HydraLoRA, 4 experts of rank 4, tasks share A, seed 207"
            assert row["effect [95%]"] == ""
            continue
        numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", row["effect [95%]"])]
        assert numbers == pytest.approx([result["effect"], result["low"], result["high"]], abs=0.051)
        assert row["excludes 0"] == result["excludes_zero"]
        assert row["word"] == (result["pair"] or result["word"])
    assert {result["word"] for result in results.values()} == {"gain", "no cost", "not learned"}
    assert "- 13 pairs of planted teachers: 11 as claimed, 2 not learned\n" in blocks["counts"]
    assert cells(blocks["headline"], "[AdaLoRA]")["truth for / against"].startswith("+6.0 / ")
    assert cells(blocks["headline"], "[HydraLoRA]")["truth for / against"] == "not learned"


@pytest.mark.slow
def test_arms_that_did_not_learn_are_named_with_their_seed(complete: Path) -> None:
    blocks = study_blocks(complete)
    unlearned = cells(blocks["hydralora-learned"], UNLEARNED)
    runs = REGISTERED.arms[UNLEARNED].seeds
    assert (unlearned["learned"], unlearned["lowest"]) == (f"{runs - 1} of {runs}", "0.0 (seed 207)")
    # Arms that differ in the task only are one row.
    single = cells(blocks["hydralora-learned"], "LoRA, rank 4, one task only, tasks share A")
    runs = sum(REGISTERED.arms[f"LoRA, rank 4, task {task} only, tasks share A"].seeds for task in range(1, 5))
    assert (single["runs"], single["learned"]) == (str(runs), "all")
    headroom = cells(blocks["adalora-learned"], "`pair.adalora`")
    assert (headroom["positive control"], headroom["headroom"]) == ("LoRA, planted ranks, uneven ranks", "yes")
    assert headroom["effect [95%]"].startswith("+6.0 [")


@pytest.mark.slow
def test_parts_without_a_claim_are_shown_with_their_interval(complete: Path) -> None:
    study = StudyPages(complete)
    study.registration = REGISTERED
    runs = study.evidence.runs
    method, control = "AdaLoRA, rank 4 to 2, uneven ranks", "AdaLoRA, rank 2 to 2, uneven ranks"
    ours = runs[runs["arm"] == method]
    theirs = ours.assign(arm=control, run="x" + ours["run"], gap=ours["gap"] + 0.05 * ours["base_gap"])
    study.evidence = StudyEvidence(pd.concat([runs, theirs], ignore_index=True))
    claim = REGISTERED.claims["pair.adalora"]
    _, table = study.parts("AdaLoRA", [claim])
    row = cells(table, "AdaLoRA, rank 4 to 2 minus AdaLoRA, rank 2 to 2")
    assert list(row.values())[1:] == ["uneven ranks", "+5.0 [5.0, 5.0]", str(len(ours))]


def test_numbers_changed_in_blocks_are_named_and_written_again(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        ("README.md", "headline", "-1.46", "-1.45"),
        ("docs/edition-1.md", "edition-1-verdicts", "0.0675", "0.0685"),
        ("docs/findings.md", "results", "gain 0.3 log10", "gain 0.2 log10"),
        ("docs/papers/neft.md", "neft-edition-1", "-0.0146", "0.0146"),
    ]
    original, places = {page: (clone / page).read_text("utf-8") for page, *_ in changes}, []
    for page, block, old, new in changes:
        content = original[page]
        (clone / page).write_text(content.replace(old, new, 1), "utf-8")
        places.append(f"{clone / page}:{content[: content.index(old)].count(chr(10)) + 1}: block {block}: kept ")
    capsys.readouterr()
    assert write_pages.main(["--check"], clone) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(changes)
    for place in places:
        assert sum(line.startswith(place) for line in lines) == 1
    assert write_pages.main([], clone) == 0
    assert original == {page: (clone / page).read_text("utf-8") for page in original}


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("<!-- evidence state -->", "<!-- evidence stat -->", "unknown block 'stat'"),
        ("<!-- /evidence -->", "", "<!-- evidence state --> has no counterpart"),
        ("<!-- evidence state -->\n\n", "<!-- evidence state --> ", "<!-- evidence state --> has no counterpart"),
        ("## State", "<!-- evidence counts -->\n<!-- /evidence -->\n", "block counts"),
    ],
)
def test_damaged_blocks_are_named(
    clone: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, error: str
) -> None:
    page = clone / "docs" / "evidence.md"
    page.write_text(page.read_text("utf-8").replace(before, after), "utf-8")
    capsys.readouterr()
    assert write_pages.main(["--check"], clone) == 1
    assert error in capsys.readouterr().err


def test_deleted_pages_and_damaged_files_are_differences(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / "docs" / "papers" / "lisa.md").unlink()
    assert write_pages.main(["--check"], clone) == 1
    assert "README.md or docs: block 'lisa-claims' is missing" in capsys.readouterr().err
    (clone / "data" / "evidence-2" / "results.csv").write_bytes(b"claim,n\n")
    assert write_pages.main(["--check"], clone) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "results.csv" in error


def test_empty_columns_of_a_table_are_left_out() -> None:
    assert format_table(("a", "b", "c"), [(1, "", 2), (3, "", "")]) == "| a | c |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
