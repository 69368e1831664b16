"""Hostile files: readers raise one printable line, within limits of time and memory, and stay in the folder."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import CONFIG, FORMATS, WEIGHTS, WITH_BASE, Q, command, edit_header, edit_json, outcome, read_all, sign
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from lorascope import export, plots
from lorascope.files import parquet_tables, typed_json
from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load
from lorascope.runs.run import Run
from lorascope.schema.module_roles import parse
from lorascope.schema.name_patterns import Patterns

Spoil = Callable[[Path], Any]
SHARD = "model-00001-of-00002.safetensors"
NAME = f"{hostile.PREFIX}{Q}"
DEEP = b'{"a":' * 100_000


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid folder of every format, and the base of the adapters."""
    root = tmp_path_factory.mktemp("valid")
    return {name: make(root / name) for name, make in FORMATS.items()} | {"base": hostile.pretrained(root / "base")}


@pytest.fixture
def place(templates: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a valid folder, so that a test may spoil it."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(templates[name], tmp_path / name))

    return copied


@pytest.mark.parametrize("name", FORMATS)
def test_valid_folder_of_each_format_is_read(templates: dict[str, Path], name: str) -> None:
    assert outcome(lambda: read_all(templates[name], templates["base"] if name in WITH_BASE else None)) == ""


# -- adapters ------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / CONFIG, lambda content: content | changes)


def entry(name: str = f"{NAME}.lora_A.weight", **changes: Any) -> Spoil:
    return lambda folder: edit_header(folder / WEIGHTS, lambda content: content[name].update(changes))


def stored(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(save(change(load_file(folder / WEIGHTS))))


def ones(name: str, *shape: int) -> Spoil:
    return stored(lambda tensors: tensors | {f"{NAME}.{name}": np.ones(shape, "f4")})


def renamed(old: str, new: str) -> Spoil:
    return stored(lambda tensors: {name.replace(old, new): array for name, array in tensors.items()})


def replaced(name: str, make: Callable[[Path], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def zero_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def sparse(file: Path, length: int, header: int) -> None:
    """Create a sparse file of any length that takes no disk space, with a given header length."""
    with file.open("wb") as stream:
        stream.write(header.to_bytes(8, "little") + b'{"x":')
        stream.truncate(length)


def huge_tensor(file: Path) -> None:
    """Create a sparse file with a tensor of 20 GB."""
    sides = [4, 5 * 2**28]
    raw = json.dumps({f"{NAME}.lora_A.weight": {"dtype": "F32", "shape": sides, "data_offsets": [0, 20 * 2**30]}})
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw.encode())
        stream.truncate(8 + len(raw) + 20 * 2**30)


def raw_header(content: bytes) -> Spoil:
    return lambda folder: hostile.put_header(folder / WEIGHTS, content, b"")


def index_of(name: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": name}))

    return spoil


ADAPTERS: dict[str, tuple[str, Spoil, str]] = {
    "deep config": ("lora", lambda folder: (folder / CONFIG).write_bytes(DEEP), "adapter_config.json.*nested"),
    "deep header": ("lora", raw_header(DEEP), "adapter_model.safetensors.*nested"),
    "surrogate": ("lora", lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "x": "\\ud800"}'), "surrogates"),
    **{
        f"{key} {value!r}"[:40]: ("lora", config(**{key: value}), f"adapter_config.json: .*{key}")
        for key, values in {
            "r": ("8", 8.5, True, 0, -1, None, 10**30, float("nan"), [8]),
            "lora_alpha": ("8", None, float("nan"), float("inf"), 10**400, [8]),
            "rank_pattern": (
                *([], "q", 4),
                *({"q_proj": value} for value in (None, True, 10**30, 0, [True])),
            ),
            "alpha_pattern": [{"q_proj": value} for value in (float("nan"), "8", float("-inf"), [8])],
            "target_modules": (5, [5], {"a": "b"}),
            "base_model_name_or_path": (5, ["a"]),
            "peft_type": (None, 5),
            "use_rslora": ("yes",),
        }.items()
        for value in values
    },
    "pattern of no expression": ("lora", config(rank_pattern={"q_proj(": 2}), r"rank_pattern .*'q_proj\('"),
    "flag within a pattern": ("lora", config(rank_pattern={"(?P<a>x)(?P<a>y)": 2}), "rank_pattern"),
    "pattern without an end": (
        "lora",
        lambda f: (renamed("q_proj", "a" * 90)(f), config(rank_pattern={"(a|a)*[bx]": 2})(f)),
        "rank_pattern.*too long",
    ),
    "pattern of any size": ("lora", config(rank_pattern={"((a{9}){9}){9}": 2}), "rank_pattern"),
    "offsets of text": ("lora", entry(data_offsets=["0", "8"]), "lora_A.weight.*data_offsets"),
    "offsets of floats": ("lora", entry(data_offsets=[0.0, 40.0]), "data_offsets"),
    "three offsets": ("lora", entry(data_offsets=[0, 40, 80]), "data_offsets"),
    "offset of a bool": ("lora", entry(data_offsets=[False, 40]), "data_offsets"),
    "negative offset": ("lora", entry(data_offsets=[-40, 0]), "data_offsets"),
    "huge offset": ("lora", entry(data_offsets=[2**70, 2**70 + 40]), "data_offsets"),
    "offsets backwards": ("lora", entry(data_offsets=[40, 0]), "data_offsets"),
    "overlap": ("lora", entry(f"{NAME}.lora_B.weight", data_offsets=[0, 48]), "overlap"),
    "shape of text": ("lora", entry(shape="2, 5"), "shape"),
    "nested shape": ("lora", entry(shape=[[2, 5]]), "shape"),
    "negative shape": ("lora", entry(shape=[-2, -5]), "shape"),
    "shape that overflows": ("lora", entry(shape=[2**62, 2**62], dtype="F32"), "shape"),
    "empty shape that overflows": ("lora", entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "shape"),
    "shape of any length": ("lora", entry(shape=[1] * 100_000), "shape"),
    "dtype of a number": ("lora", entry(dtype=32), "dtype"),
    "entry of null": ("lora", raw_header(b'{"a": null}'), "entry for a"),
    "scalar factor": ("lora", ones("lora_A.weight"), "lora_A.*shape"),
    "empty factor": ("lora", ones("lora_A.weight", 0, 5), "one rank, got 0"),
    "long name": ("lora", renamed("q_proj", "q." * 2000), "characters, got 4[0-9]{3}"),
    "header of 100 MB": ("lora", replaced(WEIGHTS, lambda f: sparse(f, 2**28, 10**8)), "got 100000000"),
    "sparse header of 20 GB": ("lora", replaced(WEIGHTS, lambda f: sparse(f, 20 * 2**30, 20 * 2**30 - 8)), "bytes"),
    "sparse tensor of 20 GB": ("lora", replaced(WEIGHTS, huge_tensor), "lora_A.weight.*values"),
    "sparse config of 20 GB": ("lora", replaced(CONFIG, lambda f: sparse(f, 20 * 2**30, 0)), "got 21474836480"),
    "pipe for weights": ("lora", replaced(WEIGHTS, os.mkfifo), "not a regular file"),
    "pipe for the config": ("lora", replaced(CONFIG, os.mkfifo), "not a regular file"),
    "device for weights": ("lora", replaced(WEIGHTS, zero_device), "not a regular file"),
    "device for the config": ("lora", replaced(CONFIG, zero_device), "not a regular file"),
    "folder for weights": ("lora", replaced(WEIGHTS, Path.mkdir), "not a regular file"),
    **{
        f"index {name!r}": ("lora", index_of(name), "index.json")
        for name in (
            {"a": "../elsewhere.safetensors"},
            {"a": "/dev/zero"},
            {"a": "below/x.safetensors"},
            {"a": "..\\elsewhere.safetensors"},
            {"a": "C:x.safetensors"},
            {"a": ""},
            {"a": 5},
            {"a": None},
            ["a"],
            "a",
        )
    },
    "control character": ("lora", renamed("lora_A.weight", "lora_\x1b[2J\n\u202ex"), r"lora_\\x1b"),
    "short magnitude": ("dora", ones("lora_magnitude_vector", 5), "magnitude_vector.* 6 values"),
    "diagonal of another rank": ("adalora", ones("lora_E", 3, 1), "lora_E"),
    "mask of numbers": ("adalora", config(rank_pattern={f"{Q}.lora_E": [1, 0, 1]}), "rank_pattern"),
    "number for a mask": ("adalora", config(rank_pattern={f"{Q}.lora_E": 8}), "rank_pattern"),
    "mask of text": ("adalora", config(rank_pattern={f"{Q}.lora_E": ["x"]}), "rank_pattern"),
    "init_r 0": ("adalora", config(init_r=0), "init_r"),
    **{
        f"fourier {key} {value!r}"[:40]: ("fourier", config(**{key: value}), key)
        for key, values in {
            "n_frequency": ("4", 10.5, None, -1, 10**30),
            "scaling": ("4", None, float("nan")),
            "random_loc_seed": ("7", None, 0.5),
            "n_frequency_pattern": ({"v_proj": "3"}, {"(": 3}, []),
        }.items()
        for value in values
    },
    "more coefficients than stored": ("fourier", config(n_frequency=10**12), "1000000000000 coefficients"),
    "more coefficients than places": (
        "fourier",
        lambda f: (config(n_frequency=31)(f), ones("fourierft_spectrum", 31)(f)),
        "<= 6 x 5 coefficients .*, got 31",
    ),
    "huge number of a head": ("hydra", renamed("lora_B2.", "lora_B99999999999."), "no lora_B2"),
    "number of a head without end": ("hydra", renamed("lora_B2.", f"lora_B{'9' * 500}."), "no lora_B2"),
    "heads of two shapes": ("hydra", ones("lora_B1.weight", 5, 2), "experts of one shape"),
    "router of another width": ("hydra", ones("lora_route.weight", 3, 4), "router as wide"),
    "no module of the heads": ("hydra", renamed(f"{NAME}.", ""), "must include lora_A and lora_B"),
    "loralib r of text": ("loralib", config(r="2"), r"\.r"),
    "loralib r 0": ("loralib", config(r=0), r"\.r"),
    "no output enabled": ("loralib", config(enable_lora=[False] * 3), "0 outputs"),
    "outputs without end": ("loralib", config(enable_lora=[True] + [False] * 10**5), "enable_lora"),
    "numbers for outputs": ("loralib", config(enable_lora=[1, 0]), "enable_lora"),
    "one value for all outputs": ("loralib", config(enable_lora=True), "enable_lora"),
    "bare rank 0": (
        "bare",
        lambda f: (f / WEIGHTS).write_bytes(save({f"{Q}.lora_A": np.ones((0, 5)), f"{Q}.lora_B": np.ones((6, 0))})),
        "rank 0",
    ),
    "bare blocks without end": (
        "bare",
        lambda f: (f / WEIGHTS).write_bytes(save({f"{Q}.lora_A": np.ones((999, 1)), f"{Q}.lora_B": np.ones((999, 1))})),
        "64 outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "match"), ADAPTERS.values(), ids=ADAPTERS)
def test_hostile_adapter_raises_one_line(
    place: Callable[[str], Path], templates: dict[str, Path], name: str, spoil: Spoil, match: str
) -> None:
    folder = place(name)
    spoil(folder)
    # The type checker of the tests maps a tensor, of 20 GB in one case.
    space = 22.0 if spoil is ADAPTERS["sparse tensor of 20 GB"][1] else 0.7
    told = outcome(lambda: load(folder, templates["base"] if name == "fourier" else None), gigabytes=space)
    assert re.search(match, told), told


def test_hostile_adapters_are_expected_to_raise() -> None:
    assert all(match for _, _, match in ADAPTERS.values())


def test_unknown_user_in_the_name_of_the_base_does_not_matter_if_the_base_is_given(
    place: Callable[[str], Path], templates: dict[str, Path]
) -> None:
    folder = place("fourier")
    config(base_model_name_or_path="~nobody/x")(folder)
    assert outcome(lambda: load(folder, templates["base"])) == ""


def test_layer_index_above_the_limit_is_ignored(place: Callable[[str], Path]) -> None:
    assert [parse(f"model.layers.{n}.q_proj").layer for n in (0, 9999, 10_000, 10**30)] == [0, 9999, None, None]
    folder = place("lora")
    renamed("layers.0.", f"layers.{'9' * 30}.")(folder)
    assert load(folder).modules["layer"].tolist() == [1, pd.NA]


def test_shard_behind_a_link_is_read(place: Callable[[str], Path], tmp_path: Path) -> None:
    """The Hugging Face cache contains links to ../../blobs."""
    folder = place("lora")
    (tmp_path / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(Path("../blobs") / name)
    assert outcome(lambda: read_all(folder)) == ""


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: edit_json(f / "model.safetensors.index.json", lambda c: {"weight_map": [1]}), "index.json"),
        (lambda f: edit_header(f / SHARD, lambda c: c[f"{Q}.weight"].update(shape=[30])), "got (30,)"),
        (lambda f: edit_header(f / SHARD, lambda c: c.update(x=1)), "entry for x"),
    ],
)  # fmt: skip
def test_hostile_base_raises_one_line(place: Callable[[str], Path], spoil: Spoil, match: str) -> None:
    base = place("base")
    spoil(base)
    told = outcome(lambda: read_all(place("lora"), base))
    assert match in told
    assert told


def test_base_with_many_names_is_searched_without_a_pass_through_them(tmp_path: Path) -> None:
    """A pass through all names for each module would take 16 times as many calls for four times as many names."""

    def calls(count: int) -> int:
        header = {f"m.h.{n}.q.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}
        folder = tmp_path / str(count)
        folder.mkdir()
        hostile.put_header(folder / "model.safetensors", header, b"")
        base, events = PretrainedWeights(folder), Counter()
        sys.setprofile(lambda frame, event, given: events.update([event]))
        try:
            found = [(base.has_weight(f"h.{n}.q"), base.has_weight(f"x.{n}.k")) for n in range(count)]
        finally:
            sys.setprofile(None)
        assert found == [(True, False)] * count
        return events["call"] + events["c_call"]

    assert calls(800) < 6 * calls(200)


def test_pattern_matches_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.schema.name_patterns.MAX_MATCHES", 10)
    patterns = Patterns([f"q{n}" for n in range(4)], "rank_pattern")
    assert [patterns.first("h.q3"), patterns.first("h.q2")] == ["q3", "q2"]
    with pytest.raises(ValueError, match=r"rank_pattern.*too long"):
        patterns.first("h.q3")


# -- runs ----------------------------------------------------------------------------------------------------------


def run_json(**changes: Any) -> Spoil:
    return lambda run: edit_json(run / "run.json", lambda content: content | changes)


def without(key: str) -> Spoil:
    return lambda run: edit_json(run / "run.json", lambda content: {k: v for k, v in content.items() if k != key})


def about(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(run: Path) -> None:
        for file in run.glob("snapshots/*"):
            content, data = hostile.header(file)
            told = json.loads(content["__metadata__"]["about"])
            content["__metadata__"]["about"] = json.dumps(change(told) or told)
            hostile.put_header(file, content, data)
        sign(run)

    return spoil


def table(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Spoil:
    def spoil(run: Path) -> None:
        file = run / "records.parquet"
        buffer = io.BytesIO()
        change(pd.read_parquet(file)).to_parquet(buffer, index=False)
        file.write_bytes(buffer.getvalue())
        sign(run)

    return spoil


def repeated(run: Path) -> None:
    """Write one text of a megabyte in each of 10,000 rows, stored once."""
    rows = pa.table(pd.read_parquet(run / "records.parquet").iloc[:1]).to_pydict()
    columns = {name: pa.array(values * 10_000) for name, values in rows.items()}
    columns["module"] = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), ["x" * 2**20])
    pq.write_table(pa.table(columns), run / "records.parquet")
    sign(run)


RUNS: dict[str, tuple[Spoil, str]] = {
    "deep": (lambda run: (run / "run.json").write_bytes(DEEP), "run.json.*nested"),
    **{
        f"{key} {value!r}"[:40]: (run_json(**{key: value}), f"run.json: .*{key}")
        for key, values in {
            "label": (["a"], None),
            "id": (5, None),
            "status": ("lost", None, 5),
            "model": (None, 5),
            "modules": (None, {}, [5], [{"module": "a"}], [hostile.MODULE | {"module": "a", "layer": 10**6}]),
            "checksums": ([], None, {"records.parquet": 5}),
            "states": ([], {"last": None}, {"last": {"step": None, "ranks": {}}}, {"last": {"step": 1, "ranks": []}}),
            "settings": (None, {}, {"steps": "9", "batch_size": 4}),
            "quantities": ({"x": {"label": 5}}, {"x": {"label": "y", "pool": "none"}}, []),
            "seed": ("0", 0.5),
            "recipe": ([], {}),
            "parameters": ({}, {"trained": None}),
            "labels": ("ab", [1]),
        }.items()
        for value in values
    },
    **{f"no {key}": (without(key), f"run.json: .*{key}") for key in ("modules", "checksums", "states", "parameters")},
    "half a test": (run_json(test={"metric": 1.0}), "run.json: .*test"),
    **{
        f"parent {name!r}": (run_json(parents=[name]), "run.json: a parent")
        for name in ("/etc", "../../x", "x", "..", "../", "../.", "../..", "../a/../../b", "..\\x", "../a\\b")
    },
    "pipe for run.json": (replaced("run.json", os.mkfifo), "not a regular file"),
    "pipe for the table": (replaced("records.parquet", os.mkfifo), "not a regular file"),
    "pipe for a snapshot": (replaced("snapshots/step-000009.safetensors", os.mkfifo), "not a regular file"),
    "no table": (lambda run: ((run / "records.parquet").write_bytes(b"PAR1" * 9), sign(run)), "records.parquet"),
    "cut table": (
        lambda run: ((f := run / "records.parquet").write_bytes(f.read_bytes()[:-9]), sign(run)),
        "records.parquet",
    ),
    "text without end": (repeated, "bytes of text"),
    "lists in a table": (table(lambda t: t.assign(value=[[1]] * len(t))), "'value' must not be nested"),
    "no step column": (table(lambda t: t.drop(columns="step")), "columns step"),
    "steps of text": (table(lambda t: t.assign(step="x")), "step must .*got"),
    "negative steps": (table(lambda t: t.assign(step=-1)), "step must be >= 0"),
    "layers of any size": (table(lambda t: t.assign(layer=10**6)), "layer: Int16"),
    "text values": (table(lambda t: t.assign(value="1.5")), "value must .*got"),
    "numbers for modules": (table(lambda t: t.assign(module=range(len(t)))), "column module must"),
    "no quantity": (table(lambda t: t.assign(quantity=None)), "column quantity must"),
    "another role": (table(lambda t: t.assign(role="\x1b[2J")), "column role must"),
    "rows of another run": (table(lambda t: t.assign(run="x")), "rows must belong to run"),
    "factor that is not there": (about(lambda a: a["factors"].update({"h.0.q": ["A", "B", "C"]})), "h.0.q has no C"),
    "factors of no form": (about(lambda a: a["factors"].update({"h.0.q": ["A"]})), "must form an update"),
    "factors of an unknown form": (
        about(lambda a: a.setdefault("forms", {}).update({"h.0.q": "x"})),
        "must form .* of form 'x'",
    ),
    "residual factors without their start": (
        about(lambda a: a.setdefault("forms", {}).update({"h.0.q": "residual"})),
        "must form .* of form 'residual'",
    ),
    "scale of text": (about(lambda a: a["scales"].update({"h.0.q": "2"})), "scales"),
    "scale of nothing": (about(lambda a: a["scales"].update({"x": 2.0})), "scales"),
    "about of a list": (about(lambda a: [1]), "array"),
    "deep about": (
        lambda run: [
            hostile.edit_header(file, lambda c: c.update(__metadata__={"about": "[" * 10_000}))
            for file in run.glob("snapshots/*")
        ]
        + [sign(run)],
        "nested",
    ),
    "axes of another array": (about(lambda a: a["axes"]["h.2.q/seen"].update(axes=["head"])), "axes of"),
    "labels of another length": (about(lambda a: a["axes"]["h.2.q/seen"]["labels"].update(head=["one"])), "axes of"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), RUNS.values(), ids=RUNS)
def test_hostile_run_raises_one_line(place: Callable[[str], Path], spoil: Spoil, match: str) -> None:
    run = place("run")
    spoil(run)
    told = outcome(lambda: read_all(run), gigabytes=1.0)
    assert re.search(match, told), told
    assert told


def test_snapshot_with_an_invalid_name_is_ignored(place: Callable[[str], Path]) -> None:
    run = place("run")
    (run / "snapshots/step-x.safetensors").write_bytes(b"")
    assert outcome(lambda: read_all(run)) == ""


def test_empty_table_has_no_rows(place: Callable[[str], Path]) -> None:
    run = place("run")
    table(lambda rows: rows.iloc[:0])(run)
    assert Run.read(run).table.empty


@pytest.mark.parametrize(
    "content",
    [{"status": "done", "phases": ["../1-search"]}, {"status": "done", "phases": ["/etc"]}, {"status": "done"}]
    + [{"status": "done", "phases": value} for value in ([], "ab", [5], None)]
    + [{"status": value, "phases": ["a"]} for value in ("lost", None, 5)]
    + [[], None],
)
def test_hostile_recipe_raises_one_line(place: Callable[[str], Path], content: Any) -> None:
    run = place("phases")
    (run / "recipe.json").write_text(json.dumps(content))
    assert "recipe.json" in outcome(lambda: load(run))


def test_parent_next_to_the_run_is_read(templates: dict[str, Path]) -> None:
    assert [parent.id for parent in load(templates["phases"]).parents] == ["a" * 12]


# -- states, images, what reproduce wrote --------------------------------------------------------------------------


def state(path: Path, tree: Any, tensors: dict[str, Any] | None = None) -> Path:
    import torch

    from lorascope.training.state import _tree_digest

    found = {name: torch.tensor(value) for name, value in (tensors or {}).items()}
    text = tree if isinstance(tree, str) else json.dumps(tree)
    path.write_bytes(save({name: t.numpy() for name, t in found.items()}, {"tree": _tree_digest(text, found) + text}))
    return path


@pytest.mark.parametrize(
    "tree",
    [
        "[" * 10_000,
        {"__tensor__": "missing", "device": "cpu"},
        {"__tensor__": ["a"], "device": "cpu"},
        {"__array__": "a", "dtype": "no"},
        {"__numpy__": {"bit_generator": "seed"}},
        {"__numpy__": 5},
        {"__items__": [[1]]},
        {"__items__": [[[], 1]]},
        {"__generator__": "a", "device": "cpu"},
        {"x": 1},
    ],
)
def test_hostile_state_raises_one_line(tmp_path: Path, tree: Any) -> None:
    from lorascope.training.state import load_tree

    file = state(tmp_path / "state.safetensors", tree, {"a": [1.0]})
    assert str(file) in outcome(lambda: load_tree(file))


def test_pipe_as_state_raises_one_line(tmp_path: Path) -> None:
    from lorascope.training.state import load_tree

    os.mkfifo(tmp_path / "state.safetensors")
    assert "not a regular file" in outcome(lambda: load_tree(tmp_path / "state.safetensors"))


def test_checkpoint_without_a_table_is_skipped(tmp_path: Path) -> None:
    from lorascope.training.checkpoints import Checkpoints

    (tmp_path / "resume").mkdir()
    state(tmp_path / "resume/step-00000001.safetensors", {"__items__": [["finished", 1]]})
    with pytest.warns(UserWarning, match="step-00000001"):
        assert Checkpoints(tmp_path).newest() is None


def test_hostile_image_raises_one_line(tmp_path: Path) -> None:
    from lorascope.inputs.images import open_image

    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png" in outcome(lambda: open_image(tmp_path / "pipe.png"))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" * 3)
    assert "cut.png" in outcome(lambda: open_image(tmp_path / "cut.png"))
    chunk = b"IHDR" + (20_000).to_bytes(4) * 2 + b"\1\0\0\0\0"
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4))
    assert "bomb.png" in outcome(lambda: open_image(tmp_path / "bomb.png"), gigabytes=0.5)


def test_parquet_of_too_many_rows_or_too_long_text_raises(templates: dict[str, Path]) -> None:
    file = templates["run"] / "records.parquet"
    rows = len(parquet_tables.read_table(file, file))
    assert f"{rows} rows" in outcome(lambda: parquet_tables.read_table(file, file, rows - 1))
    buffer = io.BytesIO()
    pd.DataFrame({"text": ["a" * 1000] * 1000}).to_parquet(buffer)
    assert "1000000" in outcome(lambda: parquet_tables.read_table(buffer, "x", 1000))


def test_parquet_of_too_many_columns_raises() -> None:
    buffer = io.BytesIO()
    pd.DataFrame({str(n): [1] for n in range(parquet_tables.MAX_COLUMNS + 1)}).to_parquet(buffer)
    assert "201 columns" in outcome(lambda: parquet_tables.read_table(buffer, "x"))


@pytest.mark.slow
def test_read_json_at_its_limit_is_bounded_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"[" + b"[]," * (typed_json.MAX_BYTES // 3 - 2) + b"1]")
    assert "object" in outcome(lambda: typed_json.read_json(file, dict), seconds=20, gigabytes=2.0)


def test_tensor_of_no_bytes_is_read(tmp_path: Path) -> None:
    hostile.put_header(tmp_path / "a", {"x": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}}, b"")
    file = TensorFile(tmp_path / "a")
    assert file["x"].shape == file.unread("x").shape == (0, 4)


# -- command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipe for weights", "deep header", "control character", "sparse tensor of 20 GB"])
def test_command_on_a_hostile_adapter_exits_2(place: Callable[[str], Path], name: str) -> None:
    folder = place("lora")
    ADAPTERS[name][1](folder)
    for word in ("inspect", "doctor"):
        code, said = command(word, str(folder))
        assert code == 2
        assert said.startswith("lorascope: ")
        assert said.count("\n") == 1


def test_command_escapes_text_of_a_valid_folder(place: Callable[[str], Path]) -> None:
    wild = "\x1b[2J\n\u202e"
    adapter, run = place("lora"), place("run")
    renamed("q_proj", "q\x1b[2J\n\u202e")(adapter)
    config(base_model_name_or_path=wild, init_lora_weights=f"pissa{wild}", target_modules=[wild], r=2)(adapter)
    run_json(label=wild, model=wild, task=wild)(run)
    for folder in (adapter, run):
        assert {command(word, str(folder))[0] for word in ("inspect", "doctor")} <= {0, 1}


# Runs each command line in a separate fork, because starting Python takes longer than the commands.
FORKING = """
import json, os, resource, signal, sys, traceback
from lorascope.runs import loading as checkpoints; from lorascope.diagnosis import doctor, inspection_screen
from lorascope.cli.main import main
codes = []
for words, errors in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)
        signal.alarm(60)
        code = 99
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
json.dump(codes, sys.stdout)
"""


@pytest.mark.slow
def test_process_on_each_hostile_folder_exits_with_one_line(templates: dict[str, Path], tmp_path: Path) -> None:
    """Every process is limited to 3 GB of address space and one minute."""
    calls = []
    for number, name in enumerate([*ADAPTERS, *RUNS]):
        kind, spoil = ("run", RUNS[name][0]) if name in RUNS else ADAPTERS[name][:2]
        folder = Path(shutil.copytree(templates[kind], tmp_path / str(number) / kind))
        spoil(folder)
        base = ["--base", str(templates["base"])] if kind == "fourier" else []
        calls += [([word, str(folder), *base], f"{folder.parent}/{word}.txt") for word in ("inspect", "doctor")]
    done = subprocess.run(
        [sys.executable, "-c", FORKING], input=json.dumps(calls), capture_output=True, text=True, check=True
    )
    codes = json.loads(done.stdout)
    assert len(codes) == len(calls)
    for (words, errors), code in zip(calls, codes, strict=True):
        said = Path(errors).read_text(encoding="utf-8")
        kind = Path(words[1]).name
        # For doctor, faults of an adapter's tensors are findings.
        allowed = {"run": (0, 1, 2)}.get(kind, (1, 2) if words[0] == "doctor" else (2,))
        assert code in allowed, (words, said)
        assert "Traceback" not in said
        assert all(line.isprintable() for line in said.splitlines()), words


# -- fuzzing -------------------------------------------------------------------------------------------------------


def fuzz(templates: dict[str, Path], root: Path, name: str, seed: int, with_base: bool, commands: bool) -> None:
    case = root / "case"
    shutil.rmtree(case, ignore_errors=True)
    base = templates["base"] if name in WITH_BASE and (name == "fourier" or with_base) else None
    hostile.spoiled(case, templates[name], base, seed)
    line = outcome(lambda: read_all(case / "folder", base and case / "base"))
    # An error about a table of a run does not always name its file.
    assert not line or name in ("run", "phases") or str(case) in line, line
    if commands:
        with hostile.limits():
            codes = [
                command(*words, str(hostile.readable(case / "folder")))[0]
                for words in (("inspect", "--all"), ("doctor",))
            ]
        assert set(codes) <= {0, 1, 2}


CASES = {"name": st.sampled_from(list(FORMATS)), "seed": st.integers(0, 2**32), "with_base": st.booleans()}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(**CASES)
def test_spoiled_folder_is_read_or_raises_one_line(
    templates: dict[str, Path], tmp_path_factory: Any, **case: Any
) -> None:
    fuzz(templates, tmp_path_factory.getbasetemp(), **case, commands=False)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(**CASES)
def test_many_spoiled_folders_are_read_or_raise_one_line(
    templates: dict[str, Path], tmp_path_factory: Any, **case: Any
) -> None:
    fuzz(templates, tmp_path_factory.getbasetemp(), **case, commands=True)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(["run", "phases", "lora", "hydra"]), seed=st.integers(0, 2**32))
def test_spoiled_folder_is_plotted_and_exported_or_raises_one_line(
    templates: dict[str, Path], tmp_path_factory: Any, name: str, seed: int
) -> None:
    case = tmp_path_factory.getbasetemp() / "case"
    shutil.rmtree(case, ignore_errors=True)
    hostile.spoiled(case, templates[name], None, seed)
    runs: list[Run] = []
    if not outcome(lambda: runs.append(load(case / "folder"))):
        draw_and_export(runs[0], case / "exported")


def draw_and_export(run: Run, out: Path) -> None:
    found: list[pd.DataFrame] = []
    if outcome(lambda: found.append(plots.available(run))):
        return
    for figure in found[0].loc[found[0]["drawable"], "figure"]:
        outcome(lambda figure=figure: draw(getattr(plots, figure), run), seconds=20)
    outcome(lambda: export.rank_pattern(run))
    outcome(lambda: export.to_peft(run, out / "peft"))
    outcome(lambda: export.to_table(run, out / "table.csv"))
    outcome(run._repr_html_)


def draw(figure: Callable[..., Any], run: Run) -> None:
    chart = figure(run)
    chart.mpl().draw_without_rendering()
    chart.plotly()
