"""Exporters of layers: their readers exist, and are listed with the option that writes the format."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from test_readme import generated

import lorascope as ls
from lorascope.export.exporters import layer_exporters
from lorascope.formats.readers import READERS, find_reader

__all__ = ["generated"]
FILE = Path(__file__).parent / "fixtures" / "diffusers" / "metadata.safetensors"


def test_every_layer_exporter_names_its_readers() -> None:
    find_reader({}, ())  # loads all readers
    assert set(layer_exporters()) == {"peft", "kohya", "diffusers", "mlx"}
    assert {reader for exporter in layer_exporters().values() for reader in exporter.readers} <= READERS.keys()


def test_page_of_formats_has_the_option_that_writes_each(generated: ModuleType) -> None:
    rows = [line.strip("| ").split(" | ") for line in generated.formats_page().splitlines() if line.startswith("| ")]
    written = {row[0]: row[2] for row in rows if len(row) == 3}
    for name, exporter in layer_exporters().items():
        assert {written[READERS[reader].format] for reader in exporter.readers} == {f"`--{name}`"}
    assert written["VeRA (PEFT)"] == "`--peft`, from runs"


def test_unknown_format_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^format must be one of 'peft', .*, got 'onnx'$"):
        ls.export.convert(ls.load(FILE), tmp_path / "out", "onnx")
