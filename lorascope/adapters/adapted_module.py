"""Modules with a Delta, and the registry of their classes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

ADAPTED: dict[type[nn.Module], type[nn.Module]] = {}
"""Class of an adapted module, by the exact class of the module."""
BASE_CLASS: dict[type[nn.Module], type[nn.Module]] = {}
"""Class of a module without its Delta, by that with one."""


class Adapted(nn.Module):
    """Module with a Delta, created by ``attach``."""

    delta: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.delta._host = weakref.ref(self)


def register_adapted(kind: type[nn.Module], adapted: type[nn.Module]) -> None:
    """Register the class that a module of exactly this class gets when a Delta is attached to it."""
    ADAPTED[kind], BASE_CLASS[adapted] = adapted, kind
