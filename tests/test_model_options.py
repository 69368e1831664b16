"""Tests of options of models: fields of the configuration that a run replaces, stores, and loads again."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from tiny import tiny

import lorascope as ls
from lorascope.experiments.trained_model import open_trained
from lorascope.inputs import models


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a saved encoder without dropout."""
    path = tmp_path / "encoder"
    tiny("bert", vocab_size=len(tiny_tokenizer()), hidden_dropout_prob=0.0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_rows(path):
    words = ("good", "bad")
    rows = [{"text": f"{words[number % 2]} {number}", "label": words[number % 2]} for number in range(80)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_an_option_replaces_a_field_as_an_edited_configuration_does(folder):
    model = models.load(folder, options={"hidden_dropout_prob": 0.25, "layer_norm_eps": 1})
    assert {dropout.p for dropout in model.modules() if isinstance(dropout, torch.nn.Dropout)} >= {0.25}
    assert model.config.layer_norm_eps == 1
    assert models.load(folder).config.layer_norm_eps != 1


def test_the_dropout_of_debertas_classifier_is_an_option_although_its_configuration_lacks_it(tmp_path):
    tiny("deberta-v2").save_pretrained(tmp_path)
    assert "cls_dropout" not in models.load(tmp_path).config.to_dict()
    assert models.load(tmp_path, options={"cls_dropout": 0.15}).dropout.p == 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dropout": 0.1}, r"unknown field 'hidden_dropout'; did you mean 'hidden_dropout_prob'"),
        ({"cls_dropout": 0.1}, "unknown field 'cls_dropout'"),
        ({"model_type": "gpt2"}, "unknown field 'model_type'"),
        ({"hidden_dropout_prob": "0.1"}, "Field 'hidden_dropout_prob' expected float, got str"),
        ({"hidden_dropout_prob": True}, "Field 'hidden_dropout_prob' expected float, got bool"),
        ({"hidden_size": 8}, "cannot read the model"),
        (
            ["hidden_size"],
            r"model_options must be a mapping such as \{'hidden_dropout_prob': 0.0\}, got \['hidden_size'\]",
        ),
    ],
)
def test_a_wrong_option_is_one_line(folder, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        models.load(folder, options=options)
    assert "\n" not in str(raised.value)


def test_a_run_stores_its_options_and_is_opened_with_them(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.csv")
    settings = {"steps": 2, "batch_size": 8, "root": tmp_path, "progress": False, "device": "cpu"}
    plain = ls.train(str(folder), str(rows), ls.LoRA(rank=2), **settings)
    run = ls.train(str(folder), str(rows), ls.LoRA(rank=2), model_options={"layer_norm_eps": 1}, **settings)
    assert run.meta.settings["model_options"] == {"layer_norm_eps": 1}
    assert "model_options" not in plain.meta.settings
    assert run.id != plain.id
    # The same weights compute other outputs with another epsilon.
    assert open_trained(run, folder, rows, "last").base.config.layer_norm_eps == 1
    assert open_trained(plain, folder, rows, "last").base.config.layer_norm_eps != 1


def test_options_of_a_loaded_model_are_rejected(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="model_options requires the name of a model"):
        ls.train(models.load(folder), str(rows), "lora", steps=1, model_options={"layer_norm_eps": 1}, root=tmp_path)
