"""Start of a training from the adapter of a finished run, as LoRA's MRPC, RTE and STS-B start from that of MNLI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorascope.files.printable import printable
from lorascope.methods.method import AdapterMethod, Method, Phase, task_head
from lorascope.runs.loading import load
from lorascope.runs.manifest import Start
from lorascope.runs.run import Run


@dataclass(frozen=True)
class StartAdapter:
    """Finished run whose adapter is the start of a training, and whether its task head is as well."""

    run: Run
    with_head: bool

    @property
    def origin(self) -> Start:
        """Part of the identity of the run that starts from it."""
        return Start(self.run.id, self.with_head)

    def require_fit(self, method: Method, phase: Phase, w0_hash: str) -> None:
        """Raise a ValueError if a training cannot start from this run: other method, phases, or other base weights."""
        if not isinstance(method, AdapterMethod):
            raise ValueError(f"cannot start {type(method).__name__} from an adapter: fold it into the model first")
        if phase.name:
            raise ValueError(f"cannot start {type(method).__name__} from an adapter: it trains in phases")
        cannot = f"cannot start from run {self.run.id}"
        if self.run.meta.method["name"] != method.name:
            raise ValueError(f"{cannot}: its method is {self.run.meta.method['name']}, not {method.name}")
        if self.run.meta.w0_hash != w0_hash:
            raise ValueError(f"{cannot}: its base weights differ, it was trained on {self.run.meta.model}")

    def copy_to(self, model: nn.Module) -> None:
        """Copy the last factors, and the head if requested, into a model with the adapters of a new training.

        Raises
        ------
        ValueError
            The run does not adapt a module, or a factor has another shape.
        """
        stored: dict[str, Any] = dict(self.run.tensors("last"))
        head = task_head(model).keys()
        cannot = f"cannot start from run {self.run.id}"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad or (name in head and not self.with_head):
                    continue
                if name not in stored:
                    raise ValueError(f"{cannot}: it did not train {name}")
                tensor = torch.tensor(stored[name])
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{cannot}: its {name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensor)


def open_start(start: Run | str | Path, with_head: bool) -> StartAdapter:
    """Open the run to start from.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    ValueError
        It is not a finished run of ``train``, or its weights are not stored any more.
    """
    run = start if isinstance(start, Run) else load(start)
    if not isinstance(run, Run) or run.meta.status != "done" or not run.restorable:
        raise ValueError(f"start must be a finished run of ls.train with its weights, got {printable(str(start))}")
    return StartAdapter(run, with_head)
