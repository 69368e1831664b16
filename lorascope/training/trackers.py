"""Trackers such as TensorBoard, W&B and MLflow, by the names and the classes of ``accelerate.tracking``.

A run of ``train`` or ``record`` becomes one run of each tracker, in the project ``lorascope`` unless the tracker's own
environment variable names another. TensorBoard writes into the folder ``tensorboard`` of the run folder. A training
that resumes continues the runs of TensorBoard, W&B, MLflow and Trackio, and no tracker gets a step twice.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorascope.array_types import UInt8
from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import write_note
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.schema.records import Message
from lorascope.training.curve_report import CurveReport, describe_error
from lorascope.training.state import keep_generators

# The file in the run folder from which a resumed training continues.
STATE = "resume/trackers.json"
_PROJECT = "lorascope"
# accelerate passes the project explicitly, so that these variables would have no effect.
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
}
_DISTRIBUTIONS = {"comet_ml": "comet-ml"}
# MLflow rejects more values in one call.
_MOST_VALUES = 1000


def tracker_names(report_to: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of trackers: those given, every installed one for "all", or an empty tuple for "none".

    Raises
    ------
    ValueError
        A name is unknown, or the tracker or accelerate is not installed.
    """
    if not isinstance(report_to, str | Sequence | None):
        raise ValueError(f"report_to must be a name or a list of names, got {report_to!r}")
    requested = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if requested in ([], ["none"]):
        return ()
    classes = _classes()
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    installed = [str(name.value) for name in get_available_trackers()]
    if requested == ["all"]:
        return tuple(installed)
    for name in requested:
        if name in ("all", "none"):
            raise ValueError(f"report_to {name!r} must be the only name, got {printable(requested)}")
        if name not in classes:
            names = ", ".join([*sorted(classes), "all", "none"])
            raise ValueError(f"report_to must be one of {names}, got {printable(name)!r}")
        if name not in installed and name in LoggerType.list():
            raise ValueError(f"report_to requires {name}: pip install {_DISTRIBUTIONS.get(name, name)}")
    return tuple(dict.fromkeys(requested))


def _classes() -> Mapping[str, Any]:
    """Return the classes of accelerate's trackers by name, with those that the user registered there."""
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ModuleNotFoundError as error:
        raise ValueError("report_to requires accelerate: pip install 'lorascope[trackers]'") from error
    PartialState()  # the trackers need it
    return LOGGER_TYPE_TO_CLASS


@dataclass
class _State:
    """Last step that was sent, and the ids by which the trackers know their runs."""

    step: int = -1
    ids: dict[str, str] = field(default_factory=dict)


def tracker_report(names: Sequence[str]) -> TrackerReport | None:
    """Return the report to the trackers of these names, or None if there are none."""
    if not names:
        return None
    return TrackerReport(names)


class TrackerReport(CurveReport):
    """Report to trackers of accelerate."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self._trackers: dict[str, Any] = {}
        self._state, self._file = _State(), Path()

    @keep_generators()
    def open(self, path: Path, meta: Manifest) -> None:
        """Start the trackers, or continue their runs; a ValueError reports one that cannot start.

        In a later phase this is a warning, because it would stop a training.
        """
        super().open(path, meta)
        self._file = path / STATE
        try:
            self._state = read_json(self._file, _State)
        except (OSError, ValueError):
            self._state = _State()
        for name in self.names:
            try:
                self._trackers[name] = _start(name, path, meta, self._state)
            except Exception as error:  # it is code of another package
                if meta.parents:
                    self.fail(name, error)
                    continue
                self.close(None)
                raise ValueError(f"cannot report to {name}: {describe_error(error)}") from error

    def send(self, values: dict[str, float], messages: Sequence[Message], step: int) -> None:
        if step <= self._state.step:
            return
        self._state.step = step
        # Written first: a killed training may lose a step in the trackers, but repeats none.
        self._write_state()
        items = [*values.items()]
        for start in range(0, len(items), _MOST_VALUES):
            batch = items[start : start + _MOST_VALUES]
            for name, tracker in self._trackers.items():
                curves = {_curve(value_name, name): value for value_name, value in batch}
                self.attempt(name, partial(tracker.log, curves, step=step))
        for message in messages:
            for name, tracker in self._trackers.items():
                if name not in self._failed:
                    self.attempt(f"{name} by messages", partial(_log_message, name, tracker, message, step))

    def _write_state(self) -> None:
        """Write the state without waiting for the disk; without it, a resumed training would repeat steps."""
        with suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
        write_note(self._file, vars(self._state))

    @keep_generators()
    def close(self, run: Run | None) -> None:
        super().close(run)
        if run is not None and run.finished:
            self._show(run)
            with suppress(OSError):
                self._file.unlink()
                self._file.parent.rmdir()
        for name, tracker in self._trackers.items():
            self.attempt(name, tracker.finish)
        self._trackers.clear()

    def _show(self, run: Run) -> None:
        """Send figures of a finished run as images."""
        # This package is below the figures, so it finds them by name.
        overview = importlib.import_module("lorascope.plots.run_overview")
        with tempfile.TemporaryDirectory() as folder:
            try:
                files = overview.save_overview(run, Path(folder))
            except Exception as error:  # a figure of an unusual run must not end a training with an error
                self.fail("trackers by images", error)
                return
            for name, tracker in self._trackers.items():
                self.attempt(name, partial(_log_images, name, tracker, files, self._step))


# Trackers whose runs continue when a training resumes, and the id of such a run.
_IDS: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda tracker: tracker.run_name,
    "wandb": lambda tracker: tracker.run.id,
    "mlflow": lambda tracker: tracker.active_run.info.run_id,
    "trackio": lambda tracker: tracker.run.name,
}


def _start(name: str, path: Path, meta: Manifest, state: _State) -> Any:
    """Start a tracker: a new run with the configuration of the training, or the run in the state."""
    kind, id = _classes()[name], state.ids.get(name)
    configuration = {} if id else _configuration(path, meta)
    title = f"{path.parent.name}-{path.name}" if meta.phase and meta.phase[0] else path.name
    project = os.environ.get(_PROJECT_VARIABLES.get(name, ""), _PROJECT)
    match name:
        case "tensorboard":
            tracker = kind("tensorboard", path)
        case "wandb":  # next to the active run of the user, whose configuration accelerate would change
            resumed = {"id": id, "resume": "allow"} if id else {}
            tracker = kind(project, name=title, config=configuration, reinit="create_new", **resumed)
            configuration = {}
        case "mlflow":  # nested in the active run of the user, if there is one
            tracker = kind(project, run_name=title, run_id=id, nested_run=True)
        case "trackio":
            tracker = kind(project, name=title, resume="allow" if id else "never")
        case "swanlab":
            tracker = kind(project, experiment_name=title)
        case "clearml":
            tracker = kind(project, task_name=title)
        case "aim":
            tracker = kind(title)
        case _:
            tracker = kind(project, path) if kind.requires_logging_directory else kind(project)
    tracker.start()
    if configuration:
        tracker.store_init_configuration(configuration)
    if name in _IDS:  # known only now: the server of a tracker may choose it
        state.ids[name] = _IDS[name](tracker)
    return tracker


def _configuration(path: Path, meta: Manifest) -> dict[str, Any]:
    """Return the id, the recipe and the settings of a run as flat values."""
    groups: dict[str, Mapping[str, Any]] = {
        "": {"id": meta.id, "label": meta.label, "model": meta.model, "task": meta.task, "seed": meta.seed},
        "parameters.": {"trained": meta.parameters.trained, "total": meta.parameters.total},
        "method.": meta.method,
        "settings.": meta.settings,
    }
    flat: dict[str, Any] = {}
    for group, values in groups.items():
        for key, value in values.items():
            if isinstance(value, bool | int | float | str):
                flat[f"{group}{key}"] = value
            elif value is not None:
                flat[f"{group}{key}"] = json.dumps(value)
    return flat | {"folder": str(path.resolve())}


def _curve(name: str, tracker: str) -> str:
    """Return a name with its group, as the Trainer's trackers do: ``train/loss``, ``eval/loss``.

    For ClearML it is ``train_loss``, from which accelerate makes the series ``train`` of the plot ``loss``.
    """
    if "/" in name:
        return name
    separator = "_" if tracker == "clearml" else "/"
    group, _, quantity = name.partition("_")
    if group in ("eval", "test") and quantity:
        return f"{group}{separator}{quantity}"
    return f"train{separator}{name}"


def _log_message(name: str, tracker: Any, message: Message, step: int) -> None:
    """Send a message to a tracker, as an alert where it has alerts."""
    match name:
        case "tensorboard":
            tracker.log({message.name: message.text}, step=step)
        case "comet_ml":  # accelerate would replace the text of an earlier step
            tracker.writer.log_text(message.text, step=step, metadata={"name": message.name})
        case "wandb":
            tracker.run.alert(message.name, f"step {step}: {message.text}", level="WARN", wait_duration=0)
        case "trackio":
            tracker.run.alert(message.name, message.text, step=step)
        case "mlflow":  # a second message of one name does not replace the first
            importlib.import_module("mlflow").MlflowClient().set_tag(
                tracker.active_run.info.run_id, f"{message.name}/step_{step}", message.text
            )
        case "clearml":
            tracker.task.get_logger().report_text(f"step {step}: {message.name}: {message.text}")


def _log_images(name: str, tracker: Any, files: Sequence[Path], step: int) -> None:
    """Send images to a tracker; accelerate has no method for those of Comet and DVCLive."""
    if name == "mlflow":
        for file in files:
            tracker.log_artifact(str(file), "charts")
        return
    images = {f"charts/{file.stem}": _pixels(file) for file in files}
    match name:
        case "tensorboard":
            batches = {key: value[None] for key, value in images.items()}
            tracker.log_images(batches, step=step, dataformats="NHWC")
        case "trackio":
            image = importlib.import_module("trackio").Image
            tracker.log({key: image(value) for key, value in images.items()}, step=step)
        case "aim" | "clearml":
            tracker.log_images(images, step=step)
        case _:
            if hasattr(tracker, "log_images"):
                tracker.log_images({key: [value] for key, value in images.items()}, step=step)


def _pixels(file: Path) -> UInt8[np.ndarray, "height width rgb"]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
