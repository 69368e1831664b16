"""``lorascope plot``: one figure of one or more runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.cli.arguments import Folder, Name, call, headline, options_of
from lorascope.cli.opened_runs import open_runs
from lorascope.files.printable import printable, utf8_text
from lorascope.files.seals import require_own
from lorascope.plots import FIGURES
from lorascope.runs.result import Result
from lorascope.schema.suggestions import unknown_name

Folders = Annotated[tuple[str, ...], arg(metavar="RUN ...")]


def main(argv: Sequence[str]) -> int:
    """Plot the figure that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_list_figures())
        return 0
    name, *words = argv
    if name not in FIGURES:
        raise ValueError(unknown_name("figure", name, FIGURES))
    figure = FIGURES[name]

    def draw(
        runs: Folders = (),
        /,
        *,
        out: Annotated[str | None, arg(aliases=["-o"], metavar="FILE")] = None,
        control: Folders = (),
        base: Folder = None,
        series: bool = False,
        width: Name = None,
        theme: Name = None,
        json: bool = False,
        **options: Any,
    ) -> int:
        """Plot a figure.

        Parameters
        ----------
        runs
            Folders of runs or adapters; label=folder sets the label of a curve, and runs with one label are its seeds.
        out
            pdf, png, svg, pgf, html or csv; figures/NAME.pdf if omitted.
        control
            Runs to plot as the control.
        base
            Folder of the base model of all adapters; required for FourierFT.
        series
            Plot the checkpoints in each folder instead of its final adapter.
        width
            Figure width in inches, column, page, or a venue such as icml or icml-page.
        theme
            Color theme: light, dark or paper.
        json
            Print the name and path of the figure as JSON.
        """
        if not runs:
            raise ValueError(f"RUN is required: lorascope plot {name} runs/my-run -o {name}.pdf")
        file = Path(out or f"figures/{name}.pdf")
        require_own(file)
        labels, folders = zip(*map(_split_label, (*runs, *control)), strict=True)
        pairs = list(zip(labels, open_runs(folders, base, series), strict=True))
        compared = _group_by_label(pairs[len(runs) :]) if control else None
        chart = figure.draw(_group_by_label(pairs[: len(runs)]), compared, **options)
        require_own(file)  # drawing takes a while, and another program may have written it
        path = chart.save(file, width=width, theme=theme)
        print(dumps({"figure": name, "path": str(path)}) if json else printable(path))
        return 0

    example = f"Example: lorascope plot {name} runs/my-run -o {name}.pdf"
    description = f"{headline(figure.draw)}\n\n{figure.reads}\n\n{example}"
    return call(draw, f"lorascope plot {name}", words, options_of(figure.draw, skip=("runs", "control")), description)


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
    if not equals or Path(word).exists():  # a name of a folder may contain "="
        return "", word
    return utf8_text(label), path


def _list_figures() -> str:
    width = max(map(len, FIGURES)) + 2
    lines = ["usage: lorascope plot FIGURE RUN [RUN ...] [-o FILE]", "", "figures:"]
    for name, figure in FIGURES.items():
        lines += textwrap.wrap(
            f"{name:<{width}}{headline(figure.draw)}", 80, initial_indent="  ", subsequent_indent=" " * (width + 2)
        )
    return "\n".join([*lines, "", "Example: lorascope plot spectrum runs/my-run -o spectrum.pdf"])
