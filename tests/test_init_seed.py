"""Tests of a shared initial A: ``LoRA.init_seed``, and its effect in a toy network."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny
from torch import nn

from lorascope.adapters.delta import attach, attached_deltas
from lorascope.analysis.factor_embeddings import build_factor_sets
from lorascope.analysis.factor_sharing import sharedness
from lorascope.methods import LoRA
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import config, from_config
from lorascope.runs.layout import identify
from lorascope.updates import LowRank


def started(family: str, seed: int, **fields: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the random factors of a freshly adapted model, and the next draw of the global generator."""
    model = tiny(family)
    torch.manual_seed(seed)
    LoRA(targets=("all-linear", "embed"), **fields).attach(model)
    found = {
        f"{module}/{name}": factor.detach().clone()
        for module, delta in attached_deltas(model).items()
        for name, factor in delta.factors().items()
    }
    return found, torch.rand(3)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_init_seed_gives_factors_of_that_seed_and_keeps_the_global_generator(family):
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


def test_lora_without_init_seed_keeps_its_old_run_id():
    assert "init_seed" not in config(LoRA())
    assert identify(config(LoRA())) == "e424cea0bc57"  # computed before the field existed
    assert config(LoRA(init_seed=0))["init_seed"] == 0
    assert LoRA().label() == "LoRA"
    assert LoRA(init_seed=3).label() == "LoRA, init_seed 3"
    for method in (LoRA(), LoRA(init_seed=3)):
        assert from_config(config(method)) == method


class Residual(nn.Module):
    """Eight blocks x + tanh(W x)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def toy_updates(same_start: bool) -> dict[str, dict[str, LowRank]]:
    """Train adapters for three tasks, each a rank-2 change of every block, and for the mean of the tasks."""
    torch.manual_seed(0)
    base = Residual()
    x = torch.randn(64, 64)
    teachers = [copy.deepcopy(base) for _ in range(3)]
    for teacher in teachers:
        for block in teacher.blocks:
            block.weight.data += 0.05 * torch.randn(64, 2) @ torch.randn(2, 64)
    with torch.no_grad():
        answers = [teacher(x) for teacher in teachers]
    tasks = [*answers, torch.stack(answers).mean(0)]
    found = {}
    for number, answer in enumerate(tasks):
        student = copy.deepcopy(base).requires_grad_(False)
        generator = torch.Generator().manual_seed(1 if same_start else number)
        attach(
            student, {f"blocks.{i}": LoRADelta(block, 4, generator=generator) for i, block in enumerate(base.blocks)}
        )
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            (student(x) - answer).square().mean().backward()
            optimizer.step()
        found[str(number)] = {name: delta.update() for name, delta in attached_deltas(student).items()}
    return found


def test_toy_network_shares_a_only_with_a_shared_initialization():
    """With a shared start, A's cosine between tasks exceeds B's; with separate starts, A's cosine is near zero."""
    found = {}
    for same in (True, False):
        updates = toy_updates(same)
        for factor in ("A", "B"):
            found[factor, same] = sharedness(build_factor_sets(updates, {run: run for run in updates}, (factor,)))
    assert found["A", True]["cosine"] > found["B", True]["cosine"] + 0.3
    assert found["A", True]["sharedness"] == 1
    assert abs(found["A", False]["cosine"]) < 0.05
    assert found["A", False]["sharedness"] < 0.5
