"""The setting dtype: the weights that a run trains from, its id, and opening the run again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny import tiny

import lorascope as ls
from lorascope.experiments.trained_model import open_trained
from lorascope.inputs.computation import set_dtype
from lorascope.training.settings import Settings

OPTIONS = {"steps": 4, "batch_size": 4, "progress": False, "test_size": 20, "eval_size": 20}


def settings(**options: object) -> Settings:
    return Settings(steps=3, lr=1e-3, head_lr=1e-3, **options)  # type: ignore[arg-type]


def test_an_unknown_dtype_is_one_line_before_anything_is_loaded(task: ls.Task) -> None:
    with pytest.raises(ValueError, match=r"^dtype must be one of 'float32', 'bfloat16', 'float16', got 'fp8'$"):
        ls.train("no such model", task, "lora", steps=3, dtype="fp8")


def test_the_default_is_not_stored() -> None:
    assert "dtype" not in settings().to_dict()
    stored = settings(dtype="bfloat16").to_dict()
    assert stored["dtype"] == "bfloat16"
    assert Settings.read(stored) == settings(dtype="bfloat16")


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_weights_equal_those_that_transformers_loads(name: str, family: str, tmp_path: Path) -> None:
    """T5 keeps some weights in float32, and LLaMA the frequencies of its positions."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    reference = type(model).from_pretrained(tmp_path, dtype=getattr(torch, name))
    set_dtype(model, name)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    others = dict(reference.named_parameters()) | dict(reference.named_buffers())
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == others[key].dtype, key
        assert torch.equal(tensor, others[key]), key


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_run_trains_on_the_rounded_base_and_opens_on_it(name: str, bert: str, task: ls.Task, tmp_path: Path) -> None:
    options = OPTIONS | {"dtype": name, "keep_checkpoints": (2,), "root": tmp_path}
    run = ls.train(bert, task, ls.LoRA(rank=2), **options)
    model = ls.models.load(bert, task)
    again = ls.train(model, task, ls.LoRA(rank=2), **options)
    assert again.id == run.id  # a model in float32 is converted as one that is loaded by name
    assert {weight.dtype for key, weight in model.named_parameters() if ".delta." not in key} == {getattr(torch, name)}
    wide = ls.train(bert, task, ls.LoRA(rank=2), **OPTIONS | {"root": tmp_path})
    assert wide.id != run.id
    assert wide.meta.w0_hash != run.meta.w0_hash
    opened = open_trained(run, bert, task, "last")
    assert {weight.dtype for weight in opened.base.parameters()} == {getattr(torch, name)}
    forked = ls.fork(run, bert, task, step=2, progress=False)
    assert forked.meta.test.loss == run.meta.test.loss  # nothing was changed
    loss = run.table[run.table["quantity"] == "loss"]["value"]
    assert np.isfinite(loss).all()


def test_a_trained_model_is_not_converted(bert: str, task: ls.Task, tmp_path: Path) -> None:
    model = ls.models.load(bert, task)
    ls.train(model, task, "lora", **OPTIONS, out=tmp_path / "run")
    with pytest.raises(ValueError, match="cannot train a model twice"):
        ls.train(model, task, "lora", **OPTIONS, out=tmp_path / "other", dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_numbers_train_in_bfloat16(method: str, bert: str, tmp_path: Path) -> None:
    """Their labels are floats, of another dtype than the outputs."""
    table = pd.DataFrame({"text": [f"good {number}" for number in range(60)], "label": np.linspace(0, 1, 60)})
    task = ls.tasks.from_frame(table, "numbers")
    run = ls.train(bert, task, method, **OPTIONS, out=tmp_path / method, dtype="bfloat16")
    assert np.isfinite(run.meta.test.loss)


def test_images_train_in_bfloat16() -> None:
    """The model converts its pixels."""
    model = tiny("vit")
    set_dtype(model, "bfloat16")
    assert isinstance(model, transformers.PreTrainedModel)
    size, channels = model.config.image_size, model.config.num_channels
    assert model(pixel_values=torch.rand(2, channels, size, size)).logits.dtype == torch.bfloat16
