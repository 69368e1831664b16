"""``lorascope survey``: a table of many adapters and runs, one line each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import Folder, Name, Paths, command
from lorascope.diagnosis.survey import Surveyed, find_adapters, survey
from lorascope.experiments.executors import use_backend
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.safe_csv import csv_text
from lorascope.files.text_layout import (
    UNLIMITED,
    TableColumn,
    aligned_table,
    format_norm,
    format_number,
    format_span,
    make_console,
    render_text,
)
from lorascope.files.typed_json import json_values


@command
def main(
    paths: Paths = (),
    /,
    *,
    base: Folder = None,
    backend: Name = None,
    address: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    jobs: Annotated[int | None, arg(metavar="N")] = None,
    json: bool = False,
    csv: bool = False,
) -> int:
    """Survey adapters and runs, however many, with one line each: kind, rank, norm, and what the doctor found.

    Lines are printed as they are measured. The exit code is 1 if an adapter cannot be read; its line gives the reason.

    Example: lorascope survey adapters

    Parameters
    ----------
    paths
        Folders, which are searched for adapters and runs, or adapters.
    base
        Folder of the base model of all adapters.
    backend
        Loky (this machine), dask or ray.
    address
        Cluster address, such as tcp://host:8786.
    jobs
        Number of parallel readers; 1 if neither this nor a backend is given.
    json
        Print JSON: one object per line.
    csv
        Print CSV.
    """
    if not paths:
        raise ValueError("PATH is required: lorascope survey adapters")
    if json and csv:
        raise ValueError("--json and --csv cannot be combined")
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"cannot read {printable(path)}: there is no such file or folder")
    count = failed = 0
    with use_backend(backend, address, jobs):
        for row in survey(_list_adapters(paths), base):
            if json:
                print(dumps(json_values(vars(row))), flush=True)
            elif csv:
                text = csv_text(pd.DataFrame([vars(row)], dtype=object))  # paths may have surrogates
                if count:  # the head is printed once
                    text = text.partition("\n")[2]
                print(text, end="", flush=True)
            else:
                print(_format_row(row, head=count == 0), flush=True)
            count += 1
            failed += bool(row.error)
    if not count:
        raise ValueError(f"no adapter or run in {', '.join(map(printable, paths))}")
    return int(bool(failed))


def _list_adapters(paths: Iterable[str]) -> Iterator[Path]:
    """Yield the adapters and runs in folders, which are searched as the rows are printed, and single files."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from find_adapters(path)
        else:
            yield path


# All but the last have a fixed width, because a row is printed before the next one is measured.
_PATH = TableColumn("path", 34, "path")
_COLUMNS = (
    _PATH,
    TableColumn("kind", 10, "kind"),
    TableColumn("rank", 6, "least_rank", format_span, "most_rank"),
    TableColumn("modules", 7, "modules", str),
    TableColumn("|dW|", 7, "update_norm", format_norm),
    TableColumn("eff", 5, "effective_rank", format_number),
    TableColumn("findings", None, "findings"),
)
_ERROR_COLUMNS = (_PATH, TableColumn("", None, "error"))


def _format_row(row: Surveyed, head: bool) -> str:
    """Format an adapter or run, or the reason why it was not measured, as one line under the head of the table."""
    target = make_console(sys.stdout, UNLIMITED)
    if not row.error:
        return render_text(target, aligned_table(_COLUMNS, [vars(row)], head=head))
    # An error is as long as it needs to be, from the second column on.
    tables = [aligned_table(_ERROR_COLUMNS, [vars(row)], head=False)]
    if head:
        tables.insert(0, aligned_table(_COLUMNS, []))
    return render_text(target, *tables)
