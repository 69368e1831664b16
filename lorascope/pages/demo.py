"""Demonstration page: figures of the examples of the package, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.pages.page import Section, write
from lorascope.pages.report_figure import draw
from lorascope.runs.examples import example, list_examples


class Topic(NamedTuple):
    """Section of the demonstration: its title, the examples that it shows, and the figures of them."""

    title: str
    names: tuple[str, ...]
    figures: tuple[str, ...]


# From one update to the methods that choose where it is, and then to the differences between adapters.
TOPICS = (
    Topic("Where an update is", ("lora",), ("update_norm_heat", "spectrum")),
    Topic("Full fine-tuning and LoRA", ("full", "lora"), ("training_curves", "update_norm")),
    Topic("Where AdaLoRA puts its ranks", ("adalora",), ("rank_allocation", "planted", "importance")),
    Topic("Where ALoRA moves its ranks", ("alora",), ("rank_allocation",)),
    Topic("Which experts HydraLoRA uses", ("hydralora",), ("gates", "gate_course")),
    Topic("The spectrum of FourierFT", ("fourierft",), ("fourier_spectrum",)),
    Topic("The neurons that NeFT selects", ("neft",), ("neurons", "neuron_cosine")),
    Topic("Two adapters of different seeds", ("adapter", "adapter_seed_1"), ("spectrum", "subspace_similarity")),
    Topic("Checkpoints of one training", ("checkpoints",), ("norm_over_steps", "rotation")),
)


def write_demo(out: str | Path) -> Path:
    """Write the demonstration page as one HTML file.

    Raises
    ------
    FileExistsError
        ``out`` exists, and lorascope did not write it, or it has changed since.
    """
    origins = list_examples()["made"].to_dict()
    sections = []
    for topic in TOPICS:
        runs: Any = {name: example(name) for name in topic.names}
        # A run without a name has its recipe as label, as the code in the title gives it.
        if len(topic.names) == 1:
            (runs,) = runs.values()
        code = _loading_code(topic.names)
        figures = []
        for name in topic.figures:
            figures.append(replace(draw(name, runs), title=f"ls.plots.{name}({code})"))
        lead = " ".join(f"{name}: {origins[name]}." for name in topic.names)
        sections.append(Section(f"{topic.names[0]}-{topic.figures[0]}", topic.title, lead, figures=figures))
    lead = (
        "The title of a figure is the Python code that draws it, after import lorascope as ls. The package contains "
        "the examples; the ranks of the best update of their text are known."
    )
    return write(out, "What lorascope shows", lead, sections)


def _loading_code(names: tuple[str, ...]) -> str:
    """Return the code that loads examples: one, or several by name."""
    calls = {name: f'ls.example("{name}")' for name in names}
    if len(names) == 1:
        return calls[names[0]]
    return ", ".join(f'"{name}": {call}' for name, call in calls.items()).join("{}")
