"""Draw the pictures of the gallery again, from a full reproduction: python figures/draw.py report-full

A picture is the first exhibit of its name that its probe shows. Where the folder lacks a probe its pictures stay as
they are, and so do those that no probe shows: adapter-pairs, explore, head-choice, memory, and what figures/smollm2.py
draws. Colours are cut down to 256, which no eye sees and every clone feels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lorascope import probes
from lorascope.charts.chart import Drawable, Panels

# File -> probe, figure, width.
PICTURES = {
    "active-layers": ("lisa_training", "active_layers", "column"),
    "adapted-types": ("placement", "adapted_types", "column"),
    "against-truth": ("agreement", "against_truth", "page"),
    "agreement": ("agreement", "agreement", "page"),
    "atlas": ("fourierft", "atlas", "page"),
    "basis-ablation": ("fourierft", "basis_ablation", "column"),
    "bias-curve": ("fourierft", "bias_curve", "column"),
    "factor-embedding": ("asymmetry", "factor_embedding", "page"),
    "factor-rank": ("adapprox", "factor_rank", "page"),
    "factor-error": ("adapprox", "factor_error", "column"),
    "fourier-spectrum": ("fourierft", "fourier_spectrum", "page"),
    "gate-course": ("hydralora", "gate_course", "page"),
    "gates": ("hydralora", "gates", "page"),
    "guidance": ("adapprox", "guidance", "page"),
    "importance": ("adalora", "importance", "page"),
    "learning-rates": ("adapprox", "learning_rates", "page"),
    "left-out": ("hydralora", "ablations", "column"),
    "mean-norm": ("lisa", "mean_norm", "page"),
    "moment-error": ("adapprox", "moment_error", "column"),
    "neuron-cosine": ("neft", "neuron_cosine", "column"),
    "neuron-overlap": ("neft", "neuron_overlap", "column"),
    "neurons": ("neft", "neurons", "page"),
    "norm-over-steps": ("lora", "norm_over_steps", "page"),
    "number-of-heads": ("hydralora", "number_of_experts", "column"),
    "planted": ("planted", "planted", "page"),
    "quality": ("fourierft", "accuracy_by_parameters", "column"),
    "rank-allocation": ("adalora", "rank_allocation", "page"),
    "rank-alora": ("alora", "rank_allocation", "page"),
    "rank-by-task": ("autolora", "rank_allocation", "page"),
    "rank-replay": ("adalora", "rank_replay", "page"),
    "rank-shift": ("neft", "rank_shift", "page"),
    "second-moments": ("adapprox", "second_moments", "page"),
    "spectrum": ("lora", "spectrum", "page"),
    "subspace-similarity": ("lora", "subspace_similarity", "page"),
    "training-curves": ("lora", "training_curves", "page"),
    "update-image": ("fourierft", "update_image", "page"),
    "update-norm": ("lora", "update_norm", "page"),
    "update-norm-heat": ("lora", "update_norm_heat", "page"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reproduction", help="the folder that lorascope reproduce filled")
    folder = Path(__file__).parent
    try:
        found = probes.findings(parser.parse_args().reproduction)
    except FileNotFoundError as error:
        parser.error(str(error))
    for file, (probe, figure, width) in PICTURES.items():
        charts = [each.chart for each in found[probe].figures if each.figure == figure] if probe in found else []
        if charts:
            print(save(from_one_start(charts[0]), folder / f"{file}.png", width).name)


def from_one_start(drawn: Drawable) -> Drawable:
    """With t-SNE from its first start alone, where there are others: a slider has room for them, a page has not."""
    rows = drawn.rows()
    if not any(chart.frame == "start" for row in rows for chart in row):
        return drawn
    return Panels(
        tuple(tuple(chart.at(chart.data["start"].iloc[0]) if chart.frame else chart for chart in row) for row in rows)
    )


def save(chart: Drawable, picture: Path, width: str) -> Path:
    """Write a picture of few colours, and say where."""
    chart.save(picture, width=width)
    Image.open(picture).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)
    return picture


if __name__ == "__main__":
    main()
