"""Training policies: what a method is, what it is given at each step, and the phases it may ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs.models import missing
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.deprecation import former, to_new_fields, warn_renamed
from lorascope.schema.labels import to_words
from lorascope.schema.records import Item

METHODS: dict[str, type[Method]] = {}
Batch = dict[str, Tensor]


def added_later() -> dict[str, Any]:
    """Return the metadata of a field that older runs do not have.

    A field with this metadata is part of a run's identity only if it differs from its default, so the ids of older runs
    stay the same.
    """
    return {"later": True}


@dataclass(kw_only=True)
class Method:
    """A training policy. Its fields are the hyper-parameters; attributes ending in ``_`` are learned state.

    A subclass is registered under the ``name`` given in its class statement: ``class LoRA(Method, name="lora")``.
    The loop calls, in this order at every step: ``before_step``, loss and backward, ``after_backward``, clipping, the
    optimizer, the scheduler, ``after_step``, ``records``.

    Parameters
    ----------
    lr, head_lr : float
        Default rates of adapter and head; ``train(lr=, head_lr=)`` overrides them.
    search_share : float
        Share of the train split carved off as the search split.
    """

    lr: float = 1e-4
    head_lr: float = 1e-4
    search_share: float = 0.0
    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or cls.__name__.lower()
        if name:
            METHODS[name] = cls
        if "held_still" in vars(cls) and "frozen_entry_count" not in vars(cls):
            warn_renamed(cls.__name__, "held_still", "frozen_entry_count")

    def prepare(self) -> None:
        """Read what the hyper-parameters refer to, such as a run's folder; called before they are stored or used."""

    def attach(self, model: nn.Module) -> None:
        """Inject Deltas and/or set ``requires_grad``; required."""
        raise NotImplementedError(f"{type(self).__name__} has no attach")

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over what ``attach`` left trainable, in the groups ``adapter`` and ``head``."""
        return torch.optim.AdamW(parameter_groups(model, lr, head_lr, weight_decay), lr=lr, weight_decay=weight_decay)

    def before_step(self, step: Step) -> None:
        """Choose what trains now, or solve an outer problem on the step's batch."""

    def after_backward(self, step: Step) -> None:
        """Edit gradients; a penalty calls its own ``backward`` here."""

    def after_step(self, step: Step) -> None:
        """Score, mask, grow or prune; gradients are still there."""

    def records(self, step: Step) -> Iterable[Item]:
        """What the method decided, to be kept in the table."""
        return ()

    def frozen_entry_count(self) -> int:
        """Entries of the optimizer's parameters that never change, and so count as no trained ones."""
        return 0

    def held_still(self) -> int:
        """Deprecated: use ``frozen_entry_count``."""
        warn_renamed(type(self).__name__, "held_still", "frozen_entry_count")
        return self.frozen_entry_count()

    def label(self) -> str:
        """The method in words, rates left out: its name and the hyper-parameters that are not the default ones."""
        default = config(type(self)())
        mine = {key: value for key, value in config(self).items() if key not in ("name", "lr", "head_lr")}
        told = [
            f"{key} {to_words(value)}" for key, value in mine.items() if key not in default or value != default[key]
        ]
        return ", ".join([type(self).__name__, *told])

    def state(self) -> dict[str, Any]:
        """Everything learned: each attribute ending in ``_``."""
        return {key: value for key, value in vars(self).items() if key.endswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        for key, value in state.items():
            setattr(self, key, value)

    def settled(self, step: Step) -> bool:
        """May the best state be chosen at this step?"""
        return True

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """The phases of the paper, one after the other; each gives back its Run."""
        yield Phase(self)


@dataclass(frozen=True)
class Phase:
    """One training run of a recipe.

    Parameters
    ----------
    method : Method
        What trains.
    name : str
        Folder name of the phase; "" is the run folder itself.
    split : str
        Splits trained on, joined by "+": ``"train"`` or ``"train+search"``.
    steps, lr : number or None
        Optimizer steps, and a rate that was set for this phase alone; None takes those of ``train``.
    """

    method: Method
    name: str = ""
    split: str = "train"
    steps: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """Rows that nothing is trained on, and the group (domain) of each.

    Parameters
    ----------
    batch : dict of tensors
        As a step's batch.
    groups : list of str or None
        None where the task has no groups.
    """

    batch: Batch = field(repr=False)
    groups: list[str] | None


@dataclass
class Step:
    """What methods and observers see of one optimizer step.

    Parameters
    ----------
    index : int
        0-based number of the step; -1 before the first.
    total : int
        Optimizer steps of the phase.
    model, optimizer
        The living ones.
    batch : dict of tensors
        The whole batch of the step.
    base : mapping parameter name -> tensor
        W_0, read-only.
    modules : DataFrame
        ``names.describe`` of the model before ``attach``.
    shows_text : bool
        Is there held-out text? A Trainer has none for us.
    """

    index: int
    total: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    base: Mapping[str, Tensor]
    modules: pd.DataFrame
    compute_loss: Callable[[nn.Module, Batch, Mapping[str, Tensor] | None], Tensor] = field(repr=False)
    draw: Callable[[int | None, bool], Batch] = field(repr=False)
    unseen: Callable[[int | None], HeldOut] = field(repr=False)
    batch: Batch = field(default_factory=dict, repr=False)
    best: bool = False
    shows_text: bool = True

    @property
    def finished(self) -> int:
        """Finished optimizer steps, the ``step`` of the records made after ``after_step``."""
        return self.index + 1

    @property
    def last(self) -> bool:
        """Is this the phase's last step?"""
        return self.finished == self.total

    def loss(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Task loss of a batch, as in training, leaving RNG, buffers and gradients alone.

        Parameters
        ----------
        batch : dict of tensors
            As given by ``batch`` or ``validation``.
        params : mapping parameter name -> tensor, optional
            Replaces the model's own parameters for this call.

        Returns
        -------
        Tensor ()
            Differentiable in ``params``, twice where the model's attention is
            (``attn_implementation="eager"`` always is).
        """
        cuda = [p.device for p in self.model.parameters() if p.is_cuda][:1]
        with torch.random.fork_rng(devices=cuda):
            return self.compute_loss(self.model, batch, params or {})

    def validation(self, size: int | None = None, fixed: bool = False) -> Batch:
        """A batch of the search split, drawn by a generator of its own.

        Parameters
        ----------
        size : int, optional
            Rows; the training batch size by default.
        fixed : bool
            Always the same rows.
        """
        return self.draw(size, fixed)

    def held_out(self, size: int | None = None) -> HeldOut:
        """The first rows of the validation split, always the same ones: text to look at the model by.

        Parameters
        ----------
        size : int, optional
            Rows; all that validation uses by default.
        """
        return self.unseen(size)


def parameter_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in the named groups ``adapter`` and ``head``; biases and norms are not decayed."""
    head = {id(parameter) for parameter in task_head(model).values()}
    # As in transformers, biases are found by name: T5's position bias is a matrix.
    decays = {id(p): p.ndim > 1 and "bias" not in name for name, p in model.named_parameters()}
    groups = []
    for name, rate in (("adapter", lr), ("head", head_lr)):
        members = [p for p in model.parameters() if p.requires_grad and (id(p) in head) == (name == "head")]
        for decay, decayed in ((weight_decay, True), (0.0, False)):
            if chosen := [p for p in members if decays[id(p)] == decayed]:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": name})
    return groups


def task_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to the task: a head that is not over the vocabulary, and what the checkpoint lacked."""
    description = module_table.describe(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    heads = description[(description["role"] == "head") & (description["out_features"] != vocabulary)]["module"]
    # A head of several layers (dense, then projection) is one child of the model; all of it belongs to the task.
    roots = {head.rpartition(".")[0] or head for head in heads}
    adapters = {id(parameter) for delta in attached_deltas(model).values() for parameter in delta.parameters()}
    lacked = missing(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in adapters and (name in lacked or any(name.startswith(f"{root}.") for root in roots))
    }


def train_adapters(model: nn.Module) -> None:
    """Freeze everything but the attached Deltas and the task's head."""
    model.requires_grad_(False)
    for delta in attached_deltas(model).values():
        delta.requires_grad_(True)
    for parameter in task_head(model).values():
        parameter.requires_grad_(True)


def config(method: Method) -> dict[str, Any]:
    """The JSON form of a method: its name and its hyper-parameters.

    A Run stands as its id, an array as the hash of its bytes. A field that was renamed keeps its old name and values.
    """
    method.prepare()
    values = [(f, getattr(method, f.name)) for f in fields(method) if f.init and not f.name.endswith("_")]
    told = [(former(f), value) for f, value in values if "later" not in f.metadata or value != f.default]
    return {"name": method.name} | {before.name: _to_json_value(before.to_old(value)) for before, value in told}


def _to_json_value(value: Any) -> Any:
    if isinstance(value, Run):
        return {"run": value.id}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        return {"array": digest.hexdigest()}
    if isinstance(value, Mapping):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item) for item in value]
    # 8 and 8.0 are the same hyper-parameter, and so the same run.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def frozen_entries(method: Method) -> int:
    """Return ``method.frozen_entry_count()``; of a class that still defines the hook by its old name, that one."""
    if type(method).held_still is not Method.held_still:
        return method.held_still()
    return method.frozen_entry_count()


def from_config(stored: Mapping[str, Any]) -> Method:
    """Build a method from its JSON form, in which a renamed field may have its old or its new name.

    Raises
    ------
    ValueError
        The name is not registered.
    """
    if (name := stored["name"]) not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k != "name"}
    return METHODS[name](**to_new_fields(METHODS[name], values))
