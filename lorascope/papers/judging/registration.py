"""Registration of the claims: what will be judged, how, and at how many seeds, fixed in a file before the runs.

The file is also compared with its versions at the commits with which the runs were trained.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from lorascope.files.printable import printable
from lorascope.papers.judging.claims import Claim, Kind
from lorascope.papers.judging.data_folder import DATA
from lorascope.papers.judging.data_folder import PAPERS as PAPERS
from lorascope.papers.judging.looks import Looks

# The text is part of the hash of every arm, so that a change of the rule changes them.
RATE_RULE = (
    "lowest mean validation loss at the last step; ties to the smaller rate; at most two further rates at an end"
)
FILE = DATA / "registered.toml"
Tier = Literal["primary", "secondary", "published"]


@dataclass(frozen=True)
class Paper:
    """Registered place in a paper: arXiv id, and table, figure or section; one claim per paper is primary."""

    arxiv: str
    place: str
    tier: Tier


@dataclass(frozen=True)
class ClaimText:
    """Registered text of a claim: its sentence, what is compared, and where the control comes from."""

    sentence: str
    statistic: str
    control: str
    control_kind: Literal["arm", "expected", "constant", "data"]


@dataclass(frozen=True)
class Bound:
    """Registered kind of a claim with its margin or tolerance, in a unit, and where the number comes from."""

    kind: Kind
    unit: str
    origin: str
    margin: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Design:
    """Registered method of the interval, the looks with their levels, and the first judged seed.

    The interval of a claim on published figures comes from them, without looks.
    """

    interval: Literal["t", "two-way", "jackknife", "published"]
    seeds: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()
    first_seed: int = 100

    @property
    def looks(self) -> Looks:
        """Looks at which the claim is judged."""
        return Looks(self.seeds, self.levels)


@dataclass(frozen=True)
class RegisteredArm:
    """A registered arm: what its runs have in common, and how its rate is chosen.

    Parameters
    ----------
    label : str
        Name of the arm.
    hash : str
        Hash of what its runs have in common; see ``arm_hash``.
    rates : tuple of float
        Rates that are tried; a single one is fixed. Empty if the arm takes the rate of another one, or has none.
    rate_of : str
        Arm whose chosen rate it takes; "" to choose its own.
    fields : mapping field -> ratio
        Fields of the method that are this multiple of the rate.
    tuning_seeds : tuple of int
        Seeds with which the rates are tried.
    may_void : bool
        Whether claims on the arm are void if it does not train; false for arms that are kept from text. Earlier phases
        that do not train void the claims in any case.
    by_seed : tuple of str
        What is drawn by the seed of a run: fields of the method, and "task" or "w0".
    baseline : bool
        Whether it is the same for every seed, such as word counts.
    seeds : int
        Number of seeds of an arm that figures show and no claim uses; 0 if the claims determine it.
    """

    label: str
    hash: str = ""
    rates: tuple[float, ...] = ()
    rate_of: str = ""
    fields: Mapping[str, float] = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = (9001,)
    may_void: bool = True
    by_seed: tuple[str, ...] = ()
    baseline: bool = False
    seeds: int = 0

    def fields_at(self, rate: float) -> dict[str, float]:
        """Return the fields of the method at a learning rate."""
        return {name: rate * ratio for name, ratio in self.fields.items()}


def arm_hash(
    arm: RegisteredArm, method: Mapping[str, Any], settings: Mapping[str, Any], task_hash: str, w0: str
) -> str:
    """Hash what the runs of a registered arm have in common, and how their rate is chosen.

    Label, rate, number of seeds and cost are left out, and so is what the seed of a run draws.

    Parameters
    ----------
    arm : Arm
        Rates and ratios of the arm.
    method, settings : mapping
        Method with its fields, and settings of the training without seed, as JSON values.
    task_hash, w0 : str
        Hashes of the task's rows and of the base weights.
    """
    fixed = {name: value for name, value in method.items() if name not in (*arm.fields, *arm.by_seed)}
    data = {name: value for name, value in (("task", task_hash), ("w0", w0)) if name not in arm.by_seed}
    content = data | {
        "method": fixed, "fields": arm.fields, "settings": settings, "by_seed": arm.by_seed,
        "rates": arm.rates, "rate_of": arm.rate_of, "tuning_seeds": arm.tuning_seeds, "rule": RATE_RULE,
    }  # fmt: skip
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


@dataclass(frozen=True)
class Registered:
    """A registered claim.

    Parameters
    ----------
    id : str
        Name of probe and claim, such as "lora.parity".
    paper, text, bound, design
        Source, words, bound and design of the claim.
    arms : tuple of str
        Labels of the arms that statistic and control read.
    code : str
        Hash of the functions that compute statistic and control; "" before registration.
    earlier : tuple of str
        Ids of earlier claims that this one keeps or restates.
    decision : {"kept", "restated", "new", ""}
        What became of them.
    why : str
        Why the claim was restated.
    """

    id: str
    paper: Paper
    text: ClaimText
    bound: Bound
    design: Design
    arms: tuple[str, ...] = ()
    code: str = ""
    earlier: tuple[str, ...] = ()
    decision: Literal["kept", "restated", "new", ""] = ""
    why: str = ""

    @property
    def claim(self) -> Claim:
        """Rule that judges the claim."""
        bound = self.bound
        return Claim(id=self.id, kind=bound.kind, margin=bound.margin, tolerance=bound.tolerance)


@dataclass(frozen=True)
class Change:
    """A change after the registration: when, where, what, why, and what had been seen before."""

    what: str
    why: str
    seen: str = ""
    date: str = ""
    commit: str = ""
    arms: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Deviation:
    """Deviation from the registration: a change of one claim, or of all with "*"."""

    claim: str
    what: Change


@dataclass(frozen=True)
class Stage:
    """Stage of the registration: a part of the work, in the order in which it is done.

    Parameters
    ----------
    claims : tuple of str
        Ids or probes; "*" is all.
    looks : tuple of int
        Looks of these claims, from 1; 0 is the choice of the rates of their arms.
    """

    claims: tuple[str, ...]
    looks: tuple[int, ...]

    def has(self, claim: str) -> bool:
        """Return whether a claim belongs to the stage."""
        return not {"*", claim, claim.partition(".")[0]}.isdisjoint(self.claims)


@dataclass(frozen=True)
class Registration:
    """All registered claims by id, their arms by label, the deviations from them, and the stages of the work."""

    claims: Mapping[str, Registered]
    arms: Mapping[str, RegisteredArm]
    deviations: tuple[Deviation, ...]
    stages: tuple[Stage, ...] = ()

    @property
    def first_seed(self) -> int:
        """First judged seed of all claims on runs, with which arms for figures start."""
        judged = self.of_tier("primary", "secondary").values()
        return min((claim.design.first_seed for claim in judged), default=Design.first_seed)

    def of_tier(self, *tiers: Tier) -> dict[str, Registered]:
        """Return the claims of these tiers, in their order."""
        return {id: claim for id, claim in self.claims.items() if claim.paper.tier in tiers}


@dataclass(frozen=True)
class _Contents:
    claim: tuple[Registered, ...]
    arm: tuple[RegisteredArm, ...] = ()
    deviation: tuple[Deviation, ...] = ()
    stage: tuple[Stage, ...] = ()


_COMMIT = re.compile("[0-9a-f]{40}")  # an option or a branch would give another file
_KEYS = {"from": "origin", "looks": "seeds"}  # keys of a claim that have other names in Python


def read(file: Path = FILE) -> Registration:
    """Read the registration.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        It is not TOML, a key is unknown, a value has another type, a bound or design is not allowed, or an id is
        registered twice.
    """
    return parse_registration(file.read_bytes(), file)


def parse_registration(content: bytes, file: Path | str) -> Registration:
    """Parse the content of a registration; see ``read``."""
    try:
        tables = tomllib.loads(content.decode("utf-8"))
        tables |= {"claim": _rename(tables.get("claim"))}
        contents = msgspec.convert(tables, _Contents, strict=False)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"cannot read {printable(file)}: {printable(error)}") from error
    # msgspec ignores unknown keys, and a misspelled one would have no effect.
    if unread := next(_unread_keys(tables, msgspec.to_builtins(contents)), None):
        raise ValueError(f"cannot read {printable(file)}: unknown key {printable(unread)!r}. Correct or remove it")
    claims: dict[str, Registered] = {}
    arms: dict[str, RegisteredArm] = {}
    references: list[tuple[str, tuple[str, ...]]] = []
    for arm in contents.arm:
        if arms.setdefault(arm.label, arm) is not arm:
            raise ValueError(f"cannot read {printable(file)}: arm {printable(arm.label)!r} is registered twice")
        references.append((f"arm {arm.label!r}", (arm.rate_of or arm.label,)))
    for claim in contents.claim:
        if claims.setdefault(claim.id, claim) is not claim:
            raise ValueError(f"cannot read {printable(file)}: claim {printable(claim.id)!r} is registered twice")
        references.append((f"claim {claim.id!r}", claim.arms))
        _ = claim.claim  # raises for a bound that is not allowed
        if claim.paper.tier != "published":
            _ = claim.design.looks
    for name, labels in references:
        if unknown := [label for label in labels if label not in arms]:
            reason = f"{printable(name)} names the arm {printable(unknown[0])!r}, which is not registered"
            raise ValueError(f"cannot read {printable(file)}: {reason}")
    return Registration(claims, arms, contents.deviation, contents.stage)


def clone_of(file: Path) -> Path | None:
    """Return the root of the clone that has this registration in its folder ``data``; None for that of a wheel."""
    root = file.parents[1]
    # The package in a wheel has neither of them next to its folder data.
    return root if (root / "README.md").exists() or (root / "docs").exists() else None


def _rename(table: object) -> object:
    if isinstance(table, dict):
        return {_KEYS.get(name, name): _rename(value) for name, value in table.items()}
    return list(map(_rename, table)) if isinstance(table, list) else table


def _unread_keys(value: Any, converted: Any) -> Iterator[str]:
    """Yield the keys of a table, and of the tables in it, that are not among those that were read."""
    if isinstance(value, dict):
        yield from value.keys() - converted.keys()
        for name in value.keys() & converted.keys():
            yield from _unread_keys(value[name], converted[name])
    elif isinstance(value, list):
        for item, converted_item in zip(value, converted, strict=True):
            yield from _unread_keys(item, converted_item)


@dataclass(frozen=True)
class HistoryComparison:
    """Comparison of the registration with its earlier versions.

    Parameters
    ----------
    differences : list of str
        One line for each change that no later deviation names.
    compared, commits : int
        Number of commits whose version was compared, and of all commits of runs. Without git no version is known, and
        in a shallow clone few are.
    """

    differences: list[str]
    compared: int
    commits: int


def compare_with_history(file: Path, commits: Collection[str]) -> HistoryComparison:
    """Compare the registration in a clone's folder ``data`` with its versions at the commits of the runs."""
    root, now = file.parents[1], file.read_bytes()
    differences, compared = [], 0
    versions = {now}  # most commits have a version that was compared already
    for commit in commits:
        content = _content(root, commit, f"{file.parent.name}/{file.name}")
        compared += content is not None
        if content is not None and content not in versions:
            versions.add(content)
            try:
                earlier = parse_registration(content, f"{file.name} at commit {commit[:12]}")
            except ValueError as error:
                differences.append(str(error))
            else:
                differences.extend(unexplained_changes(earlier, read(file), commit[:12]))
    return HistoryComparison(differences, compared, len(commits))


def unexplained_changes(earlier: Registration, now: Registration, commit: str) -> Iterator[str]:
    """Return one line for each change of the registration (claim, arm, deviation, stage) without a later deviation.

    A deviation allows changes of its claim and of the arms that the claim uses; "*" allows all. A new arm that no claim
    uses needs none, because it changes no verdict.
    """
    changed = f"differs from commit {commit}, with which runs were trained"
    later = {deviation.claim for deviation in now.deviations if deviation not in earlier.deviations}
    for id in sorted(earlier.claims.keys() | now.claims.keys()):
        if earlier.claims.get(id) != now.claims.get(id) and not later & {id, "*"}:
            yield f"registered.toml: claim {id}: {changed}; no later deviation names it"
    for label in sorted(earlier.arms.keys() | now.arms.keys()):
        users = {claim.id for claim in (*earlier.claims.values(), *now.claims.values()) if label in claim.arms}
        only_in_figures = label not in earlier.arms and not users
        if earlier.arms.get(label) != now.arms.get(label) and not only_in_figures and not later & {*users, "*"}:
            yield f"registered.toml: arm {printable(label)!r}: {changed}; no later deviation of its claims"
    if earlier.stages != now.stages and "*" not in later:
        yield f"registered.toml: stages: {changed}; no later deviation of all claims"
    for deviation in earlier.deviations:
        if deviation not in now.deviations:
            yield f"registered.toml: deviation of {printable(deviation.claim)}: missing, but is in commit {commit}"


def _content(root: Path, commit: str, path: str) -> bytes | None:
    """Return a file at a commit; None if it is not known."""
    if not _COMMIT.fullmatch(commit):  # without git, a run has a version instead
        return None
    # ``cat-file`` prints the stored bytes, and ``show`` could convert them.
    command = ["git", "-C", str(root), "cat-file", "blob", f"{commit}:{path}"]
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except OSError:  # git is not installed
        return None
    return result.stdout if result.returncode == 0 else None
