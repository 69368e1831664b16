"""Redraw the images of the gallery from a full reproduction: python figures/draw.py report-full

Each image is the first figure of its name in the report of its probe. Images whose probe is missing from the folder
stay unchanged, and so do those that no probe shows: adapter-pairs, explore, head-choice, memory, and the images of
figures/smollm2.py. Images are reduced to 256 colors, which is invisible and keeps clones small.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lorascope import probes
from lorascope.charts.chart import Drawable, Panels

# File name -> probe, figure, width.
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
    parser.add_argument("reproduction", help="folder written by lorascope reproduce")
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
    """Return the figure with only the first initialization of t-SNE, because a page has no slider for the others."""
    rows = drawn.rows()
    if not any(chart.frame == "start" for row in rows for chart in row):
        return drawn
    return Panels(
        tuple(tuple(chart.at(chart.data["start"].iloc[0]) if chart.frame else chart for chart in row) for row in rows)
    )


def save(chart: Drawable, path: Path, width: str) -> Path:
    """Write an image with 256 colors and return its path."""
    chart.save(path, width=width)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return path


if __name__ == "__main__":
    main()
