"""Writer of the report: all claims, then the results of each probe, in one HTML file that works offline.

The templates in this folder contain the markup. Every text is escaped, so a label of a run cannot become a tag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lorascope.charts.plotly_backend import CONFIG
from lorascope.charts.theme import THEMES
from lorascope.files.printable import printable_lines
from lorascope.files.safetensors_io import write_bytes
from lorascope.probes.base import PROBES, Findings
from lorascope.probes.report import tables, verdicts
from lorascope.probes.report.figures import embed
from lorascope.runs.run import Run
from lorascope.schema.suggestions import unknown_name

_GENERATOR = b'<meta name="generator" content="lorascope">'


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lorascope.probes", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=_printable,
)
# ``tojson`` escapes "<", so that a label with "</script>" cannot end the element.
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
TEMPLATES.filters |= {
    "embed": embed,
    "stored": lambda content: json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True),
    "table": tables.frame_cells,
    "value": tables.format_value,
}
TEMPLATES.globals |= {"tables": tables, "verdicts": verdicts}


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
    text = TEMPLATES.get_template("page.html").render(
        title=title,
        quick=quick,
        studies=[(PROBES[name], found, runs[name]) for name, found in findings.items()],
        judged=[(verdict, name) for name, found in findings.items() for verdict in found.verdicts],
        next_number=count(1).__next__,
        facts=tables.study_facts([runs[name] for name in findings], datetime.now(UTC)),
        folder=path.parent,
        themes=THEMES,
        plotly=Markup(get_plotlyjs()),
        config=CONFIG,
    )
    # A label may contain a lone surrogate, which UTF-8 cannot encode.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return path


def require_report(path: Path) -> None:
    """Raise a FileExistsError if the path exists and is not a report."""
    if path.exists() and not (path.is_file() and _GENERATOR in path.read_bytes()):
        raise FileExistsError(f"cannot write {path}: it exists and was not written by lorascope")
