"""Recipes of images, spans and summaries: printed numbers, trained parameters, steps, and their stand-ins."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from lorascope.experiments import grid, recipe, recipe_check, smoke
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
    names = ["Pets", "Cars", "CIFAR10", "DTD", "EuroSAT", "FGVC", "RESISC45", "CIFAR100"]
    assert list(plan.mean.columns) == names
    assert [name for recipe_part in plan.recipe_parts for name in recipe_part.columns] == 2 * names
    printed = {row: (score.value, score.n) for row, score in plan.mean.printed.items()}
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
