"""An own seed of one claim: trained as for the evidence, compared with the kept seeds, never added to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from joblib import parallel_config
from test_evidence_training import PAIRS, SEEDS, Study, finished, planted, study, trained  # noqa: F401

from lorascope.cli import main as cli
from lorascope.cli import reproduce as command
from lorascope.papers.judging import csv_tables, kept_runs
from lorascope.papers.training import own_seeds

MINE = 31


@pytest.fixture
def kept(finished: Study, monkeypatch: pytest.MonkeyPatch) -> Study:  # noqa: F811
    """Evidence of three seeds, in a folder ``data``."""
    monkeypatch.setattr(own_seeds, "PAIRS", PAIRS)
    return finished


def train_own(kept: Study, claim: str, seed: int = MINE) -> own_seeds.OwnSeeds:
    data, mine = kept.folder.parent, kept.folder.parent / "mine"
    with parallel_config(n_jobs=1):
        planned = own_seeds.plan(claim, seed, mine, data)
        planned.train(mine / "runs")
    assert own_seeds.plan(claim, seed, mine, data).runs() == []
    return own_seeds.compare_seeds(planned, data)


@pytest.mark.parametrize("claim", ["p.better", "p.rank", "p.words"])
def test_rows_are_kept_own_and_joined_seeds(kept: Study, claim: str) -> None:
    before = {file: file.read_bytes() for file in kept.folder.rglob("*") if file.is_file()}
    found = train_own(kept, claim)
    assert before == {file: file.read_bytes() for file in kept.folder.rglob("*") if file.is_file()}
    verdict = pd.read_csv(kept.folder / "verdicts.csv").set_index("claim").loc[claim]
    rows = found.rows.set_index("seeds")
    assert rows["n"].to_dict() == {"kept": SEEDS, "yours": 1, "both": SEEDS + 1}
    assert rows["verdict"].tolist() == [verdict["outcome"], "", ""]
    (own,) = found.values["effect"]
    assert float(rows["effect"]["yours"].split()[0]) == pytest.approx(own, abs=1e-2)
    both = (SEEDS * verdict["effect"] + own) / (SEEDS + 1)
    assert float(rows["effect"]["both"].split()[0]) == pytest.approx(both, abs=1e-2)
    assert f"of {SEEDS}." in found.place
    assert json.loads(json.dumps(found.to_dict()))["values"][0]["seed"] == MINE


def test_runs_have_the_chosen_rate_and_the_kept_time(kept: Study) -> None:
    data = kept.folder.parent
    planned = own_seeds.plan("p.better", MINE, data / "mine", data)
    rate = pd.read_csv(kept.folder / "tuning.csv").query("chosen")["rate"].item()
    assert {run.arm: run.rate for run in planned.runs()} == {"A": rate, "B": 1e-3}
    used = kept_runs.read(kept.folder).runs.query("role == 'judged'").groupby("arm")["cpu_seconds"].mean()
    assert planned.minutes() == pytest.approx(used.sum() / 60)


def test_without_kept_runs_the_rate_is_the_middle_one_and_the_time_unknown(
    study: Study,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_seeds, "PAIRS", PAIRS)
    data = study.folder.parent
    planned = own_seeds.plan("p.better", MINE, data / "mine", data)
    assert {run.arm: run.rate for run in planned.runs()} == {"A": 1e-2, "B": 1e-3}
    assert planned.minutes() is None
    found = train_own(study, "p.better")
    assert found.rows.set_index("seeds")["n"].to_dict() == {"kept": 0, "yours": 1, "both": 1}
    assert "no other kept seeds" in found.place


def test_own_run_of_a_kept_seed_counts_once(kept: Study) -> None:
    found = train_own(kept, "p.better", 101)
    assert found.rows.set_index("seeds")["n"].to_dict() == {"kept": SEEDS, "yours": 1, "both": SEEDS}


def test_single_run_of_another_machine_leaves_the_kept_seeds(kept: Study) -> None:
    file = kept.folder / "runs.csv"
    runs = pd.read_csv(file)
    first = runs[runs["role"] == "judged"].head(1).assign(run="other", capability="other")
    file.write_bytes(csv_tables.to_csv(pd.concat([first, runs])))
    found = train_own(kept, "p.better")
    assert found.rows.set_index("seeds")["n"].to_dict() == {"kept": SEEDS, "yours": 1, "both": SEEDS + 1}
    assert f"of {SEEDS}." in found.place


def test_pairs_of_runs_and_missing_kept_seeds_have_their_own_messages() -> None:
    effects = pd.DataFrame({"effect": [0.1, 0.2]})
    none, pairs = "There are no other kept seeds to compare with.", "the claim compares pairs of runs"
    for both, kept_seeds, parts in (
        (effects, 1, (False, False)), (effects, 0, (True, False)), (effects.head(0), 1, (False, True)),
        (effects.head(0), 0, (True, True)),
    ):  # fmt: skip
        own = pd.Series([index >= kept_seeds for index in range(len(both))], dtype=bool)
        place = own_seeds._describe_position(both, own, kept_seeds)
        assert (none in place, pairs in place) == parts


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("arm_hash", "sha256:other", "it is another arm than registered"),
        ("rate", 0.5, "its rate is 0.5, and not 0.0001"),
    ],
)
def test_own_run_that_does_not_fit_is_named_and_trained_again(
    kept: Study, column: str, value: Any, reason: str
) -> None:
    first = train_own(kept, "p.better")
    data, mine = kept.folder.parent, kept.folder.parent / "mine"
    runs = pd.read_csv(mine / "runs.csv")
    changed = runs["arm"] == "A"
    runs.loc[changed, column] = value
    (mine / "runs.csv").write_bytes(csv_tables.to_csv(runs))
    planned = own_seeds.plan("p.better", MINE, mine, data)
    (line,) = planned.unfit().values()
    assert line == f"own run not used: A, seed {MINE}: {reason}"
    assert [run.arm for run in planned.runs()] == ["A"]
    assert planned.minutes() is not None
    assert own_seeds.compare_seeds(planned, data).rows.set_index("seeds")["n"]["yours"] == 0
    pd.testing.assert_frame_equal(train_own(kept, "p.better").rows, first.rows)
    assert planned.unfit() == {}


def test_changed_arm_is_refused_before_training(kept: Study) -> None:
    kept.edit(lambda text: text.replace("head_lr = 0.5", "head_lr = 0.25"))
    with pytest.raises(ValueError, match=r"^cannot train 'A': it differs from the registered arm"):
        train_own(kept, "p.better")


def test_command_prints_the_time_first_and_three_rows(
    kept: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, plan, compare = kept.folder.parent, own_seeds.plan, own_seeds.compare_seeds
    monkeypatch.setattr(own_seeds, "plan", lambda claim, seed, folder: plan(claim, seed, folder, data))
    monkeypatch.setattr(own_seeds, "compare_seeds", lambda planned: compare(planned, data))
    monkeypatch.setattr(command.os, "environ", command.os.environ.copy())
    capsys.readouterr()
    words: list[Any] = ["reproduce", "--claim", "p.rank", "--seed", str(MINE), "-o", str(tmp_path / "report")]
    with parallel_config(n_jobs=1):
        assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert "1 run to train; time: about 0.0 CPU-minutes." in printed.err
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines if line][-7:-3] == ["seeds", "kept", "yours", "both"]
    assert (tmp_path / "report" / "evidence" / "runs.csv").exists()
