"""pandas, imported on its first use: it takes longer to import than an adapter takes to read.

The modules that ``lorascope inspect`` imports get pandas from here; annotations do not count as a use.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pandas
else:

    def _import_on_use(name: str) -> ModuleType:
        """Return a module that is loaded at the first access to one of its attributes."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    pandas = _import_on_use("pandas")
