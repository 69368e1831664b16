"""CPU time of the dial by module or by layer compared with separate passes, which have the same numbers.

Run ``python benchmarks/dial_passes.py``. It trains LoRA of rank 8 on all linear layers of MiniLM for a few steps, and
measures one module per layer, or with ``--by layer`` every layer: without it, and at three more scales. The dial
replays what precedes a part, and reads drift and probe from the same pass. The contestant has a pass of the whole model
per part, scale and measure.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
from measurements import text
from paired import compare
from tqdm.auto import tqdm

import lorascope as ls
from lorascope.adapters.delta import attach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis.dial import KEEP, PROBE, TASK
from lorascope.analysis.domain_probe import DomainProbe
from lorascope.inputs.text_rows import encode_rows, load_keep
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.dial import DialedModel
from lorascope.insight.update_parts import ScaledUpdates, group_parts
from lorascope.observe.measured_rows import Drift, ProbeDivergence, RowMeasure, TaskLoss
from lorascope.training.settings import Settings

SCALES = (0.25, 0.5, 0.75)


def open_trained(folder: str) -> AdaptedBase:
    run = ls.train(
        "minilm", "sentiment/movies", ls.LoRA(targets="all-linear"), out=f"{folder}/run", steps=2, eval_every=0,
        eval_size=32, test_size=32, progress=False,
    )  # fmt: skip
    return open_adapted(run, "minilm", "sentiment/movies", "last")


def measures_of(adapted: AdaptedBase, rows: int) -> dict[str, RowMeasure]:
    base = adapted.base
    task_rows = encode_rows(base, adapted.task, "validation", rows, Settings.max_length)
    keep_rows = encode_rows(base, load_keep(None, adapted.task, base), "validation", rows, Settings.max_length)
    # The time of a probe does not depend on its weights.
    width = base.config.hidden_size
    probe = DomainProbe(np.ones((width, 3)), np.zeros(3), 1.0, 0.3)
    return {
        TASK: TaskLoss(base, *task_rows),
        KEEP: Drift(base, *keep_rows),
        PROBE: ProbeDivergence(base, *keep_rows, probe),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", choices=("module", "layer"), default="module")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        adapted = open_trained(folder)
    with evaluation_mode(adapted.base):
        dialed = DialedModel(
            ScaledUpdates(adapted.base, adapted.deltas, {}), measures_of(adapted, options.rows), tqdm(disable=True)
        )
        attach(adapted.base, adapted.deltas)
        parts = group_parts(adapted.base, adapted.updates, options.by).parts
        if options.by == "module":
            parts = [part for part in parts if part.role == "q"]

        def replayed() -> None:
            dialed.removals(parts)
            dialed.curves(parts, SCALES)

        def separate() -> None:
            for part in parts:
                for scale in (0.0, *SCALES):
                    with dialed.updates.scaled(part, scale):
                        for measure in dialed.measures.values():
                            measure.values()

        ratio = compare(replayed, separate, pairs=options.pairs, warmup=0)
    size = f"{len(parts)} {options.by}s, {options.rows} + {options.rows} rows"
    print(text(ratio.line("dial / separate passes", size)))
    print(f"CPU seconds: dial {ratio.seconds[0]:.1f}, separate passes {ratio.seconds[1]:.1f}")


if __name__ == "__main__":
    main()
