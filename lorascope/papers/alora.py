"""ALoRA: rank moved to attention, and to queries and keys; accuracy; and whether its score matters."""

from __future__ import annotations

from functools import partial

import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, OfRun
from lorascope.evidence.statistics.ranks import ATTENTION, of_roles

ADAPTED, RANDOM, UNIFORM = "ALoRA", "ALoRA, random scores", "LoRA, rank 4"
REPLAYS = "replays"
"""Kept table ``group, value, draws, error``: mean fraction of the total rank over replays of a run's rounds."""


def replayed(table: pd.DataFrame, group: str) -> float:
    """Return the mean fraction of a group of modules over replays of the run's rounds with random scores."""
    return float(table.loc[table["group"] == group, "value"].item())


CLAIMS = {
    "alora.attention": (of_roles(ADAPTED, *ATTENTION), OfRun(partial(replayed, group="attention"), REPLAYS, ADAPTED)),
    "alora.queries": (
        of_roles(ADAPTED, "q", "k") - of_roles(ADAPTED, "v", "o"),
        OfRun(partial(replayed, group="q and k less v and o"), REPLAYS, ADAPTED),
    ),
    "alora.better": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
    "alora.score": (Accuracy(ADAPTED), Accuracy(RANDOM)),
}
