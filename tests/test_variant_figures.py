"""Figures of variants, drawn from made-up kept tables: their numbers, and None without runs."""

from __future__ import annotations

import re
import zlib
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn_figures import figure_faults
from scipy.stats import kendalltau, t

from lorascope.analysis.planted_ranks import chance_agreement
from lorascope.charts.chart import Drawable
from lorascope.charts.marks import Bar, Heat, Line, Point, Rule, Text
from lorascope.papers import (
    course_figures,
    direction_figures,
    hydralora_factors,
    registry,
    variant_figures,
    variants,
)
from lorascope.papers.figures.variant_gaps import variant_gap_table
from lorascope.papers.judging import kept_study
from lorascope.papers.judging import truth_names as names
from lorascope.papers.judging.data_folder import DATA
from lorascope.papers.judging.kept_study import STUDY_COLUMNS, StudyEvidence
from lorascope.papers.judging.registered_study import STUDY_FILE
from lorascope.papers.setups import planted_teacher
from lorascope.papers.study_figures import ROWS, VARIANTS
from lorascope.schema import module_table

FIGURES = variant_figures.STUDY_FIGURES | course_figures.STUDY_FIGURES | direction_figures.STUDY_FIGURES
EMPTY = StudyEvidence(pd.DataFrame(columns=list(STUDY_COLUMNS)))
SEEDS = (200, 201, 202)
UNEVEN, FEW = names.UNEVEN, names.FEW_NEURONS


def closed(arm: str, seed: int) -> float:
    """Return the made-up gap that a run closes, in points."""
    return 40 + zlib.crc32(arm.encode()) % 4000 / 100 + (seed - 201)


def made_up() -> StudyEvidence:
    """Return evidence of all arms, with the kept tables that the figures read."""
    rows: list[dict[str, Any]] = []
    tables: dict[str, list[pd.DataFrame]] = {}
    labels = [arm.label for arm in registry.study_arms()]
    kept = {
        name: {label for arms, _ in of_name for label in arms[-1:]} for name, of_name in registry.KEPT_TABLES.items()
    }
    for label in labels:
        for seed in SEEDS:
            run = f"{zlib.crc32(label.encode())}-{seed}"
            key = {"arm": label, "seed": seed, "run": run}
            rng = np.random.default_rng(zlib.crc32(run.encode()))
            tasks = [""] if names.SHARED_A not in label else ["task 1", "task 2"]
            for task in tasks:
                rows.append(
                    key | {"role": "judged", "phase": "", "task": task, "base_gap": 1.0, "cpu_seconds": 8.0,
                           "gap": 1 - closed(label, seed) / 100, "loss": 2.0, "first_loss": 9.0}
                )  # fmt: skip
            steps = np.arange(1, 401)
            loss = 3 + np.exp(-steps / 80) + 0.2 * rng.random(400)
            of_run = {"losses": pd.DataFrame({"phase": "", "step": steps, "loss": loss})}
            for name, arms in kept.items():
                if label in arms and name in TABLES:
                    of_run[name] = TABLES[name](label, rng)
            for name, table in of_run.items():
                tables.setdefault(name, []).append(pd.DataFrame(key, index=table.index).join(table))
    runs = pd.DataFrame(rows).reindex(columns=list(STUDY_COLUMNS))
    return StudyEvidence(runs, {name: pd.concat(pieces, ignore_index=True) for name, pieces in tables.items()})


MODULES = module_table.describe(planted_teacher.student())
LINEAR = list(MODULES.loc[MODULES["role"].isin(list(variants.TYPES)), "module"])


def ranks(label: str, rng: Any) -> pd.DataFrame:
    teacher = int("teacher 2" in label)
    planted = np.resize([0, 1, 3, 4], len(LINEAR)) if not teacher else np.resize([4, 3, 1, 0], len(LINEAR))
    return pd.DataFrame(
        {"module": LINEAR, "planted": planted, "rank": np.clip(planted + rng.integers(-1, 2, 28), 0, 4)}
    )


def validation(label: str, rng: Any) -> pd.DataFrame:
    steps = np.arange(0, 401, 20)
    return pd.DataFrame({"step": steps, "loss": 3.2 + np.exp(-steps / 60) + 0.05 * rng.random(21)})


END_DISTANCES = {"o": 0.01, "ffn_out": 0.04}  # with the penalty


def penalties(label: str, rng: Any) -> pd.DataFrame:
    tables = []
    for role in ("o", "ffn_out"):
        for factor in "PQ":
            steps = np.arange(0, 400, 4)
            value = (4 if "no penalty" in label else END_DISTANCES[role]) + 4 * np.exp(-steps / 30)
            tables.append(pd.DataFrame({"role": role, "factor": factor, "step": steps, "value": value}))
    return pd.concat(tables, ignore_index=True)


def utilization(label: str, rng: Any) -> pd.DataFrame:
    tables = []
    noise = 0.3 if "reversed" in label else 0.1
    for role in ("ffn_in", "ffn_out"):
        for block in range(4):
            base = np.random.default_rng(block).random(96)
            table = pd.DataFrame({"module": f"{block}.{role}", "role": role, "neuron": np.arange(96)})
            tables.append(table.assign(value=base + noise * rng.random(96), trained=np.arange(96) < 9))
    return pd.concat(tables, ignore_index=True)


def overlaps(label: str, rng: Any) -> pd.DataFrame:
    tables = []
    for pair, layers in variants.SHOWN_LAYERS.items():
        for layer in layers:
            for role in "qv":
                i, j = np.meshgrid(np.arange(1, 9 if "8" in pair else 65), np.arange(1, 65), indexing="ij")
                phi = np.maximum(i, j) / 384 + (0.2 + 0.1 * (layer == 5)) / (i * j) ** 0.5
                cells = pd.DataFrame({"i": i.ravel(), "j": j.ravel(), "phi": phi.ravel()})
                tables.append(cells.assign(pair=pair, layer=layer, role=role))
    return pd.concat(tables, ignore_index=True)


def weight_overlaps(label: str, rng: Any) -> pd.DataFrame:
    rank = 64 if "64" in label else 8
    i, j = np.meshgrid(np.array(variants.W_DIRECTIONS), np.arange(1, rank + 1), indexing="ij")
    phi = np.maximum(i, j) / 384 + (0.03 if rank == 64 else -0.02)
    return pd.DataFrame({"i": i.ravel(), "j": j.ravel(), "phi": phi.ravel()})


def amplification(label: str, rng: Any) -> pd.DataFrame:
    layers = pd.DataFrame({"layer": np.repeat(np.arange(6), 2), "role": ["q", "v"] * 6})
    update = 1.2 if "64" in label else 2.0
    return layers.assign(update=update, weight=60.0, along_update=0.5, along_weight=20.0, along_random=0.1)


def moments(label: str, rng: Any) -> pd.DataFrame:
    tables = []
    index = np.array([1, 2, 4, 8, 16, 32])
    if label == variants.MOMENTS:
        for layer in range(3):
            for quantity in ("moment_sigma", "moment_sigma_dealt", "moment_error", "moment_error_dealt",
                             "moment_error_s_rsi", *direction_figures._TIMES):  # fmt: skip
                value = np.exp(-index / 9) + 0.05 * ("dealt" in quantity)
                tables.append(pd.DataFrame({"quantity": quantity, "layer": layer, "role": "", "step": 100,
                                            "index": index, "value": value}))  # fmt: skip
            tables.append(pd.DataFrame({"quantity": ["moment_error_rank_one"], "layer": layer, "role": "", "step": 100,
                                        "index": np.nan, "value": 0.5}))  # fmt: skip
    else:
        steps = np.arange(0, 101, 10)
        for quantity in ("factor_rank", "factor_error", "factor_drift", "factor_drift_least", "factor_drift_rank_one"):
            for role in ("q", "ffn_in"):
                value = 0.1 + steps / 100 + (quantity == "factor_rank") * (1 + 2 * (role == "q"))
                tables.append(pd.DataFrame({"quantity": quantity, "layer": 0, "role": role, "step": steps,
                                            "index": np.nan, "value": value}))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def nearest(label: str, rng: Any) -> pd.DataFrame:
    name = next(name for name, labels in hydralora_factors.SETS.items() if [*labels][-1] == label)
    tables = []
    for factor in "AB":
        for layer in range(6):
            for role in ("query", "value"):
                module = f"bert.encoder.layer.{layer}.attention.self.{role}"
                center = 10 * rng.normal(size=2)
                xy = center + rng.normal(size=(6, 2)) * (0.1 if factor == "A" else 4)
                of_module = pd.DataFrame(
                    {
                        "set": name,
                        "factor": factor,
                        "view": "raw",
                        "module": module,
                        "other_module": [module, module, "another"] * 2 if factor == "A" else "another",
                        "task": ["tweets", "movies", "products"] * 2,
                        # For a third of the B's and two thirds of the A's, the nearest one has the same task.
                        "other_task": ["tweets"] * 6 if factor == "B" else ["tweets", "movies", "tweets"] * 2,
                        "x": xy[:, 0],
                        "y": xy[:, 1],
                    }
                )
                tables += [of_module, of_module.assign(view="module", x=np.nan, y=np.nan)]
    return pd.concat(tables, ignore_index=True)


TABLES = {
    "ranks": ranks,
    "validation": validation,
    "penalties": penalties,
    "utilization": utilization,
    "overlaps": overlaps,
    "weight_overlaps": weight_overlaps,
    "amplification": amplification,
    "moments": moments,
    "nearest": nearest,
}


@pytest.fixture(scope="module")
def evidence() -> StudyEvidence:
    return made_up()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_need_runs_of_all_arms(name: str, evidence: StudyEvidence) -> None:
    assert isinstance(FIGURES[name].draw(evidence), Drawable)
    if name != "frequency-bias":  # it needs no run
        assert FIGURES[name].draw(EMPTY) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_rendered(name: str, evidence: StudyEvidence) -> None:
    figure = FIGURES[name].draw(evidence)
    assert figure is not None
    figure.mpl()
    figure.plotly()


def test_dots_are_the_gaps_of_the_seeds_that_all_arms_have(evidence: StudyEvidence) -> None:
    arms = {"a": f"ALoRA, rank 1, {UNEVEN}", "b": f"LoRA, rank 1, {UNEVEN}"}
    runs = evidence.runs
    fewer = StudyEvidence(runs[(runs["arm"] != arms["b"]) | (runs["seed"] > 200)])
    table = variant_gap_table(fewer, arms)
    assert table[["name", "seed"]].to_numpy().tolist() == [["a", 201], ["b", 201], ["a", 202], ["b", 202]]
    assert table["value"].tolist() == pytest.approx(
        [closed(arms[name], seed) for seed in (201, 202) for name in ("a", "b")]
    )


def test_runs_without_a_kept_table_are_left_out(evidence: StudyEvidence) -> None:
    table = evidence.tables["penalties"]
    arm = f"AdaLoRA, rank 4 to 2, {UNEVEN}"
    for seeds, is_drawn in (((200,), True), (SEEDS, False)):
        lacking = table[~((table["arm"] == arm) & table["seed"].isin(seeds))]
        partial = StudyEvidence(evidence.runs, {**evidence.tables, "penalties": lacking})
        assert (FIGURES["penalties"].draw(partial) is not None) == is_drawn


def drawn(name: str, evidence: StudyEvidence) -> Drawable:
    figure = FIGURES[name].draw(evidence)
    assert figure is not None
    return figure


def test_budgets_have_a_line_per_method_and_the_oracle_as_a_reference(evidence: StudyEvidence) -> None:
    chart, paired = drawn("budgets-alora", evidence).panels
    gaps = [closed(f"ALoRA, rank {n}, {UNEVEN}", 201) - closed(f"LoRA, rank {n}, {UNEVEN}", 201) for n in (1, 2, 4, 8)]
    assert paired.data.set_index("number")["value"].to_dict() == pytest.approx(
        dict(zip((1, 2, 4, 8), gaps, strict=True))
    )
    title = drawn("budgets-alora", evidence).title
    for row in paired.data.itertuples():
        low, high = sorted((np.sign(row.value) * row.low, np.sign(row.value) * row.high))
        word = f"{abs(row.value):.1f} [{low:.1f}, {high:.1f}] points {'more' if row.value > 0 else 'less'}"
        # Only differences whose interval excludes 0 are in the title as differences.
        assert (f"{word} at budget {row.number}".replace("-", "−") in title) == (low > 0)
        assert bool(re.search(rf"no difference is seen at .*\b{row.number}\b", title)) == (low < 0)
    cells = chart.data.set_index(["recipe", "number"])["value"]
    assert cells["ALoRA", 2] == pytest.approx(closed(f"ALoRA, rank 2, {UNEVEN}", 201))
    assert cells["LoRA", 8] == pytest.approx(closed(f"LoRA, rank 8, {UNEVEN}", 201))
    (rule,) = chart.marks_of(Rule)
    assert rule.y == pytest.approx(closed(f"LoRA, planted ranks, {UNEVEN}", 201))


def test_heterogeneity_prints_full_fine_tuning_minus_lora(evidence: StudyEvidence) -> None:
    figure = drawn("heterogeneity", evidence)
    truths = (names.ONE_UPDATE, names.SHARED_A, names.UNRELATED)
    gaps = [closed(f"full fine-tuning, {truth}", 201) - closed(f"LoRA, rank 12, {truth}", 201) for truth in truths]
    assert figure.panels[1].data["value"].tolist() == pytest.approx(gaps)
    words = [difference_words(f"full fine-tuning, {truth}", f"LoRA, rank 12, {truth}") for truth in truths]
    assert figure.title == (
        "Full fine-tuning closes {} than LoRA with one update for all tasks, {} if tasks share A, {} if unrelated"
    ).format(*words)


def test_printed_numbers_equal_the_papers(evidence: StudyEvidence) -> None:
    panels = {name: drawn(name, evidence).panels[-1].data for name in
              ("scores-alora", "parts-hydralora", "splits", "scores-adalora", "parts-adalora")}  # fmt: skip
    cells = {name: panel.set_index(["name", "data"])["value"] for name, panel in panels.items()}
    assert cells["scores-alora"]["sensitivity", "BoolQ"] == 87.5
    assert cells["parts-hydralora"]["uniform gates", "MMLU"] == 42.81
    assert cells["splits"]["4 of rank 4", "MMLU"] == 46.94
    assert cells["scores-adalora"]["size of λ", "SST-2"] == 95.41
    assert cells["parts-adalora"]["no penalty", "SST-2"] == 95.41
    neft = drawn("further-neurons", evidence).panels[1].data.set_index(["recipe", "x"])["value"]
    assert (neft["next", 6], neft["reversed", 9]) == (82.27, 80.82)
    shifts = drawn("shift-by-neurons", evidence).panels
    for panel, number, value in ((1, 3, 17172), (3, 7, 22055)):
        printed = shifts[panel].data.set_index(["recipe", "x"])["value"]
        assert printed["next", number] == pytest.approx(100 * value / 352_256)


def test_captions_say_whether_the_order_is_the_printed_one(evidence: StudyEvidence) -> None:
    caption = drawn("parts-adalora", evidence).panels[0].caption
    arms = {"AdaLoRA": "AdaLoRA, rank 4 to 2", "no penalty": "AdaLoRA, rank 4 to 2, no penalty",
            "no allocation": "AdaLoRA, rank 2 to 2", "LoRA": "LoRA, rank 2"}  # fmt: skip
    best = max(arms, key=lambda name: closed(f"{arms[name]}, {UNEVEN}", 201))
    assert f"Best of the rows in both panels: {best}; printed: AdaLoRA." in caption
    gaps = [closed(f"ALoRA, rank {n}, {UNEVEN}", 201) > closed(f"LoRA, rank {n}, {UNEVEN}", 201) for n in (1, 2, 4, 8)]
    budgets, _ = drawn("budgets-alora", evidence).panels
    assert f"here its mean is at {sum(gaps)} of 4." in budgets.caption


def test_titles_say_what_the_runs_show(evidence: StudyEvidence) -> None:
    def gap(arm: str) -> float:
        return closed(arm, 201)

    full = f"full fine-tuning, {names.ALL_BLOCKS}"
    largest, none = (difference_words(f"LISA, {n} of 8 blocks, {names.ALL_BLOCKS}", full) for n in (4, 0))
    assert drawn("blocks", evidence).title == (
        f"LISA closes {largest} than full fine-tuning with 4 of 8 blocks at a time, {none} with 0"
    )
    sparse, factored = "FourierFT, 192 coefficients from zero", "LoRA, rank 2, attention"
    entries, rank_2 = (
        difference_words(f"{sparse}, {truth}", f"{factored}, {truth}")
        for truth in (names.OWN_ENTRIES, names.ATTENTION_RANK_2)
    )
    assert drawn("sizes-fourierft", evidence).title == (
        f"At 192 parameters per matrix, FourierFT closes {entries} than LoRA if the teacher changes its coefficients, "
        f"{rank_2} if the teacher has rank 2"
    )
    following, least = (f"NeFT, 36 neurons and 108 {kind}, {FEW}" for kind in ("more", "reversed"))
    assert drawn("further-neurons", evidence).title == (
        f"With 9% more neurons, the next close {difference_words(following, least)} than those that rotate least "
        "(printed: 1.3 COMET more)"
    )
    of_truths = []
    for truth in (names.SHARED_A, names.ONE_UPDATE):
        arms = [f"{variants.experts_of_rank_4(n)}, {truth}" for n in (8, 1)]
        of_truths.append(difference_words(*arms))
    assert drawn("experts", evidence).title == (
        "8 experts of rank 4 close {} than 1 if tasks share A, {} with one update for all tasks".format(*of_truths)
    )
    more = drawn("experts", evidence).panels[1].data.set_index(["recipe", "number"])["value"]
    assert more[names.ONE_UPDATE, 4] == pytest.approx(
        gap(f"{variants.experts_of_rank_4(4)}, {names.ONE_UPDATE}")
        - gap(f"{variants.experts_of_rank_4(1)}, {names.ONE_UPDATE}")
    )
    blocks = [gap(f"LoRA, block {n} only, {names.RANK_2}") for n in range(4)]
    assert (
        f"in one block at most {max(blocks):.0f} (block {np.argmax(blocks)}); " in drawn("placements", evidence).title
    )
    _, by_block = drawn("placements", evidence).panels
    order = [f"block {n}" for n in np.argsort(blocks)[::-1]]
    assert [name for name in by_block.y.order if name.startswith("block")] == order


def difference_words(arm: str, base: str) -> str:
    """Return how much more an arm closes; the differences of the made-up gaps are the same for all seeds."""
    difference = closed(arm, 201) - closed(base, 201)
    size = f"{abs(difference):.1f}"
    return f"{size} [{size}, {size}] points {'more' if difference > 0 else 'less'}"


TITLES_OF_VARIANTS = {
    "scores-alora": (
        f"ALoRA, rank 2, {UNEVEN}",
        "Random scores close {} than ALoRA's, LoRA without rounds {}, and the planted ranks {}",
        [f"ALoRA, rank 2, random scores, {UNEVEN}", f"LoRA, rank 2, {UNEVEN}", f"LoRA, planted ranks, {UNEVEN}"],
    ),
    "parts-hydralora": (
        f"HydraLoRA, 4 experts of rank 4, {names.SHARED_A}",
        "HydraLoRA closes {} with uniform gates, and {} with separate A's; one LoRA closes {}",
        [f"HydraLoRA, 4 experts of rank 4, uniform gates, {names.SHARED_A}",
         f"HydraLoRA, separate A's of rank 3, {names.SHARED_A}", f"LoRA, rank 12, {names.SHARED_A}"],
    ),
    "splits": (
        f"LoRA, rank 16, {names.SHARED_A}",
        "8 LoRAs of rank 2 close {} than one of rank 16, and 2 of rank 8 close {} (best printed: 4 of rank 4)",
        [f"HydraLoRA, {number} separate A's of rank {rank}, {names.SHARED_A}" for number, rank in ((8, 2), (2, 8))],
    ),
    "searches": (
        f"AutoLoRA, from rank 4, {UNEVEN}",
        "Rank 2 everywhere closes {} than the ranks that AutoLoRA finds, random ranks {}, the planted ranks {}",
        [f"LoRA, rank 2, {UNEVEN}", f"LoRA, ranks from random logits, {UNEVEN}", f"LoRA, planted ranks, {UNEVEN}"],
    ),
    "scores-adalora": (
        f"AdaLoRA, rank 4 to 2, {UNEVEN}",
        "Allocation by sensitivity closes {} than by AdaLoRA's score, by the size of λ {}; without allocation it is {}",
        [f"AdaLoRA, rank 4 to 2, sensitivity, {UNEVEN}", f"AdaLoRA, rank 4 to 2, size of lambda, {UNEVEN}",
         f"AdaLoRA, rank 2 to 2, {UNEVEN}"],
    ),
    "parts-adalora": (
        f"AdaLoRA, rank 4 to 2, {UNEVEN}",
        "AdaLoRA closes {} without allocation, and {} without the penalty; LoRA closes {}",
        [f"AdaLoRA, rank 2 to 2, {UNEVEN}", f"AdaLoRA, rank 4 to 2, no penalty, {UNEVEN}", f"LoRA, rank 2, {UNEVEN}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TITLES_OF_VARIANTS)
def test_titles_of_variants_have_the_differences_of_the_runs(name: str, evidence: StudyEvidence) -> None:
    base, title, arms = TITLES_OF_VARIANTS[name]
    assert drawn(name, evidence).title == title.format(*(difference_words(arm, base) for arm in arms))


def test_title_of_matrices_has_the_gaps_of_all_types_and_of_one(evidence: StudyEvidence) -> None:
    gaps = {
        name: closed(f"LoRA, {name} only, {names.RANK_2}", 201) for name in ("q", "k", "v", "o", "attention")
    }  # fmt: skip
    everywhere, attention = closed(f"LoRA, rank 2, {names.RANK_2}", 201), gaps.pop("attention")
    first, *_, last = sorted(gaps, key=gaps.__getitem__)
    assert drawn("matrices", evidence).title == (
        f"At equal size, LoRA in all types of weight closes {everywhere:.0f} points, in attention {attention:.0f}, in "
        f"one type of attention weight {gaps[first]:.0f} ({first}) to {gaps[last]:.0f} ({last})"
    )


def last_means(evidence: StudyEvidence, table: str, arms: dict[str, str], rows: int) -> dict[str, float]:
    """Return the mean over seeds of the last rows of a loss, by the name of the arm, the lowest first."""
    means = {}
    for name, arm in arms.items():
        means[name] = np.mean([evidence.table(table, arm, seed)["loss"].iloc[-rows:].mean() for seed in SEEDS])
    return dict(sorted(means.items(), key=lambda item: item[1]))


def loss_words(evidence: StudyEvidence, table: str, arms: tuple[str, str], rows: int) -> str:
    """Return the paired difference of the mean of the last rows of a loss, with its interval over three seeds."""
    differences = []
    for seed in SEEDS:
        last = [evidence.table(table, arm, seed)["loss"].iloc[-rows:].mean() for arm in arms]
        differences.append(last[0] - last[1])
    mean, half = np.mean(differences), t.ppf(0.975, 2) * np.std(differences, ddof=1) / np.sqrt(3)
    sign, word = (1, "above") if mean > 0 else (-1, "below")
    low, high = sign * mean - half, sign * mean + half
    return f"{sign * mean:.3f} [{low:.3f}, {high:.3f}] nats {word}".replace("-", "−")


def test_title_of_lisas_losses_has_paired_differences(evidence: StudyEvidence) -> None:
    sampled = f"LISA, 2 of 8 blocks, {names.ALL_BLOCKS}"
    none, full = (
        loss_words(evidence, "losses", (f"{arm}, {names.ALL_BLOCKS}", sampled), 10)
        for arm in ("LISA, 0 of 8 blocks", "full fine-tuning")
    )
    by_steps = {"10": sampled}
    for n in (5, 40, 400):
        by_steps[str(n)] = f"LISA, 2 of 8 blocks, {n} steps, {names.ALL_BLOCKS}"
    means = last_means(evidence, "losses", by_steps, 10)
    largest = max(abs(loss - means["10"]) for loss in means.values())
    assert drawn("losses-lisa", evidence).title == (
        f"Against LISA with γ = 2 blocks, training loss ends {none} with γ = 0, {full} with all 8; steps between draws "
        f"change it by up to {largest:.3f}"
    )


def test_titles_of_validation_losses_have_paired_differences(evidence: StudyEvidence) -> None:
    full, lora, sampled = (f"{arm}, one teacher, {names.ALL_BLOCKS}" for arm in
                           ("full fine-tuning", "LoRA, rank 8", "LISA, 2 of 8 blocks"))  # fmt: skip
    of_lisa, of_lora = (loss_words(evidence, "validation", (arm, full), 1) for arm in (sampled, lora))
    assert drawn("validation-lisa", evidence).title == (
        f"LISA's validation loss ends {of_lisa} that of full fine-tuning, LoRA's {of_lora}"
    )
    labels = "NeFT, 36 neurons and 72 more", "full fine-tuning, evaluated", "LoRA, rank 3, feed-forward"
    neft, full, lora = (f"{label}, {FEW}" for label in labels)
    of_full, of_lora = (loss_words(evidence, "validation", (neft, arm), 1) for arm in (full, lora))
    paired = drawn("validation-neft", evidence).panels[-1].data.set_index("name")
    if paired["low"].iloc[0] < 0 < paired["high"].iloc[0]:
        finding = f"no difference from full fine-tuning is seen ({of_full})"
    else:
        finding = f"{of_full} full fine-tuning"
    assert drawn("validation-neft", evidence).title == (
        f"With 108 neurons, validation loss of NeFT ends {of_lora} LoRA of equal size; {finding}"
    )
    last = [evidence.table("validation", arm, 201)["loss"].iloc[-1] for arm in (neft, full)]
    assert paired["n"].to_dict() == dict.fromkeys(paired.index, 3)
    assert paired["low"].iloc[0] < last[0] - last[1] < paired["high"].iloc[0]


def test_titles_of_directions_and_distances_have_the_planted_numbers(evidence: StudyEvidence) -> None:
    # φ(1, 1) is 1/384 + 0.2, in layer 5 + 0.3; the overlaps with W are 0.02 below and 0.03 above random ones.
    assert drawn("subspaces", evidence).title == (
        "The first input directions of LoRA of ranks 8 and 64 overlap by 0.20 to 0.30 (at random 0.003; paper: more "
        "than 0.5)"
    )
    # φ(64, 1) is 64/384, minus and plus these.
    assert drawn("weight-directions", evidence).title == (
        "The first 64 of W's 384 input directions hold 15% of the update's first direction at rank 8, 20% at rank 64 "
        "(at random 17%)"
    )
    assert drawn("amplification-factor", evidence).title == (
        "The update amplifies its directions of W 4.0 times at rank 8, 2.4 at 64 (printed: 22 at rank 4, 1.9 at 64)"
    )
    # 4 over 0.04 and over 0.01, since the start has decayed.
    assert drawn("penalties", evidence).title == (
        "With the penalty, P and Q end 0.01 to 0.04 from orthogonal ones (printed: 0.001), 100 to 400 times closer "
        "than without"
    )


def test_titles_of_moments_and_factors_have_the_planted_numbers(evidence: StudyEvidence) -> None:
    error = 100 * np.exp(-8 / 9)
    assert drawn("moments", evidence).title == (
        f"AdamW's second moments: rank 8 has an error of {error:.0f}% ({error + 5:.0f}% if shuffled), Adafactor's "
        "product 50%"
    )
    runs = evidence.runs.copy()
    for truth, ratio in ((names.MOMENTS_RANK_4, 0.5), (names.MOMENTS_UNSTRUCTURED, 1.25)):
        runs.loc[runs["arm"] == variants.guided(truth), "loss"] *= ratio
    # Ranks end at 0.1 + 1 + 1 of feed-forward and at 0.1 + 1 + 3 of q.
    assert drawn("factor-course", StudyEvidence(runs, evidence.tables)).title == (
        "Adapprox needs rank 2 to 4 of 384 after 100 steps; guidance multiplies losses by 0.50 to 1.25"
    )


def test_title_of_ranks_by_teacher_has_the_mean_agreement_of_pairs_and_chance(evidence: StudyEvidence) -> None:
    allocations, planted = [], []
    for number in (1, 2):
        arm = f"AutoLoRA, from rank 4, teacher {number}, {UNEVEN}"
        tables = [evidence.table("ranks", arm, seed).sort_values("module") for seed in SEEDS]
        allocations.append(np.array([table["rank"] for table in tables], np.float64))
        planted.append(tables[0]["planted"].to_numpy(np.float64))
    same = [kendalltau(*pair).statistic for by_seed in allocations for pair in combinations(by_seed, 2)]
    different = [kendalltau(*pair).statistic for pair in product(*allocations)]
    with_planted = [kendalltau(ranks, truth).statistic for by_seed, truth in zip(allocations, planted, strict=True)
                    for ranks in by_seed]  # fmt: skip
    means = [np.mean(with_planted), np.mean(same), np.mean(different)]
    chance = chance_agreement(allocations, planted)
    numbers = zip(means, (chance.planted, chance.same, chance.different), strict=True)
    words = [f"{mean:.2f} (chance: up to {bound:.2f})".replace("-", "−") for mean, bound in numbers]
    assert drawn("ranks-by-teacher", evidence).title == (
        "AutoLoRA's ranks agree with planted ones by τ = {}, between runs on one teacher by {}, on two by {}"
    ).format(*words)


def test_chance_of_ranks_is_the_percentile_over_all_orders() -> None:
    ranks, planted = [1.0, 2.0, 4.0], [np.array([0.0, 1.0, 3.0]), np.array([4.0, 0.0, 1.0])]
    orders = list(permutations(ranks))
    tau = {pair: kendalltau(*pair).statistic for pair in product([*orders, *map(tuple, planted)], repeat=2)}
    same, different, with_planted = [], [], []
    # Two runs on each of two teachers have 6^4 orders.
    for a, b, c, d in product(orders, repeat=4):
        same.append((tau[a, b] + tau[c, d]) / 2)
        different.append(np.mean([tau[pair] for pair in product((a, b), (c, d))]))
        first, second = map(tuple, planted)
        with_planted.append(np.mean([tau[a, first], tau[b, first], tau[c, second], tau[d, second]]))
    exact = [np.quantile(values, 0.95, method="inverted_cdf") for values in (same, different, with_planted)]
    allocations = [np.array([ranks, ranks])] * 2
    assert chance_agreement(allocations, planted) == pytest.approx(exact)


def test_differences_have_all_seeds_of_their_pair_and_its_interval(evidence: StudyEvidence) -> None:
    # The arms of claims have two more seeds than the others.
    registered = [f"{arm}, {UNEVEN}" for arm in ("AdaLoRA, rank 4 to 2", "AdaLoRA, rank 2 to 2")]
    runs = evidence.runs[evidence.runs["arm"].isin(registered) & (evidence.runs["seed"] < 202)]
    runs = pd.concat([evidence.runs, runs.assign(seed=runs["seed"] + 3, run=runs["run"] + "+")], ignore_index=True)
    # Points that are closed without allocation, and with it, by seed.
    gaps = {registered[1]: (10.0, 11, 12, 13, 14), registered[0]: (20.0, 20, 20, 20, 20)}
    for arm, points in gaps.items():
        of_arm = runs.loc[runs["arm"] == arm].sort_values("seed")
        runs.loc[of_arm.index, "gap"] = 1 - np.array(points) / 100
    chart = drawn("scores-adalora", StudyEvidence(runs, evidence.tables))
    measured, paired, _ = chart.panels
    assert measured.data.groupby("name")["seed"].nunique().unique().tolist() == [3]
    assert paired.data.set_index("name")["n"].to_dict() == {"sensitivity": 3, "size of λ": 3, "no allocation": 5}
    assert "of all seeds that both have (3 or 5)" in measured.caption
    # The differences are -10 to -6, whose mean is -8, and whose standard error is 0.707.
    half = t.ppf(0.975, 4) * np.sqrt(2.5 / 5)
    assert chart.title.endswith(f"without allocation it is 8.0 [{8 - half:.1f}, {8 + half:.1f}] points less")


def test_rows_without_a_number_say_so(evidence: StudyEvidence) -> None:
    measured, _, printed = drawn("scores-alora", evidence).panels
    words = [(mark.data["y"].item(), mark.data["word"].item()) for panel in (measured, printed)
             for mark in panel.marks_of(Text)]  # fmt: skip
    assert words == [("learned gates", "not run"), ("random scores", "not printed"), ("planted ranks", "not printed")]
    scores = printed.data.set_index(["name", "data"])
    assert scores["difference"]["sensitivity", "BoolQ"] == pytest.approx(87.5 - scores["value"]["ALoRA", "BoolQ"])
    by_type = drawn("matrices", evidence).panels[-1].data.set_index(["name", "data"])["difference"]
    assert by_type["k", "LoRA, table 5, MNLI-m"] == pytest.approx(90.8 - 91.3)
    assert (by_type["all types"] > 0).all()


def test_searches_show_the_mean_rank_they_find(evidence: StudyEvidence) -> None:
    panel = drawn("searches", evidence).panels[-1].data
    arm = f"AutoLoRA, from rank 4, sigmoid, {UNEVEN}"
    expected = [evidence.table("ranks", arm, seed)["rank"].mean() for seed in SEEDS]
    assert panel.loc[panel["name"] == "sigmoid", "value"].tolist() == pytest.approx(expected)
    sentence = "First order finds the same ranks as AutoLoRA"
    assert sentence not in drawn("searches", evidence).panels[0].caption
    tables, label = evidence.tables["ranks"], f"AutoLoRA, from rank 4, {UNEVEN}"
    of_search = tables.loc[tables["arm"] == label].sort_values(["seed", "module"])["rank"].to_numpy()
    first_order = tables[tables["arm"] == f"AutoLoRA, from rank 4, first order, {UNEVEN}"].sort_values(
        ["seed", "module"]
    )
    equal = pd.concat([tables.drop(first_order.index), first_order.assign(rank=of_search)])
    assert sentence in drawn("searches", StudyEvidence(evidence.runs, {"ranks": equal})).panels[0].caption


def test_shift_is_the_mean_difference_of_ranks_within_a_role(evidence: StudyEvidence) -> None:
    chart = drawn("shift-by-neurons", evidence).panels[0]
    moved = []
    for seed in SEEDS:
        tables = [evidence.table("utilization", f"{name}, {FEW}", seed) for name in
                  ("NeFT, 36 neurons and 72 reversed", "NeFT, 36 neurons")]  # fmt: skip
        ranks = [table.groupby("role")["value"].rank(ascending=False).to_numpy() for table in tables]
        moved.append(np.abs(ranks[0] - ranks[1]).mean() / 384)
    value = chart.data.set_index(["recipe", "number"])["value"]["reversed", 72]
    assert value == pytest.approx(100 * np.mean(moved))
    affected = drawn("affected-neurons", evidence).panels[2]
    assert not affected.marks_of(Bar)
    assert set(affected.data["kind"]) == {"strong", "suppressed", "indirect"}
    strong = affected.data[affected.data["kind"] == "strong"].set_index("name")["value"]
    is_reversed = strong.index.str.contains("last")
    largest = [strong[~is_reversed].max(), strong[is_reversed].max()]
    assert set(strong.index) == {
        *(f"first {percent}%" for percent in (6, 9, 12)),
        *(f"first 3%, last {percent}%" for percent in (3, 6, 9)),
    }
    assert (affected.data["low"] <= affected.data["value"]).all()
    assert (affected.data["value"] <= affected.data["high"]).all()
    shift = chart.data.set_index(["recipe", "number"])["value"]
    assert drawn("shift-by-neurons", evidence).title == (
        f"With 9% reversed neurons, utilization ranks shift by {shift['reversed', 108]:.1f}%, with the next ones by "
        f"{shift['next', 108]:.1f}% (printed: 11.3%, 7.4%)"
    )
    title = (
        "Use of up to {:.1f}% of neurons shifts strongly if more of those that rotate most train, of {:.1f}% if those "
        "that rotate least do (printed: {}%, {}%)"
    )
    printed = pd.read_csv(DATA / "published" / "neft_figures.csv").query("table == 'Figure 5'")
    printed = printed[printed["metric"].str.startswith("strong")]
    by_kind = printed.groupby(printed["method"].str.contains("reversed"))["value"].max() / (2 * 352_256)
    assert drawn("affected-neurons", evidence).title == title.format(*largest, *(f"{100 * v:.1f}" for v in by_kind))


def test_ranks_agree_within_a_teacher_and_not_between_two(evidence: StudyEvidence) -> None:
    charts = drawn("ranks-by-teacher", evidence).panels
    assert len(charts) == 4
    arm = f"AutoLoRA, from rank 4, teacher 1, {UNEVEN}"
    means = (
        pd.concat(evidence.table("ranks", arm, seed) for seed in SEEDS).groupby("module")[["rank", "planted"]].mean()
    )
    cells = charts[0].data.set_index("module")
    pd.testing.assert_frame_equal(cells[["rank", "planted"]].sort_index(), means.sort_index())
    assert isinstance(charts[0].marks[0], Heat)


def test_directions_are_minus_random_ones(evidence: StudyEvidence) -> None:
    q, _ = drawn("subspaces", evidence).rows()[0]
    cell = q.data.set_index(["i", "j"])
    assert cell["phi"][2, 8] == pytest.approx(8 / 384 + 0.05)
    assert cell["excess"][2, 8] == pytest.approx(0.05)
    assert q.marks[0].limits == (0.0, None)
    assert q.title == "Ranks 8 and 64: q, layer 2"
    factors, printed, norms, _ = drawn("amplification-factor", evidence).panels
    assert factors.data.groupby("rank")["factor"].unique().to_dict() == {"rank 64": [2.4], "rank 8": [4.0]}
    for rank, arm in (("rank 8", variants.LOW), ("rank 64", variants.HIGH)):
        ratio = factors.data.set_index("rank")["factor"][rank].iloc[0]
        assert f"{ratio:.2f} to {ratio:.2f} at {rank} ({len(evidence.seeds(arm))} seeds)" in factors.caption
    # The paper prints the norms, and 21.5 for the first ratio.
    assert printed.data.set_index("rank")["factor"].to_dict() == pytest.approx(
        {"rank 4": 21.6, "rank 64": 1.9}, abs=0.1
    )
    assert set(norms.data["name"]) == {"the update's", "W's own", "random"}


def test_losses_of_fourierft_have_a_title_and_the_truth_of_each_panel(evidence: StudyEvidence) -> None:
    chart = drawn("losses-fourierft", evidence)
    sparse, factored = "FourierFT, 192 coefficients from zero", "LoRA, rank 2, attention"
    entries, rank_2 = (
        loss_words(evidence, "losses", (f"{sparse}, {truth}", f"{factored}, {truth}"), 10)
        for truth in (names.OWN_ENTRIES, names.ATTENTION_RANK_2)
    )
    assert chart.title == (
        f"At equal size, FourierFT's training loss ends {entries} LoRA's if the teacher changes its entries, {rank_2} "
        "if the teacher has rank 2"
    )
    assert [panel.title for panel in chart.panels[:2]] == ["Teacher: FourierFT's entries", "Teacher: rank 2"]


def test_losses_are_means_of_ten_steps(evidence: StudyEvidence) -> None:
    left, center, _, right = drawn("losses-lisa", evidence).panels
    arm = f"LISA, 1 of 8 blocks, {names.ALL_BLOCKS}"
    first = np.mean([evidence.table("losses", arm, seed)["loss"].iloc[:10].mean() for seed in SEEDS])
    cells = left.data.set_index(["recipe", "step"])["value"]
    assert cells["γ = 1", 5.0] == pytest.approx(first)
    assert set(right.data["recipe"]) == {"seed 200", "seed 201", "seed 202"}
    # Lines that coincide are gray, so that colors of the legend are those of the first panel.
    for chart in (center, right):
        (line,) = chart.marks_of(Line)
        assert (line.stretch, line.color, line.muted) == ("recipe", None, True)


def test_titles_of_planes_have_the_fractions_of_the_kept_table() -> None:
    title = drawn("thirds", kept_study.read(DATA / "evidence-2")).title
    table = pd.read_parquet(DATA / "evidence-2" / "nearest.parquet").query("view == 'module' and factor == 'B'")
    same = 100 * (table["task"] == table["other_task"]).groupby(table["set"]).mean()
    assert f"same domain in {same['domains, shared start']:.0f}%, " in title
    assert f"same random third in {same['thirds, shared start']:.0f}% " in title
    chart = drawn("sub-modules", kept_study.read(DATA / "evidence-2"))
    few = "|".join([r"layer\.0\..*query", r"layer\.1\..*value", r"layer\.3\..*query", r"layer\.5\..*value"])
    table = pd.read_parquet(DATA / "evidence-2" / "nearest.parquet").query("view == 'raw' and factor == 'A'")
    table = table[table["module"].str.contains(few)]
    same = 100 * (table["module"] == table["other_module"]).groupby(table["set"]).mean()
    shared, separate = same["domains, shared start"], same["domains, separate starts"]
    assert f"in {shared:.0f}% with a shared start, in {separate:.0f}% with separate ones (chance 8%)" in chart.title
    figure = chart.mpl(width="page")
    assert not [line for line in figure_faults(figure) if "overlap" in line]


def test_planes_of_thirds_and_of_four_modules_have_shared_fractions_and_all_dots(evidence: StudyEvidence) -> None:
    thirds = drawn("thirds", evidence)
    by_domain, by_third, same = thirds.panels
    assert [chart.title for chart in (by_domain, by_third)] == ["B, domains", "B, thirds"]
    assert set(by_domain.data["task"]) == set(hydralora_factors.DOMAINS)
    cells = same.data.set_index("row")
    # The made-up table is the same for all seeds.
    assert cells[["low", "high"]].to_numpy() == pytest.approx(np.repeat(cells[["value"]].to_numpy(), 2, axis=1))
    assert cells["value"].round().to_dict() == {"A, domains": 67, "A, thirds": 67, "B, domains": 33, "B, thirds": 33}
    assert list(same.y.order) == list(cells.index)
    (chance,) = same.marks_of(Rule)
    assert chance.x == 20
    assert thirds.title == "Nearest B of a module: same domain in 33%, same random third in 33% (chance 20%)"
    assert "A 67% and 67%, B 0% and 0% (chance 8%)" in thirds.panels[0].caption
    assert "3 seeds" in thirds.panels[0].caption
    panels = drawn("sub-modules", evidence).panels
    assert [chart.title for chart in panels] == [
        f"{factor}, {start}\nsame module: {shared}%\n(chance 8%)"
        for factor, shared in (("A", 67), ("B", 0))
        for start in ("shared start", "separate starts")
    ]
    assert drawn("sub-modules", evidence).title == (
        "The nearest A of another domain is of the same module in 67% with a shared start, in 67% with separate ones "
        "(chance 8%)"
    )
    assert "over all modules 67%, 67%, 0%, 0%." in panels[0].caption
    for chart in panels:
        assert chart.square
        assert set(chart.data["series"]) == {"q0", "v1", "q3", "v5"}
        lines, dots, labels = chart.marks
        assert dots.shape == "task"
        # Every module is named once, nearer to one of its dots than to those of other modules.
        assert sorted(labels.data["label"]) == ["q0", "q3", "v1", "v5"]
        for x, y, label in labels.data.to_numpy():
            distance = np.hypot(chart.data["x"] - x, chart.data["y"] - y)
            assert chart.data["label"][distance.idxmin()] == label
        # One line per dot, to the mean of its module, so that a module is visible without color.
        spokes = lines.data.groupby("spoke")[["module", "x", "y"]]
        assert len(spokes) == len(chart.data)
        means = chart.data.groupby("module")[["x", "y"]].mean()
        ends = spokes.last().set_index("module")
        np.testing.assert_allclose(ends[["x", "y"]], means.loc[ends.index], rtol=1e-6)


PRINTED = {"scores-alora", "parts-hydralora", "splits", "scores-adalora", "parts-adalora", "matrices"}


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_variants_are_sorted_with_paired_differences_and_hollow_printed_numbers(
    name: str, evidence: StudyEvidence
) -> None:
    measured, paired, printed = drawn(name, evidence).panels
    assert measured.y == paired.y == printed.y
    means = measured.data.groupby("name")["value"].mean().sort_values(ascending=False)
    assert list(measured.y.order)[: len(means)] == list(means.index)
    base = measured.data["name"].iloc[0]
    by_seed = measured.data.pivot(index="seed", columns="name", values="value")
    for row in paired.data.to_dict("records"):
        assert row["value"] == pytest.approx((by_seed[row["name"]] - by_seed[base]).mean())
    assert set(paired.data["name"]) == set(means.index) - {base}
    assert [point.hollow for point in printed.marks_of(Point)] == [True]


def test_printed_numbers_have_hollow_dots_and_separate_axes(evidence: StudyEvidence) -> None:
    for name, pairs in {
        "shift-by-neurons": [(0, 1), (2, 3)],
        "affected-neurons": [(0, 1)],
        "amplification-factor": [(0, 1)],
    }.items():
        charts = drawn(name, evidence).panels
        for measured, printed in pairs:
            assert all(point.hollow for point in charts[printed].marks_of(Point))
            assert (charts[measured].x.label, charts[measured].y.label) != (
                charts[printed].x.label, charts[printed].y.label
            )  # fmt: skip


def test_last_losses_of_lisa_are_minus_that_of_two_blocks(evidence: StudyEvidence) -> None:
    left, _, paired, _ = drawn("losses-lisa", evidence).panels
    at_end = left.data[left.data["step"] == 395.0].set_index("recipe")["value"]
    differences = paired.data.set_index("name")["value"]
    assert list(paired.y.order) == ["γ = 0", "γ = 1", "γ = 4", "γ = 8 (full)", "K = 5", "K = 40", "K = 400"]
    for name in ("γ = 0", "γ = 1", "γ = 4", "γ = 8 (full)"):
        assert differences[name] == pytest.approx(at_end[name] - at_end["γ = 2"])


def test_listed_figures_of_papers_exist() -> None:
    table = pd.read_csv(STUDY_FILE.with_name("paper-figures.csv"), keep_default_na=False)
    assert not table.duplicated(["paper", "item"]).any()
    assert set(table["state"]) <= {"done", "runs open", "claim", "missing"}
    assert (table["state"] == "done").sum() >= 45
    images = STUDY_FILE.parents[1] / "figures"
    known = {row.name for row in ROWS} | VARIANTS.keys() | {file.stem for file in images.glob("*.png")}
    for row in table.to_dict("records"):
        assert bool(row["image"]) == (row["state"] != "missing"), row["item"]
        assert set(row["image"].split()) <= known, row["item"]
