"""Ablation scores against one evaluation of the whole model after the other, on every family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import FAMILIES, inputs, tiny
from torch import Tensor, nn

from lorascope import names
from lorascope.ablation import Scores, ablation_scores
from lorascope.delta import adapted, attach
from lorascope.methods.alora import ALoRADelta

Loss = Callable[[dict[str, Tensor]], Tensor]


def gated(family: str, targets: str | tuple[str, ...] = "all-linear", rank: int = 2, **sizes: int) -> nn.Module:
    """A tiny model of a family whose adapters have an effect, no two components the same."""
    model = tiny(family, **sizes)
    chosen = names.match(names.describe(model), targets)
    attach(model, {name: ALoRADelta(model.get_submodule(name), rank, 2.0) for name in chosen})
    for seed, delta in enumerate(adapted(model).values()):
        for factor in (delta.A, delta.B):
            nn.init.normal_(factor, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def batch_of(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    """Inputs with labels, the last token of the first row being padding."""
    batch = inputs(model, batch=rows)
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    generator = torch.Generator().manual_seed(1)
    if "decoder_input_ids" in batch or hasattr(model, "lm_head"):
        return batch | {"labels": batch["input_ids"]}
    return batch | {"labels": torch.randint(2, (rows,), generator=generator)}


def loss_of(model: nn.Module) -> Loss:
    return lambda batch: model(**batch).loss


@torch.no_grad()
def one_by_one(model: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> Scores:
    """The definition: a whole forward pass for every set of gates, a closed gate being a column of zeros in B."""
    model.eval()
    deltas = adapted(model)
    columns = {name: delta.B.clone() for name, delta in deltas.items()}

    def score(gate: Callable[[str, int], bool]) -> float:
        for name, delta in deltas.items():
            for index in range(delta.rank):
                delta.B[:, index] = columns[name][:, index] * gate(name, index)
        return -float(loss(batch))

    without, only = {}, {}
    for name, delta in deltas.items():
        each = range(delta.rank)
        without[name] = np.array([score(lambda *at, off=(name, i): at != off) for i in each])
        only[name] = np.array([score(lambda *at, on=(name, i): at == on) for i in each])
    none = score(lambda *_: False)
    return Scores(score(lambda *_: True), none, without, only)


def same(found: Scores, wanted: Scores, bound: float = 1e-5) -> None:
    assert found.full == pytest.approx(wanted.full, abs=bound)
    assert found.none == pytest.approx(wanted.none, abs=bound)
    for mine, other in ((found.without, wanted.without), (found.only, wanted.only)):
        assert mine.keys() == other.keys()
        for name in other:
            assert mine[name] == pytest.approx(other[name], abs=bound), name


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_evaluation_after_the_other(family):
    model = gated(family).double()
    batch, loss = batch_of(model), loss_of(model)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    wanted = one_by_one(model, loss, batch)
    same(ablation_scores(model, loss, batch), wanted, 1e-11)
    every = np.concatenate([*wanted.without.values(), *wanted.only.values()])
    assert len(np.unique(every.round(11))) > 0.8 * len(every)  # else the comparison would say little
