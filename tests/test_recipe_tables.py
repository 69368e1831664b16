"""Recipes of images, spans and summaries: printed numbers, trained parameters, steps, and their stand-ins."""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers

from lorascope.cli.main import main
from lorascope.experiments import grid, recipe, recipe_check, recipe_measurement, smoke
from lorascope.inputs import images, metrics, models, tasks
from lorascope.training.settings import Settings


def read_offline(name, monkeypatch):
    """Read a recipe with generated rows, as if its models, data and metrics were available."""
    monkeypatch.setattr(grid, "load_task", smoke.Smoke().task)
    monkeypatch.setattr(models, "locate_model", lambda name: None)
    monkeypatch.setattr(metrics, "require_package", lambda metric: None)
    return recipe.read(name)


def settings_of(job) -> Settings:
    values = {key: value for key, value in job.settings.items() if key in Settings.__dataclass_fields__}
    return Settings(**{"steps": 0, "lr": job.method.lr, "head_lr": job.method.head_lr, **values})


# -- images ---------------------------------------------------------------------------------------------------------

SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16)}


def test_the_recipe_of_image_sets_has_the_printed_means_and_parameters(monkeypatch):
    plan = read_offline("fourierft-table5", monkeypatch)
    (mean,) = plan.means
    names = ["Pets", "Cars", "CIFAR10", "DTD", "EuroSAT", "FGVC", "RESISC45", "CIFAR100"]
    assert list(mean.columns) == names
    assert [name for recipe_part in plan.recipe_parts for name in recipe_part.columns] == 2 * names
    printed = {row: (score.value, score.n) for row, score in mean.printed.items()}
    assert printed == {
        "FourierFT, base, 3000": (77.75, 5),
        "FourierFT, base, 10000": (80.29, 5),
        "FourierFT, large, 3000": (83.71, 5),
        "FourierFT, large, 10000": (86.68, 5),
    }
    for recipe_part in plan.recipe_parts:
        size = "base" if "base" in str(recipe_part.grid.models[0]) else "large"
        width, depth, heads = SIZES[size]
        for job in recipe_part.jobs()[::5]:
            with torch.device("meta"):
                config = transformers.ViTConfig(
                    hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, num_labels=37
                )
                outline = transformers.ViTForImageClassification(config)
            trained, _ = recipe_check.measure_outline(outline, job)
            # Queries and values, and the head, which the paper does not count.
            assert trained == 2 * depth * job.method.coefficients + 37 * (width + 1)
            assert settings_of(job).augment == "crop-flip"
    # Nine tenths of the 50,000 rows of CIFAR10.
    assert settings_of(plan.recipe_parts[2].jobs()[0]).resolve(45_000).steps == 2250
    splits = [len(plan.recipe_parts[3].grid.tasks[0].split(name)) for name in tasks.SPLITS]
    # The test split has 20% of the 20 generated rows, and validation the two between 20% and 28%.
    assert splits == [14, 2, 4]


def test_generated_images_are_learned_and_read_by_their_model():
    stand_in = smoke.Smoke(architecture="vit")
    entry = {"name": "pets", "columns": {"image": "image", "label": "label"}, "splits": "given"}
    task = stand_in.task(entry)
    assert task.kind == "image"
    bright = []
    for row in task.split("train").itertuples():
        bright.append(np.asarray(images.open_image(row.image)).mean() > 127)
    assert bright == [label == "good" for label in task.split("train")["label"]]
    model = models.load(stand_in.model("image"), task)
    assert isinstance(model, transformers.ViTForImageClassification)
    batch = task.fit(model).encode(models.processor(model), task.split("train")).batch([0, 1])
    assert model(**batch).logits.shape == (2, 2)


def test_rows_of_one_method_may_be_tried_with_different_fields():
    plan = recipe.read("fourierft-table5", smoke=True)
    assert [row.method.coefficients for row in plan.recipe_parts[0].rows] == [8, 16]


# -- spans ----------------------------------------------------------------------------------------------------------

# Exact match and F1 by method and (mean) rank, as printed.
SQUAD = {
    "SQuAD 1.1": {
        "AdaLoRA": {1: (87.2, 93.4), 2: (87.5, 93.6), 4: (87.5, 93.7), 8: (87.6, 93.7)},
        "LoRA": {1: (86.4, 92.8), 2: (86.6, 92.9), 4: (86.7, 93.1), 8: (86.7, 93.1)},
    },
    "SQuAD 2.0": {
        "AdaLoRA": {1: (85.6, 88.7), 2: (85.7, 88.8), 4: (85.5, 88.6), 8: (86.0, 88.9)},
        "LoRA": {1: (84.7, 87.5), 2: (83.6, 86.7), 4: (84.5, 87.4), 8: (85.0, 88.0)},
    },
}


def test_the_recipe_of_squad_has_the_printed_scores_ranks_and_schedules(monkeypatch):
    plan = read_offline("adalora-table2", monkeypatch)
    with torch.device("meta"):
        sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        outline = transformers.DebertaV2ForQuestionAnswering(transformers.DebertaV2Config(**sizes))
    ranks = {1: 2, 2: 4, 4: 6, 8: 12}
    # Four matrices of attention and two of the feed-forward network in each block, by rank, and the head.
    per_rank, head = 12 * (4 * (768 + 768) + 2 * (768 + 3072)), 2 * 769
    for (data, printed), recipe_part in zip(SQUAD.items(), plan.recipe_parts, strict=True):
        assert [metric.name for metric in recipe_part.columns.values()] == ["exact_match", "f1_words"]
        cells = {}
        for row, job in zip(recipe_part.rows, recipe_part.jobs()[::5], strict=True):
            name, _, rank = row.name.partition(", rank ")
            cells.setdefault(name, {})[int(rank)] = tuple(score.value for score in row.printed.values())
            trained, _ = recipe_check.measure_outline(copy.deepcopy(outline), job)
            if name == "LoRA":
                assert trained == per_rank * int(rank) + head
            else:
                assert (job.method.target_rank, job.method.init_rank) == (int(rank), ranks[int(rank)])
                # Each component has a factor lambda.
                assert trained == (per_rank + 72) * job.method.init_rank + head
                assert job.method.gamma == 0.1
                rows, budget_steps = (87_599, 30_000) if data == "SQuAD 1.1" else (130_319, 55_000)
                assert job.method.initial_steps + job.method.final_steps == budget_steps
                assert budget_steps < settings_of(job).resolve(rows).steps
        assert cells == printed
        assert recipe_part.grid.tasks[0].kind == "span"


def test_generated_questions_have_answers_in_their_contexts_or_none():
    stand_in = smoke.Smoke(architecture="deberta-v2")
    columns = {"question": "question", "context": "context", "answers": "answers"}
    task = stand_in.task({"name": "squad", "columns": columns, "splits": "given"})
    rows = task.split("train")
    for row in rows.itertuples():
        assert bool(row.answers) == (row.question in row.context.split())
        if row.answers:
            before, _, after = row.context.partition(f"{row.question} ")
            assert row.answer_start == [len(before) + len(row.question) + 1]
            assert row.answers == [after.split()[0]]
    assert rows["answers"].map(len).sum() == 16
    model = models.load(stand_in.model("span"), task)
    assert len(task.encode(models.processor(model), rows, 32)) > 2 * len(rows)
    # A measurement has windows of the full length.
    long_rows = recipe_measurement._lengthen(task, 100)
    windows = long_rows.encode(models.processor(model), long_rows.split("train"), 100)
    assert (windows.lengths == 100).sum() >= len(rows)


def test_the_steps_of_contexts_are_a_lower_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "load_task", smoke.Smoke().task)
    assert main(["sweep", "adalora-table2", "--check"]) == 1  # the model is missing
    # Twenty rows in batches of 16 for ten epochs.
    assert "AdaLoRA, rank 1: 5 runs, at least 20 steps a phase" in capsys.readouterr().out


# -- summaries ------------------------------------------------------------------------------------------------------

# ROUGE-1, -2 and -L by method and (mean) rank, as printed.
SUMMARIES = {
    "XSum": {
        "AdaLoRA": {1: (43.29, 19.95, 35.04), 2: (43.55, 20.17, 35.2), 8: (44.35, 21.13, 36.13),
                    16: (44.72, 21.46, 36.46)},
        "LoRA": {1: (42.81, 19.68, 34.73), 2: (43.18, 19.89, 34.92), 8: (43.4, 20.2, 35.2), 16: (43.95, 20.72, 35.68)},
    },
    "CNN/DM": {
        "AdaLoRA": {1: (43.94, 20.83, 40.96), 2: (44.39, 21.28, 41.5), 8: (44.96, 21.77, 42.09),
                    16: (45.0, 21.89, 42.16)},
        "LoRA": {1: (43.68, 20.63, 40.71), 2: (43.95, 20.91, 40.98), 8: (44.72, 21.58, 41.84),
                 16: (45.03, 21.84, 42.15)},
    },
}  # fmt: skip


def test_the_recipe_of_summaries_has_the_printed_scores_ranks_and_parameters(monkeypatch):
    plan = read_offline("adalora-table3", monkeypatch)
    sizes = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 12}
    with torch.device("meta"):
        outline = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    ranks = {1: 2, 2: 4, 8: 12, 16: 24}
    # Square matrices of attention, 4 in a block of the encoder and 8 in one of the decoder, and 2 of each feed-forward.
    per_rank, modules = 12 * (12 * (1024 + 1024) + 4 * (1024 + 4096)), 12 * 16
    assert per_rank == 540_672
    for (data, printed), recipe_part in zip(SUMMARIES.items(), plan.recipe_parts, strict=True):
        assert all(column.startswith(data) for column in recipe_part.columns)
        cells = {}
        for row, job in zip(recipe_part.rows, recipe_part.jobs()[::5], strict=True):
            name, _, rank = row.name.partition(", rank ")
            cells.setdefault(name, {})[int(rank)] = tuple(score.value for score in row.printed.values())
            trained, _ = recipe_check.measure_outline(copy.deepcopy(outline), job)
            if name == "LoRA":
                assert trained == per_rank * int(rank)
            else:
                assert job.method.init_rank == ranks[int(rank)]
                assert trained == (per_rank + modules) * job.method.init_rank
        assert cells == printed
        settings = settings_of(recipe_part.jobs()[0])
        beams = (settings.text_generation.num_beams, settings.text_generation.max_new_tokens)
        assert beams == {"XSum": (8, 64), "CNN/DM": (4, 160)}[data]
        # Batches of 8 and of 4, eight per step.
        assert settings.batch_size == {"XSum": 64, "CNN/DM": 32}[data]
