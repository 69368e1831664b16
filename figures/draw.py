"""Draw the pictures of the gallery again, from a full reproduction: python figures/draw.py report-full

A picture is the first exhibit of its name that its probe shows. Probes that the folder lacks keep their pictures, and
so do those that no probe shows. Colours are cut down to 256, which no eye sees and every clone feels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lorascope import probes
from lorascope.chart import Drawable

# File -> probe, figure, width.
PICTURES = {
    "adapted-types": ("placement", "adapted_types", "column"),
    "atlas": ("fourierft", "atlas", "page"),
    "basis-ablation": ("fourierft", "basis_ablation", "column"),
    "bias-curve": ("fourierft", "bias_curve", "column"),
    "factor-rank": ("adapprox", "factor_rank", "page"),
    "factor-error": ("adapprox", "factor_error", "column"),
    "fourier-spectrum": ("fourierft", "fourier_spectrum", "page"),
    "guidance": ("adapprox", "guidance", "column"),
    "learning-rates": ("adapprox", "learning_rates", "column"),
    "left-out": ("hydralora", "left_out", "column"),
    "moment-error": ("adapprox", "moment_error", "column"),
    "neuron-overlap": ("neft", "neuron_overlap", "column"),
    "neurons": ("neft", "neurons", "page"),
    "number-of-heads": ("hydralora", "number_of_heads", "column"),
    "quality": ("fourierft", "quality", "column"),
    "second-moments": ("adapprox", "second_moments", "page"),
    "update-image": ("fourierft", "update_image", "page"),
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
        charts = [each.chart for each in found[probe].exhibits if each.figure == figure] if probe in found else []
        if charts:
            print(save(charts[0], folder / f"{file}.png", width).name)


def save(chart: Drawable, picture: Path, width: str) -> Path:
    """Write a picture of few colours, and say where."""
    chart.save(picture, width=width)
    Image.open(picture).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)
    return picture


if __name__ == "__main__":
    main()
