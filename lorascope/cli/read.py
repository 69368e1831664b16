"""``lorascope read``: the words that components of an update use, and what they write."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import File, Folder, Name, SavedState, command, reject
from lorascope.cli.opened_runs import open_runs
from lorascope.files.printable import printable_lines
from lorascope.files.seals import require_own
from lorascope.files.typed_json import json_values
from lorascope.files.whole_files import json_bytes, require_absent, write_bytes


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    model: Name = None,
    rows: Name = None,
    top: Annotated[int, arg(metavar="N")] = 8,
    state: SavedState = "last",
    base: Folder = None,
    out: Annotated[File, arg(aliases=["-o"])] = None,
    json: bool = False,
) -> int:
    """Read which words the components of an adapter use, and what they make the model say.

    Components are ordered on rows of the training split, and words are measured on rows of the validation split, at
    least 200. A word is used if its contribution is larger than that of random components. Nothing is trained.

    Example: lorascope read runs/lora --model minilm --rows sentiment/movies -o reading.html

    Parameters
    ----------
    run
        Adapter or run: a folder, a .safetensors file, or a name on the Hugging Face Hub.
    model
        Its base model: minilm, smollm2, a folder, a GGUF file or a Hub id.
    rows
        Rows to read: sentiment, a CSV, JSONL or Parquet file, or a Hugging Face dataset.
    top
        Number of components.
    state
        Saved parameters.
    base
        Base model of an adapter whose files have no shapes.
    out
        Write the cards to this .html file, which works offline, or the result to this new .json file; as reading.json
        in the folder of the run, it is in its report card.
    json
        Print JSON.
    """
    reject(
        {
            "RUN is required: lorascope read runs/lora --model minilm --rows sentiment/movies": run is None,
            "--model and --rows are required: words are read with both": model is None or rows is None,
            f"--out must end in .html or .json, got {out}": out is not None
            and Path(out).suffix not in (".html", ".json"),
        }
    )
    if out is not None:
        # Before the rows are read, which may take minutes.
        if Path(out).suffix == ".json":
            require_absent(Path(out))
        else:
            require_own(Path(out), "html")
    (opened,) = open_runs([str(run)], base)
    from lorascope.insight.reader import read  # imports torch

    reading = read(opened, str(model), str(rows), top, state=state, progress=sys.stderr.isatty())
    if out is not None and Path(out).suffix == ".json":
        write_bytes(Path(out), json_bytes(json_values(reading.to_json())))
    elif out is not None:
        # Charts take a second to import, and most calls only print.
        from lorascope.pages.reading_page import write_reading

        write_reading(out, reading)
    if json:
        print(dumps(json_values(reading.to_json()), indent=1))
        return 0
    for card in reading.cards:
        print(printable_lines(repr(card)), end="\n\n")
    print(printable_lines(repr(reading)))
    return 0
