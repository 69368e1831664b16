"""HydraLoRA's motivation: similarity of A and of B between LoRAs trained on different domains or tasks.

Are the A's of different domains similar because of training, or because of a shared initial A? The paper trains one
LoRA per domain, all with the same seed, and plots every factor by t-SNE. The A's of one module coincide, and the B's
separate by domain. But A starts random, B starts at zero, and A changes little, so a shared initial A already explains
the figure. Runs on the same text therefore start from a shared A and from separate A's. Random thirds of
one text show which distances between B's are due to the order of the data.

Shared fraction: the fraction of A's (or B's) whose nearest A (B) of the same shape in another task belongs to the same
module. Own-group fraction: the fraction of B's whose nearest B of the same module is of the same domain, or third.

Source: HydraLoRA (arXiv 2404.19245), section 2.3, figures 3 and 9; the objection to a single seed: Ban & Ji (arXiv
2509.25414).

Departs:

- A small encoder on three domains of one task instead of LLaMA-2-7B on subsets of Dolly.
- Every run has a separate classifier head and data order. The head is new here, unlike that of a language model, and a
  shared one would make the B's similar.
- Nearest by spaces is the largest overlap of the row spaces of A, or the column spaces of B, because raw arrays depend
  on how an update is split into B and A.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.linalg import block_diag

from lorascope.analysis.factor_embeddings import FactorSet, Updates, build_factor_sets, factored_updates, tsne
from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Point
from lorascope.papers.arms import Arm, KeptTable
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import Comparison, Constant, OfTable
from lorascope.papers.judging.truth_names import task_name
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.plots.factor_embeddings import join_dots
from lorascope.runs.run import Run
from lorascope.schema.module_roles import FFN

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

DOMAINS = ("tweets", "movies", "products")
THIRDS = ("third 1", "third 2", "third 3")
TASKS = tuple(map(task_name, range(truth_names.TASKS)))
SEPARATE, SHARED = "separate starts", "shared start"
SHARED_A, UNRELATED = truth_names.SHARED_A, truth_names.UNRELATED
PLANTED_STEPS = 1200
"""Steps on planted teachers, at a rate of 3.2e-3: after 300 at 1e-2, A's of tasks that share A are less similar."""
_TEXT_RUNS = 2 * len(DOMAINS)
"""Runs of a set on text, two orders of each domain or third, and seeds that a replicate uses."""


def _text_set(groups: tuple[str, ...], start: str) -> dict[str, str]:
    """Return the label of each run of a set on text -> its domain or third."""
    return {f"LoRA, {group}, order {order}, {start}": group for group in groups for order in (1, 2)}


def _planted_set(truth: str, start: str) -> dict[str, str]:
    """Return the label of each run of a set on planted teachers -> its task."""
    return {f"LoRA, rank 4, {task}, {start}, {truth}": task for task in TASKS}


_FIRST, *_ = _text_set(DOMAINS, SEPARATE)
TEXT, TEXT_SHARED, TEXT_THIRDS = "domains, separate starts", "domains, shared start", "thirds, shared start"
SHARED_A_SEPARATE, SHARED_A_SHARED = f"{SHARED_A}, {SEPARATE}", f"{SHARED_A}, {SHARED}"
UNRELATED_SEPARATE, UNRELATED_SHARED = f"{UNRELATED}, {SEPARATE}", f"{UNRELATED}, {SHARED}"
SETS: dict[str, dict[str, str]] = {
    TEXT: _text_set(DOMAINS, SEPARATE),
    # The other runs start from the initial A of the first run, so it is in both sets.
    TEXT_SHARED: {_FIRST: DOMAINS[0]} | dict([*_text_set(DOMAINS, SHARED).items()][1:]),
    TEXT_THIRDS: _text_set(THIRDS, SHARED),
    SHARED_A_SEPARATE: _planted_set(SHARED_A, SEPARATE),
    SHARED_A_SHARED: _planted_set(SHARED_A, SHARED),
    UNRELATED_SEPARATE: _planted_set(UNRELATED, SEPARATE),
    UNRELATED_SHARED: _planted_set(UNRELATED, SHARED),
}
"""Sets of runs of one seed whose factors are compared: label of each run -> its task, domain or third."""
MOTIVE: dict[str, dict[str, int]] = {}
"""Labels of the small version's arms -> settings that it changes."""
for _name in SETS:
    # Two thirds of the texts have at most 28 tokens.
    _changes = {"steps": 60, "test_size": 200, "max_length": 28} if _name in (TEXT, TEXT_SHARED) else {"steps": 300}
    if _name != TEXT_THIRDS:
        MOTIVE |= dict.fromkeys(SETS[_name], _changes)


def study_arms() -> list[Arm]:
    """Return the arms whose factors are compared: 17 runs per replicate on text, 16 per seed on planted teachers."""
    from lorascope.methods import LoRA

    settings = {"steps": 300, "batch_size": 16, "eval_every": 0, "eval_size": 16, "test_size": 400, "observe": []}
    arms: dict[str, Arm] = {}
    for name in (TEXT, TEXT_SHARED, TEXT_THIRDS):
        # ``_of_replicate`` replaces the 0 by the seed of the replicate's first run.
        init_seed = None if name == TEXT else 0
        method = LoRA(rank=8, alpha=8.0, init_seed=init_seed, lr=1.8e-3, head_lr=1.8e-3)
        for number, (label, group) in enumerate(SETS[name].items()):
            arm = Arm(label=label, method=method, settings=settings, task=f"sentiment/{group}")
            if name == TEXT_THIRDS:
                arm = replace(arm, task="sentiment", vary=partial(_of_third, number))
            else:
                arm = replace(arm, vary=partial(_of_replicate, number))
            arms.setdefault(label, arm)
    students = {}
    for number, task in enumerate(TASKS):
        for start in (SEPARATE, SHARED):
            method = partial(_of_planted_task, number + 1 if start == SEPARATE else 0)
            students[f"LoRA, rank 4, {task}, {start}"] = Student(method, single_task=number)
    return [*arms.values(), *planted_arms(students, (SHARED_A, UNRELATED), PLANTED_STEPS)]


def _of_planted_task(start: int, base: Any, seed: int) -> Method:
    """Return the method on one task of a planted teacher, with one of the initial A's of a seed."""
    from lorascope.methods import LoRA

    init_seed = (len(TASKS) + 1) * seed + start
    return LoRA(rank=4, alpha=16.0, targets=FFN, init_seed=init_seed, lr=3.2e-3, head_lr=3.2e-3)


def _of_replicate(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate, with a seed for head and data order that no other run of its set has.

    Runs with a shared start take the initial A of the replicate's first run.
    """
    from lorascope.methods import LoRA

    first = seed * _TEXT_RUNS  # so that the seeds of two replicates never overlap
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + number})


def _of_third(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate on one of three random parts of the text, which the seed deals."""
    from lorascope.inputs import tasks
    from lorascope.inputs.task_parts import random_part

    task = random_part(tasks.load("sentiment"), 1 + number // 2, len(THIRDS), seed)
    return _of_replicate(number, replace(arm, task=task), seed)


def nearest_factors(updates: Updates, tasks: Mapping[str, str]) -> pd.DataFrame:
    """Find the nearest factor of every A and B, by raw arrays and by spaces in other tasks, and in its module.

    Parameters
    ----------
    updates : mapping run -> module -> update
        Updates with factors A and B.
    tasks : mapping run -> task
        Task of each run.

    Returns
    -------
    DataFrame
        ``factor, view, module, task, other_module, other_task, x, y``, one row per factor and view. Views "raw" (cosine
        of the arrays) and "space" (overlap of row spaces of A or column spaces of B) find the nearest factor of the
        same shape in another task, and "module" the nearest raw array of the same module in another run. ``x, y`` is
        the position of a raw array in a t-SNE plane of all A's, or of all B's.
    """
    tables = []
    for factor in ("A", "B"):
        raw = build_factor_sets(updates, tasks, (factor,), "raw")
        spaces = build_factor_sets(updates, tasks, (factor,), "space")
        for view, clouds in {"raw": raw, "space": spaces, "module": raw}.items():
            table = pd.concat(map(partial(_find_nearest, in_module=view == "module"), clouds), ignore_index=True)
            table = table.assign(factor=factor, view=view, x=np.nan, y=np.nan)
            if view == "raw":
                table[["x", "y"]] = _embed(raw)
            tables.append(table)
    columns = ["factor", "view", "module", "task", "other_module", "other_task", "x", "y"]
    return pd.concat(tables, ignore_index=True)[columns].astype({"x": "float32", "y": "float32"})


def _find_nearest(cloud: FactorSet, in_module: bool) -> pd.DataFrame:
    """Return the nearest factor of every factor in other tasks, or in its module."""
    points = cloud.table().rename(columns={"domain": "task"})
    column = points["module" if in_module else "task"].to_numpy()
    is_allowed = (column[:, None] == column) == in_module
    np.fill_diagonal(is_allowed, False)
    nearest = np.where(is_allowed, cloud.flat, -np.inf).argmax(axis=1)
    neighbors = points.loc[nearest, ["module", "task"]].add_prefix("other_").reset_index(drop=True)
    return points.join(neighbors)


def _embed(clouds: Sequence[FactorSet]) -> Float[np.ndarray, "point 2"]:
    """Embed the factors of all shapes in one plane by t-SNE; two of different shapes count as orthogonal."""
    cosine = block_diag(*map(attrgetter("flat"), clouds))
    size = len(cosine) // len(clouds[0].runs), len(clouds[0].runs)
    names = [""] * size[0]  # t-SNE reads the cosines only
    return tsne(replace(clouds[0], modules=names, factors=names, cosine=cosine.reshape(*size, *size)))


def nearest_table(*runs: Run, name: str) -> pd.DataFrame:
    """Return the table ``nearest`` of a set of runs, given in the order of ``SETS[name]``; see ``nearest_factors``."""
    tasks = SETS[name]
    updates = {label: factored_updates(run.updates()) for label, run in zip(tasks, runs, strict=True)}
    table = nearest_factors(updates, tasks)
    table.insert(0, "set", name)
    return table


KEPT_TABLES: dict[str, list[KeptTable]] = {
    "nearest": [(tuple(labels), partial(nearest_table, name=name)) for name, labels in SETS.items()]
}


def shared_fraction(table: pd.DataFrame, factor: str, view: str) -> float:
    """Compute the percentage of factors whose nearest factor in another task belongs to the same module."""
    rows = table[(table["factor"] == factor) & (table["view"] == view)]
    return float(100 * (rows["module"] == rows["other_module"]).mean())


def own_group_fraction(table: pd.DataFrame) -> float:
    """Compute the percentage of B's whose nearest B of the same module is of the same task."""
    rows = table[(table["factor"] == "B") & (table["view"] == "module")]
    return float(100 * (rows["task"] == rows["other_task"]).mean())


def _of_set(function: Callable[[pd.DataFrame], float], name: str) -> OfTable:
    *labels, last = SETS[name]
    return OfTable(function, "nearest", last, tuple(labels))


def sharing_in(name: str, factor: str, view: str) -> OfTable:
    """Return the shared fraction of A or B in a set of runs."""
    return _of_set(partial(shared_fraction, factor=factor, view=view), name)


def own_group_in(name: str) -> OfTable:
    """Return the own-group fraction of a set of runs."""
    return _of_set(own_group_fraction, name)


POWER = sharing_in(SHARED_A_SEPARATE, "A", "space") - sharing_in(UNRELATED_SEPARATE, "A", "space")
CHANCE = Constant(100 / (_TEXT_RUNS - 1))
"""One of the five other runs has the same domain."""

JUDGED = {
    "factors.start": Comparison(sharing_in(TEXT_SHARED, "A", "raw") - sharing_in(TEXT, "A", "raw")),
    "factors.space": Comparison(sharing_in(TEXT, "A", "space") - sharing_in(TEXT, "B", "space"), positive=POWER),
    "factors.domain": Comparison(
        own_group_in(TEXT_SHARED) - own_group_in(TEXT_THIRDS), positive=own_group_in(TEXT_SHARED) - CHANCE
    ),
    "factors.artifact": Comparison(
        sharing_in(UNRELATED_SHARED, "A", "space") - sharing_in(UNRELATED_SEPARATE, "A", "space")
    ),
    "factors.power": Comparison(POWER),
}

_GROUNDS = {
    # With the percentage at random: 12 modules of one shape on text, and 6 of each shape on planted teachers.
    "text": (TEXT, TEXT_SHARED, 100 / 12),
    SHARED_A: (SHARED_A_SEPARATE, SHARED_A_SHARED, 100 / 6),
    UNRELATED: (UNRELATED_SEPARATE, UNRELATED_SHARED, 100 / 6),
}
_VIEWS = {"raw": dict.fromkeys("AB", "by cosine"), "space": {"A": "by row space", "B": "by column space"}}
MEAN = "mean and range over seeds"
_SERIES = (*DOMAINS, MEAN, "at random")


def factors_figure(table: pd.DataFrame) -> Panels:
    """Draw the kept table ``nearest``: t-SNE planes of A and B on text above, shared fractions of all grounds below.

    The dots of the planes are of the first seed.
    """
    planes, fractions = [], []
    for factor in ("A", "B"):
        of_factor = table[table["factor"] == factor]
        for name, start in {TEXT: SEPARATE, TEXT_SHARED: SHARED}.items():
            of_set = of_factor[of_factor["set"] == name]
            if len(of_set):  # a small version may have only one ground
                planes.append(factor_plane(of_set, f"{factor}, {start}", _SERIES))
        for view in _VIEWS:
            fractions.append(
                _shared_fractions(of_factor[of_factor["view"] == view], f"nearest {factor}\n{_VIEWS[view][factor]}")
            )
    seeds = table.groupby("set")["seed"].nunique()
    counts = []
    for separate, shared, _ in _GROUNDS.values():
        counts += [str(seeds[name]) for name in (separate, shared) if name in seeds]
    caption = (
        "Above: the A or B of one module in one LoRA of MiniLM on one domain of sentiment, placed by t-SNE, first "
        "seed; lines join a module's dots with their mean. Below: factors whose nearest factor in another domain or "
        "task, by cosine of the arrays or overlap of their spaces, belongs to the same module. Rows: the domains of "
        "sentiment, and planted tasks of a small decoder that share A or have unrelated updates; runs start from "
        f"separate or shared A's. Seeds, by row: {', '.join(counts)}."
    )
    by_cosine = fractions[0].data.set_index("row")["value"]
    fractions[0], title = replace(fractions[0], caption=caption), "Similarity of A and of B between domains or tasks"
    if {TEXT, TEXT_SHARED}.issubset(by_cosine.index):
        title = (
            f"The nearest A in another domain is of the same module in {by_cosine[TEXT_SHARED]:.0f}% with a shared "
            f"start, in {by_cosine[TEXT]:.0f}% with separate ones (chance {_GROUNDS['text'][-1]:.0f}%)"
        )
    return replace(stack_vertically(set_side_by_side(*planes), set_side_by_side(*fractions)), title=title)


def factor_plane(
    of_set: pd.DataFrame, title: str, colors: Sequence[str], color: str = "task", **settings: Any
) -> Chart:
    """Draw the raw factors of the first seed of a set by their places, colored by a column, and join each module's."""
    dots = of_set[(of_set["view"] == "raw") & (of_set["seed"] == of_set["seed"].min())]
    # A plane has neither an origin nor a unit.
    low, high = dots[["x", "y"]].min(), dots[["x", "y"]].max()
    scaled = (dots[["x", "y"]] - (low + high) / 2) / (high - low).max()
    dots = dots.assign(x=scaled["x"], y=scaled["y"], series=dots[color])
    axis = Axis(ticks={}, limits=(-0.6, 0.6))
    marks = [join_dots(dots, ["module"]), Point("x", "y", "series", **settings)]
    return Chart(dots, marks, title=title, x=axis, y=axis, colors=colors, square=True)


def _shared_fractions(of_view: pd.DataFrame, title: str) -> Chart:
    """Draw the shared fractions of all sets for one factor and view, and those at random."""
    rows, at_random, ticks = [], [], {}
    factor, view = of_view[["factor", "view"]].iloc[0]
    for ground, (separate, shared, chance) in _GROUNDS.items():
        for name, tick in ((separate, f"{ground}: {SEPARATE}"), (shared, f"{ground}: {SHARED}")):
            of_set = of_view[of_view["set"] == name]
            for _, of_seed in of_set.groupby("seed"):
                rows.append((name, MEAN, shared_fraction(of_seed, factor, view)))
            if len(of_set):
                at_random.append((name, "at random", chance))
                ticks[name] = tick
    columns = ["row", "series", "value"]
    over_seeds = pd.DataFrame(rows, columns=columns).groupby(columns[:2], sort=False)["value"]
    cells = over_seeds.agg(value="mean", low="min", high="max").reset_index()
    chances = Point("value", "row", "series", symbol="line-ns-open", data=pd.DataFrame(at_random, columns=columns))
    x = Axis(label="same module (%)", limits=(0, 105))
    y = Axis(order=ticks, ticks=ticks, compact=True)
    marks = [chances, Point("value", "row", "series", low="low", high="high")]
    return Chart(cells, marks, title=title, x=x, y=y, colors=_SERIES)
