"""Planted evidence for every registered claim: runs in which statistic and control have given values.

``plant(claim, values, ...)`` returns evidence with one run per arm and seed. For claims on test rows the values are set
by the number of right rows, for the others by the kept tables that their statistics read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from lorascope.papers import (
    adalora,
    adapprox,
    alora,
    fourierft,
    fourierft_expressiveness,
    hydralora,
    hydralora_asymmetry,
    lisa,
    lora,
    neft,
    planted_ranks,
    rank_tables,
    score_agreement,
)
from lorascope.papers.judging import registration
from lorascope.papers.judging.kept_runs import RUN_COLUMNS, Evidence
from lorascope.papers.judging.registration import Registered
from lorascope.papers.judging.statistics import LogLikelihood, MeanOverRows

REGISTERED = registration.read()
FIRST, ROWS = 100, 3000
ROLES, LAYERS = ("q", "k", "v", "o", "ffn_in", "ffn_out"), range(48)
Tables = dict[tuple[str, str], pd.DataFrame]
"""Kept tables of one seed, by name and arm."""
Pair = tuple[Any, Any]


def modules() -> pd.DataFrame:
    """Return modules of many layers, so that correlations over them have little noise."""
    rows = [(f"{layer}.{role}", "", layer, role) for layer in LAYERS for role in ROLES]
    return pd.DataFrame(rows, columns=["module", "stack", "layer", "role"])


def with_fraction(inside: pd.Series, value: float) -> pd.DataFrame:
    """Return ranks of which a fraction is in the modules inside."""
    share = np.where(inside, value / inside.sum(), (1 - value) / (~inside).sum())
    return modules().assign(value=share * 8 * len(inside))


def role_fractions(**fractions: float) -> pd.DataFrame:
    """Return ranks with given fractions by role; the remaining roles share the rest."""
    table, rest = modules(), 1 - sum(fractions.values())
    others = [role for role in ROLES if role not in fractions]
    by_role = fractions | dict.fromkeys(others, rest / len(others))
    return table.assign(value=table["role"].map(by_role) / len(LAYERS) * 1000)


def correlated(reference: np.ndarray, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Return numbers with Spearman's correlation rho with a reference, nearly."""
    normal = (reference - reference.mean()) / reference.std()
    r = 2 * np.sin(np.pi / 6 * rho)
    own = rng.standard_normal(len(normal))
    own -= own.mean() + normal * (normal @ own) / len(normal)  # without a chance correlation
    return r * normal + np.sqrt(1 - r**2) * own / own.std()


COMPONENTS = 6000


def spread_ranks(deviation: float) -> pd.DataFrame:
    """Return ranks with a given standard deviation."""
    table = modules()
    signs = np.tile([-1.0, 1.0], len(table) // 2)
    return table.assign(value=4 + deviation * signs / signs.std(ddof=1))


def scores(values: dict[str, float], rng: np.random.Generator) -> pd.DataFrame:
    """Return scores with given correlations with the loss increase, which differs between the halves."""
    truth = rng.standard_normal(COMPONENTS)
    found = {name: correlated(truth, rho, rng) for name, rho in values.items()}
    noise = rng.standard_normal(COMPONENTS) * 0.5
    found |= {half: truth + sign * noise for half, sign in zip(score_agreement.HALVES, (1, -1), strict=True)}
    parts = [
        pd.DataFrame({"module": "m", "component": np.arange(COMPONENTS), "score": name, "value": value})
        for name, value in found.items()
    ]
    return pd.concat(parts, ignore_index=True)


def norms(role: str, quantity: str, skew: float) -> pd.DataFrame:
    """Return norms of layers with a given skew of a role; another quantity and the other role have another skew."""
    other = {"embed": "head", "head": "embed"}[role]
    decoy = {"update_norm": "factor_change", "factor_change": "update_norm"}[quantity]
    rows = [(name, str(block), True, size) for name in (quantity, decoy) for block, size in enumerate((1.0, 2.0, 4.0))]
    rows += [(quantity, role, False, 2 * 10**skew), (quantity, other, False, 2 * 10 ** (skew - 3))]
    rows += [(decoy, role, False, 2 * 10 ** (skew - 3)), (decoy, other, False, 2 * 10 ** (skew - 3))]
    return pd.DataFrame(rows, columns=["quantity", "place", "block", "value"])


SLOTS = 40


def similarities(parts: dict[tuple[str, str, str], tuple[str, float]], rng: np.random.Generator) -> pd.DataFrame:
    """Return cosines between factors of eight runs, two per domain.

    ``parts`` maps (factor, view, when) to "shared" or "apart" and the fraction of modules for which it holds.
    """
    tables = []
    for (factor, view, when), (what, value) in parts.items():
        number = round(value * SLOTS)
        cosine = rng.uniform(0.1, 0.2, (SLOTS, 8, SLOTS, 8))
        domain = np.arange(8) // 2
        same_domain = domain[:, None] == domain[None, :]
        for slot in range(SLOTS):
            own = rng.uniform(0.3, 0.4, (8, 8))
            if what == "shared":
                own = np.where(same_domain, own, 0.9 if slot < number else 0.0)
            else:
                own = np.where(same_domain, 0.95 if slot < number else 0.0, own)
            cosine[slot, :, slot, :] = (own + own.T) / 2
        points = SLOTS * 8
        upper = np.argwhere(np.triu(np.ones((points, points), bool)))
        flat = cosine.reshape(points, points)
        flat = (flat + flat.T) / 2
        first, second = upper.T
        tables.append(pd.DataFrame({
            "when": when, "factor": factor, "view": view, "shape": "s", "slot": first // 8, "first": first % 8,
            "other": second // 8, "second": second % 8, "cosine": flat[first, second],
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def directions(
    value: dict[str, float], common: dict[str, np.ndarray], power: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Return first directions that share a part with those of all runs.

    phi of two runs is the product of their values, each to twice the power of its run.
    """
    rows = []
    for when, phi in value.items():
        own, shared = rng.standard_normal(common[when].shape), common[when]
        part = np.clip(phi, 0.0, 1.0) ** power
        vector = part * shared / np.linalg.norm(shared) + np.sqrt(1 - part**2) * own / np.linalg.norm(own)
        rows.append(pd.DataFrame({"module": "m", "when": when, "index": np.arange(len(vector)), "value": vector}))
    return pd.concat(rows, ignore_index=True)


POOL, CHOSEN = 40_000, 6_000


def selection(core: np.ndarray, part: float, rng: np.random.Generator, universe: np.ndarray) -> pd.DataFrame:
    """Select neurons of four modules: a part from a core, the rest by lot from a universe."""
    taken = core[: round(part * CHOSEN)]
    left = np.setdiff1d(universe, taken)
    neurons = np.concatenate([taken, rng.choice(left, CHOSEN - len(taken), replace=False)])
    size = POOL // 4
    names = np.array([f"m{module}" for module in range(4)])[neurons // size]
    return pd.DataFrame({"module": names, "size": size, "pool": POOL, "neuron": neurons % size})


# What to plant for the claims that are not on test rows: (statistic, control, rng) -> kept tables of one seed.
BY_SEED: dict[str, Callable[[float, float, np.random.Generator], Tables]] = {
    "lora.amplify": lambda s, c, rng: {
        (lora.AMPLIFICATION, lora.LOW): pd.DataFrame({"module": ["a", "b"], "update": 10**s, "random": 10**c})
    },
    "adalora.ffn": lambda s, c, rng: {
        (rank_tables.RANKS, "AdaLoRA, from rank 12 to 8"): with_fraction(
            modules()["role"].isin(rank_tables.FEED_FORWARD), s
        )
    },
    "adalora.top": lambda s, c, rng: {
        (rank_tables.RANKS, "AdaLoRA, from rank 12 to 8"): with_fraction(modules()["layer"] >= 2 * len(LAYERS) // 3, s)
    },
    "autolora.spread": lambda s, c, rng: {
        (rank_tables.RANKS, "AutoLoRA"): spread_ranks(s)
    },
    "alora.attention": lambda s, c, rng: {
        (rank_tables.RANKS, "ALoRA"): role_fractions(q=s / 4, k=s / 4, v=s / 4, o=s / 4),
        (alora.REPLAYS, "ALoRA"): replays(c, c - 0.3),
    },
    "alora.queries": lambda s, c, rng: {
        (rank_tables.RANKS, "ALoRA"): role_fractions(q=0.15 + s / 4, k=0.15 + s / 4, v=0.15 - s / 4, o=0.15 - s / 4),
        (alora.REPLAYS, "ALoRA"): replays(c - 0.3, c),
    },
    "hydralora.tasks": lambda s, c, rng: {
        (hydralora.INFORMATION, hydralora.ROUTED): pd.DataFrame({
            "module": ["a", "b"] * 2, "when": ["start"] * 2 + ["end"] * 2,
            "information": [c + 0.7] * 2 + [s + 0.2] * 2, "chance": [0.7] * 2 + [0.2] * 2,
        })
    },
    "adapprox.tail": lambda s, c, rng: {
        (adapprox.TAILS, "AdamW"): pd.DataFrame({"module": ["a", "b"], "beyond": 0.01, "dealt": 0.01 * 10**s})
    },
    "expressiveness.more": lambda s, c, rng: {
        (fourierft_expressiveness.COURSE, arm): course(accuracy, 10)
        for arm, accuracy in zip(
            (fourierft_expressiveness.FOURIER, fourierft_expressiveness.SLOW, fourierft_expressiveness.FAST),
            (s, *rng.permutation([c, c - 0.2])), strict=True,
        )
    },
    "expressiveness.frequencies": lambda s, c, rng: {
        (fourierft_expressiveness.COURSE, fourierft_expressiveness.FOURIER): course(1.0, 10 ** (2 - s)),
        (fourierft_expressiveness.COURSE, fourierft_expressiveness.RANDOM): course(1.0, 10 ** (2 - c)),
    },
    "neft.use": lambda s, c, rng: {
        (neft.UTILIZATION, arm): pd.DataFrame({"role": "ffn_in", "rank": np.arange(500.0) + move * 500})
        for arm, move in ((neft.FEW, 0.0), (neft.REVERSED, s), (neft.CHANGED, c))
    },
}  # fmt: skip


def course(accuracy: float, epochs: float) -> pd.DataFrame:
    return pd.DataFrame({"best_accuracy": [accuracy], "epochs": [epochs]})


def replays(attention: float, queries: float) -> pd.DataFrame:
    groups = {"attention": attention, "q and k less v and o": queries}
    return pd.DataFrame({"group": list(groups), "value": list(groups.values()), "draws": 1000, "error": 1e-4})


def of_skew(arm: str, role: str, quantity: str, control: str = "") -> Callable[..., Tables]:
    def make(s: float, c: float, rng: np.random.Generator) -> Tables:
        found = {(lisa.NORMS, arm): norms(role, quantity, s)}
        return found | ({(lisa.NORMS, control): norms("embed", quantity, c)} if control else {})

    return make


BY_SEED |= {
    "lisa.embed": of_skew(lisa.SMALL, "embed", "update_norm", lisa.FULL),
    "lisa.embed_decoder": of_skew(lisa.SMALL_DECODER, "embed", "update_norm", lisa.WHOLE_FULL),
    "lisa.head_decoder": of_skew(lisa.ADAPTED_DECODER, "head", "update_norm", lisa.WHOLE_FULL),
    "lisa.learned": of_skew(lisa.ADAPTED, "embed", "factor_change"),
    "lisa.learned_decoder": of_skew(lisa.ADAPTED_DECODER, "embed", "factor_change"),
    "lisa.learned_head": of_skew(lisa.ADAPTED_DECODER, "head", "factor_change"),
}


def of_scores(score: str, size: bool) -> Callable[..., Tables]:
    every = (score_agreement.ADALORA, score_agreement.AUTOLORA, score_agreement.ALORA, score_agreement.SIZE)

    def make(s: float, c: float, rng: np.random.Generator) -> Tables:
        values = dict.fromkeys(every, -0.5) | {score: s} | ({score_agreement.SIZE: c} if size else {})
        return {(score_agreement.SCORES, lora.LOW): scores(values, rng)}

    return make


for _name, _score in (
    ("adalora", score_agreement.ADALORA),
    ("autolora", score_agreement.AUTOLORA),
    ("alora", score_agreement.ALORA),
):
    if _name != "alora":  # its claim is on the size of the update only
        BY_SEED[f"agreement.{_name}"] = of_scores(_score, size=False)
    BY_SEED[f"agreement.size.{_name}"] = of_scores(_score, size=True)


def of_sharing(**parts: Any) -> Callable[..., Tables]:
    """Plant similarities: arms -> (factor, view, when, what, side), where side picks the statistic or the control."""

    def make(s: float, c: float, rng: np.random.Generator) -> Tables:
        pick = {"s": s, "c": c}
        return {
            (hydralora_asymmetry.SIMILARITIES, getattr(hydralora_asymmetry, name)[-1]): similarities(
                {(f, view, when): (what, pick.get(value, value)) for f, view, when, what, value in of}, rng
            )
            for name, of in parts.items()
        }

    return make


BY_SEED |= {
    "asymmetry.space": of_sharing(
        OWN=[
            ("A", "space", "end", "shared", "s"),
            ("B", "space", "end", "shared", "c"),
            ("A", "raw", "end", "shared", 0.05),
            ("B", "raw", "end", "shared", 0.05),
            ("A", "space", "start", "shared", 0.05),
        ]
    ),
    "asymmetry.picture": of_sharing(
        COMMON=[("A", "raw", "end", "shared", "s"), ("A", "space", "end", "shared", 0.05)],
        OWN=[("A", "raw", "end", "shared", "c"), ("A", "space", "end", "shared", 0.9)],
    ),
    "asymmetry.meeting": of_sharing(
        OWN=[
            ("A", "space", "end", "shared", "s"),
            ("A", "space", "start", "shared", "c"),
            ("B", "space", "end", "shared", 0.05),
            ("A", "raw", "end", "shared", 0.05),
        ]
    ),
    "asymmetry.apart": of_sharing(COMMON=[("B", "raw", "end", "apart", "s"), ("B", "space", "end", "apart", 0.0)]),
    "asymmetry.apart_space": of_sharing(OWN=[("B", "space", "end", "apart", "s"), ("B", "raw", "end", "apart", 0.0)]),
    "asymmetry.same_text": of_sharing(
        COMMON=[("B", "raw", "end", "apart", "s"), ("B", "space", "end", "apart", 0.0)],
        QUARTERS=[("B", "raw", "end", "apart", "c"), ("B", "space", "end", "apart", 0.0)],
    ),
}


def of_recovery(name: str, quantity: str) -> Callable[..., Tables]:
    truth = np.repeat([0.0, 1.0, 3.0, 4.0], 500)

    def make(s: float, c: float, rng: np.random.Generator) -> Tables:
        found = correlated(truth, s, rng) if quantity == "correlation" else truth + np.tile([s, -s], 1000)
        table = pd.DataFrame({"module": np.arange(2000).astype(str), "planted": truth, "found": found})
        return {(planted_ranks.RECOVERY, planted_ranks.ALLOCATORS[name]): table}

    return make


for _name in planted_ranks.ALLOCATORS:
    for _quantity in ("correlation", "distance"):
        BY_SEED[f"planted.{_name}_{_quantity}"] = of_recovery(_name, _quantity)


def orthogonal(number: int, rng: np.random.Generator) -> np.ndarray:
    """Return normal vectors over the modules without any chance correlation among them, or with role and layer."""
    table = modules()
    places = pd.get_dummies(table[["role", "layer"]].astype("str")).to_numpy(np.float64)
    normal = rng.standard_normal((len(table), number))
    normal -= places @ np.linalg.lstsq(places, normal, rcond=None)[0]
    return np.linalg.qr(normal)[0].T * np.sqrt(len(table))


def copula(parts: Sequence[tuple[float, np.ndarray]], own: np.ndarray) -> np.ndarray:
    """Mix common normal numbers by the share of variance that they have; the rest is a run's own."""
    rest = 1 - sum(share for share, _ in parts)
    return sum(np.sqrt(share) * common for share, common in parts) + np.sqrt(max(rest, 0.0)) * own


def share_for_tau(tau: float) -> float:
    """Return the share of common variance that gives Kendall's tau between two normal samples."""
    return float(np.sin(np.pi / 2 * np.clip(tau, 0.0, 1.0)))


def plant_pairs(
    claim: str, statistic: Sequence[float], c: float, seeds: Sequence[int], rng: np.random.Generator
) -> dict[int, Tables]:
    """Plant the kept tables of a claim on pairs of runs."""
    table = modules()
    common, first, second, *own = orthogonal(3 + 2 * len(seeds), rng)
    found: dict[int, Tables] = {seed: {} for seed in seeds}
    if claim in ("adalora.stable", "adalora.beyond"):
        # Seeds agree on the layers; or beyond role and layer, where all agree on the roles.
        by_layer = norm.ppf((table["layer"].to_numpy() + 0.5) / len(LAYERS))
        by_role = table["role"].map({role: 20.0 * i for i, role in enumerate(ROLES)})
        shared, rest = (by_layer, 0) if claim == "adalora.stable" else (common, by_role)
        for seed, s, noise in zip(seeds, statistic, own, strict=False):
            value = copula([(share_for_tau(s), shared)], noise) + rest
            found[seed][rank_tables.RANKS, "AdaLoRA, from rank 12 to 8"] = table.assign(value=value)
    elif claim in ("adalora.task", "autolora.tasks"):
        name = {"adalora.task": "AdaLoRA, from rank 12 to 8"}.get(claim, "AutoLoRA")
        domains = {"adalora.task": f"{name}, domains"}.get(claim, f"{name}, search only, domains")
        between = share_for_tau(c)
        runs = ((name, first, own[: len(seeds)], 0.5), (domains, second, own[len(seeds) :], -0.5))
        for arm, of_task, noises, shift in runs:
            for seed, s, noise in zip(seeds, statistic, noises, strict=True):
                within = share_for_tau(s + shift * (s - c))  # of each arm another, with the mean s
                parts = [(between, common), (max(within - between, 0.0), of_task)]
                found[seed][rank_tables.RANKS, arm] = table.assign(value=copula(parts, noise))
    elif claim == "lora.direction":
        shared = {when: rng.standard_normal(4_000) for when in ("start", "end")}
        for seed, s in zip(seeds, statistic, strict=True):
            for arm, power in ((lora.LOW, 0.15), (lora.HIGH, 0.35)):
                found[seed][lora.DIRECTIONS, arm] = directions({"start": c, "end": s}, shared, power, rng)
    else:
        arms = {neft.MOVIES: 0.5, neft.TWEETS: -0.5} if claim == "neft.task" else {neft.CHANGED: 0.0}
        order = rng.permutation(POOL // 2)  # what runs share is in two of four modules
        universe = np.arange(POOL // 2 if claim == "neft.layers" else POOL)
        chance = CHOSEN / len(universe)
        for number, (arm, shift) in enumerate(arms.items()):
            core = order[CHOSEN * number : CHOSEN * (number + 1)]
            for seed, s in zip(seeds, statistic, strict=True):
                within = s + shift * (s - c)  # of each arm another, with the mean s
                # The part p of the selection is common, and of the rest (1 - p)^2 chance / (1 - p chance).
                part = float(np.clip((within - chance) / (1 - 2 * chance + within * chance), 0, 1))
                found[seed][neft.SELECTED, arm] = selection(core, part, rng, universe)
    return found


def row(run: str, arm: str, seed: int, role: str = "judged") -> dict[str, Any]:
    base: dict[str, Any] = dict.fromkeys(RUN_COLUMNS, "x")
    base |= {"run": run, "arm": arm, "role": role, "seed": seed, "rate": 1e-3, "task_hash": "t", "capability": "AVX2"}
    base |= {"steps": 1, "dirty": False, "cpu_seconds": 1.0, "trained_parameters": 1, "test_metric": 0.8}
    base |= {"validation_metric": 0.8, "validation_chance": 0.5, "validation_loss": 0.4, "test_loss": 0.4}
    return base | {"torch": "2.6.0", "threads": 1, "device": "cpu"}


def plant(
    registered: Registered, pair: Pair, statistic: Sequence[float], control: Sequence[float], seed: int = 0
) -> Evidence:
    """Return evidence in which statistic and control have these values, one for each seed."""
    rng, seeds = np.random.default_rng(seed), [FIRST + i for i in range(len(statistic))]
    arms = pair[0].arms() | pair[1].arms()
    runs, margins, nll, kept = [], {}, {}, {}
    baselines = {arm for arm in arms if REGISTERED.arms[arm].baseline}
    for number, at in enumerate(seeds):
        for arm in arms - baselines:
            runs.append(row(f"{arm}-{at}", arm, at))
            own = accuracies(registered.id, statistic[number], control[number], number)
            value = own.get(arm, statistic[number] if arm in pair[0].arms() else control[number])
            margins[f"{arm}-{at}"], nll[f"{arm}-{at}"] = answers(value, 0 if baselines else number)
    for arm in baselines:
        runs.append(row(arm, arm, 0, "baseline"))
        margins[arm], nll[arm] = answers(float(np.mean(control)), 0)
    if registered.id in BY_SEED:
        tables = {at: BY_SEED[registered.id](s, c, rng) for at, s, c in zip(seeds, statistic, control, strict=True)}
    elif registered.design.interval == "jackknife":
        tables = plant_pairs(registered.id, statistic, float(np.mean(control)), seeds, rng)
    else:
        tables = {}
    for at, of_seed in tables.items():
        for (name, arm), table in of_seed.items():
            kept.setdefault(name, {})[f"{arm}-{at}"] = table
    rows = pd.DataFrame({"task_hash": "t", "row": range(ROWS), "text": "", "label": 0, "group": "g"})
    return Evidence(pd.DataFrame(runs), rows.assign(cluster=np.arange(ROWS).astype(str)), margins, nll, kept)


def accuracies(claim: str, s: float, c: float, number: int) -> dict[str, float]:
    """Return the accuracies of arms that do not simply have the value of the statistic or of the control."""
    if claim == "placement.ffn":
        own = {arm: s + shift for arm, shift in zip(adalora.FEED_FORWARD_TYPES, (-0.01, 0.01), strict=True)}
        shifts = (-0.045, -0.015, 0.015, 0.045)
        return own | {arm: c + shift for arm, shift in zip(adalora.ATTENTION_TYPES, shifts, strict=True)}
    if claim == "hydralora.gap":
        many = {hydralora.FULL_MANY: 0.6 + s, hydralora.LORA: 0.6}
        return many | {hydralora.FULL_ONE: 0.5 + c, hydralora.LORA_ONE: 0.5}
    if claim == "fourierft.band":
        # With equal means over five seeds, the band that is best on the other seeds is the worst on this one.
        gains = (0.04, 0.04, 0.03)
        return {band: s + gains[i] * (number % 3 != i) for i, band in enumerate(fourierft.BANDS)}
    return {}


def answers(value: float, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return margins of which a share is right, and losses with a mean, from one value.

    Arms of one seed answer the same rows right, as far as their shares go, so that their difference has little noise.
    """
    order = np.random.default_rng(1000 + number).permutation(ROWS)
    right = np.empty(ROWS, bool)
    right[order] = np.arange(ROWS) < round(value * ROWS)
    return np.where(right, 9, -9).astype(np.int8), np.full(ROWS, -value)


def in_range(registered: Registered, pair: Pair) -> float:
    """Return a control value from which effects of several bounds both ways stay within the statistic's range."""
    own = {
        "adalora.ffn": 1 / 3, "adalora.top": 1 / 3, "autolora.spread": 0.8316, "alora.attention": 0.5,
        "alora.queries": 0.0, "neft.stable": 0.15, "neft.layers": 0.3, "neft.task": 0.15, "neft.use": 0.2,
        "expressiveness.more": 0.6, "hydralora.tasks": 0.1, "hydralora.gap": 0.05, "lora.direction": 0.2,
        "adalora.task": 0.2, "autolora.tasks": 0.2, "fourierft.band": 0.7, "agreement.size.adalora": 0.2,
        "agreement.size.autolora": 0.2, "agreement.size.alora": 0.2,
    }  # fmt: skip
    if registered.id in own:
        return own[registered.id]
    if registered.id.startswith("asymmetry"):
        return 0.3
    if registered.id.endswith("_distance"):
        return 1.5
    losses = (LogLikelihood, MeanOverRows)
    if isinstance(pair[0], losses) and registered.bound.unit == "nats":
        return -1.0
    return 0.7 if registered.design.interval == "two-way" else 0.0
