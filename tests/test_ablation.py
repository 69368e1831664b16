"""Ablation scores compared with separate evaluations of the whole model, for every model family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import FAMILIES, inputs, tiny
from torch import Tensor, nn

from lorascope.adapters import activation_patching
from lorascope.adapters.ablation import Scores, ablation_scores
from lorascope.adapters.delta import attach, attached_deltas
from lorascope.methods.alora import ALoRADelta, importance_score
from lorascope.schema import module_table

Loss = Callable[[dict[str, Tensor]], Tensor]


def adapted(family: str, targets: str | tuple[str, ...] = "all-linear", rank: int = 2, **sizes: int) -> nn.Module:
    """Return a tiny model whose adapters have an effect, with different components."""
    model = tiny(family, **sizes)
    chosen = module_table.match(module_table.describe(model), targets)
    attach(model, {name: ALoRADelta(model.get_submodule(name), rank, 2.0) for name in chosen})
    for seed, delta in enumerate(attached_deltas(model).values()):
        for factor in (delta.A, delta.B):
            nn.init.normal_(factor, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def batch_of(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    """Return inputs with labels; the last token of the first row is padding."""
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
    """Score by definition: one forward pass per set of enabled components; disabled ones are zero columns of B."""
    model.eval()
    deltas = attached_deltas(model)
    columns = {name: delta.B.clone() for name, delta in deltas.items()}

    def score(is_enabled: Callable[[str, int], bool]) -> float:
        for name, delta in deltas.items():
            for index in range(delta.rank):
                delta.B[:, index] = columns[name][:, index] * is_enabled(name, index)
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


def order(scores: Scores) -> list[int]:
    """Return all components from the least important to the most important; ties are in model order."""
    every = [importance_score(scores.full, scores.without[name], scores.only[name]) for name in scores.only]
    return np.argsort(np.concatenate(every).round(10), kind="stable").tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_separate_evaluations(family):
    model = adapted(family).double()
    batch, loss = batch_of(model), loss_of(model)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    wanted = one_by_one(model, loss, batch)
    found = ablation_scores(model, loss, batch)
    same(found, wanted, 1e-11)
    assert order(found) == order(wanted)
    every = np.concatenate([*wanted.without.values(), *wanted.only.values()])
    assert len(np.unique(every.round(11))) > 0.8 * len(every)  # otherwise the comparison would be trivial


def toy() -> nn.Module:
    """Return a tiny BERT in float64 with one component of zeros in each adapter of its first block."""
    model = adapted("bert").double()
    for name, delta in attached_deltas(model).items():
        if ".0." in name:
            nn.init.zeros_(delta.B[:, 1])
    return model


@torch.no_grad()
def test_component_of_zeros_has_the_scores_of_the_full_and_the_bare_model():
    model = toy()
    found = ablation_scores(model, loss_of(model), batch_of(model))
    for name in attached_deltas(model):
        inert = (found.without[name] == found.full, found.only[name] == found.none)
        assert [list(part) for part in inert] == [[False, ".0." in name]] * 2


@torch.no_grad()
def test_only_active_component_has_the_scores_of_the_bare_and_the_full_model():
    """The importance is then 2 S(M) - S(M without all components)."""
    model = toy()
    name, chosen = list(attached_deltas(model).items())[7]
    for delta in attached_deltas(model).values():
        delta.B[:, int(delta is chosen) :] = 0
    found = ablation_scores(model, loss_of(model), batch_of(model))
    assert found.without[name][0] == pytest.approx(found.none, abs=1e-12)
    assert found.only[name][0] == pytest.approx(found.full, abs=1e-12)
    assert abs(found.full - found.none) > 1e-6


def test_loss_increase_of_a_small_component_equals_its_first_order_change():
    model = toy()
    loss, batch = loss_of(model), batch_of(model)
    errors = []
    for shrink in (1e-2, 1e-1):
        for delta in attached_deltas(model).values():
            delta.B.data *= shrink
        model.zero_grad()
        loss(batch).backward()
        found = ablation_scores(model, loss, batch)
        effect = found.full - np.concatenate(list(found.without.values()))
        gradients = [-(delta.B.grad * delta.B).sum(0).detach().numpy() for delta in attached_deltas(model).values()]
        errors.append(np.linalg.norm(effect - np.concatenate(gradients)) / np.linalg.norm(effect))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_ablation_restores_the_model(family):
    model = adapted(family)
    model.train()
    next(iter(model.children())).eval()
    loss, batch = loss_of(model), batch_of(model)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    order, deltas, caches = list(model.state_dict()), attached_deltas(model), getattr(model.config, "use_cache", None)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    ablation_scores(model, loss, batch)
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == order
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert attached_deltas(model) == deltas
    assert getattr(model.config, "use_cache", None) == caches
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ablation_restores_the_model_after_an_error():
    model = adapted("bert")
    deltas, batch = attached_deltas(model), batch_of(model)
    times = iter(range(100))

    def loss(batch: dict[str, Tensor]) -> Tensor:
        value = model(**batch).loss
        if next(times) == 60:
            raise RuntimeError("out of memory")
        return value

    with pytest.raises(RuntimeError, match="out of memory"):
        ablation_scores(model, loss, batch)
    assert attached_deltas(model) == deltas
    assert not any("forward" in vars(module) for module in model.modules())


CASES = {
    "unequal numbers of copies": ("bert", "all-linear", {"rank": 5}, 3),
    "one row": ("llama", "all-linear", {}, 1),
    "an embedding that two stacks share": ("t5", ("embed", "q"), {}, 3),
    "an embedding of inputs that all rows share": ("bert", ("embed", "pos_embed", "v"), {}, 3),
    "a head": ("llama", ("head", "ffn_gate"), {}, 3),
    "one projection for words and positions": ("deberta-v2", ("k", "ffn_in"), {"share_att_key": True}, 3),
    "as many rows as positions": ("deberta-v2", "all-linear", {}, 16),
    "as many rows as heads": ("t5", "all-linear", {}, 4),
    "as many rows as tokens": ("llama", "all-linear", {}, 7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [2**19, 1])
def test_scores_in_special_cases_equal_separate_evaluations(case, most, monkeypatch):
    family, targets, settings, rows = CASES[case]
    monkeypatch.setitem(
        activation_patching.MOST_ELEMENTS, "cpu", most if case != "unequal numbers of copies" else 2 * 3 * 7 * 48
    )
    model = adapted(family, targets, **settings).double()
    batch, loss = batch_of(model, rows), loss_of(model)
    same(ablation_scores(model, loss, batch), one_by_one(model, loss, batch), 1e-11)


def test_modules_that_a_component_does_not_affect_are_not_recomputed():
    """Count calls of linears: earlier blocks are replayed, and later ones run once per stack of components."""
    model = adapted("bert", ("ffn_in",), num_hidden_layers=4)
    counts = {}
    for block in range(4):
        for part in ("attention.self.query", "output.dense"):
            module = model.get_submodule(f"bert.encoder.layer.{block}.{part}")
            counts[block, part] = 0
            module.forward = _counting(module, counts, (block, part))
    ablation_scores(model, loss_of(model), batch_of(model))
    # With adapters and without: the full batch, one row, and a pass per block; then one stack of components per block.
    for block in range(4):
        assert counts[block, "attention.self.query"] == 2 * (2 + 1 + block)
        assert counts[block, "output.dense"] == 2 * (2 + 1 + block + 1)


def _counting(module: nn.Module, counts: dict, key: tuple[int, str]) -> Callable[..., Tensor]:
    forward = module.forward

    def call(x: Tensor) -> Tensor:
        counts[key] += 1
        return forward(x)

    return call


class Overwriting(nn.Module):
    """A model that overwrites the output of its first module, the input of its second, later in the same pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.score = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        y += z
        return self.score(torch.tanh(self.third(y) + y)).square().mean()


def test_overwritten_outputs_are_not_replayed():
    torch.manual_seed(0)
    model = Overwriting().double()
    attach(model, {name: ALoRADelta(model.get_submodule(name), 2, 2.0) for name in ("first", "second", "third")})
    for delta in attached_deltas(model).values():
        nn.init.normal_(delta.B)
    batch = {"x": torch.randn(4, 6, dtype=torch.float64)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)

    with torch.no_grad():
        same(ablation_scores(model, loss, batch), one_by_one(model, loss, batch), 1e-11)


def test_components_of_zeros_need_no_pass():
    """All B are zero: only the full batch and one row run, with and without adapters."""
    model, passes = adapted("bert"), []
    for delta in attached_deltas(model).values():
        nn.init.zeros_(delta.B)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        passes.append(len(batch["input_ids"]))
        return model(**batch).loss

    ablation_scores(model, loss, batch_of(model))
    assert passes == [3, 1, 3, 1]
