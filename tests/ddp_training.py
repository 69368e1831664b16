"""Train a classifier by every method: ``torchrun --nproc_per_node 2 ddp_training.py MODEL ROWS OUT``, or alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from trainers import METHODS, ROWS, by_trainer, without_dropout
from transformers import AutoModelForSequenceClassification, logging

import lorascope as ls


def train(folder: str, rows: str, out: Path, rank: int, world: int) -> None:
    """Each process has its own seed: what a method draws must be the first one's in all."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = load_file(rows)
    data = [{key: value[i] for key, value in columns.items()} for i in range(len(columns["labels"]))]
    jobs = [(name, method, True) for name, method in METHODS.items()] + [("alone", None, True), ("unseen", None, False)]
    for name, method, recorded in jobs:
        model = without_dropout(AutoModelForSequenceClassification.from_pretrained(folder))
        model.accepts_loss_kwargs = False
        by_trainer(
            model,
            data,
            out / name,
            method,
            draw=rank,
            recorder=ls.TrainerRecorder(observe=[ls.observe.norms(every=3)]) if recorded else None,
            per_device_train_batch_size=ROWS // world,
            ddp_backend="gloo" if world > 1 else None,
        )
        state = {key: parameter.detach().contiguous() for key, parameter in model.named_parameters()}
        save_file(state, out / name / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
