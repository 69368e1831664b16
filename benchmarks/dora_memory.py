"""Peak memory of training with DoRA and default observers, compared with separate copies of W_0 per update.

DoRA's update depends on the base weights. Recordings hold several updates of a module at a time, which share one copy
of them. The model has the shapes of BERT-base with six blocks in fp32, and DoRA adapts all linear layers. The peak is
the high-water mark of a fresh process minus its memory before the training.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import torch
import transformers
from measurements import MeasuredLine
from paired import median_interval, report

import lorascope as ls
from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.inputs import models
from lorascope.methods.dora import DoRADelta
from lorascope.training.peak_memory import peak_memory

REPEATS = 3
AIM = 0.7


def peak_above_start(shares: bool) -> int:
    """Return the peak of this process in bytes above its memory before a training of three steps."""
    if not shares:
        DoRADelta._copy_base = lambda delta: to_array(host_weight(delta.host))  # type: ignore[method-assign]
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=6, num_labels=2)
    config._name_or_path = "minilm"  # whose tokenizer has as many tokens
    model = transformers.BertForSequenceClassification(config)
    models.note_missing(model, [name for name, _ in model.named_parameters() if name.startswith("classifier")])
    options = {"steps": 3, "batch_size": 2, "eval_size": 2, "test_size": 2, "max_length": 16, "device": "cpu"}
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        method = ls.DoRA(targets="all-linear")
        ls.train(model, "sentiment/movies", method, **options, out=f"{folder}/run", progress=False)
    peak = peak_memory("cpu")
    assert peak is not None
    return peak - before


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio of the peaks, and the peak itself; a fresh process measures each of them."""
    ratios, peaks = [], []
    spawn = multiprocessing.get_context("spawn")
    for _ in range(min(pairs, REPEATS)):
        pair = []
        for shares in (True, False):
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as fresh:
                pair.append(fresh.submit(peak_above_start, shares).result())
        ratios.append(pair[0] / pair[1])
        peaks.append(pair[0] / 2**20)
    for what, values, aim, unit in (
        ("peak with shared copies / with separate copies", ratios, AIM, ""),
        ("peak with shared copies", peaks, None, "MiB"),
    ):
        median, low, high = median_interval(np.array(values))
        yield MeasuredLine(what=what, value=median, low=low, high=high, pairs=len(values), aim=aim, unit=unit)


if __name__ == "__main__":
    report(lines, __doc__)
