"""Programs that load an adapter, and what they do with it: one file each.

A program may apply a module, drop it without a word, or refuse the whole adapter. Names and shapes of the base model
come from the headers of its files.
"""

from __future__ import annotations

from lorascope.diagnosis.runtimes.runtime import RUNTIMES, Application, apply_adapter

__all__ = ["RUNTIMES", "Application", "apply_adapter"]
