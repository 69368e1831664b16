"""Contract of the export of runs to PEFT: every method, and every exporter with its row. PEFT is the oracle."""

from __future__ import annotations

import copy
import errno
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import tiny_folder
from contract.exporter_rows import ROWS
from examples import EXAMPLES
from test_export import by_the_card, distance, trained
from tolerance import TINY, near, rounding
from torch import nn

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.export import exporters, to_peft
from lorascope.export.exporters import EXPORTERS, RunExporter, find_exporter
from lorascope.inputs import models
from lorascope.methods.method import Method

EVERY = pytest.mark.parametrize("kind", ROWS)
EVERY_METHOD = pytest.mark.parametrize("name", EXAMPLES)
REFUSED = [(kind, case) for kind, row in ROWS.items() for case in row.refuses]


def check(out: Path, kind: str, ours: nn.Module, base: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Check a written adapter against the trained model; return the names of the adapted modules.

    PEFT gives the logits of the model, and ``load`` its updates.
    """
    theirs = by_the_card(out, monkeypatch)
    assert distance(copy.deepcopy(ours), theirs) <= rounding(terms=TINY)  # FourierFT is transformed in float32
    adapted = {name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    if "lm_head" in adapted and ours.config.tie_word_embeddings:  # the base stores its weight under the other name
        return adapted
    found = ls.load(out, base)
    assert found.files.kind == kind
    assert found.updates().keys() == adapted
    for name, update in found.updates().items():
        expected = attached_deltas(ours)[name].update().dense()
        assert update.dense() == near(expected, dtype=torch.float64, terms=TINY)
    return adapted


def test_every_exporter_has_a_row(train_once) -> None:
    run, _ = train_once("lora", EXAMPLES["lora"])
    assert find_exporter(run, "last").kind == "LoRA"
    exporters_of_runs = [exporter for exporter in EXPORTERS if isinstance(exporter, RunExporter)]
    assert ROWS.keys() == {each.kind for each in exporters_of_runs if type(each).__module__.startswith("lorascope.")}


@EVERY_METHOD
def test_exporter_of_a_run_does_not_depend_on_the_order_of_imports(
    name: str, train_once, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_once(name, EXAMPLES[name])
    kind = find_exporter(run, "last").kind
    lora_last = sorted(EXPORTERS, key=lambda exporter: getattr(exporter, "factor", ""), reverse=True)
    monkeypatch.setattr(exporters, "EXPORTERS", lora_last)
    assert find_exporter(run, "last").kind == kind


@EVERY_METHOD
def test_method_is_written_bit_by_bit_or_refused_with_a_reason(
    name: str, train_once, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = train_once(name, EXAMPLES[name])
    exporter, updates = find_exporter(run, "last"), run.updates().values()
    products = [update for update in updates if update.low_rank is not None and update.exact]
    if not exporter.factor and (not products or len(products) < len(updates)):
        refused(run, tmp_path / "adapter", r" as LoRA: it trained the weights themselves| to LoRA: the update of .+")
        return
    out = to_peft(run, tmp_path / "adapter")
    adapted = check(out, exporter.kind, model, bert, monkeypatch)
    assert adapted == {module for module, rank in run.ranks().items() if rank}
    deltas = attached_deltas(model)
    for module, update in ls.load(out, bert).updates().items():
        np.testing.assert_array_equal(update.dense(), deltas[module].update().dense())


CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gpt2, Conv1D": ("gpt2", "causal", ("all-linear",)),
    "gpt2, the head's use of a tied weight": ("gpt2", "causal", ("qkv", "lm_head")),
    "llama": ("llama", "causal", ("q", "v", "ffn_gate", "head")),
    "bert, a head that is adapted and trained": ("bert", "base", ("q", "head")),
    "bart": ("bart", "seq2seq", ("q", "cross_v", "ffn_in")),
}
# Embeddings, which only LoRA adapts, and heads, which are written by the same code for every exporter.
OF_LORA: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bert, embedding": ("bert", "base", ("all-linear", "embed")),
    "gpt2, embeddings": ("gpt2", "causal", ("qkv", "embed", "pos_embed")),
    "gpt2 classifier": ("gpt2", "classification", ("qkv", "ffn_out")),
    "roberta, a head of two layers": ("roberta", "base", ("q", "v")),
    "distilbert, a head of two layers": ("distilbert", "base", ("q", "ffn_in")),
}
ARCHITECTURES = [
    pytest.param(kind, *case, id=f"{kind}-{name}")
    for kind in ROWS
    for name, case in (CASES | (OF_LORA if kind == "LoRA" else {})).items()
]


# PEFT warns about merging, which is not done, and corrects its flag if both Linear and Conv1D are adapted.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module:UserWarning")
@pytest.mark.parametrize(("kind", "family", "head", "targets"), ARCHITECTURES)
def test_adapter_of_every_architecture(
    kind: str, family: str, head: str, targets: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base", family, head)
    ours, run = trained(base, task, ROWS[kind].method(targets), tmp_path / "run")
    assert distance(copy.deepcopy(ours), models.load(base, task=task)) > 1e-3
    out = to_peft(run, tmp_path / "adapter")
    assert out == tmp_path / "adapter"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base", "run"]
    adapted = check(out, kind, ours, base, monkeypatch)
    assert adapted == run.ranks().keys() - {"classifier"}


def with_trained(method: Method, *modules: str) -> Method:
    """Return a copy of a method that also trains these modules."""

    class Beneath(type(method)):  # type: ignore[misc]
        def attach(self, model: nn.Module) -> None:
            super().attach(model)
            for name in modules:
                model.get_submodule(name).weight.requires_grad_(True)
                model.get_submodule(name).bias.requires_grad_(True)

    return Beneath(**{field.name: getattr(method, field.name) for field in fields(method)})


@EVERY
def test_adapter_on_a_trained_weight_is_merged_into_it(
    kind: str, gpt2: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves an adapter or a weight. The merged modules have the most outputs of all."""
    merged = {f"transformer.h.{layer}.mlp.c_fc" for layer in range(2)}
    method = with_trained(ROWS[kind].method(("qkv", "ffn_in")), *merged)
    ours, run = trained(gpt2, task, method, tmp_path / "run")
    out = to_peft(run, tmp_path / "adapter")
    assert check(out, kind, ours, gpt2, monkeypatch) == run.ranks().keys() - merged
    assert set(peft.PeftConfig.from_pretrained(out).modules_to_save) == merged


def refused(run: ls.Run, out: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        to_peft(run, out)
    assert str(raised.value).startswith("cannot ")
    assert run.id in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize(("kind", "case"), REFUSED)
def test_run_that_peft_cannot_express_is_refused_in_one_line(kind: str, case: str, train_once, tmp_path: Path) -> None:
    method, words = ROWS[kind].refuses[case]
    run, _ = train_once(case, method)
    assert find_exporter(run, "last").kind == kind
    refused(run, tmp_path / "new" / "adapter", words)
    assert not any(tmp_path.iterdir())


@EVERY
def test_run_without_an_adapter_of_its_own_is_refused_in_one_line(
    kind: str, bert: str, task: Any, tmp_path: Path
) -> None:
    """Only the head is adapted, and the head is saved whole."""
    _, run = trained(bert, task, ROWS[kind].method(("head",)), tmp_path / "run")
    refused(run, tmp_path / "adapter", "no adapter is left, because all adapted weights also trained")


@EVERY
def test_existing_folder_is_not_replaced(kind: str, train_once, tmp_path: Path) -> None:
    run, _ = train_once(f"{kind} of every block", ROWS[kind].method(("q",)))
    mine = tmp_path / "there" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    for out in (mine, mine.parent):
        with pytest.raises(FileExistsError, match=f"cannot create {out}: it exists, pass a new path"):
            to_peft(run, out)
    assert mine.read_text(encoding="utf-8") == "years of work"
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "mine.txt"]


def written(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@EVERY
def test_failed_export_leaves_nothing_and_can_be_repeated(kind: str, train_once, tmp_path: Path) -> None:
    run, _ = train_once(f"{kind} of every block", ROWS[kind].method(("q",)))
    whole = written(to_peft(run, tmp_path / "whole" / "adapter"))
    assert whole.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for write in range(len(whole)):
        left = [write]

        def fill(handle: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "new").mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as full_disk:
            full_disk.setattr(os, "fsync", fill)
            with pytest.raises(OSError, match="No space left"):
                to_peft(run, tmp_path / "new" / "adapter")
        assert not any((tmp_path / "new").iterdir())
    assert written(to_peft(run, tmp_path / "new" / "adapter")) == whole
