"""``lorascope fork``: continue a run from a stored checkpoint with one change, and print the effect of forks."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.analysis.fork_effects import ForkEffects, fork_effects
from lorascope.cli.arguments import Folder, Name, command, reject
from lorascope.cli.opened_runs import open_runs
from lorascope.training.fork import fork


@command
def main(
    runs: Annotated[tuple[str, ...], arg(metavar="RUN ...")] = (),
    /,
    *,
    step: Annotated[int | None, arg(metavar="N")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = (),
    model: Name = None,
    task: Name = None,
    out: Annotated[Folder, arg(aliases=["-o"])] = None,
    margin: Annotated[float | None, arg(metavar="NATS")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    json: bool = False,
    progress: bool = True,
) -> int:
    """Continue a run from a stored checkpoint with one change, and print the effect on the test loss.

    Train the run with --keep-checkpoints. Without --set, the fork equals the run bit by bit. Without --step, the runs
    are finished forks, whose effects are printed; five with different seeds have a verdict.

    Example: lorascope fork runs/lora --step 50 --set lr=3e-4 -o runs/lower-rate

    Parameters
    ----------
    runs
        Run folder; without --step, those of finished forks.
    step
        Number of finished steps after which the change begins: a stored checkpoint, or 0.
    set
        Changes: lr, head_lr, weight_decay, clip, schedule, rows (a file or a task), or a field of the method.
    model
        Base model; the one in the run if omitted.
    task
        Data of the run; those in the run if omitted.
    out
        Run folder of the fork; a folder next to RUN if omitted.
    margin
        Largest effect that makes no difference (default: the spread of the trunks' test losses over seeds).
    device
        Device, such as cpu; an accelerator if available.
    json
        Print the effect as JSON.
    progress
        Show a progress bar.
    """
    example = "lorascope fork runs/lora --step 50 --set lr=3e-4"
    if not runs:
        raise ValueError(f"RUN is required: {example}")
    opened = open_runs(runs, None)
    if step is None and not set and all(run.meta.fork is not None for run in opened):
        _print_effects(fork_effects(opened, margin), {}, json)
        return 0
    reject(
        {
            f"--step is required: {example}": step is None,
            f"--step forks one run, got {len(runs)}: omit it to compare finished forks": len(runs) > 1,
        }
    )
    changes: dict[str, Any] = {}
    for word in set:
        name, separator, text = word.partition("=")
        if not (name and separator and text):
            raise ValueError(f"--set must be NAME=VALUE, got {word!r}: {example}")
        if name in changes:
            raise ValueError(f"--set must have each name once, got {name} twice")
        changes[name] = _read_value(text)
    for name in _ARGUMENTS:
        if name in changes:
            raise ValueError(f"--set cannot change {name}: use its option")
    assert step is not None
    forked = fork(opened[0], model, task, step=step, out=out, device=device, progress=progress, **changes)
    if not json:
        print(forked)
    _print_effects(fork_effects(forked, margin), {"id": forked.id, "path": str(forked.path)}, json)
    return 0


def _print_effects(effects: ForkEffects, facts: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json_format.dumps(facts | effects.to_json()))
        return
    print(effects)


# Parameters of ``fork`` that a change could overwrite.
_ARGUMENTS = ("run", "model", "task", "step", "out", "method", "device", "progress")


def _read_value(text: str) -> Any:
    """Return a value as JSON has it, none as None, and anything else as text."""
    # As in sweep files: a setting may be None, such as clip.
    if text.lower() == "none":
        return None
    try:
        return json_format.loads(text)
    except ValueError:
        return text
