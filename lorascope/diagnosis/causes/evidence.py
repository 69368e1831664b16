"""Input and result of a diagnostic check: ``Case`` and ``Finding``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lorascope.runs.manifest import Manifest
from lorascope.schema.deprecation import accept_old_fields, formerly


@accept_old_fields
@dataclass(frozen=True)
class Finding:
    """A finding of a check.

    Parameters
    ----------
    cause : str
        Name of the cause, one of those in ``CAUSES``.
    message : str
        The problem, with its numbers.
    evidence : dict
        Numbers by name, including thresholds.
    fix : str
        Suggested fix.
    """

    cause: str
    message: str = field(metadata=formerly("told"))
    evidence: dict[str, Any]
    fix: str = field(metadata=formerly("mend"))


@dataclass(frozen=True)
class Case:
    """Input of the checks.

    Parameters
    ----------
    modules : DataFrame
        One row per module that trains or has an adapter: ``module, stack, layer, role, rank, adapted, scale,
        update_norm, moved, weight_norm, relative_update, effective_rank, used, empty``. ``moved`` is the norm of the
        learned update, ``used`` the number of nonzero components, and ``empty`` whether all factors are zero.
    losses : Series
        Training loss by step.
    meta : Manifest
        Description of the run or the adapter.
    history : bool
        Whether the training itself was recorded.
    weights, base : bool
        Whether norms of the weights are known, and whether it is known which weights the base has.
    tied : tuple of (str, str)
        Pairs of adapted modules that are one weight of the base.
    """

    modules: pd.DataFrame
    losses: pd.Series
    meta: Manifest
    history: bool
    weights: bool
    base: bool
    tied: tuple[tuple[str, str], ...]

    @property
    def adapted(self) -> pd.DataFrame:
        """Modules with an adapter of rank 1 or more."""
        return self.modules[self.modules["adapted"]]

    @property
    def unchanged_adapters(self) -> pd.DataFrame:
        """Adapters with a zero update, although their scale and one of their factors are not zero."""
        adapted = self.adapted
        return adapted[(adapted["update_norm"] == 0) & (adapted["scale"] != 0) & ~adapted["empty"]]

    @property
    def is_adalora(self) -> bool:
        """Whether the adapter is AdaLoRA, of lorascope or PEFT."""
        return "adalora" in (self.meta.method.get("name"), str(self.meta.method.get("kind")).lower())


Found = Iterator[Finding]


@dataclass(frozen=True)
class Cause:
    """A registered check.

    Parameters
    ----------
    names : tuple of str
        Names of its findings.
    find : callable
        Function from a ``Case`` to findings.
    needs : {"factors", "weights", "base", "history"}
        Evidence that the check requires.
    suppresses : tuple of str
        Findings that only follow from this one, and are omitted.
    """

    names: tuple[str, ...]
    find: Callable[[Case], Found]
    needs: str = "factors"
    suppresses: tuple[str, ...] = ()


def count_phrase(some_of: Any, modules: Any) -> str:
    """Return "n of m modules have"."""
    return f"{len(some_of)} of {len(modules)} modules ha{'s' if len(some_of) == 1 else 've'}"
