"""Adapter folders spoiled at random, and settings of the wrong type: each is read or raises one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorascope.diagnosis.inspection import inspect
from lorascope.files.safetensors_io import TensorFile, write_tensors
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.loading import load

GIVEN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q": 2}}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = {"A": np.ones((2, 3), "f4"), "B": np.ones((3, 2), "f4")}
    write_tensors(tmp_path / WEIGHTS, {f"{PREFIX}h.0.q.lora_{name}.weight": a for name, a in factors.items()}, {})
    write_json(tmp_path / CONFIG, GIVEN)
    return tmp_path


def spoiled(data: bytes, draw: np.random.Generator) -> bytes:
    """Truncate the bytes, change one, or insert one."""
    place = int(draw.integers(len(data)))
    byte = bytes([int(draw.integers(256))])
    return [data[:place], data[:place] + byte + data[place + 1 :], data[:place] + byte + data[place:]][draw.integers(3)]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_spoiled_file_is_read_or_raises_one_line(adapter: Path, name: str) -> None:
    sound, draw = (adapter / name).read_bytes(), np.random.default_rng(0)
    messages = set()
    for _ in range(120):
        (adapter / name).write_bytes(spoiled(sound, draw))
        try:
            inspect(load(adapter))
        except (ValueError, FileNotFoundError) as error:
            messages.add(str(error))
    assert len(messages) > 3
    assert all(str(adapter) in message for message in messages)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"lora_alpha": "16"}, "$.lora_alpha"),
        ({"lora_alpha": None}, "$.lora_alpha"),
        ({"r": [8]}, "$.r"),
        ({"rank_pattern": 4}, "$.rank_pattern"),
        ({"alpha_pattern": {"q": "x"}}, "$.alpha_pattern[...]"),
        ({"alpha_pattern": {"q": [8]}}, "$.alpha_pattern[...]"),
        ({"rank_pattern": {"q": [True]}}, "$.rank_pattern[...]"),
        ({"peft_type": "ADALORA", "rank_pattern": {"h.0.q.lora_E": 8}}, "$.rank_pattern[...]"),
        ({"peft_type": "ADALORA", "rank_pattern": {"h.0.q.lora_E": ["x"]}}, "$.rank_pattern[...]"),
        ({"rank_pattern": {"(q": 2}}, "'(q'"),
        ({"enable_lora": True}, "$.enable_lora"),
    ],
)
def test_setting_of_the_wrong_type_is_named(adapter: Path, change: dict[str, Any], place: str) -> None:
    write_json(adapter / CONFIG, json.loads((adapter / CONFIG).read_text(encoding="utf-8")) | change)
    with pytest.raises(ValueError, match=re.escape(place)) as raised:
        load(adapter)
    assert str(adapter / CONFIG) in str(raised.value)


def with_metadata(adapter: Path, words: Any) -> None:
    """Replace the metadata in the header of the weight file."""
    data = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": words}).encode()
    (adapter / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize("words", [None, {"about": "a fine adapter"}, {"about": "[1]"}, {"format": "pt"}])
def test_foreign_metadata_in_a_header_is_ignored(adapter: Path, words: Any) -> None:
    expected = load(adapter).summary()
    with_metadata(adapter, words)
    assert load(adapter).summary().equals(expected)


def test_invalid_metadata_in_a_header_raises(adapter: Path) -> None:
    with_metadata(adapter, ["about"])
    with pytest.raises(ValueError, match="__metadata__") as raised:
        load(adapter)
    assert str(adapter / WEIGHTS) in str(raised.value)
    for words in ({"about": "a fine adapter"}, {"about": 7}):
        with_metadata(adapter, words)
        with pytest.raises(ValueError, match="about") as raised:
            _ = TensorFile(adapter / WEIGHTS).about
        assert str(adapter / WEIGHTS) in str(raised.value)
