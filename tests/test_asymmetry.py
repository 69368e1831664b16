"""One initial A for several runs, the toy net that shows what that alone draws, and the probe that asks for it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny

from lorascope.delta import adapted
from lorascope.layout import identify
from lorascope.method import config, from_config
from lorascope.methods import LoRA


def started(family: str, seed: int, **fields: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The random factors of a freshly adapted model, and what the global generator draws next."""
    model = tiny(family)
    torch.manual_seed(seed)
    LoRA(targets=("all-linear", "embed"), **fields).attach(model)
    found = {
        f"{module}/{name}": factor.detach().clone()
        for module, delta in adapted(model).items()
        for name, factor in delta.factors().items()
    }
    return found, torch.rand(3)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_init_seed_draws_what_a_run_of_that_seed_draws_and_leaves_the_global_generator_alone(family):
    torch.manual_seed(5)
    untouched = torch.rand(3)
    fixed, after = started(family, seed=5, init_seed=11)
    own, moved = started(family, seed=11)
    other, _ = started(family, seed=5)
    assert torch.equal(after, untouched)
    assert not torch.equal(moved, torch.rand(3))
    assert fixed.keys() == own.keys()
    for name, factor in fixed.items():
        assert torch.equal(factor, own[name])
        assert torch.equal(factor, other[name]) != factor.any()


def test_a_run_without_init_seed_keeps_the_identity_it_had_before_there_was_one():
    assert "init_seed" not in config(LoRA())
    assert identify(config(LoRA())) == "e424cea0bc57"  # as computed before the field was there
    assert config(LoRA(init_seed=0))["init_seed"] == 0
    assert LoRA().label() == "LoRA"
    assert LoRA(init_seed=3).label() == "LoRA, init_seed 3"
    for method in (LoRA(), LoRA(init_seed=3)):
        assert from_config(config(method)) == method
