"""Grids: all combinations, accepted TOML values, and one-line errors for invalid ones."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from hostile import limits

from lorascope.experiments import grid
from lorascope.experiments.sweep import SweepResult
from lorascope.methods import METHODS, LoRA
from lorascope.observe import factors, neurons, norms
from lorascope.papers.setups import planted_teacher

TOML = """
model = "{bert}"
task = ["{csv}"]
seeds = [3, 1]
root = "here"
settings = {{steps = [5, 6], batch_size = 4}}

[[method]]
name = "lora"
rank = [2, 4]
targets = ["q", "k"]

[[method]]
name = "lora"
rank = {{"layer.0" = 2}}
targets = [["q"], ["v"]]
lr = 1

[backend]
name = "dask"
address = "tcp://host:8786"
wait_for_workers_timeout = 60
"""


@pytest.fixture
def csv(task, tmp_path) -> str:
    task.table[["text", "label"]].to_csv(tmp_path / "toy.csv", index=False)
    return str(tmp_path / "toy.csv")


def test_file_with_lists_gives_every_combination(bert, csv, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(TOML.format(bert=bert, csv=csv))
    found = grid.read(file)
    jobs = found.jobs()
    assert len(jobs) == 4 * 2 * 2
    assert [(j.method.rank, j.settings["steps"], j.settings["seed"]) for j in jobs[:5]] == [
        (2, 5, 3), (2, 5, 1), (2, 6, 3), (2, 6, 1), (4, 5, 3),
    ]  # fmt: skip
    assert found.methods[2] == LoRA(rank={"layer.0": 2}, targets=("q",), lr=1)
    assert found.methods[3].targets == ("v",)
    assert all(job.settings["root"] == "here" and job.model == bert for job in jobs)
    assert found.backend == {"name": "dask", "address": "tcp://host:8786", "wait_for_workers_timeout": 60}


def test_mapping_may_contain_method_and_task_objects(bert, task):
    found = grid.read({"model": bert, "task": task, "method": ["full", LoRA(rank=2)], "settings": {"steps": 2}})
    assert [job.method.name for job in found.jobs()] == ["full"] * 3 + ["lora"] * 3
    assert found.tasks == [task]
    assert found.jobs()[0].settings == {"steps": 2, "root": "runs", "seed": 0}


def observing(observers):
    return {"settings": {"steps": 3, "observe": observers}}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"taks": "x"}, "unknown key 'taks'; did you mean 'task'?"),
        ({"method": "lora2"}, "unknown method 'lora2'; did you mean 'lora' or 'alora'?"),
        ({"method": {"name": "lora", "rnk": 2}}, "unknown field of method lora 'rnk'; did you mean 'rank'?"),
        ({"method": {"rank": 2}}, "got {'rank': 2}"),
        (
            {"method": {"name": "lora", "rank": "8"}},
            "rank must be an integer or a table, or a list of these (one run per value), got '8'",
        ),
        (
            {"method": {"name": "lora", "rslora": 1}},
            "rslora must be true or false, or a list of these (one run per value), got 1",
        ),
        ({"method": {"name": "lora", "rank": [4, True]}}, "(one run per value), got [4, True]"),
        ({"method": {"name": "adalora", "scores": "x"}}, "scores must be one of 'after', 'before'"),
        ({"method": ["full", "full"]}, "duplicate method"),
        ({"method": []}, "method must have at least one value, got []"),
        ({"task": "sentimnt"}, "did you mean 'sentiment'?"),
        ({"task": "nowhere.csv"}, "nowhere.csv"),
        ({"task": 3}, "task must be a string or a list of strings, got 3"),
        ({"model": "minilmm"}, "unknown model 'minilmm'; did you mean 'minilm'?"),
        ({"seeds": 0}, "2**32 - 1, got 0"),
        ({"seeds": [1, 1]}, "duplicate seed 1"),
        ({"settings": {}}, "missing setting 'steps'"),
        ({"settings": {"steps": 3, "stps": 3}}, "unknown setting 'stps'; did you mean 'steps'?"),
        ({"settings": {"steps": 3, "seed": 3}}, "unknown setting 'seed'"),
        ({"settings": {"steps": [3, "4"]}}, "(one run per value), got [3, '4']"),
        ({"settings": {"steps": 3, "schedule": "liner"}}, "got 'liner'"),
        ({"settings": {"steps": 3, "lr": [0.1, -0.1]}}, "lr must be > 0 and finite in float32, got -0.1"),
        (observing("norms"), "observe must be a list of observers such as [\"norms\"], got 'norms'"),
        (observing(["nroms"]), "unknown observer 'nroms'; did you mean 'norms'"),
        (observing([3]), "every = 10}, got 3"),
        (
            observing([{"name": "neurons", "evry": 3}]),
            "unknown field of observer neurons 'evry'; did you mean 'every'?",
        ),
        (observing([{"name": "neurons", "every": "x"}]), "observer neurons: every must be an integer, got 'x'"),
        (
            observing([{"name": "norms", "every": 0}]),
            "observer norms: every must be an integer >= 1, got 0",
        ),
        (observing([{"name": "norms", "spectra_every": True}]), 'must be an integer or "none", got True'),
        ({"root": 3}, "root must be a string (folder of the runs), got 3"),
        ({"backend": "dask"}, "got 'dask'"),
    ],
)
def test_invalid_grid_raises_one_line(bert, task, change, line):
    right = {"model": bert, "task": task, "method": "lora", "settings": {"steps": 3}}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        grid.read(right | change)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_is_not_a_sweep(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"as a sweep: it is a folder, pass its TOML file$"):
        grid.read(tmp_path)


OBSERVING = """
model = "{bert}"
task = "{csv}"
seeds = 1
method = {{name = "adapprox", max_rank = [2, "none"]}}

[settings]
steps = 2
clip = ["none", 1.0]
lr = "none"
observe = ["norms", {{name = "norms", every = 3, spectra_every = "none"}}, {{name = "neurons", targets = ["q"]}}]
"""


def test_file_may_contain_observers_and_none(bert, csv, tmp_path):
    """TOML has no null: the string "none" means None."""
    file = tmp_path / "x.toml"
    file.write_text(OBSERVING.format(bert=bert, csv=csv))
    jobs = grid.read(file).jobs()
    assert [(job.method.max_rank, job.settings["clip"]) for job in jobs] == [(2, None), (2, 1), (None, None), (None, 1)]
    assert all(job.settings["lr"] is None for job in jobs)
    assert jobs[0].settings["observe"] == [norms(), norms(every=3), neurons(targets=("q",))]
    with pytest.raises(ValueError, match=r"method lora: rank must be .*, got 'none'"):
        grid.read({"task": csv, "method": {"name": "lora", "rank": "none"}, "settings": {"steps": 1}})


def test_observe_with_a_list_of_lists_gives_several_settings(bert, task):
    own = {"steps": 1, "observe": [["norms"], [norms(every=1), "factors"], [], "none"]}
    found = grid.read({"model": bert, "task": task, "method": "lora", "seeds": 1, "settings": own})
    assert [chosen["observe"] for chosen in found.settings] == [[norms()], [norms(every=1), factors()], [], None]
    names = SweepResult(found.jobs()).names
    assert names[1] == "LoRA, observe norms every 1 + factors, seed 0"
    assert len(set(names)) == 4


def test_observer_without_defaults_has_a_name(bert, task):
    """The name contains only numbers and strings, not the mapping."""
    own = {"steps": 1, "observe": [[], [planted_teacher.planted(ranks={"h.0.q": 3})]]}
    found = grid.read({"model": bert, "task": task, "method": "lora", "seeds": 1, "settings": own})
    assert SweepResult(found.jobs()).names == ["LoRA, observe nothing, seed 0", "LoRA, observe planted, seed 0"]


def test_error_names_the_file(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("task = 'x'\nmethod = ")
    with pytest.raises(ValueError, match=r"x\.toml: Invalid value"):
        grid.read(file)
    file.write_text("task = 'x'")
    with pytest.raises(ValueError, match=r"x\.toml: missing key 'method'"):
        grid.read(str(file))
    with pytest.raises(FileNotFoundError, match=r"cannot read nowhere\.toml"):
        grid.read("nowhere.toml")


def test_file_of_20_gb_raises_one_line(tmp_path):
    file = tmp_path / "x.toml"
    with file.open("wb") as stream:
        stream.truncate(20 * 2**30)
    with limits(gigabytes=1.0), pytest.raises(ValueError, match=r"cannot read .*x\.toml: .*got 21474836480"):
        grid.read(file)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("task = " + "[" * 100_000, "x.toml"),
        ("task = " + "{a = " * 100_000, "x.toml"),
        ("settings = {steps = 1, lr" + ".a" * 5000 + " = 1}", "x.toml"),
        ("backend = {name = 1}", "name must be .*, got 1"),
        ("backend = {name = 'dask', address = []}", r"address must be .*, got \[\]"),
        ("backend = {jobs = 1.5}", "jobs must be .*, got 1.5"),
        ("seeds = 99999999999", "seeds"),
        ("seeds = [-1]", "seeds"),
        ("seeds = [4294967296]", "seeds"),
    ],
)
def test_hostile_file_raises_one_short_line(line, named, csv, tmp_path):
    rest = {"task": f"'{csv}'", "method": "'lora'", "settings": "{steps = 1}"}
    rest.pop(line.partition(" ")[0], None)
    (tmp_path / "x.toml").write_text("\n".join([*(f"{k} = {v}" for k, v in rest.items()), line]), encoding="utf-8")
    with pytest.raises(ValueError, match=named) as caught:
        grid.read(tmp_path / "x.toml")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", METHODS)
def test_default_of_every_method_field_has_its_type(name):
    method = METHODS[name]()
    hints = typing.get_type_hints(METHODS[name])
    wrong = [
        field
        for field in vars(method)
        if not field.endswith("_") and not grid.is_of_type(vars(method)[field], hints[field])
    ]
    assert not wrong
    assert not grid.is_of_type(object(), hints["lr"])


def test_toml_values_have_the_expected_types():
    assert grid.is_of_type(3, float)
    assert not grid.is_of_type(True, float)
    assert not grid.is_of_type(3, bool)
    assert grid.is_of_type(["q"], str | tuple[str, ...])
    assert not grid.is_of_type(["q", 1], str | tuple[str, ...])
    assert not grid.is_of_type("x", Path | None)


def test_table_of_neuron_numbers_is_a_value():
    hint = typing.get_type_hints(METHODS["neft"])["neurons"]
    assert grid.is_of_type({"encoder.layer.0.intermediate.dense": [1, 2]}, hint)
    assert not grid.is_of_type({"encoder.layer.0.intermediate.dense": 1}, hint)
