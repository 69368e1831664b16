"""Loading of the runs and adapters that a command line names."""

from __future__ import annotations

from collections.abc import Sequence

from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import is_run, load
from lorascope.runs.run import Run


def open_runs(paths: Sequence[str], base: str | None) -> list[Run | Adapter]:
    """Open folders of runs and adapters; only adapters get the base, because a run has recorded its own norms."""
    if base is not None and all(map(is_run, paths)):
        raise ValueError(f"--base requires an adapter, got only runs: {', '.join(paths)}")
    return [load(path, None if is_run(path) else base) for path in paths]
