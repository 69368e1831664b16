"""The list of the papers' figures: complete, in step with the drawn images, and found by arXiv id and by name."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lorascope import plots
from lorascope.papers.judging.data_folder import PAPERS
from lorascope.plots.paper_figures import FILE

ROOT = Path(__file__).parents[1]
ALL = pd.read_csv(ROOT / "data" / "paper-figures.csv", keep_default_na=False)


@pytest.mark.parametrize("paper", ["2303.10512", "arXiv:2303.10512", "AdaLoRA", "adalora"])
def test_figures_are_found_by_id_and_by_name(paper: str) -> None:
    table = plots.by_paper(paper)
    assert list(table) == ["shows", "function", "image", "state", "note"]
    assert table.index.tolist() == ALL.loc[ALL["paper"] == "AdaLoRA", "item"].tolist()
    assert table.loc["figure 3", "function"] == "rank_allocation"
    assert table.loc["figure 3", "image"] == "rank-allocation rank-domains"
    assert table.loc["tables 2, 3", "state"] == "missing"
    assert "ROUGE" in table.loc["tables 2, 3", "note"]
    assert "ROUGE" in repr(table)


@pytest.mark.parametrize("paper", ["2303.10513", "", "PiSSA"])
def test_an_unknown_paper_is_one_line_with_the_nine_ids(paper: str) -> None:
    with pytest.raises(ValueError, match=rf"^unknown paper '{paper}'; expected ") as raised:
        plots.by_paper(paper)
    assert "\n" not in str(raised.value)
    for name, arxiv in PAPERS.items():
        assert f"{arxiv} ({name})" in str(raised.value)


def test_every_paper_has_its_id_and_every_function_exists() -> None:
    assert FILE.samefile(ROOT / "data" / "paper-figures.csv")
    pairs = ALL[["paper", "arxiv"]].astype(str).drop_duplicates()
    assert dict(pairs.to_numpy()) == PAPERS
    functions = {name for names in ALL["function"] for name in names.split()}
    assert functions <= set(dir(plots))
    assert len(functions) >= 20


def test_items_are_done_if_one_of_their_images_is_drawn() -> None:
    images = {file.stem for file in (ROOT / "figures").glob("*.png")}
    for row in ALL.itertuples():
        if row.state in ("done", "runs open"):
            assert (row.state == "done") == bool(images.intersection(row.image.split())), (row.paper, row.item)
        assert row.note or row.state in ("done", "runs open"), row.item


def test_the_page_has_the_rows_of_every_paper() -> None:
    page = (ROOT / "docs" / "figures-of-papers.md").read_text(encoding="utf-8")
    for name, arxiv in PAPERS.items():
        section = page.partition(f"## {name}: [arXiv {arxiv}]")[2].partition("\n## ")[0]
        assert section.count("\n| ") == 1 + len(plots.by_paper(arxiv)), name  # with the header
