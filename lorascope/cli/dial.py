"""``lorascope dial``: what the parts of an update buy on a task and cost on other text."""

from __future__ import annotations

import sys
from json import dumps
from typing import Annotated, Literal

from tyro.conf import arg

from lorascope.cli.arguments import File, Folder, Name, SavedState, command
from lorascope.cli.opened_runs import open_measured
from lorascope.files.printable import printable, printable_lines
from lorascope.files.text_layout import format_frame


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    model: Name = None,
    task: Name = None,
    keep: Name = None,
    by: Literal["module", "component", "layer", "role", "intruder", "whole"] = "module",
    rows: Annotated[int, arg(metavar="N")] = 192,
    keep_rows: Annotated[int, arg(metavar="N")] = 192,
    scales: Annotated[str, arg(metavar="S,S,...")] = "0,0.25,0.5,0.75,1,1.25",
    exact: Annotated[int, arg(metavar="N")] = 20,
    margin: Annotated[float | None, arg(metavar="NATS")] = None,
    state: SavedState = "last",
    base: Folder = None,
    out: Annotated[File, arg(aliases=["-o"])] = None,
    json: bool = False,
) -> int:
    """Measure what each part of an adapter buys on its task, and what it costs on other text.

    Parts are removed one at a time, and the whole update is scaled. Nothing is trained. Intervals are over rows of the
    validation split; a part that these rows cannot decide says how many would.

    Example: lorascope dial runs/lora --model minilm --task sentiment/movies -o dial.csv

    Parameters
    ----------
    run
        Adapter or run: a folder, a .safetensors file, or a name on the Hugging Face Hub.
    model
        Its base model: minilm, smollm2, a folder, a GGUF file or a Hub id.
    task
        Its task: sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset.
    keep
        Text on which the model should stay as it was, as for --task (default: bundled sentences of other domains).
    by
        Parts of the update.
    rows
        Maximum number of rows of the task.
    keep_rows
        Maximum number of rows of the other text.
    scales
        Scales of the curves; 0 and 1 are always measured.
    exact
        With --by component: number of components that are removed.
    margin
        Increase of the task loss that a best scale may cost (default: the even share of a part).
    state
        Saved parameters.
    base
        Base model of an adapter whose files have no shapes.
    out
        Write the table to this new .csv file, for lorascope export --scales; as dial.csv in the folder of the run, it
        is in its report card.
    json
        Print JSON.
    """
    opened = open_measured("dial", run, (model, task), (out,), base)
    from lorascope.insight.dial import dial  # imports torch

    measured = dial(
        opened,
        str(model),
        str(task),
        keep,
        by=by,
        rows=rows,
        keep_rows=keep_rows,
        scales=_read_numbers(scales),
        exact=exact,
        margin=margin,
        state=state,
        progress=sys.stderr.isatty(),
    )
    if out is not None:
        measured.save(out)
    if json:
        print(dumps(measured.to_json(), indent=1))
        return 0
    columns = ["part", "learn", "forget", "learn_share", "forget_share", "verdict", "best_scale", "rows_needed"]
    print(printable_lines(repr(measured)), format_frame(measured.summary()[columns]), sep="\n\n")
    return 0


def _read_numbers(text: str) -> list[float]:
    try:
        return list(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"--scales must be numbers such as 0.5,0.75,1, got {printable(text)!r}") from None
