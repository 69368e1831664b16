"""What ``inspect`` and ``plot`` show of a folder of checkpoints."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from planted import low_rank
from test_cli import modules_after, run
from test_series import Q, V, folder, write  # noqa: F401

import lorascope as ls
from lorascope.diagnosis.series_inspection import inspect_series

LONG = "base_model.encoder.a_very_long_prefix.of_many_parts.layers.1.self_attn.v_proj"


def test_screen_shows_first_and_last_and_what_still_moves(folder, capsys):  # noqa: F811
    code, out, err = run(capsys, "inspect", folder)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split(maxsplit=1) == ["out", "LoRA, rank 2, scale 1 (alpha 2)"]
    assert "checkpoints    3, steps 10 to 100" in lines
    rows = {words[0]: words[1:] for words in map(str.split, lines) if words[:1] in (["q"], ["v"])}
    # |dW| and effective rank of the first and the last, change from step 20 to 100, and the settling step
    assert rows == {
        "q": ["2.24", "5.00", "1.9", "2.0", "0.0%", "20"],
        "v": ["1.00", "5.00", "1.0", "2.0", "72.1%", "100"],
    }
    assert any(line.startswith("moves most") and line.endswith(f"72.1%  {V}") for line in lines)
    assert any(
        line.startswith("settled") and "1 of 2 modules before step 100, the first at step 20" in line for line in lines
    )
    assert all(len(line) <= 80 for line in lines[:-1])  # the command is not wrapped, because a shell reads it


def test_all_shows_one_line_per_module_and_formats_agree(folder, capsys):  # noqa: F811
    write(folder / "checkpoint-110", {Q: low_rank(3.0, 4.0), LONG: low_rank(1.0)})
    code, out, _ = run(capsys, "inspect", folder, "--all")
    assert code == 0
    assert any(line.startswith(Q) for line in out.splitlines())
    assert all(len(line) <= 80 for line in out.splitlines()[:-1])
    assert "absent         1 modules of other checkpoints, which the last one lacks" in out
    found = json.loads(run(capsys, "inspect", folder, "--json")[1])
    assert found["steps"] == [10, 20, 100, 110]
    assert [row["module"] for row in found["modules"]] == [Q, LONG]
    assert found["modules"][1]["first_norm"] is None
    assert found["modules"][1]["settled"] == 110
    table = list(csv.DictReader(run(capsys, "inspect", folder, "--csv")[1].splitlines()))
    assert [row["module"] for row in table] == [Q, LONG]
    assert [float(row["update_norm"]) for row in table] == pytest.approx([5.0, 1.0])


def test_final_adapter_names_its_checkpoints_and_series_shows_them(folder, capsys):  # noqa: F811
    for file in (folder / "checkpoint-100").iterdir():
        shutil.copy(file, folder)
    _, out, _ = run(capsys, "inspect", folder)
    assert "checkpoints    3, steps 10 to 100; --series shows them\n" in out
    assert "moves most" not in out
    _, out, _ = run(capsys, "inspect", folder, "--series")
    assert "moves most" in out
    assert f"next           lorascope plot settling {os.path.relpath(folder)} --series -o settling.pdf" in out.replace(
        str(folder), os.path.relpath(folder)
    )
    given = [folder / f"checkpoint-{step}" for step in (20, 100)]
    assert "checkpoints    2, steps 20 to 100\n" in run(capsys, "inspect", *given, "--series")[1]
    assert "checkpoints" not in run(capsys, "inspect", given[0])[1]


def test_next_command_of_many_checkpoints_draws_their_turning_points(tmp_path, capsys, monkeypatch):
    for number in range(1, 13):
        write(tmp_path / f"out/checkpoint-{10 * number}", {Q: low_rank(number, number % 3)})
    monkeypatch.chdir(tmp_path)
    *_, command = run(capsys, "inspect", tmp_path / "out")[1].split("lorascope ")
    assert command.strip() == "plot turns out -o turns.pdf"
    assert run(capsys, *command.split())[0] == 0
    (tmp_path / "out/checkpoint-60").rename(tmp_path / "out/checkpoint-61")
    assert "plot settling out" in run(capsys, "inspect", tmp_path / "out")[1]


def test_skipped_checkpoint_is_named(folder, capsys):  # noqa: F811
    (folder / "checkpoint-20/adapter_model.safetensors").unlink()
    code, out, err = run(capsys, "inspect", folder)
    assert (code, err) == (0, "")
    assert "skipped        cannot read" in out  # the path may be on the next line
    assert "checkpoint-20" in out
    code, out, err = run(capsys, "plot", "norm_over_steps", folder, "-o", folder.parent / "norms.csv")
    assert code == 0
    assert err.startswith("lorascope: skipped a checkpoint: cannot read ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "out", "--null"], "--null requires one adapter or run"),
        (["inspect", "one"], "one checkpoint, one/checkpoint-3; inspect that"),
        (["inspect", "empty", "--series"], "cannot load a series from empty: it has no checkpoints"),
        (
            ["export", "out", "--peft", "new"],
            "cannot export the series out: load one checkpoint, such as out/checkpoint-100",
        ),
    ],
)
def test_bad_input_is_reported_in_one_line(words, message, folder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder.parent)
    write(Path("one/checkpoint-3"), {Q: low_rank(1.0)})
    Path("empty").mkdir()
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "figure", ["norm_over_steps", "rank_replay", "settling", "rotation", "spectrum", "update_norm"]
)
def test_figures_of_a_series_are_drawn(figure, folder, capsys):  # noqa: F811
    file = folder.parent / f"{figure}.csv"
    assert run(capsys, "plot", figure, folder, "-o", file)[0] == 0
    assert len(file.read_text().splitlines()) > 1
    for each in (folder / "checkpoint-100").iterdir():
        shutil.copy(each, folder)
    again = folder.parent / "again.csv"
    assert run(capsys, "plot", figure, folder, "--series", "-o", again)[0] == 0
    assert again.read_text() == file.read_text()


def test_doctor_of_a_series_diagnoses_the_last_checkpoint(folder, capsys):  # noqa: F811
    write(folder / "checkpoint-110", {Q: low_rank(0.0, 0.0), V: low_rank(1.0, float("nan"))})
    code, out, err = run(capsys, "doctor", folder)
    assert (code, err) == (1, "")
    assert "NaN" in out


def test_inspection_of_a_series_reads_every_checkpoint_once_for_the_distances(folder):  # noqa: F811
    series = ls.load(folder)
    found = inspect_series(series)
    assert found.last.name == "checkpoint-100"
    assert "measures" not in vars(series.checkpoints[20])


def test_series_is_inspected_without_pandas(folder):  # noqa: F811
    call = "import sys; from lorascope.cli.main import main; main(sys.argv[1:])"
    assert "pandas.core" not in modules_after(call, "inspect", str(folder))
    assert "pandas.core" in modules_after(call, "inspect", "--csv", str(folder))


def test_doctor_checks_the_last_checkpoint_of_a_series(folder, capsys):  # noqa: F811
    alone = run(capsys, "doctor", folder / "checkpoint-100")
    code, out, err = run(capsys, "doctor", folder)
    assert (code, err) == (alone[0], "")
    assert out.splitlines()[1:] == alone[1].splitlines()[1:]


def test_series_next_to_an_adapter_has_the_method_of_its_last_checkpoint(folder, capsys):  # noqa: F811
    _, out, _ = run(capsys, "inspect", folder, folder / "checkpoint-20")
    assert [line.split()[2] for line in out.splitlines()[1:3]] == ["LoRA", "LoRA"]
