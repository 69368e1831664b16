"""Test the selection of neurons by linear probes: closed-form ridge, planted directions, and the phase on models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted import manifest
from tolerance import TEXT, TINY, near

import lorascope as ls
from lorascope.adapters.host_weights import host_weight
from lorascope.analysis import neurons, selected_neurons
from lorascope.inputs import models
from lorascope.methods import NeFT
from lorascope.methods.neft_probing import directions, largest_cosines
from lorascope.runs.writer import RunWriter
from lorascope.schema import records
from lorascope.schema.records import Quantity, Record

FAST = {"steps": 4, "batch_size": 8, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}


def ridge(states, labels, strength):
    """Solve ridge regression in closed form on centered data, with labels -1 and 1."""
    centered, y = states - states.mean(0), labels - labels.mean()
    return np.linalg.solve(centered.T @ centered + strength * np.eye(states.shape[1]), centered.T @ y)


def cosine(one, other):
    return one @ other / np.sqrt(one @ one) / np.sqrt(other @ other)


def leave_one_out(states, labels, strength):
    """Return the mean squared error of predictions for each row by ridge regression on all other rows."""
    errors = []
    for row in range(len(labels)):
        rest = np.arange(len(labels)) != row
        coefficients = ridge(states[rest], labels[rest], strength)
        predicted = labels[rest].mean() + (states[row] - states[rest].mean(0)) @ coefficients
        errors.append((predicted - labels[row]) ** 2)
    return np.mean(errors)


def test_coefficients_match_the_closed_form_at_the_strength_of_the_least_error():
    draw = np.random.default_rng(0)
    states = draw.normal(size=(40, 2, 5))
    labels = (states[:, 1, 3] + 0.3 * draw.normal(size=40) > 0).astype(int)
    found = directions(states, labels)
    assert found.shape == (2, 5)
    for layer in range(2):
        signs = 2.0 * labels - 1
        best = min(np.logspace(0.8, 4.1, 12), key=lambda s: leave_one_out(states[:, layer], signs, s))
        assert found[layer] == pytest.approx(ridge(states[:, layer], signs, best), abs=1e-10)
    assert np.abs(found[1]).argmax() == 3
    three = directions(states, labels + (states[:, 0, 0] > 1))
    assert three.shape == (6, 5)


def test_score_ignores_norm_and_sign():
    vectors = np.array([[3.0, 0, 4], [30, 0, 40], [0, 2, 0], [0, 0, 0]])
    found = largest_cosines(vectors, np.array([[-1.0, 0, 0], [0, 0.5, 0], [0, 0, 0]]))
    assert found == pytest.approx([0.6, 0.6, 1, np.nan], nan_ok=True)


def test_score_ignores_the_norm_of_a_probe():
    """Inner products with unnormalized probes would order the neurons differently, 8 before 7.07."""
    probes = np.array([[10.0, 0], [1, 1]])
    assert largest_cosines(np.array([[1.0, 1], [0.8, 0.6]]), probes) == pytest.approx([1, 1.4 / 2**0.5])


def test_texts_of_one_class_raise():
    with pytest.raises(ValueError, match=r"all 3 texts .*tune_steps"):
        directions(np.ones((3, 1, 2)), np.zeros(3))


def test_probing_a_model_without_classes_raises(gpt2, task, tmp_path):
    method = NeFT(num_neurons=5, select_by="probed")
    with pytest.raises(ValueError, match=r"select_by='probed'.* classes"):
        ls.train(models.load(gpt2, task=task), task, method, out=tmp_path / "r", **FAST)


def test_scores_match_the_hidden_states_of_the_base(bert, task, tmp_path):
    model = models.load(bert, task=task)
    method = NeFT(num_neurons=7, select_by="probed", tune_steps=5, lr=1e-2)
    run = ls.train(model, task, method, out=tmp_path / "run", **FAST)
    (probed,) = run.parents
    assert (probed.meta.method["name"], probed.meta.settings["steps"]) == ("probing", 5)
    assert probed.path.name == "1-probe"
    assert probed.meta.parameters.trained == probed.meta.parameters.head

    fresh, fitted = models.load(bert, task=task).eval(), task.fit(model)
    encoded = fitted.encode(models.tokenizer(fresh), fitted.split("train"), 128)
    order = [np.random.default_rng([0, epoch]).permutation(len(encoded)) for epoch in range(9)]
    states, labels = [], []
    for row in np.concatenate(order)[:40]:
        batch = encoded.batch([int(row)])
        with torch.no_grad():
            output = fresh(**batch, output_hidden_states=True)
        states.append(torch.stack([state[0].double().mean(0) for state in output.hidden_states[1:]]).numpy())
        labels.append(int(batch["labels"]))
    probes = directions(np.array(states), np.array(labels))
    expected = {}
    for part in neurons.list_groups(ls.module_table.describe(fresh)):
        weight = host_weight(fresh.get_submodule(part.module)).detach().numpy()
        vectors = weight if part.axis == 1 else weight.T
        each = [max(abs(cosine(vector, probe)) for probe in probes) for vector in vectors]
        expected |= {(part.module, number): value for number, value in enumerate(each)}
    rows = run.table[run.table["quantity"] == "probe_cosine"]
    found = dict(zip(zip(rows["module"].astype(str), rows["index"], strict=True), rows["value"], strict=True))
    assert found == near(expected, terms=TINY, growth=40 * TEXT)  # condition number of the states
    best = set(sorted(found, key=found.get)[-7:])
    assert selected_neurons.to_set(selected_neurons.list_selected(run)) == best
    method = NeFT(num_neurons=7, select_by="probed", reference=probed, lr=1e-2)
    again = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "again", **FAST)
    assert selected_neurons.to_set(selected_neurons.list_selected(again)) == best
    for mode in neurons.MODES:
        with pytest.raises(ValueError, match=rf"'{mode}'.*{probed.id} .*linear probing"):
            NeFT(num_neurons=7, select_by=mode, reference=probed)


def test_probing_run_selects_only_from_probed_projections(bert, task, tmp_path):
    """Fewer targets select the best of these; a target that was not probed is named."""
    rows = {}
    for targets in (("ffn_in",), ("ffn_in", "ffn_out")):
        method = NeFT(num_neurons=7, select_by="probed", targets=targets)
        rows[targets] = ls.train(models.load(bert, task=task), task, method, out=tmp_path / targets[-1], **FAST)
    narrow, wide = rows.values()
    (probed,) = wide.parents
    method = NeFT(num_neurons=7, select_by="probed", reference=probed, targets=("ffn_in",))
    method.attach(models.load(bert, task=task))
    found = selected_neurons.last_scores(wide, "probe_cosine").query("role == 'ffn_in'").nlargest(7, "value")
    assert method.neurons_ == neurons.neurons_by_module(found)
    less = NeFT(num_neurons=7, select_by="probed", reference=narrow.parents[0])
    with pytest.raises(ValueError, match=r"ffn_out \(bert.encoder.layer.0.output.dense\).*did not probe.*targets"):
        less.attach(models.load(bert, task=task))
    with pytest.raises(ValueError, match=r" 7 neurons.*/1-probe$"):
        NeFT(num_neurons=7, select_by="probed", reference=wide)


def test_probing_run_of_an_earlier_version_loads_but_raises_as_reference(bert, task, tmp_path, monkeypatch):
    """It contains inner products with unnormalized probes, under a quantity that is no longer registered."""
    method = NeFT(num_neurons=7, select_by="probed")
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **FAST)
    (probed,) = run.parents
    meta = json.loads((probed.path / "run.json").read_text())
    with monkeypatch.context() as known:
        known.setitem(records.QUANTITIES, "probe_similarity", Quantity("likeness to probes", index="neuron"))
        writer = RunWriter(tmp_path / "old", manifest(**meta))
        writer.collect(4, [Record("probe_similarity", np.arange(3.0), probed.table["module"].iloc[-1])])
        writer.finish("done")
    old = ls.load(tmp_path / "old")
    assert old.table["value"].tolist() == [0, 1, 2]
    method = NeFT(num_neurons=7, select_by="probed", reference=old)
    with pytest.raises(
        ValueError, match=rf"reference must be a run with probe_cosine, got {old.id} .*{tmp_path / 'old'}"
    ):
        method.attach(models.load(bert, task=task))
