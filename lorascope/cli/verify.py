"""``lorascope verify``: everything that follows from the kept runs, computed again and compared."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import command
from lorascope.files.data_folder import DATA
from lorascope.files.printable import count_or_no, count_phrase, printable
from lorascope.papers import instruments
from lorascope.papers.figures.study_images import draw_images, image_differences
from lorascope.papers.first_edition import CARRIED
from lorascope.papers.instruments import QUESTIONS
from lorascope.papers.judging import first_edition, registered_study, study_verification
from lorascope.papers.judging.data_folder import clone_root
from lorascope.papers.judging.kept_study import INSTRUCTIONS
from lorascope.papers.judging.published_numbers import verify_published
from lorascope.papers.registry import COMPARISONS, module_of
from lorascope.papers.study_figures import read_figures


@command
def main(*, write: bool = False, retrain: Annotated[int, arg(metavar="N")] = 0, json: bool = False) -> int:
    """Verify everything that follows from the kept runs: recompute it, and compare it with the kept results.

    In a clone of the repository, this includes the images of the figures; docs/_ext/write_pages.py compares the tables
    of README and docs. Without --retrain it needs neither torch nor training. The exit code is 1 if anything differs or
    a file is damaged.

    Example: lorascope verify --retrain 2

    Parameters
    ----------
    write
        Write the tables that follow from the kept runs, and draw the images of figures that changed.
    retrain
        Train N random judged runs again, and compare them with the kept ones, up to 5 minutes each; this needs torch.
    json
        Print the differences as JSON.
    """
    if retrain < 0:
        raise ValueError(f"--retrain must be >= 0, got {retrain}")
    root = clone_root(DATA)
    if write and root is None:
        raise ValueError("--write requires a clone of the repository, got an installed package")
    differences = []
    try:
        for line in _find_differences(root, write, retrain):
            differences.append(printable(line))  # it may name a foreign file
    except (OSError, ValueError) as error:  # a damaged or missing file
        differences.append(printable(" ".join(str(error).split())))
    if json:
        print(dumps({"differences": differences}))
    else:
        for line in differences:
            print(line, file=sys.stderr)
        print(f"{count_or_no(len(differences), 'difference').capitalize()}.")
    return int(bool(differences))


def _find_differences(root: Path | None, write: bool, retrain: int) -> Iterator[str]:
    first = first_edition.FOLDER
    causes = [*first_edition.verify_first(first, CARRIED), *verify_published(first), *_verify_second(write, retrain)]
    causes += _verify_instruments(write)
    yield from causes
    if root:
        figures, images = read_figures(DATA), root / "figures"
        if write:
            draw_images(figures, images)
        differences = list(image_differences(figures, images))
        # Figures show the runs, so each would repeat a difference in them.
        if causes and differences:
            differences = [f"{count_phrase(len(differences), 'image')} in what follows from these"]
        yield from differences


def _verify_instruments(write: bool) -> list[str]:
    """Verify the answers to the questions about the instruments."""
    folder, registered = DATA / "instruments" / "evidence", DATA / "instruments" / "registered.toml"
    if write:
        study_verification.write_study(folder, registered, QUESTIONS)
    return study_verification.verify_study(folder, registered, QUESTIONS, lambda id: instruments.__name__, False)


def _verify_second(write: bool, retrain: int = 0) -> list[str]:
    """Verify the second edition."""
    registered = registered_study.STUDY_FILE
    folder = registered.parent / "evidence-2"
    if write:
        study_verification.write_study(folder, registered, COMPARISONS)
    differences = study_verification.verify_study(folder, registered, COMPARISONS, module_of)
    if retrain:
        # Before torch is imported, so that machines with other instructions compute the same numbers.
        os.environ |= INSTRUCTIONS
        from lorascope.papers.training.study_retraining import retrain_study

        with redirect_stdout(sys.stderr), TemporaryDirectory() as out:  # its progress must not mix with JSON
            differences += retrain_study(folder, Path(out), registered_study.read(registered), retrain)
    return differences
