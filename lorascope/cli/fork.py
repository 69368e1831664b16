"""``lorascope fork``: continue a run from a stored checkpoint with one change, and print its effect."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.analysis.fork_effects import fork_effects
from lorascope.cli.arguments import Folder, Name, command
from lorascope.cli.opened_runs import open_runs
from lorascope.training.fork import fork


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    step: Annotated[int | None, arg(metavar="N")] = None,
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = (),
    model: Name = None,
    task: Name = None,
    out: Annotated[Folder, arg(aliases=["-o"])] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    json: bool = False,
    progress: bool = True,
) -> int:
    """Continue a run from a stored checkpoint with one change, and print the effect on the test loss.

    Train the run with --keep-checkpoints. Without --set, the fork equals the run bit by bit.

    Example: lorascope fork runs/lora --step 50 --set lr=3e-4 -o runs/lower-rate

    Parameters
    ----------
    run
        Run folder.
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
    device
        Device, such as cpu; an accelerator if available.
    json
        Print the effect as JSON.
    progress
        Show a progress bar.
    """
    example = "lorascope fork runs/lora --step 50 --set lr=3e-4"
    if run is None:
        raise ValueError(f"RUN is required: {example}")
    if step is None:
        raise ValueError(f"--step is required: {example}")
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
    (trunk,) = open_runs([run], None)
    forked = fork(trunk, model, task, step=step, out=out, device=device, progress=progress, **changes)
    effects = fork_effects(forked)
    if json:
        content = {"id": forked.id, "path": str(forked.path)} | effects.to_json()
        print(json_format.dumps(content))
    else:
        print(forked)
        print(effects)
    return 0


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
