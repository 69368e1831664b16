"""A tiny classifier under the Trainer, trained on the same batches as by ``train``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import peft
import torch
from transformers import Trainer, TrainingArguments

import lorascope as ls
from lorascope.inputs import models
from lorascope.observe.observer import Observer
from lorascope.training.base_weights import prepare_model
from lorascope.training.state import seed_generators

STEPS, ROWS = 6, 8
QV = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
IN, OUT = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense"

# All methods that work under a Trainer, with sizes at which they act within six steps of a model of width 32.
METHODS = {
    "full": ls.Full(lr=1e-3, head_lr=1e-2),
    "lora": ls.LoRA(rank=4, lr=1e-2, head_lr=1e-2),
    "adalora": ls.AdaLoRA(init_rank=4, target_rank=2, mask_every=1),
    "fourierft": ls.FourierFT(coefficients=16),
    "hydralora": ls.HydraLoRA(rank=2),
    "lisa": ls.LISA(n_active=1, lr=1e-3),
    "neft": ls.NeFT(neurons={IN: [1, 2, 40], OUT: [3, 5]}, lr=1e-2),
    "adapprox": ls.Adapprox(min_dim=8, reselect_every=2, lr=1e-3),
}


@dataclass(kw_only=True)
class Batches(Observer):
    """Observer that stores the batches of the latest run."""

    kept: ClassVar[list[dict[str, torch.Tensor]]] = []

    def __call__(self, step):
        if step.finished == 0:
            self.kept.clear()
        else:
            self.kept.append(step.batch)
        return ()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def training_rows(folder: str, task) -> list[dict[str, torch.Tensor]]:
    """Return the encoded rows that a training of ``STEPS`` steps reads."""
    count = STEPS * ROWS
    batch = task.encode(models.tokenizer(models.load(folder, task=task)), task.split("train").head(count))
    batch = batch.batch(range(count))
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def by_train(folder: str, task, method, out: Path, **settings: Any):
    """Return a model trained by ``train``, its run, and its training rows in order."""
    model = without_dropout(models.load(folder, task=task))
    own = {"steps": STEPS, "batch_size": ROWS, "warmup": 0, "eval_every": 0, "progress": False, "device": "cpu"}
    own["observe"] = [Batches(), ls.observe.norms(every=2)]
    run = ls.train(model, task, method, out=out, **own | settings)
    rows = [{key: value[i] for key, value in batch.items()} for batch in Batches.kept for i in range(ROWS)]
    return model, run, rows


def fresh(folder: str, task):
    """Return the model at the start of ``train``, with a head drawn from seed 0."""
    model = without_dropout(models.load(folder, task=task))
    prepare_model(model, task.fit(model), 0)
    return model


def with_peft(model, config=None, seed: int = 0) -> Any:
    """Return a model with an adapter that PEFT draws from a seed, by default LoRA of rank 3."""
    with seed_generators(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config or peft.LoraConfig(**QV, r=3))


def arguments(out: Path, accumulate: int = 1, **settings: Any) -> TrainingArguments:
    """Return arguments with which the Trainer does the same as ``train`` by default."""
    own = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // accumulate,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-2,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(out), **own | settings)


def by_trainer(
    model,
    rows,
    out: Path,
    method=None,
    *,
    clip=1.0,
    recorder=None,
    recorder_first=False,
    others=(),
    accumulate=1,
    resume=None,
    eval_dataset=None,
    compute_metrics=None,
    draw=0,
    optimizer=None,
    **settings,
):
    """Train a model with the Trainer, with or without a method; return the Trainer."""
    with seed_generators(draw):
        kwargs: dict[str, Any] = {"callbacks": []} if method is None else ls.trainer_kwargs(method, model, clip=clip)
    recorders = [recorder] if recorder else []
    own = kwargs.pop("callbacks")
    if optimizer is not None:
        kwargs["optimizers"] = (optimizer, None)
    callbacks = [*recorders, *own, *others] if recorder_first else [*own, *recorders, *others]
    args = arguments(out, accumulate, **settings)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_weights(one, other):
    """Check that the parameters of two models are bitwise equal."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert left.keys() == right.keys()
    for name, parameter in left.items():
        assert torch.equal(parameter, right[name]), name


def same_rows(one, other, but):
    """Check that two tables have bitwise equal rows, except for some quantities and the run id."""
    tables = []
    for table in (one, other):
        kept = table[~table["quantity"].isin(but)].drop(columns="run")
        plain = kept.astype(dict.fromkeys(["module", "stack", "role", "quantity"], "str"))
        tables.append(plain.sort_values(["step", "quantity", "module", "index"]).reset_index(drop=True))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(tables[0])
