"""Loss increases and losses on a run's task, compared with weights and logits computed by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_folder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import complaint, run
from test_export import trained
from test_loading import adapted, save
from test_score_agreement import loss_with
from tiny import tiny
from tolerance import TINY, near, rounding
from trainers import by_trainer, without_dropout

import lorascope as ls
from lorascope.adapters import delta
from lorascope.experiments import component_importance
from lorascope.export import rank_pattern, select_components, to_peft
from lorascope.formats.peft_config import WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.inputs import models
from lorascope.methods import Full, HydraLoRA, LoRA
from lorascope.runs.run import Run
from lorascope.training.state import seed_generators

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
    """Return the model with the trained head and without adapters."""
    model = models.load(bert, task=task)
    run.restore(model)
    delta.detach(model)
    return model


def text(model: torch.nn.Module, task: Any, which: int, rows: int, max_length: int = 128) -> dict[str, torch.Tensor]:
    """Return every other row of the validation split, encoded."""
    chosen = task.split("validation").iloc[which::2].head(rows)
    return task.encode(models.tokenizer(model), chosen, max_length).batch(range(len(chosen)))


def matrices(run: Run, kept: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return each update with its singular components times ``kept``, in the layout of its weight."""
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


def test_importance_equals_the_loss_with_a_component_set_to_zero(lora: Run, bert: str, task: Any) -> None:
    found = component_importance.component_importance(lora, bert, task, rows=ROWS, exact_rows=ROWS)
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
            assert rise[component] == near(by_hand, whole, terms=TINY, depth=2)
    assert max(np.abs(rise).max() for rise in found.values()) > 1e-3


def test_first_order_importance_equals_the_central_difference(lora: Run, bert: str, task: Any) -> None:
    found = component_importance.component_importance(lora, bert, task, rows=ROWS, exact_rows=0)
    model = bare(lora, bert, task)
    batch = text(model, task, 0, ROWS)
    for name in list(found)[::2]:
        factors = {}
        for sign in (0.1, -0.1):
            factor = ones(lora)
            factor[name][0] += sign
            factors[sign] = loss_with(model, matrices(lora, factor), batch)
        slope = (factors[0.1] - factors[-0.1]) / 0.2
        assert found[name][0] == pytest.approx(-slope, rel=0.05, abs=rounding(terms=TINY) / 0.2)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_pruned_losses_equal_losses_by_hand_on_other_rows(budget: float, lora: Run, bert: str, task: Any) -> None:
    chosen = select_components(lora, budget)
    found = component_importance.pruned_losses(lora, chosen, bert, task, rows=ROWS)
    model = bare(lora, bert, task)
    batch = text(model, task, 1, ROWS)
    assert found.texts == ROWS
    assert found.before == near(loss_with(model, matrices(lora, ones(lora)), batch), terms=TINY)
    assert found.after == near(loss_with(model, matrices(lora, dict(chosen.kept)), batch), terms=TINY)
    assert (found.before == found.after) == (budget == 1)
    assert not set(task.split("validation")["text"][0::2]) & set(task.split("validation")["text"][1::2])


def test_texts_are_truncated_as_in_the_training(bert: str, task: Any, tmp_path: Path) -> None:
    short = trained(bert, task, LoRA(rank=2, lr=1e-2, head_lr=1e-2), tmp_path / "run", max_length=3)[1]
    found = component_importance.pruned_losses(short, select_components(short, 1.0), bert, task, rows=ROWS)
    model = bare(short, bert, task)
    batch = text(model, task, 1, ROWS, max_length=3)
    assert batch["input_ids"].shape[1] == 3 < text(model, task, 1, ROWS)["input_ids"].shape[1]
    assert found.before == near(loss_with(model, matrices(short, ones(short)), batch), terms=TINY)


def test_importance_of_an_exported_adapter_equals_that_of_its_run(
    lora: Run, bert: str, task: Any, tmp_path: Path
) -> None:
    folder = ls.load(to_peft(lora, tmp_path / "adapter"))
    chosen = select_components(folder, 0.5)
    ours, theirs = (component_importance.pruned_losses(run, chosen, bert, task, rows=ROWS) for run in (lora, folder))
    assert theirs == near(ours, 1, terms=TINY)
    rises = [
        component_importance.component_importance(run, bert, task, rows=ROWS, exact_rows=ROWS) for run in (lora, folder)
    ]
    for name, rise in rises[0].items():
        assert rises[1][name] == near(rise, 1, terms=TINY, depth=2)


def test_hydralora_requires_fixed_gates(bert: str, task: Any, tmp_path: Path) -> None:
    _, found = trained(bert, task, HydraLoRA(rank=2), tmp_path / "run")
    with pytest.raises(ValueError, match="depends on its input"):
        component_importance.component_importance(found, bert, task, rows=ROWS)
    at = ls.at_gates(found, ls.mean_gates(found, ["the film was great"], base=models.load(bert, task=task)))
    assert component_importance.pruned_losses(at, select_components(at, 1.0), bert, task, rows=ROWS).before > 0


@pytest.mark.parametrize("settings", [{"rows": 0}, {"exact_rows": -1}], ids=lambda settings: next(iter(settings)))
def test_number_of_rows_outside_its_range_raises(lora: Run, bert: str, task: Any, settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= {value + 1}, got {value}$"):
        component_importance.component_importance(lora, bert, task, **settings)


def test_wrong_base_task_or_method_raises(lora: Run, bert: str, task: Any, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", "bert", "base")
    weights = models.load(other)
    with torch.no_grad():
        next(weights.parameters()).add_(1)
    weights.base_model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"base of run .*, got .*other with different weights"):
        component_importance.component_importance(lora, other, task)
    _, full = trained(bert, task, Full(), tmp_path / "full", steps=1)
    with pytest.raises(ValueError, match="no factored update of rank >= 1"):
        component_importance.pruned_losses(full, select_components(full, 0.5), bert, task)

    folder = to_peft(lora, tmp_path / "adapter")
    three = ls.tasks.from_frame(task.table.assign(label=[f"class {n % 3}" for n in range(300)])[["text", "label"]], "3")
    with pytest.raises(ValueError, match=r"cannot load classifier\.\w+: it has shape .* labels of the adapter"):
        component_importance.component_importance(ls.load(folder), bert, three)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    headless = ls.load(folder)
    headless.files = type(headless.files)(folder, config, headless.files.parts, (), headless.files.files)
    with pytest.raises(ValueError, match=r"neither .* has weights for classifier\.\w+"):
        component_importance.component_importance(headless, bert, task)


def loss_of(model: torch.nn.Module, folder: str, task: Any) -> float:
    """Return the loss of a model on the examples that losses are measured on."""
    base = models.load(folder, task=task)
    with torch.no_grad():
        return float(model.eval()(**text(base, task.fit(base), 1, ROWS)).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_embedding_is_saved_with_the_adapter(tied: bool, task: Any, tmp_path: Path) -> None:
    """PEFT also saves the base weight and, for a resized vocabulary, that of the head, which may be tied."""
    base = tiny("llama", tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with seed_generators(0):
        model = adapted(base, target_modules=["embed_tokens", "q_proj"], r=2, lora_alpha=1, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves them
        model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    held = load_file(file)
    (below,) = (value for name, value in held.items() if name.endswith("embed_tokens.base_layer.weight"))
    if tied:
        save_file(held | {f"{PREFIX}lm_head.weight": below.clone()}, file)
    read = ls.load(tmp_path / "adapter")
    found = component_importance.pruned_losses(read, select_components(read, 1.0), tmp_path / "base", task, rows=ROWS)
    assert found.before == near(loss_of(model, str(tmp_path / "base"), task), terms=TINY)
    assert found.before != near(
        loss_of(tiny("llama", tie_word_embeddings=tied), str(tmp_path / "base"), task), terms=TINY
    )
    if tied:
        save_file(held | {f"{PREFIX}lm_head.weight": below + 1}, file)
        separate = ls.load(tmp_path / "adapter")
        with pytest.raises(
            ValueError, match=r"cannot load lm_head\.weight: it is tied in .*base, but is separate in adapter"
        ):
            component_importance.pruned_losses(separate, select_components(separate, 1.0), tmp_path / "base", task)


def test_export_by_ablation_of_dora_biases_or_resized_head_raises(
    llama: str, csv: str, tmp_path: Path, capsys: Any
) -> None:
    wanted = {
        "dora": ({"use_dora": True}, "self_attn.q_proj are only the direction of its update, without its magnitude"),
        "bias": ({"lora_bias": True}, "components of bias: model.layers.0.self_attn.q_proj.lora_B.bias (lora_bias)"),
        "more": (
            {"modules_to_save": ["lm_head"]},
            "cannot load lm_head.weight: it has shape (67, 32) in more and (64, 32) in ",
        ),
    }
    for name, (options, line) in wanted.items():
        save(tmp_path / name, target_modules=["q_proj"], **options)
        if name == "more":
            tensors = load_file(tmp_path / name / WEIGHTS)
            head = next(key for key in tensors if key.endswith("lm_head.weight"))
            save_file(tensors | {head: torch.ones(67, 32)}, tmp_path / name / WEIGHTS)
        words = ("--rank-pattern", "--budget", 0.5, "--model", llama, "--task", csv)
        told = complaint(capsys, "export", tmp_path / name, *words)
        assert line in told
        assert "labels" not in told


def recorded(folder: str, task: Any, out: Path, **options: Any) -> tuple[Any, Run]:
    """Train a PEFT LoRA with a Trainer, and return it with its recording."""
    model = models.load(folder, task=task)
    fitted = task.fit(model)
    batch = fitted.encode(models.processor(model), fitted.split("train").head(6 * ROWS)).batch(range(6 * ROWS))
    rows = [{key: value[row] for key, value in batch.items()} for row in range(6 * ROWS)]
    model = adapted(without_dropout(model), r=2, **options)
    by_trainer(model, rows, out, recorder=ls.TrainerRecorder())
    return model, ls.load(out / "lorascope")


def test_recorded_run_is_measured_unless_other_parameters_trained(
    llama: str, gpt2: str, bert: str, task: Any, tmp_path: Path
) -> None:
    """A recording does not store the hash of its base, so only names and shapes are checked."""
    model, run = recorded(llama, task, tmp_path / "llama", target_modules=["q_proj", "v_proj"])
    found = component_importance.pruned_losses(run, select_components(run, 1.0), llama, task, rows=ROWS)
    assert found.before == near(loss_of(model, llama, task), terms=TINY)
    assert found.before != pytest.approx(loss_of(models.load(llama, task=task), llama, task), rel=1e-3)
    with pytest.raises(ValueError, match=r"got .*gpt2: it has no model\.layers\.0\.self_attn\.q_proj"):
        component_importance.component_importance(run, gpt2, task)
    wide = tiny("llama", hidden_size=64)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"PEFT LORA, r 2, got .*wide: .*q_proj has shape \(64, 64\), not \(32, 32\)"):
        component_importance.component_importance(run, tmp_path / "wide", task)
    on_query = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model, run = recorded(bert, task, tmp_path / "bert", **on_query)
    found = component_importance.pruned_losses(
        run, select_components(run, 1.0), bert, task, rows=ROWS
    )  # with the head that trained
    assert found.before == near(loss_of(model, bert, task), terms=TINY)
    _, run = recorded(bert, task, tmp_path / "biased", **on_query, lora_bias=True)
    for refused in (
        lambda: component_importance.pruned_losses(run, select_components(run, 1.0), bert, task),
        lambda: to_peft(run, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"64 trained parameters.* were not recorded"):
            refused()


def test_export_command_prints_losses_and_rank_pattern(lora: Run, bert: str, task: Any, csv: str, capsys: Any) -> None:
    words = ("export", lora.path, "--rank-pattern", "--budget", 0.5, "--model", bert, "--task", csv)
    rises = component_importance.component_importance(lora, bert, csv)
    for by, scores in (("energy", None), ("ablation", rises)):
        code, out, err = run(capsys, *words, "--by", by)
        assert (code, err.replace("\r", "").strip().startswith("lorascope")) == (0, False)
        chosen = select_components(lora, 0.5, scores=scores)
        before, after, texts = component_importance.pruned_losses(lora, chosen, bert, csv)
        remarks = out.replace("\n#   ", " ")  # they are wrapped
        assert f"# Loss on {texts} validation texts" in remarks
        assert f"{before:.4f} before pruning, {after:.4f} after." in remarks
        assert ("the minimum for these ranks" in remarks) == (by == "energy")
        scope: dict[str, Any] = {}
        exec(out, scope)
        keywords = rank_pattern(lora, 0.5, scores=scores)
        assert scope["config"].rank_pattern == keywords["rank_pattern"]
        assert set(scope["config"].target_modules) == set(keywords["target_modules"])
    assert "nowhere.csv" in complaint(capsys, *words[:-1], "nowhere.csv")
