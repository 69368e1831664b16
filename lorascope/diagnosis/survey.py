"""One row of numbers for each of many adapters and runs, measured in parallel and returned one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.doctor import find_faults
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.reading_faults import fault_finding
from lorascope.extras import requirement
from lorascope.files.hub import locate
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import MARKS, NoUpdatesError, is_adapter, load
from lorascope.runs.module_summary import column


@dataclass(kw_only=True)
class Surveyed:
    """One adapter or run of a survey; NaN, None or "" if unknown.

    ``effective_rank`` is the mean over the modules, ``findings`` the causes that the doctor found, separated by spaces,
    and ``error`` the reason why it was not measured. A prompt has no modules.
    """

    path: str
    kind: str = ""
    base: str = ""
    modules: int | None = None
    parameters: int | None = None
    least_rank: int | None = None
    most_rank: int | None = None
    update_norm: float = np.nan
    effective_rank: float = np.nan
    findings: str = ""
    error: str = ""


def find_adapters(folder: str | Path) -> Iterator[Path]:
    """Yield the adapters and runs to survey below a folder, sorted by path.

    Files ``*.safetensors`` and ``*.gguf`` outside of an adapter's folder count if they are adapters or cannot be read.
    Hidden folders are skipped, and those inside of an adapter or a run, such as checkpoints.
    """
    for path, folders, files in os.walk(folder):
        # ``os.walk`` enters the folders that are left in its list.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if not set(MARKS).isdisjoint(files):
            folders.clear()
            yield Path(path)
            continue
        for name in sorted(files):
            file = Path(path, name)
            if file.suffix in (".safetensors", ".gguf") and _may_be_adapter(file):
                yield file


def _may_be_adapter(file: Path) -> bool:
    try:
        return is_adapter(file)
    except (OSError, ValueError):
        return True  # measuring it reports the reason


def survey(paths: str | Path | Iterable[str | Path], base: str | Path | None = None) -> Iterator[Surveyed]:
    """Survey many adapters or runs on joblib's backend, and yield their rows in order, each once it is measured.

    Parameters
    ----------
    paths : path, str, or iterable of path or str
        Adapters and runs, as for ``load``; ``find_adapters`` yields those of a folder. They are read as the rows are
        consumed, so that the memory does not grow with their number.
    base : path or str, optional
        Base model of all adapters.

    Yields
    ------
    Surveyed
        An adapter that cannot be measured has the reason in ``error``.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    yield from Parallel(return_as="generator")(delayed(_measure_adapter)(path, base) for path in paths)


def _measure_adapter(path: str | Path, base: str | Path | None = None) -> Surveyed:
    """Measure one adapter or run."""
    try:
        run = load(locate(path), base)
        inspection = inspect(run)
        effective_ranks = np.array(column(inspection.module_rows(), "effective_rank"))
        finite_ranks = effective_ranks[np.isfinite(effective_ranks)]
        effective_rank = np.nan
        if len(finite_ranks):
            effective_rank = float(np.mean(finite_ranks))
        causes = dict.fromkeys(finding.cause for finding in find_faults(Case(run)))
        return Surveyed(
            path=str(path),
            kind=run.files.kind if isinstance(run, Adapter) else re.split("[ ,]", run.label)[0],
            base=run.meta.model,
            **inspection.size,
            update_norm=inspection.norm,
            effective_rank=effective_rank,
            findings=" ".join(causes),
        )
    except NoUpdatesError as error:
        return Surveyed(path=str(path), kind=error.kind, modules=0)
    except AdapterFault as fault:
        return Surveyed(path=str(path), findings=fault_finding(fault).cause, error=str(fault))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            reason = requirement(error) or reason
        return Surveyed(path=str(path), error=reason)
