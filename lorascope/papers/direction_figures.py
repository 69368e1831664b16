"""Figures of the papers on directions, ranks by task, second moments and costs, from kept tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis.planted_ranks import chance_agreement, teacher_agreement
from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Heat, Line, Point, Rule, Text
from lorascope.papers import adapprox, hydralora_factors, variants
from lorascope.papers.course_figures import in_row
from lorascope.papers.figures.variant_gaps import common_seeds, published, range_by_step
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.variant_figures import VariantFigure
from lorascope.plots.builders import curves, ticks_at
from lorascope.schema import module_table

WIDTH = 384
"""Number of inputs of the text model's queries and values."""
_TOP = 64  # directions of W in a title
_LABEL_LIMIT = 0.55  # of the planes, whose dots are within 0.5
_NEXT_TO = ((0.0, 0.08), (0.0, -0.08), (0.09, 0.0), (-0.09, 0.0))
FEW_MODULES = ("q0", "v1", "q3", "v5")
"""Modules of the text model, by role and layer, whose factors have a figure."""


def rows_of(evidence: StudyEvidence, table: str, arm: str) -> pd.DataFrame:
    """Return the rows of a kept table of all judged runs of an arm; empty without one."""
    tables = [pd.DataFrame()]
    for seed in evidence.seeds(arm):
        tables.append(evidence.table(table, arm, seed))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def of_ranks(evidence: StudyEvidence, table: str) -> dict[str, pd.DataFrame]:
    """Return the rows of a kept table of LoRA of rank 8 and 64 on text; empty if one has no runs."""
    tables = {"rank 8": rows_of(evidence, table, variants.LOW), "rank 64": rows_of(evidence, table, variants.HIGH)}
    # Panels of both share limits, so one is not drawn without the other.
    return {} if tables["rank 8"].empty or tables["rank 64"].empty else tables


def at_random(cells: pd.DataFrame) -> pd.Series:
    """Return the expected similarity of random subspaces: max(i, j) / width."""
    return cells[["i", "j"]].max(axis=1) / WIDTH


def similarity_heat(cells: pd.DataFrame, title: str, caption: str, y: str, x: str) -> Chart:
    """Draw similarities of ``i`` (rows) and ``j`` (columns) minus random ones, on one scale."""
    axes: dict[str, Any] = {}
    for letter, name, label in (("x", "j", x), ("y", "i", y)):
        order = sorted(set(cells[name]))
        # Few enough ticks to be read.
        axes[letter] = Axis(label=label, order=order, ticks={n: str(n) for n in order if n == 1 or n % 8 == 0})
    cells = cells.assign(excess=cells["phi"] - at_random(cells))
    # No overlap is far below that of random directions.
    heat = Heat("j", "i", "excess", "φ − random", limits=(0.0, None))
    return Chart(cells, [heat], title=title, caption=caption, **axes)


def draw_subspaces(evidence: StudyEvidence) -> Drawable | None:
    """Draw LoRA's figures 3, 4 and 6: similarity of the directions of A between ranks, and between initial values."""
    table = rows_of(evidence, "overlaps", variants.OTHER_HIGH)
    if table.empty:
        return None
    keys = ["pair", "layer", "role", "i", "j"]
    means = table.astype({"phi": "float64"}).groupby(keys)["phi"].mean().reset_index()
    of_pair = dict(iter(means.groupby("pair")))
    ranks, starts = map(of_pair.__getitem__, variants.PAIRS)
    first = ranks.query("i == 1 and j == 1")["phi"]
    seeds = len(evidence.seeds(variants.OTHER_HIGH))
    caption = (
        "LoRA of MiniLM on sentiment. φ(i, j): overlap of the first i right singular vectors of one A with the first j "
        f"of another one (0: orthogonal, 1: the same), mean of {seeds} pairs of runs that share neither seed nor "
        "initial A, minus that of random directions. Title: φ(1, 1) of q and v in layers 0, 2 and 5."
    )
    rows = []
    other = "rank 64, first j"
    for cells, pair, label in (
        (ranks[ranks["layer"] == 2], "Ranks 8 and 64", "rank 8, first i"),
        (starts, "Two runs of rank 64", "rank 64, first i"),
    ):
        row = []
        for name, of_panel in cells.groupby("role"):
            row.append(similarity_heat(of_panel, f"{pair}: {name}, layer 2", caption, label, other))
        rows.append(tuple(row))
    # Between these rows, the upper left corner of the first one, in other layers as well.
    for role, near in ranks[ranks["j"] <= 8].groupby("role"):
        row = []
        for layer, cells in near.groupby("layer"):
            title = f"First 8: {role}, layer {layer}"
            row.append(similarity_heat(cells, title, caption, "rank 8, first i", "rank 64, first j ≤ 8"))
        rows.insert(-1, tuple(row))
    title = (
        f"The first input directions of LoRA of ranks 8 and 64 overlap by {first.min():.2f} to {first.max():.2f} (at "
        f"random {1 / WIDTH:.3f}; paper: more than 0.5)"
    )
    return Panels(tuple(rows), title=title)


def draw_weight_directions(evidence: StudyEvidence) -> Drawable | None:
    """Draw LoRA's figure 8: similarity of the directions of W and of the update."""
    tables = of_ranks(evidence, "weight_overlaps")
    if not tables:
        return None
    means = {}
    for name, table in tables.items():
        means[name] = table.astype({"phi": "float64"}).groupby(["i", "j"])["phi"].mean().reset_index()
    shares = {}
    for name, cells in means.items():
        of_first = cells[cells["j"] == 1]
        shares[name] = of_first.set_index("i")["phi"][_TOP]
    counts = {len(evidence.seeds(arm)) for arm in (variants.LOW, variants.HIGH)}
    caption = (
        f"LoRA of MiniLM on sentiment, q of layer 2, mean of {' or '.join(map(str, sorted(counts)))} seeds. φ(i, j): "
        f"overlap of the first i of {WIDTH} right singular vectors of W with the first j of the update, minus that of "
        "random directions. The paper finds that the update avoids the top directions of W."
    )
    charts = []
    for name, of_panel in means.items():
        charts.append(
            similarity_heat(of_panel, f"LoRA of {name}", caption, "first i directions of W", "first j of the update")
        )
    title = (
        f"The first {_TOP} of W's {WIDTH} input directions hold {shares['rank 8']:.0%} of the update's first direction "
        f"at rank 8, {shares['rank 64']:.0%} at rank 64 (at random {_TOP / WIDTH:.0%})"
    )
    return set_side_by_side(*charts, title=title)


def draw_amplification(evidence: StudyEvidence) -> Drawable | None:
    """Draw LoRA's table 7: amplification, and norm of W along the update's, its own and random directions."""
    tables = of_ranks(evidence, "amplification")
    if not tables:
        return None
    kinds = {"along_update": "the update's", "along_weight": "W's own", "along_random": "random"}
    queries = pd.concat(tables, names=["rank"]).query("role == 'q'").rename(columns=kinds)
    by_layer = queries.groupby(["rank", "layer"])[[*kinds.values()]].mean()
    measured = by_layer.melt(var_name="name", ignore_index=False).reset_index()
    queries = queries.assign(factor=queries["update"] / queries[kinds["along_update"]])
    factors, factors_by_layer = queries.groupby("rank")["factor"].mean(), queries.groupby(["rank", "layer"])["factor"]
    numbers = published("LoRA", "Table 7")
    pattern = r"W_q on (?P<kind>the update's|its own top|random) directions, rank (?P<rank>\d+)"
    printed = numbers["method"].str.extract(pattern).assign(value=numbers["value"]).dropna()
    names = {"its own top": "W's own"}
    printed = printed.assign(name=printed["kind"].replace(names), rank="rank " + printed["rank"])
    updates = numbers["method"].str.extract(r"norm of the update, (?P<rank>rank \d+)").assign(value=numbers["value"])
    along = printed[printed["name"] == "the update's"].set_index("rank")["value"]
    printed_factors = (updates.dropna().set_index("rank")["value"] / along).rename("factor")
    by_seed = queries.groupby(["rank", "seed"])["factor"].mean().groupby("rank").agg(["min", "max", "count"])
    ranges = []
    for rank, low, high, count in by_seed.itertuples():
        ranges.append(f"{low:.2f} to {high:.2f} at {rank} ({count} seeds)")
    caption = (
        "MiniLM, sentiment; W of q. Norm of W along directions: ‖UᵀWV‖, where U and V are the left and right singular "
        "vectors of the update D, as many of W, or random ones. Amplification: ‖D‖ / ‖UᵀWV‖ with those of D. Dots "
        f"are layers, means over seeds. Range over seeds, mean of the layers: {', '.join(ranges)}. Printed numbers are "
        "of layer 48 of GPT-3."
    )
    y = Axis(order=kinds.values(), compact=True)
    x = Axis(label="‖UᵀWV‖", log=True)
    left = Chart(measured, [Point("value", "name", "rank")], title="Norm of W", x=x, y=y, caption=caption)
    marks = [Point("value", "name", "rank", hollow=True)]
    right = replace(left, data=printed, marks=marks, title="Norm of W, printed", x=replace(x, label="printed ‖UᵀWV‖"))
    y = Axis(order=[*factors.index, *printed_factors.index], compact=True)
    # Rank 64 occurs in both.
    measured_factors = (
        factors_by_layer.mean().reset_index().assign(row=lambda table: table["rank"])
    )  # a rank has the same dots below
    above = replace(
        left,
        data=measured_factors,
        marks=[Point("factor", "row", "rank")],
        title="Amplification",
        x=replace(x, label="‖D‖ / ‖UᵀWV‖"),
        y=y,
    )
    above_right = replace(
        above,
        data=printed_factors.reset_index().assign(row=lambda table: table["rank"]),
        marks=[Point("factor", "row", "rank", hollow=True)],
        title="Amplification, printed",
        x=replace(x, label="printed ‖D‖ / ‖UᵀWV‖"),
    )
    title = (
        f"The update amplifies its directions of W {factors['rank 8']:.1f} times at rank 8, {factors['rank 64']:.1f} "
        f"at 64 (printed: {printed_factors['rank 4']:.0f} at rank 4, {printed_factors['rank 64']:.1f} at 64)"
    )
    return stack_vertically(set_side_by_side(above, above_right), set_side_by_side(left, right), title=title)


def draw_ranks_by_task(evidence: StudyEvidence) -> Drawable | None:
    """Draw AutoLoRA's figure 3: ranks by module for two tasks, with agreement within and between tasks."""
    tables = []
    for name in variants.ON_TEACHERS:
        tables.append(rows_of(evidence, "ranks", f"{name}, {truth_names.UNEVEN}"))
        if tables[-1].empty:
            return None
    allocations = [_ranks_by_seed(table, "rank") for table in tables]
    # All runs of a teacher have its planted ranks.
    planted = [_ranks_by_seed(table, "planted")[0] for table in tables]
    agreement, chance = teacher_agreement(allocations, planted), chance_agreement(allocations, planted)
    caption = (
        f"AutoLoRA on the text of two planted teachers, each a small decoder with known ranks; mean of "
        f"{len(allocations[0])} runs per teacher, which differ in data order and initial values. Title: mean of "
        "Kendall's τ over pairs of runs, or of a run and its teacher; chance: 95th percentile after shuffling the "
        "ranks of every run. The paper finds that ranks differ between layers, projections and tasks, without a "
        "control."
    )
    rows = []
    for number, table in enumerate(tables):
        by_module = table.groupby("module")[["rank", "planted"]].mean()
        cells = by_module.reset_index().join(_parsed(by_module.index))
        row = []
        for column, name, digits in (("rank", "ranks that AutoLoRA finds", ".1f"), ("planted", "planted ranks", ".0f")):
            heat = Heat("layer", "role", column, "rank", digits, limits=(0.0, 4.0))
            axes: dict[str, Any] = {"x": Axis(label="block"), "y": Axis(order=list(variants.TYPES))}
            row.append(Chart(cells, [heat], title=f"Teacher {number + 1}: {name}", caption=caption, **axes))
        rows.append(tuple(row))
    same, different, with_planted = (
        f"{drawn_number(tau, '.2f')} (chance: up to {drawn_number(bound, '.2f')})"
        for tau, bound in zip(agreement, chance, strict=True)
    )
    title = (
        f"AutoLoRA's ranks agree with planted ones by τ = {with_planted}, between runs on one teacher by {same}, on "
        f"two by {different}"
    )
    return Panels(tuple(rows), title=title)


def _ranks_by_seed(table: pd.DataFrame, column: str) -> Float[np.ndarray, "run module"]:
    return table.pivot(index="seed", columns="module", values=column).to_numpy(np.float64)


def _parsed(modules: Iterable[str]) -> pd.DataFrame:
    """Tabulate the ``layer`` (as text) and ``role`` of modules, in their order."""
    table = pd.DataFrame(map(module_table.parse, modules), columns=["stack", "layer", "role"])
    return table[["layer", "role"]].astype({"layer": "str"})


def draw_second_moments(evidence: StudyEvidence) -> Drawable | None:
    """Draw Adapprox's figures 1 and 2: singular values of second moments, and error and time by rank."""
    table = rows_of(evidence, "moments", variants.MOMENTS)
    if table.empty:
        return None
    means = table.groupby(["quantity", "layer", "index"], dropna=False)["value"].mean().reset_index()
    caption = (
        "Second moments of AdamW after 100 steps of MiniLM on sentiment, mean over matrices and "
        f"{len(evidence.seeds(variants.MOMENTS))} seeds; gray: a line per layer. Shuffled: other entries with the same "
        "row and column sums. S-RSI, Adapprox's randomized factorization, covers the line of the best rank k (SVD). "
        "Any matrix of positive entries has one large singular value. Times are from the machine that trained the runs."
    )
    sigma = means[means["quantity"].isin(["moment_sigma", "moment_sigma_dealt"])].dropna(subset="layer")
    layer = "layer " + sigma["layer"].astype(int).astype(str)
    sigma = sigma.assign(name=layer.where(sigma["quantity"] == "moment_sigma", "shuffled"))
    sigma = sigma.groupby(["name", "index"])["value"].mean().reset_index()
    # The legend has no room for the layers, whose colors would be those of other panels.
    of_layers, shuffled = sigma[sigma["name"] != "shuffled"], sigma[sigma["name"] == "shuffled"]
    spectra = Chart(
        sigma,
        [
            Line("index", "value", stretch="name", muted=True, data=of_layers),
            Line("index", "value", "name", data=shuffled),
        ],
        title="Singular values",
        x=Axis(label="component", log=True),
        y=Axis(label="singular value / largest", log=True),
        caption=caption,
        colors=dict.fromkeys([*_ERRORS.values(), _RANK_ONE, *_TIMES.values(), "shuffled"]),
    )
    errors = _by_rank(means, _ERRORS)
    # Adafactor has no rank, so its error is drawn at both ends.
    rank_one = means.loc[means["quantity"] == "moment_error_rank_one", "value"].mean()
    ends = pd.DataFrame({"index": [errors["index"].min(), errors["index"].max()], "value": rank_one})
    errors = pd.concat([errors, ends.assign(recipe=_RANK_ONE)])
    at_rank = errors[errors["index"] == _TITLED_RANK].set_index("recipe")["value"]
    title = (
        f"AdamW's second moments: rank {_TITLED_RANK} has an error of {at_rank[_ERRORS['moment_error']]:.0%} "
        f"({at_rank[_ERRORS['moment_error_dealt']]:.0%} if shuffled), Adafactor's product {rank_one:.0%}"
    )
    return in_row(
        spectra,
        _curve(errors, "relative error", "Error by rank", caption, log=False),
        _curve(_by_rank(means, _TIMES), "seconds", "Time by rank", caption, log=True),
        title=title,
    )


_TITLED_RANK, _RANK_ONE = 8, "row-column product (Adafactor)"
_ERRORS = {
    "moment_error": "best rank k",
    "moment_error_s_rsi": "S-RSI",
    "moment_error_dealt": "best rank k, shuffled",
}
_TIMES = {
    "factoring_seconds_svd": "SVD",
    "factoring_seconds_l5_p5": "S-RSI",
    "factoring_seconds_svd_lowrank": "svd_lowrank",
}


def _by_rank(means: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    rows = means[means["quantity"].isin(list(names))]
    by_rank = rows.groupby(["quantity", "index"])["value"].mean().reset_index()
    return by_rank.assign(recipe=by_rank["quantity"].map(names))


def _curve(cells: pd.DataFrame, y: str, title: str, caption: str, log: bool) -> Chart:
    x = Axis(label="rank", log=True, ticks=ticks_at(cells["index"]))
    up = Axis(label=y, log=log, limits=None if log else (0, None))
    cells = cells.assign(low=np.nan, high=np.nan)
    return curves(cells, "index", (x, up), title=title, caption=caption, colors=dict.fromkeys(cells["recipe"]))


def draw_factors(evidence: StudyEvidence) -> Drawable | None:
    """Draw Adapprox's ranks and errors over the steps, and its guidance."""
    table = rows_of(evidence, "moments", variants.FACTORED)
    guided: dict[str, str] = {}
    for truth in adapprox.MOMENTS:
        name = truth.removeprefix("second moments ").removeprefix("of ")
        guided |= {name: f"{adapprox.OURS}, {truth}", f"{name}, guided": variants.guided(truth)}
    seeds = common_seeds(evidence, guided.values())
    if table.empty or not seeds:
        return None
    caption = (
        f"Left, center: 100 steps of MiniLM on sentiment, mean over matrices, whose smaller side is {WIDTH}; bands: "
        f"range over {len(evidence.seeds(variants.FACTORED))} seeds. Relative errors (Frobenius norm): this step's: of "
        "the factors, from what they factorize; drift: of the factors, from the exact average of squared gradients; "
        "best rank k: of its SVD; row-column product: of Adafactor's row and column sums. Right: quadratics whose "
        "second moments have rank 4 or no structure, at one rate, a dot per seed; guided: the average step is divided "
        "by one minus its cosine with the last one. The paper prints no values."
    )
    # Matrices of one group have one shape, and so one largest rank.
    groups = {**dict.fromkeys("qkvo", "attention"), "ffn_in": "feed-forward", "ffn_out": "feed-forward"}
    ranks = table[table["quantity"] == "factor_rank"].assign(role=table["role"].map(groups)).dropna(subset="role")
    ranks = range_by_step(ranks, "role")
    names = {
        "factor_error": "this step's error",
        "factor_drift": "drift from the exact average",
        "factor_drift_least": "best rank k of the exact average",
        "factor_drift_rank_one": "row-column product",
    }
    errors = range_by_step(table.assign(recipe=table["quantity"].map(names)).dropna(subset="recipe"), "recipe")
    rows = []
    for name, arm in guided.items():
        for seed in seeds:
            run = evidence.of_phase(arm, seed).iloc[0]
            rows.append((name, 100 * run["loss"] / run["first_loss"]))
    losses = pd.DataFrame(rows, columns=["name", "value"])
    # One legend for both panels, so no line of one looks like a line of the other.
    colors = dict.fromkeys([*ranks["role"], *errors["recipe"]])
    left = curves(
        ranks, "step", ("step", "rank"), color="role", points=False, title="Rank by group", caption=caption,
        colors=colors,
    )  # fmt: skip
    center = curves(
        errors, "step", ("step", Axis(label="relative error", log=True)), points=False, title="Error of the factors",
        colors=colors,
    )  # fmt: skip
    axes: dict[str, Any] = {"x": Axis(label="final loss (% of first)", log=True), "y": Axis(order=guided, compact=True)}
    at_end = ranks[ranks["step"] == ranks["step"].max()]["value"]
    # Every second arm is the guided one of the arm before it.
    by_arm = losses.groupby("name", sort=False)["value"].mean()
    ratios = by_arm[[f"{name}, guided" for name in by_arm.index[::2]]].to_numpy() / by_arm.iloc[::2].to_numpy()
    title = (
        f"Adapprox needs rank {at_end.min():.0f} to {at_end.max():.0f} of {WIDTH} after 100 steps; guidance multiplies "
        f"losses by {ratios.min():.2f} to {ratios.max():.2f}"
    )
    return in_row(left, center, Chart(losses, [Point("value", "name")], title="Guidance", **axes), title=title)


def read_factors(evidence: StudyEvidence, name: str) -> pd.DataFrame:
    """Return the kept factors of a set of LoRAs, and ``label``: role and layer."""
    table = evidence.tables.get("nearest", pd.DataFrame(columns=["set", "view", "seed", "module"]))
    rows = table[table["set"] == name]
    parsed = _parsed(rows["module"])
    return rows.assign(label=(parsed["role"] + parsed["layer"]).to_numpy())


def same_task_fraction(table: pd.DataFrame, factor: str) -> float:
    """Compute the percentage of A's or B's whose nearest one of the same module is of the same task, or third."""
    rows = table[(table["factor"] == factor) & (table["view"] == "module")]
    return float(100 * (rows["task"] == rows["other_task"]).mean())


def draw_thirds(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's figure 9: A's and B's of LoRAs on random thirds of a text, next to those on three texts."""
    tables = {"domains": read_factors(evidence, hydralora_factors.TEXT_SHARED),
              "thirds": read_factors(evidence, hydralora_factors.TEXT_THIRDS)}  # fmt: skip
    if tables["domains"].empty or tables["thirds"].empty:
        return None
    groups = (*hydralora_factors.DOMAINS, *hydralora_factors.THIRDS, hydralora_factors.MEAN)
    rows, fractions, shared = [], {}, []
    for factor, (name, table) in product("AB", tables.items()):
        row = f"{factor}, {name}"
        for _, of_seed in table.groupby("seed"):
            rows.append((row, hydralora_factors.MEAN, same_task_fraction(of_seed, factor)))
        fractions[row] = same_task_fraction(table, factor)
        shared.append(hydralora_factors.shared_fraction(table, factor, "raw"))
    by_seed = pd.DataFrame(rows, columns=["row", "series", "value"])
    cells = by_seed.groupby(["row", "series"])["value"].agg(value="mean", low="min", high="max").reset_index()
    chance = hydralora_factors.CHANCE.value
    same = Chart(
        cells,
        [Rule(x=chance, label="chance"), Point("value", "row", "series", low="low", high="high")],
        title="Nearest factor",
        x=Axis(label="same domain or third (%)", limits=(0, 100)),
        y=Axis(order=fractions),
        colors=groups,
    )
    charts = []
    for name, table in tables.items():
        charts.append(hydralora_factors.factor_plane(table[table["factor"] == "B"], f"B, {name}", groups))
    seeds, modules = tables["domains"]["seed"].nunique(), tables["domains"]["module"].nunique()
    caption = (
        "LoRAs of MiniLM for sentiment, with a shared initial A: on three domains of text, and on three random thirds "
        "of all text, two orders of the data each. Left: the B of one module in one run, placed by t-SNE, first seed; "
        "lines join a module's dots with their mean. Right: factors whose nearest factor of the same module is of the "
        f"same domain or third, {seeds} seeds; chance: one of the five other runs. Nearest factor of another text is "
        "of the same module: A {:.0f}% and {:.0f}%, B {:.0f}% and {:.0f}% ".format(*shared)
        + f"(chance {100 / modules:.0f}%)."
    )
    title = (
        f"Nearest B of a module: same domain in {fractions['B, domains']:.0f}%, same random third in "
        f"{fractions['B, thirds']:.0f}% (chance {chance:.0f}%)"
    )
    return in_row(replace(charts[0], caption=caption), charts[1], same, title=title)


def draw_sub_modules(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's figure 10: the A's and B's of four modules of LoRAs on several texts."""
    charts, fractions, of_all = [], {}, []
    sets = {"shared start": hydralora_factors.TEXT_SHARED, "separate starts": hydralora_factors.TEXT}
    for factor, (start, name) in product("AB", sets.items()):
        rows = read_factors(evidence, name)
        if rows.empty:
            return None
        cells = rows[(rows["factor"] == factor) & rows["label"].isin(FEW_MODULES)]
        fractions[factor, start] = hydralora_factors.shared_fraction(cells, factor, "raw")
        of_all.append(f"{hydralora_factors.shared_fraction(rows, factor, 'raw'):.0f}%")
        chance = 100 / rows["module"].nunique()  # all modules have one shape
        title = f"{factor}, {start}\nsame module: {fractions[factor, start]:.0f}%\n(chance {chance:.0f}%)"
        chart = hydralora_factors.factor_plane(cells, title, FEW_MODULES, "label", shape="task")
        charts.append(replace(chart, marks=[*chart.marks, place_labels(chart.data)]))
    caption = (
        "A's and B's of four modules (role and layer) of LoRAs of MiniLM for sentiment on three domains, two orders of "
        "the data each. A dot per run, placed by t-SNE; lines join a module's dots with their mean. Titles: factors "
        "whose nearest factor of another domain, among all modules, is from the same module. Dots: first of "
        f"{rows['seed'].nunique()} seeds; percentages: mean over seeds, over all modules {', '.join(of_all)}."
    )
    shared, separate = (fractions["A", start] for start in sets)
    title = (
        f"The nearest A of another domain is of the same module in {shared:.0f}% with a shared start, in "
        f"{separate:.0f}% with separate ones (chance {chance:.0f}%)"
    )
    return in_row(replace(charts[0], caption=caption), *charts[1:], title=title)


def place_labels(dots: pd.DataFrame) -> Text:
    """Return the label of each module, next to that of its dots where the most room is around the label."""
    labels: list[tuple[float, float, str]] = []
    for label, of_module in dots.groupby("label"):
        candidates = []
        for dot, step in product(of_module.index, _NEXT_TO):
            position = dots.loc[dot, ["x", "y"]].to_numpy(np.float64) + step
            obstacles = [*dots.drop(index=dot)[["x", "y"]].to_numpy(), *(near for *near, _ in labels)]
            if np.abs(position).max() < _LABEL_LIMIT:
                candidates.append((np.linalg.norm(np.array(obstacles) - position, axis=1).min(), *position))
        _, x, y = max(candidates)
        labels.append((x, y, str(label)))
    return Text("x", "y", "label", data=pd.DataFrame(labels, columns=["x", "y", "label"]))


def draw_frequency_bias(evidence: StudyEvidence) -> Drawable:
    """Draw FourierFT's figure 3, the probability of each entry under a frequency bias, which needs no run."""
    return plots.frequency_bias()


STUDY_FIGURES = {
    "subspaces": VariantFigure("LoRA", "Similarity of the directions of two A's", draw_subspaces),
    "weight-directions": VariantFigure("LoRA", "Directions of W and of the update", draw_weight_directions),
    "amplification-factor": VariantFigure("LoRA", "Norm of W along directions of the update", draw_amplification),
    "ranks-by-teacher": VariantFigure("AutoLoRA", "Ranks that AutoLoRA finds for two tasks", draw_ranks_by_task),
    "moments": VariantFigure(
        "Adapprox", "Second moments: singular values, error and time by rank", draw_second_moments
    ),
    "factor-course": VariantFigure("Adapprox", "Adapprox's ranks and errors over the steps; guidance", draw_factors),
    "thirds": VariantFigure("HydraLoRA", "A's and B's of LoRAs on random thirds of a text", draw_thirds),
    "sub-modules": VariantFigure("HydraLoRA", "A few A's and B's of LoRAs on three texts", draw_sub_modules),
    "frequency-bias": VariantFigure("FourierFT", "Probability of each entry by frequency bias", draw_frequency_bias),
}
