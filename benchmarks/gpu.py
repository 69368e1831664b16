"""Time and memory of training on a CUDA device, as one table.

Run ``python benchmarks/gpu.py``. The table has the time per optimizer step of every method and its ratio to full
fine-tuning, the peak memory according to CUDA and to lorascope.step_memory, the overhead of the default observers, and
LoRA on all of SmolLM2 under bf16 autocast. With ``--device cpu`` it runs on the CPU, where only lorascope.step_memory
reports a peak.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from paired import compare
from recorder import STEPS, TURNS, Training

import lorascope as ls
from lorascope.analysis.step_time import median_times
from lorascope.experiments import step_memory, step_time
from lorascope.experiments.isolated_run import IsolatedRun
from lorascope.methods.method import Method
from lorascope.observe import norms

FULL = "full"
# One phase per method. LISA resamples blocks within the timed steps, but not within the steps that measure memory.
METHODS: dict[str, Method] = {
    FULL: ls.Full(),
    "lora": ls.LoRA(targets="all-linear"),
    "adalora": ls.AdaLoRA(),
    "autolora": ls.AutoLoRA(),
    "alora": ls.ALoRA(),
    "fourierft": ls.FourierFT(),
    "hydralora": ls.HydraLoRA(),
    "lisa": ls.LISA(n_active=2, interval=20),
    "neft": ls.NeFT(select_by="random"),
    "dora": ls.DoRA(),
    "pissa": ls.PiSSA(),
    "vera": ls.VeRA(),
    "adapprox": ls.Adapprox(),
}
# Steps per method, pairs of recorded and unrecorded steps, steps of the decoder, processes that measure memory.
SIZES, QUICK = (40, 10, 30, 5), (4, 1, 3, 1)
BATCH = {"batch_size": 32, "max_length": 128}
Row = dict[str, Any]


def with_peak(device: str, work: Callable[[], ls.Run]) -> tuple[ls.Run, float]:
    """Return a run and the peak bytes that CUDA allocated during it; NaN on other devices."""
    on_card = torch.device(device).type == "cuda"
    gc.collect()
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    run = work()
    return run, float(torch.cuda.max_memory_allocated(device)) if on_card else math.nan


def seconds_per_step(run: ls.Run) -> float:
    """Return the median time per step of a run from ``step_time``, without its first steps."""
    return float(median_times(run.table)["value"].sum())


def methods(options: argparse.Namespace, steps: int, processes: int, root: Path) -> Iterator[Row]:
    """Yield one row per method: memory is measured first, in separate processes, then time in this process."""
    where: dict[str, Any] = {"seed": 0, "out": None, "root": root, "overwrite": False, "device": options.device}

    def reported(method: Method) -> float:
        run = step_memory.measure(options.model, options.task, method, **where, **BATCH)
        return float(run.table.loc[run.table["quantity"] == "peak_bytes", "value"].item())

    at_once = Parallel(n_jobs=processes, prefer="threads")
    peaks = dict(zip(METHODS, at_once(delayed(reported)(method) for method in METHODS.values()), strict=True))
    full = math.nan
    for name, method in METHODS.items():
        job = IsolatedRun.of(options.model, options.task, method, {"steps": steps, **BATCH}, **where)
        run, peak = with_peak(options.device, lambda job=job: ls.Run.read(step_time._measure_seconds(job)))
        seconds = seconds_per_step(run)
        full = seconds if name == FULL else full
        yield {"row": name, "seconds": seconds, "ratio": seconds / full, "allocated": peak, "reported": peaks[name]}


def recorders(options: argparse.Namespace, pairs: int, root: Path) -> Iterator[Row]:
    """Yield one row per training run with observers, relative to the same run without."""
    shape = (BATCH["batch_size"], 32)
    for name in (FULL, "lora"):
        training = partial(Training, METHODS[name], model=options.model, task=options.task, device=options.device)
        recorded = training(observers=(norms(),), shape=shape, folder=root / f"{name}-recorded")
        clock = partial(step_time.clock, options.device)
        found = compare(recorded, recorded.without, pairs, 1, clock=clock, turns=TURNS)
        note = f"ratio to no observers [{found.low:.3f}, {found.high:.3f}]"
        seconds = found.seconds[0] / (TURNS * STEPS)
        yield {"row": f"{name}, recorded", "seconds": seconds, "ratio": found.median, "note": note}


def decoder(options: argparse.Namespace, steps: int, root: Path) -> Row:
    """Return the row of LoRA on the whole decoder under bf16 autocast."""
    settings: dict[str, Any] = {"steps": steps, "batch_size": 16, "eval_every": 0, "eval_size": 64, "test_size": 64}
    method = ls.LoRA(targets="all-linear")
    settings |= {"precision": "bf16", "device": options.device, "root": root, "progress": False}
    run, peak = with_peak(options.device, lambda: ls.train(options.decoder, options.task, method, **settings))
    cells = run.table.pivot_table(index="step", columns="quantity", values="value", observed=True)
    losses = cells["loss"].dropna()
    note = f"loss {losses.iloc[0]:.3f} to {losses.iloc[-1]:.3f}, {run.meta.seconds:.1f} s with evaluation"
    row = f"lora, {run.meta.model}, bf16"
    return {"row": row, "seconds": float(np.median(np.diff(cells["seconds"]))), "allocated": peak, "note": note}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows, from runs in a temporary folder."""
    steps, pairs, decoder_steps, processes = QUICK if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        yield from methods(options, steps, processes, Path(folder))
        yield from recorders(options, pairs, Path(folder))
        yield decoder(options, decoder_steps, Path(folder))


def table(found: Iterable[Row]) -> pd.DataFrame:
    """Return the rows with times in milliseconds and memory in MiB."""
    frame = pd.DataFrame(found, columns=["row", "seconds", "ratio", "allocated", "reported", "note"])
    return pd.DataFrame(
        {
            "": frame["row"],
            "ms per step": 1e3 * frame["seconds"],
            "ratio": frame["ratio"],
            "max allocated (MiB)": frame["allocated"] / 2**20,
            "lorascope.step_memory (MiB)": frame["reported"] / 2**20,
            "note": frame["note"].fillna(""),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="run few steps, to check that everything works")
    parser.add_argument("--model", default="minilm", help="encoder that every method trains")
    parser.add_argument("--decoder", default="smollm2", help="decoder that LoRA trains under bf16 autocast")
    parser.add_argument("--task", default="sentiment")
    options = parser.parse_args(arguments)
    on_card = torch.device(options.device).type == "cuda"
    if on_card and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    name = torch.cuda.get_device_name(options.device) if on_card else platform.machine()
    found = table(rows(options)).to_string(index=False, na_rep="-", float_format="{:.3f}".format)
    print(f"{name}, torch {torch.__version__}, {options.model}, fp32, batches of {BATCH['batch_size']}\n\n{found}")


if __name__ == "__main__":
    main()
