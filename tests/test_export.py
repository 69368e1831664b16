"""Export to PEFT, compared with PEFT itself: adapted modules, ranks, scales and logits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import tiny_folder
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from planted import SPECTRA, low_rank, plant, plant_spectra
from safetensors.numpy import load_file
from test_cli import complaint, modules_after, run
from test_loading import adapted, deltas, save
from tiny import inputs, tiny
from tolerance import TINY, rounding
from torch import nn

import lorascope as ls
from lorascope.adapters import delta
from lorascope.adapters.delta import Delta, host_weight
from lorascope.export import rank_pattern, to_peft
from lorascope.export.peft_lora import drop_unused
from lorascope.formats.peft_config import WEIGHTS
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, LoRA, PiSSA
from lorascope.methods.method import Method, train_adapters
from lorascope.runs.loading import load
from lorascope.runs.lora_config import lora_keywords, peft_keywords
from lorascope.schema import module_table
from lorascope.updates import LowRank

FAST = {"steps": 4, "batch_size": 8, "eval_every": 2, "eval_size": 16, "progress": False, "device": "cpu"}


def layers(model: Any) -> dict[str, tuple[int, float]]:
    """Return rank and scale of every module that PEFT adapts."""
    found = model.base_model.model.named_modules()
    return {name: (m.r["default"], m.scaling["default"]) for name, m in found if hasattr(m, "get_delta_weight")}


# -- the configuration ----------------------------------------------------------------------------------------------


def drawn(rank: int, scale: float = 1.0, seed: int = 0, size: int = 32) -> LowRank:
    draw = np.random.default_rng(seed)
    return LowRank(draw.standard_normal((size, rank)), draw.standard_normal((rank, size)), scale)


def configured(tmp_path: Path, model: nn.Module, ranks: dict[str, int], scales: dict[str, float]) -> dict[str, Any]:
    """Return PEFT's keywords for a run that adapted a model with these ranks and scales."""
    description = module_table.describe(model).astype(object)
    known = description.where(description.notna(), None).to_dict("records")
    found = plant(tmp_path, "run", {}, modules=known)
    return peft_keywords(found, ranks, {name: drawn(rank, scales[name]) for name, rank in ranks.items()})


def test_peft_keywords_of_similar_names_keep_each_rank(tmp_path: Path) -> None:
    """Fourteen layers with a rank and scale per module, some of rank 0; PEFT adapts exactly these."""
    model = tiny("llama", num_hidden_layers=14)
    every = [name for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj", "k_proj"))]
    ranks = {name: number % 5 for number, name in enumerate(every)}
    scales = {name: (1 + number % 7) / 3 for number, name in enumerate(every)}
    keywords = configured(tmp_path, model, ranks, scales)
    assert json.loads(json.dumps(keywords)) == keywords
    expected = {name: (rank, scales[name]) for name, rank in ranks.items() if rank}
    assert len(expected) < len(every)
    assert layers(adapted(model, **keywords)) == expected


class Nested(nn.Module):
    """Modules whose names end other names, or differ only where a dot matches any character."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(12))
        self.x = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(12))})
        self.layer_1 = nn.ModuleDict({"q": nn.Linear(8, 8)})


@pytest.mark.parametrize("whole", [False, True], ids=["outer ones", "all"])
def test_peft_keywords_of_a_name_that_ends_another_are_exact(whole: bool, tmp_path: Path) -> None:
    model = Nested()
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = every if whole else [name for name in every if not name.startswith("x.")]
    ranks = {name: 1 + number % 4 for number, name in enumerate(chosen)}
    scales = {name: 0.5 + number / 8 for number, name in enumerate(chosen)}
    keywords = configured(tmp_path, model, ranks, scales)
    expected = {name: (rank, scales[name]) for name, rank in ranks.items()}
    assert layers(adapted(model, **keywords)) == expected
    # Full names, unless PEFT would match "layer.1.q" to the end of "x.layer.1.q".
    assert isinstance(keywords["target_modules"], list if whole else str)


@pytest.mark.parametrize(("alpha", "rank"), [(1.0, 49), (8.0, 8), (32.0, 7), (0.1, 3), (16.0, 49), (6.5, 11)])
def test_peft_keywords_alpha_preserves_the_scale(alpha: float, rank: int, tmp_path: Path) -> None:
    run = plant(tmp_path, "run", {}, factors={"h.0.q": low_rank(1.0)})
    found = peft_keywords(run, {"h.0.q": rank}, {"h.0.q": drawn(rank, alpha / rank)})["lora_alpha"]
    assert found / rank == alpha / rank
    assert found == alpha


# -- the budget -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spectral(tmp_path: Path) -> ls.Run:
    return plant_spectra(tmp_path)


def pattern_ranks(keywords: dict[str, Any], targets: list[str]) -> dict[str, int]:
    """Return the ranks that PEFT reads."""
    config = peft.LoraConfig(**keywords)
    return {name: config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) for name in targets}


def peft_targets(keywords: dict[str, Any], modules: Iterable[str]) -> set[str]:
    """Return the modules that PEFT adapts."""
    config = peft.LoraConfig(**keywords)
    return {name for name in modules if check_target_module_exists(config, name)}


_PARTS = ["attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"]
BERT = [f"bert.encoder.layer.{layer}.{part}" for layer in range(3) for part in _PARTS]
BERT += ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize("seed", range(40))
def test_ends_of_names_mean_the_same_modules_and_ranks_to_peft(seed: int) -> None:
    """Draw roles, and modules of one rank or several: PEFT must adapt exactly these, with these ranks and alphas."""
    draw = np.random.default_rng(seed)
    roles = draw.choice(["query", "key", "output.dense", "intermediate.dense", "dense", "classifier"], 3)
    targets = [name for name in BERT if name.endswith(tuple(roles)) and (seed % 2 or draw.random() < 0.8)]
    ranks = {name: int(draw.integers(1, 4)) if seed % 3 else 1 + len(name) % 3 for name in targets}
    alphas = {name: float(draw.choice([4.0, 8.0])) for name in targets}
    keywords = lora_keywords(ranks, alphas, BERT)
    config = peft.LoraConfig(**keywords)
    assert peft_targets(keywords, BERT) == set(targets)
    assert pattern_ranks(keywords, targets) == ranks
    for name in targets:
        assert config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha) == alphas[name]


def test_one_end_names_all_modules_of_a_role() -> None:
    queries = [name for name in BERT if name.endswith("query")]
    keywords = lora_keywords(dict.fromkeys(queries, 3), dict.fromkeys(queries, 1.0), BERT)
    assert keywords["target_modules"] == ["query"]
    dense = [name for name in BERT if name.endswith("intermediate.dense")]
    ranks = dict.fromkeys(queries, 3) | dict.fromkeys(dense, 5)
    keywords = lora_keywords(ranks, dict.fromkeys(ranks, 1.0), BERT)
    assert keywords["target_modules"] == ["query", "intermediate.dense"]
    assert keywords["rank_pattern"] == {r"intermediate\.dense": 5}


@pytest.mark.parametrize("budget", [*range(2, 11), 0.1, 0.5, 0.75, 1.0])
def test_rank_pattern_budget_keeps_the_largest_singular_values(budget: float, spectral: ls.Run) -> None:
    """Brute force: select one component after another, the first of equal ones, so that the energy is largest."""
    count = int(budget) if budget >= 2 else round(budget * 10)
    pool = [(sigma, name) for name, spectrum in SPECTRA.items() for sigma in spectrum]
    expected = dict.fromkeys(SPECTRA, 0)
    for _ in range(count):
        best = max(range(len(pool)), key=lambda i: (pool[i][0], -i))
        expected[pool.pop(best)[1]] += 1
    keywords = rank_pattern(spectral, budget)
    targets = peft_targets(keywords, SPECTRA)
    assert targets == {name for name, rank in expected.items() if rank}
    found = pattern_ranks(keywords, sorted(targets))
    assert found == {name: rank for name, rank in expected.items() if rank}
    assert sum(found.values()) == count


def test_rank_pattern_without_budget_has_the_ranks_of_the_run(spectral: ls.Run) -> None:
    assert rank_pattern(spectral) == spectral.lora_config() == rank_pattern(spectral, 1)
    assert pattern_ranks(rank_pattern(spectral), list(SPECTRA)) == spectral.ranks()


def test_rank_pattern_small_budget_keeps_one_component(spectral: ls.Run) -> None:
    assert rank_pattern(spectral, 0.01)["target_modules"] == ["h.0.q"]


def test_rank_pattern_rank_beyond_the_matrix_has_zero_energy(tmp_path: Path) -> None:
    wide = drawn(6, size=4)
    run = plant(tmp_path, "run", {}, factors={"h.0.q": (wide.B, wide.A), "h.1.q": low_rank(1e-3)})
    assert pattern_ranks(rank_pattern(run, 1.0), ["h.0.q", "h.1.q"]) == {"h.0.q": 6, "h.1.q": 1}
    assert pattern_ranks(rank_pattern(run, 5), ["h.0.q", "h.1.q"]) == {"h.0.q": 4, "h.1.q": 1}


def test_rank_pattern_ties_keep_the_first_module(tmp_path: Path) -> None:
    chosen = [f"h.{layer}.q" for layer in range(40)]
    run = plant(tmp_path, "run", {}, factors=dict.fromkeys(chosen, low_rank(2.0, 2.0)))
    keywords = rank_pattern(run, 31)
    assert peft_targets(keywords, chosen) == set(chosen[:16])
    assert pattern_ranks(keywords, chosen[:16]) == dict.fromkeys(chosen[:15], 2) | {chosen[15]: 1}


@pytest.mark.parametrize("budget", [0, -1, 1.5, 2.5, 11, float("nan"), float("inf")])
def test_rank_pattern_invalid_budget_raises(budget: float, spectral: ls.Run) -> None:
    with pytest.raises(ValueError, match=rf"^budget must be .* to 10, got {budget:g}$") as raised:
        rank_pattern(spectral, budget)
    assert "\n" not in str(raised.value)


def test_rank_pattern_of_nan_raises(tmp_path: Path) -> None:
    run = plant(tmp_path, "run", {}, factors={"h.0.q": low_rank(1.0), "h.1.q": low_rank(float("nan"))})
    with pytest.raises(ValueError, match=r"h\.1\.q must be finite, got NaN"):
        rank_pattern(run, 0.5)


def test_rank_pattern_of_an_adapter_folder(tmp_path: Path) -> None:
    """The spectra of PEFT's own matrices select the components, and each module keeps its alpha."""
    alphas = {"q_proj": 6, "k_proj": 10}
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"k_proj": 10}}
    model = save(tmp_path, target_modules=["q_proj", "k_proj"], **config)
    ranks = {name: rank for name, (rank, _) in layers(model).items()}
    sigma = {name: np.linalg.svd(dense, compute_uv=False)[: ranks[name]] for name, dense in deltas(model).items()}
    bar = np.sort(np.concatenate(list(sigma.values())))[-11]
    kept = {name: int((values >= bar).sum()) for name, values in sigma.items()}
    again = adapted(tiny("llama"), **rank_pattern(load(tmp_path), 0.5))
    expected = {name: (rank, alphas[name.rpartition(".")[2]] / rank) for name, rank in kept.items() if rank}
    assert layers(again) == expected
    assert any(rank < ranks[name] for name, (rank, _) in expected.items())
    assert sum(rank for rank, _ in layers(again).values()) == 11


@pytest.mark.parametrize(("alpha", "rslora"), [(16, False), (0.3, False), (6, True)])
def test_rank_pattern_of_one_alpha_needs_no_alpha_pattern(alpha: float, rslora: bool, tmp_path: Path) -> None:
    """PEFT scales every module by alpha / rank, with alpha = scale * rank of the adapter, also of rsLoRA."""
    save(tmp_path, target_modules=["q_proj", "v_proj"], r=5, lora_alpha=alpha, use_rslora=rslora)
    run = load(tmp_path)
    keywords = rank_pattern(run, 0.4)
    assert keywords["alpha_pattern"] == {}
    assert keywords["lora_alpha"] == (alpha * 5**0.5 if rslora else alpha)
    again = layers(adapted(tiny("llama"), **keywords))
    assert len({rank for rank, _ in again.values()}) > 1
    assert again == {name: (rank, keywords["lora_alpha"] / rank) for name, (rank, _) in again.items()}


def test_keywords_of_two_alphas_are_no_finding(tmp_path: Path) -> None:
    """Some modules with their own rank have the common alpha, which must not look forgotten (LS011)."""
    ranks_and_alphas = {"q_proj": (1, 8), "k_proj": (3, 16), "v_proj": (3, 16), "o_proj": (6, 16)}
    expected = {}
    for layer in range(2):
        for role, (rank, alpha) in ranks_and_alphas.items():
            expected[f"model.layers.{layer}.self_attn.{role}"] = rank, alpha / rank
    ranks = {name: rank for name, (rank, _) in expected.items()}
    alphas = {name: rank * scale for name, (rank, scale) in expected.items()}
    model = save(tmp_path, **lora_keywords(ranks, alphas, ranks))
    assert layers(model) == expected
    assert "LS011" not in {finding.id for finding in ls.diagnose(load(tmp_path))}


def test_rank_pattern_of_a_residual_has_the_alpha_that_trained(bert: str, task: Any, tmp_path: Path) -> None:
    """The update B A - B_0 A_0 has twice the rank that alpha belongs to."""
    _, run = trained(bert, task, PiSSA(rank=2, alpha=6, lr=0.05), tmp_path / "run", steps=1)
    assert max(ls.export.select_components(run, 0.9).ranks.values()) > 2
    keywords = rank_pattern(run, 0.9)
    assert (keywords["lora_alpha"], keywords["alpha_pattern"]) == (6, {})


# -- the adapter ----------------------------------------------------------------------------------------------------


def by_the_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the model by the code in the folder's README."""
    snippet = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet
    monkeypatch.chdir(out.parent)
    scope: dict[str, Any] = {}
    exec(snippet[1], scope)
    return scope["model"].eval()


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """Return the largest difference of logits in float64, relative to the largest logit."""
    batch = inputs(ours)
    with torch.no_grad():
        expected, found = (model.double()(**batch).logits for model in (ours, theirs))
    assert expected.shape == found.shape
    return float((expected - found).abs().max() / expected.abs().max())


def trained(folder: str, task: Any, method: Method, out: Path, **settings: Any) -> tuple[nn.Module, ls.Run]:
    model = models.load(folder, task=task)
    return model, ls.train(model, task, method, out=out, **FAST | settings)


@dataclass(kw_only=True)
class Early(LoRA):
    """LoRA whose best state is after two steps."""

    def settled(self, step: Any) -> bool:
        return step.finished == 2


def test_to_peft_best_state_differs_from_last(
    bert: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, run = trained(bert, task, Early(lr=0.05, head_lr=0.05), tmp_path / "run")
    best = models.load(bert, task=task)
    run.restore(best, state="best", method=Early())
    theirs = by_the_card(to_peft(run, tmp_path / "best", state="best"), monkeypatch)
    assert distance(best, theirs) < 1e-9
    assert distance(last, theirs) > 1e-3


@dataclass(kw_only=True)
class Beneath(LoRA):
    """LoRA that also trains some of the adapted modules, and no head."""

    beneath: tuple[str, ...] = ()

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".delta." in name or name.rpartition(".")[0] in self.beneath)


@pytest.mark.parametrize(
    ("family", "head", "beneath"),
    [
        ("bert", "classification", ()),
        ("bert", "classification", ("bert.encoder.layer.1.attention.self.query",)),
        ("gpt2", "causal", ("transformer.h.0.mlp.c_fc", "transformer.wpe")),
    ],
    ids=["nothing", "linear", "conv1d and embedding"],
)
def test_to_peft_merges_adapters_of_trained_weights(
    family: str, head: str, beneath: tuple[str, ...], task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves an adapter or a weight, and must not expect a head that did not train."""
    folder = tiny_folder(tmp_path / "base", family, head)
    method = Beneath(targets=("q", "ffn_in", "pos_embed"), beneath=beneath, lr=0.05)
    ours, run = trained(folder, task, method, tmp_path / "run")
    theirs = by_the_card(to_peft(run, tmp_path / "adapter"), monkeypatch)
    assert distance(ours, models.load(folder, task=task)) > 1e-3
    assert distance(ours, theirs) < rounding(terms=TINY)
    adapted = {name.partition("[")[0] for name in run.ranks()}  # PEFT adapts a part with its whole weight
    assert set(layers(theirs)) == adapted - set(beneath)
    assert "trained head" not in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_to_peft_reads_an_embedding_that_started_small(
    bert: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = LoRA(rank=2, targets=("embed", "q"), embedding_init="linear", lr=0.05)
    ours, run = trained(bert, task, method, tmp_path / "run")
    theirs = by_the_card(to_peft(run, tmp_path / "adapter"), monkeypatch)
    assert distance(ours, models.load(bert, task=task)) > 1e-3
    assert distance(ours, theirs) < 1e-9
    assert layers(theirs) == dict.fromkeys(run.ranks(), (2, 4.0))


class Triple(Delta):
    """scale * B diag(diagonal) A."""

    def __init__(self, host: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        outer, inner = host_weight(host).shape
        self.scale = scale
        self.A, self.B = nn.Parameter(torch.randn(rank, inner) / 5), nn.Parameter(torch.randn(outer, rank) / 5)
        self.diagonal = nn.Parameter(torch.ones(rank))

    def weight(self) -> torch.Tensor:
        return self.scale * (self.B * self.diagonal) @ self.A

    @property
    def rank(self) -> int:
        return int((self.diagonal != 0).sum())

    def update(self) -> LowRank:
        return LowRank((self.B * self.diagonal).detach().numpy().copy(), self.A.detach().numpy().copy(), self.scale)


@dataclass(kw_only=True)
class Masking(Method):
    """Method that masks ``number % 4`` components of module ``number``, and has state by module name."""

    lr: float = 0.05
    head_lr: float = 0.05

    def attach(self, model: nn.Module) -> None:
        hosts = module_table.match(module_table.describe(model), ("all-linear", "embed"))
        delta.attach(model, {name: Triple(model.get_submodule(name), 3, 0.75) for name in hosts})
        self.scores_ = {name: torch.zeros(3) for name in hosts}
        train_adapters(model)

    def after_step(self, step: Any) -> None:
        with torch.no_grad():
            for number, triple in enumerate(delta.attached_deltas(step.model).values()):
                triple.diagonal[: number % 4] = 0.0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_to_peft_drops_masked_components_and_keeps_the_scale(
    family: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    ours, run = trained(request.getfixturevalue(family), task, Masking(), tmp_path / "run")
    expected = {name: (rank, 0.75) for name, rank in run.ranks().items() if rank}
    assert {rank for rank, _ in expected.values()} == {1, 2, 3}
    assert len(expected) < len(run.ranks())
    out = to_peft(run, tmp_path / "adapter")
    theirs = by_the_card(out, monkeypatch)
    assert layers(theirs) == expected
    assert {name: (update.rank, update.scale) for name, update in load(out).updates().items()} == expected
    assert not any("scores" in name for name in load_file(out / WEIGHTS))
    assert distance(ours, theirs) < rounding(terms=TINY)  # the diagonal times B, in float32
    base = request.getfixturevalue(family)
    assert layers(adapted(models.load(base, task=task), **run.lora_config())) == expected
    # A new LoRA of these ranks has the alpha of the three components that trained.
    following = {name: (rank, 0.75 * 3 / rank) for name, (rank, _) in expected.items()}
    assert layers(adapted(models.load(base, task=task), **rank_pattern(run))) == following
    assert rank_pattern(run, 1.0) == rank_pattern(run)


def test_to_peft_with_all_ranks_zero_raises(bert: str, task: Any, tmp_path: Path) -> None:
    _, run = trained(bert, task, AdaLoRA(init_rank=2, target_rank=0), tmp_path / "run")
    assert set(run.ranks().values()) == {0}
    for attempt in (
        lambda: to_peft(run, tmp_path / "adapter"),
        lambda: rank_pattern(run),
        lambda: rank_pattern(run, 2),
    ):
        with pytest.raises(ValueError, match="no factored update of rank >= 1"):
            attempt()
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_drop_unused_keeps_the_product() -> None:
    draw = np.random.default_rng(0)
    B, A, diagonal = draw.standard_normal((5, 4)), draw.standard_normal((4, 6)), np.array([0.0, -2.0, 0.0, 1e-30])
    found = drop_unused(LowRank(B * diagonal, A, 2), diagonal)
    assert (found.B.shape, found.A.shape) == ((5, 2), (2, 6))
    np.testing.assert_allclose(found.dense(), 2 * B @ np.diag(diagonal) @ A)


# -- rejected updates -----------------------------------------------------------------------------------------------


class Dense(Delta):
    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.zeros(host_weight(host).shape))

    def weight(self) -> torch.Tensor:
        return self.M


class Mixed(Triple):
    """Adapter whose update depends on its input."""

    def update(self) -> LowRank:
        known = super().update()
        return LowRank(known.B, known.A, known.scale, exact=False)


@dataclass(kw_only=True)
class Unfit(Method):
    inexact: bool = False

    def attach(self, model: nn.Module) -> None:
        name = module_table.match(module_table.describe(model), "q")[0]
        host = model.get_submodule(name)
        delta.attach(model, {name: Mixed(host, 2, 1.0) if self.inexact else Dense(host)})
        train_adapters(model)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Unfit(), "the update of bert.encoder.layer.0.attention.self.query is not a product B A"),
        (Unfit(inexact=True), "the update of bert.encoder.layer.0.attention.self.query depends on its input"),
    ],
    ids=["dense", "inexact"],
)
def test_to_peft_without_low_rank_update_raises(method: Method, why: str, bert: str, task: Any, tmp_path: Path) -> None:
    _, run = trained(bert, task, method, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=why) as raised:
        to_peft(run, tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def lora(bert: str, task: Any, tmp_path_factory: pytest.TempPathFactory) -> ls.Run:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return trained(bert, task, LoRA(rank=2, lr=0.05, head_lr=0.05), folder)[1]


def test_to_peft_of_a_changed_state_raises(lora: ls.Run, tmp_path: Path) -> None:
    copy = lora.save(tmp_path / "copy")
    file = tmp_path / "copy/state/last.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="checksum differs"):
        to_peft(copy, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("model", "base", "more"),
    [
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2", ()),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", ("4-bit",)),
        ("smollm2, first 6 blocks", "HuggingFaceTB/SmolLM2-135M-Instruct", ("4-bit", "num_hidden_layers=6")),
        ("some/model, first 12 blocks", "some/model", ("num_hidden_layers=12",)),
        ("bert-base-uncased", "bert-base-uncased", ()),
    ],
)
def test_to_peft_base_has_its_hub_name(
    model: str, base: str, more: tuple[str, ...], lora: ls.Run, tmp_path: Path
) -> None:
    out = to_peft(ls.Run(lora.path, replace(lora.meta, model=model)), tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(out).base_model_name_or_path == base
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {base}\n" in card
    assert f"from_pretrained({base!r}, " in card
    for word in ("4-bit", "num_hidden_layers"):
        assert (word in card) == any(word in words for words in more)
    assert all(words in card for words in more)
    assert "num_labels=2, id2label={0: 'negative', 1: 'positive'})" in card


# -- the command ----------------------------------------------------------------------------------------------------


def test_export_command_prints_equal_python_and_json(
    lora: ls.Run, spectral: ls.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for found, words in ((lora, []), (spectral, ["--budget", "6"]), (spectral, ["--budget", 0.5])):
        code, out, err = run(capsys, "export", found.path, "--rank-pattern", *words)
        assert (code, err) == (0, "")
        scope: dict[str, Any] = {}
        exec(out, scope)
        code, out, _ = run(capsys, "export", found.path, "--rank-pattern", *words, "--json")
        keywords = json.loads(out)
        assert code == 0
        assert keywords == rank_pattern(found, float(words[1]) if words else None)
        expected = peft.LoraConfig(**keywords)
        assert scope["config"] == expected


def test_export_command_writes_the_adapter(lora: ls.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "adapter"
    assert run(capsys, "export", lora.path, "--peft", out) == (0, f"{out}\n", "")
    assert load(out).ranks() == lora.ranks()
    code, told, _ = run(capsys, "export", lora.path, "--peft", tmp_path / "best", "--state", "best", "--json")
    assert (code, json.loads(told)) == (0, {"id": lora.id, "path": str(tmp_path / "best")})
    assert "adapter: it exists, pass a new path" in complaint(capsys, "export", lora.path, "--peft", out)


def test_export_command_wrong_use_prints_one_line(
    lora: ls.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(capsys, "export").startswith("RUN is required: lorascope export ")
    for count, words in ((0, []), (2, ["--rank-pattern", "--peft", tmp_path / "x"])):
        assert complaint(capsys, "export", lora.path, *words).endswith(f"is required, got {count}")
    assert "--budget requires --rank-pattern or --peft" in complaint(
        capsys, "export", lora.path, "--table", "x.csv", "--budget", 2
    )
    told = complaint(capsys, "export", lora.path, "--rank-pattern", "--budget", 99)
    assert "total rank from 2 to 8, got 99" in told
    assert "state must be one of 'last', 'best', got 'first'" in complaint(
        capsys, "export", lora.path, "--rank-pattern", "--state", "first"
    )
    assert "cannot load nowhere" in complaint(capsys, "export", "nowhere", "--rank-pattern")


def test_export_command_does_not_import_torch(lora: ls.Run, tmp_path: Path) -> None:
    call = "import sys; from lorascope.cli.main import main; main(['export', *sys.argv[1:]])"
    table, adapter = ["--table", str(tmp_path / "out.parquet")], ["--peft", str(tmp_path / "adapter")]
    for words in (["--rank-pattern", "--budget", "0.5"], table, adapter):
        assert not modules_after(call, str(lora.path), *words) & {"torch", "transformers", "peft", "matplotlib"}
