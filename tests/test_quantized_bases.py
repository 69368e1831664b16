"""Adapters on 4-bit and 8-bit weights of bitsandbytes: updates as always, weights only if they are dequantized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

import lorascope as ls
from lorascope.observe import norms

# Not an extra of the project: where it is installed, every import of PEFT loads it, which takes time and prints a line.
bitsandbytes = pytest.importorskip("bitsandbytes")
MODULE = "up"


class Model(nn.Module):
    """One quantized layer and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        plain = nn.Linear(16, 8)
        if kind == "4 bits":
            self.up = bitsandbytes.nn.Linear4bit(16, 8, quant_type="nf4", compute_dtype=torch.float32)
        else:
            self.up = bitsandbytes.nn.Linear8bitLt(16, 8, has_fp16_weights=False)
        self.up.weight = type(self.up.weight)(plain.weight.data, requires_grad=False)
        self.up.bias = plain.bias
        self.up.to("cpu")  # quantizes it
        self.down = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def train(kind: str, folder: Path, observer: norms) -> tuple[ls.Run, Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes warns about its slower paths on a CPU
        model = peft.get_peft_model(Model(kind), peft.LoraConfig(r=2, target_modules=[MODULE]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with ls.record(model, optimizer, folder, [observer]) as recorder:
            for _ in range(3):
                loss = model(torch.randn(5, 16)).square().mean()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)
                optimizer.zero_grad()
    return ls.load(folder), model.base_model.model.up


def last(run: ls.Run, quantity: str) -> float:
    rows = run.table[(run.table["quantity"] == quantity) & (run.table["module"] == MODULE)]
    return float(rows.loc[rows["step"].idxmax(), "value"]) if len(rows) else np.nan


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_norms_on_a_quantized_weight(kind: str, tmp_path: Path) -> None:
    run, layer = train(kind, tmp_path / "packed", norms(every=1))
    update = layer.get_delta_weight("default").detach()
    weight = dequantize_module_weight(layer.base_layer)
    assert weight.shape == update.shape == (8, 16)
    assert last(run, "update_norm") == pytest.approx(float(update.norm()), rel=1e-6)
    assert last(run, "rank") == 2
    assert np.isnan(last(run, "weight_norm"))
    assert np.isnan(last(run, "relative_update"))
    whole, _ = train(kind, tmp_path / "whole", norms(every=1, dequantize=True))
    assert last(whole, "update_norm") == last(run, "update_norm")  # so the recorder has not changed the training
    assert last(whole, "weight_norm") == pytest.approx(float((weight + update).norm()), rel=1e-6)
    assert last(whole, "relative_update") == pytest.approx(float(update.norm() / weight.norm()), rel=1e-6)
