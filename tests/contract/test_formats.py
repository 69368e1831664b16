"""Contract of every registered reader of adapters, with one row of ``format_rows`` each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from contract.format_row import FormatRow
from contract.format_rows import ROWS
from safetensors.numpy import load_file, save

import lorascope as ls
from lorascope.cli.main import main
from lorascope.formats import READERS, find_reader
from lorascope.runs.loading import _configuration
from lorascope.updates import from_factors

EVERY = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def opened(name: str, tmp_path: Path):
    """Return the row, the loaded adapter and the expected updates."""
    row = ROWS[name]
    expected = row.write(tmp_path / "adapter", tmp_path / "base")
    base = tmp_path / "base" if (tmp_path / "base").exists() else None
    return row, ls.load(tmp_path / "adapter", base), expected


def test_every_reader_has_a_row() -> None:
    find_reader({}, ())
    # GGUF files are not safetensors; see test_gguf.py.
    assert ROWS.keys() | {"read_gguf"} == {
        name for name, each in READERS.items() if each.read.__module__.startswith("lorascope.")
    }


@EVERY
def test_updates_are_those_computed_by_hand(opened) -> None:
    row, adapter, expected = opened
    assert adapter.files.kind == row.kind
    assert tuple(adapter.updates()) == row.modules
    assert set(expected) == set(row.modules)
    for module, dense in expected.items():
        update = adapter.updates()[module]
        assert update.dense() == pytest.approx(dense, rel=1e-6, abs=1e-6 * np.abs(dense).max())
        assert update.exact == row.exact
        again = from_factors(update.to_factors(), update.scale, update.exact, update.form)
        assert (again.dense() == update.dense()).all()
        sigma = adapter.spectra[module]
        assert sigma == pytest.approx(np.linalg.svd(dense, compute_uv=False)[: len(sigma)], abs=1e-5)
    summary = adapter.summary().set_index("module")
    assert summary["update_norm"].to_dict() == pytest.approx(
        {module: np.linalg.norm(dense) for module, dense in expected.items()}, rel=1e-6
    )


@EVERY
def test_only_its_reader_matches(name: str, tmp_path: Path) -> None:
    ROWS[name].write(tmp_path / "adapter", tmp_path / "base")
    files = ls.load(tmp_path / "adapter", optional(tmp_path / "base")).files.files
    config, names = _configuration(tmp_path / "adapter", files), {key for file in files for key in file}
    assert [reader for reader, each in READERS.items() if each.matches(config, names)] == [name]


def optional(path: Path) -> Path | None:
    return path if path.exists() else None


@EVERY
def test_adapter_passes_every_door(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: tuple[FormatRow, object, object]
) -> None:
    folder, base = str(tmp_path / "adapter"), optional(tmp_path / "base")
    more = [] if base is None else ["--base", str(base)]
    assert main(["inspect", folder, *more, "--json"]) == 0
    shown = tuple(row["module"] for row in json.loads(capsys.readouterr().out)["modules"])
    assert shown == ROWS[name].modules
    code = main(["doctor", folder, *more, "--json"])
    assert code == bool(json.loads(capsys.readouterr().out)["findings"])
    assert main(["plot", "update_norm_heat", folder, *more, "-o", str(tmp_path / "heat.svg")]) == 0


def refused(folder: Path) -> str:
    """Return the line of the error for an adapter that cannot be read."""
    with pytest.raises(ValueError, match=f"^cannot read {folder / 'adapter'}") as raised:
        ls.load(folder / "adapter", optional(folder / "base"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def needed(name: str, tensors: Iterable[str]) -> list[str]:
    spare = ROWS[name].spare
    found = [key for key in tensors if not (spare and re.search(spare, key))]
    assert found
    return found


@EVERY
def test_adapter_without_one_of_its_tensors_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    ROWS[name].write(tmp_path / "adapter", tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for lacking in needed(name, tensors):
        rest = {key: tensor for key, tensor in tensors.items() if key != lacking}
        file.write_bytes(save(rest))
        module = next((each for each in ROWS[name].modules if each in lacking), "")
        if any(module in key for key in rest):
            assert module in refused(tmp_path)
        else:  # its only tensor: the module is gone
            adapter = ls.load(tmp_path / "adapter", optional(tmp_path / "base"))
            assert list(adapter.updates()) == [each for each in ROWS[name].modules if each != module]


@EVERY
def test_adapter_of_integers_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    ROWS[name].write(tmp_path / "adapter", tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in needed(name, tensors):
        file.write_bytes(save(tensors | {key: tensors[key].astype(np.int8)}))
        assert re.search(rf"{re.escape(key)} must be stored as one of [\w, ]+, got I8$", refused(tmp_path))
