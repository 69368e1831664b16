"""Writer of the report: all claims, then the results of each probe, in one HTML file that works offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from lorascope.charts.plotly_backend import CONFIG
from lorascope.charts.theme import THEMES
from lorascope.files.safetensors_io import write_bytes
from lorascope.probes.base import PROBES, Findings
from lorascope.probes.report.html import join, json_data
from lorascope.probes.report.sections import StudySection, claims, contents, head, section
from lorascope.runs.run import Run
from lorascope.schema.suggestions import unknown_name

_GENERATOR = b'<meta name="generator" content="lorascope">'


def write(
    path: str | Path,
    findings: Mapping[str, Findings],
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    *,
    quick: bool,
    title: str = "Claims about low-rank adaptation and their verdicts",
) -> Path:
    """Write the findings of the probes as one HTML file. The file is written atomically.

    The page has a table of all claims, then one section per probe with charts, tables, notes and the settings of every
    run. Charts adapt to light and dark, wide and narrow screens. The page makes no network requests.

    Parameters
    ----------
    path : path
        File to write.
    findings : mapping
        Name of a probe -> findings, in the order of the report.
    runs : mapping
        Name of a probe -> label of an arm -> runs, one per seed, as passed to ``Probe.judge``.
    quick : bool
        Whether the runs used the quick settings.
    title : str
        Heading of the page.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    FileExistsError
        ``path`` exists and is not a report.
    ValueError
        A probe is unknown, or ``runs`` has no entry for it.
    """
    path = Path(path)
    require_report(path)
    for name in findings:
        if name not in PROBES:
            raise ValueError(unknown_name("probe", name, PROBES))
        if name not in runs:
            raise ValueError(f"runs must have an entry for probe {name!r}: pass its runs by label of the arm")
    studies = [StudySection(PROBES[name], found, runs[name]) for name, found in findings.items()]
    numbers = iter(range(1, 1 + sum(len(found.figures) for found in findings.values())))
    body = join(
        head(title, studies, quick, datetime.now(UTC)),
        claims(studies),
        contents(studies),
        *(section(study, numbers, path.parent) for study in studies),
    )
    page = Template(files("lorascope.probes.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = page.substitute(title=join(title), body=body, plotly=get_plotlyjs(), config=json_data(CONFIG), **_colors())
    # A label may contain a lone surrogate, which UTF-8 cannot encode.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return path


def require_report(path: Path) -> None:
    """Raise a FileExistsError if the path exists and is not a report."""
    if path.exists() and not (path.is_file() and _GENERATOR in path.read_bytes()):
        raise FileExistsError(f"cannot write {path}: it exists and was not written by lorascope")


def _colors() -> dict[str, str]:
    """Return the colors of the chart themes for the style sheet of the page."""
    return {
        f"{name}_{part}": getattr(THEMES[name], part)
        for name in ("light", "dark")
        for part in ("background", "ink", "grid", "missing")
    }
