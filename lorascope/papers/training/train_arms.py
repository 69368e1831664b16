"""Arms of the first edition that short runs train."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pandas as pd

from lorascope.papers.probe import Arm, OwnArm
from lorascope.papers.registry import PROBES


@cache
def registered_arms() -> dict[str, Arm | OwnArm]:
    """Return the registered arms of all probes, as they are trained, by label.

    Raises
    ------
    ValueError
        Two arms have the same label.
    """
    by_label: dict[str, Arm | OwnArm] = {}
    for probe in PROBES.values():
        for arm in probe.arms():
            if by_label.setdefault(arm.label, arm) is not arm:
                raise ValueError(f"labels must be unique, got two arms with label {arm.label!r}")
    return by_label


def keep_functions() -> dict[tuple[str, str], Callable[..., pd.DataFrame]]:
    """Return the functions of all probes that compute a kept table when an arm is trained, by table and arm."""
    return {key: make for probe in PROBES.values() for key, make in probe.keep.items()}
