"""``lorascope survey``: a table of many adapters and runs, one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from json import dumps
from pathlib import Path
from typing import Annotated, Any

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

    Lines are printed as they are measured. The exit code is 1 if an adapter cannot be read. The reasons follow the
    table on stderr, and are in the rows of --json and --csv.

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
    count, reasons = 0, []
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
            if row.error:
                reasons.append(row.error)
    if not count:
        raise ValueError(f"no adapter or run in {', '.join(map(printable, paths))}")
    if not (json or csv):
        # Between the lines of the table, they would break it.
        for reason in reasons:
            print(f"lorascope: {printable(reason)}", file=sys.stderr)
    return int(bool(reasons))


def _list_adapters(paths: Iterable[str]) -> Iterator[Path]:
    """Yield the adapters and runs in folders, which are searched as the rows are printed, and single files."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from find_adapters(path)
        else:
            yield path


def _dash_if_unknown(form: Callable[[Any], str]) -> Callable[[Any], str]:
    """Return a format of a number for a table, with a dash for None."""
    return lambda value: "-" if value is None else form(value)


# All but the last have a fixed width, because a row is printed before the next one is measured.
_COLUMNS = (
    TableColumn("path", 34, "path"),
    TableColumn("kind", 10, "kind"),
    TableColumn("rank", 6, "least_rank", format_span, "most_rank"),
    TableColumn("modules", 7, "modules", _dash_if_unknown(str)),
    TableColumn("|dW|", 7, "update_norm", _dash_if_unknown(format_norm)),
    TableColumn("eff", 5, "effective_rank", format_number),
    TableColumn("findings", None, "findings"),
)


def _format_row(row: Surveyed, head: bool) -> str:
    """Format an adapter or run as one line under the head of the table."""
    values = vars(row)
    if not row.modules:  # not measured
        values = values | {"kind": row.kind or "-", "update_norm": None}
    if row.error:
        values = values | {"findings": row.findings or "unreadable"}
    return render_text(make_console(sys.stdout, UNLIMITED), aligned_table(_COLUMNS, [values], head=head))
