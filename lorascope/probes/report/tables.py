"""Tables of the report as text: cells of a DataFrame, arms and runs of a probe, and the facts of the header."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_float, is_numeric_dtype, is_scalar

from lorascope.runs.run import Run

Arms = Mapping[str, Sequence[Run]]
LONG = 20  # rows; a longer table scrolls inside its box


def frame_cells(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the columns of a DataFrame, each with whether it is numeric, and its rows; a named index is a column."""
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    numeric = [is_numeric_dtype(kind) and not is_bool_dtype(kind) for kind in frame.dtypes]
    columns = list(zip(map(str, frame.columns), numeric, strict=True))
    return {"columns": columns, "rows": list(frame.itertuples(index=False, name=None))}


def format_value(value: Any) -> str:
    """Format a table cell: four significant digits for a float, a dash for a missing value."""
    if is_scalar(value) and pd.isna(value):
        return "–"
    return f"{value:.4g}" if is_float(value) else str(value)


def count(number: int, thing: str) -> str:
    """Format a number of things, such as "1 run" or "3 runs"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def arms_table(arms: Arms) -> pd.DataFrame:
    """Tabulate method, model, data, main settings and seeds of each arm with runs."""
    columns = {"steps": "steps", "batch_size": "batch size", "lr": "learning rate", "head_lr": "head learning rate"}
    return pd.DataFrame(
        {"arm": label, "method": runs[0].label, "model": _model_name(runs[0]), "data": runs[0].meta.task}
        | {name: runs[0].meta.settings.get(key) for key, name in columns.items()}
        | {"seeds": ", ".join(str(run.seed) for run in runs)}
        for label, runs in arms.items()
        if runs
    )


def runs_table(arms: Arms, folder: Path) -> pd.DataFrame:
    """Tabulate seed, status, folder (relative to ``folder``), test metric and minutes of each run."""
    rows = []
    for label, runs in arms.items():
        for run in runs:
            test = run.meta.test
            row = {"arm": label, "seed": str(run.seed), "run": run.id, "status": run.meta.status}
            row["folder"] = "" if run.path is None else os.path.relpath(run.path, folder)
            row["test"] = f"{test.name} {test.metric:.4g}" if test else ""
            rows.append(row | {"minutes": run.meta.total_seconds / 60})
    return pd.DataFrame(rows)


def study_facts(studies: Iterable[Arms], now: datetime) -> dict[str, str]:
    """Collect the facts of the header; a run that several probes share counts once."""
    runs = list({run.id: run for arms in studies for found in arms.values() for run in found}.values())
    metas = [run.meta for run in runs]
    seconds = sum(meta.total_seconds for meta in metas)
    listed: dict[str, Iterable[Any]] = {
        "Seeds": sorted({meta.seed for meta in metas if meta.seed is not None}),
        "Models": map(_model_name, runs),
        "Data": (meta.task or "" for meta in metas),
        "Device": (meta.device or "" for meta in metas),
        "Versions": (", ".join(f"{name} {of}" for name, of in (meta.versions or {}).items()) for meta in metas),
        "Commit": (meta.commit[:12] for meta in metas if meta.commit),
    }
    joined = {term: ", ".join(filter(None, dict.fromkeys(map(str, values)))) for term, values in listed.items()}
    written = {"Written": f"{now:%Y-%m-%d %H:%M} UTC"}
    trained = {"Runs": f"{count(len(runs), 'run')}, {seconds / 60:.0f} min of training"}
    return written | trained | {term: text for term, text in joined.items() if text}


def _model_name(run: Run) -> str:
    """Return the name of a run's model, without the folder that it was loaded from."""
    model = Path(run.meta.model)
    return model.name if model.is_absolute() else str(run.meta.model)
