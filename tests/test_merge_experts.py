"""Check of merged models with experts in one tensor: sound merges, and experts that a conversion exchanged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from merged import adapt
from safetensors.torch import load_file, save_file
from test_peft_experts import DOWN, GATE_UP, gpt_oss, mixtral
from torch import nn

from lorascope.diagnosis.merge import MergeCheck, check_merge
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load_adapter

EXPERTS = "model.layers.0.mlp.experts"


def merge(folder: Path, build: Callable[[], nn.Module], size: float = 1.0) -> None:
    """Write base, adapter and PEFT's merge; ``size`` multiplies the base."""
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter *= size
    base.save_pretrained(folder / "base")
    adapt(base, folder / "adapter", target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
        model.merge_and_unload().save_pretrained(folder / "merged")


def checked(folder: Path) -> MergeCheck:
    return check_merge(load_adapter(folder / "adapter", folder / "base"), PretrainedWeights(folder / "merged"))


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_merge_of_experts_is_sound(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    merge(tmp_path, build)
    check = checked(tmp_path)
    assert check.findings == ()
    assert sum(each.module.startswith(f"{EXPERTS}.") for each in check.modules) == 6


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_experts_swapped_in_one_tensor_are_named(size: float, tmp_path: Path) -> None:
    """The merged weights are right, but two experts have changed places in one tensor of the file.

    The change of a small base contains the other update, and the change of a large one does not.
    """
    merge(tmp_path, gpt_oss, size)
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    whole = tensors[f"{EXPERTS}.gate_up_proj"]
    assert whole.ndim == 3
    tensors[f"{EXPERTS}.gate_up_proj"] = whole[torch.tensor([2, 1, 0])].clone()
    save_file(tensors, file, {"format": "pt"})
    (finding,) = checked(tmp_path).findings
    assert finding.cause == "merge-experts-swapped"
    assert finding.message.startswith("2 of 14 modules: experts swapped")
    assert f"{EXPERTS}.0.gate_up_proj (that of {EXPERTS}.2.gate_up_proj)" in finding.message
    assert set(finding.modules) == {f"{EXPERTS}.{expert}.gate_up_proj" for expert in (0, 2)}
