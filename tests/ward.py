"""Base of the doctor's test cases: a tiny model, its training rows, and functions to train and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from trainers import QV, ROWS, by_trainer, fresh, training_rows, with_peft
from transformers import TrainerCallback

import lorascope as ls

SETTINGS = {"steps": 6, "batch_size": ROWS, "eval_every": 0, "test_size": 16, "progress": False, "device": "cpu"}


class Bench:
    """Model folder, task and output folder of one test case."""

    def __init__(self, bert: str, gpt2: str, task: Any, out: Path) -> None:
        self.folder, self.gpt2, self.task, self.out = bert, gpt2, task, out
        self.observe: Any = None
        self.rows = training_rows(bert, task)

    def peft(self, config: Any = None, **options: Any) -> Any:
        """Return a PEFT model, by default with LoRA of rank 4 on query and value."""
        config = config or peft.LoraConfig(**QV | {"r": 4, "lora_alpha": 8} | options)
        return with_peft(fresh(self.folder, self.task), config)

    def trained(self, model: Any, **settings: Any) -> ls.Run:
        """Train a model with the Trainer and return the recorded run."""
        by_trainer(model, self.rows, self.out, recorder=ls.TrainerRecorder(observe=self.observe), **settings)
        return ls.load(self.out / "lorascope")

    def saved(self, model: Any, base: bool = False) -> ls.Run:
        """Save the adapter, optionally with its base model, and load it as a run."""
        model.save_pretrained(self.out / "adapter")
        if not base:
            return ls.load(self.out / "adapter")
        model.unload().save_pretrained(self.out / "base")
        return ls.load(self.out / "adapter", self.out / "base")

    def trained_and_saved(self, model: Any, base: bool = False, **settings: Any) -> ls.Run:
        self.trained(model, **settings)
        return self.saved(model, base)

    def by_train(self, method: Any, **settings: Any) -> ls.Run:
        """Return a run of ``train``."""
        settings = SETTINGS | {"observe": self.observe} | settings
        return ls.train(fresh(self.folder, self.task), self.task, method, out=self.out / "run", **settings)


class Allocating(TrainerCallback):
    """Callback that calls PEFT's AdaLoRA allocator after each optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **trainer):
        model.base_model.update_and_allocate(state.global_step)


def adalora(**options: Any) -> Any:
    return peft.AdaLoraConfig(**QV | {"init_r": 6, "target_r": 2} | options)
