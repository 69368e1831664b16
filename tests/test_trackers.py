"""Tests of trackers: what their own libraries read back is the pooled table of the run, and nothing else changes."""

from __future__ import annotations

import gc
import json
import math
import random
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from killing import SETTINGS, TwoPhases
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import by_trainer, fresh, same_rows, same_weights, training_rows

import lorascope as ls
from lorascope.analysis import norms
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.inputs import models
from lorascope.observe.observer import Observer
from lorascope.plots import run_overview
from lorascope.schema.module_roles import Location, parse
from lorascope.schema.records import QUANTITIES, Message, Record
from lorascope.training.curve_report import pool_records
from lorascope.training.trackers import _log_message, tracker_names

LORA = ls.LoRA(rank=2, lr=1e-2, head_lr=1e-2)
DROPOUT = ls.LoRA(rank=2, lr=1e-2, dropout=0.2)
NORMS = [ls.observe.norms(every=2)]


def train(bert, task, out, method=LORA, **settings):
    model = models.load(bert, task=task)
    return model, ls.train(model, task, method, out=out, observe=NORMS, **SETTINGS | settings)


def pooled(table: pd.DataFrame) -> dict[tuple[str, int], float]:
    """Pool a table by ``analysis.norms``, which is independent of the report; the values by curve and step."""
    whole = table[(table["module"] == "") & table["index"].isna()]
    found = {(row.quantity, row.step): row.value for row in whole.itertuples()}
    several = table.loc[table["layer"].notna(), "stack"].nunique() > 1
    for quantity in table.loc[table["module"] != "", "quantity"].unique():
        if QUANTITIES[quantity].index != "none" and quantity != "importance":
            continue
        rows = norms.select_quantity(table, quantity)
        for cell in norms.pool_modules(rows, by=()).itertuples():
            found[f"{quantity}/all", cell.step] = cell.value
        for cell in norms.pool_modules(rows).itertuples():
            inside = not pd.isna(cell.layer)
            name = f"layer_{cell.layer:02d}" if inside else cell.place.replace(" ", "_")
            found[f"{quantity}/{cell.stack}_{name}" if several and inside else f"{quantity}/{name}", cell.step] = (
                cell.value
            )
        inside = rows.dropna(subset="layer")
        inside = inside[inside["role"] != "block"]
        for cell in norms.pool_modules(inside, by=("role",)).itertuples() if len(inside) else ():
            found[f"{quantity}/role_{cell.role}", cell.step] = cell.value
    return {key: value for key, value in found.items() if not np.isnan(value)}


def curves(run) -> dict[tuple[str, int], float]:
    """Pool the rows of a run as its report does, under the names of a tracker: sums are exact, so in any order."""
    locations = {row.module: Location(row.stack, row.layer, row.role) for row in run.meta.modules}
    found = {}
    for step, rows in run.table.groupby("step"):
        records = [
            Record(row.quantity, row.value, row.module, None if pd.isna(row.index_) else row.index_)
            for row in rows.rename(columns={"index": "index_"}).itertuples()
        ]
        for name, value in pool_records(records, locations).items():
            group, _, rest = name.partition("_")
            own = f"{group}/{rest}" if group in ("eval", "test") else f"train/{name}"
            found[name if "/" in name else own, step] = value
    return found


def events(folder) -> dict[tuple[str, int], float]:
    """Read the scalars in TensorBoard's files; no step may occur twice."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows = [(tag, event.step, event.value) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)]
    found = {(tag, step): value for tag, step, value in rows}
    assert len(found) == len(rows)
    return found


def texts(folder, name: str) -> list[tuple[int, str]]:
    """Read the texts of a name in TensorBoard's files, with their steps."""
    read = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in read.Tensors(f"{name}/text_summary")]


def in_float32(values: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {key: float(np.float32(value)) for key, value in values.items()}


@pytest.mark.parametrize("method", [LORA, ls.Full(), ls.AdaLoRA(init_rank=4, target_rank=2), ls.LISA(n_active=1)])
def test_curves_are_pooled_as_by_the_figures(method, bert, task, tmp_path):
    _, run = train(bert, task, tmp_path / "run", method)
    locations = {row.module: Location(row.stack, row.layer, row.role) for row in run.meta.modules}
    found = {}
    for step, rows in run.table.groupby("step"):
        columns = zip(rows["quantity"], rows["value"], rows["module"], rows["index"], strict=True)
        records = [Record(*row[:3], index=None if pd.isna(row[3]) else row[3]) for row in columns]
        found |= {(name, step): value for name, value in pool_records(records, locations).items()}
    assert found == pytest.approx(pooled(run.table), rel=1e-12)


@dataclass(kw_only=True)
class Stop(Observer):
    """Observer that fails at a step, as out of memory."""

    at: ClassVar[int] = -1

    def __call__(self, step):
        if step.finished == self.at:
            raise MemoryError
        return ()


@dataclass(kw_only=True)
class Messages(Observer):
    """Observer that has a message after two of the steps."""

    every: int = 2

    def __call__(self, step):
        return [Message("alarm/LS001", f"text {step.finished}")] if step.finished in (2, 4) else []


def train_in_two(bert, task, out, monkeypatch, at=4, **settings):
    """Train until a step that fails, and resume."""
    settings = {"out": out, "observe": [*NORMS, Messages(), Stop()]} | SETTINGS | settings
    monkeypatch.setattr(Stop, "at", at)
    with pytest.raises(MemoryError):
        ls.train(models.load(bert, task=task), task, DROPOUT, **settings)
    monkeypatch.setattr(Stop, "at", -1)
    return ls.train(models.load(bert, task=task), task, DROPOUT, **settings)


def without_time(values):
    """Leave out the time, which differs between a step and its repetition."""
    return {key: value for key, value in values.items() if key[0] != "train/seconds"}


def test_tensorboard_has_the_pooled_table_of_the_run(bert, task, tmp_path):
    _, run = train(bert, task, tmp_path / "run", report_to="tensorboard")
    found = events(run.path / "tensorboard")
    assert found == in_float32(curves(run))


def test_tensorboard_has_the_messages_once_each_and_the_run_has_none(bert, task, tmp_path, monkeypatch):
    run = train_in_two(bert, task, tmp_path / "run", monkeypatch, report_to="tensorboard")
    assert texts(run.path / "tensorboard", "alarm/LS001") == [(2, "text 2"), (4, "text 4")]
    assert "alarm" not in run.table["quantity"].cat.categories


@pytest.mark.parametrize("method", [LORA, ls.Full()])
def test_tensorboard_has_gradient_norms_by_layer_and_role(method, bert, task, tmp_path):
    model, out = models.load(bert, task=task), tmp_path / "run"
    settings = SETTINGS | {"clip": 1e6, "observe": [ls.observe.gradients(every=1)], "report_to": "tensorboard"}
    run = ls.train(model, task, method, out=out, **settings)
    found = events(out / "tensorboard")
    rows = run.table[run.table["quantity"] == "gradient_norm"]
    rows = rows.assign(squares=rows["value"] ** 2)
    expected = {}
    for (step, layer), part in rows.groupby(["step", "layer"]):
        expected[f"gradient_norm/layer_{layer:02d}", step] = part["squares"].sum() ** 0.5
    for (step, role), part in rows.dropna(subset="layer").groupby(["step", "role"], observed=True):
        expected[f"gradient_norm/role_{role}", step] = part["squares"].sum() ** 0.5
    for step in range(1, SETTINGS["steps"] + 1):
        expected["gradient_norm/all", step] = found["train/grad_norm", step]  # nothing is clipped
    assert {"gradient_norm/layer_00", "gradient_norm/layer_01", "gradient_norm/role_q"} < {name for name, _ in expected}
    own = {key: value for key, value in found.items() if key[0].startswith("gradient_norm/")}
    outside = {f"gradient_norm/{role}" for role in rows.loc[rows["layer"].isna(), "role"].unique()}
    assert {key for key in own if key[0] not in outside} == expected.keys()
    assert {key: own[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_tensorboard_has_images_and_the_configuration(bert, task, tmp_path):
    _, run = train(bert, task, tmp_path / "run", ls.AdaLoRA(init_rank=4, target_rank=2), report_to="tensorboard")
    read = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    drawable = ls.plots.available(run).query("drawable")["figure"]
    names = {"update_norm_heat", "rank_allocation", "spectrum", "importance"} & {*drawable}
    assert len(names) >= 3
    assert {*read.Tags()["images"]} == {f"charts/{name}" for name in names}
    for name in names:
        (image,) = read.Images(f"charts/{name}")
        assert (image.step, image.encoded_image_string[:4]) == (SETTINGS["steps"], b"\x89PNG")
        assert image.width > 300
    (hparams,) = (run.path / "tensorboard").glob("*/hparams.yml")
    text = hparams.read_text(encoding="utf-8").splitlines()
    assert {f"id: {run.id}", "method.init_rank: 4", "settings.steps: 5", "task: toy"} <= {*text}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of MLflow
def test_mlflow_has_the_pooled_table_of_the_run(bert, task, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        with mlflow.start_run() as mine:  # the run of the user continues around it
            run = train_in_two(bert, task, tmp_path / "run", monkeypatch, report_to="mlflow")
            assert mlflow.active_run().info.run_id == mine.info.run_id
        client = mlflow.MlflowClient()
        (found,) = client.search_runs([client.get_experiment_by_name("lorascope").experiment_id])
        metrics = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
        values = {(name, each.step): each.value for name, history in metrics.items() for each in history}
        assert len(values) == sum(map(len, metrics.values()))
        assert without_time(values) == without_time(curves(run))
        assert (found.info.run_name, found.info.status, found.data.params["id"]) == ("run", "FINISHED", run.id)
        images = {file.path for file in client.list_artifacts(found.info.run_id, "charts")}
        assert "charts/update_norm_heat.png" in images
        tags = {name: text for name, text in found.data.tags.items() if name.startswith("alarm")}
        assert tags == {"alarm/LS001/step_2": "text 2", "alarm/LS001/step_4": "text 4"}
    finally:
        mlflow.set_tracking_uri(before)


def wandb_records(file: Path) -> list[Any]:
    """Read a file of W&B: the log format of LevelDB after 7 bytes, with W&B's own messages."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, found, part, position = file.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        room = -position % 2**15
        if 0 < room < 7:
            position += room
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # complete, or the last part
            found.append(messages.Record.FromString(part))
            part = b""
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of W&B
def test_wandb_has_the_pooled_table_of_the_run(bert, task, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with wandb.init(project="mine") as mine:  # the run of the user is another one
        run = train_in_two(bert, task, tmp_path / "run", monkeypatch, report_to="wandb")
        assert wandb.run is mine
        mine.log({"still": 1.0})
    files = [file for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) if mine.id not in file.name]
    values, images, config, ids, alerts = {}, set(), {}, set(), []
    for record in [record for file in files for record in wandb_records(file)]:
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("lorascope", "run")
            ids.add(record.run.run_id)
        if record.HasField("alert"):
            alerts.append((record.alert.title, record.alert.text, record.alert.level))
        config |= {item.key: json.loads(item.value_json) for item in [*record.run.config.update, *record.config.update]}
        for item in record.history.item:
            name, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
            if name.startswith("charts/"):
                images.add(name.rpartition("/")[0])
            elif not name.startswith("_"):
                assert (name, record.history.step.num) not in values
                values[name, record.history.step.num] = value
    assert len(ids) == 1
    assert without_time(values) == without_time(curves(run))
    assert {"charts/update_norm_heat", "charts/rank_allocation"} <= images
    assert (config["id"], config["method.rank"], config["settings.steps"]) == (run.id, 2, 5)
    assert alerts == [("alarm/LS001", f"step {step}: text {step}", "WARN") for step in (2, 4)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of ClearML
def test_clearml_has_the_pooled_table_of_the_run(bert, task, tmp_path, monkeypatch):
    clearml = pytest.importorskip("clearml")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path))
    clearml.Task.set_offline(True)
    model, observe = models.load(bert, task=task), [*NORMS, Messages()]
    run = ls.train(model, task, LORA, out=tmp_path / "run", observe=observe, report_to="clearml", **SETTINGS)
    (session,) = tmp_path.glob("**/offline-*.zip")
    with zipfile.ZipFile(session) as archive:
        lines = archive.read("metrics.jsonl").decode().splitlines()
        log = archive.read("log.jsonl").decode()
    assert "step 2: alarm/LS001: text 2" in log
    events = [event for line in lines for event in json.loads(line)]
    values, images = {}, set()
    for event in events:
        title, series = event["metric"], event["variant"]
        if "url" in event:
            images.add(title)
        elif not title.startswith(":"):  # a value of the machine
            values[title if "/" in title else f"{series}/{title}", event["iter"]] = event["value"]
    assert without_time(values) == pytest.approx(without_time(curves(run)))
    assert {event["variant"] for event in events if event["metric"] == "loss"} == {"train", "eval", "test"}
    assert {"charts/update_norm_heat", "charts/rank_allocation"} <= images


@pytest.mark.filterwarnings("ignore")  # of Trackio
def test_trackio_has_the_pooled_table_of_the_run(bert, task, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = train_in_two(bert, task, tmp_path / "run", monkeypatch, report_to="trackio")
    (known,) = SQLiteStorage.get_run_records("lorascope")
    assert known["name"] == "run"
    values, images = {}, set()
    for row in SQLiteStorage.get_logs("lorascope", "run"):
        step = row.pop("step")
        row.pop("timestamp")
        images |= {name for name, value in row.items() if isinstance(value, dict)}
        new = {(name, step): value for name, value in row.items() if not isinstance(value, dict)}
        assert not new.keys() & values.keys()
        values |= new
    assert without_time(values) == without_time(curves(run))
    assert "charts/update_norm_heat" in images
    alerts = [
        (each["title"], each["text"], each["level"], each["step"]) for each in SQLiteStorage.get_alerts("lorascope")
    ]
    assert sorted(alerts) == [("alarm/LS001", f"text {step}", "warn", step) for step in (2, 4)]


@pytest.fixture(scope="module")
def rows(bert, task):
    return training_rows(bert, task)


def test_trainer_reports_the_recorded_values_to_its_own_tensorboard(bert, task, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    one, other = fresh(bert, task), fresh(bert, task)
    recorder = ls.TrainerRecorder(observe=NORMS, report=True)
    trainer = by_trainer(one, rows, tmp_path / "with", recorder=recorder, report_to="tensorboard", logging_steps=4)
    bare = by_trainer(other, rows, tmp_path / "without", logging_steps=4)
    same_weights(one, other)
    run = ls.load(tmp_path / "with/lorascope")
    found = events(tmp_path / "board")
    start = "train/lorascope/"
    sent = {(name.removeprefix(start), step): value for (name, step), value in found.items() if name.startswith(start)}
    assert sent == {key: value for key, value in in_float32(curves(run)).items() if not key[0].startswith("train/")}
    assert {step for _, step in sent} == {0, 2, 4, 6}
    # The Trainer logs when it did before, and its history has nothing else.
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    history = [
        [{k: v for k, v in row.items() if k not in times} for row in each.state.log_history] for each in (trainer, bare)
    ]
    assert history[0] == history[1]
    assert [step for name, step in found if name == "train/loss"] == [4]


def test_trainer_without_trackers_reports_to_none(bert, task, rows, tmp_path):
    by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder(report=True))
    assert ls.load(tmp_path / "lorascope").finished


class Fake(tracking.GeneralTracker):
    """Tracker of a user, which stores what it gets, and fails or draws random numbers on request."""

    name = "fake"
    requires_logging_directory = False
    logged: ClassVar[list[tuple[dict[str, float], int]]] = []
    ended: ClassVar[list[str]] = []
    fails_at: ClassVar[str] = ""

    def __init__(self, project):
        super().__init__()
        self.project = project

    @property
    def tracker(self):
        return None

    def act(self, what):
        torch.rand(3), np.random.rand(3), random.random()
        if what == self.fails_at:
            raise ConnectionError("no route to\nthe host")

    def start(self):
        self.act("start")

    def store_init_configuration(self, values):
        self.act("configuration")

    def log(self, values, step=None):
        self.act("log")
        self.logged.append((values, step))

    def finish(self):
        self.ended.append(self.project)
        self.act("finish")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    for name in ("logged", "ended"):
        monkeypatch.setattr(Fake, name, [])
    return Fake


def test_training_is_bitwise_equal_with_and_without_trackers(fake, bert, task, tmp_path):
    one, plain = train(bert, task, tmp_path / "without", DROPOUT)
    other, run = train(bert, task, tmp_path / "with", DROPOUT, report_to=["tensorboard", "fake", "fake"])
    same_weights(one, other)
    same_rows(plain.table, run.table, but=["seconds"])
    assert plain.id == run.id
    assert plain.meta.checksums.keys() == run.meta.checksums.keys()
    assert {(name, step): value for values, step in fake.logged for name, value in values.items()} == curves(run)
    assert [step for _, step in fake.logged] == [0, 1, 2, 3, 4, 5]  # one call a step
    assert not (run.path / "resume").exists()


@pytest.mark.parametrize("where", ["log", "finish"])
def test_tracker_that_fails_warns_once_and_stops_nothing(where, fake, monkeypatch, bert, task, tmp_path):
    monkeypatch.setattr(fake, "fails_at", where)
    one, _ = train(bert, task, tmp_path / "without", DROPOUT)
    line = r"^cannot report to fake: ConnectionError: no route to; training and recording continue$"
    other, observe = models.load(bert, task=task), [*NORMS, Messages()]
    settings = SETTINGS | {"observe": observe, "report_to": ["fake", "tensorboard"]}
    with pytest.warns(UserWarning, match=line) as found:
        run = ls.train(other, task, DROPOUT, out=tmp_path / "with", **settings)
    assert len(found) == 1
    same_weights(one, other)
    assert run.finished
    assert events(run.path / "tensorboard") == in_float32(curves(run))


def test_figure_that_fails_warns_once_and_stops_nothing(monkeypatch, bert, task, tmp_path):
    monkeypatch.setattr(run_overview, "save_overview", lambda run, folder: 1 / 0)
    with pytest.warns(UserWarning, match="^cannot report to trackers by images: ZeroDivisionError: "):
        _, run = train(bert, task, tmp_path / "run", report_to="tensorboard")
    assert run.finished


def test_tracker_that_cannot_start_is_one_line_before_training(fake, monkeypatch, bert, task, tmp_path):
    monkeypatch.setattr(fake, "fails_at", "start")
    with pytest.raises(ValueError, match=r"^cannot report to fake: ConnectionError: no route to$"):
        train(bert, task, tmp_path / "run", report_to=["tensorboard", "fake"])
    _, run = train(bert, task, tmp_path / "run")  # the folder can be used
    assert run.finished
    train(bert, task, tmp_path / "run", overwrite=True)  # its files are known


def test_later_phase_trains_without_a_tracker_that_cannot_start(fake, monkeypatch, bert, task, tmp_path):
    monkeypatch.setattr(fake, "start", lambda self: self.act("start") if not Fake.ended else 1 / 0)
    with pytest.warns(UserWarning, match=r"^cannot report to fake: ZeroDivisionError"):
        _, run = train(bert, task, tmp_path / "run", TwoPhases(), report_to=["fake", "tensorboard"])
    assert run.finished
    for phase in (*run.parents, run):
        assert events(phase.path / "tensorboard") == in_float32(curves(phase))


@pytest.mark.parametrize("given", ["tensorbord", ["tensorboard", "x\ny"], ""])
def test_unknown_tracker_lists_the_known_ones_before_anything_is_done(given, bert, task, tmp_path):
    line = r"^report_to must be one of aim, .*mlflow, .*tensorboard, .*wandb, all, none, got '.*'$"
    with pytest.raises(ValueError, match=line):
        train(bert, task, tmp_path / "run", report_to=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [["all", "none"], ["tensorboard", "all"]])
def test_all_trackers_next_to_another_name_are_rejected(given, bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"^report_to .(all|none). must be the only name, got"):
        train(bert, task, tmp_path / "run", report_to=given)


def test_tracker_that_is_not_installed_is_one_line_before_training(bert, task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=r"^report_to requires comet_ml: pip install comet-ml$"):
        train(bert, task, tmp_path / "run", report_to="comet_ml")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^report_to requires mlflow: pip install mlflow$"):
        ls.record(model, torch.optim.SGD(model.parameters()), tmp_path / "run", report_to="mlflow")
    words = ["train", "lora", "--steps", "1", "--report-to", "wandb", "-o", str(tmp_path / "run")]
    assert main(words) == 2
    assert capsys.readouterr().err == "lorascope: report_to requires wandb: pip install wandb\n"
    assert not (tmp_path / "run").exists()


def test_report_without_accelerate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"^report_to requires accelerate: pip install 'lorascope\[trackers\]'$"):
        tracker_names("tensorboard")


def test_all_and_none_are_those_of_the_trainer(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.COMETML])
    assert tracker_names("all") == tracker_names(["all"]) == ("tensorboard", "comet_ml")
    assert tracker_names("none") == tracker_names(None) == tracker_names([]) == ()
    assert tracker_names(["tensorboard", "tensorboard"]) == ("tensorboard",)


@pytest.mark.parametrize("at", [1, 4], ids=["before a checkpoint", "after a checkpoint"])
def test_resumed_training_continues_the_curves_without_a_step_twice(at, fake, monkeypatch, bert, task, tmp_path):
    run = train_in_two(bert, task, tmp_path / "run", monkeypatch, at, report_to=["tensorboard", "fake"])
    assert [step for _, step in fake.logged] == [0, 1, 2, 3, 4, 5]
    assert fake.ended == ["lorascope", "lorascope"]
    assert without_time(events(run.path / "tensorboard")) == without_time(in_float32(curves(run)))
    assert len([*(run.path / "tensorboard").glob("*/hparams.yml")]) == 1
    # A finished run is not trained, so it is not reported.
    ls.train(
        models.load(bert, task=task), task, DROPOUT, out=run.path, observe=[*NORMS, Messages(), Stop()], **SETTINGS
    )
    assert len(fake.logged) == 6


def test_own_loop_reports_what_it_records(fake, tmp_path):
    def loop(model, report_to, out):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with ls.record(model, optimizer, out, NORMS, report_to=report_to) as recorder:
            for _ in range(4):
                loss = model(torch.ones(2, 3)).square().mean()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)
                optimizer.zero_grad()
            recorder.evaluate(loss=0.5)

    one, other = (torch.nn.Sequential(torch.nn.Linear(3, 2)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    loop(one, ["tensorboard", "fake"], tmp_path / "with")
    loop(other, None, tmp_path / "without")
    same_weights(one, other)
    run = ls.load(tmp_path / "with")
    assert events(run.path / "tensorboard") == in_float32(curves(run))
    assert run.table.query("quantity == 'eval_loss'")["step"].tolist() == [4]
    assert fake.ended == ["lorascope"]
    assert not (run.path / "resume").exists()


def test_alarms_have_one_curve_per_id_with_the_number_of_modules():
    locations = {name: parse(name) for name in ("layers.0.q", "layers.0.v", "layers.1.q")}
    records = [Record("alarm", 22, "layers.0.q"), Record("alarm", 22, "layers.0.v"), Record("alarm", 1, "layers.1.q")]
    assert pool_records([*records, Record("alarm", 15)], locations) == {
        "alarm/LS022": 2,
        "alarm/LS001": 1,
        "alarm/LS015": 1,
    }


def test_tracker_that_failed_gets_no_messages(bert, task, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", fail)
    settings = SETTINGS | {"observe": [*NORMS, Messages()], "report_to": "tensorboard"}
    with pytest.warns(UserWarning, match="^cannot report to tensorboard: OSError: disk full;") as found:
        ls.train(models.load(bert, task=task), task, LORA, out=tmp_path, **settings)
    assert len(found) == 1


@dataclass(kw_only=True)
class StopsLast(Observer):
    """Observer that stops a training at its last step, with a message."""

    every: int = 1

    def __call__(self, step):
        if not step.last:
            return []
        step.stop = "stopped"
        return [Message("alarm/LS001", "the end")]


def test_stop_at_the_last_step_is_reported(bert, task, tmp_path):
    settings = SETTINGS | {"observe": [*NORMS, StopsLast()], "report_to": "tensorboard"}
    with pytest.raises(RuntimeError, match="stopped"):
        ls.train(models.load(bert, task=task), task, LORA, out=tmp_path, **settings)
    assert texts(tmp_path / "tensorboard", "alarm/LS001") == [(SETTINGS["steps"], "the end")]
    assert events(tmp_path / "tensorboard") == in_float32(curves(ls.load(tmp_path)))


def test_comet_gets_every_message_with_its_step():
    writer, found = SimpleNamespace(), []
    writer.log_text = lambda text, step, metadata: found.append((text, step, metadata["name"]))
    for step in (2, 4):
        _log_message("comet_ml", SimpleNamespace(writer=writer), Message("alarm/LS001", f"text {step}"), step)
    assert found == [("text 2", 2, "alarm/LS001"), ("text 4", 4, "alarm/LS001")]


@pytest.mark.filterwarnings("ignore:LS019")
def test_alarm_that_stops_a_training_is_its_last_message(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer, observe = torch.optim.SGD(model.parameters(), lr=0.0), [ls.observe.alarms(every=1, stop="LS019")]
    with ls.record(model, optimizer, tmp_path, observe, report_to="tensorboard") as recorder:
        for _ in range(10):
            loss = model(torch.ones(4, 3)).sum()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
            if recorder.stopped:
                break
    run = ls.load(tmp_path)
    (found,) = texts(tmp_path / "tensorboard", "alarm/LS019")
    assert run.meta.error.endswith(found[1].partition("; fix: ")[0])
    assert [found[0]] == run.table.query("quantity == 'alarm'")["step"].unique().tolist()


@pytest.mark.parametrize("quantity", ["update_norm", "relative_update", "rank"])  # pooled by norm, mean and sum
def test_infinite_and_huge_values_of_a_diverging_training_do_not_end_it(quantity):
    locations = {name: parse(name) for name in ("layers.0.q", "layers.0.v")}
    for one, other in ((math.inf, -math.inf), (1.7e308, 1.7e308)):
        records = [Record(quantity, one, "layers.0.q"), Record(quantity, other, "layers.0.v")]
        assert not math.isfinite(pool_records(records, locations).get(f"{quantity}/all", math.nan))


def test_exception_in_an_own_loop_ends_its_trackers(fake, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(MemoryError), ls.record(model, torch.optim.SGD(model.parameters()), tmp_path, report_to="fake"):
        raise MemoryError
    assert ([step for _, step in fake.logged], fake.ended) == ([0], ["lorascope"])


def test_forgotten_recorder_ends_its_trackers(fake, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    recorder = ls.record(model, torch.optim.SGD(model.parameters()), tmp_path, report_to="fake")
    del recorder
    gc.collect()
    assert fake.ended == ["lorascope"]


def test_sweep_rejects_an_unknown_tracker_before_any_run(bert):
    table = {
        "model": bert,
        "task": "sentiment",
        "method": ["lora"],
        "settings": {"steps": 1, "report_to": "tensorbord"},
    }
    with pytest.raises(ValueError, match=r"^report_to must be one of aim"):
        grid.read(table)


@pytest.mark.slow
def test_sweep_reports_each_run(bert, task, tmp_path):
    runs = ls.sweep(bert, task, LORA, seeds=2, jobs=1, root=tmp_path, report_to=["tensorboard"], **SETTINGS)
    assert len(runs) == 2
    for run in runs:
        assert events(run.path / "tensorboard") == in_float32(curves(run))


def test_tracker_that_cannot_start_leaves_the_folder_of_a_recording_as_it_was(fake, monkeypatch, tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = ls.record(model, optimizer, tmp_path / "run").close()
    monkeypatch.setattr(fake, "fails_at", "start")
    for out in ("run", "new"):
        with pytest.raises(ValueError, match=r"^cannot report to fake: ConnectionError"):
            ls.record(model, optimizer, tmp_path / out, report_to="fake")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert ls.load(tmp_path / "run").id == before.id
