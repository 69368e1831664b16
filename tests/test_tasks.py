"""Tests of tasks: sources, splits, validation, and the form for a model."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import limits
from PIL import Image
from tiny import tiny

from lorascope.files.whole_files import file_hash
from lorascope.inputs import sources, tasks
from lorascope.inputs.package_assets import Asset, cache

LABELS = ("negative", "positive")


def table(rows: int = 300) -> pd.DataFrame:
    """Return distinct texts with two labels in three groups."""
    numbers = range(rows)
    return pd.DataFrame(
        {
            "text": [f"text number {number}" for number in numbers],
            "label": [LABELS[number % 2] for number in numbers],
            "group": [f"group {number % 3}" for number in numbers],
        }
    )


# -- splits ---------------------------------------------------------------------------------------------------------


def test_splits_are_a_partition_of_the_documented_sizes():
    task = tasks.from_frame(table(4000))
    parts = {name: set(rows["text"]) for name, rows in task.splits.items()}
    assert set.union(*parts.values()) == set(table(4000)["text"])
    assert sum(map(len, parts.values())) == 4000
    shares = {name: len(part) / 4000 for name, part in parts.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.025)


def test_another_table_has_another_hash_and_the_same_content_the_same():
    task = tasks.from_frame(table(60))
    flipped = task.table.assign(label=task.table["label"].map({LABELS[0]: LABELS[1], LABELS[1]: LABELS[0]}))
    moved = task.table.assign(split="train")
    others = [replace(task, table=other) for other in (flipped, moved, task.table.iloc[:30])]
    assert len({task.hash, *(other.hash for other in others)}) == 4
    assert replace(replace(task, table=flipped), name="other").hash == others[0].hash
    for same in (task.table.copy(), task.table.assign(cluster="article 1")):
        assert replace(task, table=same).hash == task.hash
    assert replace(task, table=flipped, hash="a" * 64).hash == "a" * 64  # a caller that computes its own


def test_pixels_are_part_of_the_hash_of_another_table():
    black, white = (Image.new("RGB", (4, 4), color) for color in ("black", "white"))
    task = tasks.Task(
        "images", "image", pd.DataFrame({"image": [black], "label": ["a"], "split": "train"}), ("a",), "h"
    )
    assert replace(task, table=task.table.assign(image=[black.copy()])).hash == "h"
    assert replace(task, table=task.table.assign(image=[white])).hash != "h"


def test_splits_equal_those_of_the_first_release():
    # Computed independently: the first 16 hexadecimal digits of sha256("film 14") are 0.75 of 2**64, and so on.
    task = tasks.from_frame(pd.DataFrame({"text": [f"Film  {n}" for n in range(16)], "label": list("ab") * 8}))
    assert set(task.split("validation")["text"]) == {"Film  14"}
    assert set(task.split("test")["text"]) == {"Film  1", "Film  11"}


WORDS = {"train": ["train", "TRAIN"], "validation": ["dev", "Validation "], "test": ["test", "Test"]}


def with_splits(names: list[str], rows: int = 300) -> pd.DataFrame:
    """Return rows with the words of these splits in turn."""
    words = [word for name in names for word in WORDS[name]]
    return table(rows).assign(split=[words[number % len(words)] for number in range(rows)])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_column_split_of_a_file_is_used(kind, tmp_path):
    rows = with_splits(["train", "validation", "test"])
    path = tmp_path / f"rows.{kind}"
    write = {
        "csv": lambda: rows.to_csv(path, index=False),
        "jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        "parquet": lambda: rows.to_parquet(path),
    }
    write[kind]()
    task = tasks.load(str(path))
    for name, words in WORDS.items():
        assert set(task.split(name)["text"]) == set(rows["text"][rows["split"].isin(words)])
    assert task.hash == tasks.from_frame(rows.sample(frac=1, random_state=0)).hash
    swapped = rows["split"].replace({"dev": "test", "test": "dev"})
    assert len({task.hash, tasks.from_frame(rows.assign(split=swapped)).hash, tasks.from_frame(table()).hash}) == 3


@pytest.mark.parametrize("names", [["train"], ["train", "test"], ["train", "validation"]])
def test_split_without_rows_gets_rows_of_train(names):
    rows = with_splits(names)
    task, by_hash = tasks.from_frame(rows), tasks.from_frame(table())
    in_train = set(rows["text"][rows["split"].isin(WORDS["train"])])
    for name in ("validation", "test"):
        given = set(rows["text"][rows["split"].isin(WORDS[name])])
        assert set(task.split(name)["text"]) == (given or in_train & set(by_hash.split(name)["text"]))
    assert sum(map(len, task.splits.values())) == len(rows)


def test_column_split_of_plain_text_is_used():
    rows = with_splits(["train", "validation", "test"])[["text", "split"]]
    task = tasks.from_frame(rows)
    assert task.kind == "lm"
    assert set(task.split("test")["text"]) == set(rows["text"][rows["split"].isin(WORDS["test"])])


def test_unknown_word_in_column_split_raises():
    rows = with_splits(["train", "test"]).assign(split=["train", "training", "holdout"] * 100)
    expected = (
        "split of my.csv must be train, validation (or dev) or test, got 'training' in 100 rows, 'holdout' in 100 rows"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        tasks.from_frame(rows, "my.csv")
    with pytest.raises(ValueError, match=r"got 'nan' in 1 row$"):
        tasks.from_frame(rows.assign(split=["train"] * 299 + [None]))
    with pytest.raises(ValueError, match="train split has none of the 300 rows"):
        tasks.from_frame(rows.assign(split=["dev", "test"] * 150))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_search_split_takes_rows_only_from_train(share):
    task = tasks.from_frame(table(4000))
    whole, search, train = task.split("train"), task.split("search", share), task.split("train", share)
    assert set(search["text"]) | set(train["text"]) == set(whole["text"])
    assert not set(search["text"]) & set(train["text"])
    assert len(search) / len(whole) == pytest.approx(share, abs=0.03)
    assert task.split("test", share).equals(task.split("test"))


def test_larger_search_split_contains_the_smaller():
    task = tasks.from_frame(table(1000))
    assert set(task.split("search", 0.1)["text"]) < set(task.split("search", 0.5)["text"])


def test_texts_that_differ_in_case_or_white_space_are_in_the_same_split():
    rows = table(200)
    copies = rows.assign(text=rows["text"].str.upper() + " \n", label=[*rows["label"][1:], "negative"])
    task = tasks.from_frame(pd.concat([rows, copies]))
    for name, share in (("train", 0.5), ("search", 0.5), ("validation", 0), ("test", 0)):
        texts = task.split(name, share)["text"]
        assert texts.str.strip().str.lower().value_counts().eq(2).all()


def test_order_and_index_of_the_rows_do_not_matter():
    rows = table()
    rows.loc[5, "text"] = rows.loc[4, "text"]
    task, other = tasks.from_frame(rows), tasks.from_frame(rows.sample(frac=1, random_state=0))
    assert task.table.equals(other.table)
    assert task.hash == other.hash


@pytest.mark.parametrize("column", ["text", "label", "group"])
def test_hash_depends_on_every_column(column):
    rows = table()
    changed = rows.copy()
    changed.loc[7, column] = {"text": "another text", "label": "negative", "group": "group 2"}[column]
    assert tasks.from_frame(changed).hash != tasks.from_frame(rows).hash
    assert tasks.from_frame(rows, "another name").hash == tasks.from_frame(rows).hash


def test_groups_are_read_from_group_or_domain():
    task = tasks.from_frame(table().rename(columns={"group": "domain"}))
    assert task.groups == ("group 0", "group 1", "group 2")
    assert list(task.split("test")) == ["text", "label", "group"]
    assert tasks.from_frame(table().drop(columns="group")).groups == ()


def test_unknown_or_empty_split_raises():
    task = tasks.from_frame(table(40))
    with pytest.raises(ValueError, match="'dev'; expected one of train, validation, test, search"):
        task.split("dev")
    with pytest.raises(ValueError, match=r"search_share .*got 1"):
        task.split("search", 1)
    with pytest.raises(ValueError, match=r"search split of table with search_share=0\.0: .*40 rows"):
        task.split("search")
    with pytest.raises(ValueError, match=r"table: .*3 rows"):
        tasks.from_frame(table(3))


# -- columns and labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text", "label", "other"], "classification"),
        (["text", "pair", "label"], "classification"),
        (["prompt", "response", "text"], "prompt"),
        (["text"], "lm"),
        (["text", "domain"], "lm"),
    ],
)
def test_kind_follows_from_the_columns(columns, kind):
    rows = pd.DataFrame(
        {column: [f"{column} {n % 2 if column == 'label' else n}" for n in range(60)] for column in columns}
    )
    assert tasks.from_frame(rows).kind == kind


@pytest.mark.parametrize("columns", [["text", "sentiment"], ["prompt"], ["prompt", "label"], ["label"]])
def test_error_for_unsupported_columns_names_them(columns):
    rows = pd.DataFrame({column: ["x"] * 60 for column in columns})
    with pytest.raises(ValueError, match=f"columns of table .*got {', '.join(columns)}$"):
        tasks.from_frame(rows)


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["b", "a"], ("a", "b")),
        ([10, 9], ("9", "10")),
        (["10", "9"], ("9", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("False", "True")),
        ([" x", "y"], ("x", "y")),
        (["entailment", "7"], ("entailment", "7")),
        (["nan", "infinite"], None),
        ([0.5, "a"], None),
        (["0.5", "b"], None),
        ([None, "a"], None),
        ([float("nan"), 1.0], None),
        ([["a"], ["b"]], None),
        (["", "a"], None),
        (["a", "a"], None),
    ],
)
def test_labels_are_names_or_whole_numbers(given, labels):
    rows = pd.DataFrame({"text": [f"text {n}" for n in range(60)], "label": pd.Series(given * 30, dtype=object)})
    if labels is None:
        with pytest.raises(ValueError, match=r"label in row \d+ of table .*got|at least 2 classes, got") as caught:
            tasks.from_frame(rows)
        assert "\n" not in str(caught.value)
    else:
        assert tasks.from_frame(rows).labels == labels


@pytest.mark.parametrize("text", ["", "  ", None, 12])
def test_error_for_a_row_without_a_text_names_it(text):
    rows = table(60).astype({"text": object})
    rows.loc[6, "text"] = text
    with pytest.raises(ValueError, match=rf"text in row 7 of table .*got {text!r}$"):
        tasks.from_frame(rows)


def test_blank_lines_of_plain_text_are_dropped():
    rows = pd.DataFrame({"text": [f"line {n}" if n % 2 else "" for n in range(120)]})
    assert len(tasks.from_frame(rows).table) == 60


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_file_formats_give_the_same_task(tmp_path, suffix):
    rows = table()
    rows.loc[3, "text"] = 'a "quoted", text\nof two lines, naïve'
    rows.loc[4, "text"] = "NA"
    path = tmp_path / f"rows.{suffix}"
    write = {"csv": rows.to_csv, "parquet": rows.to_parquet}
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows.to_dict("records")))
    else:
        write[suffix](path, index=False)
    task = tasks.load(path)
    assert task.hash == tasks.from_frame(rows).hash
    assert task.name == str(path)


def test_whole_numbers_as_labels_are_the_same_in_every_format(tmp_path):
    rows = table().assign(label=[number % 2 for number in range(300)])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(rows.to_json(orient="records", lines=True))
    assert len({tasks.load(tmp_path / f"rows.{suffix}").hash for suffix in ("csv", "parquet", "jsonl")}) == 1


@pytest.mark.parametrize(
    ("file", "content", "error", "expected"),
    [
        ("none.csv", None, FileNotFoundError, "no such file"),
        ("empty.csv", b"", ValueError, "as CSV"),
        ("ragged.csv", b"text,label\na,b\na,b,c\n", ValueError, "as CSV"),
        ("latin.csv", "text,label\nnaïve,b\n".encode("latin-1"), ValueError, "as CSV"),
        ("broken.jsonl", b'{"text": "a", ', ValueError, "as JSONL"),
        ("empty.jsonl", b"", ValueError, "no rows"),
        ("broken.parquet", b"PAR1", ValueError, "as Parquet"),
        ("header.csv", b"text,label\n", ValueError, "no rows"),
        ("rows.txt", b"a text\n", ValueError, ".csv, .jsonl, .parquet"),
    ],
)
def test_bad_file_raises_one_line(tmp_path, file, content, error, expected):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        tasks.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def rows_of(label: bytes) -> bytes:
    return b"".join(b'{"text": "line %d", "label": %s}\n' % (n, label) for n in range(60))


HOSTILE = {
    "pipe.csv": os.mkfifo,
    "pipe.jsonl": os.mkfifo,
    "pipe.parquet": os.mkfifo,
    "pipe": os.mkfifo,
    "folder.csv": Path.mkdir,
    "nul.csv": lambda path: path.write_bytes(b"\0" * 100),
    "latin.csv": lambda path: path.write_bytes("text,label\nGröße,a\n".encode("latin-1")),
    "utf16.csv": lambda path: path.write_bytes("text,label\nx,a\n".encode("utf-16")),
    "quote.csv": lambda path: path.write_bytes(b'text,label\n"never closed,a\n' * 3),
    "deep.jsonl": lambda path: path.write_bytes(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b', "label": "a"}'),
    "deep-label.jsonl": lambda path: path.write_bytes(rows_of(b"[" * 900 + b"]" * 900)),
    "long-label.jsonl": lambda path: path.write_bytes(rows_of(b"[" + b"1," * 100_000 + b"1]")),
    "number.jsonl": lambda path: path.write_bytes(rows_of(b"9" * 400)),
    "dates.parquet": lambda path: pd.DataFrame({"text": pd.date_range("2020", "2021", 60)}).to_parquet(path),
    "twice.parquet": lambda path: pd.DataFrame({"text": ["a"], "group": ["b"], "domain": ["c"]}).to_parquet(path),
    **{f"sparse.{suffix}": lambda path: sparse(path) for suffix in ("csv", "jsonl", "parquet")},
    "rows.parquet": lambda path: many_nulls(path),
    "columns.parquet": lambda path: pd.DataFrame({str(n): ["a"] for n in range(201)}).to_parquet(path),
    "pandas.parquet": lambda path: pq.write_table(
        pa.table({"text": ["a"]}).replace_schema_metadata({"pandas": '{"columns": [{}], "index_columns": []}'}), path
    ),
    "loop": lambda path: (path.mkdir(), (path / "again").symlink_to(path)),
    "images": lambda path: ((path / "left").mkdir(parents=True), os.mkfifo(path / "left/x.png")),
    "images.csv": lambda path: (
        os.mkfifo(path.with_name("pipe.png")),
        path.write_bytes(b"image,label\n" + b"pipe.png,a\n" * 60),
    ),
    "broken.parquet": lambda path: pd.DataFrame({"image": [broken_png()] * 60, "label": ["a"] * 60}).to_parquet(path),
}


def sparse(path: Path) -> None:
    """Create a file of 20 GB that takes no disk space."""
    with path.open("wb") as stream:
        stream.truncate(20 * 2**30)


def many_nulls(path: Path) -> None:
    """Write 50 million rows of the same short text in a few kilobytes."""
    rows = pa.DictionaryArray.from_arrays(np.zeros(10**6, np.int8), ["a"])
    with pq.ParquetWriter(path, pa.schema({"text": rows.type, "label": rows.type})) as writer:
        for _ in range(50):
            writer.write_table(pa.table({"text": rows, "label": rows}))


def broken_png() -> bytes:
    """Return a PNG file with an invalid chunk type instead of IDAT."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    return buffer.getvalue().replace(b"IDAT", b"\1\2\3\4")


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_table_raises_one_short_line_within_limits(name, tmp_path):
    path = tmp_path / name
    HOSTILE[name](path)
    with limits(gigabytes=1.5), pytest.raises(ValueError, match=re.escape(name)) as caught:
        tasks.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".csv", "no\nfile\x1b[31m.csv", "no\0file.jsonl"])
def test_hostile_name_raises_one_short_line(name):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        tasks.load(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# -- lines with a prompt and a response ------------------------------------------------------------------------------

LINES = {
    "train": "name : Zizzi | area : city||It is in the city . \nname : Zizzi | area : city||In the city is Zizzi .\n\n",
    "valid": "name : Aromi||It is £5\r\n",
    "test": " name : Aromi | rating : 5 out of 5||Aromi : 5 out of 5",
}


def write_lines(folder, lines):
    for split, text in lines.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return folder


def test_lines_of_a_folder_are_prompts_with_responses_in_their_splits(tmp_path):
    folder = write_lines(tmp_path, LINES | {"readme": "nothing"})
    for splits in (None, "given"):
        task = tasks.load(folder, splits=splits)
        assert task.kind == "prompt"
        assert {name: len(rows) for name, rows in task.splits.items()} == {"train": 2, "validation": 1, "test": 1}
    # As format_converting_e2e.py and gpt2_encode.py of microsoft/LoRA read them.
    expected = []
    for text in LINES.values():
        for line in filter(str.strip, text.splitlines()):
            context, completion = line.strip().split("||")
            expected.append((context, " " + completion))
    assert sorted(task.table[["prompt", "response"]].itertuples(index=False, name=None)) == sorted(expected)


def test_prompt_end_is_appended_to_each_prompt_and_is_of_the_task(tmp_path):
    folder = write_lines(tmp_path, LINES)
    task, plain = tasks.load(folder, prompt_end="<|endoftext|>"), tasks.load(folder)
    assert (task.split("test")["prompt"] == plain.split("test")["prompt"] + "<|endoftext|>").all()
    assert task.options == {"prompt_end": "<|endoftext|>"}
    assert task.hash != plain.hash
    assert tasks.load(folder, **task.options).hash == task.hash
    reviews = tmp_path / "x.csv"
    reviews.write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match=r"^prompt_end must be None for .*x\.csv, which has no column prompt"):
        tasks.load(reviews, prompt_end="!")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"train": "a||b\nc\n"}, r"^line 2 of .*train\.txt must have \|\| once, got 'c'$"),
        ({"train": "a||b||c"}, r"^line 1 of .*train\.txt must have \|\| once, got 'a\|\|b\|\|c'$"),
        ({"train": "||b"}, r"^prompt in row 1 of .* must be a non-empty string, got ''$"),
    ],
)
def test_a_line_without_a_prompt_or_response_is_named(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tasks.load(write_lines(tmp_path, lines))


def test_lines_that_are_not_utf8_and_a_folder_that_does_not_exist_raise_one_line(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"a||\xff")
    with pytest.raises(ValueError, match=r"^cannot read .*train\.txt as UTF-8: "):
        tasks.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^cannot read LoRA/examples/NLG/data: no such file or folder$"):
        tasks.load("LoRA/examples/NLG/data")


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sentimnt", "did you mean 'sentiment'?"),
        ("sentiment/tweet", "did you mean 'sentiment/tweets'?"),
        ("sentiment/poems", "sentiment/tweets, sentiment/movies, sentiment/products, sentiment/news"),
    ],
)
def test_unknown_name_raises_with_the_nearest_or_all_names(name, expected):
    with pytest.raises(ValueError, match="unknown task") as caught:
        tasks.load(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_name_without_datasets_raises_with_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"unknown task 'imdb'.* pip install lorascope\[hub\]"):
        tasks.load("imdb")


def test_hub_name_without_network_raises_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(path, configuration):
        raise ConnectionError("Couldn't reach the hub\nfor many reasons")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match=r"unknown task 'imdb'.*Couldn't reach the hub") as caught:
        tasks.load("imdb")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """Let ``datasets.load_dataset`` return data from memory; return the package, the data and the calls."""
    datasets = pytest.importorskip("datasets")
    store, calls = {}, []

    def answer(path, configuration):
        calls.append((path, configuration))
        return datasets.DatasetDict({name: datasets.Dataset.from_dict(*part) for name, part in store.items()})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return datasets, store, calls


def test_glue_task_has_pairs_and_no_hidden_labels(hub):
    datasets, store, calls = hub
    text, number = datasets.Value("string"), datasets.Value("int32")
    classes = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": classes, "idx": number})
    for part, hidden in (("train", False), ("test", True)):
        column = [f"{part} {n}" for n in range(60)]
        labels = [-1] * 60 if hidden else [0, 1] * 30
        store[part] = (
            {"sentence1": column, "sentence2": [f"other {x}" for x in column], "label": labels, "idx": list(range(60))},
            features,
        )
    task = tasks.load("glue/mrpc")
    assert calls == [("nyu-mll/glue", "mrpc")]
    assert (task.kind, task.labels, len(task.table)) == ("classification", ("equivalent", "not_equivalent"), 60)
    row = task.split("train").iloc[0]
    assert row["pair"] == f"other {row['text']}"
    assert row["label"] == ("equivalent" if int(row["text"].split()[1]) % 2 else "not_equivalent")


def test_hub_datasets_of_texts_prompts_and_classes_are_recognized(hub):
    _, store, calls = hub
    store["train"] = ({"text": [f"line {n}" for n in range(60)], "url": ["x"] * 60},)
    assert tasks.load("someone/lines:small").kind == "lm"
    assert calls == [("someone/lines", "small")]
    store["train"] = ({"prompt": [f"line {n}" for n in range(60)], "response": ["x"] * 60, "id": list(range(60))},)
    assert tasks.load("someone/prompts").kind == "prompt"
    store["train"] = ({"content": [f"line {n}" for n in range(60)], "label": ["a", "b"] * 30},)
    assert tasks.load("someone/contents").labels == ("a", "b")


# -- the bundled sentences ------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """Replace the published archive by a small one of the same form, and return its path."""
    path = tmp_path / "texts.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for domain, file in sources.DOMAINS.items():
            lines = [f'{n}\t{(-1) ** n * (n % 4)}.5\t"{n}" {domain} cliché ' for n in range(200)]
            data = "\r\n".join([*lines, "200\t0.5\tdull", "201\t-0.5\tdull"]).encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{file}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SENTIMENT", Asset("texts", "1", path.name, "", "", file_hash(path)))
    monkeypatch.setattr(sources, "fetch", lambda asset: path)
    return path


def test_ratings_become_labels_without_those_near_zero(archive):
    task = tasks.load("sentiment")
    # Ratings of exactly 0.5 and -0.5 are dropped: rows 0, 4, 8 ... have a rating of 0.5.
    assert len(task.table) == 4 * 150
    assert (task.labels, task.groups) == (LABELS, ("movies", "news", "products", "tweets"))
    for text, label in zip(task.table["text"], task.table["label"], strict=True):
        number = int(text.split('"')[1])
        assert label == ("negative" if number % 2 else "positive")
        assert "cliché" in text
        assert text == text.strip()


def test_ids_and_ratings_are_kept(archive):
    rows = sources.sentiment()
    assert list(rows) == ["text", "label", "id", "rating", "group"]
    for text, name, rating in zip(rows["text"], rows["id"], rows["rating"], strict=True):
        number = int(name)
        assert text.startswith(f'"{number}" ')
        assert rating == (-1) ** number * (number % 4 + 0.5)


def test_cluster_is_the_domain_with_the_number_of_the_article():
    rows = pd.DataFrame({"group": ["news", "news", "products", "tweets"], "id": ["12_1", "12_40", "12_1", "12"]})
    assert sources.clusters(rows) == ["news/12", "news/12", "products/12", "tweets/12"]


def test_clusters_change_neither_the_hash_nor_the_rows():
    plain, rows = tasks.from_frame(table()), table()
    task = tasks.from_frame(rows.assign(cluster=rows["text"].str[-1]))
    assert task.hash == plain.hash
    assert (task.table["cluster"] == task.table["text"].str[-1]).all()
    pd.testing.assert_frame_equal(task.table.drop(columns="cluster"), plain.table)
    assert tasks.from_frame(rows[["text"]].assign(cluster="a")).kind == "lm"


def test_task_of_one_domain_has_the_splits_of_the_full_task(archive):
    whole, news = tasks.load("sentiment"), tasks.load("sentiment/news")
    assert news.groups == ()
    assert news.hash != whole.hash
    for name, rows in whole.splits.items():
        assert set(news.split(name)["text"]) == set(rows.loc[rows["group"] == "news", "text"])


def test_table_is_built_only_once(archive, monkeypatch):
    first = tasks.load("sentiment")
    monkeypatch.setattr(sources, "fetch", lambda asset: pytest.fail("fetched again"))
    assert tasks.load("sentiment").hash == first.hash


def test_changed_table_is_rebuilt_with_a_warning_line(archive, capsys):
    first = tasks.load("sentiment")
    (table,) = cache().glob("sentiment-*/*.parquet")
    rows = pd.read_parquet(table)
    rows.assign(label=rows["label"].map({"positive": "negative", "negative": "positive"})).to_parquet(
        table, index=False
    )
    capsys.readouterr()
    assert tasks.load("sentiment").hash == first.hash
    assert capsys.readouterr().err.count("\n") == 1
    pd.testing.assert_frame_equal(pd.read_parquet(table), rows)


@pytest.mark.real
def test_published_sentences_match_the_data_card():
    card = Path(__file__).parents[1] / "data"
    task = tasks.load("sentiment")
    assert len(task.table) == 19_136
    assert task.hash in (card / "README.md").read_text(encoding="utf-8")
    counts = pd.read_csv(card / "sentiment_counts.csv").set_index(["domain", "label"])
    for name, rows in task.splits.items():
        assert rows.groupby(["group", "label"]).size().to_list() == counts[name].to_list()
    assert task.table["text"].str.contains("cliché").any()


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "expected"),
    {
        # Computed before ids and ratings were kept.
        "sentiment": "ccf8595bb22b05e3f859d855f9a8b1d39089935f6a5b7fa72839f7970bdb6ea0",
        "sentiment/tweets": "a8bf1c4752f598c1b243766aed9b0bbf6100bb61844a680244b7fd27268cf13c",
        "sentiment/movies": "25f0c15a712a4e424c5966575259166c1d844591b945c65e8d52a3cc898d193e",
        "sentiment/products": "2ef102bf965d72852d3da25687c7b6a567f50f145eaa4ac1cdfe0eea9a2eef9e",
        "sentiment/news": "b39439f4b1430d30e33e3d04b22b3e541891d2b8d74dd979a6492670d4a47637",
        "sentiment/domains": "635a91a8bfeceda80a2e64d9407f986bac119b9ba39af4629f6f936c0458796e",
        "sentiment/mixture": "0b922ec2905e2b86c30b922a3e0c329be78e2ec0ae1155ec5210436c18a3ad4a",
    }.items(),
)
def test_hashes_of_published_tasks_never_change(name, expected):
    assert tasks.load(name).hash == expected


# -- the form for a model -------------------------------------------------------------------------------------------


def test_classification_becomes_prompts_for_language_models():
    task = tasks.from_frame(table())
    assert task.fit(tiny("bert")).kind == "classification"
    for family, kind in (("llama", "prompt"), ("gpt2", "prompt"), ("t5", "seq2seq"), ("bart", "seq2seq")):
        fitted = task.fit(tiny(family))
        assert (fitted.kind, fitted.labels, fitted.hash) == (kind, task.labels, task.hash)
        row = fitted.split("test").iloc[0]
        assert row["prompt"].startswith("Is this text negative or positive?\n")
        assert row["text"] in row["prompt"]
        assert row["response"] == f" {row['label']}"


def test_classifier_with_the_same_labels_keeps_their_order():
    task = tasks.from_frame(table())
    model = tiny("bert", id2label={0: "positive", 1: "negative"})
    assert task.fit(model).labels == ("positive", "negative")
    assert task.fit(tiny("bert")).labels == ("negative", "positive")


def test_prompts_and_text_fit_language_models():
    prompts = tasks.from_frame(pd.DataFrame({"prompt": [f"p {n}" for n in range(60)], "response": ["r"] * 60}))
    assert prompts.fit(tiny("llama")).kind == "prompt"
    assert prompts.fit(tiny("t5")).kind == "seq2seq"
    text = tasks.from_frame(pd.DataFrame({"text": [f"line {n}" for n in range(60)]}))
    assert text.fit(tiny("llama")).kind == "lm"


@pytest.mark.parametrize(
    ("family", "head", "columns", "expected"),
    [
        ("bert", None, ["text"], "table with BertForSequenceClassification.* label"),
        ("bert", None, ["prompt", "response"], "table with BertForSequenceClassification.* label"),
        ("t5", None, ["text"], "table with T5ForConditionalGeneration.* prompt and response"),
        ("bert", "base", ["text"], "BertModel.* AutoModelForSequenceClassification"),
        ("bert", "masked", ["text"], "BertForMaskedLM.* no head"),
    ],
)
def test_task_that_does_not_fit_the_model_raises_one_line(family, head, columns, expected):
    task = tasks.from_frame(pd.DataFrame({column: [f"{column} {n}" for n in range(60)] for column in columns}))
    with pytest.raises(ValueError, match=expected) as caught:
        task.fit(tiny(family, head))
    assert "\n" not in str(caught.value)


def test_task_is_frozen():
    task = tasks.from_frame(table())
    with pytest.raises(AttributeError):
        task.kind = "lm"
    assert replace(task, name="other").hash == task.hash


@pytest.mark.parametrize("column", ["group", "domain", "cluster"])
def test_missing_group_or_cluster_is_named(column):
    rows = pd.DataFrame({"text": ["good", "bad", "fine"], "label": ["a", "b", "a"], column: ["x", None, "y"]})
    name = "cluster" if column == "cluster" else "group"
    with pytest.raises(ValueError, match=f"^{name} in row 2 of reviews must be a name, got a missing value$"):
        tasks.from_frame(rows, "reviews")
