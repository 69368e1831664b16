"""Models whose configuration names code to run: Python files of their folder, and hub kernels."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_tokenizer
from hostile import outcome
from test_models import spoil_config
from tiny import tiny

from lorascope.inputs import models

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({!r}).touch()
class Own(PreTrainedTokenizerFast): pass
"""
AUTO_MAP = {
    "AutoConfig": "own.Own",
    "AutoModel": "own.Own",
    "AutoModelForCausalLM": "own.Own",
    "AutoModelForSequenceClassification": "own.Own",
    "AutoModelForImageClassification": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
    "AutoProcessor": "own.Own",
    "AutoImageProcessor": "own.Own",
    "AutoFeatureExtractor": "own.Own",
}
SETTINGS_FILES = {
    "config.json": {},
    "tokenizer_config.json": {"tokenizer_class": "Own"},
    "processor_config.json": {"processor_class": "Own"},
    "preprocessor_config.json": {"image_processor_type": "Own", "feature_extractor_type": "Own"},
}


@pytest.mark.parametrize("file", SETTINGS_FILES)
@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_code_of_a_folder_is_never_run(tmp_path, monkeypatch, capsys, family, file):
    tiny(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / file
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(settings | SETTINGS_FILES[file] | {"auto_map": AUTO_MAP}), encoding="utf-8")
    (tmp_path / "own.py").write_text(CODE.format(str(tmp_path / "ran")), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    message = outcome(lambda: models.processor(models.load(tmp_path)), seconds=60, gigabytes=8)
    assert not message or "auto_map" in message or "preprocessor_config.json" in message
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


KERNELS = {
    "setting": {"attn_implementation": "kernels-community/flash-attn"},
    "private setting": {"_attn_implementation": "someone/kernel@v1:forward"},
    "setting of a part": {
        "model_type": "gemma3", "attn_implementation": {"text_config": "kernels-community/flash-attn"},
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", KERNELS.values(), ids=KERNELS)
def test_attention_from_the_hub_raises_and_fetches_nothing(tmp_path, changes):
    tiny("gemma3").save_pretrained(tmp_path)
    spoil_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"attn_implementation must be one of eager, .*sdpa.*, got ") as caught:
        models.load(tmp_path)
    assert str(caught.value).isprintable()


def test_attention_that_transformers_implements_is_used(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    spoil_config(tmp_path, attn_implementation="eager")
    assert models.load(tmp_path).config._attn_implementation == "eager"
