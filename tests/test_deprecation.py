"""Deprecated names: they work for one release with a warning, and stored runs keep them unchanged."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import warnings

import pandas as pd
import pytest
from planted import manifest

import lorascope as ls
from lorascope import observe, plots
from lorascope.cli.main import main
from lorascope.diagnosis.causes import Finding
from lorascope.experiments import grid
from lorascope.inputs.tasks import Task
from lorascope.methods.hydralora import HydraDelta
from lorascope.methods.method import Phase, config, from_config, frozen_entries
from lorascope.runs.run import Run
from lorascope.schema import deprecation
from lorascope.training.loop import train
from lorascope.training.run_spec import RunSpec
from lorascope.training.settings import Settings

# Run-time type checks wrap every function, which adds frames between a warning and its caller.
TYPES_CHECKED = hasattr(deprecation.warn_renamed, "__wrapped__")

# Ids and labels of runs in the version before the renames, with the settings of `plan`. A finished run is found again
# by its id, and its seeds share a legend entry by its label, so neither may ever change.
BEFORE = [
    (ls.HydraLoRA, {}, {}, "1be3a8375c0a", "HydraLoRA"),
    (
        ls.HydraLoRA,
        {"number": 5, "heads": "split"},
        {"num_experts": 5, "shared_a": False},
        "c8b98c84553e",
        "HydraLoRA, number 5, heads split",
    ),
    (
        ls.HydraLoRA,
        {"number": 2, "heads": "shared", "gate_rows": 7},
        {"num_experts": 2, "shared_a": True, "gate_rows": 7},
        "f513383cfc54",
        "HydraLoRA, number 2, gate_rows 7",
    ),
    (ls.NeFT, {}, {}, "5fced87d52a4", "NeFT"),
    (
        ls.NeFT,
        {"k": 9, "share": 0.5, "mode": "reversed"},
        {"num_neurons": 9, "parameter_share": 0.5, "select_by": "reversed"},
        "4e7f561cb494",
        "NeFT, k 9, share 0.5, mode reversed",
    ),
    (
        ls.NeFT,
        {"mode": "probed", "tuned": None, "tune_steps": 3},
        {"select_by": "probed", "reference": None, "tune_steps": 3},
        "fc95d67ff867",
        "NeFT, mode probed, tune_steps 3",
    ),
    (ls.AutoLoRA, {}, {}, "a7c0ad8c2766", "AutoLoRA"),
    (ls.AutoLoRA, {"lora_alpha": 8.0}, {"alpha": 8.0}, "e27b9af8182f", "AutoLoRA, lora_alpha 8"),
    (ls.Full, {}, {}, "19ce4f5cf091", "Full"),
    (ls.Full, {"rule": "came"}, {"optimizer_name": "came"}, "585f37c2fad4", "Full, rule came"),
    (ls.LISA, {}, {}, "c4338ffdcc7d", "LISA"),
    (
        ls.LISA,
        {"moments": "keep", "n_active": 1},
        {"moment_policy": "keep", "n_active": 1},
        "67202a49601d",
        "LISA, n_active 1, moments keep",
    ),
]
RENAMED = {
    ls.HydraLoRA: {"number": "num_experts", "heads": "shared_a"},
    ls.NeFT: {"k": "num_neurons", "share": "parameter_share", "mode": "select_by", "tuned": "reference"},
    ls.AutoLoRA: {"lora_alpha": "alpha"},
    ls.Full: {"rule": "optimizer_name"},
    ls.LISA: {"moments": "moment_policy"},
}
FAST = {"steps": 2, "batch_size": 4, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}

each_method = pytest.mark.parametrize(
    ("method", "old", "new", "id", "label"), BEFORE, ids=[f"{method.__name__}-{id}" for method, _, _, id, _ in BEFORE]
)
each_field = pytest.mark.parametrize(
    ("method", "old", "new"), [(method, *pair) for method, names in RENAMED.items() for pair in names.items()]
)


def plan(method, observers=()):
    settings = Settings(steps=10, lr=1e-3, head_lr=1e-3)
    return RunSpec(method, Phase(method), Task("", "lm", pd.DataFrame(), (), "data"), settings, 0, "weights", observers)


def silently(build, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return build(**given)


@each_method
def test_id_label_and_stored_form_equal_those_before_the_renames(method, old, new, id, label):
    built = method(**new)
    assert (plan(built).id, built.label()) == (id, label)
    assert old.items() <= ({"lora_alpha": 16.0, "gate_rows": 64, "rule": "adamw"} | config(built)).items()


@each_method
def test_old_fields_build_the_same_method_as_new_ones(method, old, new, id, label):
    assert silently(method, **old) == method(**new)


@each_method
def test_stored_form_is_read_under_old_and_new_names_without_a_warning(method, old, new, id, label):
    built = method(**new)
    assert from_config(json.loads(json.dumps(config(built)))) == built
    assert from_config({"name": method.name, **new}) == built


@each_field
def test_old_field_warns_once_at_the_caller(method, old, new):
    value = config(method()).get(old, "adamw")
    with pytest.warns(FutureWarning) as caught:
        method(**{old: value})
    assert [str(warning.message) for warning in caught] == [f"{method.__name__}: {old} is deprecated, use {new}"]
    assert TYPES_CHECKED or caught[0].filename == __file__


@each_field
def test_old_attribute_reads_and_writes_the_new_one_with_a_warning(method, old, new):
    built, value = method(), config(method()).get(old, "adamw")
    with pytest.warns(FutureWarning, match=f"{old} is deprecated, use {new}"):
        assert getattr(built, old) == value
    setattr(built, new, "other")
    with pytest.warns(FutureWarning, match=f"{old} is deprecated, use {new}"):
        setattr(built, old, value)
    assert built == method()


@each_field
def test_both_names_of_a_field_are_an_error(method, old, new):
    with pytest.raises(ValueError, match=f"^{method.__name__}: cannot use both {new} and its deprecated name {old}$"):
        method(**{old: None, new: None})


@each_field
def test_signature_and_repr_show_the_new_name_only(method, old, new):
    assert new in inspect.signature(method).parameters
    assert old not in inspect.signature(method).parameters
    assert f"{new}=" in repr(method())
    assert f" {old}=" not in repr(method())


def test_replace_takes_new_names():
    changed = dataclasses.replace(ls.HydraLoRA(rank=2), num_experts=7, shared_a=False)
    assert changed == ls.HydraLoRA(rank=2, num_experts=7, shared_a=False)


@pytest.mark.parametrize("value", ["other", None, ["shared"], {"a": 1}])
def test_unknown_old_value_is_an_error(value):
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"heads|shared_a must be"):
        ls.HydraLoRA(heads=value)
    with pytest.raises(ValueError, match="shared_a must be True or False, got"):
        ls.HydraLoRA(shared_a="split")


def test_subclass_of_a_renamed_method_keeps_its_old_attributes():
    class Mine(ls.LISA):
        pass

    with pytest.warns(FutureWarning, match="Mine: moments is deprecated, use moment_policy"):
        assert Mine().moments == "reset"


def test_hook_under_its_old_name_is_called_with_a_warning():
    with pytest.warns(FutureWarning, match="Older: held_still is deprecated, use frozen_entry_count"):

        class Older(ls.Full):
            def held_still(self):
                return super().held_still() + 5

    with pytest.warns(FutureWarning, match="Older: held_still is deprecated, use frozen_entry_count"):
        assert frozen_entries(Older()) == 5

    class Newer(ls.Full):
        def frozen_entry_count(self):
            return 7

    assert frozen_entries(Newer()) == 7
    with pytest.warns(FutureWarning, match="held_still is deprecated"):
        assert Newer().held_still() == 7


def test_run_with_old_keys_loads_restores_and_is_found_again(bert, task, tmp_path):
    out = tmp_path / "run"
    method = ls.HydraLoRA(rank=2, num_experts=2, shared_a=False)
    run = ls.train(ls.models.load(bert, task=task), task, method, out=out, **FAST)
    stored = json.loads((out / "run.json").read_text("utf-8"))
    assert (stored["method"]["number"], stored["method"]["heads"]) == (2, "split")
    assert stored["method"].keys().isdisjoint({"num_experts", "shared_a"})

    model = ls.models.load(bert, task=task)
    ls.load(out).restore(model)
    restored = [module for module in model.modules() if isinstance(module, HydraDelta)]
    assert restored
    assert all(delta.number == 2 and delta.rank == 4 for delta in restored)

    again = silently(ls.HydraLoRA, rank=2, number=2, heads="split")
    assert ls.train(ls.models.load(bert, task=task), task, again, out=out, **FAST).id == run.id


def table(**method):
    return {"task": "sentiment", "method": method, "settings": {"steps": 3}}


def test_grid_takes_old_fields_with_a_warning():
    with pytest.warns(FutureWarning) as caught:
        found = grid.read(table(name="hydralora", number=[2, 3], heads=["shared", "split"]))
    assert {str(warning.message) for warning in caught} == {
        "HydraLoRA: number is deprecated, use num_experts",
        "HydraLoRA: heads is deprecated, use shared_a",
    }
    assert found.methods == [ls.HydraLoRA(num_experts=n, shared_a=a) for n in (2, 3) for a in (True, False)]
    with pytest.raises(ValueError, match="cannot use both num_experts and its deprecated name number"):
        grid.read(table(name="hydralora", number=2, num_experts=2))


def test_sweep_reports_old_fields_in_one_line_each(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.toml"
    file.write_text(
        'task = "sentiment"\nmethod = {name = "hydralora", number = 2}\nsettings = {steps = 3}\n', encoding="utf-8"
    )

    def stop(found, **_):
        assert found.methods == [ls.HydraLoRA(num_experts=2)]
        raise ValueError("not here")

    monkeypatch.setattr("lorascope.experiments.sweep.run_grid", stop)
    assert main(["sweep", str(file)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lorascope: HydraLoRA: number is deprecated, use num_experts",
        "lorascope: not here",
    ]


@pytest.mark.parametrize(
    ("method", "words", "expected", "warned"),
    [
        ("hydralora", ["--number", "5"], ls.HydraLoRA(num_experts=5), ["--number is deprecated, use --num-experts"]),
        ("hydralora", ["--num-experts=5", "--no-shared-a"], ls.HydraLoRA(num_experts=5, shared_a=False), []),
        ("hydralora", ["--heads=split"], ls.HydraLoRA(shared_a=False), ["--heads is deprecated, use --shared-a"]),
        ("hydralora", ["--heads", "shared"], ls.HydraLoRA(), ["--heads is deprecated, use --shared-a"]),
        ("autolora", ["--lora-alpha", "8"], ls.AutoLoRA(alpha=8.0), ["--lora-alpha is deprecated, use --alpha"]),
        ("autolora", ["--lora_alpha=8"], ls.AutoLoRA(alpha=8.0), ["--lora_alpha is deprecated, use --alpha"]),
        ("full", ["--rule", "came"], ls.Full(optimizer_name="came"), ["--rule is deprecated, use --optimizer-name"]),
    ],
)
def test_command_line_accepts_old_options_with_one_warning_line(method, words, expected, warned, monkeypatch, capsys):
    given = []

    @functools.wraps(train)  # the options are read from its signature
    def record(*arguments, **_):
        given.append(arguments[2])

    monkeypatch.setattr("lorascope.cli.train.train", record)
    assert main(["train", method, "--steps", "3", *words]) == 0
    assert given == [expected]
    assert capsys.readouterr().err.splitlines() == [f"lorascope: {line}" for line in warned]


def test_help_shows_the_new_option_only(capsys):
    main(["train", "hydralora", "--help"])
    shown = capsys.readouterr().out
    assert "--num-experts" in shown
    assert "--number" not in shown
    assert "--heads" not in shown


FIGURES = {
    "factorings": "factorization_methods",
    "left_out": "ablations",
    "number_of_heads": "number_of_experts",
    "quality": "accuracy_by_parameters",
}


@pytest.mark.parametrize(("old", "new"), FIGURES.items())
def test_old_name_of_a_figure_returns_the_figure(old, new, capsys):
    with pytest.warns(FutureWarning, match=f"lorascope.plots: {old} is deprecated, use {new}"):
        assert getattr(plots, old) is getattr(plots, new)
    with pytest.warns(FutureWarning, match=f"FIGURES: {old} is deprecated, use {new}"):
        assert plots.FIGURES[old] is plots.FIGURES[new]
    assert old not in plots.FIGURES
    assert main(["plot", old]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"lorascope: {old} is deprecated, use {new}"
    assert f"lorascope plot {new} runs/my-run" in second


def test_unknown_figure_is_still_an_error():
    with pytest.raises(AttributeError, match=r"module 'lorascope.plots' has no attribute 'nothing'"):
        plots.nothing  # noqa: B018
    with pytest.raises(KeyError, match="nothing"):
        plots.FIGURES["nothing"]


FUNCTIONS = [
    ("lorascope", "choose_heads", "choose_num_experts"),
    ("lorascope", "pace", "step_time"),
    ("lorascope.analysis.head_count", "choose_heads", "choose_num_experts"),
    ("lorascope.experiments.component_importance", "losses", "pruned_losses"),
    ("lorascope.experiments.component_importance", "rises", "component_importance"),
    ("lorascope.observe", "utilisation", "utilization"),
    ("lorascope.export", "Cut", "RankBudget"),
    ("lorascope.export", "cut", "select_components"),
    ("lorascope.analysis.rank_allocations", "by_lot", "random_ranks"),
    ("lorascope.analysis.rank_allocations", "in_force", "current_ranks"),
    ("lorascope.analysis.rank_allocations", "tau", "kendall_tau"),
    ("lorascope.analysis.rank_allocations", "stability_by_lot", "random_stability"),
]


@pytest.mark.parametrize(("module", "old", "new"), FUNCTIONS)
def test_old_name_of_a_function_returns_the_function(module, old, new):
    home = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=f"^{module}: {old} is deprecated, use {new}$") as caught:
        assert getattr(home, old) is getattr(home, new)
    assert TYPES_CHECKED or caught[0].filename == __file__
    with pytest.warns(FutureWarning, match=f"{old} is deprecated, use {new}"):
        exec(f"from {module} import {old}", {})


# Ids of runs of Full with these observers, in the version before the renames.
OBSERVED = [
    ([observe.utilization()], "457e4b49a7c3"),
    (
        [observe.utilization(every=5, standardize=True, layers="earlier"), observe.factorings()],
        "8a9432b49882",
    ),
]


@pytest.mark.parametrize(("observers", "id"), OBSERVED)
def test_renamed_observer_is_stored_under_its_old_names(observers, id):
    assert plan(ls.Full(), tuple(observers)).id == id
    assert observers[0].config()["name"] == "utilisation"


def test_observer_accepts_its_old_field_and_old_name():
    with pytest.warns(FutureWarning, match="^utilization: standardise is deprecated, use standardize$"):
        assert observe.utilization(standardise=True) == observe.utilization(standardize=True)
    settings = {"steps": 3, "observe": [{"name": "utilisation", "standardise": True}]}
    with pytest.warns(FutureWarning) as caught:
        found = grid.read({"task": "sentiment", "method": "full", "settings": settings})
    assert [str(warning.message) for warning in caught] == [
        "observe: utilisation is deprecated, use utilization",
        "utilization: standardise is deprecated, use standardize",
    ]
    assert found.settings[0]["observe"] == [observe.utilization(standardize=True)]


def test_subclass_of_a_renamed_observer_is_stored_under_its_own_name():
    class Mine(observe.utilization):
        pass

    assert Mine().config()["name"] == "Mine"


def test_finding_accepts_its_old_names():
    found = Finding("dead", "a", {}, "b")
    assert silently(Finding, cause="dead", told="a", evidence={}, mend="b") == found
    for old, new in (("told", "message"), ("mend", "fix")):
        with pytest.warns(FutureWarning, match=f"^Finding: {old} is deprecated, use {new}$"):
            assert getattr(found, old) == getattr(found, new)


def test_doctor_prints_findings_as_json_under_both_names(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path, manifest(status="done"))
    monkeypatch.setattr("lorascope.cli.doctor.open_runs", lambda *_: [run])
    monkeypatch.setattr("lorascope.cli.doctor.skipped_checks", lambda _: {})
    monkeypatch.setattr("lorascope.cli.doctor.findings", lambda _: [Finding("dead", "a", {}, "b")])
    assert main(["doctor", str(tmp_path), "--json"]) == 1
    (printed,) = json.loads(capsys.readouterr().out)["findings"]
    new = {"id": "", "cause": "dead", "severity": "note", "message": "a", "evidence": {}, "fix": "b"}
    assert printed == new | {"told": "a", "mend": "b"}


def test_run_accepts_its_old_names(bert, task, tmp_path):
    model = ls.models.load(bert, task=task)
    run = ls.train(model, task, ls.HydraLoRA(rank=2, num_experts=2), out=tmp_path / "run", **FAST)
    with pytest.warns(FutureWarning, match="^Run: inexact is deprecated, use input_dependent_modules$"):
        assert run.inexact() == run.input_dependent_modules() != set()
    with pytest.warns(FutureWarning, match=r'^run.meta: \["test"\] is deprecated, use test$'):
        assert run.meta["test"]["metric"] == run.score.metric
