"""Tests of splits that a source or a mapping gives, and of mapped columns: rows, hashes and errors."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments import grid
from lorascope.experiments.trained_model import open_trained
from lorascope.inputs import models, splits, tasks

SOURCES = ("train", "dev", "holdout")
MAPPING = {"train": "train", "validation": "dev", "test": "holdout"}


def table(rows: int = 300) -> pd.DataFrame:
    """Return distinct texts with two labels and the words of three splits in turn."""
    numbers = range(rows)
    return pd.DataFrame(
        {
            "text": [f"text number {number}" for number in numbers],
            "label": [("negative", "positive")[number % 7 % 2] for number in numbers],
            "split": [SOURCES[number % 3] for number in numbers],
        }
    )


def test_mapping_names_the_source_of_each_split():
    rows = table()
    task = tasks.from_frame(rows, splits=MAPPING)
    for name, source in MAPPING.items():
        assert set(task.split(name)["text"]) == set(rows["text"][rows["split"] == source])
    assert not task.selected_on_test


def test_rows_of_unnamed_sources_are_left_out():
    rows = table().assign(label=lambda rows: rows["label"].mask(rows["split"] == "holdout", "third"))
    task = tasks.from_frame(rows, splits={"train": "train", "validation": "dev", "test": "dev"})
    assert task.labels == ("negative", "positive")
    assert set(task.table["text"]) == set(rows["text"][rows["split"] != "holdout"])


def test_percentages_cut_in_the_order_of_digests():
    rows = table()
    mapping = {"train": "train[10%:]", "validation": "train[:10%]", "test": "dev"}
    task = tasks.from_frame(rows, splits=mapping)
    ordered = sorted(rows["text"][rows["split"] == "train"], key=splits.digest_text)
    assert set(task.split("validation")["text"]) == set(ordered[:10])
    assert set(task.split("train")["text"]) == set(ordered[10:])


def test_percentages_keep_rows_of_one_digest_together():
    rows = pd.concat([table(), table().assign(text=lambda rows: rows["text"].str.upper())], ignore_index=True)
    for percent in (7, 33, 50):
        mapping = {"train": f"train[{percent}%:]", "validation": f"train[:{percent}%]", "test": "dev"}
        task = tasks.from_frame(rows, splits=mapping)
        assert not set(task.split("train")["text"].str.lower()) & set(task.split("validation")["text"].str.lower())


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_parts_at_every_percentage_are_a_partition(count):
    digests = [splits.digest_text(f"text {number}") for number in range(count)]
    for percent in range(1, 100):
        sizes = 0
        for part in (f"all[:{percent}%]", f"all[{percent}%:]"):
            rule = {"train": "other", "validation": part, "test": part}
            words = pd.Series(["all"] * count + ["other"])
            sizes += splits.select(rule, words, pd.Series([*digests, "0"]), "table").splits.count("test")
        assert sizes == count


def test_validation_and_test_may_be_the_same_rows():
    rows = table()
    task = tasks.from_frame(rows, splits={"train": "train", "validation": "dev", "test": "dev"})
    assert task.selected_on_test
    assert task.split("validation").equals(task.split("test"))
    assert set(task.split("test")["text"]) == set(rows["text"][rows["split"] == "dev"])


def test_mapping_and_column_of_the_same_splits_have_the_same_hash():
    rows = table().replace({"split": {"holdout": "test"}})
    mapping = MAPPING | {"test": "test"}
    by_column, by_mapping = tasks.from_frame(rows), tasks.from_frame(rows, splits=mapping)
    assert by_mapping.hash == by_column.hash == tasks.from_frame(rows, splits="given").hash
    assert by_mapping.table.equals(by_column.table)
    assert tasks.from_frame(rows.sample(frac=1, random_state=0), splits=mapping).hash == by_mapping.hash
    moved = rows.assign(split=["test", *rows["split"][1:]])
    assert tasks.from_frame(moved, splits=mapping).hash != by_mapping.hash


def test_hash_ignores_the_column_split():
    rows = table()
    task = tasks.from_frame(rows, splits="hash")
    assert task.hash == tasks.from_frame(rows.drop(columns="split")).hash


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("official", "splits must be 'given', 'hash' or a mapping of train, validation, test, got 'official'"),
        ({"train": "train", "test": "dev"}, "splits must name train, validation, test, got 'train', 'test'"),
        (
            MAPPING | {"dev": "dev"},
            "splits must name train, validation, test, got 'train', 'validation', 'test', 'dev'",
        ),
        (
            MAPPING | {"test": "train[10:20]"},
            "splits: test must be a split, or a part such as 'train[10%:]', got 'train[10:20]'",
        ),
        (MAPPING | {"test": 3}, "splits: test must be a split, or a part such as 'train[10%:]', got 3"),
        (MAPPING | {"test": "dev2"}, "splits: unknown split 'dev2' of x.csv; expected one of train, dev, holdout"),
        (
            MAPPING | {"test": "train[:12%]"},
            "cannot use splits of x.csv: 12 rows of train are also in test, the first is row 40",
        ),
        (
            {"train": "train", "validation": "dev", "test": "dev[:50%]"},
            "cannot use splits of x.csv: 50 rows of validation are also in test, the first is row 2",
        ),
    ],
)
def test_invalid_splits_raise_one_line(rule, expected):
    rows = table()
    message = re.sub(r"row \d+$", "row N", expected)
    with pytest.raises(ValueError, match="splits") as caught:
        tasks.from_frame(rows, "x.csv", splits=rule)
    assert re.sub(r"row \d+$", "row N", str(caught.value)) == message


def test_first_shared_row_is_named_by_its_number_in_the_table():
    rows = table()
    with pytest.raises(ValueError, match="also in test") as caught:
        tasks.from_frame(rows, splits=MAPPING | {"test": "train[:12%]"})
    digests = rows["text"][rows["split"] == "train"].map(splits.digest_text).sort_values()
    assert str(caught.value).endswith(f"the first is row {1 + min(digests.index[:12])}")


def test_splits_without_a_column_raise():
    with pytest.raises(ValueError, match=r"^cannot use splits='given' of table: it has no column split$"):
        tasks.from_frame(table().drop(columns="split"), splits="given")


# -- columns --------------------------------------------------------------------------------------------------------


def test_columns_are_read_under_their_names_in_the_source(tmp_path):
    rows = table().rename(columns={"text": "premise", "label": "class"})
    rows = rows.assign(hypothesis=rows["premise"] + "?", id=range(len(rows)))
    path = tmp_path / "rows.csv"
    rows.to_csv(path, index=False)
    columns = {"text": "premise", "pair": "hypothesis", "label": "class"}
    task = tasks.load(path, columns=columns, splits=MAPPING)
    pairs = table().assign(pair=lambda rows: rows["text"] + "?")
    assert task.hash == tasks.from_frame(pairs, splits=MAPPING).hash
    assert dict(task.options) == {"columns": columns, "splits": MAPPING}
    assert tasks.load(path, **json.loads(json.dumps(task.options))).hash == task.hash


def test_mapped_text_replaces_a_column_of_that_name_and_ignores_others():
    rows = pd.DataFrame({"text": ["short"] * 60, "body": [f"line {n}" for n in range(60)], "url": ["x"] * 60})
    task = tasks.from_frame(rows, columns={"text": "body"})
    assert task.kind == "lm"
    assert set(task.table["text"]) == set(rows["body"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "txet"}, r"^cannot read x.csv: unknown column 'txet'; did you mean 'text'\?$"),
        ({"premise": "text"}, r"^columns must map text, pair, label, .*, got 'premise'$"),
    ],
)
def test_invalid_columns_raise_one_line(columns, expected):
    with pytest.raises(ValueError, match=expected):
        tasks.from_frame(table(), "x.csv", columns=columns)


# -- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Save three splits with classes and hidden test labels as ``datasets`` does; return the folder and its splits."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    parts = {}
    for name, size in (("train", 80), ("validation", 40), ("test", 20)):
        labels = [-1 if name == "test" else number % 2 for number in range(size)]
        texts = [f"{name} {number}" for number in range(size)]
        parts[name] = datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features)
    data = datasets.DatasetDict(parts)
    data.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved", data


def test_splits_of_a_saved_dataset_are_its_own(folder):
    path, data = folder
    mapping = {"train": "train", "validation": "train[:25%]", "test": "validation"}
    with pytest.raises(ValueError, match="20 rows of train are also in validation"):
        tasks.load(path, splits=mapping)
    task = tasks.load(path, splits=mapping | {"validation": "validation"})
    for name, source in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        rows = task.split(name)
        expected = {(row["sentence"], ("bad", "good")[row["label"]]) for row in data[source]}
        assert set(zip(rows["text"], rows["label"], strict=True)) == expected
    assert task.selected_on_test


def test_hidden_labels_are_left_out_or_named(folder):
    path, _ = folder
    assert len(tasks.load(path).table) == 120
    expected = f'cannot use the test split of {path}: its labels are hidden (-1); map test to "validation"'
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        tasks.load(path, splits="given")


def test_folder_of_tables_is_a_dataset(folder, tmp_path):
    path, data = folder
    tables = tmp_path / "tables"
    for name, part in data.items():
        part.to_parquet(str(tables / f"{name}.parquet"))
    mapping = {"train": "train", "validation": "validation", "test": "validation"}
    assert tasks.load(tables, splits=mapping).hash == tasks.load(path, splits=mapping).hash


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "rows.csv"
    table(60).to_csv(path, index=False)
    return path


def test_run_stores_the_splits_and_its_forks_use_them(bert, csv, tmp_path):
    task = tasks.load(csv, splits={"train": "train", "validation": "dev", "test": "dev"})
    settings = {"steps": 2, "batch_size": 4, "progress": False, "keep_checkpoints": (1,)}
    run = ls.train(models.load(bert, task=task), task, "lora", out=tmp_path / "run", **settings)
    stored = ls.load(run.path)
    assert stored.meta.task_options == {"splits": {"train": "train", "validation": "dev", "test": "dev"}}
    assert stored.meta.selected_on_test
    assert stored.meta.data_hash == task.hash
    fork = ls.fork(stored, step=1, model=str(bert), progress=False, lr=1e-4)
    assert fork.meta.data_hash == task.hash
    assert open_trained(stored, bert, csv, "last").task.hash == task.hash


def test_sweep_file_has_the_splits_of_a_task(csv):
    entry = {"name": str(csv), "splits": MAPPING}
    read = grid.read({"task": entry, "method": "lora", "settings": {"steps": 1}})
    assert [task.hash for task in read.tasks] == [tasks.load(csv, splits=MAPPING).hash]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"split": "given"}, r"^unknown key of task 'split'; did you mean 'splits'\?$"),
        ({"splits": "official"}, r"^splits must be 'given', 'hash' or a mapping"),
        ({"columns": 3}, r"^task: columns must be a table.*, got 3$"),
        ({"name": 3}, r"^task must be a name or a table with a name, such as .*, got \{'name': 3\}$"),
    ],
)
def test_invalid_task_of_a_sweep_raises_one_line(change, expected, csv):
    entry = {"name": str(csv)} | change
    with pytest.raises(ValueError, match=expected):
        grid.read({"task": entry, "method": "lora", "settings": {"steps": 1}})


def test_command_trains_on_the_given_splits(bert, csv, tmp_path, capsys):
    rows = table(60).replace({"split": {"holdout": "test"}})
    rows.to_csv(csv, index=False)
    words = ["train", "lora", "--task", str(csv), "--model", str(bert), "--steps", "1", "--no-progress"]
    for splits_word in ("given", "hash"):
        out = tmp_path / splits_word
        assert main([*words, "--splits", splits_word, "-o", str(out)]) == 0
        assert ls.load(out).meta.data_hash == tasks.load(csv, splits=splits_word).hash
    capsys.readouterr()


@pytest.mark.parametrize(
    ("splits_word", "mapping"),
    [
        ("train=train, validation=dev,test=dev", {"train": "train", "validation": "dev", "test": "dev"}),
        (
            "train=train[10%:],validation=train[:10%],test=test",
            {"train": "train[10%:]", "validation": "train[:10%]", "test": "test"},
        ),
        (
            "train=train,validation=dev,test.m=dev,test.mm=test",
            {"train": "train", "validation": "dev", "test": {"m": "dev", "mm": "test"}},
        ),
    ],
)
def test_command_trains_on_a_mapping_of_splits(splits_word, mapping, bert, csv, tmp_path, capsys):
    table(60).replace({"split": {"holdout": "test"}}).to_csv(csv, index=False)
    words = ["train", "lora", "--task", str(csv), "--model", str(bert), "--steps", "1", "--no-progress"]
    assert main([*words, "--splits", splits_word, "-o", str(tmp_path / "run")]) == 0
    run = ls.load(tmp_path / "run")
    assert run.meta.data_hash == tasks.load(csv, splits=mapping).hash
    assert run.meta.task_options == {"splits": mapping}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("splits_word", "expected"),
    [
        ("official", "--splits must be given, hash or sources such as"),
        ("train=", "--splits must be given, hash or sources such as train=train,validation=dev,test=dev, got 'train='"),
        ("train=train,test.=dev", "--splits must be given, hash or sources"),
        ("train=train,train=dev", "--splits must name each split once, got 'train=train,train=dev'"),
        ("test=dev,test.m=dev", "--splits must name each split once, got 'test=dev,test.m=dev'"),
        ("train=train,test=dev", "splits must name train, validation, test, got 'train', 'test'"),
        ("train=train,validation=x,test=dev", "splits: unknown split 'x' of"),
    ],
)  # fmt: skip
def test_command_rejects_wrong_splits_in_one_line(splits_word, expected, csv, capsys):
    assert main(["train", "lora", "--task", str(csv), "--steps", "1", "--splits", splits_word]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
