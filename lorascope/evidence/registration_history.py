"""Earlier versions of the registration, at the commits with which the runs were trained."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

from lorascope.evidence import registration
from lorascope.evidence.registration import Registration
from lorascope.files.printable import printable


def differences(file: Path, commits: Collection[str]) -> Iterator[str]:
    """Return one line per change of the registration since runs were trained that no later deviation names.

    Parameters
    ----------
    file : path
        The registration, in the folder ``data`` of a clone.
    commits : collection of str
        Commits of the runs. Those that the clone lacks are left out, such as all without git or in a shallow clone.
    """
    root, now = file.parents[1], file.read_bytes()
    compared = {now}
    for commit in commits:
        earlier = _content(root, commit, f"{file.parent.name}/{file.name}")
        if earlier is not None and earlier not in compared:
            compared.add(earlier)
            when = f"another one at commit {printable(commit[:12])}, with which runs were trained"
            yield from changes(registration.parse(earlier, f"{file} at {commit}"), registration.read(file), when)


def changes(earlier: Registration, now: Registration, when: str) -> Iterator[str]:
    """Return one line per claim, arm, deviation or order of the work that was changed without a later deviation."""
    later = [deviation for deviation in now.deviations if deviation not in earlier.deviations]
    named, arms = {deviation.claim for deviation in later}, {arm for each in later for arm in each.what.arms}
    for id in earlier.claims.keys() | now.claims.keys():
        if earlier.claims.get(id) != now.claims.get(id) and not named & {id, "*"}:
            yield f"registered.toml: claim {id}: {when}, and no deviation names it"
    for label in earlier.arms.keys() | now.arms.keys():
        if earlier.arms.get(label) != now.arms.get(label) and label not in arms and "*" not in named:
            yield f"registered.toml: arm {printable(label)!r}: {when}, and no deviation names it"
    if earlier.stages != now.stages and "*" not in named:
        yield f"registered.toml: stages: {when}, and no deviation of all claims"
    for deviation in earlier.deviations:
        if deviation not in now.deviations:
            yield f"registered.toml: deviation of {printable(deviation.claim)}: missing, but not at a commit of runs"


def _content(root: Path, commit: str, path: str) -> bytes | None:
    """Return a file at a commit; None if it is not known."""
    try:
        shown = subprocess.run(["git", "-C", str(root), "show", f"{commit}:{path}"], capture_output=True, check=False)
    except OSError:  # git is not installed
        return None
    return shown.stdout if shown.returncode == 0 else None
