"""The setting augment: crops and flips against torchvision, batches of training and evaluation, ids and errors."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from test_images import FAST, image_rows
from transformers import AutoImageProcessor

import lorascope as ls
from lorascope.cli.main import main
from lorascope.experiments.trained_model import open_trained
from lorascope.inputs import images, models, tasks
from lorascope.inputs.images import Box
from lorascope.methods import LoRA
from lorascope.training.settings import Settings

TORCHVISION = json.loads(Path(__file__).with_name("fixtures").joinpath("torchvision_crops.json").read_text())
DRAWS = 20_000


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    return families.folder(tmp_path_factory.mktemp("models") / "vit", "vit")


@pytest.mark.parametrize("size", [(64, 48), (40, 160), (300, 30)])
def test_boxes_have_the_distribution_of_torchvision(size):
    generator = np.random.default_rng(0)
    left, top, right, bottom = np.array([images.draw_crop(*size, generator) for _ in range(DRAWS)]).T
    ours = {"top": top, "left": left, "height": bottom - top, "width": right - left}
    ours["area"] = ours["height"] * ours["width"]
    recorded = TORCHVISION["boxes {}x{}".format(*size)]
    assert recorded.keys() == ours.keys()
    for name, (values, counts) in recorded.items():
        theirs = np.repeat(values, counts)
        assert len(theirs) == DRAWS
        assert stats.ks_2samp(ours[name], theirs).pvalue > 0.01, name
    assert (left >= 0).all()
    assert (right <= size[0]).all()
    assert (top >= 0).all()
    assert (bottom <= size[1]).all()


@pytest.mark.parametrize("size", ["13x9", "9x13", "5x7", "16x16"])
def test_pixels_equal_those_of_torchvision(size, monkeypatch):
    recorded = TORCHVISION[f"pixels {size}"]
    image = Image.fromarray(np.array(recorded["image"], dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(images.center_crop(image, 8)), recorded["evaluation"])
    # The box that was recorded, so that only the flip is drawn.
    monkeypatch.setattr(images, "draw_crop", lambda width, height, generator: Box(2, 1, 5, 5))
    generator = np.random.default_rng(0)
    crops = np.array([np.asarray(images.crop_flip(image, 8, generator)) for _ in range(400)])
    crop = np.array(recorded["crop"])
    flipped = (crops == crop[:, ::-1]).all(axis=(1, 2, 3))
    assert (flipped | (crops == crop).all(axis=(1, 2, 3))).all()
    assert stats.binomtest(int(flipped.sum()), len(flipped), 0.5).pvalue > 0.01


def test_batches_of_evaluations_are_center_crops_and_those_of_training_are_drawn(vit):
    model = models.load(vit)
    rows = image_rows().assign(image=lambda table: [np.repeat(image, 2, axis=0) for image in table["image"]])
    task = tasks.from_frame(rows).fit(model)
    part = task.split("train")
    encoded = images.encode_images(models.processor(model), part, task.labels, "crop-flip")
    plain = task.encode(models.processor(model), part)
    reference = AutoImageProcessor.from_pretrained(vit)

    def processed(pictures):
        arrays = torch.tensor(np.array([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        return (arrays / 255 - torch.tensor(reference.image_mean)[:, None, None]) / torch.tensor(reference.image_std)[
            :, None, None
        ]

    chosen = [Image.fromarray(image) for image in part["image"].iloc[[4, 1]]]
    expected = processed([images.center_crop(image, 16) for image in chosen])
    # The processor multiplies by 1/255 in float32 where the reference divides: two roundings of numbers up to 1.
    torch.testing.assert_close(encoded.batch([4, 1])["pixel_values"], expected, rtol=0, atol=1e-6)
    # Squeezed to a square by the processor, not cropped.
    assert not torch.allclose(plain.batch([4, 1])["pixel_values"], expected, atol=1e-2)
    drawn = encoded.training_batch([4, 1], np.random.default_rng(3))
    generator = np.random.default_rng(3)
    crops = [images.crop_flip(image, 16, generator) for image in chosen]
    torch.testing.assert_close(drawn["pixel_values"], processed(crops), rtol=0, atol=1e-6)
    assert torch.equal(drawn["labels"], encoded.batch([4, 1])["labels"])
    other = encoded.training_batch([4, 1], np.random.default_rng(4))
    assert not torch.equal(other["pixel_values"], drawn["pixel_values"])
    same = plain.training_batch([4, 1], np.random.default_rng(3))
    assert torch.equal(same["pixel_values"], plain.batch([4, 1])["pixel_values"])


def test_runs_differ_by_the_setting_and_resume_with_the_same_crops(vit, tmp_path):
    task = tasks.from_frame(image_rows())
    method, options = LoRA(rank=2, lr=1e-2), {**FAST, "steps": 6, "root": tmp_path}
    plain = ls.train(vit, task, method, **options)
    cropped = ls.train(vit, task, method, **options, augment="crop-flip", keep_checkpoints=[3])
    assert "augment" not in plain.meta.settings
    assert cropped.meta.settings["augment"] == "crop-flip"
    assert plain.id == ls.train(vit, task, method, **options, augment="none").id != cropped.id
    assert losses(plain) != losses(cropped)
    again = ls.train(vit, task, method, **{**options, "root": tmp_path / "again"}, augment="crop-flip")
    assert losses(again) == losses(cropped)
    fork = ls.fork(cropped, models.load(vit, task), task, step=3, out=tmp_path / "fork", progress=False)
    assert losses(fork)[-3:] == losses(cropped)[-3:]


def losses(run) -> list[float]:
    return run.table.loc[run.table["quantity"] == "loss", "value"].to_list()


def test_an_opened_run_evaluates_the_crops_of_its_training(vit, tmp_path):
    task = tasks.from_frame(image_rows())
    run = ls.train(vit, task, LoRA(rank=2), **FAST, augment="crop-flip", root=tmp_path)
    opened = open_trained(run, vit, task, "last")
    assert opened.task.augment == "crop-flip"
    assert opened.task.hash == task.hash == run.meta.data_hash


def test_invalid_values_are_one_line(task, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^augment must be one of 'none', 'crop-flip', got 'crop'$"):
        Settings(steps=1, lr=1, head_lr=1, augment="crop")
    message = "augment must be 'none' for .*, which has no images, got 'crop-flip'"
    with pytest.raises(ValueError, match=message):
        ls.train("minilm", task, "lora", steps=1, augment="crop-flip", root=tmp_path)
    file = tmp_path / "sweep.toml"
    file.write_text('task = "sentiment/movies"\nmethod = "lora"\nsettings = {steps = 1, augment = "crop-flip"}\n')
    assert main(["sweep", str(file)]) == 2
    assert "augment must be 'none' for sentiment/movies, which has no images" in capsys.readouterr().err


def test_images_of_the_model_must_be_square(vit):
    processor = AutoImageProcessor.from_pretrained(vit, size={"height": 16, "width": 24})
    rows = pd.DataFrame({"image": [np.zeros((4, 4, 3), np.uint8)], "label": ["a"]})
    with pytest.raises(ValueError, match="augment requires a model of square images, got 24 x 16 pixels"):
        images.encode_images(processor, rows, ["a"], "crop-flip")
    assert len(images.encode_images(processor, rows, ["a"])) == 1


def test_the_command_line_has_the_setting(capsys):
    assert main(["train", "lora", "--help"]) == 0
    assert "--augment" in capsys.readouterr().out
