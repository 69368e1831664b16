"""Start of a training from the adapter of a run or of PEFT, as LoRA's MRPC, RTE and STS-B start from that of MNLI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorascope.adapters.delta import attached_deltas
from lorascope.files.printable import printable
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import AdapterMethod, Method, Phase, task_head
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load
from lorascope.runs.manifest import Start
from lorascope.runs.plain_lora import plain_lora_problem
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
        _require_startable(method, phase)
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


@dataclass(frozen=True)
class StartFolder:
    """LoRA of PEFT whose factors are the start of a training; its base weights are not known, only their shapes."""

    adapter: Adapter

    @property
    def origin(self) -> Start:
        """Part of the identity of the run that starts from it."""
        return Start(self.adapter.id, head=False)

    @property
    def _cannot(self) -> str:
        return f"cannot start from {self.adapter.reference}"

    def require_fit(self, method: Method, phase: Phase, w0_hash: str) -> None:
        """Raise a ValueError if a training cannot start from the folder: other method, or phases."""
        _require_startable(method, phase)
        if method.name != "lora":
            raise ValueError(f"{self._cannot}: its method is lora, not {method.name}")

    def copy_to(self, model: nn.Module) -> None:
        """Copy the factors into a model with the adapters of a new training.

        Raises
        ------
        ValueError
            The folder adapts other modules, or an adapter has another rank, scale or shape.
        """
        deltas, factors = attached_deltas(model), self.adapter.factors()
        if missing := [name for name in deltas if name not in factors]:
            raise ValueError(f"{self._cannot}: it does not adapt {missing[0]}")
        if extra := [name for name in factors if name not in deltas]:
            raise ValueError(f"{self._cannot}: it also adapts {printable(extra[0])}")
        with torch.no_grad():
            for module, delta in deltas.items():
                assert isinstance(delta, LoRADelta)
                self._require_sizes(module, delta)
                for name, array in factors[module].items():
                    parameter, shape = delta.get_parameter(name), tuple(array.shape)
                    if shape != parameter.shape:
                        expected = tuple(parameter.shape)
                        raise ValueError(f"{self._cannot}: its {name} of {module} has shape {shape}, not {expected}")
                    parameter.copy_(torch.tensor(array))

    def _require_sizes(self, module: str, delta: LoRADelta) -> None:
        """Raise a ValueError if the folder has another rank or scale of a module."""
        stored = self.adapter.files.parts[module]
        if stored.rank != delta.rank:
            raise ValueError(f"{self._cannot}: its rank of {module} is {stored.rank}, not {delta.rank}")
        # PEFT divides in the same way, so that equal settings give equal numbers.
        if stored.scale != delta.scale:
            sizes = f"{stored.scale:g}, not {delta.scale:g}"
            raise ValueError(f"{self._cannot}: its scale of {module} is {sizes}: set alpha, or rslora")


def _require_startable(method: Method, phase: Phase) -> None:
    """Raise a ValueError unless a method can start from an adapter."""
    if not isinstance(method, AdapterMethod):
        raise ValueError(f"cannot start {type(method).__name__} from an adapter: fold it into the model first")
    if phase.name:
        raise ValueError(f"cannot start {type(method).__name__} from an adapter: it trains in phases")


def open_start(start: Run | str | Path, with_head: bool) -> StartAdapter | StartFolder:
    """Open the run, or the LoRA of PEFT, to start from.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    ValueError
        It is not a finished run of ``train`` whose weights are still stored, or not a plain LoRA of PEFT.
    """
    run = start if isinstance(start, Run) else load(start)
    if isinstance(run, Adapter):
        if problem := plain_lora_problem(run):
            raise ValueError(f"cannot start from {run.reference}: {problem}")
        if with_head:
            raise ValueError(f"start_head requires a run of ls.train as start, got {run.reference}")
        return StartFolder(run)
    if not isinstance(run, Run) or run.meta.status != "done" or not run.restorable:
        allowed = "a finished run of ls.train with its weights, or a LoRA folder of PEFT"
        raise ValueError(f"start must be {allowed}, got {printable(str(start))}")
    return StartAdapter(run, with_head)
