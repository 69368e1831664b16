"""Loading of the runs and adapters that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import is_run, load
from lorascope.runs.run import Run
from lorascope.runs.series import Series


def open_runs(paths: Sequence[str | Path], base: str | None) -> list[Run | Adapter | Series]:
    """Open runs and adapters by path or name on the hub.

    Only adapters get the base, because a run has recorded its own norms.
    """
    if base is not None and all(map(is_run, paths)):
        raise ValueError(f"--base requires an adapter, got only runs: {', '.join(map(str, paths))}")
    return [load(path, None if is_run(path) else base) for path in paths]
