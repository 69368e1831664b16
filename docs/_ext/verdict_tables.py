"""Text of the blocks of README and docs that come from the evidence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import edition_1
import numpy as np
import pandas as pd
from figure_lists import list_figures, list_figures_of_paper

from lorascope.analysis.seed_intervals import t_interval
from lorascope.files.printable import count_phrase
from lorascope.papers.judging import first_edition, published_numbers
from lorascope.papers.judging.claims import with_level
from lorascope.papers.judging.csv_tables import read_texts
from lorascope.papers.judging.kept_runs import BLOCK, Evidence
from lorascope.papers.judging.looks import BUDGET, STOPPED
from lorascope.papers.judging.registration import PAPERS, Change, Registered, Registration
from lorascope.papers.judging.verdicts import name_machine
from lorascope.papers.judging.verification import Derived

SCORES = ("test accuracy (%)", "test loss (nats)")
MIXTURE = "sentiment/mixture"
"""Name of the task that consists of four tasks."""
NO_RUNS = "No runs are kept yet."
_SMALLEST_P = 1e-4
_JUDGED = ("seeds", "effect", "bound", "p", "adjusted p")


def all_blocks(registration: Registration, data: Path, evidence: Evidence, derived: Derived) -> Mapping[str, str]:
    """Return the text of every block by name.

    Parameters
    ----------
    registration : Registration
        Claims, arms and deviations.
    data : path
        Folder of the registration and of the published figures.
    evidence : Evidence
        All runs, or none.
    derived : Derived
        What is computed from them.
    """
    tables = Tables(registration, data, evidence, derived)
    blocks = {
        "published": tables.on_published_figures(),
        "verdicts": tables.verdicts(),
        "primary": tables.primary(),
        "arms": tables.arms(),
        "mixture": tables.mixture(),
        "budget": tables.budget(),
        "before": tables.before(),
        "figures": list_figures(evidence),
    }
    for name in PAPERS:
        blocks |= {
            f"{name.lower()}-printed": tables.printed(name),
            f"{name.lower()}-verdicts": tables.of_paper(name),
            f"{name.lower()}-figures": list_figures_of_paper(evidence, name),
        }
    blocks |= edition_1.blocks(data)
    return {name: f"\n{text}\n\n" for name, text in blocks.items()}


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, line))} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _bound(registered: Registered) -> str:
    claim = registered.claim
    where = {"superiority": "above ", "non-inferiority": "above -", "equivalence": "within "}[claim.kind]
    return f"{where}{claim.bound:g} ({registered.bound.unit})"


def format_p(value: float) -> str:
    """Format a p-value; a very small one as its bound, and a missing one as an empty text."""
    if np.isnan(value):
        return ""
    return f"{value:.2g}" if value >= _SMALLEST_P else f"< {_SMALLEST_P:g}"


def _percent(values: pd.Series) -> str:
    return _mean(100 * values, 1)


def _count(values: pd.Series) -> str:
    """Format the mean of counts; without values, an empty text."""
    return "" if values.isna().all() else f"{values.mean():,.0f}"


def _nats(values: pd.Series) -> str:
    return _mean(values, 4)


def _mean(values: pd.Series, digits: int) -> str:
    """Format the mean with half its interval; a missing value, or a diverged run, gives an empty text."""
    numbers = values.to_numpy(np.float64)
    return t_interval(numbers).format(digits) if np.isfinite(numbers).all() else ""


@dataclass(frozen=True)
class Tables:
    """Tables of verdicts, arms and costs, as Markdown."""

    registration: Registration
    data: Path
    evidence: Evidence
    derived: Derived

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Verdicts by claim; look 0 means that none was made, also if the runs are of another arm than registered."""
        empty = {"look": 0.0, "shown": "", "side": "", "p_looks": np.nan, "all_seeds": ""}
        rows = {}
        for verdict in self.derived.verdicts.to_dict("records"):
            row = empty | {str(name): value for name, value in verdict.items() if pd.notna(value)}
            if verdict["arms_state"] == "changed":
                row["look"] = 0.0
            rows[str(verdict["claim"])] = row
        return rows

    @cached_property
    def changes(self) -> list[tuple[Change, list[str]]]:
        """Deviations with their claims; the same change of several claims is one."""
        changes: list[tuple[Change, list[str]]] = []
        for deviation in self.registration.deviations:
            claims = next((claims for change, claims in changes if change == deviation.what), None)
            if claims is None:
                changes.append((deviation.what, [deviation.claim]))
            else:
                claims.append(deviation.claim)
        return changes

    @cached_property
    def machines(self) -> pd.Series:
        """Machine of every run."""
        runs = self.evidence.runs
        names = [name_machine(dict(zip(BLOCK, row, strict=True))) for row in runs[BLOCK].itertuples(index=False)]
        return pd.Series(names, index=runs.index, dtype="object")

    def on_published_figures(self) -> str:
        """Return the table of verdicts on published figures."""
        claims = self.registration.of_tier("published")
        rows = self._published(claims, lambda claim: f"{claim.text.statistic}; {claim.text.control}")
        return _table(("claim", "compared", "effect", "bound", "verdict"), rows)

    def _published(
        self, claims: Mapping[str, Registered], second: Callable[[Registered], str]
    ) -> list[tuple[str, str, str, str, str]]:
        """Return sentence, a second column, effect, bound and verdict of the claims on published numbers."""
        published = published_numbers.judge_published(first_edition.read_claims(), self.data / "published")
        return [
            (claims[row["claim"]].text.sentence, second(claims[row["claim"]]), row["shown"],
             _bound(claims[row["claim"]]), row["outcome"])
            for row in published.to_dict("records")
            if row["claim"] in claims
        ]  # fmt: skip

    def verdicts(self) -> str:
        """Return the tables of verdicts, primary claims first, with the deviations."""
        primary, secondary = (self.registration.of_tier(tier) for tier in ("primary", "secondary"))
        return "\n\n".join([
            *self._without_runs(),
            "**Primary claims**, one per paper. The adjusted p-value is Holm's.",
            self._verdict_table(primary),
            "**Secondary claims.** The adjusted p-value follows Benjamini and Hochberg.",
            self._verdict_table(secondary),
            *self._footnotes(primary | secondary),
        ])  # fmt: skip

    def primary(self) -> str:
        """Return the primary claims, one line per paper, with links from the README."""
        rows = []
        for name, arxiv in PAPERS.items():
            for id, claim in self.registration.of_tier("primary").items():
                if claim.paper.arxiv == arxiv:
                    verdict = "; ".join(filter(None, (self._outcome(id), *self._marks(id))))
                    link = f"[{name}](docs/papers/{name.lower()}.md)"
                    rows.append((link, claim.text.sentence, *self._judged(id), verdict))
        table = _table(("paper", "claim", *_JUDGED, "verdict"), rows)
        state = [
            self._progress(),
            f"Runs so far: {count_phrase(self.minutes, 'CPU-minute')} of at most {BUDGET:,}.",
            *(
                f"Look {look} is missing for {count_phrase(len(ids), 'claim')}."
                for look, ids in self._missing_looks().items()
            ),
            "[Details](docs/evidence.md#cost-and-state)",
        ]
        return "\n\n".join([*self._without_runs(), " ".join(state), table])

    def _progress(self) -> str:
        """Return how many claims are judged, and with which outcomes."""
        outcomes = Counter(map(self._outcome_alone, self.rows))
        waiting = outcomes.pop("not judged", 0)
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        total = count_phrase(len(self.rows), "claim")
        return f"Judged so far: {len(self.rows) - waiting} of {total}" + (f" ({counts})." if counts else ".")

    def of_paper(self, name: str) -> str:
        """Return the rule of the primary claim of a paper, and the verdicts of all its claims."""
        claims = {id: claim for id, claim in self.registration.claims.items() if claim.paper.arxiv == PAPERS[name]}
        judged = {id: claim for id, claim in claims.items() if claim.paper.tier != "published"}
        main = self._primary(name)
        seeds = " and ".join(filter(None, (", ".join(map(str, main.design.seeds[:-1])), str(main.design.seeds[-1]))))
        rule = (
            f"The primary claim, `{main.id}`, is judged at {seeds} seeds. It is supported if the whole interval is "
            f"{_bound(main)}, and not supported if the whole interval is below."
        )
        rows = self._published(claims, lambda claim: claim.paper.place)
        on_figures = ["On published numbers, without training:",
                      _table(("claim", "in the paper", "effect", "bound", "verdict"), rows)]  # fmt: skip
        return "\n\n".join([
            *self._without_runs(),
            rule,
            self._verdict_table(judged, show_place=True),
            *(on_figures if rows else []),
            *self._footnotes(judged),
        ])  # fmt: skip

    def _primary(self, name: str) -> Registered:
        primary = self.registration.of_tier("primary").values()
        of_paper = [claim for claim in primary if claim.paper.arxiv == PAPERS[name]]
        if len(of_paper) != 1:
            raise ValueError(f"registered.toml: {name} must have one primary claim, got {len(of_paper)}")
        return of_paper[0]

    def printed(self, name: str) -> str:
        """Return the primary claim of a paper with its source, and the numbers that the paper prints."""
        main = self._primary(name)
        lines = [
            f"- arXiv {main.paper.arxiv}, {main.paper.place}",
            f"- Claim: {main.text.sentence}",
            f"- Bound: {_bound(main)}. Source: {main.bound.origin}",
        ]
        rows = [
            (gain["comparison"], f"{gain['table']}, {gain['model']}", gain["cells"], gain["mean_gain"],
             f"{gain['smallest']} to {gain['largest']}", gain["unit"])
            for gain in read_texts(self.data / "published/printed_gains.csv") if gain["paper"] == name
        ]  # fmt: skip
        table = _table(("printed comparison", "place and model", "cells", "mean gain", "range", "unit"), rows)
        return "\n\n".join(["\n".join(lines), table if rows else self._reported(name)])

    def _reported(self, name: str) -> str:
        """Return single printed numbers of a paper, and of reruns by others."""
        rows = [
            (f"{number['paper']}, {number['table']}", ", ".join(filter("-".__ne__, (number["model"], number["data"]))),
             number["metric"], number["method"], number["value"])
            for number in read_texts(self.data / "published/reported.csv")
            if re.search(rf"\b{name}\b", number["paper"])
        ]  # fmt: skip
        return _table(("source", "model and data", "metric", "method", "printed value"), rows)

    def arms(self) -> str:
        """Return rate, seeds, trained parameters and scores of every arm with judged runs."""
        rows = self.arm_rows
        return _table(("arm", "learning rate", "seeds", "trained parameters", *SCORES), rows) if rows else NO_RUNS

    @cached_property
    def arm_rows(self) -> list[tuple[str, ...]]:
        """Rows of the table of arms."""
        runs = self.evidence.runs.assign(machine=self.machines)
        runs = runs[runs["role"] != "tuning"]
        machines = [name_machine(block) for block in self.evidence.blocks()]
        rows: list[tuple[str, ...]] = []
        for label in self.registration.arms:
            for (role, machine), of_arm in runs[runs["arm"] == label].groupby(["role", "machine"], sort=False):
                elsewhere = f", machine {machines.index(machine) + 1}" if machine in machines[1:] else ""
                rate = ", ".join(f"{rate:g}" for rate in of_arm["rate"].dropna().unique())
                classified = of_arm["validation_chance"].notna().any() or role == "baseline"
                rows.append((
                    f"{label}{elsewhere}", rate + " (end of the grid)" * (self._rate_of(label) in self._at_end),
                    str(len(of_arm)) if role == "judged" else "", _count(of_arm["trained_parameters"]),
                    _percent(of_arm["test_metric"]) if classified else "", _nats(of_arm["test_loss"]),
                ))  # fmt: skip
        return rows

    def budget(self) -> str:
        """Return what the registration and the runs are, what they took, and which looks were not made."""
        registered = (self.data / "registered.toml").read_text(encoding="utf-8")
        when = re.search(r"Registered on (\S+), in the commit with the tag (\S+)\.", registered)
        judged, on_figures = self.registration.of_tier("primary", "secondary"), self.registration.of_tier("published")
        lines = [
            f"- Registration: {when[1]}, tag `{when[2]}`; " if when else "- Registration: ",
            f"{count_phrase(len(judged), 'claim')} on runs, {len(on_figures)} on published numbers, "
            f"{count_phrase(len(self.registration.arms), 'arm')}. {self._progress()}",
        ]
        runs = self.evidence.runs
        if runs.empty:
            return "".join(lines) + f"\n- Runs: {NO_RUNS[0].lower()}{NO_RUNS[1:]}"
        roles = ", ".join(f"{number} {role}" for role, number in runs["role"].value_counts(sort=False).items())
        commits = (
            f"`{commit[:7]}`{' with uncommitted changes' if dirty else ''} ({count_phrase(number, 'run')})"
            for commit, dirty, number in runs.groupby(["commit", "dirty"], sort=False).size().reset_index().to_numpy()
        )
        machines = (
            f"{name} ({count_phrase(number, 'run')})" for name, number in self.machines.value_counts(sort=False).items()
        )
        return "\n".join([
            "".join(lines),
            f"- Runs: {len(runs):,} ({roles}), {count_phrase(self.minutes, 'CPU-minute')}.",
            f"- Machines (instruction set / torch / threads / device): {'; '.join(machines)}.",
            f"- Commits: {'; '.join(commits)}.",
            *self._open_looks(),
        ])  # fmt: skip

    @property
    def minutes(self) -> int:
        """CPU-minutes of all runs."""
        return round(self.evidence.runs["cpu_seconds"].sum() / 60)

    def _open_looks(self) -> Iterator[str]:
        missing = self._missing_looks()
        for look, ids in missing.items():
            yield f"- Look {look} is missing for {count_phrase(len(ids), 'claim')}: {', '.join(ids)}."
        if not missing:
            yield "- Every claim was judged to its end."

    def _missing_looks(self) -> dict[int, list[str]]:
        """Return the claims that need more seeds, by the number of the missing look."""
        missing: dict[int, list[str]] = {}
        for id, row in self.rows.items():
            if row["note"] == STOPPED:
                missing.setdefault(1 + int(row["look"]), []).append(f"`{id}`")
        return dict(sorted(missing.items()))

    def mixture(self) -> str:
        """Return the accuracy of every arm by task of the mixture, next to that of the most frequent class."""
        header, *rows = self.mixture_rows or [()]
        return _table(header, rows) if rows else NO_RUNS

    @cached_property
    def mixture_rows(self) -> list[tuple[str, ...]]:
        """Header and rows of the table of the mixture; nothing without runs on it."""
        runs = self.evidence.runs
        runs = runs[(runs["role"] == "judged") & (runs["task"] == MIXTURE)]
        if runs.empty:
            return []
        rows = self.evidence.rows
        rows = rows[rows["task_hash"] == runs["task_hash"].iloc[0]].sort_values("row")
        task_of = rows["group"].to_numpy()
        tasks = list(dict.fromkeys(task_of))
        frequent = (rows.loc[task_of == task, "label"].value_counts(normalize=True).max() for task in tasks)
        table = [
            ("arm", "seeds", *(f"{task} (%)" for task in tasks)),
            ("most frequent class of the task", "", *(f"{100 * share:.1f}" for share in frequent)),
        ]
        for arm in filter(set(runs["arm"]).__contains__, self.registration.arms):
            right = [self.evidence.margins[run] > 0 for run in runs.loc[runs["arm"] == arm, "run"]]
            by_task = (_percent(pd.Series([of_run[task_of == task].mean() for of_run in right])) for task in tasks)
            table.append((arm, str(len(right)), *by_task))
        return table

    def before(self) -> str:
        """Return the verdicts of the claims under the earlier rules, with the claims that replace them and why."""
        rows = []
        for before in read_texts(self.data / "verdicts_before.csv"):
            effect = f"{before['effect']} [{before['low']}, {before['high']}]" if before["effect"] else "not reported"
            then = f"{effect}; margin {before['margin']} ({before['unit']})"
            now = []
            for id, claim in self.registration.claims.items():
                if before["claim"] in claim.earlier:
                    reason = claim.why or "nothing but the seeds"
                    now.append((f"`{id}`, {claim.decision}", self._effect(id), self._outcome(id), reason))
            now = now or [("dropped", "", "", before["dropped"])]
            rows.append((
                f"`{before['claim']}` {before['sentence']}", then, before["outcome"] or "not reported",
                *("; ".join(filter(None, column)) for column in zip(*now, strict=True)),
            ))  # fmt: skip
        header = ("earlier claim", "effect then", "verdict then", "now", "effect now", "verdict now", "what changed")
        return _table(header, rows)

    def _without_runs(self) -> list[str]:
        return [NO_RUNS] if self.evidence.runs.empty else []

    def _verdict_table(self, claims: Mapping[str, Registered], show_place: bool = False) -> str:
        rows = []
        for id, claim in claims.items():
            row = self.rows[id]
            all_seeds = [f"all seeds: {row['all_seeds']}"] if row["look"] >= 1 and row["all_seeds"] else []
            rows.append((
                f"`{id}` {claim.text.sentence}", *([claim.paper.place] if show_place else []), *self._judged(id),
                self._outcome(id), "; ".join([*self._marks(id), *all_seeds, *self._deviations(id)]),
            ))  # fmt: skip
        first = ["claim", "in the paper"] if show_place else ["claim"]
        return _table((*first, *_JUDGED, "verdict", "marks"), rows)

    def _judged(self, id: str) -> tuple[str, ...]:
        """Return the columns ``_JUDGED`` at the look that was made; seeds before the first look show no numbers."""
        row, claim = self.rows[id], self.registration.claims[id]
        if row["look"] >= 1:
            p = format_p(row["p_looks"]), format_p(row["adjusted_p"])
            return f"{row['n']:g}", self._effect(id), _bound(claim), *p
        seeds = "" if row["outcome"] == "void" else f"{row['n']:g} of {claim.design.seeds[0]}"
        return seeds, "", _bound(claim), "", ""

    def _effect(self, id: str) -> str:
        """Return the effect at the look that was made, with its interval and the level of this."""
        row = self.rows[id]
        return with_level(row["shown"], row["level"]) if row["look"] >= 1 else ""

    def _outcome(self, id: str) -> str:
        row = self.rows[id]
        side = row["side"] if row["look"] >= 1 else ""
        return ", ".join(filter(None, (self._outcome_alone(id), side)))

    def _outcome_alone(self, id: str) -> str:
        row = self.rows[id]
        waits = row["note"] == STOPPED and not row["look"] >= 1 and self.minutes < BUDGET
        return "not judged" if waits else str(row["outcome"])

    def _marks(self, id: str) -> Iterator[str]:
        row = self.rows[id]
        if row["arms_state"] == "deviated":
            yield "deviated"
        if row["note"] == STOPPED and self.minutes >= BUDGET:
            yield "stopped by the budget"
        elif row["note"] and not (row["note"] == STOPPED and row["n"] == 0):
            yield row["note"]
        if id in self._elsewhere:
            yield "depends on the machine"
        for arm in self.registration.claims[id].arms:
            if self._rate_of(arm) in self._at_end:
                yield f"best learning rate at the end of the grid: {arm}"

    def _rate_of(self, arm: str) -> str:
        registered = self.registration.arms.get(arm)
        return registered.rate_of or arm if registered else arm

    @cached_property
    def _at_end(self) -> set[str]:
        tuning = self.derived.tuning
        return set(tuning.loc[tuning["at_end_of_grid"].astype(bool), "arm"])

    @cached_property
    def _elsewhere(self) -> set[str]:
        machines = self.derived.machines
        return set(machines.loc[machines["differs"].astype(bool), "claim"])

    def _deviations(self, id: str) -> Iterator[str]:
        for number, (_, claims) in enumerate(self.changes, start=1):
            if id in claims:
                yield f"D{number}"

    def _footnotes(self, claims: Mapping[str, Registered]) -> Iterator[str]:
        """Return other machines and deviations of claims."""
        machines = self.derived.machines[self.derived.machines["claim"].isin(list(claims))]
        if len(machines):
            rows = machines[["claim", "block", "n", "shown", "outcome"]].itertuples(index=False)
            yield "Other machines:"
            yield _table(("claim", "machine", "seeds", "effect", "verdict"), rows)
        notes = []
        for number, (change, of) in enumerate(self.changes, start=1):
            if {"*", *claims} & set(of):
                when = ", ".join(filter(None, ("all claims" if "*" in of else "", change.date, change.commit)))
                said = f"{change.what}. Reason: {change.why}. Seen before: {change.seen}."
                notes.append(f"- D{number} ({when}): {said}")
        if notes:
            yield "Deviations:"
            yield "\n".join(notes)
