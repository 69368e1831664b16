"""Types of arrays and tensors with their shapes, for annotations: those of jaxtyping.

They describe shapes to a reader, and are checked at every call where jaxtyping is imported first, as its plugin for
pytest does. Elsewhere nothing evaluates them, and importing jaxtyping would take longer than many commands.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float32, Int, Int8, Int16, Shaped, UInt8
else:

    class _Array:
        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    Bool = Float = Float32 = Int = Int8 = Int16 = Shaped = UInt8 = _Array

__all__ = ["Bool", "Float", "Float32", "Int", "Int8", "Int16", "Shaped", "UInt8"]
