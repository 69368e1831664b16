"""Training of the evidence: two tiny arms and word counts, from nothing to verdicts that verify."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from joblib import parallel_config
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from planted import plant_spectra
from torch.nn import functional

from lorascope import __version__, plots
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Point
from lorascope.methods import Full, LoRA
from lorascope.papers.figures import redraw
from lorascope.papers.figures.excerpt import run_finder
from lorascope.papers.judging import csv_tables, evidence_manifest, kept_figures, kept_runs, registration, verification
from lorascope.papers.judging.statistics import Accuracy, Constant, OfRun
from lorascope.papers.judging.verdicts import untrained_arms
from lorascope.papers.lora import tfidf_arm
from lorascope.papers.probe import Arm, Probe
from lorascope.papers.rank_tables import RANKS, keep_ranks
from lorascope.papers.registry import GalleryFigure
from lorascope.papers.training import retraining, train_arms
from lorascope.runs.folders import RunLocked, lock_run
from lorascope.runs.run import Run
from lorascope.training.processor import processor_name

TOML = """
[[stage]]
claims = ["*"]
looks = [0, 1]

[[arm]]
label = "A"
hash = "HASH_A"
rates = [1e-3, 1e-2, 1e-1]
fields = { lr = 1.0, head_lr = 0.5 }
may_void = false

[[arm]]
label = "B"
hash = "HASH_B"
rates = [1e-3]
tuning_seeds = []
fields = { lr = 1.0, head_lr = 1.0 }
may_void = false

[[arm]]
label = "words"
hash = "HASH_words"
tuning_seeds = []
baseline = true
"""
CLAIM = """
[[claim]]
id = "p.{name}"
paper = {{ arxiv = "1", place = "table 1", tier = "secondary" }}
text = {{ sentence = "s", statistic = "x", control = "y", control_kind = "arm" }}
bound = {{ kind = "superiority", margin = 0.1, unit = "accuracy", from = "planted" }}
design = {{ interval = "{interval}", looks = [{seeds}], levels = [0.025], first_seed = 100 }}
arms = {arms}
code = "sha256:p.{name}"
"""
SHOWN_ARM = """
[[arm]]
label = "C"
hash = "{hash}"
rate_of = "A"
tuning_seeds = []
fields = {{ lr = 1.0, head_lr = 0.5 }}
seeds = 2

"""
SEEDS = 3


def total(table: pd.DataFrame) -> float:
    return float(table["value"].sum())


PAIRS: Any = {
    "p.better": (Accuracy("A"), Accuracy("B")),
    "p.words": (Accuracy("A"), Accuracy("words")),
    "p.rank": (OfRun(total, RANKS, "A"), Constant(1.0)),
}


def draw_totals(runs: Any) -> Chart:
    rows = [{"seed": run.seed, "value": total(run.tables[RANKS])} for run in runs["A"]]
    return Chart(pd.DataFrame(rows), [Point("seed", "value")])


FIGURES = [
    GalleryFigure(name="ranks", alt="Ranks of A", arms={"low rank": "A"}, draw=plots.rank_allocation, seeds=2,
        quantities=("rank",),
    ),
    GalleryFigure(name="scores", alt="Accuracy", arms={"A": "A", "B": "B"}, draw=plots.ablations),
    GalleryFigure(name="table", alt="Total rank", arms={"A": "A"}, draw=draw_totals, table=RANKS),
    GalleryFigure(name="moments", alt="Not recorded", arms={"B": "B"}, draw=plots.second_moments, seeds=2,
        quantities=("moment_sigma",),
    ),
    GalleryFigure(name="phi", alt="Factors", arms={"A": "A"}, draw=plots.subspace_similarity, seeds=2,
        shows_factors=True,
    ),
]  # fmt: skip
SECTIONS = {"p": FIGURES}


class Study:
    """The folders of a registration of three claims on tiny arms."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.images = root, root / "runs", root / "figures"
        self.folder, self.file = root / "data" / "evidence", root / "data" / "registered.toml"

    def register(self) -> None:
        self.file.parent.mkdir()
        rows = [("better", "two-way", '["A", "B"]'), ("words", "two-way", '["A", "words"]'), ("rank", "t", '["A"]')]
        claims = [CLAIM.format(name=name, interval=how, seeds=SEEDS, arms=arms) for name, how, arms in rows]
        self.file.write_text(TOML + "".join(claims), encoding="utf-8")
        hashes = train_arms.arm_hashes(registration.read(self.file))
        self.edit(lambda text: "".join(_filled(part, hashes) for part in text.split("\n\n")))

    def edit(self, change: Callable[[str], str]) -> None:
        self.file.write_text(change(self.file.read_text(encoding="utf-8")), encoding="utf-8")

    def write(self, **options: Any) -> None:
        with parallel_config(n_jobs=1):
            train_arms.write_evidence(self.folder, self.out, registered=self.file, **options)

    def differences(self) -> list[str]:
        code: Callable[[str], str] = "sha256:{}".format
        claims = registration.read(self.file)
        return [
            *verification.verify(self.folder, self.file, claims, PAIRS, code, images=self.images),
            *redraw.differences(self.folder, kept_runs.read(self.folder), SECTIONS),
        ]


def _filled(part: str, hashes: dict[str, str]) -> str:
    for label, found in hashes.items():
        part = part.replace(f"HASH_{label}", found)
    return part + "\n\n"


@contextmanager
def planted_probe(bert: str, task: Any) -> Iterator[None]:
    """Let the evidence consist of one probe of two tiny arms and word counts."""
    settings = {"steps": 3, "batch_size": 4, "eval_every": 0, "eval_size": 20}
    lora = LoRA(rank=2, targets="all-linear")

    probe = Probe(
        name="p",
        title="",
        source="",
        question="",
        arms=lambda: [
            Arm(label="A", method=lora, settings=settings, model=bert, task=task),
            Arm(label="B", method=Full(), settings=settings, model=bert, task=task),
            Arm(label="C", method=replace(lora, rank=1), settings=settings, model=bert, task=task),
            tfidf_arm("words", task),
        ],
        keep={(RANKS, "A"): keep_ranks},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_arms, "PROBES", {"p": probe})
        patch.setattr(train_arms, "PAIRS", PAIRS)
        patch.setattr(train_arms, "SECTIONS", SECTIONS)
        patch.setattr(retraining, "SECTIONS", SECTIONS)
        train_arms.registered_arms.cache_clear()
        yield
    train_arms.registered_arms.cache_clear()


@pytest.fixture
def planted(bert: str, task: Any) -> Iterator[None]:
    with planted_probe(bert, task):
        yield


@pytest.fixture
def study(planted: None, tmp_path: Path) -> Study:
    """A study of which nothing is trained."""
    made = Study(tmp_path)
    made.register()
    return made


@pytest.fixture(scope="module")
def trained(bert: str, task: Any, tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = Study(tmp_path_factory.mktemp("study"))
    with planted_probe(bert, task):
        made.register()
        made.write()
    return made


@pytest.fixture
def finished(planted: None, trained: Study, tmp_path: Path) -> Study:
    """A copy of a study of which everything is trained."""
    shutil.copytree(trained.root, tmp_path / "study")
    return Study(tmp_path / "study")


def count(study: Study) -> dict[tuple[str, str], int]:
    runs = kept_runs.read(study.folder).runs
    return {key: int(number) for key, number in runs.groupby(["arm", "role"]).size().items()}


def test_from_nothing_to_verdicts_that_verify(finished: Study) -> None:
    found = count(finished)
    assert found.pop(("A", "tuning")) >= 3  # three registered rates, and further ones if the best is at an end
    assert found == {("A", "judged"): SEEDS, ("B", "judged"): SEEDS, ("words", "baseline"): 1}
    assert finished.differences() == []
    verdicts = pd.read_csv(finished.folder / "verdicts.csv").set_index("claim")
    assert verdicts["n"].eq(SEEDS).all()
    ranks = 2 * len(kept_runs.read(finished.folder).table(RANKS, "A", 100))
    assert verdicts.loc["p.rank", "effect"] == ranks - 1
    rate = pd.read_csv(finished.folder / "tuning.csv").query("chosen")["rate"].item()
    judged = kept_runs.read(finished.folder).runs.query("arm == 'A' and role == 'judged'")
    assert judged["rate"].eq(rate).all()


def test_kept_predictions_are_those_of_the_runs_and_states_are_removed(finished: Study) -> None:
    kept = kept_runs.read(finished.folder)
    runs = [Run.read(file.parent) for file in finished.out.glob("*/run.json")]
    assert {run.seed for run in runs} >= {100}
    for run in runs:
        assert not run.restorable
        if run.seed == 100:
            arm = "A" if run.meta.method["name"] == "lora" else "B"
            assert kept.correct(arm, 100).mean() == run.score.metric


def test_a_finished_study_trains_nothing(finished: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.read_bytes() for file in finished.folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(train_arms, "train_job", None)
    finished.write()
    assert before == {file: file.read_bytes() for file in finished.folder.rglob("*") if file.is_file()}


def test_an_interrupted_study_loses_no_finished_run(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], train_arms.train_job

    def interrupted(job: Any) -> Run:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(job)
        return train(job)

    monkeypatch.setattr(train_arms, "train_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.write()
    assert sum(count(study).values()) == 5
    trained.clear()
    monkeypatch.setattr(train_arms, "train_job", lambda job: trained.append(job) or train(job))
    study.write()
    assert len(trained) == sum(count(study).values()) - 5 - 1  # the baseline is not trained
    assert study.differences() == []


def test_runs_that_only_figures_show_are_trained_and_kept_with_predictions(study: Study) -> None:
    arm = SHOWN_ARM.format(hash="?")
    study.edit(lambda text: text.replace("[[claim]]", f"{arm}[[claim]]", 1))
    found = train_arms.arm_hashes(registration.read(study.file))["C"]
    study.edit(lambda text: text.replace(arm, SHOWN_ARM.format(hash=found)))
    study.write()
    kept = kept_runs.read(study.folder)
    runs = kept.runs[kept.runs["arm"] == "C"].set_index("seed")
    assert runs["role"].to_dict() == {100: "judged", 101: "judged"}
    assert runs["rate"].unique() == kept.runs.query("arm == 'A' and role == 'judged'")["rate"].unique()
    for seed, metric in runs["test_metric"].items():
        assert kept.correct("C", seed).mean() == metric
    assert study.differences() == []


def test_two_commands_cannot_add_runs_to_one_folder(study: Study) -> None:
    with lock_run(study.folder), pytest.raises(RunLocked, match="by another process"):
        study.write()
    assert not (study.folder / "runs.csv").exists()


def test_no_run_starts_after_the_given_minutes(study: Study) -> None:
    study.write(minutes=0)
    assert not study.folder.exists()


def test_a_rate_that_diverges_is_kept_and_not_chosen(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    train = train_arms.train_job

    def diverging(job: Any) -> Run:
        if job.method.lr == 1e-3:
            raise FloatingPointError("the loss became nan")
        return train(job)

    monkeypatch.setattr(train_arms, "train_job", diverging)
    study.edit(lambda text: text.replace("may_void = false", ""))
    study.write()
    tuning = pd.read_csv(study.folder / "tuning.csv").set_index("rate")
    assert tuning.loc[1e-3, "validation_loss"] == float("inf")
    assert not tuning.loc[1e-3, "chosen"]
    verdicts = pd.read_csv(study.folder / "verdicts.csv").set_index("claim")
    assert verdicts.loc["p.better", "outcome"] == "void"
    assert "B" in untrained_arms(kept_runs.read(study.folder))  # it has no other rate


def test_another_arm_than_registered_is_refused_before_training(study: Study) -> None:
    study.edit(lambda text: text.replace("head_lr = 0.5", "head_lr = 0.25"))
    with pytest.raises(ValueError, match=r"^cannot train 'A': it differs from the registered arm, .* sha256:"):
        study.write()
    assert not study.folder.exists()


def test_runs_trained_again_agree_and_show_a_consistent_forgery(finished: Study) -> None:
    with parallel_config(n_jobs=1):
        assert retraining.retrain(finished.folder, 100, finished.file) == []
    kept = kept_runs.read(finished.folder)
    run = kept.run("A", 102)
    margins = kept.margins[run].copy()
    margins[np.flatnonzero(margins > 0)[:2]] = -5  # two right rows become wrong, and every number follows from them
    np.savez_compressed(finished.folder / "predictions" / f"{run}.npz", margin=margins)
    rows = kept.runs.assign(
        test_metric=kept.runs["test_metric"].where(kept.runs["run"] != run, float((margins > 0).mean()))
    )
    (finished.folder / "runs.csv").write_bytes(csv_tables.to_csv(rows))
    finished.write()
    assert finished.differences() == []
    lines = retraining.retrain(finished.folder, 100, finished.file)
    assert lines[0].startswith("A, seed 102: margin: row ")
    assert lines[0].endswith(", and 1 more")
    assert lines[1].startswith("A, seed 102: test_metric: kept ")
    assert len(lines) == 2


def test_forged_tables_and_scores_are_named_when_trained_again(finished: Study) -> None:
    kept = kept_runs.read(finished.folder)
    low, high = kept.run("A", 100), kept.run("A", 102)
    kept.kept[RANKS][low].assign(value=7).to_parquet(finished.folder / "kept" / RANKS / f"{low}.parquet", index=False)
    forged = {"validation_loss": 0.5, "test_loss": 0.25, "trained_parameters": 3}
    rows = kept.runs.astype(dict.fromkeys(forged, "object"))
    rows.loc[rows["run"] == high, list(forged)] = list(forged.values())
    (finished.folder / "runs.csv").write_bytes(csv_tables.to_csv(rows))
    finished.write()
    assert finished.differences() == []
    with parallel_config(n_jobs=1):
        table, *scores = sorted(retraining.retrain(finished.folder, 100, finished.file))
    assert re.match(rf"A, seed 100: {RANKS}: row 2 .*: value: kept '7', recomputed '2', and \d+ more$", table)
    assert [line.partition(", trained")[0] for line in scores] == [
        f"A, seed 102: {name}: kept {float(value)}" for name, value in sorted(forged.items())
    ]


def change_records(excerpt: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the records of an excerpt, and the checksum of their file."""
    change(pd.read_parquet(excerpt / "records.parquet")).to_parquet(excerpt / "records.parquet", index=False)
    about = json.loads((excerpt / "run.json").read_text())
    about["checksums"]["records.parquet"] = evidence_manifest.digest(excerpt / "records.parquet")
    (excerpt / "run.json").write_text(json.dumps(about))


def test_records_that_an_older_excerpt_lacks_are_not_compared(finished: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantity that the figure did not show when the excerpt was written, and steps that were not recorded."""
    run = kept_runs.read(finished.folder).run("A", 101)
    change_records(finished.folder / "shown" / run, lambda table: table[table["step"] == table["step"].max()])
    shown = replace(FIGURES[0], quantities=("rank", "loss"))
    monkeypatch.setattr(retraining, "SECTIONS", {"p": [shown, *FIGURES[1:]]})
    with parallel_config(n_jobs=1):
        assert retraining.retrain(finished.folder, 100, finished.file) == []


def test_a_forged_record_that_a_figure_shows_is_named_when_trained_again(finished: Study) -> None:
    run = kept_runs.read(finished.folder).run("A", 101)
    change_records(finished.folder / "shown" / run, lambda table: table.assign(value=table["value"] + 1))
    shutil.rmtree(finished.out)
    finished.write()  # draws the figures from the forged record
    assert finished.differences() == []
    with parallel_config(n_jobs=1):
        lines = retraining.retrain(finished.folder, 100, finished.file)
    assert lines == [f"A, seed 101: shown/{run}: records of rank: other values when trained again"]


def retrained(study: Study) -> list[str]:
    with parallel_config(n_jobs=1):
        return retraining.retrain(study.folder, 100, study.file)


def forge(study: Study, **factors: float) -> None:
    """Multiply numbers of a kept run, and let everything that follows from them agree."""
    kept = kept_runs.read(study.folder)
    rows, is_forged = kept.runs, kept.runs["run"] == kept.run("A", 102)
    for name, factor in factors.items():
        rows[name] = rows[name].where(~is_forged, rows[name] * factor)
    (study.folder / "runs.csv").write_bytes(csv_tables.to_csv(rows))
    study.write()
    assert study.differences() == []


def test_new_runs_have_their_processor_in_table_and_manifest(finished: Study) -> None:
    assert set(kept_runs.read(finished.folder).runs["processor"]) == {processor_name()}
    assert {Run.read(file.parent).meta.processor for file in finished.out.glob("*/run.json")} == {processor_name()}


@pytest.mark.parametrize("stored", ["this one", "another", "unknown"])
def test_other_rounding_is_a_difference_only_on_the_same_processor(
    finished: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    linear = functional.linear

    def rounded_differently(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x.double(), W.double(), None if b is None else b.double()).to(x.dtype)

    monkeypatch.setattr(functional, "linear", rounded_differently)
    file, rules = finished.folder / "runs.csv", {"this one": "all within 1e-09: the same processor"}
    rounded = "losses within 0.001, values within 0.05 of the largest"
    if stored == "another":
        monkeypatch.setattr(retraining, "processor_name", lambda: "new")
        rules[stored] = f"{rounded}: the same instructions, but another processor ({processor_name()}, here new)"
    if stored == "unknown":  # as the file of an earlier version
        file.write_bytes(csv_tables.to_csv(csv_tables.text_table(file.read_bytes()).drop(columns="processor")))
        rules[stored] = f"{rounded}: the same instructions, but another processor (unknown, here {processor_name()})"
    lines = retrained(finished)
    assert bool(lines) == (stored == "this one")
    assert capsys.readouterr().out.count(f"Compared {rules[stored]}") == 2 * SEEDS


def test_forgeries_beyond_rounding_are_named_on_another_processor(
    finished: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(finished, test_loss=1 + 6e-5, validation_loss=1 + 2e-3)
    monkeypatch.setattr(retraining, "processor_name", lambda: "new")
    (line,) = retrained(finished)
    assert line.startswith("A, seed 102: validation_loss: kept ")
    kept = kept_runs.read(finished.folder)
    run = kept.run("A", 101)
    np.savez_compressed(finished.folder / "predictions" / f"{run}.npz", margin=kept.margins[run] + np.int8(9))
    table = kept.table(RANKS, "A", 100)
    file = finished.folder / "kept" / RANKS / f"{kept.run('A', 100)}.parquet"
    table.assign(value=table["value"] * 1.1).to_parquet(file, index=False)
    change_records(finished.folder / "shown" / run, lambda records: records.assign(value=records["value"] * 1.1))
    starts = [f"seed 100: {RANKS}: row 2 ", "seed 101: margin: row 2 ", f"seed 101: shown/{run}: records of rank"]
    starts.append("seed 102: validation_loss: kept ")
    for line, start in zip(sorted(retrained(finished)), starts, strict=True):
        assert line.startswith(f"A, {start}")


def test_run_of_another_machine_is_compared_by_the_spread_of_the_seeds(
    finished: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = train_arms.block()
    monkeypatch.setattr(retraining, "block", lambda: {**here, "torch": "3.0"})
    assert retrained(finished) == []
    rule = "test_metric within three standard deviations of the seeds: another machine"
    assert capsys.readouterr().out.count(f"Compared {rule} (torch {here['torch']}, here 3.0).") == 2 * SEEDS


def test_source_tree_without_git_has_the_version_instead_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "lorascope").mkdir()
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(registration, "FILE", tmp_path / "data" / "registered.toml")
    expected = {"commit": __version__, "dirty": False, "numpy": np.__version__}
    assert train_arms.code_version.__wrapped__() == expected
    subprocess.run(["git", "init", "-q"], cwd=tmp_path.parent, check=True)  # a repository around the tree
    assert train_arms.code_version.__wrapped__() == expected
    monkeypatch.setenv("PATH", "")
    assert train_arms.code_version.__wrapped__() == expected
    monkeypatch.undo()
    assert len(train_arms.code_version.__wrapped__()["commit"]) == 40


def image_facts(study: Study, name: str) -> dict[str, Any]:
    with Image.open(study.images / f"{name}.png") as image:
        return json.loads(image.info["lorascope"])


def test_figures_show_kept_runs_and_agree_with_their_data(finished: Study, capsys: pytest.CaptureFixture[str]) -> None:
    finished.write()  # again, for its lines
    kept, printed = kept_runs.read(finished.folder), capsys.readouterr().out
    assert kept.figures.keys() == {"phi", "ranks", "scores", "table"}
    assert re.search("^cannot draw moments: second_moments needs records of moment_sigma", printed, re.MULTILINE)
    about = kept.figures["ranks"].about
    assert about.runs == (kept.run("A", 100), kept.run("A", 101))
    assert set(kept.figures["scores"].about.runs) == {kept.run(arm, seed) for arm in "AB" for seed in (100, 101, 102)}
    facts = image_facts(finished, "ranks")
    assert facts["runs"] == list(about.runs)
    assert facts["data_sha256"] == evidence_manifest.digest(finished.folder / "figures" / "ranks.parquet")
    assert facts["commit"] == kept.runs["commit"].iloc[0]
    chart = pd.read_parquet(finished.folder / "figures" / "scores.parquet")
    means = kept.runs[kept.runs["role"] == "judged"].groupby("arm")["test_metric"].mean()
    assert chart.drop_duplicates("recipe").set_index("recipe")["value"].to_dict() == pytest.approx(means.to_dict())


def test_a_figure_of_a_kept_table_shows_the_seeds_that_have_it(finished: Study) -> None:
    kept = kept_runs.read(finished.folder)
    runs = [kept.run("A", seed) for seed in (100, 101, 102)]
    assert kept.figures["table"].about.runs == tuple(runs)
    (finished.folder / "kept" / RANKS / f"{runs[2]}.parquet").unlink()
    (finished.folder / "figures" / "table.parquet").unlink()
    redraw.draw_figures(finished.folder, finished.out, finished.images, SECTIONS, "abc")
    assert kept_runs.read(finished.folder).figures["table"].about.runs == tuple(runs[:2])


def test_a_kept_figure_stays_without_the_runs_and_is_drawn_again_if_the_image_is_lost(finished: Study) -> None:
    before = {file: file.read_bytes() for file in finished.images.iterdir()}
    for name in ("phi", "ranks", "scores"):
        (finished.images / f"{name}.png").unlink()
    finished.out.rename(finished.out.with_name("elsewhere"))
    finished.write()
    # Only factors are not kept in the evidence.
    assert sorted(file.name for file in finished.images.iterdir()) == ["ranks.png", "scores.png", "table.png"]
    assert finished.differences() == [
        f"figures/phi.png: data_sha256: kept no image with chart data, recomputed "
        f"{kept_runs.read(finished.folder).figures['phi'].digest[:12]}"
    ]
    finished.out.with_name("elsewhere").rename(finished.out)
    finished.write()
    assert before == {file: file.read_bytes() for file in finished.images.iterdir()}
    assert finished.differences() == []


def test_a_figure_is_not_drawn_from_runs_with_other_scores_than_kept(finished: Study) -> None:
    shutil.rmtree(finished.folder / "figures")
    runs = pd.read_csv(finished.folder / "runs.csv")
    other = runs["run"] == kept_runs.read(finished.folder).run("A", 101)
    (finished.folder / "runs.csv").write_bytes(
        csv_tables.to_csv(runs.assign(test_loss=runs["test_loss"] + 0.1 * other))
    )
    finished.write()
    assert kept_runs.read(finished.folder).figures.keys() == {"scores", "table"}


def change_point(study: Study) -> None:
    file = study.folder / "figures" / "ranks.parquet"
    data = pq.read_table(file)
    at, values = data.schema.get_field_index("value"), data.column("value").to_pylist()
    pq.write_table(
        data.set_column(at, data.field(at), pa.array([values[0] + 1, *values[1:]], data.field(at).type)), file
    )


def exchange_images(study: Study) -> None:
    shutil.copy(study.images / "scores.png", study.images / "ranks.png")


def name_another_run(study: Study) -> None:
    known = kept_runs.read(study.folder).figures["ranks"].about
    table = pd.read_parquet(study.folder / "figures" / "ranks.parquet")
    kept_figures.write(study.folder, "ranks", table, replace(known, runs=("0123456789ab", *known.runs[1:])))


def test_tampered_figures_are_named(finished: Study) -> None:
    folders = (finished.folder, finished.images)
    for folder in folders:
        shutil.copytree(folder, folder.with_name(f"{folder.name}-copy"))
    for tamper, place in (
        (change_point, "figures/ranks.png: data_sha256: kept"),
        (exchange_images, "figures/ranks.png: data_sha256: kept"),
        (name_another_run, "figures/ranks.parquet: run 0123456789ab is not in runs.csv"),
    ):
        for folder in folders:
            shutil.rmtree(folder)
            shutil.copytree(folder.with_name(f"{folder.name}-copy"), folder)
        assert finished.differences() == []
        tamper(finished)
        lines = finished.differences()
        assert any(line.startswith(place) for line in lines), lines
        assert any(line.startswith("MANIFEST: figures/ranks.parquet") for line in lines) == (tamper != exchange_images)
        (finished.folder / "MANIFEST").write_text(evidence_manifest.full_manifest(finished.folder, finished.file))
        assert any(line.startswith(place) for line in finished.differences())


def forge_image(study: Study, name: str, **facts: Any) -> None:
    """Give an image the hash of the chart data and other facts, and the manifest the hashes of all files."""
    image = study.images / f"{name}.png"
    with Image.open(image) as opened:
        known, copied = json.loads(opened.info["lorascope"]), opened.copy()
    digest = evidence_manifest.digest(study.folder / "figures" / f"{name}.parquet")
    text = PngInfo()
    text.add_text("lorascope", json.dumps(known | {"data_sha256": digest} | facts))
    copied.save(image, pnginfo=text)
    (study.folder / "MANIFEST").write_text(evidence_manifest.full_manifest(study.folder, study.file))


def test_a_point_that_does_not_follow_from_the_runs_is_named_even_if_all_hashes_fit(finished: Study) -> None:
    data, name = finished.folder / "figures" / "ranks.parquet", "figures/ranks.parquet"
    before = pd.read_parquet(data)["value"].iloc[0]
    change_point(finished)
    forge_image(finished, "ranks")
    (line,) = finished.differences()
    assert re.fullmatch(rf"{name}: row 2 \(.*\): value: kept '{before + 1}', recomputed '{before}'", line)


def test_a_figure_of_factors_is_not_drawn_again(finished: Study) -> None:
    file = finished.folder / "figures" / "phi.parquet"
    table, known = pd.read_parquet(file), kept_runs.read(finished.folder).figures["phi"]
    column = table.select_dtypes("float").columns[0]
    kept_figures.write(finished.folder, "phi", table.assign(**{column: table[column] + 1}), known.about)
    forge_image(finished, "phi")
    assert finished.differences() == []


def test_the_kept_part_of_a_run_has_what_figures_show_of_it(finished: Study) -> None:
    kept = kept_runs.read(finished.folder)
    parts = {path.name: Run.read(path) for path in (finished.folder / "shown").iterdir()}
    assert set(parts) == {kept.run(arm, seed) for arm in "AB" for seed in (100, 101)}
    for seed in (100, 101):
        run = parts[kept.run("A", seed)]
        assert set(run.table["quantity"]) == {"rank"}
        assert run.snapshot_names() == []
        assert {path.name for path in run.path.iterdir()} == {"run.json", "records.parquet"}


def edit_json(file: Path, **fields: Any) -> None:
    file.write_bytes(json.dumps(json.loads(file.read_bytes()) | fields).encode())


def copy_inside(excerpt: Path) -> None:
    shutil.copytree(excerpt, excerpt / "sub")


def move_outside(excerpt: Path) -> None:
    moved = excerpt.parents[4] / "elsewhere"
    shutil.move(excerpt, moved)
    excerpt.symlink_to(moved)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            shutil.rmtree,
            r"shown/RUN: no finished run with the scores in runs\.csv, but figures/ranks\.parquet .*",
        ),
        (lambda run: (run / "records.parquet").write_bytes(b"x"), r"FIGURE: cannot read .*checksum differs.*"),
        (lambda run: (run / "records.parquet").unlink(), r"FIGURE: cannot read records\.parquet.*"),
        (lambda run: (run / "run.json").write_text("{"), r"FIGURE: .*run\.json.*"),
        (lambda run: edit_json(run / "run.json", id=[]), r"FIGURE: cannot read id of .*run\.json.*"),
        (lambda run: edit_json(run / "run.json", seed=7), r"FIGURE: shown/RUN: seed differs from runs\.csv"),
        (lambda run: edit_json(run / "run.json", method={"name": "lora"}), r"FIGURE: shown/RUN: method differs .*"),
        (lambda run: edit_json(run / "run.json", parents=["../x"]), r"FIGURE: shown/RUN: its earlier phases .*"),
        (copy_inside, r"FIGURE: two folders of run .*"),
        (move_outside, r"shown/RUN: a symbolic link, whose target is not kept"),
    ],
)
def test_a_damaged_excerpt_is_one_line(finished: Study, damage: Callable[[Path], None], line: str) -> None:
    run = kept_runs.read(finished.folder).run("A", 101)
    damage(finished.folder / "shown" / run)
    (finished.folder / "MANIFEST").write_text(evidence_manifest.full_manifest(finished.folder, finished.file))
    (found,) = finished.differences()
    line = line.replace("FIGURE", r"figures/ranks\.parquet: cannot be drawn again").replace("RUN", run)
    assert re.fullmatch(line, found), found


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda about: replace(about, runs=about.runs[:1]), "runs: kept 1 run (A), recomputed 2 runs (A, B)"),
        (lambda about: replace(about, runs=(*about.runs, about.runs[0])), "runs: kept 3 runs (A, B, A), recomputed "),
        (lambda about: replace(about, alt="Ranks of B"), "alt: kept 'Ranks of B', recomputed 'Ranks of A'"),
        (lambda about: replace(about, heading="q"), "heading: kept 'q', recomputed 'p'"),
    ],
)
def test_a_figure_that_shows_other_runs_or_has_other_text_is_named(
    finished: Study, change: Callable[[Any], Any], line: str
) -> None:
    kept = kept_runs.read(finished.folder)
    about = change(kept.figures["ranks"].about)
    kept_figures.write(finished.folder, "ranks", pd.read_parquet(finished.folder / "figures" / "ranks.parquet"), about)
    forge_image(finished, "ranks", runs=list(about.runs))
    (found,) = finished.differences()
    for run, name in zip(kept.figures["ranks"].about.runs, "AB", strict=True):
        found = found.replace(run, name)
    assert found.startswith(f"figures/ranks.parquet: {line}")


def test_an_excerpt_of_no_run_is_named(finished: Study) -> None:
    (finished.folder / "shown" / "0123456789ab").mkdir()
    (finished.folder / "shown" / "other").write_bytes(b"")
    (finished.folder / "MANIFEST").write_text(evidence_manifest.full_manifest(finished.folder, finished.file))
    assert finished.differences() == ["shown/0123456789ab: not a run of runs.csv", "shown/other: not a run of runs.csv"]


@pytest.mark.parametrize(("column", "value"), [("settings", "[]"), ("method", "[]"), ("trained_parameters", "inf")])
def test_a_damaged_cell_of_a_shown_run_raises_nothing(finished: Study, column: str, value: str) -> None:
    runs = pd.read_csv(finished.folder / "runs.csv", dtype="str", keep_default_na=False)
    runs.loc[runs["arm"] == "B", column] = value
    (finished.folder / "runs.csv").write_bytes(csv_tables.to_csv(runs))
    assert any(line.startswith("figures/scores.parquet: ") for line in finished.differences())
    redraw.draw_figures(finished.folder, finished.out, finished.images, SECTIONS, "abc")


def test_figures_are_drawn_from_the_kept_parts_of_the_runs(finished: Study) -> None:
    kept = (finished.folder / "figures" / "ranks.parquet").read_bytes()
    for file in (finished.folder / "figures" / "ranks.parquet", finished.images / "ranks.png"):
        file.unlink()
    shutil.rmtree(finished.out)
    redraw.draw_figures(
        finished.folder, finished.out, finished.images, SECTIONS, kept_runs.read(finished.folder).runs["commit"].iloc[0]
    )
    assert (finished.folder / "figures" / "ranks.parquet").read_bytes() == kept
    assert finished.differences() == []


def test_runs_may_share_an_earlier_phase_but_no_run_has_two_folders(tmp_path: Path) -> None:
    for run in "ab":
        plant_spectra(tmp_path / run / "1-tune")
    find = run_finder(tmp_path)
    assert find({"run": "other-0123"}) is None
    with pytest.raises(ValueError, match=r"^two folders of run run: .*a/1-tune/run and .*b/1-tune/run$"):
        find({"run": "run-0123"})
