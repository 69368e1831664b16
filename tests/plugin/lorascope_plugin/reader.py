"""A reader of files whose factors are called ``down`` and ``up``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorascope.formats import AdapterFiles, group_factors, reads
from lorascope.formats.stored_update import StoredLoRA

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>down|up)")


@reads(lambda config, names: any(name.endswith(".down") for name in names))
def read_flat(path: Path, config: Mapping[str, Any], files: Any, base: Any) -> AdapterFiles:
    """Read the modules of an opened folder."""
    found, others = group_factors(files, _FACTOR)
    parts = {module: StoredLoRA(each["up"], each["down"], 1.0, False) for module, each in found.items()}
    return AdapterFiles(path, dict(config), parts, others, files, "Flat")
