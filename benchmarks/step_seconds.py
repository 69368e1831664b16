"""Time of one training step by part and method, on minilm.

Run ``python benchmarks/step_seconds.py``. It prints the rows of a table in ``docs/memory.md`` and plots its figure.
Every method is measured in a separate process on one thread. The runs are stored in ``--runs``, where a second call
finds them.
"""

from __future__ import annotations

import argparse

from memory import WAYS

import lorascope as ls
from lorascope.analysis.step_time import COMPONENTS, median_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--figure", default="figures/step-seconds.png")
    arguments = parser.parse_args()
    found = {}
    for way, method in WAYS.items():
        found[way] = ls.step_time.measure("minilm", "sentiment", method, steps=30, root=arguments.runs)
        parts = 1e3 * median_times(found[way].table).set_index("part")["value"]
        print("|", " | ".join([way, *(f"{parts[part]:.0f}" for part in COMPONENTS.values())]), "|", flush=True)
    ls.plots.step_seconds(found).save(arguments.figure, width="page")


if __name__ == "__main__":
    main()
