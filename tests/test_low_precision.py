"""Factors on a base of 16 bits: float32 as in PEFT, and trained like PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from tiny import inputs, tiny
from torch import nn

from lorascope.adapters.delta import attached_deltas, detach
from lorascope.methods import AdaLoRA, ALoRA, DoRA, FourierFT, HydraLoRA, LoRA, PiSSA, VeRA
from lorascope.methods.lora import LoRADelta

ADAPTERS = {
    "LoRA": LoRA(rank=2),
    "embedding": LoRA(rank=2, targets=("embed", "q")),
    "AdaLoRA": AdaLoRA(init_rank=2, target_rank=1, initial_steps=1, final_steps=1),
    "ALoRA": ALoRA(),
    "FourierFT": FourierFT(coefficients=8),
    "FourierFT, matrix": FourierFT(coefficients=200),
    "HydraLoRA": HydraLoRA(),
    "DoRA": DoRA(rank=2),
    "DoRA, dropout": DoRA(rank=2, dropout=0.1),
    "PiSSA": PiSSA(rank=2),
    "PiSSA, dropout": PiSSA(rank=2, dropout=0.1),
    "VeRA": VeRA(rank=4),
}
STEPS = 5
RATE = 5e-5
"""Learning rate that rounds to no change of 0.03 in bfloat16."""


def adamw_losses(model: nn.Module, factors: list[nn.Parameter]) -> list[float]:
    """Train these factors for five steps of AdamW, and return the losses."""
    optimizer = torch.optim.AdamW(factors, lr=RATE)
    batch = inputs(model)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).logits.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_train_in_float32_and_the_base_stays_as_it_was(name: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    method = copy.deepcopy(ADAPTERS[name])
    method.attach(model)
    assert model(**inputs(model)).logits.dtype == dtype
    factors = []
    for delta in attached_deltas(model).values():
        factors += list(delta.parameters())
        tensors = [*delta.parameters(), *delta.buffers()]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    before = [factor.detach().clone() for factor in factors]
    adamw_losses(model, factors)
    moved = [factor for factor, start in zip(factors, before, strict=True) if not torch.equal(factor, start)]
    assert moved
    detach(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key]), key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_training_on_a_bfloat16_base_equals_peft(family: str) -> None:
    """The operations and their order are the same, so the numbers are."""
    ours, theirs = (tiny(family).to(torch.bfloat16) for _ in range(2))
    LoRA(targets="all-linear", rank=3, alpha=5).attach(ours)
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(attached_deltas(ours))}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    pairs = []
    for seed, (name, delta) in enumerate(attached_deltas(ours).items()):
        layer = theirs.get_base_model().get_submodule(name)
        assert isinstance(delta, LoRADelta)
        nn.init.normal_(delta.B, std=0.1, generator=torch.Generator().manual_seed(seed))
        for factor, other in ((delta.A, layer.lora_A["default"].weight), (delta.B, layer.lora_B["default"].weight)):
            assert other.dtype == torch.float32
            other.data.copy_(factor.data)
            pairs.append((factor, other))
    factors, others = zip(*pairs, strict=True)
    assert adamw_losses(ours, list(factors)) == adamw_losses(theirs, list(others))
    for factor, other in pairs:
        assert torch.equal(factor, other)
