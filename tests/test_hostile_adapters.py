"""Spoiled adapters of every format: each is read with everything that is skipped listed, or raises one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.format_rows import ROWS
from hostile import command, edit_header, gguf_lora, limits
from safetensors.numpy import load_file, save
from spoiling import CHANGES, CONFIG, HOSTILE, WEIGHTS, GgufTarget, Spoil, Target, gguf_spoils, spoils
from test_gguf import pair
from test_gguf import write as write_gguf

import lorascope as ls
from lorascope.cli.main import main
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.peft_merge import MERGED
from lorascope.formats.stored_update import StoredTensor

FAST = {"read_adapter": 12, "read_loha": 40, "read_kohya": 12}
"""Readers that the ordinary suite spoils, and how many ways it skips after each."""
STEP = int(os.environ.get("LORASCOPE_SPOIL_STEP", "6"))
"""Of the ways to spoil an adapter, the slow suite tries one in six: others for each reader, all with a step of 1."""
Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture
def sound(name: str, tmp_path: Path) -> tuple[Target, Path | None]:
    """A sound adapter of a format, and its base if it needs one."""
    row, base = ROWS[name], tmp_path / "base"
    row.write(tmp_path / "adapter", base)
    module = row.modules[0].rpartition(".0.")[0] if name == "read_experts" else row.modules[0]
    return Target(tmp_path / "adapter", module), base if base.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_spoiled_adapter_is_read_and_listed_or_raises_one_line(name: str, sound, tmp_path: Path) -> None:
    first = list(ROWS).index(name) % STEP
    assert faults(*sound, list(spoils(sound[0]))[first::STEP], tmp_path / "case") == []


@pytest.mark.parametrize("name", FAST)
def test_adapter_spoiled_in_some_ways_is_read_and_listed_or_raises_one_line(name: str, sound, tmp_path: Path) -> None:
    assert faults(*sound, list(spoils(sound[0]))[:: FAST[name]], tmp_path / "case") == []


def test_spoiled_gguf_file_is_read_and_listed_or_raises_one_line(tmp_path: Path) -> None:
    target = GgufTarget(gguf_lora(tmp_path), "blk.0.attn_q")
    assert faults(target, None, list(gguf_spoils(target)), tmp_path / "case") == []


def faults(target: Target, base: Path | None, ways: Sequence[tuple[str, Spoil]], case: Path) -> list[str]:
    """Return what is wrong with the output of ``inspect`` and ``doctor`` for each way to spoil an adapter."""
    shared = unlisted(target.path, base)
    found = []
    for what, spoil in ways:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(target.folder, case)
        copy = replace(target, folder=case)
        spoil(copy)
        found += [f"{what}: {fault}" for fault in _faults(copy.path, base, shared)]
    return found


def _faults(path: Path, base: Path | None, shared: set[str]) -> Iterator[str]:
    more = [] if base is None else ["--base", str(base)]
    for verb in ("inspect", "doctor"):
        out, err = io.StringIO(), io.StringIO()
        try:
            with limits(10.0), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([verb, str(path), *more])
        except BaseException as error:
            yield f"{verb} raises {error!r}"
            continue
        lines = (out.getvalue() + err.getvalue()).split("\n")
        if not all(map(str.isprintable, lines)):
            yield f"{verb} prints control characters"
        if code not in (0, 1) and (out.getvalue() or err.getvalue().count("\n") != 1):
            yield f"{verb} fails with more than one line: {err.getvalue()}"
        if code in (0, 1) and err.getvalue():
            yield f"{verb} prints {err.getvalue()}"
        if verb == "inspect" and code == 0 and "per weight" not in out.getvalue():
            forgotten = {name for name in unlisted(path, base) - shared if name.rpartition(".")[2] not in _of(shared)}
            yield from (f"{name!r} is neither used nor listed" for name in forgotten)


def _of(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names} - {"weight"}


def unlisted(path: Path, base: Path | None) -> set[str]:
    """Return the stored tensors that are neither those of a module nor listed, such as those of all modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        files = ls.load(path, base).files
    listed = {*files.others, *(PREFIX + name for name in files.others)}
    used = {tensor.name for part in files.parts.values() for tensor in _tensors(vars(part))}
    stored = {name for file in files.files for name in file} - used - listed
    # The scales of image adapters contain the alphas, and PEFT also merges weights that are stored as integers.
    return {
        name
        for name in stored
        if not (name.endswith(".alpha") and "spelling" in files.config)
        and not (files.kind in MERGED and PREFIX in name)
    }


def _tensors(value: Any) -> Iterator[StoredTensor]:
    """Yield the tensors in a value, such as the factors of one module."""
    if isinstance(value, StoredTensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


# -- single faults -------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path) -> Target:
    ROWS["read_adapter"].write(tmp_path / "adapter", tmp_path / "base")
    return Target(tmp_path / "adapter", Q)


def raised(folder: Path) -> str:
    """Return the single line that both commands print about a folder that they cannot read."""
    lines = set()
    for verb in ("inspect", "doctor"):
        code, errors = command(verb, str(folder))
        assert (code, errors.count("\n")) == (2, 1)
        lines.add(errors)
    (line,) = lines
    return line


def test_data_that_belongs_to_no_tensor_raises(lora: Target) -> None:
    """A header that is shorter by a space shifts all values by a byte."""
    edit_header(lora.weights, lambda content: content | {"__metadata__": {"format": "pt"}})
    whole = lora.weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    whole = (size + 1).to_bytes(8, "little") + whole[8 : 8 + size] + b" " + whole[8 + size :]
    size += 1
    lora.weights.write_bytes((size - 1).to_bytes(8, "little") + whole[8:])
    assert "1 of 177 bytes of data belong to no tensor" in raised(lora.folder)
    lora.weights.write_bytes(whole + b"more")
    assert "4 of 180 bytes of data belong to no tensor" in raised(lora.folder)


@pytest.mark.parametrize("metadata", [None, {"about": "a fine adapter"}, {"about": "[1]"}, {"format": "pt"}])
def test_foreign_metadata_in_a_header_is_ignored(lora: Target, metadata: Any) -> None:
    expected = ls.load(lora.folder).summary()
    edit_header(lora.weights, lambda content: content | {"__metadata__": metadata})
    assert ls.load(lora.folder).summary().equals(expected)


def test_invalid_metadata_in_a_header_raises(lora: Target) -> None:
    edit_header(lora.weights, lambda content: content | {"__metadata__": ["about"]})
    assert f"__metadata__ of {lora.weights}" in raised(lora.folder)
    for metadata in ({"about": "a fine adapter"}, {"about": 7}):
        edit_header(lora.weights, lambda content, metadata=metadata: content | {"__metadata__": metadata})
        with pytest.raises(ValueError, match="about") as caught:
            _ = TensorFile(lora.weights).about
        assert str(lora.weights) in str(caught.value)


def test_key_that_occurs_twice_raises(lora: Target) -> None:
    text = lora.config.read_text()
    lora.config.write_text(f'{text[:-1]}, "lora_alpha": 30}}')
    assert "adapter_config.json as JSON: lora_alpha occurs twice" in raised(lora.folder)
    lora.config.write_text(text)
    whole = lora.weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].rstrip()
    name = f"{PREFIX}{Q}.lora_A.weight"
    twice = header[:-1] + b"," + json.dumps({name: json.loads(header)[name]}).encode()[1:]
    lora.weights.write_bytes(len(twice).to_bytes(8, "little") + twice + whole[8 + size :])
    assert f"{name} occurs twice" in raised(lora.folder)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("read_adapter", f"{PREFIX}{Q}.lora_A.weight", f"{Q}.lora_A.weight"),
        ("read_adapter", f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_A.default.weight"),
        ("read_loha", f"{PREFIX}{Q}.hada_w1_a", f"{PREFIX}{Q}.hada_w1_a.default"),
        ("read_mlx", f"{Q}.lora_a", f"{PREFIX}{Q}.lora_a"),
    ],
)
def test_factor_in_two_spellings_raises(name: str, first: str, second: str, sound) -> None:
    target, _ = sound
    target.edit(lambda tensors: tensors | {second: 2 * tensors[first]})
    assert "two tensors are the same factor" in raised(target.folder)


def test_other_weight_files_of_a_folder_are_listed(lora: Target) -> None:
    for name in ("other\x1b.safetensors", "pytorch_model.bin", "x.gguf"):
        (lora.folder / name).write_bytes(b"not opened")
    for name in ("training_args.bin", "optimizer.pt", "README.md"):
        (lora.folder / name).write_bytes(b"of a trainer")
    assert ls.load(lora.folder).files.notes == (
        r"other weight files in the folder are not read: other\x1b.safetensors and 2 more",
    )


def test_two_adapters_with_the_same_names_raise(lora: Target) -> None:
    for number in range(2):
        shutil.copy(lora.weights, lora.folder / f"step-{number}.safetensors")
    lora.weights.unlink()
    line = "it has 2 adapters, pass the path of one: step-0.safetensors, step-1.safetensors"
    assert line in raised(lora.folder)


@pytest.mark.parametrize("setting", ["rank_pattern", "target_modules", "modules_to_save", "layers_to_transform"])
@pytest.mark.parametrize("name", ["read_mlx", "read_adapter"])
def test_setting_of_the_wrong_type_raises_for_any_format(setting: str, name: str, sound) -> None:
    target, _ = sound
    target.configure(**{setting: 0.5})
    assert f"$.{setting}`: 0.5" in raised(target.folder)


@pytest.mark.parametrize("what", ["with infinity", "of huge numbers", "with NaN"])
@pytest.mark.parametrize("name", ["read_vera", "read_dora", "read_fourier"])
def test_values_without_a_norm_are_reported_without_warnings(what: str, name: str, sound) -> None:
    target, base = sound
    first = sorted(load_file(target.weights))[0]
    target.edit(lambda tensors: tensors | {first: CHANGES[what](tensors[first])})
    assert command("inspect", str(target.folder), "--base", str(base)) == (0, "")


def test_hostile_names_of_prompts_and_biases_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "PROMPT_TUNING": {"prompt_embeddings": np.ones((3, 4), "f4")},
        "BEFT": {f"{PREFIX}{Q}.beft_bias": np.ones(4, "f4")},
    }
    for kind, tensors in cases.items():
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind}))
        for name in HOSTILE:
            (tmp_path / WEIGHTS).write_bytes(save(tensors | {name: np.ones(1, "f4"), "~": np.ones(1, "f4")}))
            assert main(["inspect", str(tmp_path)]) == 0
            shown = capsys.readouterr().out
            assert f"tensors that are not read: {printable(min(name, '~'))} and 1 more" in shown
            assert all(map(str.isprintable, shown.split("\n")))


ALPHAS = (float("nan"), float("inf"), -1.0, 0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_of_gguf_is_read_or_raises_one_line(alpha: float, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", pair("blk.0.attn_q"), alpha)
    if np.isfinite(alpha):
        assert command("inspect", str(file)) == (0, "")
    else:
        assert "adapter.lora.alpha" in raised(file)
