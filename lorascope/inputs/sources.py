"""Sources of task rows, each read as one table: bundled sentences, files, image folders and hub datasets."""

from __future__ import annotations

import csv
import difflib
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd
from PIL import Image

from lorascope.files.parquet_tables import require_declared_size, require_table_file
from lorascope.files.printable import first_line, printable
from lorascope.files.typed_json import require_regular
from lorascope.inputs.package_assets import SENTIMENT, build_once, cache, fetch
from lorascope.inputs.splits import split_of_word
from lorascope.schema.suggestions import unknown_name

DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}
MIXTURE = "sentiment/mixture"
BUNDLED = ("sentiment", *(f"sentiment/{domain}" for domain in DOMAINS), "sentiment/domains", MIXTURE)
_SENTENCES = "sentences.parquet"
# Maximum bytes of a file name on common file systems.
_LONGEST = 255
HIDDEN_LABEL = "(hidden)"
"""Label of rows of a dataset whose class number is -1, or of a split whose numbers all are."""
HIDDEN_ANSWER = -1
"""Number of the right choice of such rows."""
_INPUTS = ("text", "pair", "label", "image", "prompt", "response", "choices", "answer")
_SPANS = ("question", "context", "answers", "answer_start")
_COLUMNS = (*_INPUTS, *_SPANS, "group", "domain", "cluster", "split")
# With a configuration after the colon.
_HUB_PARTS = 2
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# A folder that has it, and files of other splits, is read line by line.
_TRAIN_LINES = "train.txt"
_SEPARATOR = "||"
_FILES = {".csv": "CSV", ".jsonl": "JSONL", ".parquet": "Parquet"}


def read(
    name: str, columns: Mapping[str, str] | None = None, revision: str | None = None, *, with_splits: bool = False
) -> pd.DataFrame:
    """Return the rows of a task's source by name, except of ``MIXTURE``; see ``tasks.load`` for names and errors.

    ``with_splits`` adds the splits of a dataset as column split, and keeps rows with ``HIDDEN_LABEL``.
    """
    if name in BUNDLED:
        rows = sentiment()
        rows = rows.assign(cluster=clusters(rows))
        domain = name.partition("/")[2]
        if domain == "domains":
            return rows.assign(label=rows["group"]).drop(columns="group")
        if domain:
            rows = rows[rows["group"] == domain].drop(columns="group")
        return rows if columns is None else rename_columns(rows, columns, name)
    path = Path(name).expanduser()
    if (size := len(os.fsencode(path.name))) > _LONGEST:
        raise ValueError(f"task must be a name of at most {_LONGEST} bytes, got {size}")
    if path.suffix in _FILES:
        rows = _read_rows_file(path)
        if columns is not None:
            rows = rename_columns(rows, columns, name)
        if "image" in rows:
            # Paths are relative to the folder of the file that lists them.
            images = rows["image"].to_list()
            for number, image in enumerate(images):
                if isinstance(image, str):
                    images[number] = str(path.parent / image)
            rows = rows.assign(image=pd.Series(images, rows.index, dtype=object))
        return rows
    if path.is_dir():
        if _is_dataset(path):
            return _read_dataset(name, columns, revision, with_splits)
        if (path / _TRAIN_LINES).is_file():
            rows = _read_lines_folder(path)
            return rows if columns is None else rename_columns(rows, columns, name)
        return _read_folder(path)
    if not path.exists() and len(path.parts) > _HUB_PARTS:
        raise FileNotFoundError(f"cannot read {printable(path)}: no such file or folder")
    if path.exists():
        require_regular(path)
        raise ValueError(f"cannot read {printable(path)}: its suffix must be one of {', '.join(_FILES)}")
    near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.88)
    if near:
        raise ValueError(f"unknown task {name!r}; did you mean {near[0]!r}?")
    if name.startswith("sentiment/"):
        raise ValueError(_unknown_task(name))
    return _read_dataset(name, columns, revision, with_splits)


def is_source(name: str) -> bool:
    """Return whether a task may be loaded by a name: bundled sentences, an existing path, or the form of a hub id."""
    return name in BUNDLED or Path(name).expanduser().exists() or _HUB_ID.fullmatch(name) is not None


def rename_columns(rows: pd.DataFrame, columns: Mapping[str, str], name: str) -> pd.DataFrame:
    """Return the columns of a table that a mapping of our names to its names selects, and those that have our names.

    Raises
    ------
    ValueError
        One of our names, or a column of the table, does not exist.
    """
    for column, source in columns.items():
        if column not in _COLUMNS:
            raise ValueError(f"columns must map {', '.join(_COLUMNS)}, got {column!r}")
        if source not in rows:
            raise ValueError(f"cannot read {name}: {unknown_name('column', source, rows.columns)}")
    renamed = rows[list(columns.values())].set_axis(list(columns), axis=1)
    used = {*columns, *columns.values()}
    return renamed.join(rows[[column for column in _COLUMNS if column in rows and column not in used]])


def sentiment() -> pd.DataFrame:
    """Return the source "sentiment": sentences of four domains, labeled by the sign of their mean human rating.

    The table is cached on the first call.

    Returns
    -------
    DataFrame
        Columns text, label ("negative", "positive"), id (within the domain), rating (the mean, in [-4, 4]) and group
        (the domain): 19,136 rows whose mean rating is below -0.5 or above 0.5. Source: Hutto & Gilbert, ICWSM 2014.
    """
    folder = build_once(cache() / f"sentiment-rated-{SENTIMENT.sha256[:16]}", _write_sentences)
    return pd.read_parquet(folder / _SENTENCES)


def clusters(rows: pd.DataFrame) -> list[str]:
    """Return the cluster of each row of the source ``sentiment``, such as "news/12": one article or review.

    The id of such a sentence is the number of the article, ``_`` and the number of the sentence. Every tweet and every
    movie snippet is a separate cluster.
    """
    return (rows["group"] + "/" + rows["id"].str.partition("_")[0]).to_list()


def _write_sentences(folder: Path) -> None:
    with tarfile.open(fetch(SENTIMENT)) as archive:
        domains = [_read_ratings(archive, file).assign(group=domain) for domain, file in DOMAINS.items()]
    pd.concat(domains, ignore_index=True).to_parquet(folder / _SENTENCES, index=False)


def _read_ratings(archive: tarfile.TarFile, file: str) -> pd.DataFrame:
    """Read the rows of one domain from tab-separated ids, mean ratings in [-4, 4] and sentences."""
    stream = cast(IO[bytes], archive.extractfile(f"hutto_ICWSM_2014/{file}"))
    columns: dict[Any, Any] = {"id": str, "rating": float, "text": str}
    # Quotation marks are part of the sentences.
    options: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "keep_default_na": False, "encoding": "utf-8"}
    lines = pd.read_csv(stream, sep="\t", names=list(columns), dtype=columns, **options)
    clear = lines[lines["rating"].abs() > 0.5]
    label = clear["rating"].gt(0).map({True: "positive", False: "negative"})
    return pd.DataFrame(
        {"text": clear["text"].str.strip(), "label": label, "id": clear["id"], "rating": clear["rating"]}
    )


def _read_rows_file(path: Path) -> pd.DataFrame:
    """Return the rows of a CSV, JSONL or Parquet file, unchanged."""
    if not path.exists():
        raise FileNotFoundError(f"cannot read {printable(path)}: no such file")
    require_table_file(path)
    try:
        if path.suffix == ".csv":
            # Labels such as 007 and NA are names, not numbers or missing values.
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True, dtype=False)
        with path.open("rb") as file:  # pyarrow cannot open all file names
            require_declared_size(file)
            return pd.read_parquet(file)
    except ImportError:
        raise
    except Exception as error:  # broken files raise KeyError and others
        complaint = printable(first_line(error))
        raise ValueError(f"cannot read {printable(path)} as {_FILES[path.suffix]}: {complaint}") from None


def _read_folder(path: Path) -> pd.DataFrame:
    """Return the images of a folder in the columns image (path) and label (name of the subfolder)."""
    rows = [(str(file), file.parent.name) for file in _images_by_label(path)]
    if not rows:
        raise ValueError(f"cannot read images from {path}: it must have one subfolder of images per label")
    return pd.DataFrame(rows, columns=["image", "label"])


def _read_lines_folder(path: Path) -> pd.DataFrame:
    """Return the lines of train.txt, valid.txt and test.txt as columns prompt, response and split.

    ``||`` is between the prompt and the response of a line, as in the E2E files of microsoft/LoRA.
    """
    rows: list[tuple[str, str, str]] = []
    for file in sorted(path.glob("*.txt")):
        split = split_of_word(file.stem)
        # A folder of data often has a readme.txt.
        if split is None:
            continue
        require_table_file(file)
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"cannot read {printable(file)} as UTF-8: {first_line(error)}") from None
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line:
                continue
            prompt, separator, response = line.partition(_SEPARATOR)
            if not separator or _SEPARATOR in response:
                raise ValueError(f"line {number} of {printable(file)} must have {_SEPARATOR} once, got {line[:80]!r}")
            # A response follows a space, so that its first word has the token that it has within a text.
            rows.append((prompt, f" {response.strip()}", split))
    return pd.DataFrame(rows, columns=["prompt", "response", "split"])


def _images_by_label(path: Path) -> list[Path]:
    """Return the images in the subfolders of a folder."""
    extensions = Image.registered_extensions()
    return [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in extensions]


def _is_dataset(path: Path) -> bool:
    """Return whether a folder has files that ``datasets`` reads: what it saved, or tables without images by label."""
    if (path / "dataset_dict.json").exists():
        return True
    # A folder of images by label may also have tables about them.
    if _images_by_label(path):
        return False
    return any(file.suffix in (*_FILES, ".json") for folder in (path, path / "data") for file in folder.glob("*.*"))


def _read_dataset(
    name: str, columns: Mapping[str, str] | None, revision: str | None, with_splits: bool
) -> pd.DataFrame:
    """Return the rows of all splits of a dataset, of a folder or of the Hugging Face Hub.

    The name is a folder, ``"owner/name"``, ``"owner/name:configuration"``, or a GLUE task such as
    ``"glue/sst2"``.
    """
    try:
        import datasets
    except ImportError:
        hint = "to load datasets, pip install lorascope[hub]"
        raise ValueError(f"{_unknown_task(name)}; {hint}") from None
    source = name
    if name.startswith("glue/"):
        source = f"nyu-mll/glue:{name.removeprefix('glue/')}"
    path, _, configuration = source.partition(":")
    options = {} if revision is None else {"revision": revision}
    try:
        if (Path(name) / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(path, configuration or None, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"not available on the Hugging Face Hub ({first_line(error)})"
        if Path(name).is_dir():
            raise ValueError(f"cannot read {name} as a dataset: {first_line(error)}") from None
        raise FileNotFoundError(f"{_unknown_task(name)}; {reason}") from None
    tables = []
    for split, dataset_split in dataset.items():
        rows = _canonical(dataset_split, columns, name)
        if with_splits:
            rows = rows.assign(split=split)
        else:
            for column in {"label", "answer"} & set(rows):
                rows = rows[rows[column] != HIDDEN_LABEL]
        tables.append(rows)
    return pd.concat(tables, ignore_index=True)


def _canonical(split: Any, columns: Mapping[str, str] | None, name: str) -> pd.DataFrame:
    """Return one split under lorascope's column names, with class names instead of class numbers.

    A split with prompt and response, choices or spans is returned unchanged. Otherwise the columns are image or text,
    and label and group if they exist. Without a column of that name, the first two columns of texts become text and
    pair.
    """
    rows = split.to_pandas()
    source_of = {"choices": "choices", "answer": "answer", **(columns or {})}
    has_choices = source_of["choices"] in rows
    for column, kind in split.features.items():
        if has_choices and column == source_of["answer"]:
            # The number of a choice, even if it has a letter as its name.
            rows[column] = rows[column].astype(object).where(rows[column] != HIDDEN_ANSWER, HIDDEN_LABEL)
        elif hasattr(kind, "names"):
            # Hidden test labels are stored as -1.
            names = [kind.names[number] if number >= 0 else HIDDEN_LABEL for number in rows[column]]
            rows[column] = pd.Series(names, rows.index, dtype=object)
        elif column == "label" and getattr(kind, "dtype", "").startswith("float") and (rows[column] == -1).all():
            rows[column] = HIDDEN_LABEL
    if columns is not None:
        return rename_columns(rows, columns, name)
    kinds = split.features
    unchanged = ({"prompt", "response"}, {"prompt", "choices", "answer"}, {"question", "context", "answers"})
    if any(names <= kinds.keys() for names in unchanged):
        return rows.drop(columns="split", errors="ignore")  # of another meaning than that of a file's column
    images = [column for column, kind in kinds.items() if type(kind).__name__ == "Image"][:1]
    strings = [column for column, kind in kinds.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    texts = [column for column in strings if column not in ("label", "group", "domain")][:2]
    if "text" in strings:
        texts = ["text"]
    new_names = {images[0]: "image"} if images else dict(zip(texts, ("text", "pair"), strict=False))
    classes = [column for column, kind in kinds.items() if column == "label" or hasattr(kind, "names")][:1]
    groups = [column for column in ("group", "domain") if column in rows]
    return rows[[*new_names, *classes, *groups]].rename(columns=new_names | dict.fromkeys(classes, "label"))


def _unknown_task(name: str) -> str:
    return f"unknown task {name!r}; expected {', '.join(BUNDLED)}, a .csv, .jsonl or .parquet file, or a folder"
