"""Training loop: ``train`` runs the phases of a method one after the other, each from the same W_0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lorascope.adapters import delta
from lorascope.adapters.quantization import has_packed_weights
from lorascope.files.printable import first_line
from lorascope.inputs import models, tasks
from lorascope.inputs.metrics import DEFAULTS, Metric, require_fit
from lorascope.inputs.tasks import Task
from lorascope.methods.field_checks import default_if_none, is_integer
from lorascope.methods.method import Method, Phase, from_config, require_quantizable, target_parts
from lorascope.observe import Observer, norms
from lorascope.observe.observer import require_observers
from lorascope.runs.folders import identify_folder, lock_run
from lorascope.runs.run import Run
from lorascope.training.base_weights import Base, convert_weights, prepare_model
from lorascope.training.generation import Generation, require_generation
from lorascope.training.keyboard_interrupt import catch_interrupt
from lorascope.training.output_folder import StateRemoved, finished_run, prepare_folder, write_phases
from lorascope.training.processes import join
from lorascope.training.progress import progress_bar
from lorascope.training.run_spec import RunSpec, phase_rows
from lorascope.training.session import Session, clip_gradients, nonfinite_reason
from lorascope.training.settings import Settings, require_images, require_length, require_smoothing
from lorascope.training.sharded_weights import reject_sharded_weights
from lorascope.training.start_adapter import open_start
from lorascope.training.state import seed_generators
from lorascope.training.trackers import tracker_names


def train(
    model: nn.Module | str,
    data: Task | str | Path,
    method: Method | str,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    lr: float | None = None,
    head_lr: float | None = None,
    batch_size: int = 16,
    schedule: str = "linear",
    warmup: float = 0.06,
    warmup_start: str = "nonzero",
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    precision: str = "fp32",
    eval_every: int | Literal["epoch"] | None = None,
    eval_size: int | None = 512,
    test_size: int | None = None,
    test_state: str = "last",
    max_length: int = 128,
    metric: str | Metric | Sequence[str | Metric] | None = None,
    model_options: Mapping[str, Any] | None = None,
    label_smoothing: float = 0.0,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    attention: str | None = None,
    gradient_checkpointing: bool = False,
    generation: Generation | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    augment: str = "none",
    start: Run | str | Path | None = None,
    start_head: bool = False,
    observe: Sequence[Observer] | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    overwrite: bool = False,
    checkpoint_every: int = 100,
    keep_checkpoints: Sequence[int] = (),
    device: str | None = None,
    progress: bool = True,
    report_to: str | Sequence[str] | None = None,
) -> Run:
    """Train a model with a method in the training loop of lorascope, and record what happens inside the model.

    Several processes, started by ``accelerate launch`` or ``torchrun``, train one run together if each makes this call.

    Parameters
    ----------
    model : Module or str
        Model, trained in place, or a name for ``models.load``.
    data : Task, str or path
        Task, or a name for ``tasks.load``.
    method : Method or str
        Method, such as ``LoRA(rank=8)``, or its name.
    steps : int, optional
        Optimizer steps per phase, unless the method sets another number for a phase.
    epochs : float, optional
        Passes over the rows of each phase, instead of steps. The last batch of an epoch has the remaining rows, as in
        the Trainer of transformers; with steps, all batches have ``batch_size`` rows.
    seed : int
        Seed for new weights, data order, adapter initialization and dropout.
    lr : float, optional
        Learning rate of the adapter, by default that of the method. A rate that a method sets for one phase, such as
        NeFT's ``tune_lr``, takes precedence.
    head_lr : float, optional
        Learning rate of the head, by default that of the method.
    batch_size : int
        Rows per optimizer step, over all processes.
    schedule : {"linear", "cosine", "constant"}
        Learning rate schedule after the linear warm-up: linear or cosine decay to zero, or constant.
    warmup : float
        Length of the warm-up: a fraction of all steps if below 1, else a number of steps.
    warmup_start : {"nonzero", "zero"}
        Factor of the rate in step t, from 0, of a warm-up of w steps: (t + 1) / (w + 1), or t / w as in transformers.
    clip : float or None
        Maximum global gradient norm; None disables clipping.
    weight_decay : float
        Decoupled weight decay, not applied to biases and norms.
    accumulate : int
        Number of equal micro-batches per batch, to save memory; per process if there are several.
    precision : {"fp32", "bf16"}
        Precision of the forward pass: fp32, or bf16 by autocast, in which the weights keep their dtype.
    eval_every : int or "epoch", optional
        Steps between evaluations on the validation split, the first before training, or "epoch", after each epoch. By
        default a fifth of the run; 0 evaluates only after the last step.
    eval_size : int or None
        Number of validation rows to evaluate; None for all.
    test_size : int, optional
        Number of test rows to evaluate; all by default.
    test_state : {"last", "best"}
        State that is tested: the last one, or the one that was best on the validation split. The model is returned in
        its last state in both cases.
    max_length : int
        Maximum number of tokens per text; longer texts are truncated.
    metric : str, Metric or sequence of these, optional
        Metrics to record at each evaluation, by the names of ``ls.metrics`` or as own functions, such as
        ``("f1", "accuracy")``. The first selects the best state, and recipes are compared by it. By default accuracy,
        perplexity without a closed set of answers, ``choice_accuracy`` for prompts with choices, ``f1_words`` for
        spans, or the mean squared error of numbers. The names are part of the run's id.
    model_options : mapping, optional
        Fields of the configuration of a model that is loaded by name, such as ``{"hidden_dropout_prob": 0.0}``; see
        ``models.load``.
    label_smoothing : float
        Label smoothing of the training loss, as in ``torch.nn.functional.cross_entropy``, without terms that a model
        adds to its own loss. Evaluations are not smoothed.
    betas : (float, float)
        Decay rates of AdamW's moments, as in torch. Other optimizers have their own, such as those of ``Adapprox``.
    eps : float
        Term in AdamW's denominator, as in torch.
    attention : {"eager", "sdpa", "flash_attention_2"}, optional
        Implementation of attention in transformers; by default that of the model, "sdpa" if its class has it.
        AutoLoRA's exact hypergradient requires "eager". "flash_attention_2" requires the package flash-attn and
        ``precision="bf16"``.
    gradient_checkpointing : bool
        Compute the activations of each block again in the backward pass, to save memory. The gradients are the same.
    generation : Generation or mapping, optional
        How a language model generates texts from prompts with open responses, for metrics such as BLEU. The run keeps
        those of the test split. Rows with the same prompt are one item with several references. The loss selects the
        best state unless ``every`` says that evaluations generate as well; then those that do select it.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Dtype of the base weights, by default that of the model, which is float32 if it is loaded by name. Factors of
        adapters are float32 on weights of 16 bits, and other trained weights have copies in float32, to which the
        optimizer adds its steps.
    quantize : {"nf4", "int8"}, optional
        Quantization of the linear layers in the blocks by bitsandbytes, for methods that train adapters only: 4-bit
        NormalFloat, or LLM.int8(). Requires ``pip install lorascope[quantized]``. DoRA and PiSSA, which decompose W_0,
        are rejected.
    augment : {"none", "crop-flip"}
        Crops of images: those of the model's image processor, or random crops, resized and flipped left to right in
        half of the cases, in training, and the center of the resized image in evaluations. The distribution equals
        that of RandomResizedCrop and RandomHorizontalFlip in torchvision.
    start : Run or path, optional
        Finished run of the same method and base, whose last factors replace the initial ones, such as a run on MNLI;
        or, for ``LoRA``, a folder of PEFT with the same ranks, scales and modules. Figures subtract the initial update,
        as for PiSSA.
    start_head : bool
        Whether to start from the task head of that run as well.
    observe : sequence of Observer, optional
        Observers that record quantities; ``[observe.norms()]`` by default.
    out : path, optional
        Run folder; ``<root>/<method>-<task>-<id>`` by default.
    root : path
        Parent of the default run folder.
    overwrite : bool
        Remove the run in the folder and train again. Rejected if another process trains in it, if it is a symbolic
        link, or if it contains files that are not of the run, such as a copy of a run.
    checkpoint_every : int
        Steps between checkpoints, from which an interrupted run resumes.
    keep_checkpoints : sequence of int
        Steps of each phase whose checkpoints stay in the run folder, so that ``ls.fork`` can continue from them. They
        do not change the run's id.
    device : str, optional
        Device; by default an accelerator if available (of several processes, one each), else the CPU.
    progress : bool
        Show a progress bar.
    report_to : str or sequence of str, optional
        Trackers that show the values of the training while it runs, and figures at its end: "tensorboard", "wandb",
        "mlflow", "trackio", or another name of ``accelerate``; "all" for all that are installed. They have no effect
        on the training or its id.

    Returns
    -------
    Run
        Run of the last phase. The same call returns a finished run and resumes an unfinished one.

    Raises
    ------
    ValueError
        An argument is invalid, a metric does not fit the task, the model was trained as another recipe, the folder
        contains another run, or a tracker is not installed or cannot start.
    FloatingPointError
        The loss or the gradient norm is not finite.
    RuntimeError
        An observer stops the training, such as ``alarms(stop=...)``.
    """
    arguments = locals()
    observers = default_if_none(observe, (norms(),))
    require_observers(observers)
    if not is_integer(checkpoint_every) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an integer >= 1, got {checkpoint_every!r}")
    require_length(steps, epochs)
    if steps is not None:
        _require_steps(keep_checkpoints, steps)
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed!r}")
    seed = int(seed)  # random.seed accepts no integers of numpy
    trackers = tracker_names(report_to)
    processes = join(usable_device(device))
    device, progress = processes.device, progress and processes.first
    if isinstance(method, str):
        method = from_config({"name": method})
    if not isinstance(method, Method):
        raise ValueError(f"method must be a name or an object such as ls.LoRA(), got {method!r}")
    if not isinstance(data, Task | str | Path):
        raise ValueError(f"data must be a name, a file or a Task, such as ls.tasks.from_frame(table), got {type(data)}")
    if not isinstance(model, nn.Module | str | Path):
        raise ValueError(f"model must be a PyTorch model, a name or a folder, got {model!r}")
    method.prepare()  # before anything is changed
    values = {field.name: arguments[field.name] for field in fields(Settings)} | {"steps": default_if_none(steps, 0)}
    settings = Settings(**values | _rates(method, lr, head_lr))
    processes.require_rows(settings.batch_size, settings.accumulate)
    settings.require_base_of(method)
    if not isinstance(data, Task):
        data = tasks.load(str(data))
    if isinstance(model, str | Path):
        model = models.load(str(model), data, options=model_options, dtype=default_if_none(settings.dtype, "float32"))
    elif model_options is not None:
        raise ValueError("model_options requires the name of a model: set fields of model.config before you train it")
    reject_sharded_weights(model, fix="each process needs all weights; pass the model without fully_shard")
    task = data.fit(model)
    if task.kind in DEFAULTS and not settings.metrics:
        settings = replace(settings, metric=DEFAULTS[task.kind])
    if settings.generation is not None:
        require_generation(model, task)
    require_fit(settings.metrics, task, settings.generation is not None)
    require_smoothing(settings.label_smoothing, task)
    require_images(settings.augment, task)
    if has_packed_weights(model):
        require_quantizable(method)
    convert_weights(model, settings.dtype, settings.quantize, device)
    settings.set_computation(model)
    marker = prepare_model(model, task, seed, settings.quantize, device)
    resolved = settings.resolve(phase_rows(task, Phase(method), model, max_length))
    _require_steps(keep_checkpoints, resolved.steps)
    plan = RunSpec(method, Phase(method), task, resolved, seed, marker.w0_hash, tuple(observers))
    plan = replace(plan, weight_parts=target_parts(method, model))
    source = None
    if start is not None:
        source = open_start(start, start_head)
        plan = replace(plan, start=source.origin)
    elif start_head:
        raise ValueError("start_head requires start, the run that has the head")
    if marker.recipe not in ("", plan.id):
        raise ValueError(f"cannot train a model twice: it was trained as recipe {marker.recipe}; load a fresh model")
    data_name = task.name
    if Path(data_name).suffix:
        data_name = Path(data_name).stem
    slug = re.sub(r"[^\w.]+", "-", data_name).strip("-")
    folder = Path(out or Path(root) / f"{method.name}-{slug}-{plan.id}")
    processes.require_same(plan.id)
    processes.call_first(prepare_folder, folder, plan.id, overwrite)
    runs: list[Run] = []
    started: list[str] = []
    stored = None
    with ExitStack() as locks:
        locked = False
        for phase in _run_phases(method, marker.base, runs):
            path = folder / f"{len(runs) + 1}-{phase.name}" if phase.name else folder
            if source is not None:
                source.require_fit(method, phase, marker.w0_hash)
            started.append(path.name)
            rates = _rates(phase.method, default_if_none(phase.lr, lr), head_lr)
            resolved = settings.resolve(phase_rows(task, phase, model, max_length))
            spec = replace(plan, phase=phase, settings=replace(resolved, steps=phase.steps or resolved.steps, **rates))
            stored = processes.call_first(finished_run, path, spec)
            if stored is None and not locked:
                # Hold this lock until the end, so that no other program trains in the folder between two phases.
                processes.call_first(locks.enter_context, lock_run(folder))
                locked = True
                # Another program may just have finished the phase.
                stored = processes.call_first(finished_run, path, spec)
            if stored is None:
                if phase.name:
                    processes.call_first(write_phases, folder, plan, started, "running")
                    # This creates the folder, which would look foreign without recipe.json.
                    processes.call_first(locks.enter_context, lock_run(path))
                reset_model(model, marker.base)
                # Each phase has the random numbers that it would have as the only one.
                with seed_generators(seed):
                    session = Session(model, spec, marker.base, path, runs, device, trackers, processes)
                    if source is not None:
                        source.copy_to(model)
                    marker.attach(model, plan.id)  # now the model has changed
                    runs.append(fit(session, checkpoint_every, progress, keep_checkpoints))
            else:
                runs.append(stored)
        if phase.name:
            processes.call_first(_finish_phases, folder, plan, started, locked)
    if stored is not None:
        if not stored.restorable:
            raise StateRemoved(stored)
        reset_model(model, marker.base)
        marker.attach(model, plan.id)
        # Training would have changed the model of the caller, so it gets the trained weights.
        stored.restore(model, method=replace(phase.method))
    return runs[-1]


def _finish_phases(folder: Path, plan: RunSpec, names: Sequence[str], trained: bool) -> None:
    """Mark the recipe in a folder as done, unless it was before this call, which trained no phase."""
    if trained or identify_folder(folder).status != "done":
        write_phases(folder, plan, names, "done")


def _require_steps(keep_checkpoints: Any, steps: int) -> None:
    is_sequence = isinstance(keep_checkpoints, Sequence) and all(map(is_integer, keep_checkpoints))
    # Settings rejects invalid steps.
    if is_integer(steps) and not (is_sequence and all(0 < step < steps for step in keep_checkpoints)):
        raise ValueError(f"keep_checkpoints must be steps from 1 to {steps - 1}, got {keep_checkpoints!r}")


def usable_device(device: str | None) -> str:
    """Return the device, or the accelerator or CPU by default; raise a ValueError if torch cannot use it."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return getattr(accelerator, "type", "cpu")
    try:
        torch.zeros(1, device=device).item()  # the device "meta" has no values
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"device must be one that torch can use, such as 'cpu', got {device!r}: {first_line(error)}"
        ) from None
    return device


def _rates(method: Method, lr: float | None, head_lr: float | None) -> dict[str, Any]:
    """Return the given learning rates, or those of a method by default."""
    return {"lr": default_if_none(lr, method.lr), "head_lr": default_if_none(head_lr, method.head_lr)}


def fit(session: Session, checkpoint_every: int, progress: bool, keep_checkpoints: Sequence[int] = ()) -> Run:
    """Run the training loop of one phase and return its run."""
    try:
        return _train_steps(session, session.begin(), checkpoint_every, progress, keep_checkpoints)
    finally:
        session.abandon_report()


def _train_steps(
    session: Session, start: int, checkpoint_every: int, progress: bool, keep_checkpoints: Sequence[int]
) -> Run:
    """Train the steps of a phase from ``start`` on, and close its run."""
    step, name = session.step, session.plan.phase.name or session.method.name
    with catch_interrupt() as interrupted, progress_bar(name, step.total, start, progress) as bar:
        for index in range(start, step.total):
            values = advance(session, index)
            score = session.evaluate()
            session.record(*values)
            is_ending = session.processes.any(bool(step.stop) or interrupted.is_set())
            if is_ending:  # only the first process has observers
                step.stop = session.processes.call_first(getattr, step, "stop")
            if step.stop or not step.last:  # after the last step, the test follows
                session.flush_report()
            if step.stop:
                raise _end_broken(session, RuntimeError, step.stop)
            bar.show(values[0], score)
            if step.finished in keep_checkpoints and not step.last:
                session.keep_checkpoint()
            if is_ending:
                session.checkpoint()
                raise KeyboardInterrupt(
                    f"stopped after step {step.finished} of {step.total}; repeat the same call to resume"
                )
            if step.finished % checkpoint_every == 0 and not step.last:
                session.checkpoint()
    return session.finish()


def advance(session: Session, index: int) -> tuple[float, float | None, float]:
    """Run one optimizer step of the training loop; return its loss, gradient norm and learning rate.

    Methods rely on the order of the calls.
    """
    step, method, optimizer = session.step, session.method, session.optimizer
    step.index, step.batch = index, session.batch(index)
    rate = optimizer.param_groups[0]["lr"]  # of this step, because the scheduler steps below
    method.before_step(step)
    optimizer.zero_grad(set_to_none=True)
    loss = session.backward()
    method.after_backward(step)
    norm = clip_gradients(optimizer, session.settings.clip)
    if reason := nonfinite_reason(step, loss, norm, rate):
        raise _end_broken(session, FloatingPointError, reason)
    optimizer.step()
    session.scheduler.step()
    method.after_step(step)
    return loss, norm, rate


def _end_broken(session: Session, kind: type[Exception], reason: str) -> Exception:
    """Close the run folder of a training that stops early, and return the error."""
    session.writer.meta.error = reason
    # The launcher stops all processes when the first error leaves one, so each waits until this is written.
    session.processes.call_first(session.writer.finish, "broken")
    error = kind(f"{reason}; the records up to this step are in {session.path}")
    error.run_path = str(session.path)  # type: ignore[attr-defined]  # a sweep reads the broken runs, too
    return error


def reset_model(model: nn.Module, base: Base) -> None:
    """Remove adapters, restore W_0 and make all parameters trainable, as at the start of every phase."""
    delta.detach(model)
    base.restore()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # quantized weights have no gradients


def _run_phases(method: Method, base: Base, runs: list[Run]) -> Iterator[Phase]:
    """Yield the phases of a method; after each, send it the last of ``runs``, to which the caller appends."""
    generator = method.phases(base)
    try:
        yield next(generator)
        while True:
            yield generator.send(runs[-1])
    except StopIteration:
        return
