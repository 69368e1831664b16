"""Tests of image tasks: all forms of an image, content of batches, and training, export and loading of a ViT."""

from __future__ import annotations

import io
from types import SimpleNamespace

import families
import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from PIL import Image
from tiny import inputs, tiny
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

import lorascope as ls
from lorascope.adapters.hidden_states import token_means
from lorascope.inputs import images, models, sources, tasks
from lorascope.methods import LoRA, NeFT

FAST = {"steps": 3, "batch_size": 8, "eval_every": 0, "eval_size": 8, "progress": False, "device": "cpu"}


def image_rows(rows: int = 60) -> pd.DataFrame:
    noise = np.random.default_rng(1)
    labels = ["left" if row % 3 else "right" for row in range(rows)]
    return pd.DataFrame({"image": [families.noise_image(noise, label) for label in labels], "label": labels})


def to_file_bytes(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    return families.folder(tmp_path_factory.mktemp("models") / "vit", "vit")


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Return a folder with one subfolder of images per label."""
    path = tmp_path_factory.mktemp("album")
    for number, row in enumerate(image_rows().itertuples()):
        (path / row.label).mkdir(exist_ok=True)
        (path / row.label / f"{number:03}.png").write_bytes(to_file_bytes(row.image))
    (path / "left" / "notes.txt").write_text("no image")
    return path


def test_all_forms_of_the_same_images_give_the_same_task(album, tmp_path):
    rows = image_rows()
    own = tasks.from_frame(rows)
    assert (own.kind, own.labels, own.classifies) == ("image", ("left", "right"), True)
    names = [f"{row.label}/{row.Index:03}.png" for row in rows.itertuples()]
    rows.assign(image=names).to_csv(album / "table.csv", index=False)
    stored = [{"bytes": to_file_bytes(image), "path": None} for image in rows["image"]]
    rows.assign(image=stored).to_parquet(tmp_path / "table.parquet")
    others = {
        "folder": tasks.load(album),
        "paths relative to a CSV": tasks.load(album / "table.csv"),
        "bytes in a Parquet": tasks.load(tmp_path / "table.parquet"),
        "PIL": tasks.from_frame(rows.assign(image=[Image.fromarray(image) for image in rows["image"]])),
        "another format": tasks.from_frame(rows.assign(image=[to_file_bytes(image, "bmp") for image in rows["image"]])),
        "another order": tasks.from_frame(rows.iloc[::-1]),
    }
    for form, task in others.items():
        assert task.hash == own.hash, form
        for split, part in own.splits.items():
            seen = [np.asarray(images.open_image(image)) for image in task.split(split)["image"]]
            np.testing.assert_array_equal(seen, np.stack(part["image"].to_list()), err_msg=form)
            assert task.split(split)["label"].to_list() == part["label"].to_list()


def test_copies_of_an_image_are_in_the_same_split():
    rows = image_rows()
    copies = pd.concat([rows, rows.assign(image=[to_file_bytes(image) for image in rows["image"]])])
    task = tasks.from_frame(copies)
    seen = [{images.digest_image(image) for image in part["image"]} for part in task.splits.values()]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 60


def test_batch_equals_the_output_of_the_processor(vit):
    model = models.load(vit)
    rows = image_rows().assign(group=["a", "b"] * 30)
    task = tasks.from_frame(rows).fit(model)
    part = task.split("train")
    ready = task.encode(models.processor(model), part)
    assert len(ready) == len(part)
    assert ready.groups == part["group"].to_list()
    batch = ready.batch([4, 1, 4])
    chosen = part["image"].iloc[[4, 1, 4]].to_list()
    own = AutoImageProcessor.from_pretrained(vit)(images=chosen, return_tensors="pt")["pixel_values"]
    assert own.shape == (3, 3, 16, 16)
    assert torch.equal(batch["pixel_values"], own)
    assert batch["labels"].tolist() == [task.labels.index(part["label"].iloc[row]) for row in (4, 1, 4)]


def test_gray_images_get_three_channels():
    gray = np.arange(0, 60, dtype=np.uint8).reshape(6, 10)
    found = np.asarray(images.open_image(gray))
    assert (found == gray[..., None]).all()
    assert found.shape == (6, 10, 3)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.png", FileNotFoundError, "row 1 of table: .*nowhere.png"),
        (b"GIF, or not", ValueError, "row 1 of table: image .*got bytes"),
        (np.zeros((4, 4, 3)), ValueError, r"image .*uint8 array of shape \(height, width\) .*got ndarray"),
        (None, ValueError, "row 1 of table: image .*got None"),
    ],
)
def test_value_that_is_not_an_image_raises_with_its_row(image, error, message):
    rows = image_rows(6).astype({"image": object})
    rows.at[0, "image"] = image
    with pytest.raises(error, match=message):
        tasks.from_frame(rows)


def test_task_that_does_not_fit_the_model_or_folder_is_rejected(album, tmp_path, vit):
    text = tasks.from_frame(pd.DataFrame({"text": [f"text {n}" for n in range(60)], "label": ["a", "b"] * 30}))
    with pytest.raises(ValueError, match=r"table with ViTForImageClassification.* has text"):
        text.fit(tiny("vit"))
    with pytest.raises(ValueError, match=r"table with BertForSequenceClassification.* has images"):
        tasks.from_frame(image_rows()).fit(tiny("bert"))
    with pytest.raises(ValueError, match=r"ViTModel.*pixel_values"):
        tasks.from_frame(image_rows()).fit(tiny("vit", "base"))
    tiny("vit").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"image processor .*bare.*preprocessor_config\.json"):
        models.processor(models.load(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"images from .*empty"):
        tasks.load(tmp_path / "empty")


def test_vit_trained_by_names_has_the_recorded_accuracy_and_the_logits_of_peft(vit, album, tmp_path):
    """The restored model has the recorded accuracy on the test images, and PEFT gives the same logits."""
    run = ls.train(vit, str(album), LoRA(lr=1e-2, rank=2), out=tmp_path / "run", **FAST)
    task = tasks.load(album)
    base = models.load(vit, task=task)
    run.restore(base)
    part = task.fit(base).split("test")
    pixels = ViTImageProcessor.from_pretrained(vit)(
        images=list(map(images.open_image, part["image"])), return_tensors="pt"
    )
    with torch.no_grad():
        logits = base.eval()(**pixels).logits
    correct = [base.config.id2label[int(number)] for number in logits.argmax(-1)] == part["label"].to_numpy()
    assert run.score.metric == correct.mean()
    folder = ls.export.to_peft(run, tmp_path / "peft")
    assert "AutoModelForImageClassification" in (folder / "README.md").read_text(encoding="utf-8")
    plain = AutoModelForImageClassification.from_pretrained(vit)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, folder).eval()(**pixels).logits
    torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-6)


def test_linear_probe_uses_the_mean_of_all_patches(vit, album, tmp_path):
    model = tiny("vit")
    given = inputs(model)
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states[1:]
    wanted = torch.stack(states, 1).double().mean(2).numpy()
    np.testing.assert_allclose(token_means(model, given)[""], wanted, rtol=1e-6, atol=1e-7)
    run = ls.train(vit, str(album), NeFT(select_by="probed", num_neurons=5), out=tmp_path / "run", **FAST)
    assert run.table.query("quantity == 'selected'")["value"].sum() == 5


def test_hub_dataset_with_an_image_column_gives_an_image_task():
    """Stand-in for a split with images as bytes in a column ``img``, class numbers, and a column of text."""
    rows = image_rows()
    image, words = type("Image", (), {}), SimpleNamespace(dtype="string")
    stored = [{"bytes": to_file_bytes(array), "path": None} for array in rows["image"]]
    table = pd.DataFrame({"img": stored, "title": "a photo", "label": (rows["label"] == "left").astype(int)})
    features = {"img": image(), "title": words, "label": SimpleNamespace(names=["right", "left"], dtype="int64")}
    part = SimpleNamespace(features=features, to_pandas=lambda: table)
    assert tasks.from_frame(sources._canonical(part, None, "dataset")).hash == tasks.from_frame(rows).hash


def test_hub_dataset_without_a_column_text_keeps_its_domain_as_group():
    table = pd.DataFrame({"sentence": ["good", "bad"] * 20, "domain": ["film", "music"] * 20, "label": [1, 0] * 20})
    kinds = {name: SimpleNamespace(dtype="string") for name in ("sentence", "domain")}
    part = SimpleNamespace(
        features=kinds | {"label": SimpleNamespace(names=["no", "yes"], dtype="int64")}, to_pandas=lambda: table.copy()
    )
    found = sources._canonical(part, None, "dataset")
    assert list(found) == ["text", "label", "domain"]
    assert found["label"].tolist() == ["yes", "no"] * 20
