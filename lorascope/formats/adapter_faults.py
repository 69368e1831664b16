"""Faults in the tensors of an adapter that prevent reading it.

``lorascope doctor`` reports them as findings; for other commands they are errors.
"""

from __future__ import annotations

from typing import Literal

from lorascope.files.printable import printable

FaultKind = Literal["empty", "incomplete", "rank", "shape", "misfit"]
"""Tensors without values, without a partner, of another rank than the configuration, or that do not fit each other or
the base weight."""


class AdapterFault(ValueError):
    """Error on reading an adapter whose tensors have a fault, although its format is known.

    Parameters
    ----------
    kind : FaultKind
    path : path
        The adapter, or its configuration.
    reason : str
        The fault as one sentence, with the module.
    """

    # An exception is pickled with the arguments of ``Exception.__init__``.
    def __init__(self, kind: FaultKind, path: object, reason: str) -> None:
        super().__init__(kind, path, reason)
        self.kind, self.path, self.reason = kind, path, reason

    def __str__(self) -> str:
        return f"cannot read {printable(self.path)}: {self.reason}"


class BaseMisfit(AdapterFault):
    """Error on using a base model, ``path``, whose weight does not have the shape of an update."""

    def __init__(self, path: object, reason: str) -> None:
        ValueError.__init__(self, path, reason)
        self.kind, self.path, self.reason = "misfit", path, reason

    def __str__(self) -> str:
        return f"cannot use {printable(self.path)} as the base: {self.reason}"
