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
from lorascope.evidence import store
from lorascope.probes import own_seeds

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
    return own_seeds.compare(planned, data)


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
    used = store.read(kept.folder).runs.query("role == 'judged'").groupby("arm")["cpu_seconds"].mean()
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


def test_changed_arm_is_refused_before_training(kept: Study) -> None:
    kept.edit(lambda text: text.replace("head_lr = 0.5", "head_lr = 0.25"))
    with pytest.raises(ValueError, match=r"^cannot train 'A': it differs from the registered arm"):
        train_own(kept, "p.better")


def test_command_prints_the_time_first_and_three_rows(
    kept: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, plan, compare = kept.folder.parent, own_seeds.plan, own_seeds.compare
    monkeypatch.setattr(own_seeds, "plan", lambda claim, seed, folder: plan(claim, seed, folder, data))
    monkeypatch.setattr(own_seeds, "compare", lambda planned: compare(planned, data))
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
