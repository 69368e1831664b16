"""``lorascope plot``: one figure of one or more runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lorascope.cli.arguments import UsageError, fields_of, headline, parse
from lorascope.cli.load_runs import open_runs
from lorascope.files.printable import printable
from lorascope.plots import FIGURES, OLD_FIGURES
from lorascope.runs.result import Result
from lorascope.schema.suggestions import unknown_name

_RUNS = "folders of runs or adapters; label=folder sets the label of a curve, and runs with one label are its seeds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CommonPlotOptions:
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...", help=_RUNS)] = ()
    out: Annotated[
        str | None, arg(aliases=["-o"], metavar="FILE", help="pdf, png, svg, html or csv; figures/NAME.pdf if omitted")
    ] = None
    control: Annotated[tuple[str, ...], arg(metavar="RUN ...", help="runs to plot as the control")] = ()
    base: Annotated[
        str | None, arg(metavar="DIR", help="folder of the base model of all adapters; required for FourierFT")
    ] = None
    width: Annotated[str | None, arg(metavar="NAME", help="figure width: column or page")] = None
    theme: Annotated[str | None, arg(metavar="NAME", help="color theme: light, dark or paper")] = None
    json: Annotated[bool, arg(help="print the name and path of the figure as JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_list_figures())
        return 0
    name, *rest = argv
    if name in OLD_FIGURES:
        print(f"lorascope: {name} is deprecated, use {OLD_FIGURES[name]}", file=sys.stderr)
        name = OLD_FIGURES[name]
    if name not in FIGURES:
        raise UsageError(unknown_name("figure", name, FIGURES))
    options: Any = parse(_figure_options(name), rest, f"lorascope plot {name}")
    if not options.runs:
        raise UsageError(f"RUN is required: lorascope plot {name} runs/my-run -o {name}.pdf")
    own = {field: getattr(options, field) for field in _own_fields(name)}
    labels, folders = zip(*map(_split_label, (*options.runs, *options.control)), strict=True)
    pairs, drawn = list(zip(labels, open_runs(folders, options.base), strict=True)), len(options.runs)
    control = _group_by_label(pairs[drawn:]) if options.control else None
    chart = FIGURES[name].draw(_group_by_label(pairs[:drawn]), control, **own)
    path = chart.save(options.out or f"figures/{name}.pdf", width=options.width, theme=options.theme)
    print(json.dumps({"figure": name, "path": str(path)}) if options.json else printable(path))
    return 0


def _figure_options(name: str) -> type:
    """Return the options of a figure: those of all figures and the parameters of its function."""
    figure = FIGURES[name]
    own = fields_of(figure.draw, skip=("runs", "control"))
    options = dataclasses.make_dataclass("Options", own, bases=(_CommonPlotOptions,), frozen=True, kw_only=True)
    example = f"Example: lorascope plot {name} runs/my-run -o {name}.pdf"
    options.__doc__ = f"{headline(figure.draw)}\n\n{figure.reads}\n\n{example}"
    return options


def _own_fields(name: str) -> list[str]:
    return [field for field, *_ in fields_of(FIGURES[name].draw, skip=("runs", "control"))]


def _group_by_label(pairs: Sequence[tuple[str, Result]]) -> list[Result] | dict[str, list[Result]]:
    """Group runs by label if any of them has one, else return a list."""
    if not any(label for label, _ in pairs):
        return [run for _, run in pairs]
    labeled: dict[str, list[Result]] = {}
    for label, run in pairs:
        labeled.setdefault(label or run.label, []).append(run)
    return labeled


def _split_label(word: str) -> tuple[str, str]:
    label, equals, path = word.partition("=")
    return (label, path) if equals and not Path(word).exists() else ("", word)


def _list_figures() -> str:
    width = max(map(len, FIGURES)) + 2
    lines = ["usage: lorascope plot FIGURE RUN [RUN ...] [-o FILE]", "", "figures:"]
    for name, figure in FIGURES.items():
        lines += textwrap.wrap(
            f"{name:<{width}}{headline(figure.draw)}", 80, initial_indent="  ", subsequent_indent=" " * (width + 2)
        )
    return "\n".join([*lines, "", "Example: lorascope plot spectrum runs/my-run -o spectrum.pdf"])
