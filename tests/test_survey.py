"""``lorascope survey``: rows equal those of inspect, are read one by one, and report what cannot be read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from joblib.parallel import get_active_backend
from test_inspect import llama, plant
from test_loading import write_run

from lorascope.cli import survey as survey_command
from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.survey import find_adapters, survey
from lorascope.files.safetensors_io import write_tensors
from lorascope.runs.loading import load


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Return a folder with three adapters, one of them broken, a run, and files that are none of these."""
    folder = tmp_path / "all"
    plant(folder / "a", llama(2, [1.0, 0.5, 0.2, 0.1]))
    plant(folder / "a" / "checkpoint-10", llama(2, [1.0, 0.5, 0.2, 0.1]))
    plant(folder / "deep" / "b", llama(1, [0.0, 0.0, 0.0, 0.0]))
    plant(folder / ".cache" / "hidden", llama(1, [3.0, 0.0, 0.0, 0.0]))
    broken = plant(folder / "c", llama(1, [1.0, 1.0])) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-5])
    write_run(folder / "run")
    shutil.copy(folder / "a" / "adapter_model.safetensors", folder / "single.safetensors")
    write_tensors(folder / "model.safetensors", {"h.0.q.weight": np.ones((4, 4), np.float32)}, {})
    (folder / "notes.txt").write_text("nothing")
    return folder


def test_adapters_and_runs_are_found_without_those_inside_of_them(collection: Path) -> None:
    found = [str(path.relative_to(collection)) for path in find_adapters(collection)]
    assert found == ["single.safetensors", "a", "c", "deep/b", "run"]


def test_rows_equal_those_of_inspect(collection: Path) -> None:
    rows = {Path(row.path).name: row for row in survey(find_adapters(collection))}
    assert "truncated" in rows.pop("c").error
    for name, row in rows.items():
        item = inspect(load(row.path))
        assert row.error == ""
        assert row.modules == len(item.modules)
        assert row.update_norm == pytest.approx(np.sqrt((item.modules["update_norm"] ** 2).sum()), rel=1e-12), name
        assert row.effective_rank == pytest.approx(item.modules["effective_rank"].mean(), rel=1e-12)
        assert row.parameters == item.modules["parameters"].sum()
    assert (rows["a"].least_rank, rows["a"].most_rank, rows["a"].kind) == (4, 4, "LoRA")
    assert rows["b"].findings == "untrained"


def test_a_single_path_is_one_adapter(collection: Path) -> None:
    assert list(survey(str(collection / "a"))) == list(survey([collection / "a"]))


def test_ranks_of_the_narrowest_and_the_widest_module_are_shown(tmp_path: Path) -> None:
    spectra = {"model.layers.0.self_attn.q_proj": [1.0, 0.5, 0.2], "model.layers.0.self_attn.v_proj": [1.0]}
    plant(tmp_path / "a", spectra, rank_pattern={"v_proj": 1})
    (row,) = survey([tmp_path / "a"])
    assert (row.least_rank, row.most_rank, row.base) == (1, 3, "org/base")


def test_an_adapter_is_read_when_its_row_is_asked_for(collection: Path) -> None:
    rows = survey([collection / "a", collection / "deep" / "b"])
    assert next(rows).modules
    shutil.rmtree(collection / "deep")
    (last,) = rows
    assert str(collection / "deep" / "b") in last.error


@pytest.mark.slow
def test_rows_of_processes_equal_those_of_one(collection: Path) -> None:
    alone = list(map(repr, survey(find_adapters(collection))))
    with parallel_config("loky", n_jobs=2):
        assert list(map(repr, survey(find_adapters(collection)))) == alone


def test_command_prints_a_line_each_and_names_what_it_cannot_read(
    collection: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(collection)
    assert main(["survey", "."]) == 1
    printed = capsys.readouterr()
    head, *lines = printed.out.splitlines()
    assert head.split() == ["path", "kind", "rank", "modules", "|dW|", "eff", "findings"]
    # 2 sqrt(1 + 0.25 + 0.04 + 0.01) sqrt(4 (1 + 4)), and exp of the entropy of (10, 5, 2, 1) / 18.
    assert lines[1].split() == ["a", "LoRA", "4", "8", "10.2", "3.0"]
    assert lines[2].split() == ["c", "-", "-", "-", "-", "-", "unreadable"]
    (reason,) = printed.err.splitlines()
    assert reason.startswith("lorascope: cannot read c")
    assert "truncated" in reason
    assert main(["survey", ".", "--csv"]) == 1
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert main(["survey", ".", "--json"]) == 1
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        list(table["path"]) == [each["path"] for each in objects] == ["single.safetensors", "a", "c", "deep/b", "run"]
    )
    assert objects[2]["modules"] is None
    assert table["update_norm"].to_numpy()[1] == objects[1]["update_norm"]


def test_faults_and_prompts_have_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path / "a\nb", llama(1, [1.0, 1.0]), r=7)
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    (prompt / "adapter_config.json").write_text('{"peft_type": "P_TUNING"}', encoding="utf-8")
    write_tensors(prompt / "adapter_model.safetensors", {"prompt_embeddings": np.ones((2, 3), np.float32)}, {})
    assert main(["survey", str(prompt)]) == 0
    assert main(["survey", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    *_, fault, trained = (line[34:].split() for line in printed.out.splitlines())
    assert fault == ["-", "-", "-", "-", "-", "rank-mismatch"]
    assert trained == ["P_TUNING", "-", "0", "-", "-"]
    (reason,) = printed.err.splitlines()
    assert r"a\nb" in reason
    assert "must have rank 7" in reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PATH is required"),
        (["absent"], "cannot read absent: there is no such file or folder"),
        (["empty"], "no adapter or run in empty"),
        (["empty", "--json", "--csv"], "cannot be combined"),
        (["empty", "--backend", "nonsense"], "nonsense"),
        (["empty", "--jobs", "0"], "jobs must be a nonzero integer (number of parallel runs), at most 10000, got 0"),
        (["empty", "--jobs", "99999999999999999999"], "at most 10000, got 99999999999999999999"),
    ],
)
def test_wrong_use_gets_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["survey", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("words", "expected"), [(["--jobs", "3"], 3), (["--backend", "loky", "--jobs", "2"], 2), ([], 1)]
)
def test_jobs_is_the_number_of_workers_of_joblib(
    words: list[str], expected: int, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(survey_command, "survey", lambda *given: seen.append(get_active_backend()[1]) or survey(*given))
    with parallel_config(n_jobs=1):
        assert main(["survey", str(collection / "a"), *words]) == 0
    assert seen == [expected]


def test_item_that_needs_an_extra_does_not_end_the_survey(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_pyarrow(path: Path, base: object) -> None:
        raise ModuleNotFoundError(name="pyarrow")

    monkeypatch.setattr("lorascope.diagnosis.survey.load", needs_pyarrow)
    (row,) = survey([collection / "run"])
    assert row.error == "requires pyarrow: pip install 'lorascope[runs]'"
