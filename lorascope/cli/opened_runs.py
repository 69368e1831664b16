"""Loading of the runs, adapters and series of checkpoints that a command line names, also of those to measure."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.files.whole_files import require_absent
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import is_run, load, load_series, locate_result
from lorascope.runs.run import Run
from lorascope.runs.series import Series


def open_runs(paths: Sequence[str | Path], base: str | None, series: bool = False) -> list[Run | Adapter | Series]:
    """Open the runs and adapters that a command names by path or hub name, or all checkpoints in them for ``series``.

    Only adapters get the base, because a run has recorded its own norms. Skipped checkpoints are named on stderr.
    """
    if base is not None and all(map(is_run, paths)):
        raise ValueError(f"--base requires an adapter, got only runs: {', '.join(map(str, paths))}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        runs: list[Run | Adapter | Series] = []
        for path in paths:
            if series:
                runs.append(load_series(path, base))
            else:
                has_no_base = base is not None and is_run(locate_result(path))
                runs.append(load(path, None if has_no_base else base))
    for warning in caught:
        print(f"lorascope: {printable(str(warning.message))}", file=sys.stderr)
    return runs


def open_measured(
    name: str,
    run: str | None,
    texts: Sequence[str | None],
    outputs: Sequence[str | None],
    base: str | None = None,
) -> Run | Adapter | Series:
    """Open the run that a command measures, after its arguments and before the minutes that a measurement takes.

    Parameters
    ----------
    name : str
        The command.
    run : str, optional
        RUN of the command line, which is required.
    texts : sequence of str
        Its --model and --task, if they are required.
    outputs : sequence of str
        Files to write, which must not exist.
    base : str, optional
        See ``open_runs``.
    """
    if run is None:
        raise ValueError(f"RUN is required: lorascope {name} runs/lora --model minilm --task sentiment/movies")
    if None in texts:
        raise ValueError("--model and --task are required: losses are measured with both")
    for path in filter(None, outputs):
        require_absent(Path(path))
    (opened,) = open_runs([run], base)
    return opened
