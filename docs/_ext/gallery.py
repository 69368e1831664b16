"""Gallery pages: each figure with the code that draws it, its reading and its caveat.

The code is the ``Examples`` section of the figure's docstring. It runs at build on examples of the package, or on the
runs of ``gallery_runs`` if no example has the records, so the image shown is what the code draws.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpydoc.docscrape
from gallery_runs import read_sentences, train_gallery_runs

import lorascope as ls
from lorascope.charts.chart import Drawable
from lorascope.plots.figure_registry import FIGURES, Figure, example_code

RUNS = "_build/gallery-runs"
IMAGES = "gallery/images"
SOURCE = "gallery_runs.py"

TOPICS = {
    "updates": ("Updates", "Size, spectrum and shape of the weight updates, by layer and role."),
    "ranks": ("Ranks", "Where allocators spend a rank budget, and what their scores are worth."),
    "factors": ("Factors", "What the factors A and B of separately trained adapters have in common."),
    "routers": ("Routers and experts", "HydraLoRA's router weights and experts."),
    "neurons": ("Neurons", "Which neurons rotate, which are selected, and which are sensitive."),
    "schedules": ("Schedules and training curves", "Loss curves, learning rates and LISA's sampled blocks."),
    "optimizers": ("Optimizers and cost", "Second moments, their factorizations, memory and time of a step."),
}

INSTRUMENTS = ("Instruments", "What an instrument measured of an adapter on rows of text, with its base model.")
# Figures of results, which have no requirements of a run to register, and the guides that measure the results.
GUIDES = {"learn_forget": "dial", "dial": "dial", "price": "price", "reading": "reader", "forks": "forks"}
# Figures of tables, by topic, with the pages that explain them.
TABLES = {
    "updates": {"frequency_bias": "papers/fourierft"},
    "ranks": {"agreement": "papers/adalora", "against_truth": "papers/adalora"},
    "routers": {"head_choice": "papers/hydralora"},
}


def draw_pages(source: Path) -> dict[str, str]:
    """Draw all examples and return the pages of the gallery by their path."""
    runs = train_gallery_runs(source / RUNS)
    # The other runs learn random tokens, whose words say nothing to a reader.
    runs["words"] = read_sentences(source / RUNS)
    entries: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for figure in FIGURES.values():
        entries[figure.topic].append(entry(figure, runs, source / IMAGES))
    for topic, tables in TABLES.items():
        entries[topic] += [result_entry(name, page, runs, source / IMAGES) for name, page in tables.items()]
    pages = {"gallery/index.md": index_page()}
    for topic, (name, intro) in TOPICS.items():
        pages[f"gallery/{topic}.md"] = f"# {name}\n\n{intro}\n\n" + "\n".join(entries[topic])
    results = [result_entry(name, guide, runs, source / IMAGES) for name, guide in GUIDES.items()]
    name, intro = INSTRUMENTS
    pages["gallery/instruments.md"] = f"# {name}\n\n{intro}\n\n" + "\n".join(results)
    return pages


def index_page() -> str:
    """Return the index of the gallery, with the code that trains its runs."""
    figures = {topic: [figure.name for figure in FIGURES.values() if figure.topic == topic] for topic in TOPICS}
    for topic, tables in TABLES.items():
        figures[topic] += tables
    figures["instruments"] = [*GUIDES]
    cards = ""
    for topic, (name, intro) in {**TOPICS, "instruments": INSTRUMENTS}.items():
        names = ", ".join(f"`{figure}`" for figure in figures[topic])
        cards += f":::{{grid-item-card}} {name}\n:link: {topic}\n:link-type: doc\n\n{intro}\n\n{names}\n:::\n\n"
    topics = "\n".join(figures)
    training = (Path(__file__).parent / SOURCE).read_text(encoding="utf-8")
    return (
        "# Gallery\n\nThe figures in `ls.plots.FIGURES` and those of instruments, each drawn by the code next to it, "
        "most of them from `ls.example(...)`. The runs are short and small, so they show how to read a figure, not "
        "which method is better: see [the findings](../findings.md).\n\n"
        f"::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{cards}::::\n\n"
        "```{toctree}\n:hidden:\n\n" + topics + "\n```\n\n## Other runs\n\nThe other figures need records that no "
        "example of the package has. This code trains their runs, on the bundled model and text or on text of planted "
        "teachers.\n\n"
        f"```python\n{training}```\n"
    )


def entry(figure: Figure, runs: dict[str, Any], images: Path) -> str:
    """Return the section of a figure: image, code, reading, caveat."""
    reading = f"**How to read.** {figure.reads}\n\n**Caveat.** {figure.misleads}"
    return section(figure.name, figure.draw, reading, runs, images)


def result_entry(name: str, guide: str, runs: dict[str, Any], images: Path) -> str:
    """Return the section of the figure of a result or a table, with the page on it: image, code, reading."""
    draw = getattr(ls.plots, name)
    reads = " ".join(numpydoc.docscrape.FunctionDoc(draw)["Extended Summary"])
    link = f"[This page](../{guide}.md) explains it, with its caveats."
    return section(name, draw, f"**How to read.** {reads}\n\n{link}", runs, images)


def section(name: str, draw: Callable[..., Drawable], reading: str, runs: dict[str, Any], images: Path) -> str:
    """Return the section of a figure with its reading: image, code and the runs that the code uses."""
    code = example_code(draw)
    chart = run_example(code, runs)
    image_lines = "\n".join(save_images(chart, name, images))
    summary = " ".join(numpydoc.docscrape.FunctionDoc(draw)["Summary"])
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    trained = ", ".join(f"`{run}`" for run in runs if run in names)
    if trained:
        trained = f"Trained by [the code of the gallery](index.md#other-runs): {trained}.\n\n"
    return (
        f"(figure-{name})=\n## `{name}`\n\n{summary}\n\n{image_lines}\n\n"
        f"```python\n{code}\n```\n\n{trained}{reading}\n\n"
        f"{{py:func}}`Parameters of ls.plots.{name} <lorascope.plots.{name}>`\n"
    )


def run_example(code: str, runs: dict[str, Any]) -> Drawable:
    """Run the lines of an example; its last one is the chart."""
    *before, last = code.splitlines()
    names = {"ls": ls, **runs}
    exec("\n".join(before), names)
    chart: Drawable = eval(last, names)
    return chart


def save_images(chart: Drawable, name: str, images: Path) -> Iterator[str]:
    """Save a chart for both color schemes, and yield the Markdown that shows each in its own."""
    for theme in ("light", "dark"):
        file = chart.save(images / f"{name}-{theme}.svg", theme=theme, caption=True)
        alt = getattr(chart, "title", "") or name
        yield f"```{{image}} images/{file.name}\n:alt: {alt}\n:class: only-{theme}\n```\n"
