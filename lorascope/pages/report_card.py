"""Pages of a report card: HTML that carries its tables and can be built again from them, and Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import TemplateError
from pyarrow import ArrowException

from lorascope.analysis.advice import Advice
from lorascope.files.printable import printable
from lorascope.files.seals import MAX_PAGE, require_own, seal, write_own
from lorascope.files.typed_json import parse_json, require_size, require_small, to_typed, unreadable
from lorascope.pages.card import Card, collect, installed_versions
from lorascope.pages.page import Section, render
from lorascope.pages.table_cells import format_value, frame_cells
from lorascope.plots.run_groups import list_runs
from lorascope.runs.result import Result

_FIGURE = re.compile("<figure>.*?</figure>", re.DOTALL)
_PAGE_BYTES = 6 * 2**20  # plotly.js takes 4.6 MiB
_MOST_ROWS = 1000  # modules in the table of a page; 20,000 would take 6 MiB, and the page carries them as Parquet
_ADVICE = "Losses are on held-out rows. Intervals are over these rows; they do not cover the seed of the training."
# List of an advice -> title and columns of its table.
_ADVICE_TABLES = {
    "facts": ("Where the rank went, and what it costs", "section", "name", "text"),
    "actions": ("What to do", "verdict", "change", "command"),
    "undecided": ("Not decided", "question", "rows_needed", "seeds_needed", "command"),
    "skipped": ("Skipped", "name", "reason", "command"),
}
_COLUMNS = {"least_rank": "lowest rank", "most_rank": "highest rank"}
LIMITS = (
    "A check reports only what numbers can show. A mistake that gives the same numbers as a choice is not reported, so "
    "a card without findings does not prove that an adapter does what it was trained for: evaluate it on a task.",
    # Measured by benchmarks/false_alarms.py.
    "A check can also report a fault where there is none. On 200 healthy runs of a small model, with 13 methods and "
    "varied settings, none was reported, so the rate is at most 1.9% with 95% confidence. On 200 regressions with "
    "noisy batches there was one (at most 2.8%). Larger models may differ.",
    "Norms do not show importance: a small update can change an output more than a large one.",
    "Norms and ranks are computed in float64 from the stored values, which are rounded: by at most 0.4% in bfloat16, "
    "0.05% in float16.",
)


def report(
    runs: Result | Sequence[Result], out: str | Path, spectra: bool = False, advice: Advice | None = None
) -> Path:
    """Write a report card: facts, findings, figures, one row per module, and what was not checked.

    Parameters
    ----------
    runs : Result or sequence of Result
        Adapters or runs, as ``load`` returns them; several are shown side by side.
    out : path
        File to write: ``.html``, a page that works offline and carries its tables, or ``.md``, a section for a model
        card.
    spectra : bool
        Whether to compute spectra that require full SVDs, such as those of FourierFT; slow. Default False.
    advice : Advice, optional
        Advice on the run, for a section of the page; see ``ls.advise``.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    ValueError
        A run has no update, one occurs twice, the advice is on another run, or the extension is neither ``.html`` nor
        ``.md``.
    FileExistsError
        ``out`` exists, and lorascope did not write it, or it has changed since.

    Examples
    --------
    >>> ls.report(ls.load("my-adapter"), "card.html")  # doctest: +SKIP
    """
    path = Path(out)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"out must end in .html or .md, got {printable(path)}")
    require_own(path)
    card = collect(list_runs(runs), spectra, advice)
    text = markdown(card) if path.suffix == ".md" else _limited_html(card)
    write_own(path, _encode(text))
    return path


@dataclass(frozen=True)
class _Carried:
    """Document of a card, and its Parquet files in base64 by name."""

    document: dict[str, Any]
    tables: dict[str, str]


def _encode(text: str) -> bytes:
    """Encode a text as UTF-8, in which a label with a lone surrogate has an escape."""
    return text.encode("utf-8", "backslashreplace")


def _limited_html(card: Card) -> str:
    """Return the page of a card, without its largest figures if it would be larger than 6 MiB."""
    text = html(card)
    excess = len(seal(_encode(text), "html")) - _PAGE_BYTES
    if excess <= 0:
        return text
    sizes, left_out = {}, {}
    for figure, markup in zip(card.document["figures"], _FIGURE.findall(text), strict=True):
        tables = sum(len(card.parquet[name]) * 4 // 3 for name in figure["tables"])  # Base64
        sizes[figure["name"]] = len(_encode(markup)) + tables
    # As few figures as possible are left out, so the largest go first.
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if excess > 0:
            left_out[name] = f"too large for this page ({size:,} bytes): lorascope plot {name}"
            excess -= size
    return html(card.without(left_out))


def html(card: Card) -> str:
    """Return the HTML page of a report card; equal cards give equal pages."""
    lead, facts = "Adapters and runs side by side.", {}
    if len(card.subjects) == 1:
        lead, facts = card.subjects[0]["kind"], card.subjects[0]["facts"]
    tables = {name: base64.b64encode(file).decode() for name, file in card.parquet.items()}
    carried = vars(_Carried(card.document, tables))
    return render(card.title, lead, list(_sections(card)), facts, carried)


def _sections(card: Card) -> Iterator[Section]:
    is_comparison = len(card.subjects) > 1
    if is_comparison:
        rows = [{"": subject["label"], "kind": subject["kind"]} | subject["facts"] for subject in card.subjects]
        tables = {"What they are": pd.DataFrame(rows)}
        if "pairs" in card.parquet:
            tables["Pairs"] = _known_columns(card.table("pairs"))
        yield Section("subjects", "Adapters and runs", tables=tables)
    findings, notes = [], []
    for subject in card.subjects:
        label = subject["label"] if is_comparison else ""
        for finding in subject["findings"]:
            findings.append(finding | {"adapter": label, "evidence": _numbers(finding["evidence"])})
        for note in subject["notes"]:
            notes.append(f"{label}: {note}".removeprefix(": "))
    if advice := card.document.get("advice"):
        yield Section("advice", "What to change", _ADVICE, tables=_advice_tables(advice), notes=[advice["receipt"]])
    for number, measured in enumerate(card.document.get("measured", []), start=1):
        title = f"{measured['title']}: {measured['label']}" if is_comparison else measured["title"]
        tables = {title: _known_columns(card.table(measured["table"]))}
        yield Section(f"measured-{number}", title, measured["caption"], tables=tables)
    yield Section("findings", "Findings", "" if findings else "No findings.", findings=findings, notes=notes)
    yield Section("figures", "Figures", figures=list(card.figures()))
    modules, lead = card.table("modules"), ""
    if len(modules) > _MOST_ROWS:
        lead = (
            f"The table shows the {_MOST_ROWS:,} of {len(modules):,} modules with the largest updates; "
            "lorascope export PATH --table modules.csv --summary writes all."
        )
        largest = modules["update_norm"].sort_values(ascending=False, kind="stable").index[:_MOST_ROWS]
        modules = modules.loc[largest.sort_values()].reset_index(drop=True)
    tables = {"Roles": _known_columns(card.table("roles")), "Modules": _known_columns(modules)}
    yield Section("modules", "Modules", lead, tables=tables)
    lead = "What was not checked or drawn, and what it would need."
    yield Section("unchecked", "Not checked", lead, tables={"Not checked": _unchecked(card)})
    yield Section("limits", "Limits", notes=LIMITS)


def _advice_tables(advice: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Return the tables of an advice: what was measured, what to do, and what was not decided."""
    tables = {}
    for title, columns in _ADVICE_TABLES.items():
        if records := advice[title]:
            tables[columns[0]] = pd.DataFrame(records)[list(columns[1:])]
    return tables


def _numbers(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evidence with numbers of modules instead of their names, which are in the message."""
    numbers = {}
    for name, value in evidence.items():
        if isinstance(value, list | dict):
            value = len(value)
        numbers[name.replace("_", " ")] = value
    return numbers


def _known_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the columns that have no value; names have spaces instead of underscores."""
    has_values = (table.notna() & (table != "")).any()
    return table.loc[:, has_values.to_list()].rename(columns=lambda name: _COLUMNS.get(name, name.replace("_", " ")))


def _unchecked(card: Card) -> pd.DataFrame:
    """Return ``reason, checks and figures``: what the card does not have."""
    reasons: dict[str, dict[str, None]] = {}
    for subject in card.subjects:
        for reason, names in subject["unchecked"].items():
            reasons.setdefault(reason, {}).update(dict.fromkeys(names))
    for name, reason in card.document["unseen"].items():
        reasons.setdefault(reason, {})[name] = None
    rows = [(", ".join(names), reason) for reason, names in reasons.items()]
    return pd.DataFrame(rows, columns=["checks and figures", "reason"])


def markdown(card: Card) -> str:
    """Return a report card as Markdown for a model card: facts, findings, and norms and ranks by role."""
    lines = []
    for subject in card.subjects:
        lines += [f"## {_inert(subject['label'])}", "", _inert(subject["kind"]), ""]
        lines += [f"- **{_inert(name)}**: {_inert(text)}" for name, text in subject["facts"].items()]
        lines += ["", "### Findings", ""]
        for finding in subject["findings"]:
            cause = f"{_inert(finding['id'])} {_inert(finding['cause'])}"
            lines.append(f"- {cause} ({finding['severity']}): {_inert(finding['message'])}")
        if not subject["findings"]:
            lines.append("None.")
        lines.append("")
    if "pairs" in card.parquet:
        lines += ["### Pairs", "", *_markdown_table(_known_columns(card.table("pairs"))), ""]
    lines += ["### Norms and ranks by role", "", *_markdown_table(_known_columns(card.table("roles"))), ""]
    lines += ["### Limits", "", *map("- {}".format, LIMITS), ""]
    return "\n".join([*lines, f"Measured with lorascope {card.document['versions']['lorascope']}.", ""])


def _markdown_table(table: pd.DataFrame) -> Iterator[str]:
    cells = frame_cells(table)
    heads, is_numeric = zip(*cells["columns"], strict=True)
    yield _markdown_row(heads)
    yield f"|{'|'.join(np.where(is_numeric, '---:', '---'))}|"
    for row in cells["rows"]:
        yield _markdown_row(map(format_value, row))


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_inert, cells))} |"


def _inert(text: str) -> str:
    """Escape what Markdown would interpret in a text from a file, such as tags, links and cell borders."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(text))


def read(path: str | Path) -> Card:
    """Read the card that the page of a report card carries.

    Raises
    ------
    ValueError
        The file is not the page of a report card, or what it carries is damaged.
    """
    return _parse(_text(path), path)


def _parse(text: str, path: str | Path) -> Card:
    carried = text.partition('<script type="application/json" id="carried">')[2].partition("</script>")[0]
    if not carried:
        raise ValueError(f"{printable(path)} is not a report card: it carries no tables")
    name = f"the tables that {path} carries"
    require_size(len(carried), name)
    content = to_typed(parse_json(carried, name), _Carried, name)
    try:
        tables = {table: base64.b64decode(file, validate=True) for table, file in content.tables.items()}
    except ValueError as error:
        raise unreadable(name, printable(error)) from error
    return Card(content.document, tables)


def verify_card(path: str | Path) -> list[str]:
    """Build the page of a report card again from the tables it carries, and return where it differs, one line each.

    Raises
    ------
    ValueError
        The page carries no readable tables, or another version of lorascope or plotly wrote it.
    """
    text = _text(path)
    card = _parse(text, path)
    try:
        if (wrote := card.document["versions"]) != (installed := installed_versions()):
            raise ValueError(f"written with {_format(wrote)}, but {_format(installed)} is installed")
        built = seal(_encode(html(card)), "html").decode().splitlines()  # with the escapes of the file
    except (ArrowException, TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot build {printable(path)} again: {printable(error)}") from error
    differences = []
    for number, (line, rebuilt) in enumerate(zip_longest(text.splitlines(), built, fillvalue=""), start=1):
        if line != rebuilt:
            message = f"the page has {_excerpt(line, rebuilt)}, its tables give {_excerpt(rebuilt, line)}"
            differences.append(f"line {number}: {message}")
    return differences


def _text(path: str | Path) -> str:
    require_small(Path(path), MAX_PAGE)
    # In a damaged page, other bytes than UTF-8 are a difference, not an error.
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _format(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _excerpt(line: str, other: str) -> str:
    """Return the part of a line around its first difference from another."""
    pairs = enumerate(zip_longest(line, other))
    start = next((position for position, (letter, other_letter) in pairs if letter != other_letter), 0)
    return repr(printable(line[max(0, start - 20) : start + 40]))
