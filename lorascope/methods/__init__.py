"""Fine-tuning methods, one file per paper. The class statement of a method registers it; no list names it.

Other packages add methods through the entry point group ``lorascope.methods``. An entry point names the module with the
class statement, as in ``yours = "your_package.your_method"``.
"""

import sys
from typing import TYPE_CHECKING, Any

from lorascope.methods.method import METHODS
from lorascope.schema.plugins import load_plugins

__all__ = ["METHODS"]

load_plugins(__name__, __name__)
for _name, _module in list(sys.modules.items()):
    if _name.startswith(f"{__name__}."):
        _public = list(getattr(_module, "__all__", ()))
        _public += [method.__name__ for method in METHODS.values() if method.__module__ == _name]
        globals().update((public, getattr(_module, public)) for public in _public)
        __all__ += dict.fromkeys(_public)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
