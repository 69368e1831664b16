"""Steps of checkpoints from their names: folders of a Trainer, files of MLX and kohya, revisions on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lorascope.files.hub import WEIGHTS
from lorascope.files.printable import printable

_WORD = re.compile(r"(?:.*[^a-z])?(?:checkpoint|ckpt|steps?|iter|epoch)[-_=]?(\d{1,12})", re.IGNORECASE)
_REVISION = re.compile(r"[^@]*@(\d{1,12})")
_MLX = re.compile(r"(\d{1,12})_adapters\.safetensors")


def step_of(name: str | Path) -> int | None:
    """Return the step of a checkpoint from its name, such as ``checkpoint-10`` or ``user/adapter@step-10``.

    The number follows one of the words checkpoint, ckpt, step, iter and epoch at the end of the name, precedes
    ``_adapters.safetensors``, or is the revision itself. None for all other names.
    """
    path = Path(name)
    last = path.parent.name if path.name in WEIGHTS else path.name
    match = _MLX.fullmatch(last) or _WORD.fullmatch(last.removesuffix(".safetensors")) or _REVISION.fullmatch(last)
    return None if match is None else int(match[1])


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the folders and safetensors files in a folder whose names have a step, in the order of the steps."""
    found = [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".safetensors"]
    found = [path for path in found if path.name not in WEIGHTS]  # weights of the folder itself
    return sorted((path for path in found if step_of(path) is not None), key=lambda path: (step_of(path), path.name))


def count_and_span(steps: Iterable[int]) -> str:
    """Format the number of steps, and the first and last one, such as ``12, steps 10 to 120``."""
    found = sorted(steps)
    return f"{len(found)}, " + (f"step {found[0]}" if len(found) == 1 else f"steps {found[0]} to {found[-1]}")


def describe_checkpoints(folder: Path) -> str | None:
    """Return a line on the checkpoints next to the final adapter of a training, None if there are none."""
    steps = {
        step for path in (find_checkpoints(folder) if folder.is_dir() else ()) if (step := step_of(path)) is not None
    }
    return f"{count_and_span(steps)}; --series shows them" if steps else None


def by_step(names: Iterable[str | Path]) -> dict[int, str | Path]:
    """Return checkpoints by step: from their names, or 1, 2, ... if no name has a step.

    Raises
    ------
    ValueError
        Only some names have a step, or two have the same.
    """
    listed = list(names)
    unknown = [name for name in listed if step_of(name) is None]
    if unknown and len(unknown) < len(listed):
        raise ValueError(
            f"every name or none must have a step, got {printable(unknown[0])} without one; pass a dict {{step: path}}"
        )
    found: dict[int, str | Path] = {}
    for place, name in enumerate(listed, start=1):
        step = place if (own := step_of(name)) is None else own
        if step in found:
            raise ValueError(f"{printable(found[step])} and {printable(name)} both have step {step}")
        found[step] = name
    return found
