"""Registration of the second edition: its claims and arms, fixed in ``data/registered-2.toml`` before the runs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lorascope.files.data_folder import DATA
from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable
from lorascope.papers.judging.words import RuleKind

STUDY_FILE = DATA / "registered-2.toml"
FIGURE_ARMS = "figure-arms.toml"
"""File next to the registration with arms that no claim names, which may be added at any time."""


class PaperPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Place in a paper, and the number that it prints there, if any; a printed text is shown but not compared."""

    arxiv: str
    place: str  # names: ok
    printed: float | str | None = None
    printed_unit: str = ""


class StudyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Kind and bound of a claim in a unit, its number of seeds, and whether the table of nine papers shows it."""

    kind: RuleKind
    bound: float
    unit: str
    seeds: int
    headline: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise ValueError(f"bound must be a finite number > 0, got {self.bound}")
        if self.seeds < 2:
            raise ValueError(f"seeds must be >= 2, got {self.seeds}")


_LABELS = {"for_arms": "for", "against_arms": "against", "control_arms": "control"}


class StudyClaim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=_LABELS):
    """A registered claim.

    Parameters
    ----------
    id, sentence : str
        Name, such as "pair.adalora", and what is claimed.
    paper : PaperPlace
        Where the paper claims it.
    rule : StudyRule
        How it is judged.
    for_arms, against_arms, control_arms : tuple of str
        Labels of the arms of the effect, of the effect at the other truth, and of the positive control: ``for``,
        ``against`` and ``control`` in the file.
    code : str
        Hash of the functions that compute its effects; "" before registration.
    """

    id: str
    sentence: str
    paper: PaperPlace
    rule: StudyRule
    for_arms: tuple[str, ...]
    against_arms: tuple[str, ...] = ()
    control_arms: tuple[str, ...] = ()
    code: str = ""

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of the arms by the name of their effect."""
        return {"for": self.for_arms, "against": self.against_arms, "positive": self.control_arms}


class StudyArm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A registered arm.

    Parameters
    ----------
    label : str
        Name of the arm, with its truth for arms of a pair.
    hash : str
        Hash of its method, settings, rules of teacher and task, and base; "" before registration.
    rates : tuple of float
        Learning rates that are tried first; a single one is fixed. Empty if the arm takes that of another one.
    rate_of : str
        Arm whose chosen rate it takes; "" to choose its own.
    seeds : int
        Number of judged runs, from ``kept_study.FIRST_SEED`` on.
    """

    label: str
    hash: str = ""
    rates: tuple[float, ...] = ()
    rate_of: str = ""
    seeds: int = 0


class StudyDeviation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A deviation from the registration: one per cause, with the claims that it concerns.

    ``processors`` are models that compute bitwise equal numbers, so that they count as one machine.
    """

    claims: tuple[str, ...]
    change: str
    reason: str
    date: str = ""
    processors: tuple[str, ...] = ()


class _Contents(msgspec.Struct, forbid_unknown_fields=True):
    edition: int
    dates: str = ""
    judging: str = ""
    arm: tuple[StudyArm, ...] = ()
    claim: tuple[StudyClaim, ...] = ()
    deviation: tuple[StudyDeviation, ...] = ()


@dataclass(frozen=True)
class StudyRegistration:
    """All registered claims by id, their arms by label, the deviations, and the hash of the code that judges."""

    arms: Mapping[str, StudyArm]
    claims: Mapping[str, StudyClaim]
    deviations: tuple[StudyDeviation, ...] = ()
    judging: str = ""


def read(file: Path = STUDY_FILE) -> StudyRegistration:
    """Read the registration of the second edition, and the arms of figures next to it.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        It is not TOML, a key is unknown or has another type, a label or id is registered twice, or a claim or an arm
        names an arm that is not registered.
    """
    contents = _decode(file)
    registered_arms = contents.arm
    if (figure_arms := file.with_name(FIGURE_ARMS)).exists():
        registered_arms += _decode(figure_arms).arm
    # A second one of the same name would replace the first.
    arms = {arm.label: arm for arm in registered_arms}
    claims = {claim.id: claim for claim in contents.claim}
    if len(arms) < len(registered_arms) or len(claims) < len(contents.claim):
        raise unreadable(file, "an arm or a claim is registered twice")
    # A misspelled label would otherwise be a claim without runs.
    for claim in contents.claim:
        for labels in claim.labels().values():
            _require_registered(labels, arms, claim.id, file)
    for arm in registered_arms:
        _require_registered([arm.rate_of or arm.label], arms, arm.label, file)
        if (not arm.rates) != bool(arm.rate_of) or sorted(set(arm.rates)) != list(arm.rates):
            raise unreadable(file, f"arm {printable(arm.label)!r} must have increasing rates, or rate_of")
    return StudyRegistration(arms, claims, contents.deviation, contents.judging)


def _decode(file: Path) -> _Contents:
    try:
        return msgspec.toml.decode(file.read_bytes(), type=_Contents, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise unreadable(file, printable(error)) from error


def _require_registered(labels: Iterable[str], arms: Mapping[str, StudyArm], user: str, file: Path) -> None:
    for label in labels:
        if label not in arms:
            raise unreadable(file, f"{printable(user)} names the arm {printable(label)!r}, which is not registered")
