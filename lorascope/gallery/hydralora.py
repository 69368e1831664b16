"""Figures of HydraLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorascope import plots
from lorascope.charts.chart import Chart, Drawable
from lorascope.evidence.statistics import asymmetry
from lorascope.evidence.statistics import hydralora as statistics
from lorascope.gallery.base import GalleryFigure, accuracy_bars, own_labels
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed
from lorascope.plots.component_ablations import metric_by_experts
from lorascope.plots.run_groups import gather

HEADING = "HydraLoRA"


def _draw_ablations(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="HydraLoRA", table="Figure 6", data="MMLU")
    # In the order of the table: without a mixture, uniform gates, separate A's, and the full method.
    numbers = numbers.assign(recipe=["LoRA", "uniform gates", "separate A's", "HydraLoRA"], source="printed")
    return add_printed(plots.ablations(runs), numbers, "recipe", "HydraLoRA, figure 6, MMLU")


def _draw_experts(runs: Mapping[str, Sequence[Any]]) -> Chart:
    experts = {label: of for label, of in runs.items() if label != "LoRA"}
    return metric_by_experts(gather("number_of_experts", experts, {"LoRA": runs["LoRA"]}))


def _by_domain(runs: Mapping[str, Sequence[Any]], labels: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
    """Group the runs of a set by domain or by quarter; each has two."""
    return {name: [run for label in labels[2 * n : 2 * n + 2] for run in runs[label]] for n, name in enumerate(names)}


def _draw_domains(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    shared, separate = (_by_domain(runs, labels, asymmetry.DOMAINS) for labels in (asymmetry.COMMON, asymmetry.OWN))
    return plots.factor_embedding(shared, control=separate)


def _draw_quarters(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    return plots.factor_embedding(_by_domain(runs, asymmetry.QUARTERS, [f"quarter {n}" for n in (1, 2, 3, 4)]))


_ROUTED = {"shared A": statistics.ROUTED, "separate A's": statistics.SPLIT}

FIGURES = [
    GalleryFigure(
        name="left-out",
        alt="Accuracy of HydraLoRA and its ablations on a mixture of four tasks, and printed numbers",
        arms={
            "HydraLoRA": statistics.ROUTED,
            "uniform gates": statistics.EVEN,
            "separate A's": statistics.SPLIT,
            "LoRA": statistics.LORA,
        },
        draw=_draw_ablations,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="number-of-experts",
        alt="Accuracy of HydraLoRA by number of experts, and of LoRA with the parameters of four",
        arms={"2 experts": statistics.TWO, "4 experts": statistics.ROUTED, "LoRA": statistics.LORA},
        draw=_draw_experts,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="gap",
        alt="Accuracy of full fine-tuning and LoRA on one task and on a mixture of four",
        arms={
            "full, one task": statistics.FULL_ONE,
            "LoRA, one task": statistics.LORA_ONE,
            "full, four tasks": statistics.FULL_MANY,
            "LoRA, four tasks": statistics.LORA,
        },
        draw=lambda runs: accuracy_bars(runs, "Gap between full fine-tuning and LoRA", start=0.0),
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="gates",
        alt="Mean gate weights of four experts by task",
        arms=_ROUTED,
        draw=plots.gates,
        seeds=1,
        quantities=("gate_information",),
        arrays=("gate_by_domain",),
    ),
    GalleryFigure(
        name="gate-course",
        alt="Entropy of the gate weights over the steps, and their mutual information with the task",
        arms=_ROUTED,
        draw=plots.gate_course,
        quantities=("gate_entropy", "gate_information", "gate_chance"),
    ),
    GalleryFigure(
        name="adapter-pairs",
        alt="Norm ratio, cosine, angle and allocation of two seeds each of LoRA and HydraLoRA",
        arms={"LoRA": statistics.LORA, "HydraLoRA": statistics.ROUTED},
        draw=plots.adapter_pairs,
        seeds=2,
    ),
    GalleryFigure(
        name="factor-embedding",
        alt="Factors of LoRAs trained on four domains: above from a shared initial A, below from separate ones",
        arms=own_labels(*asymmetry.COMMON, *asymmetry.OWN),
        draw=_draw_domains,
        seeds=1,
    ),
    GalleryFigure(
        name="factor-quarters",
        alt="Factors of LoRAs trained on four random quarters of the text, from a shared initial A",
        arms=own_labels(*asymmetry.QUARTERS),
        draw=_draw_quarters,
        seeds=1,
    ),
]
