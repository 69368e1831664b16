"""Blocks of README and docs from planted runs: the numbers equal the verdicts, and every mark has its cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_lists import NO_FIGURES
from planted_claims import REGISTERED, plant
from verdict_tables import MIXTURE, NO_RUNS, all_blocks

from lorascope.analysis.seed_intervals import t_interval
from lorascope.papers.judging import kept_runs
from lorascope.papers.judging.kept_figures import FigureAbout, KeptFigure
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.looks import BUDGET
from lorascope.papers.judging.registration import PAPERS, Change, Deviation, Registration
from lorascope.papers.judging.verification import CHANGED, Derived, derive
from lorascope.papers.registry import PAIRS

ROOT = Path(__file__).parents[1]
CLAIM, OURS, LORA = "fourierft.parity", "FourierFT, 1536 coefficients", "LoRA, rank 8, q and v"


def planted(seeds: int = 5, effect: float = 0.0, spread: float = 0.0) -> Evidence:
    """Return runs of FourierFT and LoRA whose accuracies differ by an effect, which varies between seeds."""
    control = [0.7 + 0.01 * (seed % 2) for seed in range(seeds)]
    statistic = [value + effect + spread * (-1) ** seed for seed, value in enumerate(control)]
    found = plant(REGISTERED.claims[CLAIM], PAIRS[CLAIM], statistic, control)
    runs = found.runs.assign(
        arm_hash=[REGISTERED.arms[arm].hash for arm in found.runs["arm"]], cpu_seconds=90.0, commit="abcdef123",
        dirty=False, test_metric=[float((found.margins[run] > 0).mean()) for run in found.runs["run"]],
    )  # fmt: skip
    return with_runs(found, runs)


def with_runs(evidence: Evidence, runs: pd.DataFrame) -> Evidence:
    return Evidence(runs, evidence.rows, evidence.margins, evidence.nll, evidence.kept)


def write(evidence: Evidence, registration: Registration = REGISTERED) -> tuple[dict[str, str], Derived]:
    derived = derive(evidence, registration, PAIRS)
    return dict(all_blocks(registration, ROOT / "data", evidence, derived)), derived


def cells(block: str, first: str) -> list[str]:
    """Return the cells of the only row of a table whose first cell starts so."""
    (row,) = [line for line in block.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_verdicts_equal_those_of_the_runs() -> None:
    blocks, derived = write(planted(10, spread=0.001))
    verdict = derived.verdicts.set_index("claim").loc[CLAIM]
    assert verdict["outcome"] == "supported"
    claim, seeds, effect, bound, p, adjusted, outcome, marks = cells(blocks["verdicts"], f"`{CLAIM}`")
    assert claim == f"`{CLAIM}` {REGISTERED.claims[CLAIM].text.sentence}"
    assert (seeds, effect, bound, outcome) == ("5", f"{verdict['shown']} (99%)", "above -0.01 (accuracy)", "supported")
    assert marks == f"all seeds: {verdict['all_seeds']}"
    assert float(p) == pytest.approx(verdict["p_looks"], rel=0.05)
    assert float(adjusted) == pytest.approx(verdict["adjusted_p"], rel=0.05)
    assert cells(blocks["fourierft-verdicts"], f"`{CLAIM}`")[2:] == [seeds, effect, bound, p, adjusted, outcome, marks]
    assert cells(blocks["primary"], "[FourierFT]")[2:] == [seeds, effect, bound, p, adjusted, outcome]
    why = REGISTERED.claims[CLAIM].why
    assert cells(blocks["before"], f"`{CLAIM}`")[2:] == [
        "inconclusive", f"`{CLAIM}`, restated", effect, "supported", why
    ]  # fmt: skip


def test_estimate_over_all_seeds_is_shown_only_after_the_verdict() -> None:
    evidence = planted(7, spread=0.001)
    blocks, derived = write(evidence)
    effects = accuracies(evidence, OURS) - accuracies(evidence, LORA)
    shown = derived.verdicts.set_index("claim")["all_seeds"][CLAIM]
    assert shown.startswith(f"{effects.mean():#.3g} [")
    assert shown.endswith("], 7 seeds")
    assert "all seeds" not in write(planted(5, spread=0.001))[0]["verdicts"]
    assert "all seeds" not in write(planted(7, -0.01, 0.02))[0]["verdicts"]  # more seeds to train
    assert "all seeds" not in blocks["primary"]


def test_all_seeds_are_those_whose_files_are_kept() -> None:
    evidence = planted(8, spread=0.001)
    lost = evidence.runs.loc[evidence.runs["seed"] == 106, "run"]
    margins = {run: margin for run, margin in evidence.margins.items() if run not in set(lost)}
    _, derived = write(Evidence(evidence.runs, evidence.rows, margins, evidence.nll))
    assert derived.verdicts.set_index("claim")["all_seeds"][CLAIM].endswith("], 6 seeds")


def test_open_claims_are_stopped_by_the_budget_when_it_is_used() -> None:
    evidence = planted(3)
    of_run = 60 * BUDGET / len(evidence.runs)
    for seconds, marks in ((0.99 * of_run, ("more seeds to train", "")), (of_run, ("stopped by the budget",) * 2)):
        blocks, _ = write(with_runs(evidence, evidence.runs.assign(cpu_seconds=seconds)))
        assert tuple(cells(blocks["verdicts"], f"`{id}`")[-1] for id in (CLAIM, "lora.parity")) == marks


def accuracies(evidence: Evidence, arm: str) -> np.ndarray:
    return evidence.runs.loc[evidence.runs["arm"] == arm, "test_metric"].to_numpy(np.float64)


def test_tables_have_every_claim_once_primary_first() -> None:
    blocks, _ = write(kept_runs.read_kept(Path("no folder")))
    listed = re.findall(r"^\| `([\w.]+)`", blocks["verdicts"], re.MULTILINE)
    assert listed == [*REGISTERED.of_tier("primary"), *REGISTERED.of_tier("secondary")]
    of_papers = [re.findall(r"^\| `([\w.]+)`", blocks[f"{name.lower()}-verdicts"], re.MULTILINE) for name in PAPERS]
    assert sorted(id for ids in of_papers for id in ids) == sorted(listed)
    links = re.findall(r"^\| \[\w+\]\(([^)]+)\)", blocks["primary"], re.MULTILINE)
    assert len(links) == 9
    assert all((ROOT / link).exists() for link in links)
    for name in ("verdicts", "primary", "arms", "budget", "fourierft-verdicts"):
        assert "no runs are kept yet." in blocks[name].lower()


def other_machine(evidence: Evidence) -> Evidence:
    other = planted(5, effect=-0.2)
    runs = other.runs.assign(run="other " + other.runs["run"], capability="AVX512")
    margins = {f"other {run}": margin for run, margin in other.margins.items()}
    nll = {f"other {run}": values for run, values in other.nll.items()}
    merged = evidence.margins | margins, evidence.nll | nll
    return Evidence(pd.concat([evidence.runs, runs], ignore_index=True), evidence.rows, *merged)


def tuned(evidence: Evidence) -> Evidence:
    """Add tuning runs of LoRA in which the highest rate is the best, after both further rates."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    rows = [
        evidence.runs.iloc[0].to_dict()
        | {"run": f"tuned-{rate}-{seed}", "arm": LORA, "role": "tuning", "seed": seed, "rate": rate}
        | {"validation_loss": -rate}
        for rate in rates for seed in (9001, 9002)
    ]  # fmt: skip
    return with_runs(evidence, pd.concat([evidence.runs, pd.DataFrame(rows)], ignore_index=True))


def at(arm: str, **values: Any) -> Callable[[Evidence], Evidence]:
    """Change columns of the runs of an arm."""

    def change(evidence: Evidence) -> Evidence:
        runs = evidence.runs.copy()
        runs.loc[runs["arm"] == arm, list(values)] = list(values.values())
        return with_runs(evidence, runs)

    return change


CASES: dict[str, tuple[Evidence, Callable[[Evidence], Evidence], tuple[str, str, str]]] = {
    "void": (planted(), at(LORA, validation_metric=0.5), ("", "void", f"{LORA} did not train: chance level")),
    "interrupted": (planted(3), lambda found: found, ("3 of 5", "not judged", "more seeds to train")),
    "undecided": (planted(7, -0.01, 0.02), lambda found: found, ("5", "inconclusive", "more seeds to train")),
    "changed": (planted(), at(OURS, arm_hash="sha256:other"), ("5 of 5", "inconclusive", CHANGED)),
    "machine": (planted(), other_machine, ("5", "supported", "depends on the machine")),
    "end of the grid": (planted(), tuned, ("5", "supported", f"best learning rate at the end of the grid: {LORA}")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_marks_have_their_cause(name: str) -> None:
    evidence, change, (seeds, outcome, mark) = CASES[name]
    blocks, derived = write(change(evidence))
    _, shown, effect, _, p, _, found, marks = cells(blocks["verdicts"], f"`{CLAIM}`")
    assert (shown, found, marks) == (seeds, outcome, mark)
    assert (effect == "") == (p == "") == (name in ("void", "interrupted", "changed"))
    verdict = "; ".join((outcome, mark))
    assert cells(blocks["primary"], "[FourierFT]")[-1] == verdict
    if name == "machine":
        row = cells(blocks["fourierft-verdicts"].partition("Other machines:")[2], CLAIM)
        assert (row[1], row[2], row[4]) == ("AVX512 / 2.6.0 / 1 / cpu", "5", "not supported")
        assert cells(blocks["arms"], f"{LORA}, machine 2")[2] == "5"
        assert derived.machines["differs"].tolist() == [True]


def test_registered_change_of_an_arm_is_marked_with_its_reason() -> None:
    change = Change("another schedule", "planted", "nothing", "2026-12-01", arms={
        OURS: (REGISTERED.arms[OURS].hash, "sha256:other"),
    })  # fmt: skip
    registration = replace(REGISTERED, deviations=(*REGISTERED.deviations, Deviation(CLAIM, change)))
    blocks, _ = write(at(OURS, arm_hash="sha256:other")(planted()), registration)
    *_, outcome, marks = cells(blocks["verdicts"], f"`{CLAIM}`")
    number = marks.removeprefix("deviated; D")
    assert outcome == "supported"
    note = f"- D{number} (2026-12-01): another schedule. Reason: planted. Seen before: nothing."
    assert all(note in blocks[name].splitlines() for name in ("verdicts", "fourierft-verdicts"))
    assert note not in blocks["lisa-verdicts"]


def test_arms_have_the_mean_and_interval_of_their_seeds() -> None:
    evidence = planted(5, spread=0.01)
    evidence.runs["trained_parameters"] = 898 + evidence.runs["seed"]
    blocks, _ = write(evidence)
    mean, low, high, _ = t_interval(100 * accuracies(evidence, OURS))
    row = [OURS, "0.001", "5", "1,000", f"{mean:.1f} ± {(high - low) / 2:.1f}", "0.4000 ± 0.0000"]
    assert cells(blocks["arms"], f"{OURS} |") == row
    assert blocks["arms"].strip().count("\n") == 3  # two rows below the header


def test_arm_with_a_diverged_run_has_no_mean_loss() -> None:
    evidence = planted(5)
    runs = evidence.runs.copy()
    runs.loc[runs["arm"] == OURS, "test_loss"] = [0.4, np.inf, np.inf, 0.4, 0.4]
    arm = cells(write(with_runs(evidence, runs))[0]["arms"], f"{OURS} |")
    assert arm[2] == "5"
    assert arm[5] == ""


def test_costs_and_missing_looks_are_stated() -> None:
    blocks, _ = write(planted(5))
    lines = blocks["budget"].strip().splitlines()
    assert lines[0] == (
        "- Registration: 2026-11-27, tag `registered-1`; 88 claims on runs, 7 on published numbers, 112 arms. "
        "Judged so far: 1 of 88 claims (1 supported)."
    )
    assert lines[1:4] == [
        "- Runs: 10 (10 judged), 15 CPU-minutes.",
        "- Machines (instruction set / torch / threads / device): AVX2 / 2.6.0 / 1 / cpu (10 runs).",
        "- Commits: `abcdef1` (10 runs).",
    ]
    assert lines[4].startswith("- Look 1 is missing for 87 claims: `lora.parity`, ")
    assert len(lines) == 5
    undecided, _ = write(planted(7, -0.01, 0.02))
    assert undecided["budget"].strip().splitlines()[-1] == f"- Look 2 is missing for 1 claim: `{CLAIM}`."


def test_readme_says_how_far_the_evidence_is() -> None:
    blocks, _ = write(planted(7, -0.01, 0.02))
    assert (
        "Judged so far: 1 of 88 claims (1 inconclusive). Runs so far: 21 CPU-minutes of at most 2,400. "
        "Look 1 is missing for 87 claims. Look 2 is missing for 1 claim. [Details](docs/evidence.md#cost-and-state)"
    ) in blocks["primary"]


def test_accuracy_on_the_mixture_is_that_of_each_task() -> None:
    rows = pd.DataFrame({
        "task_hash": "mixed", "row": [3, 2, 1, 0], "text": "", "cluster": "",
        "label": ["b", "a", "yes", "yes"], "group": ["order", "order", "domain", "domain"],
    })  # fmt: skip
    one = planted(2)
    runs = one.runs.assign(task=MIXTURE, task_hash="mixed")[one.runs["arm"] == OURS]
    margins = dict(zip(runs["run"], np.array([[1, -1, 1, 1], [1, -1, 1, -1]], np.int8), strict=True))
    table = write(Evidence(runs, rows, margins))[0]["mixture"].strip().splitlines()
    assert table[0] == "| arm | seeds | domain (%) | order (%) |"
    assert table[2] == "| most frequent class of the task |  | 100.0 | 50.0 |"
    mean, low, high, _ = t_interval(np.array([100.0, 50.0]))
    assert table[3:] == [f"| {OURS} | 2 | 50.0 ± 0.0 | {mean:.1f} ± {(high - low) / 2:.1f} |"]
    assert write(one)[0]["mixture"].strip() == NO_RUNS


def test_nouns_agree_with_their_number_in_the_costs() -> None:
    one = planted(5)
    lines = write(with_runs(one, one.runs.head(1).assign(cpu_seconds=60.0)))[0]["budget"].strip().splitlines()
    assert lines[1] == "- Runs: 1 (1 judged), 1 CPU-minute."
    assert lines[2].endswith(" (1 run).")
    assert lines[3] == "- Commits: `abcdef1` (1 run)."


def test_every_earlier_claim_has_its_successor_or_was_dropped() -> None:
    blocks, _ = write(kept_runs.read_kept(Path("no folder")))
    rows = [line.split(" | ") for line in blocks["before"].strip().splitlines()[2:]]
    dropped = {re.match(r"\| `([\w.]+)`", row[0])[1] for row in rows if row[3] == "dropped"}  # type: ignore[index]
    assert dropped == {
        "agreement.alora", "hydralora.apart", "asymmetry.raw", "adapprox.above_one", "adapprox.held",
    }  # fmt: skip
    earlier = {id for claim in REGISTERED.claims.values() for id in claim.earlier}
    assert len(rows) == len(earlier) + len(dropped) == 75
    reasons = {re.match(r"\| `([\w.]+)`", row[0])[1]: row[-1].removesuffix(" |") for row in rows}  # type: ignore[index]
    assert all(reasons.values())
    assert reasons["asymmetry.space"] == "nothing but the seeds"
    assert reasons["asymmetry.raw"] == (
        "the A's start random and the B's at zero, so their similarities cannot be compared"
    )


def test_kept_figures_are_listed_by_paper() -> None:
    known = {
        name: KeptFigure(FigureAbout(heading, f"alt of {name}", ("run",), "c" * 40), "0" * 64)
        for heading, name in (("Planted ranks", "planted"), ("NeFT", "neurons"), ("LoRA", "new"), ("LoRA", "spectrum"))
    }
    blocks, _ = write(replace(planted(), figures=known))
    lines = blocks["figures"].split()
    assert [lines.index(name) for name in ("LoRA", "NeFT", "Planted")] == sorted(
        lines.index(name) for name in ("LoRA", "NeFT", "Planted")
    )
    assert (
        "### LoRA\n\n![alt of new](../figures/new.png)\n\n![alt of spectrum](../figures/spectrum.png)\n"
        in (blocks["figures"])
    )
    assert blocks["lora-figures"].count("](../../figures/") == 2
    for name in ("adalora", "autolora", "alora"):  # which the planted ranks compare
        assert blocks[f"{name}-figures"].strip() == "![alt of planted](../../figures/planted.png)"
    assert blocks["lisa-figures"].strip() == NO_FIGURES
