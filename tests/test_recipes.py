"""Tests of recipes: parts, printed numbers, the table against scipy, smoke runs of all recipes, and errors."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy import stats

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import recipe, recipe_check, recipe_table, smoke
from lorascope.experiments.recipe import PrintedScore
from lorascope.experiments.sweep import train_job
from lorascope.inputs import metrics, models, tasks
from lorascope.training.settings import Settings

RECIPE = """
model = "minilm"
seeds = 3

[paper]
name = "FourierFT"
arxiv = "2405.03003"
table = "Table 2"
caption = "RoBERTa-base, GLUE dev"
statistic = "median"
state = "best"

[settings]
epochs = 2
eval_every = "epoch"
eval_size = "none"

[mean]
printed = {"FourierFT" = {method = "FourierFT", model = "RoBERTa-base"}}

[smoke.methods.adalora]
initial_steps = 1
final_steps = 1

[[part]]
column = "CoLA"
metric = "matthews_correlation"
printed = {model = "RoBERTa-base"}
task = {name = "rows.csv", splits = {train = "train", validation = "dev", test = "dev"}}
settings = {warmup = 10}

[[part.method]]
row = "FourierFT"
printed = {method = "FourierFT"}
name = "fourierft"
coefficients = 8

[[part.method]]
row = "AdaLoRA"
name = "adalora"
initial_steps = 50
final_steps = 50

[[part]]
column = {pearson = "STS-B", spearman = "STS-B, ranks"}
task = {name = "ratings.csv", splits = {train = "train", validation = "dev", test = "dev"}, kind = "regression"}

[[part.method]]
row = "FourierFT"
name = "fourierft"
coefficients = 8
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """Write a recipe and its data, and return its file."""
    rows = [{"text": f"word{n}", "split": ("train", "dev")[n % 2], "label": "ab"[n // 2 % 2]} for n in range(20)]
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    pd.DataFrame(rows).assign(label=np.linspace(0, 1, 20)).to_csv(folder / "ratings.csv", index=False)
    file = folder / "own.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a recipe with two parts, three columns and their mean."""
    monkeypatch.chdir(tmp_path)
    return recipe.read(write_recipe(tmp_path))


def test_parts_override_the_recipe_setting_by_setting(plan):
    first, second = plan.recipe_parts
    assert [row.name for row in first.rows] == ["FourierFT", "AdaLoRA"]
    assert first.grid.settings[0] | {"root": ""} == {
        "epochs": 2, "eval_every": "epoch", "eval_size": None, "warmup": 10, "metric": ["matthews_correlation"],
        "root": "",
    }  # fmt: skip
    assert "warmup" not in second.grid.settings[0]
    assert second.grid.settings[0]["metric"] == ["pearson", "spearman"]
    assert second.grid.tasks[0].kind == "regression"
    assert all(part.grid.tasks[0].selected_on_test for part in plan.recipe_parts)
    # From reported.csv.
    assert first.rows[0].printed == {"CoLA": PrintedScore(63.8, 1.6, 5.0)}
    assert first.rows[1].printed == {}
    assert len(plan.jobs()) == 3 * (2 + 1)
    assert plan.jobs()[4].name == "AdaLoRA, CoLA, seed 1"


def fake_run(seed: int, metrics: dict[str, list[float]]) -> SimpleNamespace:
    """Return a run with an evaluation before training and two after it."""
    rows = []
    for name, values in metrics.items():
        rows += [{"quantity": f"eval_{name}", "step": step, "value": value} for step, value in enumerate(values)]
    return SimpleNamespace(table=pd.DataFrame(rows), meta=SimpleNamespace(seed=seed))


def made_up_runs(plan):
    """Return fake runs of a plan, with the evaluations of each metric by seed."""
    generator = np.random.default_rng(0)
    values = {"matthews_correlation": generator.random((3, 3)), "pearson": generator.random((3, 3))}
    values["spearman"] = generator.random((3, 3))
    runs = {}
    for seed in range(3):
        curves = {name: list(array[seed]) for name, array in values.items()}
        runs[f"FourierFT, CoLA, seed {seed}"] = fake_run(seed, curves)
        runs[f"FourierFT, STS-B, STS-B, ranks, seed {seed}"] = fake_run(seed, curves)
    return runs, values


def test_table_equals_scipy_and_is_read_from_the_evaluations_after_step_0(plan):
    runs, values = made_up_runs(plan)
    table = recipe_table.tabulate(plan, runs).set_index(["column", "row", "evaluation"])
    best = 100 * values["matthews_correlation"][:, 1:].max(axis=1)
    cell = table.loc["CoLA", "FourierFT", "best"]
    assert cell["mean"] == pytest.approx(best.mean())
    assert (cell["low"], cell["high"]) == pytest.approx(stats.t.interval(0.95, 2, best.mean(), stats.sem(best)))
    assert (cell["median"], cell["minimum"], cell["maximum"]) == pytest.approx(
        (np.median(best), best.min(), best.max())
    )
    assert table.loc[("STS-B", "FourierFT", "last"), "mean"] == pytest.approx(100 * values["pearson"][:, 2].mean())
    assert table.loc[("CoLA", "AdaLoRA", "best"), "n"] == 0
    assert cell["difference"] == pytest.approx(np.median(best) - 63.8)
    # At the bounds of the interval, Welch's test has the p-value 0.05.
    half = (cell["difference_high"] - cell["difference_low"]) / 2
    welch = stats.ttest_ind_from_stats(63.8 + half, best.std(ddof=1), 3, 63.8, 1.6, 5, equal_var=False)
    assert welch.pvalue == pytest.approx(0.05)


def test_mean_column_is_the_mean_over_columns_of_each_seed(plan):
    runs, values = made_up_runs(plan)
    del runs["FourierFT, STS-B, STS-B, ranks, seed 1"]
    table = recipe_table.tabulate(plan, runs).set_index(["column", "row", "evaluation"])
    last = 50 * (values["matthews_correlation"][:, 2] + values["pearson"][:, 2])[[0, 2]]
    cell = table.loc["mean", "FourierFT", "last"]
    assert (cell["n"], cell["seeds"]) == (2, 3)
    assert (cell["mean"], cell["median"]) == pytest.approx((last.mean(), last.mean()))
    assert cell["printed"] == 85.0
    # A printed number without a spread counts as a constant, so only our seeds have one.
    half = stats.t.interval(0.95, 1, 0, stats.sem(last))[1]
    assert cell["difference_high"] - cell["difference"] == pytest.approx(half)
    assert ("mean", "AdaLoRA", "last") not in table.index


def test_a_recipe_has_several_columns_of_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second = '[[mean]]\ncolumn = "STS-B, both"\ncolumns = ["STS-B", "STS-B, ranks"]\n'
    plan = recipe.read(write_recipe(tmp_path, RECIPE.replace("[mean]", f"{second}\n[[mean]]")))
    runs, values = made_up_runs(plan)
    table = recipe_table.tabulate(plan, runs).set_index(["column", "row", "evaluation"])
    both = 50 * (values["pearson"][:, 2] + values["spearman"][:, 2])
    assert table.loc[("STS-B, both", "FourierFT", "last"), "mean"] == pytest.approx(both.mean())
    assert table.loc[("mean", "FourierFT", "last"), "printed"] == 85.0
    assert np.isnan(table.loc[("STS-B, both", "FourierFT", "last"), "printed"])
    assert [mean.printed for mean in recipe.read(tmp_path / "own.toml", smoke=True).means] == [{}, {}]


def test_layout_compares_the_evaluation_that_the_paper_prints(plan):
    runs, _ = made_up_runs(plan)
    cells = recipe_table.tabulate(plan, runs)
    frames = recipe_table.format_cells(plan, cells)
    assert list(frames) == [
        "CoLA, matthews correlation", "STS-B, pearson", "STS-B, ranks, spearman", "mean, mean of the columns",
    ]  # fmt: skip
    frame = frames["CoLA, matthews correlation"].set_index("row")
    assert list(frame) == ["best evaluation", "last evaluation", "n", "printed", "difference"]
    best = cells.set_index(["column", "row", "evaluation"]).loc["CoLA", "FourierFT", "best"]
    assert frame.loc["FourierFT", "difference"].startswith(f"{best['difference']:.1f} [")
    assert frame.loc["FourierFT", "printed"] == "63.8 ± 1.6 (5)"
    assert frame.loc["AdaLoRA"].tolist() == ["-", "-", "0/3", "-", "-"]
    assert recipe_table.title_line(plan) == (
        "FourierFT (arXiv 2405.03003), Table 2. RoBERTa-base, GLUE dev. "
        "The best evaluation is selected on the reported split"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epoch = 2", "part CoLA: unknown setting 'epoch'; did you mean 'epochs'?"),
        ("coefficients = 8", "coefficient = 8", "part CoLA: unknown field of method fourierft 'coefficient'"),
        (
            'method = "FourierFT"}',
            'method = "Fourier"}',
            "part CoLA: printed matches 0 rows of reported.csv, expected 1",
        ),
        ('metric = "matthews_correlation"', 'metric = "mcc"', "unknown metric 'mcc'"),
        ('metric = "matthews_correlation"', 'metric = "pearson"', "part CoLA: .*pearson"),
        ('metric = "matthews_correlation"', "", 'part CoLA: missing key "metric"'),
        ('row = "AdaLoRA"', "", "part CoLA: a method requires its row"),
        ('name = "rows.csv"', 'name = "no.csv"', "part CoLA: .*no.csv"),
        ('state = "best"', 'state = "first"', "state of paper must be one of 'best', 'last', 'unknown', got 'first'"),
        ('state = "best"', 'stage = "best"', "unknown field `stage`"),
        ('"STS-B, ranks"', '"CoLA"', "duplicate row 'FourierFT' of column 'CoLA'"),
        ("warmup = 10", "warmup = [10, 20]", "part CoLA: settings must have one value in a part, got 2"),
        ("initial_steps = 50", "initial_steps = [50, 60]", "row 'AdaLoRA' must be one method, got 2"),
        ('row = "AdaLoRA"', 'row = "FourierFT"', "part CoLA: rows must have distinct names, got FourierFT, FourierFT"),
        ("[settings]\nepochs = 2", "settings = 3\n[x]\nepochs = 2", "unknown key 'x'"),
        ("settings = {warmup = 10}", "settings = 3", "part CoLA: settings must be a table, got 3"),
        ("[mean]", "[means]", "unknown key 'means'; did you mean 'mean'?"),
        ("[mean]", '[mean]\ncolumns = ["MNLI"]', "unknown column of mean 'MNLI'"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_part(tmp_path, monkeypatch, capsys, old, new, message):
    monkeypatch.chdir(tmp_path)
    assert old in RECIPE
    file = write_recipe(tmp_path, RECIPE.replace(old, new, 1))
    assert main(["sweep", str(file)]) == 2
    error = capsys.readouterr().err
    assert re.search(re.sub(r"([?\[\]])", r"\\\1", message), error)
    assert error.count("\n") == 1
    assert str(file) in error
    assert not (tmp_path / "runs").exists()


def test_an_unknown_recipe_names_the_known_ones(capsys):
    assert main(["sweep", "adalora-table9"]) == 2
    assert "did you mean 'adalora-table" in capsys.readouterr().err


def test_smoke_and_table_require_a_recipe(tmp_path, capsys):
    (tmp_path / "plain.toml").write_text('task = "sentiment"\nmethod = "lora"\nsettings = {steps = 1}\n')
    assert main(["sweep", str(tmp_path / "plain.toml"), "--smoke"]) == 2
    assert "--smoke, --check and --table require a recipe" in capsys.readouterr().err


def test_smoke_runs_of_a_recipe_fill_its_table_and_are_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path)
    assert main(["sweep", str(file), "--smoke", "--json", "--no-progress"]) == 0
    cells = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert cells["n"].tolist() == [1] * len(cells)
    assert set(cells["column"]) == {"CoLA", "STS-B", "STS-B, ranks", "mean"}
    assert cells["printed"].isna().all()
    folder = tmp_path / "runs" / "own-smoke"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}
    assert len(before) == 3
    assert main(["sweep", str(file), "--smoke", "--table", "--json"]) == 0
    pd.testing.assert_frame_equal(cells, pd.DataFrame(json.loads(capsys.readouterr().out)))
    assert main(["sweep", str(file), "--smoke", "--no-progress"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/run.json")} == before
    details = json.loads((folder / "table.json").read_text())
    assert {run["id"] for run in details["runs"].values()} == {ls.load(path.parent).id for path in before}
    assert (folder / "table.md").read_text().count("| FourierFT |") == 4
    assert len(pd.read_csv(folder / "table.csv")) == len(cells)


CHECKED = """
seeds = 2
settings = {epochs = 2, batch_size = 4, device = "cpu"}
model = "encoder"

[[part]]
column = "rows"
metric = "accuracy"
task = {name = "rows.csv", splits = {train = "train", validation = "dev", test = "dev"}}

[[part.method]]
row = "LoRA"
name = "lora"
rank = 2

[[part.method]]
row = "Full"
name = "full"
"""


@pytest.fixture
def checked_recipe(tmp_path, monkeypatch):
    """Return the file of a recipe whose model and data are on this machine."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke.Smoke().model(), tmp_path / "encoder")
    return write_recipe(tmp_path, CHECKED)


def test_check_says_of_each_row_what_its_runs_have(checked_recipe, capsys):
    assert main(["sweep", str(checked_recipe), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  model encoder: on this machine" in lines
    assert "  rows: 10 train, 10 validation, 10 test" in lines
    assert not Path("runs").exists()
    plan = recipe.read(checked_recipe)
    for job in plan.jobs()[::2]:
        run = train_job(job)
        # The weights of the base, and a gradient and two moments of each trained one, in float32.
        mebibytes = 4 * (run.meta.parameters.total + 3 * run.meta.parameters.trained) / 2**20
        assert (
            f"  {job.name.partition(',')[0]}: 2 runs, {run.meta.settings['steps']} steps a phase, "
            f"{run.meta.parameters.trained:,} trained parameters, {mebibytes:,.0f} MiB without activations"
        ) in lines


def test_check_names_what_is_missing_with_the_parts_that_lack_it(checked_recipe, monkeypatch, capsys):
    monkeypatch.setattr(recipe_check, "device_memory", lambda: 1000)
    second = CHECKED[CHECKED.index("[[part]]") :].replace('"rows"', '"others"')
    text = CHECKED.replace("rows.csv", "no.csv") + second
    checked_recipe.write_text(text)
    assert main(["sweep", str(checked_recipe), "--check"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("lorascope: rows: ")
    assert "no.csv" in errors[0]
    # Both parts have the same need, which is one line.
    assert errors[1].startswith(
        "lorascope: rows, others: LoRA needs 0 MiB without activations, and the device has 0 MiB"
    )


def test_a_copy_of_a_recipe_is_one_and_replaces_no_file(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    assert main(["sweep", "--new", str(file), "--from", "autolora-table1"]) == 0
    assert file.read_bytes() == recipe.find_recipe("autolora-table1").read_bytes()
    file.write_text("mine")
    assert main(["sweep", "--new", str(file), "--from", "autolora-table1"]) == 2
    assert f"cannot write {file}: it exists" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main(["sweep", "--new", str(file)]) == 2
    assert "--new and --from belong together" in capsys.readouterr().err


def test_generated_rows_have_the_splits_columns_and_classes_of_the_task():
    entry = {
        "name": "nyu-mll/glue:rte",
        "splits": {"train": "train[10%:]", "validation": "train[:10%]", "test": "validation"},
        "columns": {"text": "sentence1", "pair": "sentence2", "label": "label"},
    }  # fmt: skip
    task = smoke.Smoke().task(entry)
    assert [len(task.split(name)) for name in tasks.SPLITS] == [18, 2, 20]
    assert "pair" in task.table
    assert set(task.split("test")["label"]) == {"bad", "good"}
    # The label is the first word.
    assert (task.table["text"].str.split().str[0] == task.table["label"]).all()
    ratings = smoke.Smoke().task({"name": "ratings", "kind": "regression"})
    assert (ratings.table["text"].str.count("good") == 4 * ratings.table["label"]).all()


OWN = ("adapprox-pretrain",)


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_recipes_of_the_package_have_sources_and_printed_numbers(name):
    plan = recipe.read(name, smoke=True)
    text = recipe.find_recipe(name).read_text(encoding="utf-8")
    if plan.paper is None:
        assert name in OWN
        return
    for source in plan.paper.sources:
        assert re.fullmatch(r"[\w-]+/[\w-]+: [\w./-]+", source)
    assert plan.paper.sources or "no public code" in text
    assert "printed" in text
    assert len(text.splitlines()[0]) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.recipe_names())
def test_smoke_runs_of_the_recipes_of_the_package(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", name, "--smoke", "--json", "--no-progress", "--jobs", "1"]) == 0
    cells = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert (cells["n"] == 1).all()


# -- generated texts ------------------------------------------------------------------------------------------------

E2E = {
    "lora-table3": ("LoRA, rank 4", [70.4, 8.85, 46.8, 71.8, 2.53, 70.4, 8.89, 46.8, 72.0, 2.47], (393_216, 737_280)),
    "fourierft-table3": (
        "FourierFT, 1000 coefficients",
        [69.1, 8.82, 47.0, 71.8, 2.51, 70.2, 8.90, 47.0, 71.8, 2.50],
        (48_000, 72_000),
    ),
}


@pytest.fixture
def e2e_lines(tmp_path, monkeypatch):
    """Write lines where the recipes of E2E read them, and let their models and metrics be available."""
    monkeypatch.chdir(tmp_path)
    folder = Path("LoRA/examples/NLG/data/e2e")
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        lines = [f"name : {split} {number}||{split} is pub number {number} ." for number in range(10)]
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(metrics, "require_package", lambda metric: None)
    monkeypatch.setattr(models, "locate_model", lambda name: None)


@pytest.mark.parametrize("name", E2E)
def test_recipes_of_e2e_have_the_printed_numbers_and_parameters(name, e2e_lines):
    row_name, scores, parameters = E2E[name]
    plan = recipe.read(name)
    printed = []
    for recipe_part, (width, depth, heads), count in zip(
        plan.recipe_parts, [(1024, 24, 16), (1280, 36, 20)], parameters, strict=True
    ):
        (row,) = recipe_part.rows
        assert row.name == row_name
        printed += [row.printed[column].value for column in recipe_part.columns]
        assert {score.n for score in row.printed.values()} == {3}
        with torch.device("meta"):
            config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=heads)
            outline = transformers.GPT2LMHeadModel(config)
        trained, _ = recipe_check.measure_outline(outline, recipe_part.jobs()[0])
        assert trained == count
        assert recipe_part.grid.tasks[0].split("test")["prompt"].str.endswith("<|endoftext|>").all()
    assert printed == scores
    if name == "lora-table3":
        job = plan.jobs()[0]
        assert Settings(steps=0, lr=1, head_lr=1, **without_rates(job)).resolve(42_061).steps == 26_290


def without_rates(job) -> dict:
    return {key: value for key, value in job.settings.items() if key in Settings.__dataclass_fields__}


def test_check_says_that_a_file_is_missing_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_check.huggingface_hub, "HfApi", None)
    assert recipe_check.describe_source("dolly-mmlu.jsonl", "dataset") == "not on this machine"
    Path("dolly-mmlu.jsonl").touch()
    assert recipe_check.describe_source("dolly-mmlu.jsonl", "dataset") == "on this machine"


def test_check_names_the_extra_of_a_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert main(["sweep", "lora-table3", "--check"]) == 1
    output = capsys.readouterr()
    assert "metric 'cider' requires pycocoevalcap: pip install 'lorascope[e2e]'" in output.err
    assert "cannot read LoRA/examples/NLG/data/e2e: no such file or folder" in output.err
    assert "dataset LoRA/examples/NLG/data/e2e: not on this machine" in output.out


def test_fractions_are_in_percent_and_nist_and_cider_have_two_decimals(e2e_lines):
    plan = recipe.read("lora-table3")
    values = {"bleu_lower": 70.41, "nist": 8.853, "meteor": 0.4684, "rougeL_coco": 0.718, "cider": 2.526}
    runs = {}
    for job in plan.jobs():
        seed = job.settings["seed"]
        scores = {metric: value * (1 + 0.01 * seed) for metric, value in values.items()}
        runs[job.name] = SimpleNamespace(score=SimpleNamespace(values=scores), meta=SimpleNamespace(seed=seed))
    cells = recipe_table.tabulate(plan, runs).set_index("column")
    for column, name in plan.recipe_parts[0].columns.items():
        factor = {"meteor": 100, "rougeL_coco": 100}.get(name.name, 1)
        assert cells.loc[column, "mean"] == pytest.approx(1.01 * factor * values[name.name])
    frames = recipe_table.format_cells(plan, cells.reset_index())
    assert frames["NIST, medium, nist"].iloc[0]["test"].startswith("8.94 [8.72, 9.16]")
    assert frames["METEOR, medium, meteor"].iloc[0]["test"].startswith("47.3 [46.1, 48.5]")
    assert frames["CIDEr, medium, cider"].iloc[0]["printed"] == "2.53 (3)"


def test_a_metric_without_a_printed_name_is_one_line(tmp_path, e2e_lines, capsys):
    text = recipe.find_recipe("lora-table3").read_text(encoding="utf-8").replace(', cider = "CIDEr"}', "}")
    Path("own.toml").write_text(text, encoding="utf-8")
    assert main(["sweep", "own.toml"]) == 2
    error = capsys.readouterr().err
    assert "unknown metric in metric of printed 'cider'" in error
    assert error.count("\n") == 1


def test_generated_prompts_have_two_responses_and_a_model_that_writes():
    stand_in = smoke.Smoke(architecture="gpt2")
    task = stand_in.task({"name": "e2e", "prompt_end": "!"})
    assert task.kind == "prompt"
    for split in tasks.SPLITS:
        rows = task.split(split)
        assert len(rows) == 20
        assert (rows.groupby("prompt")["response"].nunique() == 2).all()
        assert (rows["response"].str.split().str.len() >= 6).all()
    model = models.load(stand_in.model("prompt"))
    assert type(model).__name__ == "GPT2LMHeadModel"
    settings = stand_in.settings({"epochs": 5, "generation": {"num_beams": 10, "no_repeat_ngram": 4}})
    assert settings["generation"] == {"num_beams": 2, "no_repeat_ngram": 4, "max_new_tokens": 10}


# -- language models --------------------------------------------------------------------------------------------------

PERPLEXITY = """
settings = {epochs = 2, eval_every = "epoch"}
model = "gpt2"
seeds = 2

[smoke]
architecture = "gpt2"

[[part]]
column = "held-out"
metric = "perplexity"
task = {name = "rows.jsonl", splits = {train = "train", validation = "dev", test = "test"}}

[[part.method]]
row = "LoRA"
name = "lora"

[[part]]
column = "dev"
metric = "perplexity"
task = {name = "rows.jsonl", splits = {train = "train", validation = "dev", test = "dev"}}

[[part.method]]
row = "LoRA"
name = "lora"
"""


@pytest.fixture
def texts_recipe(tmp_path, monkeypatch):
    """Write plain texts, a model, and a recipe of them with columns of perplexity, and return its file."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"word{n} word{n % 5} word{n % 7}", "split": ("train", "dev", "test")[n % 3]} for n in range(24)]
    pd.DataFrame(rows).to_json("rows.jsonl", orient="records", lines=True)
    shutil.copytree(smoke.Smoke(architecture="gpt2").model("lm"), tmp_path / "gpt2")
    file = tmp_path / "own.toml"
    file.write_text(PERPLEXITY, encoding="utf-8")
    return file


def test_a_column_of_perplexity_is_the_metric_that_runs_record_by_default(texts_recipe):
    assert main(["sweep", str(texts_recipe), "--no-progress", "--jobs", "1"]) == 0
    cells = ls.recipes.table(texts_recipe).set_index(["column", "evaluation"])
    runs = [ls.load(path.parent) for path in Path("runs/own").glob("*/run.json")]
    assert len(runs) == 4
    assert all("metric" not in run.meta.settings for run in runs)
    plan = recipe.read(texts_recipe)
    scores, losses, courses = [], [], []
    for run in runs:
        if run.meta.data_hash == plan.recipe_parts[0].grid.tasks[0].hash:
            scores.append(run.score.metric)
            losses.append(run.score.loss)
        else:
            table = run.table[(run.table["quantity"] == "eval_metric") & (run.table["step"] > 0)]
            courses.append(table["value"].to_numpy())
    assert scores == pytest.approx(np.exp(losses))
    assert cells.loc[("held-out", "test"), "mean"] == pytest.approx(np.mean(scores))
    # A low perplexity is the best one.
    assert cells.loc[("dev", "best"), "mean"] == pytest.approx(np.mean([course.min() for course in courses]))
    assert cells.loc[("dev", "last"), "mean"] == pytest.approx(np.mean([course[-1] for course in courses]))
    frames = recipe_table.format_cells(plan, cells.reset_index())
    assert re.match(r"\d+\.\d\d \[", frames["held-out, perplexity"].iloc[0]["test"])


def test_perplexity_requires_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path, RECIPE.replace('"matthews_correlation"', '"perplexity"'))
    assert main(["sweep", str(file)]) == 2
    assert "part CoLA: metric 'perplexity' requires plain text or open responses, and rows.csv has neither" in (
        capsys.readouterr().err
    )


def outline_of(architecture: str, **sizes) -> torch.nn.Module:
    """Return the modules of a causal language model without weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(architecture, **sizes), dtype=torch.float32
        )


LLAMA = {
    "7b": {},  # the defaults of transformers
    "13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
TOTAL_7B, BLOCK_7B, LAYERS_7B = 6_738_415_616, 202_383_360, 32


def test_memory_counts_dtype_quantization_and_blocks_that_train_at_a_time():
    small = outline_of("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    total = sum(parameter.numel() for parameter in small.parameters())
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    block = linear // 4 + 2 * 64

    def measure(method, **settings):
        with torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(small.config, dtype=torch.float32)
        return recipe_check.measure_outline(outline, recipe_check.Job("llama", "rows", method, settings))

    adapter = 4 * 2 * 4 * (64 + 64)
    assert measure(ls.LoRA(rank=4)) == (adapter, 4 * total + 16 * adapter)
    assert measure(ls.LoRA(rank=4), dtype="bfloat16") == (adapter, 2 * total + 16 * adapter)
    rest = 4 * (total - linear)
    assert measure(ls.LoRA(rank=4), quantize="nf4") == (adapter, rest + linear // 2 + 16 * adapter)
    assert measure(ls.LoRA(rank=4), quantize="int8") == (adapter, rest + linear + 16 * adapter)
    assert measure(ls.Full(), dtype="bfloat16") == (total, 16 * total)
    assert measure(ls.LISA(n_active=1), dtype="bfloat16") == (total, 2 * 3 * block + 16 * (total - 3 * block))


def counts_by_row(plan, column: str, outline) -> dict[str, int]:
    """Return the number of trained parameters of each row of a column."""
    counts = {}
    for recipe_part in plan.recipe_parts:
        if column in recipe_part.columns:
            for job, row in zip(recipe_part.jobs()[:: len(recipe_part.grid.seeds)], recipe_part.rows, strict=True):
                counts[row.name] = recipe_check.measure_outline(copy.deepcopy(outline), job)[0]
    return counts


def test_rows_of_fourierft_table_4_train_the_printed_numbers_of_parameters():
    plan = recipe.read("fourierft-table4", smoke=True)
    for column, sizes, coefficients, factors in (
        ("LLaMA-2 7B", LLAMA["7b"], 64_000, 33_554_432),
        ("LLaMA-2 13B", LLAMA["13b"], 80_000, 52_428_800),
    ):
        assert counts_by_row(plan, column, outline_of("llama", **sizes)) == {
            "FourierFT, as in the scripts": coefficients,
            "FourierFT, as printed": coefficients,
            "LoRA, as printed": factors,
        }


def test_rows_of_hydralora_table_2_train_the_parameters_of_the_printed_percentages_and_a_router():
    plan = recipe.read("hydralora-table2", smoke=True)
    counts = counts_by_row(plan, "Law", outline_of("llama", **LLAMA["7b"]))
    routers = {"feed-forward": LAYERS_7B * 4 * (2 * 4096 + 11_008), "q, v": LAYERS_7B * 3 * 2 * 4096}
    assert counts == {
        "HydraLoRA, rank 4, 4 experts, feed-forward": 15_826_944 + routers["feed-forward"],
        "LoRA, rank 8, feed-forward": 11_599_872,
        "LoRA, rank 16, feed-forward": 23_199_744,
        "LoRA, rank 32, feed-forward": 46_399_488,
        "HydraLoRA, rank 8, 3 experts, q, v": 8_388_608 + routers["q, v"],
        "LoRA, rank 8, q, v": 4_194_304,
        "LoRA, rank 16, q, v": 8_388_608,
        "LoRA, rank 32, q, v": 16_777_216,
    }
    # As printed, in percent and without the router.
    assert round(100 * 8_388_608 / TOTAL_7B, 3) == 0.124


def test_generated_questions_train_on_responses_and_test_choices():
    entry = {"name": "mixed.jsonl", "columns": {"prompt": "prompt", "choices": "choices", "answer": "answer"}}
    task = smoke.Smoke().task(entry)
    assert task.kind == "choice"
    assert set(task.split("train")["choices"].map(len)) == {1}
    for split in ("validation", "test"):
        assert set(task.split(split)["choices"].map(tuple)) == {("bad", "good")}
        assert set(task.split(split)["answer"]) == {0, 1}
    texts = smoke.Smoke().task({"name": "corpus", "columns": {"text": "text"}})
    assert texts.kind == "lm"


def test_rows_of_lisa_train_embedding_head_and_two_blocks_or_factors_of_all_linear_layers():
    plan = recipe.read("lisa-mtbench", smoke=True)
    recipe_part = plan.recipe_parts[1]
    assert list(recipe_part.columns) == ["MMLU, LLaMA-2 7B"]
    (method,) = recipe.grid.read_methods({"name": "lisa", "n_active": 2, "interval": 13})
    job = recipe_check.Job("llama", "rows", method, {"dtype": "bfloat16"})
    at_a_time = 666_914_816  # embedding, head, final norm and two blocks
    assert at_a_time == TOTAL_7B - 30 * BLOCK_7B
    outline = outline_of("llama")
    expected = 16 * at_a_time + 2 * 30 * BLOCK_7B
    assert recipe_check.measure_outline(copy.deepcopy(outline), job) == (TOTAL_7B, expected)
    counts = counts_by_row(plan, "MMLU, LLaMA-2 7B", outline)
    in_blocks = 128 * LAYERS_7B * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    assert counts["LoRA, rank 128, rate 5e-5"] == in_blocks + 2 * 128 * (32_000 + 4096)
    assert counts["full fine-tuning"] == TOTAL_7B
    # An epoch of the 52,000 rows has the printed number of steps.
    table = recipe.grid.read_toml(recipe.find_recipe("lisa-mtbench"))
    assert round(52_000 / table["settings"]["batch_size"]) == 122


def test_rows_of_neft_table_2_train_nine_percent_of_the_parameters():
    table = recipe.grid.read_toml(recipe.find_recipe("neft-table2"))
    neurons = {fields["num_neurons"] for part in table["part"] for fields in part["method"] if fields["name"] == "neft"}
    assert neurons == {150_000}
    assert round(100 * 150_000 * 4096 / TOTAL_7B) == 9
    plan = recipe.read("neft-table2", smoke=True)
    counts = counts_by_row(plan, "Fr-Zh 20k", outline_of("llama"))
    assert counts["LoRA, rank 256"] == 639_631_360
    assert [row.name for recipe_part in plan.recipe_parts[:2] for row in recipe_part.rows] == list(counts)


def test_all_weights_of_gpt2_are_pre_trained():
    plan = recipe.read("adapprox-pretrain", smoke=True)
    assert plan.paper is None
    counts = counts_by_row(plan, "GPT-2 117M", outline_of("gpt2"))
    assert len(counts) == 4 * 3
    assert set(counts.values()) == {124_439_808}


def test_rows_of_alora_table_1_have_the_printed_parameters_and_intervals_of_an_epoch():
    plan = recipe.read("alora-table1", smoke=True)
    counts = counts_by_row(plan, "COPA", outline_of("llama"))
    # 20.0M are printed.
    assert counts == {"LoRA": 19_988_480, "ALoRA": 19_988_480}
    train_rows = {"SST-2": 0.99 * 67_349, "RTE": 2490, "QNLI": 0.99 * 104_743, "BoolQ": 9427, "COPA": 400}
    train_rows |= {"ReCoRD": 101_000, "SQuAD": 87_000}  # printed, without the validation rows
    parts = recipe.grid.read_toml(recipe.find_recipe("alora-table1"))["part"]
    for part, (name, rows) in zip(parts, train_rows.items(), strict=True):
        assert name in str(part["column"])
        (alora,) = [fields for fields in part["method"] if fields["name"] == "alora"]
        epoch = rows * (1 - alora["search_share"]) / part["settings"]["batch_size"]
        assert alora["warm_steps"] == pytest.approx(epoch, abs=1)
        assert alora["round_steps"] == pytest.approx(epoch / 4, abs=0.6)
        # The rows on which components are scored suffice.
        assert rows * alora["search_share"] > alora["score_rows"]
        assert part["settings"]["batch_size"] == (16 if rows < 10_000 else 128)


PRINTED = {
    "hydralora-table2": {
        "HydraLoRA, rank 4, 4 experts, feed-forward": [47.22, 45.71, 42.18],
        "HydraLoRA, rank 8, 3 experts, q, v": [47.22, 45.71, 42.18],
        "LoRA, rank 8, q, v": [43.22, 41.59, 37.85],
        "LoRA, rank 16, feed-forward": [45.45, 43.10, 39.64],
        "LoRA, rank 32, q, v": [46.59, 44.32, 40.81],
    },
    "neft-table2": {"NeFT, 9%": [28.69, 30.48, 24.07, 25.61], "LoRA, rank 256": [27.13, 26.22, 22.84, 22.24]},
    "alora-table1": {
        "LoRA": [94.1, 83.3, 93.1, 87.3, 91.3, 90.8, 88.4],
        "ALoRA": [95.0, 84.6, 93.7, 88.0, 92.1, 91.8, 89.2],
    },
    "lisa-mtbench": {},
    "fourierft-table4": {},
}


@pytest.mark.parametrize("name", PRINTED)
def test_recipes_of_language_models_have_the_printed_numbers(name, monkeypatch):
    # Reading a recipe requires the package of its quantized bases.
    monkeypatch.setattr("lorascope.training.settings.require_bitsandbytes", lambda kind: None)
    monkeypatch.setattr(metrics, "require_package", lambda metric: None)
    monkeypatch.setattr(models, "locate_model", lambda name: None)
    monkeypatch.setattr(recipe.grid, "load_task", smoke.Smoke().task)
    plan = recipe.read(name)
    numbers: dict[str, list[float]] = {}
    for recipe_part in plan.recipe_parts:
        for row in recipe_part.rows:
            numbers.setdefault(row.name, []).extend(score.value for score in row.printed.values())
    for mean in plan.means:
        for row_name, score in mean.printed.items():
            numbers[row_name].append(score.value)
    for row_name, values in PRINTED[name].items():
        assert numbers[row_name] == values
    if not PRINTED[name]:
        assert not any(numbers.values())
