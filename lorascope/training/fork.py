"""Forks: continue a run from a stored checkpoint with one change, so that the difference is the effect of the change.

A fork loads all that an interrupted run resumes from: trained tensors, optimizer state by name, scheduler, method,
observers, random generators and best state. The order of the rows depends on seed and epoch only, so fork and trunk see
the same batches, and a fork without a change is the trunk bit by bit.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas, resize
from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.inputs import tasks
from lorascope.inputs.tasks import Task
from lorascope.methods.field_checks import is_integer
from lorascope.methods.lora import LoRA, LoRADelta
from lorascope.methods.method import AdapterMethod, Method, Phase, Step, config, copy_method, from_config
from lorascope.observe.observer import OBSERVERS, Observer
from lorascope.runs.folders import lock_run
from lorascope.runs.manifest import Fork, Manifest
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.schema.fused_parts import part_roles
from lorascope.schema.suggestions import unknown_name
from lorascope.training.base_weights import TrainingMarker, begin_training, convert_weights, prepare_model
from lorascope.training.checkpoints import Checkpoint, Checkpoints
from lorascope.training.loop import fit, reset_model, usable_device
from lorascope.training.output_folder import finished_run, prepare_folder
from lorascope.training.processes import require_single
from lorascope.training.run_spec import RunSpec, reload_model, reload_task
from lorascope.training.session import Session
from lorascope.training.settings import Settings
from lorascope.training.state import seed_generators, trained_tensors

RATES = ("lr", "head_lr", "weight_decay", "clip", "schedule")
"""Settings of ``train`` that a fork can change."""
# Fields of a method that are settings of ``train``, or that choose the rows of the splits.
_FIXED = ("lr", "head_lr", "search_share")
_CHECKPOINT_EVERY = 100  # as in train


def fork(
    run: Result,
    model: nn.Module | str | Path | None = None,
    task: Task | str | Path | None = None,
    *,
    step: int,
    out: str | Path | None = None,
    method: Method | None = None,
    device: str | None = None,
    progress: bool = True,
    **change: Any,
) -> Run:
    """Continue a run from a stored checkpoint with one change, and train it to its last step.

    Parameters
    ----------
    run : Run
        Run of ``train``, the trunk. For a method with several phases, the phase to fork.
    model : Module, str or path, optional
        Its base model, freshly loaded and trained in place, or its name; by default the name in the run.
    task : Task, str or path, optional
        Its data; by default the name in the run.
    step : int
        Number of finished steps after which the change begins: a step of ``train(keep_checkpoints=)``, or 0 for a fresh
        training with the change.
    out : path, optional
        Run folder; by default a folder next to that of the trunk, which is where ``fork.trunk`` finds it.
    method : Method, optional
        Method of the run; required only if its configuration does not contain all of it, such as an array.
    device : str, optional
        Device; by default an accelerator if available, else the CPU. The result is bitwise on the device of the trunk.
    progress : bool
        Show a progress bar.
    **change
        ``lr``, ``head_lr``, ``weight_decay``, ``clip``, ``schedule``: settings of ``train`` from this step on.
        ``rows``: another task with the same labels, whose training rows follow; it is evaluated on the rows of the
        trunk. Fields of the method, whose state stays. ``rank`` of LoRA or DoRA: alpha changes with it, so that the
        scale stays; new components start at zero and leave the update unchanged, and a smaller rank cuts it by its
        singular value decomposition and restarts the moments of its factors.

    Returns
    -------
    Run
        The fork, whose ``trunk`` is the run. Its records begin with those of the trunk. The same call returns a
        finished fork and resumes an unfinished one.

    Raises
    ------
    ValueError
        There is no checkpoint of this step, the change is invalid or does not fit the stored state, the model or the
        task is not that of the run, or the run has no optimizer state.

    Examples
    --------
    >>> run = ls.train("minilm", "sentiment", "lora", steps=100, keep_checkpoints=(50,))  # doctest: +SKIP
    >>> ls.fork(run, step=50, lr=1e-4)  # doctest: +SKIP
    """
    # Before the model is loaded, which takes longest.
    require_single("fork a run")
    run = _require_step(run, step)
    device = usable_device(device)
    opened_task = _open_task(run, task)
    model = _open_model(run, model, opened_task)
    task = opened_task.fit(model)
    quantize = run.meta.settings.get("quantize")
    convert_weights(model, run.meta.settings.get("dtype"), quantize, device)
    marker = prepare_model(model, task, run.seed, quantize, device)
    trunk = _rebuild_spec(run, marker, task, method)
    trunk.settings.set_computation(model)
    spec = _change_spec(trunk, run, step, change, model)
    if marker.recipe not in ("", spec.id):
        raise ValueError(f"cannot fork on a model that was trained as recipe {marker.recipe}; load a fresh model")
    folder = _folder_of(run, spec.id) if out is None else Path(out)
    prepare_folder(folder, spec.id, overwrite=False)
    forked = finished_run(folder, spec)
    if forked is not None:
        # As after a training, the model of the caller has the trained weights.
        forked.restore(model, method=copy_method(spec.phase.method))
        marker.attach(model, spec.id)
    else:
        begun = _begin_trunk(trunk, model, marker)
        with seed_generators(run.seed):
            # It rejects a change that does not fit before the folder is created.
            session = ForkSession(model, spec, marker.base, folder, run, begun, device)
            with lock_run(folder):
                marker.attach(model, spec.id)
                forked = fit(session, _CHECKPOINT_EVERY, progress)
    vars(forked)["trunk"] = run
    return forked


@dataclasses.dataclass(frozen=True)
class ForkSpec(RunSpec):
    """Specification of a fork: that of its trunk with the change applied, and the manifest of the trunk."""

    # RunSpec has fields with defaults, so these need one.
    fork: Fork = dataclasses.field(default_factory=lambda: Fork("", 0, {}))
    trunk: Manifest | None = None

    def meta(self, step: Step, method: Method, parents: list[Run], device: str) -> Manifest:
        """Return ``run.json`` of the fork, with the label of the trunk and the change."""
        assert self.trunk is not None
        manifest = super().meta(step, method, parents, device)
        manifest.label = f"{self.trunk.label}, from step {self.fork.step}: {self.fork.description}"
        # A fork of one phase does not change the recipe of all phases.
        if self.trunk.recipe != self.trunk.method:
            manifest.recipe = self.trunk.recipe
        return manifest


class BegunTrunk(NamedTuple):
    """Class and initial parameter groups of the trunk's optimizer, which a change of the method may alter."""

    kind: type[torch.optim.Optimizer]
    groups: list[dict[str, Any]]


class ForkSession(Session):
    """Session of a fork: it begins with a kept checkpoint of its trunk, after which the change applies.

    Raises
    ------
    ValueError
        The stored state does not fit the change.
    """

    plan: ForkSpec

    def __init__(
        self,
        model: nn.Module,
        plan: ForkSpec,
        base: Any,
        path: Path,
        trunk: Run,
        begun: BegunTrunk,
        device: str,
    ) -> None:
        super().__init__(model, plan, base, path, [], device)
        assert trunk.path is not None
        self._trunk_path, self._begun = trunk.path, begun
        self._stored = None
        if plan.fork.step:
            self._stored = Checkpoints(trunk.path).read_kept(plan.fork.step)
            self._require_fit(self._stored[0])

    def start(self) -> int:
        """Load the checkpoint of the trunk, apply the change, and return the 0-based step to run next."""
        if self._stored is None:
            return super().start()
        checkpoint, table = self._stored
        initial = {name: (delta.A.detach(), delta.B.detach()) for name, delta in self._resized_deltas().items()}
        # The checkpoint replaces the options of these groups with those of the trunk.
        changed = self._changed_options()
        self.load(checkpoint)
        self._resize_factors(initial)
        for group, options in zip(self.optimizer.param_groups, changed, strict=True):
            group.update(options)
        # Without a change, keep the rates of a method that sets them itself.
        if self.plan.fork.change:
            factor = self.settings.rate()(self.scheduler.last_epoch)
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
                group["lr"] = rate * factor
        self.begin_rows(table.assign(run=self.plan.id).astype({"run": "category"}))
        self._copy_files(checkpoint)
        return checkpoint.finished

    def _require_fit(self, checkpoint: Checkpoint) -> None:
        """Raise a ValueError if the tensors or the optimizer of the fork do not fit a checkpoint."""
        tensors, stored = trained_tensors(self.model, self.optimizer), checkpoint.model
        # Other targets, for example.
        if single := sorted(tensors.keys() ^ stored.keys()):
            raise self._misfit(f"only one of both has {single[0]}")
        # Classes with equal groups may store other moments.
        if type(self.optimizer) is not self._begun.kind:
            raise self._misfit(f"the optimizer was {self._begun.kind.__name__}")
        free = set()
        for name, delta in attached_deltas(self.model).items():
            # Methods that allocate ranks have other shapes after the first steps anyway.
            if delta.resized or name in self._resized_deltas():
                free |= {f"{name}.delta.{parameter}" for parameter, _ in delta.named_parameters()}
        for name, tensor in tensors.items():
            if tensor.shape != stored[name].shape and name not in free:
                shapes = f"{tuple(stored[name].shape)}, and would be {tuple(tensor.shape)}"
                raise self._misfit(f"{name} has the shape {shapes}")

    def _misfit(self, reason: str) -> ValueError:
        change = ", ".join(f"{name}={value!r}" for name, value in self.plan.fork.change.items())
        step = self.plan.fork.step
        return ValueError(f"cannot fork with {printable(change)}: the state of step {step} does not fit: {reason}")

    def _resized_deltas(self) -> dict[str, LoRADelta]:
        """Return the adapters whose rank the fork changes."""
        if "rank" not in self.plan.fork.change or not isinstance(self.method, LoRA):
            return {}
        return {name: delta for name, delta in attached_deltas(self.model).items() if isinstance(delta, LoRADelta)}

    def _resize_factors(self, initial: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give the loaded factors the rank of ``initial``, the factors A and B with which a training would begin."""
        for name, delta in self._resized_deltas().items():
            A, B = initial[name]
            old, new = delta.rank, len(A)
            if new > old:
                # One of the two begins at zero, so their product does.
                resize(delta.A, self.optimizer, range(old), A[old:], 0)
                resize(delta.B, self.optimizer, range(old), B[:, old:], 1)
            elif new < old:
                for parameter, factor in zip((delta.B, delta.A), _cut_factors(delta.B, delta.A, new), strict=True):
                    parameter.data = factor.to(parameter)
                    # Moments belong to the old basis. Without any, Adam also restarts its bias correction.
                    self.optimizer.state.pop(parameter, None)

    def _changed_options(self) -> list[dict[str, Any]]:
        """Return the options of each parameter group that differ between the optimizers of fork and trunk."""
        changed = []
        for group, before in zip(self.optimizer.param_groups, self._begun.groups, strict=True):
            options = {}
            for name, value in group.items():
                # The rate follows from initial_lr below, and a generator is state.
                is_option = name not in ("params", "lr", "initial_lr") and not isinstance(value, torch.Generator)
                if is_option and value != before[name]:
                    options[name] = value
            changed.append(options | {"initial_lr": group["initial_lr"]})
        return changed

    def _copy_files(self, checkpoint: Checkpoint) -> None:
        """Copy what the trunk recorded up to the checkpoint, and its best state."""
        if checkpoint.best is not None:
            file = self.checkpoints.best_file(checkpoint.best.step)
            file.parent.mkdir(exist_ok=True)
            shutil.copyfile(self._trunk_path / "checkpoints" / file.name, file)
        # A snapshot is complete once its step has passed, so the trunk does not change these any more.
        for file in self._trunk_path.glob("snapshots/step-*.safetensors"):
            if int(file.stem.removeprefix("step-")) <= checkpoint.finished:
                (self.path / "snapshots").mkdir(exist_ok=True)
                shutil.copyfile(file, self.path / "snapshots" / file.name)


def _cut_factors(
    B: Float[Tensor, "out old"], A: Float[Tensor, "old in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the factors of the best approximation of B A of this rank, with equal norms, in float64."""
    Q, R = torch.linalg.qr(B.detach().double())
    P, S = torch.linalg.qr(A.detach().double().T)
    U, sigma, Vh = torch.linalg.svd(R @ S.T)
    root = sigma[:rank].sqrt()
    return (Q @ U[:, :rank]) * root, root.unsqueeze(1) * (Vh[:rank] @ P.T)


def _require_step(run: Result, step: Any) -> Run:
    """Return a run of ``train``; a ValueError reports another result, or a step that is neither 0 nor stored."""
    if not isinstance(run, Run) or run.meta.w0_hash is None:
        raise ValueError(f"cannot fork {run.kind} {run.id} ({run.label}): no optimizer state; fork a run of ls.train")
    if run.meta.fork is not None:
        raise ValueError(f"cannot fork run {run.id}: it is a fork itself; fork its trunk, run {run.meta.fork.run}")
    steps = [] if run.path is None else Checkpoints(run.path).kept_steps()
    if not is_integer(step) or step not in (0, *steps):
        allowed = f"0 or one of {', '.join(map(str, steps))} (stored checkpoints)"
        if not steps:
            allowed = f"0, because run {run.id} has no stored checkpoints"
        fix = f"train it with keep_checkpoints=({step!r},) to store it"
        raise ValueError(f"step must be {allowed}, got {step!r}: {fix}")
    return run


def _open_task(run: Run, task: Task | str | Path | None) -> Task:
    if isinstance(task, Task):
        return task
    try:
        return reload_task(run, run.task if task is None else str(task))
    except (OSError, ValueError) as error:
        if task is not None:
            raise
        raise ValueError(f"cannot load the task of run {run.id}: {printable(error)}; pass task=") from error


def _open_model(run: Run, model: nn.Module | str | Path | None, task: Task) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    try:
        return reload_model(run, run.meta.model if model is None else model, task)
    except (OSError, ValueError) as error:
        if model is not None:
            raise
        raise ValueError(f"cannot load the model of run {run.id}: {printable(error)}; pass model=") from error


def _rebuild_spec(run: Run, marker: TrainingMarker, task: Task, method: Method | None) -> RunSpec:
    """Return the specification of a run from its manifest, of which the run's id is a checksum."""
    meta = run.meta
    if marker.w0_hash != meta.w0_hash:
        raise ValueError(f"model must be {meta.model}, the base of run {run.id}, got one with different weights")
    if task.hash != meta.data_hash:
        raise ValueError(f"task must be the data of run {run.id}, {meta.task}, got {task.name} with different rows")
    if method is None:
        method = _rebuild_method(run)
    if isinstance(method, AdapterMethod):
        method.splits_fused = bool(meta.weight_parts)
    settings = Settings.read(meta.settings)
    assert meta.seed is not None
    assert meta.phase is not None
    name, split = meta.phase
    observers = tuple(map(_rebuild_observer, meta.settings["observers"]))
    spec = RunSpec(method, Phase(method, name, split), task, settings, meta.seed, marker.w0_hash, observers)
    spec = dataclasses.replace(spec, start=meta.start, weight_parts=part_roles(meta.weight_parts or ()))
    # First, because the id would not say what differs.
    if config(method) != meta.method:
        raise ValueError(f"method must be that of run {run.id} ({run.label}), got {method.label()}")
    if spec.id != run.id:
        raise ValueError(f"cannot fork run {run.id}: its settings or observers cannot be rebuilt from run.json")
    return spec


def _rebuild_method(run: Run) -> Method:
    """Return the method of a run; earlier phases that it refers to are opened."""
    # A configuration has 0.0 as 0, and the settings, which are part of the id as well, have it as it was.
    stored: dict[str, Any] = run.meta.method | {"search_share": run.meta.settings["search_share"]}
    phases = {phase.id: phase for phase in run.parents}
    for name, value in stored.items():
        if isinstance(value, Mapping) and "run" in value:
            stored[name] = phases.get(value["run"], value)
    try:
        return from_config(stored)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cannot rebuild the method of run {run.id} from its configuration: {printable(error)}; pass method="
        ) from error


def _rebuild_observer(stored: Mapping[str, Any]) -> Observer:
    options: dict[str, Any] = {}
    for name, value in stored.items():
        if name != "name":
            options[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return OBSERVERS[stored["name"]](**options)


def _change_spec(trunk: RunSpec, run: Run, step: int, change: Mapping[str, Any], model: nn.Module) -> ForkSpec:
    """Return the specification of a run with a change; a ValueError reports an invalid one."""
    method, rows = trunk.phase.method, None
    fields = [field.name for field in dataclasses.fields(method) if field.init and field.name not in _FIXED]
    names = [*RATES, "rows", *fields]
    rates: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in change.items():
        if name not in names:
            raise ValueError(unknown_name("change", name, names))
        if name in RATES:
            rates[name] = value
        elif name != "rows":
            options[name] = value
    settings = dataclasses.replace(trunk.settings, **rates)
    if "rank" in change and isinstance(method, LoRA):
        options["alpha"] = change.get("alpha", _alpha_at_rank(method, change["rank"]))
    changed = copy_method(method, **options)
    stored = config(changed) | settings.to_dict()  # a method also has default rates
    described = {name: stored[name] for name in rates | options if name in change}
    if "rows" in change:
        rows = _fit_rows(change["rows"], trunk.task, model)
        described["rows"] = f"{rows.name} {rows.hash[:12]}"
    phase = dataclasses.replace(trunk.phase, method=changed)
    values = vars(trunk) | {"recipe": changed, "phase": phase, "settings": settings, "rows": rows}
    values["fork"] = Fork(run.id, int(step), described)
    return ForkSpec(**values, trunk=run.meta)


def _alpha_at_rank(method: LoRA, rank: Any) -> float:
    """Return the alpha with which LoRA of another rank has the same scale."""
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    if isinstance(method.rank, Mapping):
        raise ValueError("cannot fork with another rank: the run has a rank per module, and only one alpha")
    ratio = rank / method.rank
    return method.alpha * (math.sqrt(ratio) if method.rslora else ratio)


def _fit_rows(rows: Task | str | Path, task: Task, model: nn.Module) -> Task:
    """Return another task in the form of the model's head; a ValueError reports other labels."""
    if not isinstance(rows, Task):
        rows = tasks.load(str(rows))
    if set(rows.labels) != set(task.labels):
        expected = ", ".join(task.labels) or "none"
        raise ValueError(f"rows must have the labels of the task ({expected}), got {', '.join(rows.labels) or 'none'}")
    rows = rows.fit(model)
    if rows.kind != task.kind:
        raise ValueError(f"rows must be of the kind {task.kind}, as the task, got {rows.kind}")
    return rows


def _folder_of(run: Run, id: str) -> Path:
    """Return a new folder next to that of the trunk, or next to its recipe's for one of several phases."""
    assert run.path is not None
    assert run.meta.phase is not None
    folder = run.path.parent if run.meta.phase[0] else run.path
    return folder.with_name(f"{folder.name}-fork-{id}")


def _begin_trunk(trunk: RunSpec, model: nn.Module, marker: TrainingMarker) -> BegunTrunk:
    """Return how the optimizer of the trunk begins, and leave the model at its base weights."""
    with seed_generators(trunk.seed):
        method = copy_method(trunk.phase.method)
        optimizer, _ = begin_training(method, model, marker.base, trunk.settings)
    # The fork attaches its own adapters to the same model.
    reset_model(model, marker.base)
    return BegunTrunk(type(optimizer), [dict(group) for group in optimizer.param_groups])
