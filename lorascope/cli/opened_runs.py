"""Loading of the runs, adapters and series of checkpoints that a command line names."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lorascope.files.printable import printable
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
