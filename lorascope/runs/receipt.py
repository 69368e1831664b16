"""Receipt of a measurement: what it was measured with, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lorascope


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Receipt of a measurement.

    Parameters
    ----------
    run : str
        Id of the measured run or adapter.
    base : str
        Name of the base model.
    rows : mapping str -> str
        Hash of the rows of each kind, such as task and keep, with their number: ``"192 rows 5f2a1c"``.
    call : mapping str -> value
        Arguments of the call that change the result.
    seed : int, optional
        Seed of the run; None for an adapter.
    command : str
        Command that measures the same again; "" if it is not known.
    seconds : float
        CPU time.
    version : str
        Version of lorascope.
    """

    run: str
    base: str
    rows: Mapping[str, str]
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str = ""
    seconds: float = 0.0
    version: str = lorascope.__version__

    def __str__(self) -> str:
        rows = [f"{kind} {text}" for kind, text in self.rows.items()]
        return ", ".join([f"run {self.run}", *rows, f"lorascope {self.version}", f"{self.seconds:.0f} CPU s"])

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as a JSON object."""
        return asdict(self)
