"""What a cause looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lorascope.schema.deprecation import accept_old_fields, formerly


@accept_old_fields
@dataclass(frozen=True)
class Finding:
    """A cause that was found.

    Parameters
    ----------
    cause : str
        Its name, one of ``CAUSES``.
    message : str
        What is wrong, with its numbers.
    evidence : dict
        The numbers by name, thresholds among them.
    fix : str
        What to do.
    """

    cause: str
    message: str = field(metadata=formerly("told"))
    evidence: dict[str, Any]
    fix: str = field(metadata=formerly("mend"))


@dataclass(frozen=True)
class Case:
    """What the causes look at.

    Parameters
    ----------
    modules : DataFrame
        A row for every module that trains or carries an adapter: ``module, stack, layer, role, rank, adapted, scale,
        update_norm, moved, weight_norm, relative_update, effective_rank, used, empty``. ``moved`` is the norm of what
        training changed, ``used`` counts the components that are not zero, ``empty`` says that all factors are.
    losses : Series
        Training loss by step.
    meta : mapping
        ``run.json``, or what stands for it; ``meta["method"]`` holds an adapter's configuration.
    history : bool
        Was the training itself recorded?
    weights, base : bool
        Are norms of the weights known, and is it known which weights the base has?
    tied : tuple of (str, str)
        Pairs of adapted modules that are one weight of the base.
    """

    modules: pd.DataFrame
    losses: pd.Series
    meta: Mapping[str, Any]
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
        """Adapters that say nothing though their scale and one of their factors would let them."""
        adapted = self.adapted
        return adapted[(adapted["update_norm"] == 0) & (adapted["scale"] != 0) & ~adapted["empty"]]

    @property
    def is_adalora(self) -> bool:
        """Is it AdaLoRA's, ours or PEFT's?"""
        return "adalora" in (self.meta["method"].get("name"), str(self.meta["method"].get("kind")).lower())


Found = Iterator[Finding]


@dataclass(frozen=True)
class Cause:
    """A cause in the register.

    Parameters
    ----------
    names : tuple of str
        What its findings are called.
    find : callable
    needs : {"factors", "weights", "base", "history"}
        Without which it cannot be looked for.
    suppresses : tuple of str
        Findings that only follow from it, and are left out beside it.
    """

    names: tuple[str, ...]
    find: Callable[[Case], Found]
    needs: str = "factors"
    suppresses: tuple[str, ...] = ()


def count_phrase(some_of: Any, modules: Any) -> str:
    """So many of so many modules have."""
    return f"{len(some_of)} of {len(modules)} modules ha{'s' if len(some_of) == 1 else 've'}"
