"""The training loop: ``train`` runs the phases of a method one after the other, each from the same W_0."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from lorascope import delta, models, tasks
from lorascope.evaluation import Score
from lorascope.heads import draw_new_weights, fit_head, weights_hash
from lorascope.method import Method, Phase
from lorascope.methods import METHODS
from lorascope.observe import Observer, norms
from lorascope.plan import Base, Plan
from lorascope.run import Run
from lorascope.session import Session
from lorascope.settings import Settings
from lorascope.state import seeded
from lorascope.tasks import Task
from lorascope.tensors import write_json

_MARK = "_lorascope_trained"


class Mark(NamedTuple):
    """What ``train`` leaves on a module: which recipe it ran, and W_0."""

    recipe: str
    w0_hash: str
    base: Base


def train(
    model: nn.Module | str,
    data: Task | str | Path,
    method: Method | str,
    *,
    steps: int,
    seed: int = 0,
    lr: float | int | None = None,
    head_lr: float | int | None = None,
    batch_size: int = 16,
    schedule: str = "linear",
    warmup: float | int = 0.06,
    clip: float | int | None = 1.0,
    weight_decay: float | int = 0.0,
    accumulate: int = 1,
    precision: str = "fp32",
    eval_every: int | None = None,
    eval_size: int = 512,
    max_length: int = 128,
    observe: Sequence[Observer] | None = None,
    out: str | Path | None = None,
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
        Learning rates of adapter and head; the method's by default.
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
        Steps between evaluations on the validation split; a fifth of the run by default, 0 for the end only.
    eval_size : int
        Rows of the validation split that are used.
    max_length : int
        Longer texts are cut to this many tokens.
    observe : sequence of Observer, optional
        ``[observe.norms()]`` by default.
    out : path, optional
        The run folder; ``runs/<method>-<task>-<id>`` by default.
    overwrite : bool
        Remove another run that lies there.
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
    method = _method(method) if isinstance(method, str) else method
    task = data if isinstance(data, Task) else tasks.load(str(data))
    model = models.load(model, task=task) if isinstance(model, str) else model
    settings = Settings(
        steps=steps, lr=float(method.lr if lr is None else lr),
        head_lr=float(method.head_lr if head_lr is None else head_lr), batch_size=batch_size, schedule=schedule, warmup=float(warmup), clip=None if clip is None else float(clip),
        weight_decay=float(weight_decay), accumulate=accumulate, precision=precision, eval_every=eval_every,
        eval_size=eval_size, max_length=max_length,
    )  # fmt: skip
    task = task.fit(model)
    device = device or _best_device()
    model.to(device)
    mark = _first_use(model, task, seed)
    observers = (norms(),) if observe is None else tuple(observe)
    plan = Plan(method, Phase(method), task, settings, seed, mark.w0_hash, observers)
    if mark.recipe not in ("", plan.id):
        raise ValueError(f"this model was trained before, as recipe {mark.recipe}: load a fresh one for another run")
    folder = Path(out or f"runs/{method.name}-{task.slug}-{plan.id}")
    _claim(folder, plan, overwrite)
    setattr(model, _MARK, mark._replace(recipe=plan.id))
    runs: list[Run] = []
    for phase in _phases(method, mark.base, runs):
        path = folder / f"{len(runs) + 1}-{phase.name}" if phase.name else folder
        given = settings if phase.method is method else replace(
            settings, lr=float(lr or phase.method.lr), head_lr=float(head_lr or phase.method.head_lr)
        )  # fmt: skip
        part = replace(plan, phase=phase, settings=replace(given, steps=phase.steps or steps))
        runs.append(_run_phase(model, part, mark.base, path, runs, device, checkpoint_every, progress))
        if phase.name:
            write_json(folder / "recipe.json", {"id": plan.id, "phases": [run.path.name for run in runs if run.path]})
    return runs[-1]


def _run_phase(
    model: nn.Module, plan: Plan, base: Base, path: Path, runs: list[Run], device: str, checkpoint_every: int, bar: bool
) -> Run:
    """Answer a finished phase from the disk, or train it from W_0, or go on with it."""
    delta.detach(model)
    base.put_back()
    model.requires_grad_(True)
    if (path / "run.json").exists():
        run = Run.read(path)
        if run.id != plan.id:
            raise ValueError(f"{path} holds run {run.id}, not {plan.id}: give another folder, or overwrite=True")
        if run.finished:
            run.restore(model, method=replace(plan.phase.method))
            return run
    with seeded(plan.seed):
        return fit(Session(model, plan, base, path, list(runs), device), checkpoint_every, bar)


def fit(session: Session, checkpoint_every: int, progress: bool) -> Run:
    """The loop itself. The order of its lines is a contract with the methods."""
    step, method, optimizer = session.step, session.method, session.optimizer
    start = session.begin()
    shown: dict[str, str] = {}
    with _interruptible() as interrupted, _bar(session, start, progress) as bar:
        for index in range(start, step.total):
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
            score = session.evaluate()
            session.record(loss, norm, rate)
            bar.update()
            _show(bar, loss, score, shown)
            if interrupted.is_set():
                session.checkpoint()
                raise KeyboardInterrupt(f"stopped after step {step.finished} of {step.total}; the same call goes on")
            if step.finished % checkpoint_every == 0 and not step.last:
                session.checkpoint()
    return session.finish()


def _phases(method: Method, base: Base, runs: list[Run]) -> Iterator[Phase]:
    """The method's phases; each answer is the newest of ``runs``, which the caller fills."""
    generator = method.phases(base)
    try:
        yield next(generator)
        while True:
            yield generator.send(runs[-1])
    except StopIteration:
        return


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]()


def _best_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def _first_use(model: nn.Module, task: Task, seed: int) -> Mark:
    """Prepare a module for its first training; give back the mark of one that was trained before."""
    mark = getattr(model, _MARK, None)
    if mark is not None:
        return mark
    carried = delta.adapted(model)
    if carried:
        raise ValueError(f"the model carries adapters already ({next(iter(carried))} ...): train a freshly loaded one")
    fit_head(model, task.labels if task.kind == "classification" else None)
    draw_new_weights(model, seed)
    return Mark("", weights_hash(model), Base(model))


def _claim(folder: Path, plan: Plan, overwrite: bool) -> None:
    """Make sure that a folder is free, or holds this very recipe."""
    found = None
    for file in (folder / "recipe.json", folder / "run.json"):
        if file.exists() and not overwrite:
            try:
                found = json.loads(file.read_text())["id"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{file} is not readable: mend it, or give overwrite=True") from error
            break
    if found is None and folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder} is not empty and holds no run: give another folder")
        if not (folder / "run.json").exists() and not (folder / "recipe.json").exists():
            raise ValueError(f"{folder} holds no run, so overwrite=True will not remove it: give another folder")
        shutil.rmtree(folder)
    elif found is not None and found != plan.id:
        raise ValueError(f"{folder} holds recipe {found}, not {plan.id}: give another folder, or overwrite=True")


def _stop_unless_finite(session: Session, loss: float, norm: float | None, rate: float) -> None:
    if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
        return
    what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient norm became {norm}"
    reason = f"{what} at step {session.step.index + 1} of {session.step.total} (rate {rate:.3g}): lower lr, or clip"
    session.fail(reason)
    raise FloatingPointError(f"{reason}; records up to there are in {session.path}")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step ends before the run does; a second one cuts through."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _bar(session: Session, start: int, progress: bool) -> tqdm:
    name = session.plan.phase.name or session.method.name
    return tqdm(total=session.step.total, initial=start, desc=name, disable=not progress, unit="step")


def _show(bar: tqdm, loss: float, score: Score | None, shown: dict[str, str]) -> None:
    shown["loss"] = f"{loss:.3f}"
    if score is not None:
        shown[score.name] = f"{score.metric:.3f}"
    bar.set_postfix(shown, refresh=False)
