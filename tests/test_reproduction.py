"""The command that shows the kept verdicts and trains every method once: on a tiny model, from runs to report."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config

from lorascope import observe
from lorascope.cli import main as cli
from lorascope.cli import reproduce as command
from lorascope.methods import LISA, AdaLoRA, Adapprox, ALoRA, AutoLoRA, FourierFT, Full, HydraLoRA, LoRA, NeFT
from lorascope.papers import adalora, adapprox, alora, autolora, fourierft, hydralora, lisa, lora, neft
from lorascope.papers.judging import kept_runs, kept_verdicts, registration
from lorascope.papers.judging.learning_rates import choose_rate
from lorascope.papers.probe import Arm
from lorascope.papers.rank_tables import RANKS
from lorascope.papers.training import reproduction, short_runs
from lorascope.papers.training.short_runs import ARMS

CLAIMS = registration.read()
LINEAR: Any = {"targets": "all-linear"}
METHODS = {
    lora.FULL: Full(),
    lora.LOW: LoRA(rank=2, **LINEAR),
    adalora.ADAPTED: AdaLoRA(init_rank=3, target_rank=2),
    autolora.ADAPTED: AutoLoRA(rank=4),
    alora.ADAPTED: ALoRA(init_rank=2),
    hydralora.ROUTED: HydraLoRA(num_experts=2, targets=("ffn_in", "ffn_out"), gate_rows=16),
    fourierft.DEFAULT: FourierFT(coefficients=16),
    lisa.DRAWN: LISA(n_active=1),
    neft.CHANGED: NeFT(parameter_share=0.2),
    adapprox.OURS: Adapprox(dense="embed", min_dim=16),
}
CHANGES: dict[str, Any] = {
    autolora.ADAPTED: {"search_steps": 2},
    alora.ADAPTED: {"rounds": 2, "warm_steps": 1, "round_steps": 1, "score_rows": 4},
    neft.CHANGED: {"tune_steps": 2},
}
OBSERVERS: dict[str, Any] = {
    lora.FULL: (observe.second_moments(every=8),),
    neft.CHANGED: (observe.utilization(every=8),),
    adapprox.OURS: (observe.factor_drift(every=8),),
}


def test_every_method_is_trained_once() -> None:
    from lorascope.methods import METHODS as registry

    assert len(ARMS) == len(METHODS) == 10
    assert {method.name for method in METHODS.values()} == registry.keys() - {"dora", "pissa", "vera"}
    assert ARMS.keys() == METHODS.keys()


@pytest.mark.parametrize("label", ARMS)
def test_smallest_rates_are_registered_ones(label: str) -> None:
    """They are the middle rates, and the largest ones of methods that learn more slowly."""
    arm = CLAIMS.arms[label]
    tuned = CLAIMS.arms[arm.rate_of or label]
    slow = {adalora.ADAPTED, fourierft.DEFAULT, hydralora.ROUTED, lisa.DRAWN}
    rate = tuned.rates[-1 if label in slow else len(tuned.rates) // 2]
    found = {"lr": ARMS[label].lr, "head_lr": ARMS[label].head_lr}
    assert found == pytest.approx({name: rate * ratio for name, ratio in arm.fields.items()})


@pytest.fixture(scope="module")
def tiny_arms(bert: str, task: Any) -> Iterator[None]:
    arms = {label: Arm(label=label, method=method, settings={}, model=bert) for label, method in METHODS.items()}
    shorts = {
        label: replace(short, changes=CHANGES.get(label, {}), observers=OBSERVERS.get(label, ()), steps=8)
        for label, short in ARMS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_runs, "registered_arms", lambda: arms)
        patch.setattr(short_runs, "ARMS", shorts)
        patch.setattr(short_runs, "TEST_ROWS", 20)
        patch.setattr(short_runs.tasks, "load", lambda name: task)
        yield


@pytest.mark.parametrize(("best", "used"), [(3e-4, 1e-3), (1e-3, 1e-3), (3e-3, 3e-3)])
def test_chosen_rate_is_used_if_few_steps_learn_at_it(tiny_arms: None, best: float, used: float) -> None:
    grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # with one further rate beyond each end
    losses = {rate: 0.5 if rate == best else 0.9 for rate in grid}
    assert choose_rate(CLAIMS.arms[lora.LOW].rates, losses).rate == best
    rows = [
        {"arm": lora.LOW, "role": "tuning", "seed": seed, "rate": rate, "validation_loss": loss}
        for rate, loss in losses.items()
        for seed in (9001, 9002)
    ]
    arm = short_runs.shorten(lora.LOW, ARMS[lora.LOW], 7, CLAIMS, pd.DataFrame(rows))
    assert (arm.method.lr, arm.method.head_lr) == (used, used)
    assert short_runs.shorten(lora.LOW, ARMS[lora.LOW], 7, None, pd.DataFrame()).method.lr == 1e-3
    capped = replace(ARMS[lora.LOW], largest=True)
    assert short_runs.shorten(lora.LOW, capped, 7, CLAIMS, pd.DataFrame(rows)).method.lr == 1e-3


SEED = 7


@pytest.fixture(scope="module")
def done(tiny_arms: None, tmp_path_factory: pytest.TempPathFactory) -> reproduction.Reproduction:
    folder = tmp_path_factory.mktemp("reproduction")
    with parallel_config(n_jobs=1):
        return reproduction.reproduce(folder / "out", SEED, folder / "none")


def test_report_has_verdicts_runs_and_the_figures_of_every_paper(done: Any, capsys: pytest.CaptureFixture) -> None:
    page = done.path.read_text(encoding="utf-8")
    titles = [part.partition("<")[0] for part in page.split("<h2 ")[1:]]
    assert len(titles) == 2 + 9  # verdicts, runs, and nine papers
    for text in ("No verdicts here", f"One run per method, seed {SEED}", "Gates", "Active", "Rank allocation"):
        assert text.lower() in page.lower(), text
    _, _, quick = page.partition('aria-labelledby="runs-title"')
    for word in ("supported", "inconclusive", "void"):
        assert word not in quick.partition("<script>")[0]
    assert done.runs["method"].tolist() == list(ARMS)
    assert done.runs["accuracy"].between(0, 1).all()
    assert set(done.places["quantity"]) == {"test accuracy"}  # no registration here


def test_copies_of_the_whole_model_are_removed(done: Any, task: Any) -> None:
    kept = {file.parent.parent.name for file in (done.path.parent / "runs").glob("*/state/*.safetensors")}
    assert not [name for name in kept if name.startswith(("full", "lisa", "neft", "adapprox"))]
    assert [name for name in kept if name.startswith("lora")]


def plant_evidence(data: Path, runs: dict[str, Any], values: dict[int, int], capability: str = "X") -> None:
    """Write evidence with seeds of AdaLoRA whose feed-forward modules have the given rank, all others rank 1."""
    modules = runs[adalora.ADAPTED].modules
    places = modules[modules["module"].isin(runs[adalora.ADAPTED].ranks())][["module", "stack", "layer", "role"]]
    for seed, rank in values.items():
        value = np.where(places["role"].isin(["ffn_in", "ffn_out"]), rank, 1).astype("int16")
        row = dict.fromkeys(kept_runs.RUN_COLUMNS, 0) | {
            "run": f"r{seed}{capability}", "arm": adalora.ADAPTED, "role": "judged", "seed": seed,
            "capability": capability,
            "torch": "2", "device": "cpu", "commit": "c", "dirty": False, "test_metric": rank / 10,
        }  # fmt: skip
        kept_runs.add_run(data / "evidence", row, {}, {RANKS: places.assign(value=value)})


def test_quantities_have_their_place_among_the_kept_seeds(done: Any, tmp_path: Path) -> None:
    """With 2 feed-forward and 4 attention modules per block, ranks r and 1 give the fraction 2r / (2r + 4)."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "registered.toml").write_bytes(registration.FILE.read_bytes())
    (data / "published").symlink_to(registration.FILE.parent / "published")
    shutil.copytree(done.path.parent / "runs", tmp_path / "out" / "runs")
    with parallel_config(n_jobs=1):
        runs = short_runs.train_short_runs(tmp_path / "out" / "runs", SEED, None, pd.DataFrame())
        plant_evidence(data, runs, {100: 3}, "a machine with one run")
        plant_evidence(data, runs, {100: 1, 101: 2, 102: 8})
        found = reproduction.reproduce(tmp_path / "out", SEED, data)
    row = found.places.set_index("claim").loc["adalora.ffn"]
    assert row["seeds"] == 3
    assert (row["lowest"], row["highest"]) == pytest.approx((1 / 3, 0.8))
    assert row["mean"] == pytest.approx((1 / 3 + 1 / 2 + 0.8) / 3)
    assert row["below"] == sum(each < row["value"] for each in (1 / 3, 1 / 2, 0.8))
    accuracy = found.places.query("quantity == 'test accuracy'").set_index("arm").loc[adalora.ADAPTED]
    assert (accuracy["lowest"], accuracy["highest"], accuracy["seeds"]) == (0.1, 0.8, 3)
    page = found.path.read_text(encoding="utf-8")
    assert "3 kept seeds" in page
    assert "Final ranks: ffn_in" in page
    assert "FourierFT is non-inferior to LoRA on GLUE" in page
    assert json.loads(json.dumps(found.to_dict()))["places"]


def test_verdicts_are_read_without_torch_and_missing_files_give_one_line(tmp_path: Path) -> None:
    nothing = kept_verdicts.read(tmp_path)
    assert nothing.table.empty
    assert len(nothing.notes) == 1
    here = kept_verdicts.read()
    on_figures = [id for id in here.table["claim"] if id.startswith("published.")]
    assert on_figures == here.table["claim"].tolist()[:7] == list(CLAIMS.of_tier("published"))
    kept = pd.read_csv(registration.FILE.parent / "evidence" / "verdicts.csv")
    judged = kept["claim"][(kept["look"] >= 1) | (kept["outcome"] == "void")]
    assert here.table["claim"].tolist()[-len(judged) :] == judged.tolist()  # no verdict before the first look


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "its last row is incomplete"),
        (lambda content: content[: content.index(b"\n", len(content) // 2) + 1], "claim '.*' must occur 1 time, got 0"),
        (lambda content: content + content.splitlines(keepends=True)[-1], "claim '.*' must occur 1 time, got 2"),
        (lambda content: content.replace(b"look", b"glance", 1), "its columns differ from schema 1: glance, look"),
        (
            lambda content: content.replace(b",0,", b",x,", 1),
            r"row \d+: n must be an integer from 0 to 4294967295, got 'x'",
        ),
        (lambda content: content.replace(b"lora.parity", b"\xff", 1), "'utf-8' codec can't decode"),
    ],
)
def test_damaged_verdicts_are_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    data, file = registration.FILE.parent, tmp_path / "evidence" / "verdicts.csv"
    (tmp_path / "registered.toml").write_bytes(registration.FILE.read_bytes())
    (tmp_path / "published").symlink_to(data / "published")
    file.parent.mkdir()
    file.write_bytes(damage((data / "evidence" / "verdicts.csv").read_bytes()))
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(file))}: {message}") as raised:
        kept_verdicts.read(tmp_path)
    assert "\n" not in str(raised.value)


def run(*words: str) -> int:
    return cli.main(["reproduce", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--claim", "pair.lora"), "--claim requires --seed"),
        (("--claim", "pair.lor", "--seed", "3"), "unknown claim 'pair.lor'; did you mean 'pair.lora'"),
        (("--seed", "-1"), "--seed must be from 0"),
        (("--evidence", "x", "--seed", "1"), "--evidence must be given without"),
        (("--minutes", "3"), "--minutes requires --evidence"),
        (("--minutes", "nan", "--evidence", "x"), "--minutes must be >= 0, got nan"),
        (("--minutes", "-1", "--evidence", "x"), "--minutes must be >= 0, got -1"),
        (("--quick",), "--quick"),
        (("--probe", "lora"), "--probe"),
    ],
)
def test_wrong_arguments_give_one_line(words: tuple[str, ...], message: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command.os, "environ", command.os.environ.copy())
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def result(path: Path) -> reproduction.Reproduction:
    runs = pd.DataFrame({"method": ["LoRA"], "accuracy": [0.8], "trained": [12], "seconds": [3], "rate": [1e-3]})
    return reproduction.Reproduction(path, SEED, kept_verdicts.read(), runs, pd.DataFrame())


def test_command_prints_verdicts_first_and_the_path_last(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    seeds = []
    monkeypatch.setattr(reproduction, "reproduce", lambda out, seed: seeds.append(seed) or result(Path(out) / "r.html"))
    assert run("-o", str(tmp_path)) == run("-o", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "claim"
    assert lines[1].split()[0] == "published.fourierft"
    assert f"One run of every method with seed {seeds[0]}:" in lines
    assert lines[-1] == str(tmp_path / "r.html")
    assert seeds[0] != seeds[1]


def test_command_prints_only_json(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(reproduction, "reproduce", lambda out, seed: result(Path(out) / "r.html"))
    assert run("-o", str(tmp_path), "--seed", "5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["accuracy"] == 0.8
    assert {"verdicts", "notes", "seed", "report", "places"} <= found.keys()


def test_report_opens_only_on_a_terminal_with_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(command.os, "environ", {"DISPLAY": ":0"})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert command._has_screen()
    monkeypatch.setattr(command.os, "environ", {})
    assert not command._has_screen()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert command._has_screen()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not command._has_screen()


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html>mine</html>", encoding="utf-8")
    with pytest.raises(FileExistsError, match="was not written by lorascope"):
        reproduction.reproduce(tmp_path, SEED)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_steps_are_enough_to_learn_and_few_enough_to_wait() -> None:
    assert all(60 <= short.steps <= 130 for short in ARMS.values())
