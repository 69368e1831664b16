"""Verification of the second edition: its results computed again from the kept runs, and compared with the kept ones.

``MANIFEST`` has the SHA-256 of the kept files and of the registration, but not of the tables that follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorascope.files.printable import count_phrase, printable
from lorascope.files.whole_files import write_bytes
from lorascope.papers.judging import beliefs, first_edition, kept_study, registered_study
from lorascope.papers.judging.code_hash import comparison_hash, judging_hash
from lorascope.papers.judging.csv_tables import CLOSE, compare_with_file, to_csv
from lorascope.papers.judging.evidence_manifest import digest, kept_digests, manifest, parse_digests
from lorascope.papers.judging.kept_study import FIRST_SEED, StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_rates import chosen_rates, rate_table
from lorascope.papers.judging.study_results import compute
from lorascope.papers.judging.study_statistics import StudyComparison
from lorascope.papers.judging.words import NOT_RUN

DERIVED = ("tuning.csv", "effects.csv", "results.csv")
"""Tables that follow from the runs, in the order in which they follow from each other."""
RUNS, CODE = "runs.csv.gz", "code"
_MACHINE = ["processor", "capability", "torch", "threads", "device"]


class Difference(NamedTuple):
    """A difference that is a cause of others: the file that it is in, and a line that says what differs."""

    file: str
    line: str


def derive_tables(
    registration: StudyRegistration, comparisons: Mapping[str, StudyComparison], evidence: StudyEvidence
) -> dict[str, bytes]:
    """Compute the content of the files ``DERIVED``."""
    results = compute(registration, comparisons, evidence)
    tables = (rate_table(registration, evidence.runs), results.effects, results.results)
    return dict(zip(DERIVED, map(to_csv, tables), strict=True))


def write_study(folder: Path, registration_file: Path, comparisons: Mapping[str, StudyComparison]) -> None:
    """Write the tables that follow from the runs of a folder, and its manifest; see ``kept_study.compact`` before."""
    contents = derive_tables(registered_study.read(registration_file), comparisons, kept_study.read(folder))
    for name, content in contents.items():
        write_bytes(folder / name, content)
    lines = ""
    for path, hash in _digests(folder, registration_file).items():
        lines += f"{hash}  {path}\n"
    write_bytes(folder / "MANIFEST", lines.encode())


def _digests(folder: Path, registration_file: Path) -> dict[str, str]:
    digests = parse_digests(manifest(folder))
    # They are compared with recomputed ones, cell by cell, and sentences with the results.
    for name in (*DERIVED, beliefs.FILE):
        digests.pop(name, None)
    return digests | {f"../{registration_file.name}": digest(registration_file)}


def verify_study(
    folder: Path,
    registration_file: Path,
    comparisons: Mapping[str, StudyComparison],
    module_of: Callable[[str], str],
    sentences: bool = True,
) -> list[str]:
    """Verify everything that follows from the runs by computing it again.

    Parameters
    ----------
    folder : path
        Folder of the evidence.
    registration_file : path
        File of the registration.
    comparisons : mapping id -> StudyComparison
        Effects of each claim.
    module_of : callable
        ``module_of(id)`` returns the name of the module whose ``JUDGED`` has the claim.
    sentences : bool
        Whether sentences in ``beliefs.toml`` and rows of the README follow from the results. Default True.

    Returns
    -------
    list of str
        One line per cause, then one with the number of differences that follow from them; empty if all agree.
    """
    try:
        registration, evidence = registered_study.read(registration_file), kept_study.read(folder)
        contents = derive_tables(registration, comparisons, evidence)
    except (ValueError, FileNotFoundError) as error:
        return [printable(error)]
    except KeyError as error:
        return [f"{registration_file.name}: an arm that a claim reads is not registered: {printable(error)}"]
    causes = [
        *_check_registration(registration_file.name, registration, comparisons, module_of),
        *_check_arms(registration, evidence, _judged_arms(folder, registration)),
        *_check_scores(evidence),
        *_check_machines(registration, comparisons, evidence),
    ]
    old, new = kept_digests(folder), _digests(folder, registration_file)
    changed = {Path(path).name for path in old.keys() | new.keys() if old.get(path) != new.get(path)}
    lines = []
    for cause in causes:
        # In an unchanged file, a difference follows from a changed one, if there is any.
        if cause.file in {*changed, CODE} or not changed:
            lines.append(cause.line)
    # A line that says what differs in a file is more useful than one that says only that it does.
    lines += [f"{file}: differs from MANIFEST" for file in sorted(changed - {cause.file for cause in causes})]
    consequences = len(causes) + len(changed) - len(lines)
    for name, content in contents.items():
        consequences += _add(lines, compare_with_file(folder / name, content))
    if sentences:
        consequences += _add(lines, _sentence_differences(folder, registration_file, registration, contents))
    if consequences:
        lines.append(f"{count_phrase(consequences, 'further difference')} in what follows from these")
    return lines


def _sentence_differences(
    folder: Path, registration_file: Path, registration: StudyRegistration, contents: Mapping[str, bytes]
) -> list[str]:
    """Compare the sentences with the results that they follow from, and the rows of the README with both."""
    differences = list(beliefs.belief_differences(folder, registration, contents["results.csv"]))
    readme = registration_file.parents[1] / "README.md"
    if readme.exists() and not differences:
        differences += beliefs.readme_differences(readme, folder, registration, first_edition.text_estimates())
    return differences


def _add(lines: list[str], differences: Iterable[str]) -> int:
    """Add differences to the lines, or return their number if these have a cause already."""
    if lines:
        return len(list(differences))
    lines += differences
    return 0


def _check_registration(
    name: str,
    registration: StudyRegistration,
    comparisons: Mapping[str, StudyComparison],
    module_of: Callable[[str], str],
) -> Iterator[Difference]:
    """Compare the registration with the code that judges, and with the comparison of each claim."""
    if registration.judging != (code := judging_hash()):
        line = f"{name}: judging: registered {registration.judging or 'no hash'}, the code has {code}"
        yield Difference(CODE, line)
    for id in sorted(registration.claims.keys() ^ comparisons.keys()):
        missing = "no module computes it" if id in registration.claims else "it is not registered"
        yield Difference(name, f"{name}: claim {id}: {missing}")
    for id in sorted(registration.claims.keys() & comparisons.keys()):
        claim, statistics = registration.claims[id], comparisons[id].statistics()
        for effect, labels in claim.labels().items():
            arms = statistics[effect].arms() if effect in statistics else set()
            if arms != set(labels):
                line = (
                    f"{name}: claim {id}: arms of {effect}: registered {sorted(labels)}, the code reads {sorted(arms)}"
                )
                yield Difference(name, line)
        if claim.code != (code := comparison_hash(module_of(id), id)):
            line = f"{name}: claim {id}: code: registered {claim.code or 'no hash'}, the code has {code}"
            yield Difference(CODE, line)


def _judged_arms(folder: Path, registration: StudyRegistration) -> set[str]:
    """Return the arms of the claims that the kept results judge, whose runs must all be kept."""
    labels: set[str] = set()
    try:
        results = beliefs.read_results(folder)
    except (ValueError, FileNotFoundError):  # its own comparison names it
        return labels
    for id in results.loc[results["word"] != NOT_RUN, "claim"]:
        if id in registration.claims:
            labels.update(*registration.claims[id].labels().values())
    return labels


def _check_arms(
    registration: StudyRegistration, evidence: StudyEvidence, judged: Collection[str]
) -> Iterator[Difference]:
    """Compare the arms of the runs, their rates and the seeds of judged ones with the registration.

    While an arm is trained, its last seeds are open.
    """
    choices = chosen_rates(registration, evidence.runs)
    for (name, role), rows in evidence.runs.groupby(["arm", "role"]):
        label = str(name)
        prefix = f"{RUNS}: arm {printable(label)!r}"
        arm = registration.arms.get(label)
        if arm is None:
            yield Difference(RUNS, f"{prefix}: it is not registered")
            continue
        if hashes := sorted(set(rows["arm_hash"]) - {arm.hash}):
            yield Difference(RUNS, f"{prefix}: hash: registered {arm.hash or 'none'}, {role} runs have {hashes[0]}")
        # The choice of rates covers the tuning runs.
        if role == "tuning":
            continue
        rate = choices[label].rate
        if rate is None:
            yield Difference(RUNS, f"{prefix}: judged before a rate was chosen")
        elif len(different := rows[~np.isclose(rows["rate"], rate, rtol=CLOSE, atol=0)]):
            row = different.iloc[0]
            yield Difference(RUNS, f"{prefix}: seed {row['seed']}: rate {row['rate']:g}, chosen {rate:g}")
        seeds, expected = set(rows["seed"]), set(range(FIRST_SEED, FIRST_SEED + arm.seeds))
        if label not in judged:
            expected &= set(range(max(seeds) + 1))
        if different_seeds := sorted(seeds ^ expected):
            state = "missing" if different_seeds[0] in expected else "not registered"
            line = f"{prefix}: {len(seeds)} of {arm.seeds} judged seeds, seed {different_seeds[0]} is {state}"
            yield Difference(RUNS, line)


def _check_scores(evidence: StudyEvidence) -> Iterator[Difference]:
    """Compare accuracies with the test rows that they are means of."""
    runs = evidence.runs
    is_scored = runs["run"].isin(evidence.right) & (runs["phase"] == "") & (runs["role"] == "judged")
    for run, arm, seed, task, old in runs.loc[is_scored, ["run", "arm", "seed", "task", "accuracy"]].to_numpy():
        is_of_task = evidence.test_rows(arm, seed)["task"].to_numpy() == task
        accuracy = float(evidence.correct(arm, seed)[is_of_task].mean() / 100)
        if not np.isclose(old, accuracy, rtol=CLOSE, atol=0):
            yield Difference("right.npz", f"right.npz: run {run}: accuracy {accuracy!r}, {RUNS} has {old!r}")


def _check_machines(
    registration: StudyRegistration, comparisons: Mapping[str, StudyComparison], evidence: StudyEvidence
) -> Iterator[Difference]:
    """Check that all arms of a claim were trained on one machine with each seed."""
    # Arms of the positive control may have other seeds than those of the claim.
    judged = evidence.runs[evidence.runs["role"] == "judged"]
    for id in registration.claims.keys() & comparisons.keys():
        for effect, statistic in comparisons[id].statistics().items():
            runs = judged[judged["arm"].isin(statistic.arms())]
            for deviation in registration.deviations:
                if id in deviation.claims:
                    is_equal = runs["processor"].isin(deviation.processors)
                    runs = runs.assign(processor=runs["processor"].mask(is_equal, "equal ones"))
            machines = runs.groupby("seed")[_MACHINE].nunique()
            for seed in machines.index[(machines > 1).any(axis=1)]:
                yield Difference(RUNS, f"{RUNS}: claim {id}: arms of {effect} have different machines with seed {seed}")
                break
