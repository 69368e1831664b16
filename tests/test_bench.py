"""``benchmarks/bench.py``: verdicts of lines, scripts in their own process, stored results and their page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import bench
import numpy as np
import pytest
from benchmark_page import page
from measurements import MeasuredLine, find_scripts, read

ROOT = Path(__file__).parents[1]

GOOD = '''"""Time of one thing compared with ``another``.

The text of the section.
"""
import sys
sys.path.insert(0, BENCHMARKS)
from paired import MeasuredLine, report

def lines(pairs):
    yield MeasuredLine(what="one / another", case="few", value=0.9712, low=0.9, high=1.02, pairs=pairs, aim=1)
    yield MeasuredLine(what="seconds", value=12.345, unit="s", pairs=1)
    yield MeasuredLine(what="one / another", case="many", value=1.5, low=1.4, high=1.6, pairs=pairs, aim=1)

report(lines, __doc__)
'''
BAD = "def lines(pairs):\n    pass\n\nraise ModuleNotFoundError(\"No module named 'peers'\")\n"


def line(value: float, low: float | None = None, high: float | None = None, **more) -> MeasuredLine:
    return MeasuredLine(what="x", value=value, low=low, high=high, pairs=40, **more)


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (line(1.0, 0.9, 1.03, aim=1), "met"),
        (line(1.0, 0.9, 1.031, aim=1), "missed"),
        (line(1.001, 1.0, 1.002, aim=1), "missed"),
        (line(10, 9.8, 11, aim=10, at_least=True), "met"),
        (line(10, 9.7, 11, aim=10, at_least=True), "missed"),
        (line(9.9, 9.8, 11, aim=10, at_least=True), "missed"),
        (line(0.3, aim=0.3), "met"),
        (line(0.31, aim=0.3), "missed"),
        (line(5), "no aim"),
    ],
)
def test_an_aim_is_met_if_the_interval_misses_it_by_three_percent_at_most(measured, verdict):
    assert measured.verdict == verdict


def test_values_have_the_digits_that_comparisons_need():
    shown = [line(value).measured for value in (0.0221, 1.0034, 2.345, 45.67, 1034.5)]
    assert shown == ["0.022", "1.003", "2.35", "45.7", "1034"]
    assert line(0.5, 0.4, 0.6, unit="s").measured == "0.500 [0.400, 0.600] s"
    assert line(12.5, unit="%").measured == "12.5%"
    assert line(0.5, aim=2.5, unit="s").goal == "at most 2.5 s"
    assert line(0.5, aim=1000, at_least=True).goal == "at least 1000"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one benchmark that works, one that fails, and a script that is none."""
    for name in ("benchmarks", "data", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "benchmarks" / "good.py").write_text(GOOD.replace("BENCHMARKS", repr(str(ROOT / "benchmarks"))))
    (tmp_path / "benchmarks" / "other.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    return tmp_path


def test_results_are_printed_stored_and_written_to_the_page(clone: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--pairs", "7", "--write"]) == 0
    out = capsys.readouterr().out
    assert [" ".join(each.split()) for each in out.splitlines()] == [
        "one / another, few 0.971 [0.900, 1.020] met, aim at most 1",
        "seconds 12.3 s",
        "one / another, many 1.500 [1.400, 1.600] missed, aim at most 1",
        "1 of 2 aims met.",
    ]
    (stored,) = read(clone / bench.STORED).values()
    assert [(each.case, each.value, each.pairs) for each in stored.lines] == [
        ("few", 0.9712, 7),
        ("", 12.345, 1),
        ("many", 1.5, 7),
    ]
    assert {"python", "numpy", "torch"} <= stored.versions.keys()
    text = (clone / bench.PAGE).read_text(encoding="utf-8")
    assert "## Time of one thing compared with `another`\n\nThe text of the section.\n" in text
    assert (
        "| one / another | few: 0.971 [0.900, 1.020]; many: 1.500 [1.400, 1.600] **missed** | 7 | at most 1 |" in text
    )
    assert "**1 of 2 aims are met**" in text
    assert f"{stored.date}, {stored.machine}; python {stored.versions['python']}" in text


def test_json_has_lines_verdicts_machine_and_versions(clone: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["good", "--pairs", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["good"]
    assert [each["verdict"] for each in found["lines"]] == ["met", "no aim", "missed"]
    assert found["machine"]
    assert found["versions"]["numpy"] == np.__version__
    assert not (clone / bench.STORED).exists()


def test_a_script_that_fails_is_named_and_the_others_are_kept(clone: Path, capsys: pytest.CaptureFixture[str]):
    (clone / "benchmarks" / "bad.py").write_text(BAD)
    assert bench.main(["--pairs", "3", "--write"]) == 1
    assert "bad failed: ModuleNotFoundError: No module named 'peers'\n" in capsys.readouterr().err
    assert [*read(clone / bench.STORED)] == ["good"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["goood"], "unknown benchmark 'goood'; did you mean 'good'?"),
        (["--pairs", "0"], "--pairs must be >= 1, got 0"),
    ],
)
def test_wrong_arguments_get_one_line(clone: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert bench.main(words) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"


def test_the_page_of_the_docs_follows_from_the_stored_results():
    scripts, stored = find_scripts(ROOT / "benchmarks"), read(ROOT / bench.STORED)
    assert stored.keys() == scripts.keys()
    assert (ROOT / bench.PAGE).read_text(encoding="utf-8") == page(stored, scripts)


@pytest.mark.parametrize(("turns", "steps"), [(1, 10), (5, 2)])
def test_a_machine_that_slows_down_favors_one_function_by_one_turn_only(
    turns: int, steps: int, monkeypatch: pytest.MonkeyPatch
):
    """Both functions take the same steps, and each step takes a hundredth longer than the one before."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    paired, calls, times = importlib.import_module("paired"), [], [1.0]

    def call(name: str) -> None:
        calls.append(name)
        times.extend(times[-1] * 1.01 ** np.arange(1, steps + 1))

    settings = {"pairs": 4, "warmup": 1, "clock": lambda: sum(times), "turns": turns}
    ratio = paired.compare(lambda: call("a"), lambda: call("b"), **settings)
    assert "".join(calls) == "ab" * turns + ("ba" * turns + "ab" * turns) * 2
    assert (ratio.low, ratio.high) == pytest.approx((1.01**-steps, 1.01**steps))
    sys.modules.pop("paired")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectra", "import_time"])
def test_a_benchmark_of_the_repository_runs(name: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main([name, "--pairs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[name]["lines"]
