"""Peak memory of a training: what torch allocated on a GPU, or the high-water mark of the process on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def reset_peak(device: str) -> None:
    """Start a new measurement on a GPU; the high-water mark of a process cannot be reset."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int | None:
    """Return the peak in bytes, or None where it is not known.

    On a CPU it is the largest resident memory since the start of the process, including its code and all that ran in
    it before.
    """
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    if kind != "cpu":
        return None
    if _STATUS.exists():
        # Not getrusage, whose value includes the process that started this one.
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    # macOS reports bytes, other systems KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
