"""``lorascope advise``: what to change about a run or an adapter, from measurements that fit into a budget."""

from __future__ import annotations

import sys
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.cli.arguments import File, Name, SavedState, command, reject
from lorascope.cli.opened_runs import open_measured, open_runs
from lorascope.files.printable import count_or_no, printable
from lorascope.files.whole_files import json_bytes, write_bytes


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    model: Name = None,
    task: Name = None,
    keep: Name = None,
    budget: Annotated[float, arg(metavar="SECONDS")] = 120.0,
    retrain: Annotated[int, arg(metavar="N")] = 0,
    read: bool = False,
    rows: Annotated[int, arg(metavar="N")] = 192,
    keep_rows: Annotated[int, arg(metavar="N")] = 192,
    state: SavedState = "last",
    out: Annotated[File, arg(aliases=["-o"])] = None,
    html: File = None,
    verify: File = None,
    json: bool = False,
) -> int:
    """Say where the rank of an adapter went, and what to change: which scale to ship, what to cut, how to train next.

    Instruments run within the budget, the cheapest first: the dial, the price of the rank, and with --read the reader.
    At most three actions are printed, with their loss on held-out rows; one that these rows do not decide says confirm.
    Without --model and --task, only the files are read. Nothing is trained without --retrain.

    Example: lorascope advise runs/lora --model minilm --task sentiment/movies

    Parameters
    ----------
    run
        Adapter or run: a folder, a .safetensors file, or a name on the Hugging Face Hub (user/adapter).
    model
        Its base model: minilm, smollm2, a folder, a GGUF file or a Hub id.
    task
        Its task: sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset.
    keep
        Text on which the model should stay as it was, as for --task (default: bundled sentences of other domains).
    budget
        CPU seconds for the measurements.
    retrain
        Number of seeds with which to train at another rank, and with its components placed by size. The number of runs
        and their time are printed first.
    read
        Also read which words the three largest components use.
    rows
        Maximum number of rows of the task in the dial.
    keep_rows
        Maximum number of rows of the other text in the dial.
    state
        Saved parameters.
    out
        Write the advice to this new .json file, its receipt.
    html
        Write a report card with the advice to this new .html file.
    verify
        Measure the advice in this .json file again, and print the numbers that differ by more than 1e-6; the exit code
        is 1 if any does.
    json
        Print JSON.
    """
    reject(
        {
            "--verify takes everything but RUN from its file": verify is not None
            and any([model, task, keep, retrain, read, out, html]),
            "--model and --task require each other: losses are measured with both": (model is None) != (task is None),
            "--keep requires --model and --task": keep is not None and model is None,
            "--retrain requires --model and --task": retrain > 0 and model is None,
            "--read requires --model and --task": read and model is None,
            f"--retrain must be a number of seeds >= 0, got {retrain}": retrain < 0,
        }
    )
    if verify is not None:
        return _verify(verify, run, json)
    opened = open_measured("advise", run, (), (out, html))
    from lorascope.insight.advise import advise  # imports torch

    advice = advise(
        opened,
        model,
        task,
        keep,
        budget=budget,
        retrain=retrain,
        reads=read,
        rows=rows,
        keep_rows=keep_rows,
        state=state,
        progress=sys.stderr.isatty(),
    )
    if out is not None:
        write_bytes(Path(out), json_bytes(advice.to_json()))
    if html is not None:
        from lorascope.pages.report_card import report

        report(opened, html, advice=advice)
    if json:
        print(dumps(advice.to_json(), indent=1))
        return 0
    for line in repr(advice).splitlines():
        print(printable(line))
    return 0


def _verify(path: str, run: str | None, json: bool) -> int:
    """Print the numbers of an advice that differ when measured again, and return the exit code."""
    document = _read_advice(Path(path))
    (opened,) = open_runs([run or document["receipt"]["call"]["path"]], None)
    from lorascope.insight.repeated_advice import repeat  # imports torch

    lines = repeat(document, opened)
    if json:
        print(dumps(lines, indent=1))
        return int(bool(lines))
    print(f"{printable(path)}: {count_or_no(len(lines), 'difference')}")
    for line in lines:
        print(f"  {printable(line)}")
    return int(bool(lines))


def _read_advice(path: Path) -> dict[str, Any]:
    try:
        document = loads(path.read_text(encoding="utf-8"))
        document["receipt"]["call"]["plan"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--verify requires a file that lorascope advise -o wrote, got {printable(path)}") from None
    return dict(document)
