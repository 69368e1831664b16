"""Model of the processor, on which the rounding of a training depends."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_LISTING = Path("/proc/cpuinfo")
# On a virtual machine, the name is often that of a series, such as AMD EPYC. x86 has the first three, ARM the others.
_NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part", "CPU revision")


@cache
def processor_name() -> str:
    """Return the model of the processor, such as "AMD EPYC, cpu family 26, model 2, stepping 1"; "" if unknown."""
    fields = {}
    if _LISTING.exists():  # Linux
        first_processor = _LISTING.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        for line in first_processor.splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    names = [fields["model name"]] if "model name" in fields else []
    names += [f"{name} {fields[name]}" for name in _NUMBERS if name in fields]
    return ", ".join(names) or platform.processor()
