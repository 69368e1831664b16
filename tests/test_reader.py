"""The reader of components against the slopes of the dial, matrix products, and planted words, on tiny models."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BAD, FILLER, GOOD, tiny_tokenizer
from parsed_pages import Tree
from test_export import trained
from torch import nn

import lorascope as ls
from lorascope.adapters import delta
from lorascope.analysis.component_blocks import tied_components
from lorascope.analysis.reading import COLUMNS, FIRST_WORDS, VERDICTS, Reading
from lorascope.cli.main import main
from lorascope.inputs import tasks
from lorascope.inputs.text_rows import encode_rows
from lorascope.insight import reader
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.token_contributions import Margin, contribute, model_inputs, traced_calls
from lorascope.insight.token_words import find_words
from lorascope.insight.update_parts import ScaledUpdates, component_parts, slopes_of
from lorascope.methods import Full, HydraLoRA, LoRA

SPLITS = ["train"] * 3 + ["validation"]
TARGETS = ("q", "v", "ffn_out")
METHOD = LoRA(rank=3, alpha=12.0, targets=TARGETS, lr=1e-2, head_lr=1e-2)
CAUSAL = LoRA(rank=3, alpha=12.0, targets=TARGETS, lr=1e-2)


def sentences(seed: int = 0, number: int = 840) -> pd.DataFrame:
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(FILLER, k=draw.randint(3, 7))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "positive" else BAD))
        rows.append({"text": " ".join(words), "label": label, "split": SPLITS[index % 4]})
    # A task has a test split as well, which the reader does not use.
    rows[0]["split"] = "test"
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tasks.from_frame(sentences(), "reviews")


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def opened(
    request: Any, bert: str, llama: str, task: tasks.Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ls.Run, str]:
    folder, method = (bert, METHOD) if request.param == "encoder" else (llama, CAUSAL)
    return trained(folder, task, method, tmp_path_factory.mktemp("reader") / "run", steps=20)[1], folder


@pytest.fixture(scope="module")
def reading(opened: tuple[ls.Run, str], task: tasks.Task) -> Reading:
    return ls.read(*opened, task, top=4, progress=False)


def in_float64(run: ls.Run, folder: str, task: tasks.Task) -> AdaptedBase:
    adapted = open_adapted(run, folder, task, "last")
    adapted.base.double()
    for update in adapted.deltas.values():
        update.double()
    for module in adapted.base.modules():
        if type(module).__name__.endswith("RMSNorm"):  # casts to float32
            module.forward = partial(normalize, module)
    return adapted


def normalize(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def test_contributions_add_up_to_the_slope_of_the_dial(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    """Sum over tokens, gradient of the dial's gates, and central differences, in float64."""
    adapted = in_float64(*opened, task)
    margin = Margin(adapted.base, *encode_rows(adapted.base, adapted.task, "validation", 64, 128))
    delta.attach(adapted.base, adapted.deltas)
    parts, directions = component_parts(adapted.base, adapted.updates)
    updates = ScaledUpdates(adapted.base, adapted.deltas, directions)
    with updates.gated(1.0) as gates:
        gradients = dict(zip(gates, margin.slopes(list(gates.values())), strict=True))
    slopes = dict(zip([part.name for part in parts], slopes_of(parts, gradients), strict=True))
    totals = dict.fromkeys(slopes, 0.0)
    for batch in margin.batches:
        with traced_calls(adapted.base, list(adapted.deltas)) as calls:
            measured = margin.measure(batch).sum()
        for module, (call,) in calls.items():
            (gradient,) = torch.autograd.grad(measured, [call.shift], retain_graph=True)
            sums = contribute(directions[module], call.inputs, gradient).contributions.sum((0, 1))
            for index, value in enumerate(sums.tolist(), start=1):
                totals[f"{module} {index}"] += value / margin.counts.sum()
    assert len(totals) == 3 * len(adapted.deltas)
    for part in parts:
        assert totals[part.name] == pytest.approx(slopes[part.name], rel=1e-6, abs=1e-12)
        means = []
        for scale in (1 + 1e-4, 1 - 1e-4):
            with updates.scaled(part, scale):
                means.append(margin.values().sum() / margin.counts.sum())
        assert totals[part.name] == pytest.approx((means[0] - means[1]) / 2e-4, abs=1e-6)


def test_components_add_up_to_the_update_of_a_token(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    adapted = in_float64(*opened, task)
    margin = Margin(adapted.base, *encode_rows(adapted.base, adapted.task, "validation", 32, 128))
    directions = component_parts(adapted.base, adapted.updates).directions
    with traced_calls(adapted.base, list(adapted.deltas)) as calls, torch.no_grad():
        adapted.base(**model_inputs(margin.batches[0]))
    for module, (call,) in calls.items():
        output = torch.zeros_like(call.shift)
        activations = contribute(directions[module], call.inputs, output).activations
        expected = call.inputs @ torch.from_numpy(adapted.updates[module].dense()).T
        np.testing.assert_allclose(activations @ directions[module].U.T, expected, rtol=1e-6, atol=1e-12)


def test_the_margin_is_the_log_odds_of_the_label(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    """With p the probability of a label, log p - log (1 - p)."""
    adapted = in_float64(*opened, task)
    margin = Margin(adapted.base, *encode_rows(adapted.base, adapted.task, "validation", 32, 128))
    expected = []
    for batch in margin.batches:
        logits = adapted.base(**model_inputs(batch)).logits.detach()
        for row, labels in zip(logits, batch["labels"], strict=True):
            if labels.ndim == 0:
                row, labels = row[None], labels[None]
            else:
                row, labels = row[:-1][labels[1:] >= 0], labels[1:][labels[1:] >= 0]
            p = row.softmax(-1).gather(-1, labels[:, None])
            expected.append(float((p.log() - (1 - p).log()).sum()))
    np.testing.assert_allclose(margin.values()[margin.order], expected, rtol=1e-9)


def test_a_reading_has_every_column_and_a_receipt(reading: Reading, opened: tuple[ls.Run, str]) -> None:
    assert list(reading.table.columns) == COLUMNS
    assert set(reading.table["verdict"]) <= set(VERDICTS)
    assert reading.table["p"].between(0, 1).all()
    assert (reading.table["q"] >= reading.table["p"]).all()
    assert (reading.table["occurrences"] >= 5).all()
    assert reading.table["random_p"].between(0, 1).all()
    for card, rows in reading.table.groupby("card"):
        assert len(rows) >= FIRST_WORDS
        assert rows["contribution"].is_monotonic_decreasing
        assert (rows["written"].head(FIRST_WORDS) != "").all()
        assert rows["effect"].notna().sum() == FIRST_WORDS
        assert len(reading.card(int(card)).passages) == 5
    assert reading.receipt.run == opened[0].id
    assert str(reading.receipt) in repr(reading)
    assert "do not cover the seed" in repr(reading)
    assert list(reading.summary()["card"]) == [1, 2, 3, 4]
    content = reading.to_json()
    assert json.loads(json.dumps(content)) == content


def test_totals_of_cards_are_slopes_of_the_dial(reading: Reading, opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    run, folder = opened
    adapted = open_adapted(run, folder, task, "last")
    margin = Margin(adapted.base, *encode_rows(adapted.base, adapted.task, "validation", 1000, 128))
    delta.attach(adapted.base, adapted.deltas)
    parts, directions = component_parts(adapted.base, adapted.updates)
    with ScaledUpdates(adapted.base, adapted.deltas, directions).gated(1.0) as gates:
        gradients = dict(zip(gates, margin.slopes(list(gates.values())), strict=True))
    slopes = dict(zip([part.name for part in parts], slopes_of(parts, gradients), strict=True))
    for card in reading.cards:
        assert card.total.mean == pytest.approx(slopes[card.block.name], rel=1e-4, abs=1e-8)


def test_written_outputs_equal_the_change_of_logits_without_the_component(
    reading: Reading, opened: tuple[ls.Run, str], task: tasks.Task
) -> None:
    """Subtract the first component from the weight, and compare the logits where its first word occurs."""
    run, folder = opened
    adapted = open_adapted(run, folder, task, "last")
    rows = encode_rows(adapted.base, adapted.task, "validation", 1000, 128)
    delta.attach(adapted.base, adapted.deltas)
    block, word = reading.cards[0].block, reading.cards[0].words.iloc[0]
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids(word["word"])
    effects = 0
    host: Any = adapted.base.get_submodule(block.module)
    component = torch.from_numpy((block.U * block.sigma) @ block.V.T).float()
    for index in range(len(rows.encoded)):
        batch = rows.encoded.batch([index])
        logits = []
        for sign in (1, -1):
            with torch.no_grad():
                logits.append(adapted.base(**model_inputs(batch)).logits[0])
                host.weight -= sign * component
        for position in (batch["input_ids"][0] == token).nonzero()[:, 0]:
            on, off = (values if values.ndim == 1 else values[position] for values in logits)
            effects = effects + (on - off) / word["occurrences"]
    centered = effects - effects.mean()
    assert word["effect"] == pytest.approx(float(centered.max()), rel=1e-3)


def test_words_are_what_the_tokenizer_joins() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "un", "##happy", "film", ".", "a"])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    pieces = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]")
    words = find_words(pieces, [[1, 6, 2, 3, 4, 5], [4]])
    assert words.texts == ["[CLS]", "a", "unhappy", "film", ".", "film"]
    assert words.is_special == [True, False, False, False, False, False]
    assert words.occurrence.tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert words.row.tolist() == [0, 0, 0, 0, 0, 1]

    core = Tokenizer(models.BPE({"Ġ": 0, "Ġun": 1, "happy": 2, "Ġfilm": 3, ".": 4, "Ã": 5, "©": 6}, []))
    core.decoder = decoders.ByteLevel()
    bytes_level = PreTrainedTokenizerFast(tokenizer_object=core)
    words = find_words(bytes_level, [[1, 2, 3, 4, 1, 5, 6]])
    assert words.texts == ["unhappy", "film", ".", "uné"]


def test_neighbors_with_nearly_equal_singular_values_are_one_block() -> None:
    assert tied_components(np.array([3.0, 2.9, 2.0, 1.0, 0.99, 0.97])) == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert tied_components(np.array([2.0, 1.9])) == [slice(0, 1), slice(1, 2)]
    assert tied_components(np.array([])) == []


def test_bad_arguments_get_one_line(
    opened: tuple[ls.Run, str], bert: str, task: tasks.Task, tmp_path: Path, reading: Reading
) -> None:
    with pytest.raises(ValueError, match="top must be an integer >= 1, got 0"):
        ls.read(*opened, task, top=0)
    short = tasks.from_frame(sentences(number=400), "short")
    with pytest.raises(ValueError, match=r"cannot read on short: words need at least 200 rows, got 100 of its val"):
        ls.read(*opened, short)
    with pytest.raises(ValueError, match=r"card must be in \[1, 4\], got 5"):
        reading.card(5)
    full = trained(bert, task, Full(lr=1e-3), tmp_path / "full", steps=2)[1]
    with pytest.raises(ValueError, match="has no adapter"):
        ls.read(full, bert, task)
    hydra = trained(bert, task, HydraLoRA(rank=2, targets=("q",), lr=1e-2), tmp_path / "hydra", steps=2)[1]
    with pytest.raises(ValueError, match="it depends on the input"):
        ls.read(hydra, bert, task)


def test_rows_without_repeated_words_cannot_be_read(
    opened: tuple[ls.Run, str], task: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorascope.analysis.reading.FEWEST_OCCURRENCES", 10_000)
    with pytest.raises(ValueError, match="cannot read on reviews: no word occurs 5 times in the 210 rows of its val"):
        ls.read(*opened, task, progress=False)


def test_nothing_of_the_model_changes(opened: tuple[ls.Run, str], task: tasks.Task, monkeypatch: Any) -> None:
    models: list[nn.Module] = []
    original = reader.open_adapted

    def remember(*arguments: Any) -> AdaptedBase:
        adapted = original(*arguments)
        models.append(adapted.base)
        return adapted

    monkeypatch.setattr(reader, "open_adapted", remember)
    ls.read(*opened, task, top=1, progress=False)
    for module in models[0].modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_the_command_prints_cards_and_writes_a_page(
    opened: tuple[ls.Run, str], task: tasks.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = opened
    rows = tmp_path / "rows.csv"
    task.table[["text", "label", "split"]].to_csv(rows, index=False)
    page = tmp_path / "reading.html"
    words = ["read", str(run.path), "--model", folder, "--rows", str(rows)]
    assert main([*words, "--top", "1", "-o", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1  ")
    assert "receipt" in printed
    text = Tree(page.read_text(encoding="utf-8")).root
    assert len(text.all("div", "passages")) == 1
    assert "http" not in "".join(node.attributes.get("src", "") for node in text.walk())
    assert main([*words, "--top", "1", "-o", str(page), "--json"]) == 0  # its own page is replaced
    assert len(json.loads(capsys.readouterr().out)["cards"]) == 1
    for arguments, line in (
        ([], "RUN is required: lorascope read runs/lora --model minilm"),
        (words[1:4], "--model and --rows are required: words are read with both"),
        ([*words[1:], "-o", "x.pdf"], "--out must end in .html or .json, got x.pdf"),
        ([*words[1:], "--top", "0"], "top must be an integer >= 1, got 0"),
    ):
        assert main(["read", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"lorascope: {line}")
