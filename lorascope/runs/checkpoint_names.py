"""Steps of checkpoints from their names: folders of a Trainer, files of MLX and kohya, revisions on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lorascope.files.hub import WEIGHTS
from lorascope.files.printable import printable

# No letter may precede the word, or else it is another one, such as "footsteps".
_WORD = re.compile(r"(?:.*[^a-z])?(?:checkpoint|ckpt|steps?|iter|epoch)[-_=]?(\d{1,12})", re.IGNORECASE)
_REVISION = re.compile(r"[^@]*@(\d{1,12})")
_MLX = re.compile(r"(\d{1,12})_adapters\.safetensors")


def checkpoint_step(name: str | Path) -> int | None:
    """Return the step of a checkpoint from its name, such as ``checkpoint-10`` or ``user/adapter@step-10``.

    The number follows one of the words checkpoint, ckpt, step, iter and epoch at the end of the name, precedes
    ``_adapters.safetensors``, or is the revision itself. None for all other names.
    """
    path = Path(name)
    label = path.parent.name if path.name in WEIGHTS else path.name
    match = _MLX.fullmatch(label) or _WORD.fullmatch(label.removesuffix(".safetensors")) or _REVISION.fullmatch(label)
    if match is None:
        return None
    return int(match[1])


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, files or folders whose names have a step, in the order of the steps."""
    if not folder.is_dir():
        return []
    steps = {}
    for path in folder.iterdir():
        step = checkpoint_step(path)
        # Known names belong to the adapter of the folder itself.
        if step is not None and path.name not in WEIGHTS and (path.is_dir() or path.suffix == ".safetensors"):
            steps[path] = step
    return sorted(steps, key=lambda path: (steps[path], path.name))


def count_and_span(steps: Iterable[int]) -> str:
    """Format the number of checkpoint steps, and the first and last one, such as ``12, steps 10 to 120``."""
    first, *later_steps = sorted(steps)
    if not later_steps:
        return f"1, step {first}"
    return f"{1 + len(later_steps)}, steps {first} to {later_steps[-1]}"


def describe_checkpoints(folder: Path) -> str | None:
    """Describe the checkpoints, by their names, next to the final adapter of a training; None without any."""
    steps = {checkpoint_step(path) or 0 for path in find_checkpoints(folder)}
    if not steps:
        return None
    return f"{count_and_span(steps)}; --series shows them"


def by_step(names: Iterable[str | Path]) -> dict[int, str | Path]:
    """Return checkpoints by the steps in their names, or by 1, 2, ... if no name has a step.

    Raises
    ------
    ValueError
        Only some names have a step, or two have the same.
    """
    names = list(names)
    stepless = [name for name in names if checkpoint_step(name) is None]
    if stepless and len(stepless) < len(names):
        raise ValueError(
            f"every name or none must have a step, got {printable(stepless[0])} without one; pass a dict {{step: path}}"
        )
    checkpoints: dict[int, str | Path] = {}
    for position, name in enumerate(names, start=1):
        step = checkpoint_step(name)
        if step is None:
            step = position
        if step in checkpoints:
            raise ValueError(f"{printable(checkpoints[step])} and {printable(name)} both have step {step}")
        checkpoints[step] = name
    return checkpoints
