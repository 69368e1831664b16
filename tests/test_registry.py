"""Registry of figures, and errors that are raised before drawing."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpydoc.docscrape import NumpyDocString
from planted import lookup, low_rank, profile
from safetensors.numpy import save_file

import lorascope as ls
from lorascope import plots
from lorascope.plots import figure_registry, requirements
from lorascope.plots.run_groups import Cohort
from lorascope.schema import plugins, records
from lorascope.schema.records import Quantity

FIGURES = [name for name, entry in plots.FIGURES.items() if entry.draw.__module__.startswith("lorascope.")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("update_norm", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("norm_over_steps", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("mean_norm", "records of weight_norm: train with observe=[ls.observe.norms()]"),
        ("training_curves", "records of loss"),
        ("spectrum", "singular values of updates: train with observe=[ls.observe.norms()]"),
        ("subspace_similarity", "the adapters' factors: train with a method that has factors"),
    ],
)
def test_figure_without_records_names_the_missing_recorder(write: Any, name: str, reason: str) -> None:
    bare = write("a", {("lr", ""): {1: 0.1}})
    with pytest.raises(ValueError, match=re.escape(f"{name} needs {reason}")) as raised:
        getattr(plots, name)(bare)
    assert "\n" not in str(raised.value)


def test_every_quantity_says_how_to_record_it() -> None:
    for package in ("methods", "observe", "experiments", "papers.setups"):
        plugins.load_plugins(f"lorascope.{package}")
    own = records.QUANTITIES.keys() - records._adopted  # without those of stored runs that other tests loaded
    assert not [name for name in own if not records.QUANTITIES[name].recorded_by]


def test_figure_advises_for_quantities_of_methods_that_are_not_imported(write: Any) -> None:
    folder = str(write("a", {("lr", ""): {1: 0.1}}).path)
    lines = (
        "import sys, lorascope as ls",
        f"run = ls.load({folder!r})",
        "assert 'torch' not in sys.modules",
        "ls.plots.gates(run)",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert "gates needs records of gate_information: train HydraLoRA on a task with groups" in ended.stderr


def test_errors_distinguish_missing_history_and_base_model_from_missing_records(write: Any) -> None:
    values = {("update_norm", "h.0.q"): {-1: 2.0}, ("weight_norm", "h.0.q"): {-1: np.nan}}
    folder = write("a", values, "LoRA rank 16", seed=None)
    assert lookup(plots.update_norm(folder), "place") == {"0": 2.0}
    with pytest.raises(ValueError, match="update_norm at more than one step"):
        plots.norm_over_steps(folder)
    with pytest.raises(ValueError, match=r"weight_norm.*base model"):
        plots.update_norm(folder, quantity="weight_norm")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("training_curves", "windows"),
        ("norm_over_steps", "frames"),
        ("rank_replay", "frames"),
        ("update_image", "cells"),
        ("neuron_overlap", "k"),
    ],
)
def test_figure_with_a_count_below_one_names_the_count(write: Any, monkeypatch: Any, name: str, count: str) -> None:
    monkeypatch.setattr(Cohort, "require", lambda *args, **kwargs: None)
    runs = [write(f"s{seed}", profile(1, 3, 4), seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=f"^{count} must be >= 1, got 0$"):
        getattr(plots, name)(runs, **{count: 0})


def test_available_agrees_with_what_can_be_drawn(write: Any) -> None:
    run = write("a", profile(1, 3, 4), factors={"h.0.q": low_rank(1, 1)})
    other = write("b", profile(1, 3, 4), seed=1, factors={"h.0.q": low_rank(1, 1)})
    found = plots.available(run).set_index("figure")
    assert set(found.index) == set(plots.FIGURES)
    for name, row in found.iterrows():
        draw = plots.FIGURES[name].draw
        if row["drawable"]:
            draw([run, other][: row["runs"]])
            assert row["missing"] == ""
        else:
            with pytest.raises(ValueError, match=row["missing"].partition(":")[0]):
                draw(run)
    assert found.loc["training_curves", "missing"].startswith("records of loss")


@pytest.mark.parametrize("entry", plots.FIGURES.values(), ids=list(plots.FIGURES))
def test_reads_and_misleads_are_one_or_two_sentences_without_markup(entry: plots.Figure) -> None:
    assert getattr(plots, entry.name) is entry.draw
    for text in (entry.reads, entry.misleads):
        assert text.endswith(".")
        assert len(text.split()) > 15
        assert len(re.findall(r"\.(?: |$)", text)) <= 2
        assert not re.search(r"[`|*]|_\W", text)


@pytest.mark.parametrize("name", FIGURES)
def test_signature_and_docstring_of_a_figure_are_complete(name: str) -> None:
    draw = plots.FIGURES[name].draw
    parameters = inspect.signature(draw).parameters
    documented = [one for each in NumpyDocString(inspect.getdoc(draw))["Parameters"] for one in each.name.split(", ")]
    assert documented == list(parameters)
    assert documented[:2] == ["runs", "control"]
    assert parameters["control"].default is None
    assert f"ls.plots.{name}(" in plots.FIGURES[name].example


@pytest.mark.parametrize("name", FIGURES)
def test_example_of_a_figure_begins_with_an_example_of_the_package_or_says_what_its_runs_are(name: str) -> None:
    draw = plots.FIGURES[name].draw
    first = plots.FIGURES[name].example.splitlines()[0]
    names = {node.id for node in ast.walk(ast.parse(plots.FIGURES[name].example)) if isinstance(node, ast.Name)}
    for run in names - {"ls", "runs"}:
        assert f"``{run}``" in (inspect.getdoc(draw) or ""), run
    assert "ls.example(" in first or names - {"ls", "runs"}


def test_figures_list_in_the_order_of_their_modules_and_all_can_be_found_by_name() -> None:
    assert (FIGURES[0], FIGURES[-1]) == ("accuracy_by_parameters", "subspace_similarity")
    assert {*FIGURES, "agreement", "head_choice", "frequency_bias"} <= vars(plots).keys() & set(dir(plots))


@pytest.fixture
def plugin(monkeypatch: Any) -> Iterator[Any]:
    """Return a function that offers modules as entry points and loads them; their figures go at the end."""
    before = set(figure_registry.FIGURES)

    def load(**modules: str) -> None:
        points = [EntryPoint(name, value, "lorascope.figures") for name, value in modules.items()]
        monkeypatch.setattr(plugins, "installed_entry_points", lambda: EntryPoints(points))
        plugins.load_entry_points.cache_clear()
        plugins.load_plugins.__wrapped__("lorascope.plots", "lorascope.figures", ("explore",))

    yield load
    for name in set(figure_registry.FIGURES) - before:
        del figure_registry.FIGURES[name]


PLUGIN = """
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Line
from lorascope.plots.figure_registry import figure, gather_runs

@figure(topic="updates", needs=("update_norm",), reads="Reads.", misleads="Misleads.")
def {name}(runs, control=None, scale=1.0):
    '''Plot scaled values.'''
    cohort = gather_runs("{name}", runs, control)
    table = cohort.label(cohort.table)
    chart = Chart(table.assign(value=scale * table["value"]), [Line("step", "value", "recipe")])
    return cohort.complete(chart)
"""


def test_figure_of_a_new_quantity_advises_what_its_registration_says(
    plugin: Any, write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    source = PLUGIN.format(name="novelty_profile").replace("update_norm", "novelty")
    (tmp_path / "novel.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    plugin(novel="novel")
    records.register("train Novel(size=2)", novelty=Quantity("novelty"))
    try:
        with pytest.raises(
            ValueError, match=re.escape("novelty_profile needs records of novelty: train Novel(size=2)")
        ):
            plots.novelty_profile(write("a", {("lr", ""): {1: 0.1}}))
    finally:
        del records.QUANTITIES["novelty"]


def test_figures_of_entry_points_register_and_a_broken_one_is_named(
    plugin: Any, write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "third_party.py").write_text(PLUGIN.format(name="scaled_values"), encoding="utf-8")
    (tmp_path / "imitation.py").write_text(PLUGIN.format(name="spectrum"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = plots.spectrum
    with pytest.warns(UserWarning) as warned:  # noqa: PT030
        plugin(broken="no_such_module_anywhere", twice="imitation", ours="third_party")
    first, second = (str(each.message) for each in warned)
    assert first.startswith("skipped the entry point 'broken' of lorascope.figures: no_such_module_anywhere raised ")
    assert "'twice' of lorascope.figures: imitation raised ValueError(\"there is already a figure 'spectrum'" in second
    assert plots.spectrum is plots.FIGURES["spectrum"].draw is before
    run = write("a", profile(1, 3, 4))
    drawn = plots.scaled_values(run, scale=2.0)
    assert drawn.data["value"].max() == 2 * run.table["value"].max()
    assert drawn.meta == {"figure": "scaled_values", "runs": ["a"]}
    assert list(plots.FIGURES)[-1] == "scaled_values"
    assert "scaled_values" in dir(plots)
    with pytest.raises(ValueError, match="scaled_values needs records of update_norm"):
        plots.scaled_values(write("b", {("lr", ""): {1: 0.1}}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"steps": 10}}, "differ in settings"),
        ({"recipe": {"name": "lora", "rank": 3}}, "differ in recipe"),
        ({"seed": 0}, r"seeds \[0, 0\]"),
        ({"seed": None}, r"seeds \[0, None\]"),
    ],
)
def test_averaging_runs_that_differ_in_more_than_the_seed_raises(write: Any, change: dict, reason: str) -> None:
    one, two = write("a", profile(1, 3, 4)), write("b", profile(1, 3, 4), **({"seed": 1} | change))
    with pytest.raises(ValueError, match=reason):
        plots.update_norm([one, two])
    assert set(plots.update_norm({"one": one, "two": [two]}).data["recipe"]) == {"one", "two"}


def test_duplicate_run_duplicate_label_or_no_run_raises(write: Any) -> None:
    run = write("a", profile(1, 3, 4))
    with pytest.raises(ValueError, match="duplicate run a"):
        plots.update_norm({"one": run, "two": run})
    with pytest.raises(ValueError, match="duplicate label 'one'"):
        plots.update_norm({"one": run}, control={"one": write("b", profile(1, 3, 4))})
    with pytest.raises(ValueError, match=r"update_norm.*got 0"):
        plots.update_norm([])


def mixture(write: Any, id: str, seed: int = 0, label: str = "Hydra", exact: bool = False, **meta: Any) -> Any:
    """Write a run with all records that figures of updates need; its updates depend on the input unless exact."""
    names = {"h.0.q": 3.0, "h.1.q": 2.0}
    values = {
        (quantity, module): {0: 0.0, 4: size / 2, 9: size}
        for quantity in ("weight_norm", "learned_norm", "update_norm", "rank", "loss")
        for module, size in names.items()
    }
    draw = np.random.default_rng(seed)
    factors = {name: (draw.normal(size=(6, 2)), draw.normal(size=(2, 5))) for name in names}
    return write(id, values, label, seed, factors, exact=exact, **meta)


def captions(drawn: Any) -> list[str]:
    return [chart.caption for row in drawn.rows() for chart in row]


ABOUT_UPDATES = {
    "atlas", "factor_embedding", "mean_norm", "norm_over_steps", "spectrum", "subspace_similarity", "update_image",
    "update_norm", "update_norm_heat",
}  # fmt: skip


def test_every_figure_of_updates_names_the_gates_of_input_dependent_ones_once(write: Any) -> None:
    runs = [mixture(write, f"m{seed}", seed) for seed in (0, 1)]
    plain = [mixture(write, f"p{seed}", seed, "LoRA", exact=True) for seed in (0, 1)]
    drawable = plots.available(runs[0]).set_index("figure")["drawable"]
    about = {name for name, entry in plots.FIGURES.items() if not requirements.OF_UPDATES.isdisjoint(entry.needs)}
    for name in drawable[drawable].index:
        draw = plots.FIGURES[name].draw
        for drawn in (draw({"mixed": runs, "plain": plain}), draw({"plain": plain}, control={"mixed": runs})):
            counts = {caption.count("Updates of mixed at mean gates.") for caption in captions(drawn)}
            assert counts == {1 if name in about else 0}, name
            assert all(caption.count("gates") == sum(counts) for caption in captions(drawn))
        assert not any("gates" in caption for caption in captions(draw({"a": plain[:1], "b": plain[1:]})))
    assert set(drawable[drawable].index) >= about & ABOUT_UPDATES == ABOUT_UPDATES


def test_meta_of_figures_of_updates_has_the_gates_of_input_dependent_ones(write: Any) -> None:
    runs = {"mixed": mixture(write, "m"), "plain": mixture(write, "p", exact=True)}
    assert plots.update_norm(runs).meta["mixtures"] == {"mixed": "mean gates"}
    assert "mixtures" not in plots.update_norm({"plain": runs["plain"]}).meta
    assert "mixtures" not in plots.training_curves(runs).meta


def test_adapter_folder_has_factors_and_its_update_is_drawn(tmp_path: Path) -> None:
    rng, module = np.random.default_rng(0), "base_model.model.layers.0.self_attn.q_proj"
    A, B = rng.normal(size=(2, 6)), rng.normal(size=(4, 2))
    save_file({f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = ls.load(tmp_path)
    found = plots.available(adapter).set_index("figure")
    assert found.loc["update_image", "drawable"]
    assert found.loc["subspace_similarity", "drawable"]
    chart = next(iter(next(iter(plots.update_image(adapter).rows()))))
    update = 3 * B @ A
    drawn = chart.data.pivot(index="row", columns="column", values="value")
    np.testing.assert_allclose(drawn, update / np.sqrt(np.mean(update**2)), rtol=1e-12)
