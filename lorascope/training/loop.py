"""The training loop: ``train`` runs the phases of a method one after the other, each from the same W_0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorascope.adapters import delta
from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.methods import METHODS
from lorascope.methods.base import Method, Phase
from lorascope.observe import Observer, norms
from lorascope.runs.folders import lock_run, read_manifest
from lorascope.runs.run import Run
from lorascope.training.base_weights import Base, prepare_model
from lorascope.training.output_folder import StateRemoved, finished_run, prepare_folder, write_phases
from lorascope.training.progress import catch_interrupt, progress_bar
from lorascope.training.run_spec import Plan
from lorascope.training.session import Session, nonfinite_reason
from lorascope.training.settings import Settings
from lorascope.training.state import seed_generators


def train(
    model: nn.Module | str,
    data: Task | str | Path,
    method: Method | str,
    *,
    steps: int,
    seed: int = 0,
    lr: float | None = None,
    head_lr: float | None = None,
    batch_size: int = 16,
    schedule: str = "linear",
    warmup: float = 0.06,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    precision: str = "fp32",
    eval_every: int | None = None,
    eval_size: int = 512,
    test_size: int | None = None,
    max_length: int = 128,
    observe: Sequence[Observer] | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    overwrite: bool = False,
    checkpoint_every: int = 100,
    device: str | None = None,
    progress: bool = True,
) -> Run:
    """Train a model by a method, recording what happens inside it.

    Parameters
    ----------
    model : Module or str
        Trained in place, or a name for ``models.load``.
    data : Task, str or path
        A task, or a name for ``tasks.load``.
    method : Method or str
        Such as ``LoRA(rank=8)``, or its name.
    steps : int
        Optimizer steps of each phase that does not say otherwise.
    seed : int
        Of new weights, data order, adapter initialisation and dropout.
    lr, head_lr : float, optional
        Learning rates of adapter and head; the method's by default. What a method sets for one phase, such as NeFT's
        ``tune_lr``, stays.
    batch_size : int
        Rows of one optimizer step.
    schedule : {"linear", "cosine", "constant"}
        How the rate falls after the warm-up.
    warmup : float
        Below 1 a share of all steps, from 1 on a number of steps.
    clip : float or None
        Largest norm of all trained gradients together.
    weight_decay : float
        Decoupled; never on biases and norms.
    accumulate : int
        Equal parts in which a batch is computed, to save memory.
    precision : {"fp32", "bf16"}
        bf16 by autocast; weights stay as they are.
    eval_every : int, optional
        Steps between evaluations on the validation split, the first of them before training; a fifth of the run by
        default, 0 for the end only.
    eval_size : int
        Rows of the validation split that are used.
    test_size : int, optional
        Rows of the test split that are used; all by default.
    max_length : int
        Longer texts are cut to this many tokens.
    observe : sequence of Observer, optional
        ``[observe.norms()]`` by default.
    out : path, optional
        The run folder; ``<root>/<method>-<task>-<id>`` by default.
    root : path
        Where a folder without a name of its own is made.
    overwrite : bool
        Remove the run in the folder and start again. Rejected if another process trains in it, if it is a symbolic
        link, or if lorascope did not write all of its files.
    checkpoint_every : int
        Steps between checkpoints to resume from.
    device : str, optional
        Chosen by itself by default.
    progress : bool
        Show a bar.

    Returns
    -------
    Run
        Of the last phase. The same call finds a finished run and goes on with an unfinished one.

    Raises
    ------
    ValueError
        Something given is wrong, the module was used before, or the folder holds another run.
    FloatingPointError
        The loss is no longer a number.
    """
    method = _method_of_name(method) if isinstance(method, str) else method
    method.prepare()  # before anything is changed
    task = data if isinstance(data, Task) else tasks.load(str(data))
    model = models.load(model, task=task) if isinstance(model, str) else model
    settings = Settings(
        steps=steps,
        lr=method.lr if lr is None else lr,
        head_lr=method.head_lr if head_lr is None else head_lr,
        batch_size=batch_size,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        weight_decay=weight_decay,
        accumulate=accumulate,
        precision=precision,
        eval_every=eval_every,
        eval_size=eval_size,
        test_size=test_size,
        max_length=max_length,
    )
    task = task.fit(model)
    device = device or _best_device()
    model.to(device)
    mark = prepare_model(model, task, seed)
    observers = (norms(),) if observe is None else tuple(observe)
    plan = Plan(method, Phase(method), task, settings, seed, mark.w0_hash, observers)
    if mark.recipe not in ("", plan.id):
        raise ValueError(f"this model was trained before, as recipe {mark.recipe}: load a fresh one for another run")
    folder = Path(out or Path(root) / f"{method.name}-{_slug(task.name)}-{plan.id}")
    prepare_folder(folder, plan.id, overwrite)
    mark.put_on(model, plan.id)
    runs: list[Run] = []
    begun: list[str] = []
    stored = None
    with ExitStack() as locks:
        locked: set[Path] = set()

        def hold(place: Path) -> None:
            if place not in locked:
                locks.enter_context(lock_run(place))
                locked.add(place)

        for phase in _run_phases(method, mark.base, runs):
            path = folder / f"{len(runs) + 1}-{phase.name}" if phase.name else folder
            begun.append(path.name)
            own = lr if phase.lr is None else phase.lr
            rates: dict[str, Any] = {
                "lr": phase.method.lr if own is None else own,
                "head_lr": phase.method.head_lr if head_lr is None else head_lr,
            }
            part = replace(plan, phase=phase, settings=replace(settings, steps=phase.steps or steps, **rates))
            if finished_run(path, part) is None:
                # Until the end, since no other process may take the folder between two phases either.
                hold(folder)
            # Again under the lock: another process may have finished it a moment ago.
            stored = finished_run(path, part)
            if stored is None:
                if phase.name:
                    write_phases(folder, plan, begun, "running")
                hold(path)  # now that recipe.json says whose folder it is
                _reset(model, mark.base)
                with seed_generators(seed):
                    session = Session(model, part, mark.base, path, runs, device)
                    runs.append(fit(session, checkpoint_every, progress))
            else:
                runs.append(stored)
        if phase.name and (locked or read_manifest(folder).status != "done"):
            write_phases(folder, plan, begun, "done")
    if stored is not None:
        if not stored.restorable:
            raise StateRemoved(stored)
        _reset(model, mark.base)
        stored.restore(model, method=replace(phase.method))
    return runs[-1]


def fit(session: Session, checkpoint_every: int, progress: bool) -> Run:
    """The loop itself."""
    step = session.step
    start = session.begin()
    with catch_interrupt() as interrupted, progress_bar(session.name, step.total, start, progress) as bar:
        for index in range(start, step.total):
            loss, norm, rate = advance(session, index)
            score = session.evaluate()
            session.record(loss, norm, rate)
            bar.show(loss, score)
            if interrupted.is_set():
                session.checkpoint()
                raise KeyboardInterrupt(f"stopped after step {step.finished} of {step.total}; the same call goes on")
            if step.finished % checkpoint_every == 0 and not step.last:
                session.checkpoint()
    return session.finish()


def advance(session: Session, index: int) -> tuple[float, float | None, float]:
    """One optimizer step; the order of its lines is a contract with the methods. Gives loss, gradient norm and rate."""
    step, method, optimizer = session.step, session.method, session.optimizer
    step.index, step.batch = index, session.batch(index)
    rate = optimizer.param_groups[0]["lr"]
    method.before_step(step)
    optimizer.zero_grad(set_to_none=True)
    loss = session.backward()
    method.after_backward(step)
    norm = session.clip()
    _stop_unless_finite(session, loss, norm, rate)
    optimizer.step()
    session.scheduler.step()
    method.after_step(step)
    return loss, norm, rate


def _reset(model: nn.Module, base: Base) -> None:
    """Back to W_0, without adapters, everything trainable: where every phase begins."""
    delta.detach(model)
    base.restore()
    model.requires_grad_(True)


def _run_phases(method: Method, base: Base, runs: list[Run]) -> Iterator[Phase]:
    """The method's phases; each answer is the newest of ``runs``, which the caller fills."""
    generator = method.phases(base)
    try:
        yield next(generator)
        while True:
            yield generator.send(runs[-1])
    except StopIteration:
        return


def _method_of_name(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]()


def _best_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _stop_unless_finite(session: Session, loss: float, norm: float | None, rate: float) -> None:
    if reason := nonfinite_reason(session.step, loss, norm, rate):
        session.fail(reason)
        raise FloatingPointError(f"{reason}; records up to there are in {session.path}")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", Path(name).stem if Path(name).suffix else name).strip("-")
