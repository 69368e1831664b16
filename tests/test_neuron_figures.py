"""Figures of neurons as data, against planted selections; and the utilization observer against its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_folder
from planted import COMMON, blocks, lookup, manifest
from tiny import tiny
from tolerance import TEXT, TINY, near

import lorascope as ls
from lorascope import observe, plots
from lorascope.adapters.delta import attached_deltas, host_weight
from lorascope.analysis import selected_neurons
from lorascope.charts.marks import Line, Rule
from lorascope.inputs import models
from lorascope.methods import Full, HydraLoRA, LoRA, NeFT
from lorascope.observe.neuron_utilization import mean_states
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Record

MODULES = [row | {"tied": ""} for row in blocks(2, ("ffn_in", "ffn_out"), hidden=4)]
IN, OUT = ("encoder.layer.{}." + role for role in ("ffn_in", "ffn_out"))
CHOSEN = {IN.format(0): [0, 1, 2], OUT.format(0): [5], OUT.format(1): [7, 8]}
DISTANCES = np.logspace(-4, -1, 16)


def planted(
    folder: Path,
    id: str,
    chosen=CHOSEN,
    seed=0,
    label="NeFT, num_neurons 6",
    select_by="changed",
    used=None,
    places=MODULES,
    **more,
) -> Run:
    """Write a run of NeFT on a model with two blocks, by default with 16 hidden units."""
    method = {"name": "neft", "targets": ["ffn_in", "ffn_out"], "select_by": select_by, **more}
    common = COMMON | {"recipe": method, "method": method}
    named = {"id": id, "label": label, "seed": seed, "modules": places}
    writer = RunWriter(folder / id, manifest(**common | named | {"states": {"last": {"step": 9, "ranks": {}}}}))
    for module, numbers in chosen.items():
        writer.collect(0, [Record("selected", np.ones(len(numbers)), module, np.array(numbers))])
    for number, row in enumerate(places):
        writer.collect(0, [Record("selection_cosine", DISTANCES * 10.0**number, row["module"])])
        writer.collect(9, [Record("neuron_cosine", DISTANCES, row["module"])])
        for step, values in (used or {}).items():
            writer.collect(step, [Record("utilisation", np.array(values, float), row["module"])])
    writer.finish("done")
    return Run.read(folder / id)


def test_neurons_count_selected_neurons_by_layer_and_projection(tmp_path):
    runs = [planted(tmp_path, "a"), planted(tmp_path, "b", {IN.format(0): [3, 4, 5, 6, 7, 8]}, seed=1)]
    chart = plots.neurons(runs)
    assert lookup(chart, "place", "role") == {
        ("0", "ffn_in"): 4.5, ("0", "ffn_out"): 0.5, ("1", "ffn_in"): 0.0, ("1", "ffn_out"): 1.0,
    }  # fmt: skip
    (rule,) = (mark for mark in chart.marks if isinstance(mark, Rule))
    assert rule.y == 6 / 4
    assert chart.x.order == ("0", "1")
    assert chart.colors == ("ffn_in", "ffn_out")


def test_neurons_have_one_baseline_per_projection_of_unequal_size(tmp_path):
    """With gate and input in one matrix, two thirds of random neurons are in it: 2 per block, and 1 in the output."""
    fused = [row | ({"out_features": 32} if row["role"] == "ffn_in" else {}) for row in MODULES]
    targets = {"targets": ["ffn_in", "ffn_gate", "ffn_out"]}
    chart = plots.neurons(planted(tmp_path, "a", places=fused, **targets))
    assert [mark.y for mark in chart.marks if isinstance(mark, Rule)] == [2, 1]
    assert [mark.label for mark in chart.marks if isinstance(mark, Rule)] == ["random, ffn_in", "random, ffn_out"]
    wide = [row | {side: 32 for side in ("out_features", "in_features") if row[side] == 16} for row in MODULES[2:]]
    chart = plots.neurons(planted(tmp_path, "b", places=[*MODULES[:2], *wide]))
    (line,) = (mark for mark in chart.marks if isinstance(mark, Line) and mark.data is not None)
    by_layer = line.data.set_index(["place", "role"])["chance"].to_dict()
    assert by_layer == {(layer, role): 1 + (layer == "1") for layer in "01" for role in ("ffn_in", "ffn_out")}


def test_neurons_draw_a_control_in_a_separate_panel_with_present_setting_names(tmp_path):
    control = planted(
        tmp_path, "b", {IN.format(1): [1]}, label="NeFT, num_neurons 1, select_by random", select_by="random"
    )
    found = plots.neurons(planted(tmp_path, "a"), control)
    titles = [chart.title for row in found.rows() for chart in row]
    assert titles == ["NeFT, num_neurons 6", "control: NeFT, num_neurons 1, select_by random"]


def test_neuron_cosine_by_layer_with_the_threshold(tmp_path):
    panels = plots.neuron_cosine(planted(tmp_path, "a")).panels
    middle = float(np.median(DISTANCES))
    assert [chart.title for chart in panels] == ["ffn_in", "ffn_out"]
    for number, chart in enumerate(panels):
        assert lookup(chart, "place") == pytest.approx({"0": middle * 10**number, "1": middle * 10 ** (number + 2)})
        (rule,) = (mark for mark in chart.marks if isinstance(mark, Rule))
        assert rule.y == pytest.approx(DISTANCES[0])
        assert "threshold" in chart.caption
        assert chart.y.log
    band = panels[0].marks[0].data
    assert band["low"].iloc[0] == pytest.approx(np.quantile(DISTANCES, 0.05))
    for chart in plots.neuron_cosine(planted(tmp_path, "b"), quantity="neuron_cosine").panels:
        assert set(chart.data["value"]) == {middle}
        (rule,) = (mark for mark in chart.marks if isinstance(mark, Rule))
        assert (rule.y, rule.label) == (middle, "all neurons")


@pytest.mark.parametrize("more", [{"reversed_share": 0.02}, {"neurons": CHOSEN}, {"select_by": "random"}])
def test_neuron_cosine_has_no_threshold_if_selection_was_not_by_distance(more, tmp_path):
    """With ``reversed_share`` the least rotated neurons are selected too, so there is no threshold."""
    for chart in plots.neuron_cosine(planted(tmp_path, "a", **more)).panels:
        assert [mark.label for mark in chart.marks if isinstance(mark, Rule)] == ["all neurons"]
        assert "threshold" not in chart.caption


def test_neuron_overlap_of_domains_and_seeds_with_random_baseline(tmp_path):
    other = {IN.format(0): [0, 1, 2], OUT.format(0): [5], OUT.format(1): [7, 9]}
    runs = {
        "film": [planted(tmp_path, "a"), planted(tmp_path, "b", other, seed=1)],
        "music": [planted(tmp_path, "c", {IN.format(0): [0, 11, 12, 13, 14, 15]})],
    }
    chart = plots.neuron_overlap(runs)
    assert lookup(chart, "pair", value="overlap") == pytest.approx({"film, seeds": 5 / 6, "film, music": 1 / 6})
    assert chart.data.groupby("pair")["overlap"].agg(list).to_dict()["film, music"] == pytest.approx([1 / 6, 1 / 6])
    baseline, _ = chart.marks
    assert chart.data[baseline.x].max() == pytest.approx(2 / 6)
    assert "mean 0.09, 95th percentile 0.33" in chart.caption
    assert "6 neurons" in chart.caption


def test_neuron_overlap_of_the_k_largest_distances(tmp_path):
    runs = [planted(tmp_path, "a"), planted(tmp_path, "b", seed=1)]
    chart = plots.neuron_overlap(runs, k=3)
    assert chart.data["overlap"].tolist() == [1]
    with pytest.raises(ValueError, match=r"neuron_overlap.*got 1"):
        plots.neuron_overlap(runs[:1])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_selection_from_full_fine_tuning_matches_neft(family, task, tmp_path):
    """Gate projections rotate as far as others, but NeFT selects none of them by default."""
    folder = tiny_folder(tmp_path / "model", family)
    own = {"batch_size": 4, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}
    observers = [observe.neurons(every=2, batches=1, rows=4)]
    full = ls.train(
        models.load(folder, task=task), task, Full(lr=1e-2), steps=2, observe=observers, out=tmp_path / "full", **own
    )
    method = NeFT(num_neurons=60, reference=full)
    method.attach(models.load(folder, task=task))
    expected = {(module, number) for module, numbers in method.neurons_.items() for number in numbers}
    assert selected_neurons.to_set(selected_neurons.list_selected(full, 60)) == expected
    scored = selected_neurons.last_scores(full, "neuron_cosine")
    assert scored.groupby("role").size().to_dict() == dict.fromkeys(("ffn_gate", "ffn_in", "ffn_out"), 96)
    assert (scored.nlargest(60, "value")["role"] == "ffn_gate").any()


def test_figures_of_neurons_with_different_models_raise(tmp_path):
    used = {0: list(range(16)), 9: list(range(16))}
    one, other = (planted(tmp_path, id, used=used, seed=seed) for seed, id in enumerate("ab"))
    other.meta.model = "deeper"
    line = ".*model, got m .run a. and deeper .run b."
    with pytest.raises(ValueError, match=f"neuron_overlap{line}"):
        plots.neuron_overlap({"a": one, "b": other})
    with pytest.raises(ValueError, match=f"rank_shift{line}"):
        plots.rank_shift(one, reference=other)


def test_rank_shift_and_its_three_kinds_of_neurons(tmp_path):
    """In each projection, the two most used of 32 neurons become the two least used; one of the four was trained."""
    before, after = list(range(16, 0, -1)), [0, *range(15, 0, -1)]
    panels = plots.rank_shift(planted(tmp_path, "a", used={0: before, 9: after}))
    buckets, kinds = (chart for row in panels.rows() for chart in row)
    assert set(buckets.x.order) == set(buckets.data["bucket"])
    assert (buckets.x.order[0], buckets.x.order[-2:]) == ("0–1", ("90–97", "all"))
    assert lookup(kinds, "category") == {"strong": 4, "suppressed": 4, "indirect": 3}
    shifts = lookup(buckets, "recipe", "bucket")
    (label, *_) = buckets.colors
    assert shifts[label, "0–1"] == 30
    assert shifts[label, "all"] == pytest.approx((2 * 30 + 30 * 2) / 32)
    # The most used of 32 neurons would be anywhere from 0 to 31 ranks lower.
    assert shifts["random ranks", "0–1"] == pytest.approx(np.arange(32).mean())
    distances = np.abs(np.subtract.outer(np.arange(32), np.arange(32)))
    assert shifts["random ranks", "all"] == pytest.approx(distances.mean())
    assert "compared with the model before training" in kinds.caption


def test_rank_shift_compares_each_seed_with_its_reference(tmp_path):
    """Seed 1 did not move relative to its own reference, but relative to the model before training it did."""
    before, after = list(range(16, 0, -1)), [0, *range(15, 0, -1)]
    runs = [planted(tmp_path, f"s{seed}", used={0: before, 9: after}, seed=seed) for seed in range(2)]
    others = [planted(tmp_path, f"r{seed}", used={9: [before, after][seed]}, seed=seed) for seed in range(2)]
    _, kinds = (
        chart for row in plots.rank_shift({"a": runs[0], "b": runs[1]}, reference=others).rows() for chart in row
    )
    found = lookup(kinds, "recipe", "category")
    assert (found["a", "strong"], found["b", "strong"]) == (4, 0)
    assert "compared with another run" in kinds.caption
    assert set(kinds.meta["runs"]) == {"s0", "s1", "r0", "r1"}
    with pytest.raises(ValueError, match=r"reference.*seed 0.*run s0.*got 0"):
        plots.rank_shift(runs[0], reference=[others[1], planted(tmp_path, "r2", used={9: after}, seed=2)])


def test_rank_shift_with_two_kinds_of_utilization_raises(tmp_path):
    before = list(range(16))
    runs = [planted(tmp_path, id, used={0: before, 9: before}) for id in "ab"]
    runs[0].meta.settings["observers"] = [{"name": "utilization", "layers": "earlier", "standardize": True}]
    caption = plots.rank_shift(runs[0]).rows()[0][0].caption
    assert "with the mean standardized hidden state of the same or an earlier layer" in caption
    runs[1].meta.settings["observers"] = [{"name": "norms"}, {"name": "utilization"}]
    with pytest.raises(ValueError, match=r"rank_shift.*utilization, got the mean hidden state of"):
        plots.rank_shift({"a": runs[0], "b": runs[1]})


def test_rank_shift_counts_every_strong_neuron_as_indirect_if_none_is_trained(tmp_path):
    before, after = list(range(16, 0, -1)), [0, *range(15, 0, -1)]
    run = planted(tmp_path, "a", {}, used={0: before, 9: after}, name="full")
    _, kinds = (chart for row in plots.rank_shift(run).rows() for chart in row)
    assert lookup(kinds, "category") == {"strong": 4, "suppressed": 4, "indirect": 4}


def test_rank_shift_of_neft_without_its_selection_raises(tmp_path):
    """Without ``selected``, every neuron of a module that moved would count as trained, and none as indirect."""
    run = planted(tmp_path, "a", {}, used={0: list(range(16)), 9: list(range(16))})
    with pytest.raises(ValueError, match=r"run a: .*lack 'selected'") as error:
        plots.rank_shift(run)
    assert "\n" not in str(error.value)


def test_figures_of_neurons_without_records_name_the_recorder(tmp_path):
    run = planted(tmp_path, "a")
    with pytest.raises(ValueError, match=r"rank_shift.*utilisation.*ls.observe.utilization"):
        plots.rank_shift(run)
    bare = planted(tmp_path, "b", {})
    with pytest.raises(ValueError, match=r"neurons.*selected.*NeFT"):
        plots.neurons(bare)
    bare.table = bare.table[bare.table["quantity"] == "utilisation"]
    with pytest.raises(ValueError, match=r"neuron_cosine.*observe=\[ls.observe.neurons\(\)\].*NeFT"):
        plots.neuron_cosine(bare)


def test_standardized_mean_states_ignore_a_huge_coordinate():
    """The last norm multiplies one coordinate of the last hidden state by 1000."""
    model = tiny("bert")
    ids = torch.randint(3, 60, (5, 6))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.tensor([[6], [4], [2], [5], [6]])).long()}
    norm = model.bert.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        before, plain = (mean_states(model, batch, standardize)[""] for standardize in (True, False))
        norm.weight[7] *= 1000
        norm.bias[7] *= 1000
    after, moved = (mean_states(model, batch, standardize)[""] for standardize in (True, False))
    assert after == near(before, terms=TINY, growth=TEXT)
    assert np.abs(after).max() <= 1
    assert moved[-1, 7] == near(1000 * plain[-1, 7], terms=TINY, growth=TEXT)


def test_observer_config_omits_later_fields_at_their_default():
    """The id of a run is computed from the config, so runs from before these fields keep their ids."""
    assert observe.utilization(every=7).config() == {"name": "utilization", "every": 7, "size": 128}
    assert observe.utilization(layers="earlier").config()["layers"] == "earlier"
    with pytest.raises(ValueError, match=r"layers .*got 'own'"):
        observe.utilization(layers="own")


@pytest.mark.parametrize("method", [
    LoRA(targets="all-linear", lr=1e-1),
    HydraLoRA(targets="all-linear", lr=1e-1, gates_every=1),
], ids=lambda method: method.name)  # fmt: skip
def test_utilization_of_adapted_neurons_uses_effective_weights(method, bert, task, tmp_path):
    """Experts with a router, whose update depends on the input, are evaluated at mean gates."""
    model = models.load(bert, task=task)
    run = ls.train(
        model, task, method, steps=3, batch_size=4, eval_size=8, test_size=8, out=tmp_path / "run",
        observe=[observe.utilization(size=5)], device="cpu", progress=False,
    )  # fmt: skip
    fitted = task.fit(model)
    batch = fitted.encode(models.tokenizer(model), fitted.split("validation").head(5), 128).batch(range(5))
    with torch.no_grad():
        hidden = mean_states(model.eval(), batch)[""]
    rows = run.table[(run.table["quantity"] == "utilisation") & (run.table["step"] == 3)]
    deltas, moved, far = attached_deltas(model), 0, {"terms": TINY, "growth": 4 * TEXT}
    for part in ls.analysis.neurons.list_groups(run.modules.astype({"module": "str"})):
        delta = deltas[part.module]
        gates = () if delta.linear else (delta.mean_gates_,)
        before = host_weight(model.get_submodule(part.module)).detach()
        after = before + delta.weight(*gates).detach()
        expected, frozen = (
            [max(abs(np.corrcoef(vector, state)[0, 1]) for state in hidden[part.layer :]) for vector in vectors]
            for vectors in ((w if part.axis == 1 else w.T).numpy() for w in (after, before))
        )
        assert rows.loc[rows["module"] == part.module, "value"].to_numpy() == near(expected, 1, **far)
        moved = max(moved, np.abs(np.subtract(expected, frozen)).max())
    assert moved > 1e-2


def test_mean_states_of_an_encoder_and_a_decoder_are_separate():
    model = tiny("t5")
    ids = torch.randint(3, 60, (5, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    states = mean_states(model, batch)
    assert states.keys() == {"encoder", "decoder"}
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    for stack in ("encoder", "decoder"):
        expected = torch.stack(getattr(output, f"{stack}_hidden_states")[1:]).mean((1, 2))
        assert states[stack] == near(expected, terms=TINY, growth=TEXT)


@pytest.mark.parametrize("layers", ["later", "earlier"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_utilization_is_the_correlation_with_the_mean_states(family, layers, request, task, tmp_path):
    model = models.load(request.getfixturevalue(family), task=task)
    run = ls.train(
        model, task, NeFT(num_neurons=5, select_by="random", lr=1e-2), steps=2, batch_size=4, eval_size=8, test_size=8,
        out=tmp_path / "run", observe=[observe.utilization(size=5, layers=layers)], device="cpu", progress=False,
    )  # fmt: skip
    rows = run.table[run.table["quantity"] == "utilisation"]
    assert set(rows["step"]) == {0, 2}
    encoded = task.fit(model).encode(models.tokenizer(model), task.fit(model).split("validation").head(5), 128)
    with torch.no_grad():
        states = []
        for row in range(5):
            output = model.eval()(**encoded.batch([row]), output_hidden_states=True)
            states.append(torch.stack([state[0].mean(0) for state in output.hidden_states[1:]]))
    hidden = torch.stack(states).mean(0).numpy()
    for part in ls.analysis.neurons.list_groups(run.modules.astype({"module": "str"})):
        weight = host_weight(model.get_submodule(part.module)).detach().numpy()
        vectors = weight if part.axis == 1 else weight.T
        numbers = [
            number for number in range(2) if number == part.layer or (number > part.layer) == (layers == "later")
        ]
        each = [[abs(np.corrcoef(vector, hidden[number])[0, 1]) for number in numbers] for vector in vectors]
        own = run.table[(run.table["module"] == part.module) & (run.table["step"] == 2)]
        found = {name: own.loc[own["quantity"] == name, "value"] for name in ("utilisation", "utilisation_layer")}
        assert found["utilisation"].to_numpy() == near(np.max(each, axis=1), 1, terms=TINY, growth=4 * TEXT)
        assert found["utilisation_layer"].tolist() == [numbers[place] for place in np.argmax(each, axis=1)]
