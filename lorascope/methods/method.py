"""Base class of the methods, the step that they receive, and the phases of a training run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attach, attached_deltas
from lorascope.adapters.weight_parts import add_parts, find_host
from lorascope.inputs.models import missing
from lorascope.inputs.tasks import Task
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.fused_parts import PART_ROLES, part_roles, split_part_name
from lorascope.schema.labels import to_words
from lorascope.schema.records import Item
from lorascope.schema.suggestions import unknown_name

METHODS: dict[str, type[Method]] = {}
Batch = dict[str, Tensor]
T = TypeVar("T")


def added_later() -> dict[str, Any]:
    """Return the metadata of a field of a method that older runs do not have.

    A field with this metadata is part of a run's identity only if it differs from its default, so the ids of older runs
    stay the same.
    """
    return {"later": True}


class Stateful:
    """Base class of methods and observers: attributes ending in ``_`` are their state, which checkpoints store."""

    def state(self) -> dict[str, Any]:
        """Return the state: every attribute whose name ends in ``_``."""
        return {key: value for key, value in vars(self).items() if key.endswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state`` returned."""
        for key, value in state.items():
            setattr(self, key, value)


@dataclass(kw_only=True)
class Method(Stateful):
    """Base class of the methods: fields are hyperparameters; attributes ending in ``_`` are learned state.

    The class statement registers a subclass under its ``name``: ``class LoRA(Method, name="lora")``. At every step
    the loop calls, in this order: ``before_step``, loss and backward, ``after_backward``, gradient clipping, the
    optimizer, the scheduler, ``after_step`` and ``records``.

    Parameters
    ----------
    lr, head_lr : float
        Default learning rates of adapter and classifier head; ``train(lr=, head_lr=)`` overrides them.
    search_share : float
        Fraction of the train split reserved as the search split.
    """

    lr: float = 1e-4
    head_lr: float = 1e-4
    search_share: float = 0.0
    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or cls.__name__.lower()
        if name:  # users cannot choose a class without one, such as NeFT's phase of probing
            METHODS[name] = cls

    @classmethod
    def example(cls) -> Method:
        """Return the method for a few steps of a tiny model, on which the tests train every method."""
        return cls(lr=1e-2)

    def prepare(self) -> None:
        """Load what the hyperparameters refer to, such as a run's folder; called before they are stored or used."""

    def attach(self, model: nn.Module) -> None:
        """Attach Deltas, set ``requires_grad``, or both. Every method must define it."""
        raise NotImplementedError(f"{type(self).__name__} must define attach")

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW over all trainable parameters, in the groups ``adapter`` and ``head``."""
        return torch.optim.AdamW(parameter_groups(model, lr, head_lr, weight_decay), lr=lr, weight_decay=weight_decay)

    def before_step(self, step: Step) -> None:
        """Select the parameters that train at this step, or solve an outer problem on its batch."""

    def after_backward(self, step: Step) -> None:
        """Modify gradients; a penalty calls its own ``backward`` here."""

    def after_step(self, step: Step) -> None:
        """Score, mask, add or remove components; gradients are still available."""

    def records(self, step: Step) -> Iterable[Item]:
        """Return the method's own values for the table, such as ranks and scores."""
        return ()

    def frozen_entry_count(self) -> int:
        """Return the number of optimizer entries that never change and so are not counted as trained."""
        return 0

    def label(self) -> str:
        """Return the method's name and its non-default hyperparameters as text, without learning rates."""
        default = config(type(self)())
        words = [type(self).__name__]
        for key, value in config(self).items():
            # The default lacks fields that were added later.
            is_default = key in default and value == default[key]
            if key not in ("name", "lr", "head_lr") and not is_default:
                words.append(f"{key} {to_words(value)}")
        return ", ".join(words)

    def settled(self, step: Step) -> bool:
        """Return whether this step may be selected as the best state."""
        return True

    def phases(self, base: Mapping[str, Tensor]) -> Generator[Phase, Run, None]:
        """Yield the phases of the method in order; each ``yield`` returns the finished Run of its phase."""
        yield Phase(self)

    def trainer_problem(self) -> str:
        """Return why a Trainer cannot train this method, with a fix, apart from several phases and a search split."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Return the facts that readers of a run need about its method, in JSON form.

        ``starts_at_zero`` is whether all initial updates are zero. ``caption_notes`` are predicates for the captions of
        figures, such as "keeps vectors dense". A method adds facts that only its own figures and checks use.
        """
        return {"starts_at_zero": True, "caption_notes": []}


class AdapterMethod(Method):
    """Base class of methods that add an adapter to every target module and train only adapters and the task's head.

    A subclass is a dataclass with a field ``targets``: roles, "all-linear", module names or a regular expression, see
    ``ls.module_table.match``. It implements ``delta``. The roles q, k and v select the parts of a fused weight.
    """

    targets: Any
    splits_fused: bool = True
    """Whether the roles q, k and v select parts of a fused weight; False for runs of earlier versions."""
    decomposes_base: ClassVar[bool] = False
    """Whether the update depends on W_0, which therefore must not be quantized."""

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        names = self.find_targets(model)
        self._deltas: dict[str, Any] = {name: self.delta(name, find_host(model, name)) for name in names}
        attach(model, self._deltas)
        train_adapters(model)

    def find_targets(self, model: nn.Module) -> list[str]:
        """Return the names of the modules to adapt, and of the parts of fused weights."""
        modules = module_table.describe(model)
        for target in self.named_targets():
            if split_part_name(target) or (target in PART_ROLES and self.splits_fused):
                return self.select_targets(add_parts(modules, model))
        return self.select_targets(modules)

    def named_targets(self) -> tuple[str, ...]:
        """Return the targets as a tuple."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets or ())

    def select_targets(self, modules: pd.DataFrame) -> list[str]:
        """Return the names of the modules to adapt, from the module table of the model."""
        return module_table.match(modules, self.targets)

    def delta(self, name: str, host: nn.Module) -> Delta:
        """Return the adapter of one module."""
        raise NotImplementedError(f"{type(self).__name__} must define delta")


def target_parts(method: Method, model: nn.Module) -> tuple[str, ...]:
    """Return the roles of the parts of fused weights that a method adapts in a model."""
    if not isinstance(method, AdapterMethod):
        return ()
    return part_roles(method.find_targets(model))


def require_quantizable(method: Method) -> None:
    """Raise a ValueError if a method trains or decomposes the base weights, which quantized ones do not allow."""
    name = type(method).__name__
    if not isinstance(method, AdapterMethod):
        raise ValueError(f"cannot quantize the base of {name}: it trains the weights")
    if method.decomposes_base:
        raise ValueError(f"cannot quantize the base of {name}: it decomposes W_0")


def copy_method(method: Any, **changes: Any) -> Any:
    """Return a method without its state, with changed fields, that selects the same parts of fused weights."""
    twin = replace(method, **changes)
    if isinstance(method, AdapterMethod):
        twin.splits_fused = method.splits_fused
    return twin


@dataclass(frozen=True)
class Phase:
    """Phase of a method: one training run of its recipe.

    Parameters
    ----------
    method : Method
        Method that trains in this phase.
    name : str
        Folder name of the phase; "" is the run folder itself.
    split : str
        Splits trained on, joined by "+": ``"train"`` or ``"train+search"``.
    steps, lr : number or None
        Optimizer steps, and a learning rate set only for this phase; None uses the values of ``train``.
    """

    method: Method
    name: str = ""
    split: str = "train"
    steps: int | None = None
    lr: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows for a method as the batch of a step, and the group (domain) of each; None without groups."""

    batch: Batch = field(repr=False)
    groups: list[str] | None


def _all_rows(batch: Batch) -> tuple[Batch, float]:
    return batch, 1.0


def _same_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return tensors


@dataclass
class Step:
    """One optimizer step, as the hooks of a method and the observers receive it.

    Parameters
    ----------
    index : int
        0-based step number; -1 before the first step.
    total : int
        Number of optimizer steps of the phase.
    model, optimizer
        The objects in training, not copies.
    batch : dict of tensors
        Full batch of the step.
    base : mapping parameter name -> tensor
        Base weights W_0, read-only.
    modules : DataFrame
        Table of ``ls.module_table.describe``, with the adapted parts of fused weights.
    shows_text : bool
        Whether held-out text is available; a Trainer provides none.
    values : dict
        Latest recorded values of the whole run, such as ``loss`` and ``lr``, each with its step.
    stop : str
        Reason for which an observer asks to stop the training; empty to continue.
    adapter_names : tuple of str, optional
        Names of the PEFT adapters that train, as they were active at the start; by default those active now.
    task : Task, optional
        Task of the training; None in the training of another program.
    max_length : int, optional
        Maximum number of tokens per text of the task.
    local_rows : callable
        Returns the rows of a batch that this process computes, and the weight of their mean loss in that of the batch.
    sum_processes : callable
        Returns the sums over all processes of tensors by name, such as gradients of weighted losses.
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
    values: dict[str, tuple[int, Any]] = field(default_factory=dict, repr=False)
    stop: str = ""
    adapter_names: tuple[str, ...] | None = None
    task: Task | None = field(default=None, repr=False)
    max_length: int | None = None
    local_rows: Callable[[Batch], tuple[Batch, float]] = field(default=_all_rows, repr=False)
    sum_processes: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = field(default=_same_tensors, repr=False)

    @property
    def finished(self) -> int:
        """Number of finished optimizer steps: the ``step`` of the records made after ``after_step``."""
        return self.index + 1

    @property
    def last(self) -> bool:
        """Whether this is the last step of the phase."""
        return self.finished == self.total

    def loss(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the task loss of a batch as in training, without changing RNG state, buffers or gradients.

        Parameters
        ----------
        batch : dict of tensors
            Same form as ``batch`` or the result of ``validation``.
        params : mapping parameter name -> tensor, optional
            Values that replace the model's parameters for this call.

        Returns
        -------
        Tensor ()
            Differentiable with respect to ``params``; twice if the model's attention is
            (``attn_implementation="eager"`` always is).
        """
        # Dropout in this call must not change the random numbers of training.
        cuda = [parameter.device for parameter in self.model.parameters() if parameter.is_cuda][:1]
        with torch.random.fork_rng(devices=cuda):
            return self.compute_loss(self.model, batch, params or {})

    def validation(self, size: int | None = None, fixed: bool = False) -> Batch:
        """Return a batch of the search split, drawn with a separate generator.

        Parameters
        ----------
        size : int, optional
            Number of rows; by default the training batch size.
        fixed : bool
            Whether every call returns the same rows.
        """
        return self.draw(size, fixed)

    def held_out(self, size: int | None = None) -> HeldOut:
        """Return the first rows of the validation split, the same at every call, for recordings on held-out text.

        Parameters
        ----------
        size : int, optional
            Number of rows; by default all rows that validation uses.
        """
        return self.unseen(size)


def parameter_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return what a method trains in the groups ``adapter`` and ``head``; biases and norms have no weight decay."""
    head = task_head(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, rate in (("adapter", lr), ("head", head_lr)):
        for decays, decay in ((True, weight_decay), (False, 0.0)):
            groups[name, decays] = {"params": [], "lr": rate, "weight_decay": decay, "name": name}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Biases are recognized by name, as in transformers, because T5's position bias is a matrix.
            decays = parameter.ndim > 1 and "bias" not in name
            groups["head" if name in head else "adapter", decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def task_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what methods train for the task: a head not over the vocabulary, and parameters a checkpoint lacks."""
    description = module_table.describe(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    heads = description[(description["role"] == "head") & (description["out_features"] != vocabulary)]["module"]
    # A head of several layers (dense, then projection) is one child of the model: all its layers belong to the task.
    roots = {head.rpartition(".")[0] or head for head in heads}
    prefixes = tuple(f"{root}." for root in roots)
    adapters = tuple(f"{module}.delta." for module in attached_deltas(model))
    head, new = {}, missing(model)
    for name, parameter in model.named_parameters():
        if (name in new or name.startswith(prefixes)) and not name.startswith(adapters):
            head[name] = parameter
    return head


def train_adapters(model: nn.Module) -> None:
    """Freeze all that an adapter method does not train: all except the attached Deltas and the task's head."""
    model.requires_grad_(False)
    for delta in attached_deltas(model).values():
        delta.requires_grad_(True)
    for parameter in task_head(model).values():
        parameter.requires_grad_(True)


def config(method: Method) -> dict[str, Any]:
    """Return the JSON form of a method: its name and its hyperparameters.

    A Run is written as its id, an array as the hash of its bytes.
    """
    # A reference that is given as a path is written as the id of its run.
    method.prepare()
    return {"name": method.name} | {name: _to_json_value(value) for name, value in stored_fields(method).items()}


def stored_fields(settings: Any) -> dict[str, Any]:
    """Return the fields of a method or observer that identify a run."""
    stored = {}
    for f in fields(settings):
        if not f.init or f.name.endswith("_"):
            continue
        value = getattr(settings, f.name)
        if "later" not in f.metadata or value != f.default:
            stored[f.name] = value
    return stored


def python_number(value: Any) -> Any:
    """Return a scalar of numpy in a method or in settings as a number for JSON, and other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _to_json_value(value: Any) -> Any:
    if isinstance(value, Run):
        return {"run": value.id}
    value = python_number(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        return {"array": digest.hexdigest()}
    if isinstance(value, Mapping):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item) for item in value]
    # 8 and 8.0 are the same hyperparameter, so they must give the same run id.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that a method trains, which its optimizer may change and clipping covers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def reject_embedding(method: Method, name: str, host: nn.Module) -> None:
    """Raise a ValueError if the target ``name`` of a method that adapts linear layers only is an embedding."""
    if isinstance(host, nn.Embedding):
        supports = f"{type(method).__name__} supports linear layers"
        raise ValueError(f"cannot adapt embedding {name!r}: {supports}. Remove it from targets")


def from_config(stored: Mapping[str, Any]) -> Method:
    """Build a method from its JSON form."""
    name = stored["name"]
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    values = dict(stored)
    del values["name"]
    for key, value in values.items():
        if isinstance(value, list):  # JSON has no tuples
            values[key] = tuple(value)
    return METHODS[name](**values)
