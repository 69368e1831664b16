"""Earlier versions of the registration, at the commits with which the runs were trained."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.papers.judging import registration
from lorascope.papers.judging.registration import Registration

_COMMIT = re.compile("[0-9a-f]{40}")  # an option or a branch would give another file


@dataclass(frozen=True)
class HistoryComparison:
    """Comparison of the registration with its earlier versions.

    Parameters
    ----------
    differences : list of str
        One line for each change that no later deviation names.
    known, all : int
        Number of commits whose version is known, and of all commits of runs. None is known without git, and few are in
        a shallow clone.
    """

    differences: list[str]
    known: int
    all: int


def compare(file: Path, commits: Collection[str]) -> HistoryComparison:
    """Compare the registration, in the folder ``data`` of a clone, with its versions at the commits of the runs."""
    root, now, found = file.parents[1], file.read_bytes(), []
    versions = {commit: _content(root, commit, f"{file.parent.name}/{file.name}") for commit in commits}
    known = {commit: content for commit, content in versions.items() if content is not None}
    for content in dict.fromkeys(known.values()):
        commit = next(each for each in known if known[each] == content)
        if content != now:
            try:
                earlier = registration.parse(content, f"{file.name} at commit {commit[:12]}")
            except ValueError as error:
                found.append(str(error))
            else:
                found.extend(changes(earlier, registration.read(file), commit[:12]))
    return HistoryComparison(found, len(known), len(versions))


def changes(earlier: Registration, now: Registration, commit: str) -> Iterator[str]:
    """Return one line per claim, arm, deviation or stage that was changed without a later deviation.

    A deviation allows changes of its claim and of the arms that the claim uses; "*" allows all. A new arm that no claim
    uses needs none, because it changes no verdict.
    """
    changed = f"differs from commit {commit}, with which runs were trained"
    later = {deviation.claim for deviation in now.deviations if deviation not in earlier.deviations}
    for id in sorted(earlier.claims.keys() | now.claims.keys()):
        if earlier.claims.get(id) != now.claims.get(id) and not later & {id, "*"}:
            yield f"registered.toml: claim {id}: {changed}; no later deviation names it"
    for label in sorted(earlier.arms.keys() | now.arms.keys()):
        users = {id for claims in (earlier.claims, now.claims) for id in claims if label in claims[id].arms}
        shown = label not in earlier.arms and not users
        if earlier.arms.get(label) != now.arms.get(label) and not shown and not later & {*users, "*"}:
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
    words = ["git", "-C", str(root), "cat-file", "blob", f"{commit}:{path}"]
    try:
        shown = subprocess.run(words, capture_output=True, check=False)
    except OSError:  # git is not installed
        return None
    return shown.stdout if shown.returncode == 0 else None
