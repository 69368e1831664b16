"""``lorascope report``: the report card of adapters and runs."""

from __future__ import annotations

from json import dumps
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import Folder, Paths, command, reject
from lorascope.cli.opened_runs import open_runs
from lorascope.files.printable import count_or_no, printable
from lorascope.pages import report_card


@command
def main(
    paths: Paths = (),
    /,
    *,
    out: Annotated[str | None, arg(aliases=["-o"], metavar="FILE")] = None,
    base: Folder = None,
    spectra: bool = False,
    markdown: bool = False,
    verify: bool = False,
    json: bool = False,
) -> int:
    """Write the report card of an adapter or a run: findings, figures, a table of modules, and what was not checked.

    The card is one HTML file that works offline and carries its tables. --verify builds such a page again from its
    tables, and prints where it differs; the exit code is 1 if it does. Several adapters or runs are shown side by side.

    Example: lorascope report my-adapter -o card.html

    Parameters
    ----------
    paths
        Adapters or runs: folders, .safetensors files, or names on the Hugging Face Hub (user/adapter). With --verify,
        report cards.
    out
        File to write, .html or .md; card.html if omitted.
    base
        Folder of the base model of the adapters: adds |dW|/|W| and intruder dimensions.
    spectra
        Also run full SVDs (slow): spectra of FourierFT, and of DoRA with its base.
    markdown
        Print a section for a model card instead of writing a page.
    verify
        Compare pages with what their tables give.
    json
        Print JSON.
    """
    reject(
        {
            "PATH is required: lorascope report my-adapter -o card.html": not paths,
            "--verify takes report cards only, without --out, --base, --spectra or --markdown": verify
            and (out is not None or base is not None or spectra or markdown),
            "--markdown prints: give either it or --out FILE.md": markdown and out is not None,
            "--markdown and --json cannot be combined": markdown and json,
        }
    )
    if verify:
        return _verify(paths, json)
    runs = open_runs(paths, base)
    if markdown:
        print(report_card.markdown(report_card.collect(runs, spectra)), end="")
        return 0
    path = report_card.report(runs, out or "card.html", spectra)
    print(dumps({"path": str(path)}) if json else printable(path))
    return 0


def _verify(paths: tuple[str, ...], json: bool) -> int:
    """Print where pages differ from what their tables give, and return the exit code."""
    differences = {path: report_card.verify_card(path) for path in paths}
    if json:
        print(dumps(differences, indent=1))
        return int(any(differences.values()))
    for path, lines in differences.items():
        print(f"{printable(path)}: {count_or_no(len(lines), 'difference')}")
        for line in lines[:5]:
            print(f"  {line}")
    return int(any(differences.values()))
