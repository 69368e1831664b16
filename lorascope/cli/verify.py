"""``lorascope verify``: everything that follows from the kept evidence, computed again and compared."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from tyro.conf import Positional, arg

from lorascope.cli.arguments import command
from lorascope.files.printable import count_or_no, count_phrase, printable
from lorascope.papers.figures.study_images import draw_images, image_differences
from lorascope.papers.first_edition import CARRIED
from lorascope.papers.judging import (
    first_edition,
    kept_runs,
    registered_study,
    registration,
    study_verification,
    verification,
)
from lorascope.papers.judging.code_hash import code_hash
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.kept_study import INSTRUCTIONS
from lorascope.papers.judging.registration import Registration
from lorascope.papers.registry import COMPARISONS, PAIRS, module_of
from lorascope.papers.study_figures import read_figures

# Tables that follow from the runs -> what one of their rows is.
_FOLLOWING = {"values.csv": "value", "verdicts.csv": "verdict"}
_ROW_COUNTS = re.compile(r"kept (\d+) rows? .*, recomputed (\d+) rows? ")
_FIGURE = re.compile(r"figures/[^/]+\.png")


@command
def main(
    evidence: Annotated[Positional[str | None], arg(metavar="[EVIDENCE]")] = None,
    *,
    write: bool = False,
    retrain: Annotated[int, arg(metavar="N")] = 0,
    json: bool = False,
) -> int:
    """Verify everything that follows from the kept runs: recompute it, and compare it with the kept results.

    In a clone of the repository, this includes the images of the figures; docs/_ext/write_pages.py compares the tables
    of README and docs. Without --retrain it needs neither torch nor training. The exit code is 1 if anything differs or
    a file is damaged.

    Example: lorascope verify data/evidence

    Parameters
    ----------
    evidence
        Folder of evidence; if omitted, data/evidence of the repository or of the installed package.
    write
        Write the tables of the evidence that follow from the kept runs, and draw the images of figures that changed.
    retrain
        Train N random judged runs again, of each edition that has some, and compare them with the kept ones, up to 5
        minutes each; this needs torch.
    json
        Print the differences as JSON.
    """
    registered = registration.FILE
    if not registered.exists():
        raise FileNotFoundError(f"no registration at {printable(registered)}: install lorascope again")
    clone, own_folder = registration.clone_of(registered), registered.parent / "evidence"
    folder = Path(evidence or own_folder)
    has_runs = (folder / "runs.csv").exists()
    if retrain < 0:
        raise ValueError(f"--retrain must be >= 0, got {retrain}")
    if (evidence or retrain) and not has_runs:
        raise FileNotFoundError(f"no evidence at {printable(folder)}: it has no runs.csv")
    root = clone if folder.resolve() == own_folder.resolve() else None
    if write and clone is None:
        raise ValueError("--write requires a clone of the repository, got an installed package")
    if write and root is None:
        raise ValueError(f"--write requires the evidence of the repository, {printable(own_folder)}")
    differences: list[str] = []
    scope = ""
    try:
        claims, study = registration.read(registered), kept_runs.read_kept(folder)
        runs = f"Kept: {count_phrase(len(study.runs), 'run')}" if has_runs else "No runs are kept yet"
        scope = f" {runs} for {count_phrase(len(claims.of_tier('primary', 'secondary')), 'claim')}."
        for line in _find_differences(claims, study, folder, write):
            differences.append(printable(line))  # it may name a foreign file
        if folder.resolve() == own_folder.resolve():
            differences.extend(map(printable, first_edition.verify_first(first_edition.FOLDER, CARRIED)))
            differences.extend(map(printable, _verify_second(write, retrain)))
        if root:
            figures, images = read_figures(registered.parent), root / "figures"
            if write:
                draw_images(figures, images)
            differences.extend(image_differences(figures, images))
            history = registration.compare_with_history(registered, study.runs["commit"].unique().tolist())
            differences.extend(history.differences)
            if history.compared < history.commits:
                scope += f" The registration was compared at {history.compared} of {history.commits} commits of runs."
    except (OSError, ValueError) as error:  # a damaged or missing file
        differences.append(printable(" ".join(str(error).split())))
    if json:
        print(dumps({"differences": differences}))
    else:
        for line in _causes_first(differences):
            print(line, file=sys.stderr)
        print(f"{count_or_no(len(differences), 'difference').capitalize()}.{scope}")
    return int(bool(differences))


def _verify_second(write: bool, retrain: int = 0) -> list[str]:
    """Verify the second edition of the evidence, once it is registered and has runs."""
    registered = registered_study.STUDY_FILE
    folder = registered.parent / "evidence-2"
    if not registered.exists() or not folder.exists():
        return []
    if write:
        study_verification.write_study(folder, registered, COMPARISONS)
    differences = study_verification.verify_study(folder, registered, COMPARISONS, module_of)
    if retrain:
        # Before torch is imported, so that machines with other instructions compute the same numbers.
        os.environ |= INSTRUCTIONS
        from lorascope.papers.training.study_retraining import retrain_study

        with redirect_stdout(sys.stderr), TemporaryDirectory() as out:
            differences += retrain_study(folder, Path(out), registered_study.read(registered), retrain)
    return differences


def _causes_first(differences: Sequence[str]) -> list[str]:
    """Return the lines to print: causes in full, then how many values, verdicts and figures follow from them."""
    # A file that was changed itself is a cause.
    edited = {line.split(": ")[1] for line in differences if line.startswith("MANIFEST: ")}
    causes: list[str] = []
    follow: dict[str, set[str]] = {"value": set(), "verdict": set(), "figure": set()}
    for line in differences:
        file, _, difference = line.partition(": ")
        if file in edited:
            causes.append(line)
        elif file in _FOLLOWING and difference.startswith("row "):
            follow[_FOLLOWING[file]].add(difference.partition("): ")[0])
        elif file in _FOLLOWING and (match := _ROW_COUNTS.match(difference)):
            follow[_FOLLOWING[file]].update(map(str, range(abs(int(match[1]) - int(match[2])))))
        elif _FIGURE.fullmatch(file):
            follow["figure"].add(file)
        else:
            causes.append(line)
    counts = [count_phrase(len(items), noun) for noun, items in follow.items() if items]
    if not causes or not counts:
        return list(differences)
    return [*causes, f"and {', '.join(counts)} in what follows from these (--json lists them)"]


def _find_differences(claims: Registration, study: Evidence, folder: Path, write: bool) -> Iterator[str]:
    registered, has_runs = registration.FILE, (folder / "runs.csv").exists()
    derived = verification.derive(study, claims, PAIRS)
    if write and has_runs:
        verification.rewrite_derived(folder, derived, registered)
    if has_runs:
        yield from verification.verify(
            folder, registered, claims, PAIRS, lambda id: code_hash(module_of(id), id), study, derived
        )
