"""Scores of components, each compared with its definition on one trained state, and their correlation."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from planted import manifest
from test_loading import write_run
from test_sensitivity import FAST, LOOK, Copying, gradients
from tolerance import TEXT, TINY, near, rounding
from torch.nn import functional as F

import lorascope as ls
from lorascope import plots
from lorascope.adapters import delta
from lorascope.analysis.score_agreement import collect_neuron_scores, correlate, spearman
from lorascope.experiments import component_removal
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, Full, LoRA, NeFT
from lorascope.runs.loading import load
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Record

SETTINGS = {"steps": 12, "batch_size": 8, "eval_size": 16, "progress": False, "device": "cpu"}

UNDECIDED = np.log(2)  # the loss of a uniform prediction, which sets the scale of rounding errors in a loss increase


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    file = folder / "toy.csv"
    task.table[["text", "label", "group"]].to_csv(file, index=False)
    method = LoRA(rank=3, alpha=12.0, targets="all-linear", lr=1e-2, head_lr=1e-2)
    return ls.train(bert, file, method, out=folder / "run", **SETTINGS)


@pytest.fixture
def state(trained, task):
    """Return the model without adapters, its update as P, lambda, Q, and two batches."""
    model = models.load(trained.meta.model, task)
    trained.restore(model)
    state = {
        name: component_removal.svd_of_update(part.update()) for name, part in delta.attached_deltas(model).items()
    }
    delta.detach(model)
    model.requires_grad_(False)
    fitted = task.fit(model)
    encoded = fitted.encode(models.tokenizer(model), fitted.split("test"))
    return model, state, [encoded.batch(range(0, 8)), encoded.batch(range(8, 16))]


def loss_with(model, updates, batch):
    """Compute the loss with these matrices added directly to the weights."""
    places = {name: model.get_submodule(name) for name in updates}
    before = {name: place.weight.detach().clone() for name, place in places.items()}
    with torch.no_grad():
        for name, place in places.items():
            place.weight += torch.from_numpy(updates[name]).float()
        found = float(
            F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
        )
        for name, place in places.items():
            place.weight.copy_(before[name])
    return found


def matrices(state, without=None, component=None):
    """Return the update matrices without one component (or, with None, without one module)."""
    made = {}
    for name, (P, sigma, Q) in state.items():
        sigma = sigma.copy()
        if name == without:
            sigma[slice(None) if component is None else component] = 0
        made[name] = (P * sigma) @ Q
    return made


def test_canonical_form_reproduces_the_update(trained, state):
    _, found, _ = state
    updates = trained.updates()
    assert set(updates) == set(found) != set()
    for name, update in updates.items():
        P, sigma, Q = found[name]
        assert (P * sigma) @ Q == pytest.approx(update.dense(), abs=1e-10)
        gram = P.T @ P
        assert gram == pytest.approx(np.eye(len(sigma)), abs=1e-12)


def test_loss_increases_match_direct_removal(state):
    model, found, batches = state
    rises = component_removal.loss_increases(model, lambda batch: model(**batch).loss, found, batches)
    assert not delta.attached_deltas(model)
    for name in list(found)[::5]:
        for component in (0, 2, None):
            by_hand = np.mean(
                [
                    loss_with(model, matrices(found, name, component), batch) - loss_with(model, matrices(found), batch)
                    for batch in batches
                ]
            )
            assert rises[name][-1 if component is None else component] == near(by_hand, UNDECIDED, terms=TINY, depth=2)
    assert max(np.abs(rise).max() for rise in rises.values()) > 1e-4  # far above rounding


def test_first_order_increases_match_central_differences(state):
    model, found, batches = state
    slopes = component_removal.first_order_increases(model, lambda batch: model(**batch).loss, found, batches)
    assert not delta.attached_deltas(model)

    def loss_at(name, component, factor):
        P, sigma, Q = found[name]
        sigma = sigma.copy()
        sigma[slice(None) if component is None else component] *= factor
        changed = matrices(found) | {name: (P * sigma) @ Q}
        return np.mean([loss_with(model, changed, batch) for batch in batches])

    for name in list(found)[::5]:
        for component in (0, 2, None):
            by_hand = (loss_at(name, component, 1.1) - loss_at(name, component, 0.9)) / 0.2
            bound = rounding(terms=TINY) / 0.2
            assert slopes[name][-1 if component is None else component] == pytest.approx(by_hand, rel=0.05, abs=bound)


def test_ablation_loss_increases_are_corrected_by_first_order_terms(state):
    """On all batches they are the loss increases. On one of two, they are corrected by the difference of the slopes."""
    model, found, batches = state

    def loss(batch):
        return model(**batch).loss

    whole = component_removal.loss_increases(model, loss, found, batches)
    same = component_removal.ablation_loss_increases(model, loss, found, batches, len(batches))
    part = component_removal.ablation_loss_increases(model, loss, found, batches, 1)
    first = component_removal.loss_increases(model, loss, found, batches[:1])
    each = [component_removal.first_order_increases(model, loss, found, [batch]) for batch in batches]
    for name in found:
        assert same[name] == pytest.approx(whole[name], abs=1e-9)
        mean = np.mean([slope[name] for slope in each], axis=0)
        assert part[name] == pytest.approx(first[name] + each[0][name] - mean, abs=1e-8)
    one, all_ = (np.concatenate(list(rises.values())) for rises in (first, whole))
    assert np.abs(np.concatenate(list(part.values())) - all_).mean() < 0.5 * np.abs(one - all_).mean()


def test_spearman_is_pearson_of_ranks_and_nan_for_a_constant():
    columns = np.array([[1.0, 10, 5], [2, 20, 5], [2, 15, 5], [9, 90, 5]])
    a, b = np.array([1, 2.5, 2.5, 4]), np.array([1.0, 3, 2, 4])
    expected = np.corrcoef(a, b)[0, 1]
    assert spearman(columns)[0, 1] == pytest.approx(expected)
    assert np.isnan(spearman(columns)[0, 2])


def test_correlate_resamples_modules_instead_of_components():
    """Copies of one component in a module add no information, so the interval does not change."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=30)
    y = x + draw.normal(size=30)

    def table(copies):
        rows = [
            {"run": "r", "module": f"m{i}", "component": c, "score": s, "value": v[i]}
            for i in range(30)
            for c in range(copies)
            for s, v in (("x", x), ("y", y))
        ]
        return correlate(pd.DataFrame(rows)).set_index(["first", "second"]).loc[("x", "y")]

    one, four = table(1), table(4)
    assert one["low"] < one["value"] < one["high"]
    assert four["value"] == pytest.approx(one["value"])
    assert four["high"] - four["low"] == pytest.approx(one["high"] - one["low"], rel=1e-6)


def test_correlation_interval_matches_a_bootstrap_with_more_draws():
    """Of 500 draws, a 2.5% quantile has a standard error of 0.12 deviations, and a 90% interval is 0.63 narrower."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=30)
    y = x + draw.normal(size=30)
    rows = [(f"m{i}", score, values[i]) for score, values in (("x", x), ("y", y)) for i in range(30)]
    table = pd.DataFrame(rows, columns=["module", "score", "value"]).assign(run="r", component=0)
    found = correlate(table).set_index(["first", "second"]).loc[("x", "y")]
    places = np.random.default_rng(2).integers(30, size=(5000, 30))
    one, other = (scipy.stats.zscore(scipy.stats.rankdata(each[places], axis=1), axis=1) for each in (x, y))
    again = (one * other).mean(1)  # Spearman's correlation of every resample
    (low, high), deviation = np.quantile(again, [0.025, 0.975]), again.std()
    assert found["high"] - found["low"] == pytest.approx(high - low, abs=0.3 * deviation)
    assert found[["low", "high"]].tolist() == pytest.approx([low, high], abs=0.5 * deviation)


def test_charts_show_the_correlations(trained):
    cells = pd.DataFrame(
        [(run, a, b, v, v - 0.1, v + 0.1) for run, v in (("r", 0.2), ("s", 0.4)) for a in "tx" for b in "tx"],
        columns=["run", "first", "second", "value", "low", "high"],
    )
    matrix = plots.agreement(cells, "components")
    assert matrix.data.set_index(["first", "second"])["value"]["x", "t"] == pytest.approx(0.3)
    dots = plots.against_truth(cells, "t", "components")
    assert dots.data["first"].tolist() == ["x"]
    assert dots.data[["value", "smaller", "larger"]].to_numpy()[0] == pytest.approx([0.3, 0.2, 0.4])
    assert "Mean of 2 seeds; hollow dots: both seeds" in dots.caption
    alone = plots.against_truth(cells[cells["run"] == "r"], "t", "components")
    assert alone.data[["value", "low", "high"]].to_numpy()[0] == pytest.approx([0.2, 0.1, 0.3])
    assert "One run; bars: 95% bootstrap interval over modules" in alone.caption
    for chart in (matrix, dots):
        chart.mpl()
        chart.plotly()


def write_scores(folder, seed, scores, rows=9, **more):
    """Write a run with the given scores of every neuron of one input and one output projection."""
    places = {"ffn_in": ("h.0.up", "sensitivity_out", rows, 4), "ffn_out": ("h.0.down", "sensitivity_in", 4, rows)}
    modules = [
        {"module": name, "stack": "", "layer": 0, "role": role, "out_features": outer, "in_features": inner, "tied": ""}
        for role, (name, _, outer, inner) in places.items()
    ]
    meta = json.loads((write_run(folder / "donor") / "run.json").read_text(encoding="utf-8"))
    states = {"last": {"step": 9, "ranks": {}}}
    writer = RunWriter(
        folder / "run", manifest(**meta | {"modules": modules, "seed": seed, "states": states, "facts": None} | more)
    )
    for name, own, *_ in places.values():
        other = "sensitivity_in" if own == "sensitivity_out" else "sensitivity_out"
        values = dict(zip(("neuron_cosine", "neuron_update", own), scores[name], strict=True)) | {other: np.ones(4)}
        writer.collect(9, [Record(quantity, value, name) for quantity, value in values.items()])
        writer.collect(4, [Record("neuron_cosine", np.arange(rows), name)])  # an earlier recording
    writer.finish("done")
    return load(folder / "run")


def test_neuron_scores_compare_recipes_within_a_seed(tmp_path):
    draw = np.random.default_rng(0)
    drawn = {(label, seed): draw.random((2, 3, 9)) for label in "ab" for seed in (0, 1)}
    drawn["a", 0][0, 0, 5] = np.nan  # a zero neuron has no direction
    runs = {
        label: [
            write_scores(
                tmp_path / f"{label}{seed}", seed, dict(zip(("h.0.up", "h.0.down"), drawn[label, seed], strict=True))
            )
            for seed in (0, 1)
        ]
        for label in "ab"
    }
    table = collect_neuron_scores(runs)
    assert table.groupby("run").size().to_dict() == {"seed 0": 17 * 6, "seed 1": 18 * 6}
    cells = correlate(table).set_index(["run", "first", "second"])["value"]
    for seed in (0, 1):
        kept = [place for place in range(18) if not (seed == 0 and place == 5)]
        first, second = (drawn[label, seed].transpose(1, 0, 2).reshape(3, 18)[:, kept] for label in "ab")
        expected = spearman(np.stack([first[0], second[2]], axis=1))[0, 1]
        assert cells[f"seed {seed}", "a: 1 − cos", "b: sensitivity"] == pytest.approx(expected)
    chart = plots.agreement(correlate(table), "neurons")
    assert len(chart.data) == 36
    assert "neurons" in chart.title
    only = runs["a"][0]
    with pytest.raises(ValueError, match=r"a, b.*seed in common"):
        collect_neuron_scores({"a": only, "b": runs["b"][1:]})


def test_neuron_scores_omit_a_constant_score_with_a_warning(tmp_path):
    """LoRA on queries and values has such scores: it does not change feed-forward modules. One seed is enough."""
    draw = np.random.default_rng(0)
    runs = {}
    for label in "ab":
        runs[label] = []
        for seed in (0, 1):
            drawn = draw.random((2, 3, 9))
            if label == "b":
                drawn[:, 0], drawn[:, 1] = 0, drawn[:, 1] * (seed == 0)
            scores = dict(zip(("h.0.up", "h.0.down"), drawn, strict=True))
            runs[label].append(write_scores(tmp_path / f"{label}{seed}", seed, scores))
    with pytest.warns(UserWarning, match=r"^b: 1 − cos, b: ‖w − w₀‖ omitted: .*every neuron") as warned:
        table = collect_neuron_scores(runs)
    assert len(warned) == 1
    assert set(table["score"]) == {"a: 1 − cos", "a: ‖w − w₀‖", "a: sensitivity", "b: sensitivity"}
    assert len(table) == 2 * 18 * 4
    assert correlate(table).notna().all(axis=None)


@pytest.mark.parametrize(("choice", "score", "probes"), [
    ({"select_by": "changed"}, "1 − cos after tuning", "probe_cosine"),
    ({"select_by": "probed"}, "similarity to linear probes", "probe_cosine"),
    ({"select_by": "probed"}, "similarity to linear probes", "probe_similarity"),  # the quantity of earlier versions
    ({"select_by": "random"}, None, "probe_cosine"),
    ({"select_by": "changed", "neurons": {"h.0.up": [1]}}, None, "probe_cosine"),
])  # fmt: skip
def test_neuron_scores_of_neft_use_its_selection_score(choice, score, probes, tmp_path):
    """Each quantity has different values. A selection at random or by hand has no selection score."""
    draw = np.random.default_rng(0)
    by = {"selection_cosine": draw.random((2, 9)), probes: draw.random((2, 9))}
    runs = {}
    for label, method in (("a", {"name": "full"}), ("b", {"name": "neft", **choice})):
        scores = dict(zip(("h.0.up", "h.0.down"), draw.random((2, 3, 9)), strict=True))
        runs[label] = write_scores(tmp_path / label, 0, scores, method=method)
    rows = [
        runs["b"]
        .table.query("quantity == 'neuron_cosine' and step == 9")
        .assign(quantity=name, step=0, value=values.ravel())
        for name, values in by.items()
    ]
    runs["b"].table = pd.concat([runs["b"].table, *rows], ignore_index=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = collect_neuron_scores(runs)
    own = {name for name in table["score"] if name.startswith("b: ")}
    assert own == {"b: ‖w − w₀‖", "b: sensitivity", *([f"b: {score}"] if score else [])}
    if score is None:
        assert [str(each.message).partition(" omitted")[0] for each in warned] == ["b: 1 − cos"]
    else:
        assert not warned
        expected = by[probes if choice["select_by"] == "probed" else "selection_cosine"].ravel()
        found = table[table["score"] == f"b: {score}"].sort_values(["module", "component"])
        assert sorted(found["value"]) == sorted(expected)
        assert found["value"].iloc[0] == expected[9]  # the output projection comes first by name


RECIPES = {
    "Full": Full(lr=1e-2),
    "LoRA": LoRA(lr=1e-2, targets="all-linear"),
    "AdaLoRA": AdaLoRA(lr=1e-1),
    "NeFT": NeFT(lr=1e-2, num_neurons=30, tune_steps=2),
}


def test_neuron_scores_of_trained_recipes_match_their_weights(bert, task, tmp_path):
    """Scores are recomputed from weights and gradients; for NeFT, the rotation is due to its full fine-tuning."""
    runs, by_hand = {}, {}
    for label, method in RECIPES.items():
        model = models.load(bert, task=task)
        look = [ls.observe.neurons(**LOOK), Copying()]
        runs[label] = ls.train(model, task, method, observe=look, out=tmp_path / label, **FAST)
        kept, batches, base = Copying.kept
        if delta.attached_deltas(kept):
            delta.fold(kept)
        parts = ls.analysis.neurons.list_groups(ls.module_table.describe(kept))
        modules = [part.module for part in parts]
        after = {name: delta.host_weight(kept.get_submodule(name)).detach().double() for name in modules}
        slopes = gradients(kept, modules, batches)
        turned = models.load(bert, task=task)
        for run in runs[label].parents:
            run.restore(turned)
        for part in parts:
            before, now = base[f"{part.module}.weight"].double(), after[part.module]
            chosen_by = delta.host_weight(turned.get_submodule(part.module)).detach().double()
            end = chosen_by if label == "NeFT" else now
            values = (
                1 - F.cosine_similarity(before, end, dim=part.axis),
                (now - before).norm(dim=part.axis),
                (now * slopes[part.module]).abs().sum(part.axis),
            )
            turn = "1 − cos after tuning" if label == "NeFT" else "1 − cos"
            for name, value in zip((turn, "‖w − w₀‖", "sensitivity"), values, strict=True):
                by_hand |= {(f"{label}: {name}", part.module, number): float(v) for number, v in enumerate(value)}
    table = collect_neuron_scores(runs)
    found = table.set_index(["score", "module", "component"])["value"].to_dict()
    assert found.keys() == by_hand.keys()
    for score in dict.fromkeys(table["score"]):
        own = {key: value for key, value in by_hand.items() if key[0] == score}
        assert {key: found[key] for key in own} == near(own, terms=TINY, growth=40 * TEXT), score
    ours = [value for key, value in by_hand.items() if key[0] == "NeFT: 1 − cos after tuning"]
    theirs = [value for key, value in by_hand.items() if key[0] == "Full: sensitivity"]
    cells = correlate(table).set_index(["first", "second"])["value"]
    assert cells.notna().all()
    expected = scipy.stats.spearmanr(ours, theirs).statistic
    assert cells["NeFT: 1 − cos after tuning", "Full: sensitivity"] == pytest.approx(expected, abs=1e-3)


def test_neuron_scores_of_a_run_without_records_raises(trained):
    with pytest.raises(ValueError, match=r"neuron_cosine.*observe=\[ls.observe.neurons"):
        collect_neuron_scores({"a": trained})
