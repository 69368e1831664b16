"""Blocks of README and docs that follow from the second edition of the study: sentences, results, what was learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from page_blocks import format_table

from lorascope.files.printable import count_phrase
from lorascope.papers.figures.first_edition import stored_figures
from lorascope.papers.judging import beliefs, first_edition, kept_study, registered_study
from lorascope.papers.judging.beliefs import format_with_interval, shown_word
from lorascope.papers.judging.first_edition import format_estimate
from lorascope.papers.judging.registered_study import StudyClaim
from lorascope.papers.judging.study_statistics import GapClosed, LogLoss, are_learned, effect_interval
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED, NOT_RUN, has_headroom
from lorascope.papers.study_figures import ALL_METHODS, ALLOCATORS, ROWS, VARIANTS

_HYDRA = "HydraLoRA, 4 experts of rank 4"
PARTS = {
    "LoRA": [("LoRA, rank 16", "full fine-tuning")],
    "LISA": [("LISA, 2 of 8 blocks", "full fine-tuning")],
    "AdaLoRA": [("AdaLoRA, rank 4 to 2", "AdaLoRA, rank 2 to 2"), ("AdaLoRA, rank 4 to 2", "LoRA, rank 6")],
    "HydraLoRA": [(_HYDRA, f"{_HYDRA}, uniform gates"), (_HYDRA, "HydraLoRA, separate A's of rank 4")],
    "Adapprox": [("Adapprox", "Adapprox, no clipping"), ("Adapprox", "Adapprox, rank 1")],
}
"""Methods and controls whose difference is shown without a claim, at each truth that both learn."""
_ALLOCATORS = ("AdaLoRA", "AutoLoRA", "ALoRA")
_OF_SEVERAL = {ALLOCATORS: _ALLOCATORS, "Importance scores": _ALLOCATORS}
"""Headings of figures that compare several methods -> these methods."""
MOTIVES = {"norms": "LISA's motive: norms by layer", "factors": "HydraLoRA's motive: A against B"}
NO_FIGURES = "No other figure is drawn yet."
CHANGES = {
    "LoRA": ("inconclusive", "more seeds, and 8,852 test rows instead of 3,852; a truth that needs rank 24"),
    "LISA": ("inconclusive", "a teacher that all arms learn instead of a decoder that reads 320 examples"),
    "AdaLoRA": (
        "inconclusive",
        "ranks that differ by construction, because on text rank 64 gains 0.2 points over rank 8",
    ),
    "AutoLoRA": ("void", "a search that is scored like the retraining, because on text it stayed at chance level"),
    "ALoRA": ("inconclusive", "rounds that start after learning; on text one seed of five collapsed"),
    "HydraLoRA": ("void", "four tasks that every arm must learn, because on text three of four were not learned"),
    "FourierFT": ("inconclusive", "coefficients at the entries that FourierFT trains, and at others"),
    "NeFT": ("not supported", "neurons that must change by construction; the verdict on text stays"),
    "Adapprox": ("inconclusive", "second moments of known rank; no loss is printed, so 0.02 nats was arbitrary"),
}
"""Verdict of edition 1 on the paper's main claim, and what edition 2 does about its cause."""
PAPER_FIGURES = "paper-figures.csv"
_ORDER = ("as claimed", "not only there", "not even there", "gain", "gain below m", "no gain", "loss", "no cost",
          "cost below d", "cost", "open", NO_HEADROOM, NOT_LEARNED, NOT_RUN)  # fmt: skip
_UNITS = {
    "points of accuracy": " acc.", "points of the gap": "", "points of neurons": " neurons",
    "points of factors": " factors", "percent of the loss": "%", "log10 of the ratio of norms": " log10",
}  # fmt: skip
_MACHINE = ["processor", "capability", "torch", "threads", "device"]
# Arms that differ only in this are one row.
_ALIKE = {
    r"task \d+ only": "one task only",
    r"task \d+, ": "one task, ",
    r"(tweets|movies|products), order \d": "one domain",
    r"third \d, order \d": "a random third",
}


def find_states(root: Path) -> pd.DataFrame:
    """Return the figures of the papers, with their states from the images of a clone."""
    table = pd.read_csv(root / "data" / PAPER_FIGURES, dtype=str, keep_default_na=False)
    images = {file.stem for file in (root / "figures").glob("*.png")}
    is_drawn = table["image"].map(lambda names: not images.isdisjoint(names.split()))
    is_planned = table["state"].isin(["done", "runs open"])
    table["state"] = table["state"].mask(is_planned & is_drawn, "done").mask(is_planned & ~is_drawn, "runs open")
    return table


def study_blocks(root: Path) -> dict[str, str]:
    """Return the text of every block by name, from a clone."""
    study = StudyPages(root)
    blocks = {
        "index-figure": study.first_screen("../"),
        "findings-figure": study.first_screen("../"),
        "headline": "\n\n".join([study.first_screen(""), study.headline("docs/papers/")]),
        "beliefs": study.headline("papers/"),
        "counts": study.counts(),
        "study-figures": study.figure_blocks(ALL_METHODS, "study", "../")["study-figures"],
        "results": study.claims(study.registration.claims.values()),
        "changes": study.changes(),
        "state": study.state(),
        "paper-figures": study.paper_figures(),
    }
    for belief in study.beliefs:
        claims = [claim for claim in study.registration.claims.values() if claim.paper.arxiv == belief.arxiv]
        name = belief.paper.lower()
        blocks[f"{name}-belief"] = f"**We now believe:** {belief.sentence}"
        blocks[f"{name}-claims"] = "\n\n".join([study.claims(claims), *study.parts(belief.paper, claims)])
        blocks[f"{name}-learned"] = study.learned(claims)
        blocks[f"{name}-edition-1"] = study.first_edition(belief.arxiv)
        blocks |= study.figure_blocks(belief.paper, name, "../../")
    return blocks


class StudyPages:
    """Tables of the second edition as Markdown, from a clone."""

    def __init__(self, root: Path) -> None:
        self.data = data = root / "data"
        self.images = root / "figures"
        folder = data / "evidence-2"
        self.registration = registered_study.read(data / "registered-2.toml")
        self.beliefs = beliefs.read_beliefs(folder)
        self.evidence = kept_study.read(folder)
        self.results = beliefs.read_results(folder)
        self.by_claim: dict[Any, Any] = self.results.set_index("claim").to_dict("index")
        self.edition_1 = data / "edition-1"
        self.earlier = first_edition.text_estimates(self.edition_1)
        # The first one is at the top of a page.
        figures: dict[str, Any] = {row.name: row for row in ROWS}
        figures |= stored_figures(self.edition_1 / "figures") | VARIANTS
        self.figures = {name: figure for name, figure in figures.items() if self.is_drawn(name)}

    def image(self, name: str, root: str) -> str:
        """Return a figure for a page from which the clone is at ``root``; "" if it is not drawn."""
        return f"![{self.figures[name].alt}]({root}figures/{name}.png)" if name in self.figures else ""

    def figure_blocks(self, heading: str, name: str, root: str) -> dict[str, str]:
        """Return the first figure under a heading, and the others, for a page from which the clone is at ``root``."""
        headings = {heading, *(several for several, methods in _OF_SEVERAL.items() if heading in methods)}
        lines = [self.image(file, root) for file, figure in self.figures.items() if figure.heading in headings]
        return {f"{name}-figure": "\n".join(lines[:1]), f"{name}-figures": " ".join(lines[1:]) or NO_FIGURES}

    def paper_figures(self) -> str:
        """Return the figures and tables of each paper, what draws them, and the reasons for the others."""
        table = find_states(self.data.parent)
        counts = Counter(table["state"])
        sections = [
            f"{len(table)} items: {counts['done']} are drawn with the same quantity and axes, {counts['runs open']} "
            f"wait for runs, {counts['claim']} are claims on another ground, and {counts['missing']} are missing."
        ]
        for (paper, arxiv), items in table.groupby(["paper", "arxiv"], sort=False):
            rows = []
            for _, _, item, shows, functions, names, state, note in items.to_numpy():
                code = ", ".join(f"`{name}`" for name in functions.split())
                links = [f"[{name}](../figures/{name}.png)" for name in names.split() if self.is_drawn(name)]
                rows.append((item, shows, state, code, ", ".join(links), note))
            header = ("item", "shows", "state", "`ls.plots`", "image", "departure or reason")
            heading = f"## {paper}: [arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"
            sections += [heading, format_table(header, rows)]
        return "\n\n".join(sections)

    def is_drawn(self, name: str) -> bool:
        """Return whether the folder of figures has an image."""
        return (self.images / f"{name}.png").exists()

    def first_screen(self, root: str) -> str:
        """Return the forest plot, or another figure until it is drawn, and the two motives: first in the README."""
        images = [self.image("forest", root) or self.image("update-norm-heat", root)]
        motives = [self.image(name, root) for name in MOTIVES]
        # The README is wide enough for both.
        if not root and any(motives):
            images.insert(0, format_table(list(MOTIVES.values()), [motives]))
            motives = []
        return "\n\n".join(filter(None, images + motives))

    def headline(self, pages: str) -> str:
        """Return the table of nine rows, with links to the pages of the papers."""
        table = beliefs.headline_table(self.beliefs, self.registration, self.results, self.earlier)
        table["paper"] = [f"[{paper}]({pages}{paper.lower()}.md)" for paper in table["paper"]]
        header = ("paper", "printed", "on text [95%]", "truth for / against", "what we now believe")
        return format_table(header, table.itertuples(index=False))

    def counts(self) -> str:
        """Return how many pairs and other claims have each word."""
        lines = []
        for name, is_pair in (("pairs of planted teachers", True), ("other claims", False)):
            results = [row for id, row in self.by_claim.items() if id.startswith("pair.") == is_pair]
            words = Counter(map(shown_word, results))
            counted = (f"{words[word]} {word}" for word in _ORDER if words[word])
            lines.append(f"- {len(results)} {name}: {', '.join(counted)}")
        return "\n".join(lines)

    def claims(self, claims: Iterable[StudyClaim]) -> str:
        """Return the table of claims."""
        rows = []
        for claim in claims:
            result, unit = self.by_claim[claim.id], claim.rule.unit
            printed = claim.paper.printed
            if isinstance(printed, float):
                printed = f"{printed:+g}{_UNITS[claim.paper.printed_unit]}"
            arms = (*claim.for_arms, *claim.against_arms)
            finished = min(claim.rule.seeds, *(len(self.evidence.seeds(arm)) for arm in arms))
            word = shown_word(result)
            if word == NOT_LEARNED:
                word = f"{word}: {result['note']}"
            # Nothing can be read off the effect of an arm that did not learn.
            numbers = [""] * 5
            if result["word"] != NOT_LEARNED:
                numbers = [format_with_interval(result, unit, prefix) for prefix in ("", "against_", "difference_")]
                numbers += [result["excludes_zero"], result["excludes_printed"]]
            bound = f"{claim.rule.kind} {claim.rule.bound:g}{_UNITS[unit]}"
            rows.append((
                f"`{claim.id}` {claim.sentence}", printed or "", bound, *numbers, word,
                f"{finished} of {claim.rule.seeds}",
            ))  # fmt: skip
        return format_table(
            ("claim", "printed", "bound", "effect [95%]", "other truth", "difference", "excludes 0",
             "excludes the printed gain", "word", "seeds"), rows,
        )  # fmt: skip

    def parts(self, paper: str, claims: Sequence[StudyClaim]) -> Iterator[str]:
        """Yield the table of effects without a claim, once they have runs."""
        statistic, unit = (GapClosed, "") if paper != "Adapprox" else (LogLoss, "percent of the loss")
        pairs = [claim for claim in claims if claim.against_arms]
        labels = [label for claim in pairs for label in (claim.for_arms[0], claim.against_arms[0])]
        rows = []
        for method, control in PARTS.get(paper, []):
            for truth in dict.fromkeys(label.rpartition(", ")[2] for label in labels):
                arms = [f"{method}, {truth}", f"{control}, {truth}"]
                if not all(map(self._is_finished, arms)):
                    continue
                # Arms without a claim have fewer seeds.
                seeds = sorted({*self.evidence.seeds(arms[0])}.intersection(self.evidence.seeds(arms[1])))
                difference = statistic(arms[0]) - statistic(arms[1])
                mean, low, high, n = effect_interval(difference(self.evidence, seeds))
                interval = format_with_interval({"effect": mean, "low": low, "high": high}, unit)
                rows.append((f"{method} minus {control}", truth, interval, n))
        if rows:
            yield "Parts of the method, without a claim:"
            yield format_table(("effect", "truth", "mean [95%]", "seeds"), rows)

    def _is_finished(self, arm: str) -> bool:
        """Return whether an arm has all its seeds: as for a claim, no effect is computed before the last one."""
        return arm in self.registration.arms and len(self.evidence.seeds(arm)) >= self.registration.arms[arm].seeds > 0

    def learned(self, claims: Sequence[StudyClaim]) -> str:
        """Return the tables of headroom, and of the points that the arms of the claims closed in every phase."""
        controls, labels = [], set()
        for claim in claims:
            result = self.by_claim[claim.id]
            if result["word"] == NOT_RUN:
                continue
            labels |= {*claim.for_arms, *claim.against_arms, *claim.control_arms}
            if interval := format_with_interval(result, claim.rule.unit, "positive_"):
                low, high = result["positive_low"], result["positive_high"]
                is_there = "yes" if has_headroom(claim.rule.kind, low, high) else "no"
                control = claim.control_arms[0]
                for pattern, name in _ALIKE.items():
                    control = re.sub(pattern, name, control)
                controls.append((f"`{claim.id}`", control, interval, is_there))
        parts = []
        if controls:
            parts += [format_table(("claim", "positive control", "effect [95%]", "headroom"), controls)]
        if rows := list(self._learned_rows(labels)):
            parts += [format_table(("arm", "phase", "runs", "learned", "mean closed", "lowest"), rows)]
        return "\n\n".join(parts) or "No claim has all its runs yet."

    def _learned_rows(self, labels: set[str]) -> Iterator[tuple[object, ...]]:
        runs = self.evidence.runs
        runs = runs[runs["arm"].isin(labels) & (runs["role"] == "judged")]
        # Higher is better in all of them.
        values = [
            100 * (1 - runs["gap"] / runs["base_gap"]), 100 * (runs["accuracy"] - runs["majority"]),
            100 * (1 - runs["loss"] / runs["first_loss"]),
        ]  # fmt: skip
        value = values[0].fillna(values[1]).fillna(values[2])
        alike = runs["arm"].replace(_ALIKE, regex=True)
        runs = runs.assign(value=value, learned=are_learned(runs), alike=alike, phase=runs["phase"].replace("", "end"))
        order = {label: number for number, label in enumerate(self.registration.arms)}
        runs = runs.sort_values("arm", key=lambda arms: arms.map(order), kind="stable")
        for (arm, phase), rows in runs.groupby(["alike", "phase"], sort=False):
            lowest = rows.loc[rows["value"].idxmin()]
            source = ", ".join(filter(None, (lowest["task"], f"seed {lowest['seed']}")))
            learned = "all" if rows["learned"].all() else f"{rows['learned'].sum()} of {len(rows)}"
            yield (
                arm,
                phase,
                rows["run"].nunique(),
                learned,
                f"{rows['value'].mean():.1f}",
                f"{lowest['value']:.1f} ({source})",
            )

    def changes(self) -> str:
        """Return what changed for each paper between the editions, and why."""
        rows = []
        for belief in self.beliefs:
            verdict, reason = CHANGES[belief.paper]
            claims = beliefs.headline_claims(self.registration, belief.arxiv)
            words = "; ".join(f"`{claim.id}`: {shown_word(self.by_claim[claim.id])}" for claim in claims)
            rows.append((belief.paper, verdict, words, reason))
        return format_table(("paper", "edition 1", "edition 2", "what changed"), rows)

    def first_edition(self, arxiv: str) -> str:
        """Return the verdicts and estimates of edition 1 on a paper, folded."""
        claims = first_edition.read_claims(self.edition_1 / "registered.toml")
        verdicts = pd.read_csv(self.edition_1 / first_edition.VERDICTS)
        estimates = first_edition.read_estimates(self.edition_1)
        rows, unlearned = [], 0
        for row in pd.concat([verdicts, estimates]).fillna({"reason": ""}).to_dict("records"):
            claim = claims[row["claim"]]
            if claim.arxiv != arxiv:
                continue
            # Nothing can be read off the estimate of an arm that did not learn.
            if not row["seeds"] or row["reason"] == NOT_LEARNED:
                unlearned += 1
                continue
            effect = format_estimate(claim, row["effect"], row["low"], row["high"])
            outcome = f"none: {row['reason']}" if row["reason"] else row["outcome"]
            rows.append((f"`{claim.id}` {claim.sentence}", effect, claim.unit, outcome))
        summary = f"Edition 1: {count_phrase(len(rows), 'result')}"
        if unlearned:
            summary += f", and {count_phrase(unlearned, 'claim')} not run or not learned"
        if not rows:
            return f"{summary}."
        table = format_table(("claim", "effect", "unit", "verdict"), rows)
        return f"<details>\n<summary>{summary}</summary>\n\n{table}\n\n</details>"

    def state(self) -> str:
        """Return what is registered and what was run, with commits and machines, and the deviations."""
        runs = self.evidence.runs.drop_duplicates("run")
        minutes = count_phrase(round(runs["cpu_seconds"].sum() / 60), "CPU-minute")
        roles = ", ".join(f"{number:,} {role}" for role, number in runs["role"].value_counts().items())
        machines = sorted({" / ".join(row) for row in runs[_MACHINE].astype(str).itertuples(index=False)})
        commits = ", ".join(f"`{commit[:7]}`" for commit in runs["commit"].unique() if commit)
        claims = self.registration.claims.values()
        of_claims = {label for claim in claims for labels in claim.labels().values() for label in labels}
        lines = [
            f"- Registered: {count_phrase(len(claims), 'claim')} on {count_phrase(len(of_claims), 'arm')}, and "
            f"{len(self.registration.arms) - len(of_claims)} arms for figures.",
            f"- Runs: {count_phrase(len(runs), 'run')} ({roles}), {minutes}.",
            f"- Machines (processor / instructions / torch / threads / device): {'; '.join(machines)}.",
            f"- Commits: {commits}.",
        ]
        for deviation in self.registration.deviations:
            ids = ", ".join(f"`{id}`" for id in deviation.claims)
            lines.append(f"- Deviation ({ids}): {deviation.change}. Reason: {deviation.reason}.")
        return "\n".join(lines)
