"""Rises and losses on a run's own task against brute force: weights changed by hand, logits looked at by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_folder
from test_agreement import loss_with
from test_cli import complaint, run
from test_export import trained

import lorascope as ls
from lorascope import delta, models, worth
from lorascope.export import cut, rank_pattern, to_peft
from lorascope.methods import Full, HydraLoRA, LoRA
from lorascope.run import Run

ROWS = 8


@pytest.fixture(scope="module")
def lora(bert: str, task: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    method = LoRA(rank=3, alpha=12.0, targets=("q", "embed", "ffn_out"), lr=1e-2, head_lr=1e-2)
    return trained(bert, task, method, tmp_path_factory.mktemp("worth") / "run", steps=12)[1]


@pytest.fixture(scope="module")
def csv(task: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "toy.csv"
    task.table[["text", "label", "group"]].to_csv(file, index=False)
    return str(file)


def bare(run: Run, bert: str, task: Any) -> torch.nn.Module:
    """The model with the head that was trained, without its adapters."""
    model = models.load(bert, task=task)
    run.restore(model)
    delta.detach(model)
    return model


def text(model: torch.nn.Module, task: Any, which: int, rows: int) -> dict[str, torch.Tensor]:
    """Every other row of the validation split."""
    chosen = task.split("validation").iloc[which::2].head(rows)
    return task.encode(models.tokenizer(model), chosen).batch(range(len(chosen)))


def matrices(run: Run, kept: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each update with its singular components times these, in the layout of its weight."""
    found = {}
    for name, update in run.updates().items():
        U, sigma, Vt = np.linalg.svd(update.dense(), full_matrices=False)
        factor = np.zeros(len(sigma))
        factor[: len(kept[name])] = kept[name][: len(sigma)]
        matrix = (U * (sigma * factor)) @ Vt
        found[name] = matrix.T if "embedding" in name else matrix
    return found


def ones(run: Run) -> dict[str, np.ndarray]:
    return {name: np.ones(rank) for name, rank in run.ranks().items()}


def test_a_rise_is_the_loss_with_a_component_set_to_zero_by_hand(lora: Run, bert: str, task: Any) -> None:
    found = worth.rises(lora, bert, task, rows=ROWS, exact_rows=ROWS)
    model = bare(lora, bert, task)
    batch = text(model, task, 0, ROWS)
    whole = loss_with(model, matrices(lora, ones(lora)), batch)
    used = {name: int(np.linalg.matrix_rank(update.dense())) for name, update in lora.updates().items()}
    assert {name: len(rise) for name, rise in found.items()} == used
    for name, rise in found.items():
        for component in range(len(rise)):
            without = ones(lora)
            without[name][component] = 0
            by_hand = loss_with(model, matrices(lora, without), batch) - whole
            assert rise[component] == pytest.approx(by_hand, abs=2e-6)
    assert max(np.abs(rise).max() for rise in found.values()) > 1e-3


def test_to_first_order_it_is_the_central_difference(lora: Run, bert: str, task: Any) -> None:
    found = worth.rises(lora, bert, task, rows=ROWS, exact_rows=0)
    model = bare(lora, bert, task)
    batch = text(model, task, 0, ROWS)
    for name in list(found)[::2]:
        factors = {}
        for sign in (0.1, -0.1):
            factor = ones(lora)
            factor[name][0] += sign
            factors[sign] = loss_with(model, matrices(lora, factor), batch)
        slope = (factors[0.1] - factors[-0.1]) / 0.2
        assert found[name][0] == pytest.approx(-slope, rel=0.05, abs=5e-6)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_losses_are_those_of_the_weights_by_hand_on_other_texts(budget: float, lora: Run, bert: str, task: Any) -> None:
    chosen = cut(lora, budget)
    found = worth.losses(lora, chosen, bert, task, rows=ROWS)
    model = bare(lora, bert, task)
    batch = text(model, task, 1, ROWS)
    assert found.texts == ROWS
    assert found.before == pytest.approx(loss_with(model, matrices(lora, ones(lora)), batch), abs=2e-6)
    assert found.after == pytest.approx(loss_with(model, matrices(lora, dict(chosen.kept)), batch), abs=2e-6)
    assert (found.before == found.after) == (budget == 1)
    assert not set(task.split("validation")["text"][0::2]) & set(task.split("validation")["text"][1::2])


def test_an_adapter_that_was_read_is_worth_what_the_run_is(lora: Run, bert: str, task: Any, tmp_path: Path) -> None:
    folder = ls.load(to_peft(lora, tmp_path / "adapter"))
    chosen = cut(folder, 0.5)
    ours, theirs = (worth.losses(run, chosen, bert, task, rows=ROWS) for run in (lora, folder))
    assert theirs == pytest.approx(ours, abs=1e-6)
    rises = [worth.rises(run, bert, task, rows=ROWS, exact_rows=ROWS) for run in (lora, folder)]
    for name, rise in rises[0].items():
        assert rises[1][name] == pytest.approx(rise, abs=2e-6)


def test_hydralora_is_worth_something_at_fixed_gates_alone(bert: str, task: Any, tmp_path: Path) -> None:
    _, found = trained(bert, task, HydraLoRA(rank=2), tmp_path / "run")
    with pytest.raises(ValueError, match="depends on its input"):
        worth.rises(found, bert, task, rows=ROWS)
    at = ls.at_gates(found, ls.mean_gates(found, ["the film was great"], base=models.load(bert, task=task)))
    assert worth.losses(at, cut(at, 1.0), bert, task, rows=ROWS).before > 0


def test_what_does_not_fit_is_refused(lora: Run, bert: str, task: Any, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", "bert", "base")
    weights = models.load(other)
    with torch.no_grad():
        next(weights.parameters()).add_(1)
    weights.base_model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"other has other weights than .*, the base of run"):
        worth.rises(lora, other, task)
    _, full = trained(bert, task, Full(), tmp_path / "full", steps=1)
    with pytest.raises(ValueError, match="no factored update of a rank above 0"):
        worth.losses(full, cut(full, 0.5), bert, task)

    folder = to_peft(lora, tmp_path / "adapter")
    three = ls.tasks.from_frame(task.table.assign(label=[f"class {n % 3}" for n in range(300)])[["text", "label"]], "3")
    with pytest.raises(ValueError, match=r"classifier\.\w+ is .* the task has other labels than the adapter"):
        worth.rises(ls.load(folder), bert, three)
    config = json.loads((folder / "adapter_config.json").read_text())
    headless = ls.load(folder)
    headless.files = type(headless.files)(folder, config, headless.files.parts, (), headless.files.files)
    with pytest.raises(ValueError, match=r"neither .* holds classifier\.\w+: with a random head a loss says nothing"):
        worth.rises(headless, bert, task)


def test_the_command_measures(lora: Run, bert: str, task: Any, csv: str, capsys: Any) -> None:
    words = ("export", lora.path, "--rank-pattern", "--budget", 0.5, "--model", bert, "--task", csv)
    rises = worth.rises(lora, bert, csv)
    for by, scores in (("energy", None), ("ablation", rises)):
        code, out, err = run(capsys, *words, "--by", by)
        assert (code, err.replace("\r", "").strip().startswith("lorascope")) == (0, False)
        chosen = cut(lora, 0.5, scores=scores)
        before, after, texts = worth.losses(lora, chosen, bert, csv)
        assert f"# Its loss on {texts} validation texts that chose nothing: {before:.4f} whole, {after:.4f} cut." in out
        assert ("the least that these ranks allow" in out) == (by == "energy")
        scope: dict[str, Any] = {}
        exec(out, scope)
        keywords = rank_pattern(lora, 0.5, scores=scores)
        assert scope["config"].rank_pattern == keywords["rank_pattern"]
        assert set(scope["config"].target_modules) == set(keywords["target_modules"])
    assert "nowhere.csv" in complaint(capsys, *words[:-1], "nowhere.csv")
