"""Text and HTML representations of a run."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lorascope.files.printable import printable

Lines = list[tuple[str, str]]


def as_text(lines: Sequence[tuple[str, str]]) -> str:
    """Format facts as text, one line per fact."""
    return "\n".join(f"{key:8}{printable(value)}" for key, value in lines)


def as_html(lines: Sequence[tuple[str, str]]) -> str:
    """Format facts as an HTML table."""
    left = " style='text-align:left'"
    rows = (f"<tr><th{left}>{key}</th><td{left}>{html.escape(printable(value))}</td></tr>" for key, value in lines)
    return f"<table>{''.join(rows)}</table>"


def training_lines(run: Any) -> Lines:
    """Return the facts of a run that lorascope trained or recorded."""
    meta = run.meta
    done = "" if run.finished else f", {meta.status}"
    lines = [
        ("run", f"{run.id}  {run.label}, seed {meta.seed}{done}"),
        ("model", f"{meta.model} on {meta.task}"),
        ("steps", f"{meta.settings['steps']}, batch size {meta.settings['batch_size']}"),
        ("folder", str(run.path)),
    ]
    if meta.error is not None:
        lines.append(("error", meta.error))
    if "last" not in meta.states:
        return lines
    if meta.test:
        lines.append(("test", f"{meta.test.name} {meta.test.metric:.4g}, loss {meta.test.loss:.4g}"))
    return lines + largest_lines(run)


def largest_lines(run: Any) -> Lines:
    """Return the five largest updates of a run."""
    lines = []
    for number, row in enumerate(run.summary().nlargest(5, "update_norm").to_dict("records")):
        rank = "" if pd.isna(row["rank"]) else f"  rank {row['rank']}"
        lines.append(("largest" if number == 0 else "", f"{row['module']}  |dW| {row['update_norm']:.3g}{rank}"))
    return lines
