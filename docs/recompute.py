"""Results of the second edition, recomputed from its kept files with numpy, pandas and scipy only.

    python docs/recompute.py [data/evidence-2 data/registered-2.toml]

Pairs come from the gaps and losses in runs.csv.gz, claims on text from right.npz, all others from effects.csv.
"""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats


def interval(effects):
    """Return mean, low and high: Student's 95% interval of effects by seed."""
    n, mean = len(effects), np.mean(effects)
    half = stats.t.ppf(0.975, n - 1) * np.std(effects, ddof=1) / n**0.5
    return mean, mean - half, mean + half


def two_way_interval(D, clusters):
    """Return mean, low and high of D (seeds x rows): 95% interval over seeds and clusters of rows."""
    (n, R), (_, group) = D.shape, np.unique(clusters, return_inverse=True)
    G, seeds = group.max() + 1, D.mean(axis=1)
    S = (D - seeds[:, None]) @ np.eye(G)[group]  # seeds x clusters
    common = S.mean(axis=0)
    v_seed = seeds.var(ddof=1) / n
    v_row = G / (G - 1) * (common**2).sum() / R**2
    v_cell = ((S - common) ** 2).sum() / (n * (n - 1) * R**2)
    v = max(v_seed + v_row - v_cell, v_seed, v_row)
    terms = v_seed**2 / (n - 1) + v_row**2 / (G - 1) + v_cell**2 / ((n - 1) * (G - 1))
    df = max(v**2 / terms, n - 1) if terms else n - 1
    half = max(stats.t.ppf(0.975, df) * v**0.5, stats.t.ppf(0.975, n - 1) * v_seed**0.5)
    return seeds.mean(), seeds.mean() - half, seeds.mean() + half


def word(kind, bound, low, high):
    """Return the word of rule 5."""
    if kind == "gain":
        names = {(1, 0): "gain", (0, 1): "no gain", (1, 1): "gain below m"}
        return "loss" if high < 0 else names.get((low > 0, high < bound), "open")
    return {(1, 0): "no cost", (0, 1): "cost", (1, 1): "cost below d"}.get((low > -bound, high < 0), "open")


def pair_word(word, difference):
    """Return the word of rule 7, from that of rule 5 and the difference of the effects at both truths by seed."""
    if word in ("no gain", "loss", "cost"):
        return "not even there"
    if word not in ("gain", "no cost"):
        return word
    return "as claimed" if interval(difference)[1] > 0 else "not only there"


def results(folder, registration):
    """Return ``claim, n, effect, low, high, word, pair`` of all claims that were run, without rules 8 and 9."""
    runs = pd.read_csv(
        folder / "runs.csv.gz",
        dtype={"phase": str, "task": str},
        keep_default_na=False,
        na_values={"gap": "", "base_gap": "", "loss": ""},
    )
    runs = runs[(runs["role"] == "judged") & (runs["phase"] == "")]
    runs["value"] = (100 * (1 - runs["gap"] / runs["base_gap"])).fillna(-100 * np.log(runs["loss"]))
    values = runs.groupby(["arm", "seed"])["value"].mean()
    names = runs.drop_duplicates("run").set_index(["arm", "seed"])["run"]
    effects = pd.read_csv(folder / "effects.csv").query("truth == 'for'")
    table = []
    for claim in tomllib.loads(registration.read_text("utf-8"))["claim"]:
        pair = ""
        of_claim = effects[effects["claim"] == claim["id"]]
        seeds, rule = of_claim["seed"], claim["rule"]
        if of_claim.empty:
            continue
        if claim["id"].startswith("text."):
            bits, rows = np.load(folder / "right.npz"), pd.read_parquet(folder / "rows.parquet").query("tasks == ''")
            right = [
                np.stack([np.unpackbits(bits[names[arm, s]], count=len(rows)) for s in seeds]) for arm in claim["for"]
            ]
            estimate = two_way_interval(100.0 * right[0] - 100.0 * right[1], rows["cluster"])
        elif claim["id"].startswith("pair.") and len(claim["for"]) == 2:
            method, control = (values[arm][seeds].to_numpy() for arm in claim["for"])
            estimate = interval(method - control)
            other_method, other_control = (values[arm][seeds].to_numpy() for arm in claim["against"])
            difference = (method - control) - (other_method - other_control)
            pair = pair_word(word(rule["kind"], rule["bound"], *estimate[1:]), difference)
        else:
            estimate = interval(of_claim["effect"])
        table.append((claim["id"], len(seeds), *estimate, word(rule["kind"], rule["bound"], *estimate[1:]), pair))
    return pd.DataFrame(table, columns=["claim", "n", "effect", "low", "high", "word", "pair"])


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["data/evidence-2", "data/registered-2.toml"]
    print(results(*map(Path, arguments)).to_string(index=False, float_format="%.3f"))
