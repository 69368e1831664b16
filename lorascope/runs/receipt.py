"""Receipt of a measurement: what it was measured with, so that it can be repeated."""

from __future__ import annotations

import shlex
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
    seed : int or tuple of int, optional
        Seed of the run, or of several runs; None for an adapter.
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
    seed: int | tuple[int, ...] | None = None
    command: str = ""
    seconds: float = 0.0
    version: str = lorascope.__version__

    def __str__(self) -> str:
        origin = [f"run {self.run}"]
        if isinstance(self.seed, tuple):
            origin.append(f"seeds {' '.join(map(str, self.seed))}")
        elif self.seed is not None:
            origin.append(f"seed {self.seed}")
        # Two runs of one task differ in their seeds only.
        rows = [f"{kind} {text}" for kind, text in self.rows.items()]
        return ", ".join([*origin, *rows, f"lorascope {self.version}", f"{self.seconds:.0f} CPU s"])

    def command_with(self, option: str, value: object) -> str:
        """Return the command with another value of one of its options; "" if there is no such command."""
        words = shlex.split(self.command)
        if option not in words:
            return ""
        words[words.index(option) + 1] = str(value)
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as a JSON object."""
        return asdict(self)
