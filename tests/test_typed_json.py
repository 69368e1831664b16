"""Typed reading of untrusted JSON: limits, and one-line errors for wrong content."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import pytest

from lorascope.files import typed_json
from lorascope.files.typed_json import read_json


@dataclass
class Config:
    r: int = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: str | list[str] | None = None


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.json"


def test_read_json_keeps_types_and_ignores_unknown_fields(file):
    file.write_text(json.dumps({"r": 2, "lora_alpha": 4, "rank_pattern": {"ü": 3}, "more": [1]}), encoding="utf-8")
    assert read_json(file, Config) == Config(2, 4.0, {"ü": 3})


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"r": "8"}, r"\$\.r`: '8'$"),
        ({"r": 8.5}, r"\$\.r`: 8\.5$"),
        ({"r": True}, r"\$\.r`: True$"),
        ({"r": "8" * 500}, r"\$\.r`: '8{59}$"),
        ({"rank_pattern": {"q": None}}, r"\$\.rank_pattern\[\.\.\.\]`$"),
        ({"target_modules": [1]}, r"\$\.target_modules\[0\]`: 1$"),
        ({"target_modules": [["q"]]}, r"\$\.target_modules\[0\]`$"),
        ([], "array"),
        (None, "null"),
    ],
)
def test_read_json_of_the_wrong_type_names_the_path(file, content, place):
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=place) as caught:
        read_json(file, Config)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"r": ' * 100_000, b"\xff\xfe{", b"", b"{", b"1" * 5000])
def test_read_json_of_broken_text_raises_one_line(file, text):
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_json(file, Config)
    assert str(caught.value).isprintable()


def test_read_json_of_a_pipe_folder_or_huge_file_raises(file, monkeypatch):
    os.mkfifo(file)
    with pytest.raises(ValueError, match="regular file"):
        read_json(file, Config)
    with pytest.raises(ValueError, match="regular file"):
        read_json(file.parent, Config)
    file.unlink()
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(typed_json, "MAX_BYTES", 1)
    with pytest.raises(ValueError, match=r"got 2$"):
        read_json(file, Config)


def test_read_json_error_has_no_control_characters(file):
    file.write_text(json.dumps({"rank_pattern": {"\x1b[2J": []}}), encoding="utf-8")
    named = file.rename(file.with_name("\x1b]0;\u202e.json"))
    with pytest.raises(ValueError, match="rank_pattern") as caught:
        read_json(named, Config)
    assert str(caught.value).isprintable()
