"""Train a classifier with every method: ``python ddp_training.py MODEL ROWS OUT`` uses two processes, ``train`` one.

The two are forks of one process with the environment of ``torchrun``, so that the imports run once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from trainers import METHODS, ROWS, by_trainer, without_dropout
from transformers import AutoModelForSequenceClassification, logging

import lorascope as ls


def train(folder: str, rows: str, out: Path, rank: int, world: int) -> None:
    """Train all methods in this process, seeded by its rank: all must use the draws of the first process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = load_file(rows)
    data = [{key: value[i] for key, value in columns.items()} for i in range(len(columns["labels"]))]
    jobs = [(name, method, True) for name, method in METHODS.items()] + [("recorder only", None, True)]
    jobs.append(("no recorder", None, False))
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


def fork(rank: int, world: int, port: int) -> int:
    """Start one of the processes; return its id."""
    child = os.fork()
    if child:
        return child
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        train(sys.argv[1], sys.argv[2], Path(sys.argv[3]), rank, world)
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {fork(rank, 2, port) for rank in range(2)}
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:  # the others would wait for it forever
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main()
