"""Page of the benchmarks, from their stored measurements.

A script has a section: the first line of its docstring is the title, the rest of it the text, and its lines the table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from measurements import BUSY, MeasuredLine, Measurement


def page(measurements: Mapping[str, Measurement], scripts: Mapping[str, Path]) -> str:
    """Return the page of all measurements whose script exists, one section per script."""
    kept = {name: measurements[name] for name in scripts if name in measurements}
    lines = [line for each in kept.values() for line in each.lines if line.aim is not None]
    met = sum(line.verdict == "met" for line in lines)
    parts = [
        "# Benchmarks",
        "`benchmarks/bench.py` measures every line of this page again, and writes the page with `--write`. A "
        "ratio is a median of paired ratios of process CPU time: the contestants take turns in one process. Brackets "
        f"hold its bootstrap interval of 95%. An aim is met if the median reaches it and the interval misses it by at "
        f"most 3%. **{met} of {len(lines)} aims are met**; the others are marked.",
        _conditions(kept),
    ]
    for name, measurement in kept.items():
        documented = ast.get_docstring(ast.parse(scripts[name].read_text(encoding="utf-8"))) or ""
        title, _, text = documented.replace("``", "`").partition("\n")
        parts += [f"## {title.rstrip('.')}", text.strip(), _table(measurement.lines), f"From `benchmarks/{name}.py`."]
    return "\n\n".join(parts) + "\n"


def _conditions(kept: Mapping[str, Measurement]) -> str:
    """Return when and where the lines were measured; one entry for those that share it."""
    places: dict[str, list[str]] = {}
    for name, each in kept.items():
        versions = ", ".join(f"{package} {number}" for package, number in each.versions.items())
        load = f"; other work used {each.load:g} cores" if each.load > BUSY else ""
        places.setdefault(f"{each.date}, {each.machine}; {versions}{load}", []).append(name)
    if len(places) == 1:
        return f"Measured on {next(iter(places))}."
    listed = "\n".join(f"- {place}: {', '.join(names)}" for place, names in places.items())
    return f"Measured on\n\n{listed}"


def _table(lines: Iterable[MeasuredLine]) -> str:
    """Return a Markdown table with a row for the cases of one thing with one aim."""
    grouped: dict[tuple[str, str], list[MeasuredLine]] = {}
    for line in lines:
        grouped.setdefault((line.what, line.goal), []).append(line)
    rows = ["| what | measured | pairs | aim |", "|---|---|---|---|"]
    for (what, goal), cases in grouped.items():
        measured = "; ".join(
            (f"{line.case}: " if line.case else "")
            + line.measured
            + (" **missed**" if line.verdict == "missed" else "")
            for line in cases
        )
        pairs = sorted({line.pairs for line in cases})
        count = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        rows.append(f"| {what} | {measured} | {count} | {goal} |")
    return "\n".join(rows)
