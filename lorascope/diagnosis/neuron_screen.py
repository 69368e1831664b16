"""Screens of a whole model and its base: the rotation of its neurons."""

from __future__ import annotations

from rich.console import Console

from lorascope.diagnosis.neuron_inspection import NeuronInspection
from lorascope.diagnosis.terminal import (
    Elided,
    Fact,
    NumberColumn,
    join_paths,
    layer_chart,
    norm,
    numbers_table,
    percent,
    report_screen,
)

_NEURONS: tuple[NumberColumn, ...] = (
    ("share", 7, percent, "share"),
    ("median", 7, norm, "median"),
    ("largest", 7, norm, "largest"),
    ("|dW|", 7, norm, "delta_norm"),
)


def neurons_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format a whole model and its base: the rotation of its neurons."""
    chart = layer_chart(
        inspection,
        target,
        "in top 10%",
        lambda cell: sum(row["top"] for row in cell) / sum(row["neurons"] for row in cell),
        _NEURONS,
        "{} of a layer's neurons",
        form=percent,
    )
    spread = "  ".join(f"{share:.0%} {norm(value)}" for share, value in inspection.quantiles().items())
    listed = [
        Elided(row["module"], f"{norm(row['cosine_distance']):<8} ", f"  neuron {row['neuron']}")
        for row in inspection.largest(3).to_dict("records")
    ]
    names = (inspection.path, inspection.base), ("MODEL", "DIR")
    commands = [f"lorascope inspect {join_paths(*each)} --csv > neurons.csv" for each in names]
    facts: list[Fact] = [("1 - cos", [spread]), ("largest", listed)]
    return report_screen(inspection, target, *chart, facts=facts, commands=commands)


def projections_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format a whole model and its base, with one line per projection instead of the chart."""
    rows = inspection.module_rows()
    names = [(Elided(row["module"]), Elided(row["role"])) for row in rows]
    return report_screen(inspection, target, numbers_table([("projection", 39), ("role", 8)], names, _NEURONS, rows))
