"""Methods of PEFT under the same names: the same factors give the same outputs, gradients and training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from tiny import inputs, tiny
from torch import Tensor, nn

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.methods.method import Method

pytestmark = pytest.mark.numbers
TARGETS = ["query", "value", "intermediate.dense"]
ROLES = ("q", "v", "ffn_in")
# Relative to the largest value. Training is in float64; the start is in float32, in which PEFT initializes PiSSA.
OUTPUTS, TRAINING = 1e-6, 1e-5


@dataclass(frozen=True)
class Twin:
    """A method, PEFT's configuration of the same name, and the pairs of their parameters in one layer."""

    method: Method
    config: Any
    pairs: Callable[[Any, Any], dict[str, tuple[Tensor, Tensor]]]


def lora_pairs(delta: Any, layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {"A": (delta.A, layer.lora_A["default"].weight), "B": (delta.B, layer.lora_B["default"].weight)}


def dora_pairs(delta: Any, layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    magnitude = delta.magnitude, layer.lora_magnitude_vector["default"].weight
    return lora_pairs(delta, layer) | {"magnitude": magnitude}


def vera_pairs(delta: Any, layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (getattr(delta, name), getattr(layer, f"vera_{name}")["default"]) for name in ("lambda_b", "lambda_d")
    }


def lora_config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options)


OWN: dict[str, Any] = {"rank": 4, "alpha": 6.0, "targets": ROLES}
TWINS = {
    "rslora": Twin(ls.LoRA(rslora=True, **OWN), lora_config(use_rslora=True), lora_pairs),
    "dora": Twin(ls.DoRA(**OWN), lora_config(use_dora=True), dora_pairs),
    "pissa": Twin(ls.PiSSA(**OWN), lora_config(init_lora_weights="pissa"), lora_pairs),
    "vera": Twin(
        ls.VeRA(rank=8, targets=ROLES, projection_seed=3),
        peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=3),
        vera_pairs,
    ),
}


@pytest.fixture(params=TWINS)
def twins(request) -> tuple[nn.Module, nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """Our model, PEFT's model with the same factors, and the pairs of trained parameters by name."""
    twin = TWINS[request.param]
    ours = tiny("bert")
    theirs = peft.get_peft_model(copy.deepcopy(ours), twin.config)
    twin.method.attach(ours)
    pairs = {}
    for module, delta in attached_deltas(ours).items():
        layer = theirs.base_model.model.get_submodule(module)
        for name, (mine, other) in twin.pairs(delta, layer).items():
            pairs[f"{module}.{name}"] = mine, other
    trained = {id(other) for _, other in pairs.values()}
    for model in (ours, theirs):
        model.eval().double()
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained | {id(mine) for mine, _ in pairs.values()})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, (mine, other) in pairs.items():
            if name.endswith((".B", ".lambda_b")) and not other.any():  # a zero factor has no gradient to compare
                other.normal_(0, 0.02, generator=generator)
            mine.copy_(other)
    return ours, theirs, pairs


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


def test_same_factors_give_the_same_outputs_and_gradients(twins) -> None:
    ours, theirs, pairs = twins
    batch = inputs(ours)
    assert far(ours(**batch).logits, theirs(**batch).logits) <= OUTPUTS
    for model in (ours, theirs):
        loss_of(model, batch).backward()
    largest = max(float(other.grad.abs().max()) for _, other in pairs.values())
    for name, (mine, other) in pairs.items():
        assert float((mine.grad - other.grad).abs().max()) <= OUTPUTS * largest, name


def test_training_of_forty_steps_ends_at_the_same_weights(twins) -> None:
    ours, theirs, pairs = twins
    models = [(ours, [mine for mine, _ in pairs.values()]), (theirs, [other for _, other in pairs.values()])]
    for model, parameters in models:
        # SGD has steps proportional to the gradient; Adam divides by roots of squares that round to zero.
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        for step in range(40):
            optimizer.zero_grad()
            loss_of(model, inputs(model, batch=4, seed=step)).backward()
            optimizer.step()
    batch = inputs(ours)
    assert far(ours(**batch).logits, theirs(**batch).logits) <= TRAINING
    for name, (mine, other) in pairs.items():
        assert far(mine, other) <= TRAINING, name
