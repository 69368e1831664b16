"""Export of tables, read back by pandas and json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import low_rank, plant
from test_cli import complaint, run
from test_loading import save

import lorascope as ls
from lorascope.export import tables, to_table
from lorascope.extras import requirement

VALUES = {
    ("loss", ""): {0: 0.1 + 0.2, 1: 1 / 3, 2: 1e-300},
    ("eval_metric", ""): {2: np.inf},
    ("update_norm", "h.0.q"): {0: 0.0, 2: np.pi},
    ("importance", "h.0.q"): {2: np.array([0.1, 0.7])},
    ("update_norm", "words"): {2: float(np.float32(0.1))},  # no layer
}


@pytest.fixture
def planted(tmp_path: Path) -> ls.Run:
    factors = {"h.0.q": low_rank(2.0, 1.0), "h.1.q": low_rank(1 / 3)}
    return plant(tmp_path, "run", VALUES, factors=factors, label="LoRA, “rank” 2")


def table_of(found: ls.Run, summary: bool) -> pd.DataFrame:
    return found.summary() if summary else found.table


@pytest.mark.parametrize("summary", [False, True], ids=["long", "summary"])
def test_parquet_round_trip_is_exact(summary: bool, planted: ls.Run, tmp_path: Path) -> None:
    out = to_table(planted, tmp_path / "new" / "out.parquet", summary)
    expected = table_of(planted, summary)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected, check_exact=True)
    assert pd.read_parquet(out)["layer"].dtype == "Int16"
    assert sorted(file.name for file in out.parent.iterdir()) == ["out.parquet"]


@pytest.mark.parametrize("summary", [False, True], ids=["long", "summary"])
def test_csv_preserves_every_digit(summary: bool, planted: ls.Run, tmp_path: Path) -> None:
    expected = table_of(planted, summary)
    text = pd.read_csv(to_table(planted, tmp_path / "out.csv", summary), dtype=str, keep_default_na=False)
    assert list(text) == list(expected)
    for name in expected:
        there = expected[name].notna()
        assert (text[name][~there] == "").all()
        kept = expected[name][there]
        kind = kept.dtype if kept.dtype != "category" and kept.dtype != bool else str
        assert text[name][there].astype(kind).tolist() == kept.astype(kind).tolist()


@pytest.mark.parametrize("summary", [False, True], ids=["long", "summary"])
def test_json_is_strict_records(summary: bool, planted: ls.Run, tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = to_table(planted, tmp_path / "out.json", summary).read_text(encoding="utf-8")
    rows = json.loads(text, parse_constant=refuse)
    expected = table_of(planted, summary)
    assert [list(row) for row in rows] == [list(expected)] * len(expected)
    for name in expected:
        for value, row in zip(expected[name], rows, strict=True):
            if pd.isna(value):
                assert row[name] is None
            elif isinstance(value, float) and np.isinf(value):
                assert float(row[name]) == value
            else:
                assert row[name] == value
                assert isinstance(row[name], bool) == isinstance(value, bool | np.bool_)


def test_to_table_of_an_adapter(tmp_path: Path) -> None:
    save(tmp_path / "adapter", target_modules=["q_proj"], r=2)
    found = ls.load(tmp_path / "adapter")
    for summary in (False, True):
        out = to_table(found, tmp_path / f"{summary}.parquet", summary)
        pd.testing.assert_frame_equal(pd.read_parquet(out), table_of(found, summary), check_exact=True)


def test_export_command_writes_tables(planted: ls.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert run(capsys, "export", planted.path, "--table", out) == (0, f"{out}\n", "")
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1 + len(planted.table)
    told = run(capsys, "export", planted.path, "--table", tmp_path / "modules.json", "--summary", "--json")
    assert (told[0], json.loads(told[1])) == (0, {"id": "run", "path": str(tmp_path / "modules.json")})
    assert len(json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))) == len(planted.summary())


def test_export_command_wrong_use_prints_one_line_and_writes_no_file(
    planted: ls.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.csv"
    there.write_text("mine")
    words = ("export", planted.path)
    assert "there.csv: it exists, pass a new path" in complaint(capsys, *words, "--table", there)
    (dangling := tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    assert "dangling.csv: it exists, pass a new path" in complaint(capsys, *words, "--table", dangling)
    dangling.unlink()
    for name in ("out.xlsx", "out", "out.CSV"):
        told = complaint(capsys, *words, "--table", tmp_path / name)
        suffix = Path(name).suffix
        assert (
            told == f"ending of the table must be one of '.csv', '.parquet', '.json', got '{suffix}': {tmp_path / name}"
        )
    assert "--mlx DIR and --table FILE is required, got 2" in complaint(
        capsys, *words, "--table", tmp_path / "x.csv", "--rank-pattern"
    )
    assert "--summary requires --table" in complaint(capsys, *words, "--rank-pattern", "--summary")
    assert "--state requires --summary with --table" in complaint(
        capsys, *words, "--table", tmp_path / "x.csv", "--state", "best"
    )
    assert there.read_text(encoding="utf-8") == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "there.csv"]


def test_parquet_without_pyarrow_names_the_extra(planted: ls.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    table = planted.table  # reading it needs pyarrow as well
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        tables._encode_parquet(table)
    assert requirement(caught.value) == "requires pyarrow: pip install 'lorascope[runs]'"
