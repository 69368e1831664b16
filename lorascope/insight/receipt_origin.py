"""Origin of a measurement for its receipt: the seed of the run, and the command that measures the same again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorascope.inputs import sources
from lorascope.inputs.tasks import Task
from lorascope.runs.result import Result

_DEFAULT_STATE = "last"


def origin_of(
    instrument: str,
    run: Result,
    model: str = "",
    task: Task | str | Path | None = None,
    keep: Task | str | Path | None = None,
    **options: object,
) -> dict[str, Any]:
    """Return seed and command of the receipt of a measurement.

    The command is "" if there is none: the run has no folder, or a text was passed as an object that no name loads.

    Parameters
    ----------
    instrument : str
        Name of the command.
    run : Result
        Measured run, adapter or series.
    model : str
        Its base model, if it was measured with one.
    task, keep : Task, str or path, optional
        Texts it was measured on, or their names.
    **options
        Further options of the command. One that is None, False or empty is omitted, and so is the state "last".
    """
    words = ["lorascope", instrument, str(run.path)]
    if model:
        words += ["--model", model]
    # The reader has no task: it reads rows.
    texts = {"--rows" if instrument == "read" else "--task": task, "--keep": keep}
    for option, text in texts.items():
        if text is not None:
            words += [option, str(getattr(text, "name", text))]
    for name, value in options.items():
        words += _option_words(name.replace("_", "-"), value)
    is_known = run.path is not None and all(_has_name(run, text) for text in (task, keep) if text is not None)
    return {"seed": run.meta.seed, "command": shlex.join(words) if is_known else ""}


def _option_words(name: str, value: Any) -> list[str]:
    if value is None or value is False or value == "" or value == () or (name, value) == ("state", _DEFAULT_STATE):
        return []
    # A zero stays, such as a margin of none.
    if value is True:
        return [f"--{name}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(_number_text, value))
    elif isinstance(value, float):
        value = _number_text(value)
    return [f"--{name}", str(value)]


def _number_text(number: float) -> str:
    """Return the shortest text that reads as the same number."""
    text = f"{number:g}"
    # Six digits are enough for most scales, and not for every margin.
    if float(text) == number:
        return text
    return repr(number)


def _has_name(run: Result, text: Task | str | Path) -> bool:
    """Return whether a command that names a text loads the same one for a run."""
    if not isinstance(text, Task):
        return True
    options = {}
    if text.name == run.meta.task:  # it is loaded as for the run
        options = dict(run.meta.task_options or {})
    return sources.is_source(text.name) and dict(text.options) == options
