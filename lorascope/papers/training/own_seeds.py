"""Own seeds of one claim: statistic and control trained as for the evidence, next to the kept seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.typed_json import to_json_rows
from lorascope.papers.judging import kept_runs, kept_verdicts, registration
from lorascope.papers.judging.claims import format_effect
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.learning_rates import choice_of_arm
from lorascope.papers.judging.looks import ERROR
from lorascope.papers.judging.registration import Registration
from lorascope.papers.judging.verdicts import estimate_claim, judging_block, name_machine
from lorascope.papers.registry import PAIRS
from lorascope.papers.training.missing_runs import OpenRun
from lorascope.papers.training.train_arms import block, read_by_claims, require_registered, train_runs
from lorascope.schema.suggestions import unknown_name

# The jackknife of pairs of runs needs as many seeds.
_SEEDS_OF_PAIRS = 3


@dataclass(frozen=True)
class SeedPlan:
    """Plan of one own seed of a claim: the runs that it needs.

    Parameters
    ----------
    claim : str
        Id of the claim.
    seed : int
        The seed.
    claims : Registration
        The registration, with only this claim and its arms.
    kept : Evidence
        Kept evidence of the repository; may be empty.
    folder : Path
        Folder of the own evidence.
    """

    claim: str
    seed: int
    claims: Registration
    kept: Evidence
    folder: Path

    def runs(self) -> list[OpenRun]:
        """Return the runs that the folder lacks, at the chosen rates, or at the middle ones if none are chosen."""
        evidence, open_runs = self.own_evidence(), []
        for label in self.claims.claims[self.claim].arms:
            if not evidence.has(label, self.seed):
                role: Any = "baseline" if self.claims.arms[label].baseline else "judged"
                open_runs.append(OpenRun(label, self.seed, role, self._rate(label)))
        return open_runs

    def _rate(self, label: str) -> float | None:
        if not self.claims.arms[label].fields:
            return None
        tuned, choice = choice_of_arm(self.claims, self.kept.runs, label)
        return choice.rate or tuned.rates[len(tuned.rates) // 2]

    def own_evidence(self) -> Evidence:
        """Return the own runs of this machine that fit the plan."""
        evidence = self._of_this_machine()
        return replace(evidence, runs=evidence.runs[~evidence.runs["run"].isin(self.unfit())])

    def _of_this_machine(self) -> Evidence:
        return kept_runs.read_kept(self.folder).in_block(block())

    def unfit(self) -> dict[str, str]:
        """Return one line for each own run of another arm than registered, or at another rate, by the id of the run."""
        runs, lines = self._of_this_machine().runs, {}
        for row in runs[(runs["role"] == "judged") & runs["arm"].isin(self.claims.arms.keys())].to_dict("records"):
            rate = self._rate(row["arm"])
            if row["arm_hash"] != self.claims.arms[row["arm"]].hash:
                reason = "it is another arm than registered"
            elif rate is not None and not math.isclose(row["rate"], rate):
                reason = f"its rate is {row['rate']:g}, and not {rate:g}"
            else:
                continue
            lines[row["run"]] = f"own run not used: {row['arm']}, seed {row['seed']}: {reason}"
        return lines

    def minutes(self) -> float | None:
        """Return the CPU-minutes that these runs took for the evidence on average; None if it lacks one of the arms."""
        used = self.kept.runs[self.kept.runs["role"] != "tuning"].groupby("arm")["cpu_seconds"].mean()
        labels = [run.arm for run in self.runs()]
        if not set(labels) <= set(used.index):
            return None
        return float(used[labels].sum()) / 60

    def train(self, out: Path) -> None:
        """Train the runs and add them to the folder of evidence, and remove runs of this seed that do not fit.

        Raises
        ------
        ValueError
            An arm differs from the registered one.
        """
        require_registered(self.claims)
        open_runs, file = self.runs(), self.folder / "runs.csv"
        if unfit := self.unfit():
            runs = kept_runs.read(self.folder).runs
            replaced = set(runs.loc[runs["run"].isin(unfit) & (runs["seed"] == self.seed), "run"])
            lines = file.read_bytes().splitlines(keepends=True)  # not parsed, so that no number changes
            remaining = [line for line in lines if line.partition(b",")[0].decode() not in replaced]
            kept_runs.write_bytes(file, b"".join(remaining))
        seeds, reads = range(self.seed, self.seed + 1), read_by_claims(self.claims)
        for label, of_arm in reads.items():
            reads[label] = [replace(read, seeds=seeds) for read in of_arm]
        train_runs(open_runs, self.claims, reads, self.folder, out)


def plan(claim: str, seed: int, folder: Path, data: Path = registration.FILE.parent) -> SeedPlan:
    """Plan the runs of one own seed of a claim.

    Parameters
    ----------
    claim : str
        Id of a claim on trained runs.
    seed : int
        Any seed.
    folder : path
        Folder of the own evidence.
    data : path
        Folder ``data`` of a clone, with registration and evidence.

    Raises
    ------
    FileNotFoundError
        The folder has no registration.
    ValueError
        The claim is unknown, or needs no runs.
    """
    registered = registration.read(data / "registered.toml")
    if claim not in registered.claims:
        raise ValueError(unknown_name("claim", claim, registered.claims))
    if claim not in PAIRS:
        raise ValueError(f"claim {claim} needs no runs: it is computed from published figures")
    labels = set(registered.claims[claim].arms)
    labels |= {registered.arms[label].rate_of for label in labels}  # their tuning runs choose the rates
    arms = {label: arm for label, arm in registered.arms.items() if label in labels}
    only = Registration({claim: registered.claims[claim]}, arms, ())
    return SeedPlan(claim, seed, only, kept_runs.read_kept(data / "evidence"), folder)


@dataclass(frozen=True)
class OwnSeeds:
    """Results of a claim for the kept seeds, your own seeds, and both.

    Parameters
    ----------
    rows : DataFrame
        ``seeds, n, effect, verdict``: kept seeds, own ones, and both. Only the kept seeds have a verdict.
    values : DataFrame
        ``seed, statistic, control, effect``: one row per own seed; none if the claim compares pairs of seeds and there
        are fewer than three.
    place : str
        Where the own effects are among those of the kept seeds.
    """

    rows: pd.DataFrame
    values: pd.DataFrame
    place: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; numbers that do not exist are None."""
        return {"rows": to_json_rows(self.rows), "values": to_json_rows(self.values), "place": self.place}


def compare_seeds(planned: SeedPlan, data: Path = registration.FILE.parent) -> OwnSeeds:
    """Compute a claim's effect for the kept seeds, for own seeds, and for both; only kept ones have a verdict."""
    pair, registered = PAIRS[planned.claim], planned.claims.claims[planned.claim]
    arms, machine = set(registered.arms), block()
    kept = planned.kept.in_block(judging_block(registered, pair, planned.kept) or machine)
    own_evidence, own_seeds = planned.own_evidence(), []
    for seed in sorted(set(own_evidence.runs["seed"].tolist())):
        if all(own_evidence.has(arm, seed) for arm in arms):
            own_seeds.append(seed)
    kept_seeds = [seed for seed in kept.seeds(arms, registered.design.first_seed) if seed not in own_seeds]

    def estimate(evidence: Evidence, seeds: list[int]) -> tuple[int, str, pd.DataFrame]:
        if not seeds or (registered.design.interval == "jackknife" and len(seeds) < _SEEDS_OF_PAIRS):
            return len(seeds), "", pd.DataFrame(columns=["seed", "statistic", "control", "effect"])
        effect, values = estimate_claim(registered, pair, evidence, seeds)
        return len(seeds), format_effect(registered.claim, *effect.interval(ERROR)[:3]), values

    joined = _join(kept, own_evidence)
    rows = [_kept_row(planned.claim, data)]
    # The last pass is over both together, so ``values`` has all seeds after the loop.
    for name, evidence, seeds in (("yours", own_evidence, own_seeds), ("both", joined, [*kept_seeds, *own_seeds])):
        n, effect, values = estimate(evidence, seeds)
        rows.append({"seeds": name, "n": n, "effect": effect, "verdict": ""})
    is_own = values["seed"].isin(own_seeds)
    position = f"{_describe_position(values, is_own, len(kept_seeds))} Your machine: {name_machine(machine)}."
    return OwnSeeds(pd.DataFrame(rows), values[is_own], position)


def _join(kept: Evidence, own: Evidence) -> Evidence:  # names: ok
    """Return the kept runs and the own ones, which replace kept ones of the same arm and seed."""
    keys = ["arm", "seed", "role"]
    replaced = kept.runs.set_index(keys).index.isin(own.runs.set_index(keys).index)
    runs = pd.concat([kept.runs[~replaced], own.runs], ignore_index=True)
    names = kept.kept.keys() | own.kept.keys()
    tables: Mapping[str, Any] = {name: {**kept.kept.get(name, {}), **own.kept.get(name, {})} for name in names}
    rows = pd.concat([kept.rows, own.rows], ignore_index=True).drop_duplicates(["task_hash", "row"])
    return Evidence(runs, rows, {**kept.margins, **own.margins}, {**kept.nll, **own.nll}, tables)


def _kept_row(claim: str, data: Path) -> dict[str, Any]:
    file = data / "evidence" / "verdicts.csv"
    claims = registration.read(data / "registered.toml")
    if not file.exists():
        return {"seeds": "kept", "n": 0, "effect": "", "verdict": "none yet"}
    verdicts = kept_verdicts.read_file(file, claims)
    verdicts = verdicts.assign(judged=kept_verdicts.have_verdict(verdicts))
    row: dict[str, Any] = {**verdicts.set_index("claim").loc[claim]}
    effect, verdict = "", "none yet"
    if row["judged"]:
        effect, verdict = row["shown"], row["outcome"]
    return {"seeds": "kept", "n": int(row["n"]), "effect": effect, "verdict": verdict}


def _describe_position(values: pd.DataFrame, is_own: pd.Series, kept_seeds: int) -> str:
    """Return where the own effects are among those of the kept seeds, or what is missing for it."""
    missing = []
    if not kept_seeds:
        missing.append("There are no other kept seeds to compare with.")
    if not len(values):
        missing.append("No effect yet: the claim compares pairs of runs, which needs three seeds.")
    if missing:
        return " ".join(missing)
    effects = values.loc[~is_own, "effect"].to_numpy(np.float64)
    below = [f"{(effects < effect).sum()} of {len(effects)}" for effect in values.loc[is_own, "effect"]]
    return f"Kept seeds below yours: {', '.join(below)}. Their range is {effects.min():.3g} to {effects.max():.3g}."
