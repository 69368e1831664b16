"""``lorascope reproduce``: kept results and small versions of the studies, one claim with any seed, or the evidence."""

from __future__ import annotations

import math
import os
import sys
import webbrowser
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lorascope import papers
from lorascope.cli.arguments import command, reject
from lorascope.files.printable import printable
from lorascope.papers.judging import registered_study, study_verification
from lorascope.papers.judging.data_folder import STUDY_RUNS, clone_root
from lorascope.papers.judging.kept_study import INSTRUCTIONS
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_summary import read_summary, summary_lines
from lorascope.schema.suggestions import unknown_name


@command
def main(
    *,
    paper: Annotated[str | None, arg(metavar="NAME")] = None,
    claim: Annotated[str | None, arg(metavar="ID")] = None,
    seed: Annotated[int | None, arg(metavar="N")] = None,
    out: Annotated[str, arg(aliases=["-o"], metavar="DIR")] = "report",
    evidence: Annotated[str | None, arg(metavar="DIR")] = None,
    instruments: Annotated[str | None, arg(metavar="DIR")] = None,
    minutes: Annotated[float, arg(metavar="N")] = math.inf,
    json: bool = False,
) -> int:
    """Show what nine papers' claims come to, train small versions of the studies on this machine, and report both.

    Trained are the motives of LISA and HydraLoRA with few steps, and one pair of planted teachers as registered, which
    is compared with the kept runs. Finished runs in the folder are not trained again, and interrupted ones resume.

    Example: lorascope reproduce -o report

    Parameters
    ----------
    paper
        Instead, train a small version of one paper's study, such as hydralora: its claims on planted teachers, and the
        motive of LISA and HydraLoRA.
    claim
        Instead, train the arms of this claim with the given seed, and compare its effects with those of the kept seeds.
    seed
        Seed of the runs of --paper or --claim.
    out
        Folder for the runs and the report.
    evidence
        Instead, train the runs that data/registered-2.toml asks for and that this folder of evidence lacks, and add
        them. This needs a clone of the repository.
    instruments
        Instead, train the seeds that registered.toml next to this folder asks for, for the questions about the
        instruments, and that the folder lacks, such as data/instruments/evidence. This needs a clone as well.
    minutes
        With --evidence or --instruments: start no run after N minutes.
    json
        Print the result as JSON.
    """
    modes = (paper, claim, evidence, instruments)
    folder = evidence or instruments
    reject(
        {
            f"--seed must be from 0 to {2**32 - 1}, got {seed}": seed is not None and not 0 <= seed < 2**32,
            "--paper, --claim, --evidence and --instruments cannot be combined": sum(mode is not None for mode in modes)
            > 1,
            "--seed requires --paper or --claim": seed is not None and paper is None and claim is None,
            f"--claim requires --seed: lorascope reproduce --claim {claim} --seed 31": claim is not None
            and seed is None,
            f"unknown paper {paper!r}; expected one of {', '.join(papers.NAMES)}": paper is not None
            and paper.lower() not in papers.NAMES,
            "--evidence and --instruments require a clone of the repository, whose commit they record": folder
            is not None
            and clone_root() is None,
            f"--minutes must be >= 0, got {minutes:g}": not minutes >= 0,
            "--minutes requires --evidence or --instruments": folder is None and minutes != math.inf,
        }
    )
    if find_spec("torch") is None:
        raise ModuleNotFoundError(name="torch")  # now, since results are printed before torch is imported
    # Before torch is imported, so that machines with other instructions compute the same numbers.
    os.environ |= INSTRUCTIONS
    if evidence is not None:
        return _train_study(Path(evidence), Path(out), minutes)
    if instruments is not None:
        from lorascope.papers.training.instrument_training import train_instruments

        train_instruments(Path(instruments), Path(out) / "runs", Path(instruments).parent / "registered.toml", minutes)
        return 0
    if paper is not None:
        return _train_paper(paper.lower(), seed, Path(out), json)
    if claim is not None and seed is not None:
        study = registered_study.read(registered_study.STUDY_FILE)
        if claim not in study.claims:
            raise ValueError(unknown_name("claim", claim, study.claims))
        return _train_study_claim(claim, seed, Path(out), study, json)
    return _reproduce(Path(out), json)


def _reproduce(out: Path, json: bool) -> int:
    """Print the kept results, train the small versions and print what they gave."""
    data = registered_study.STUDY_FILE.parent
    summary = read_summary(data)
    if not json:
        print("\n".join(summary_lines(summary)), flush=True)
    from lorascope.papers.training.reproduction import reproduce  # imported here, so that results do not wait for torch

    reproduction = reproduce(out, summary, data)
    if json:
        print(dumps(reproduction.to_dict()))
        return 0
    print("\n".join(map(str, reproduction.retrained)))
    _open(reproduction.path)
    print(printable(reproduction.path))
    return 0


def _train_paper(name: str, seed: int | None, out: Path, json: bool) -> int:
    """Train the small version of a paper's study."""
    study = getattr(papers, name).run(1 if seed is None else [seed], out)
    if json:
        print(dumps(study.to_dict()))
        return 0
    print(study)
    _open(study.path)
    print(printable(study.path))
    return 0


def _open(path: Path) -> None:
    if _has_screen():
        webbrowser.open(path.resolve().as_uri())


def _has_screen() -> bool:
    """Return whether stdout is a terminal on a machine with a screen."""
    graphical = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    return bool(graphical) and sys.stdout.isatty()


def _train_study(folder: Path, out: Path, minutes: float) -> int:
    """Train the open runs of the second edition, and write everything that follows from the kept runs."""
    file = registered_study.STUDY_FILE
    if not file.exists():
        raise FileNotFoundError(f"cannot train {printable(folder)}: its claims are not registered in {printable(file)}")
    from lorascope.papers.registry import COMPARISONS
    from lorascope.papers.training.study_training import train_study

    train_study(folder, out / "runs", registered_study.read(file), minutes)
    study_verification.write_study(folder, file, COMPARISONS)
    return 0


def _train_study_claim(claim: str, seed: int, out: Path, study: StudyRegistration, json: bool) -> int:
    from lorascope.papers.training.study_seeds import train_seed

    result = train_seed(claim, seed, out / "runs", study, registered_study.STUDY_FILE.parent / STUDY_RUNS)
    text = str(result)
    if json:
        text = dumps(result.to_dict())
    print(text)
    return 0
