"""Fine-tuning methods, one file per paper. Its class statement registers a method; no list names it.

Other packages add methods through the entry point group ``lorascope.methods``. An entry point names the module with the
class statement, as in ``yours = "your_package.your_method"``.
"""

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from lorascope.methods.base import METHODS

__all__ = ["METHODS"]

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    _found = {name: getattr(_module, name) for name in getattr(_module, "__all__", ())}
    _found |= {method.__name__: method for method in METHODS.values() if method.__module__ == _module.__name__}
    globals().update(_found)
    __all__ += _found

for _entry in entry_points(group=__name__):
    try:
        # A package that is being imported, and so caused this import, registers its method when it continues.
        importlib.import_module(_entry.module)
    except Exception as error:
        _problem = f"entry point {_entry.name!r} ({_entry.value}) failed with {type(error).__name__}: {error}"
        warnings.warn(f"cannot load method: {_problem}", stacklevel=2)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
