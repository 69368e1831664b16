"""The report: claims first, then what each probe saw, as one HTML file that needs no network."""

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

_GENERATOR = b'<meta name="generator" content="lorascope">'


def write(
    path: str | Path,
    findings: Mapping[str, Findings],
    runs: Mapping[str, Mapping[str, Sequence[Run]]],
    *,
    quick: bool,
    title: str = "What low-rank adaptation does, and what it was said to do",
) -> Path:
    """Write what the probes found as one HTML file, which appears whole or not at all.

    It holds the table of claims, then a section a probe: charts (light and dark, for wide and narrow screens), tables,
    notes and the settings of every run. Nothing in it asks for a network.

    Parameters
    ----------
    path : path
        The file.
    findings : mapping
        Name of a probe -> what it found, in the order to tell them.
    runs : mapping
        Name of a probe -> label of an arm -> its runs, one a seed: what ``Probe.judge`` was given.
    quick : bool
        Were these the quick settings?
    title : str
        Heading of the page.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    FileExistsError
        A file that is not a report is there.
    ValueError
        A probe is not known, or its runs are not given.
    """
    path = Path(path)
    require_ours(path)
    for name in findings:
        if name not in PROBES:
            raise ValueError(f"no probe {name!r} to report on; there are {', '.join(PROBES)}")
        if name not in runs:
            raise ValueError(f"the runs of probe {name!r} are missing: give them by the labels of its arms")
    stories = [StudySection(PROBES[name], found, runs[name]) for name, found in findings.items()]
    numbers = iter(range(1, 1 + sum(len(found.exhibits) for found in findings.values())))
    body = join(
        head(title, stories, quick, datetime.now(UTC)),
        claims(stories),
        contents(stories),
        *(section(story, numbers, path.parent) for story in stories),
    )
    page = Template(files("lorascope.probes.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = page.substitute(title=join(title), body=body, plotly=get_plotlyjs(), config=json_data(CONFIG), **_colors())
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return path


def require_ours(path: Path) -> None:
    """Raise a FileExistsError where a file is there that is not a report."""
    if path.exists() and not (path.is_file() and _GENERATOR in path.read_bytes()):
        raise FileExistsError(f"cannot write {path}: lorascope did not write the file that is there")


def _colors() -> dict[str, str]:
    """The colours of the charts, for the page around them."""
    return {
        f"{name}_{part}": getattr(THEMES[name], part)
        for name in ("light", "dark")
        for part in ("background", "ink", "grid", "missing")
    }
