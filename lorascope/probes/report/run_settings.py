"""Settings of the runs: a table of the arms, a table of the run folders, and every setting of each arm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.probes.report.html import Html, element, frame_table
from lorascope.runs.run import Run

_COLUMNS = {"steps": "steps", "batch_size": "batch size", "lr": "learning rate", "head_lr": "head learning rate"}


def settings(arms: Mapping[str, Sequence[Run]], folder: Path) -> Html:
    """Build the collapsible element with the settings of a probe's runs.

    Parameters
    ----------
    arms : mapping
        Label -> runs by seed.
    folder : path
        Folder of the report; paths of runs are relative to it.
    """
    return element(
        "details",
        element("summary", "Settings and runs"),
        frame_table("Arms", pd.DataFrame([_describe_arm(label, runs) for label, runs in arms.items() if runs])),
        frame_table(
            "Runs",
            pd.DataFrame([_describe_report_run(label, run, folder) for label, runs in arms.items() for run in runs]),
        ),
        *(_all_settings(label, runs[0]) for label, runs in arms.items() if runs),
    )


def model_name(run: Run) -> str:
    """Return the name of a run's model, without the folder that it was loaded from."""
    model = Path(run.meta.model)
    return model.name if model.is_absolute() else str(run.meta.model)


def _describe_arm(label: str, runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0]
    chosen = {name: first.meta.settings.get(key) for key, name in _COLUMNS.items()}
    described = {"arm": label, "method": first.label, "model": model_name(first), "data": first.meta.task}
    return described | chosen | {"seeds": ", ".join(str(run.seed) for run in runs)}


def _describe_report_run(label: str, run: Run, folder: Path) -> dict[str, Any]:
    test = run.meta.test
    return {
        "arm": label,
        "seed": str(run.seed),
        "run": run.id,
        "status": run.meta.status,
        "folder": "" if run.path is None else os.path.relpath(run.path, folder),
        "test": f"{test.name} {test.metric:.4g}" if test else "",
        "minutes": run.meta.total_seconds / 60,
    }


def _all_settings(label: str, run: Run) -> Html:
    stored = {"method": run.meta.recipe, "settings": run.meta.settings}
    lines = json.dumps(stored, indent=1, ensure_ascii=False, sort_keys=True)
    return element("details", element("summary", f"All settings of {label}"), element("pre", lines, tabindex="0"))
