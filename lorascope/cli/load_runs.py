"""From folders on a command line to runs and adapters, with the base where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorascope.cli.arguments import UsageError
from lorascope.runs.loading import is_run, load
from lorascope.runs.run import Run


def open_runs(paths: Sequence[str | Path], base: str | None) -> list[Run]:
    """Open folders; the base is given to the adapters among them, since a run knows its own.

    Raises
    ------
    UsageError
        There is a base, and no adapter.
    """
    if base is not None and all(map(is_run, paths)):
        raise UsageError(f"--base is for adapters, and none of {', '.join(map(str, paths))} is one: leave it out")
    return [load(path, None if is_run(path) else base) for path in paths]
