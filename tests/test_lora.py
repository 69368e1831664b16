"""Test LoRA and full fine-tuning against the paper's arithmetic and PEFT with the same factors."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from tiny import inputs, tiny
from tolerance import TINY, amplification, near, rounding
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lorascope.adapters.delta import attach, attached_deltas, deltas, fold
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, DoRA, FourierFT, Full, HydraLoRA, LoRA, PiSSA, VeRA
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import config
from lorascope.updates import LowRank

SIX = ("q", "k", "v", "o", "ffn_in", "ffn_out")


def hand(B: list[list[float]]) -> nn.Linear:
    """Build the hand example: W_0 = I, A = [[1, 2]], alpha = 2, rank = 1."""
    host = nn.Linear(2, 2, bias=False)
    nn.init.eye_(host.weight)
    delta = LoRADelta(host, rank=1, scale=2)
    delta.A.data, delta.B.data = torch.tensor([[1.0, 2.0]]), torch.tensor(B)
    attach(host, {"": delta})
    return host


def filled(model: nn.Module) -> nn.Module:
    """Set B and, on embeddings, A to random values, as after training."""
    for seed, delta in enumerate(attached_deltas(model).values()):
        for factor in (delta.A, delta.B):
            if not factor.any():
                nn.init.normal_(factor, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


def test_update_matches_the_hand_example():
    host = hand([[3.0], [4.0]])
    y = host(torch.ones(1, 2))
    assert y.tolist() == [[19, 25]]
    y.sum().backward()
    assert host.delta.weight().tolist() == [[6, 12], [8, 16]]
    assert host.delta.A.grad.tolist() == [[14, 14]]
    assert host.delta.B.grad.tolist() == [[6], [6]]
    update = host.delta.update()
    assert isinstance(update, LowRank)
    assert update.norm() == pytest.approx(22.360680)


def test_gradient_at_zero_matches_the_hand_example():
    host = hand([[0.0], [0.0]])
    host(torch.ones(1, 2)).sum().backward()
    assert host.delta.A.grad.tolist() == [[0, 0]]
    assert host.delta.B.grad.tolist() == [[6], [6]]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_first_gradient_reaches_only_the_zero_factor(family):
    model = tiny(family).requires_grad_(False)  # torch uses another kernel for a weight that trains
    before = model(**inputs(model)).logits
    LoRA(targets="all-linear").attach(model)
    after = model(**inputs(model)).logits
    assert len(attached_deltas(model)) >= 8
    assert torch.equal(after, before)
    after.square().sum().backward()
    for delta in attached_deltas(model).values():
        assert not delta.A.grad.any()
        assert delta.B.grad.any()
        assert delta.A.any()


def test_only_adapters_and_head_train():
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = LoRA(targets="all-linear", lr=0.1, head_lr=0.1)
    method.attach(model)
    optimizer = method.optimizer(model, method.lr, method.head_lr, 0.1)
    model(**inputs(model), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in model.state_dict() if ".delta." in name or name.startswith("classifier.")}
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value) != name.startswith("classifier.")


def test_initial_a_is_kaiming_uniform():
    A = LoRADelta(nn.Linear(768, 10), rank=64).A.detach()
    assert 0.99 * 768**-0.5 < A.abs().max() <= 768**-0.5
    assert A.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.01)
    assert A.mean().item() == pytest.approx(0, abs=1e-3)


def test_embedding_starts_with_zero_a_and_normal_b():
    delta = LoRADelta(nn.Embedding(50, 300), rank=16, scale=3)
    assert not delta.A.any()
    assert delta.B.std().item() == pytest.approx(1, rel=0.05)


def test_linear_start_gives_an_embedding_the_gain_of_a_linear_layer():
    """At width 384, PEFT's B is sqrt(3 * 384) = 33.9 times as large; the draws are the same."""
    width = {"hidden_size": 384, "num_attention_heads": 4}
    word, query = "bert.embeddings.word_embeddings", "bert.encoder.layer.0.attention.self.query"
    factors = {}
    for start in ("peft", "linear"):
        model = tiny("bert", **width)
        torch.manual_seed(3)
        LoRA(rank=16, targets=("embed", "q"), embedding_init=start).attach(model)
        factors[start] = {name: (delta.A.detach(), delta.B.detach()) for name, delta in attached_deltas(model).items()}
    a = torch.randn(1000, 16)
    gains = {start: (a @ found[word][1].T).norm() / a.norm() for start, found in factors.items()}
    A, _ = factors["linear"][query]
    assert gains["linear"].item() == pytest.approx(((a @ A).norm() / a.norm()).item(), rel=0.03)
    assert gains["linear"].item() == pytest.approx(3**-0.5, rel=0.03)
    assert (gains["peft"] / gains["linear"]).item() == near((3 * 384) ** 0.5, terms=384)
    assert factors["linear"][word][1].std().item() == pytest.approx((3 * 384) ** -0.5, rel=0.03)
    assert not factors["linear"][word][0].any()
    for mine, other in zip(factors["linear"][query], factors["peft"][query], strict=True):
        assert torch.equal(mine, other)


def test_embedding_init_is_part_of_the_config_only_if_set():
    assert "embedding_init" not in config(LoRA())
    assert config(LoRA(embedding_init="linear")) == {**config(LoRA()), "embedding_init": "linear"}


def test_update_has_the_expected_rank_and_norm():
    model = tiny("bert")
    LoRA(targets="all-linear", rank=3, alpha=6).attach(model)
    filled(model)
    found = dict(deltas(model))
    assert len(found) == 12
    for name, delta in attached_deltas(model).items():
        dense = delta.weight().detach().double().numpy()
        assert found[name].scale == 2.0
        assert found[name].rank == 3
        assert np.linalg.svd(dense, compute_uv=False)[3:] == near(0, np.linalg.norm(dense), terms=3 + 1)
        assert found[name].norm() == near(np.linalg.norm(dense), terms=3 + 1)
        assert delta.factors().keys() == {"A", "B"}


def test_output_is_linear_in_the_scale_and_independent_of_the_basis():
    x, host = torch.randn(5, 6, dtype=torch.float64), nn.Linear(6, 4).double()
    base = host(x)
    delta = LoRADelta(host, rank=2, scale=1)
    nn.init.normal_(delta.B)
    attach(host, {"": delta})
    once = host(x) - base
    delta.scale = 3.0
    assert torch.allclose(host(x) - base, 3 * once)
    y, M = host(x), torch.randn(2, 2, dtype=torch.float64)
    delta.B.data, delta.A.data = delta.B @ M, torch.linalg.inv(M) @ delta.A
    assert torch.allclose(host(x), y)


def test_output_without_gradients_is_that_with_gradients_bit_by_bit():
    torch.manual_seed(0)
    host = nn.Linear(12, 7)
    x = torch.randn(3, 5, 12)
    attach(nn.Sequential(host), {"0": LoRADelta(host, 4, 0.7)})
    nn.init.normal_(host.delta.B)
    with torch.no_grad():
        silent = host(x)
        repeated = host(x)
    assert torch.equal(silent, host(x))
    assert torch.equal(silent, repeated)
    expected = x.double() @ (host.weight + host.delta.weight()).double().T + host.bias.double()
    torch.testing.assert_close(silent.double(), expected, rtol=1e-5, atol=1e-6)


def test_rslora_divides_by_the_root_of_the_rank():
    model = tiny("bert")
    LoRA(rank=4, alpha=6, rslora=True).attach(model)
    assert {delta.scale for delta in attached_deltas(model).values()} == {3.0}


def test_rank_mapping_sets_the_rank_of_each_module():
    """The mapping selects the modules, rank 0 adapts none, and alpha is divided by each module's rank."""
    model = tiny("bert")
    query, value = (f"bert.encoder.layer.{i}.attention.self.{kind}" for i, kind in ((0, "query"), (1, "value")))
    LoRA(rank={query: 2, value: 4, query.replace("query", "key"): 0}).attach(model)
    assert {name: (delta.A.shape[0], delta.scale) for name, delta in attached_deltas(model).items()} == {
        query: (2, 4.0),
        value: (4, 2.0),
    }
    with pytest.raises(ValueError, match=r"qury.*mean .*query"):
        LoRA(rank={query.replace("query", "qury"): 2}).attach(tiny("bert"))
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"^rank must be an integer >= 1, got {rank}$"):
            LoRA(rank=rank)
    with pytest.raises(ValueError, match=f"^rank of '{query}' must be an integer >= 0, got -1$"):
        LoRA(rank={query: -1})
    with pytest.raises(ValueError, match=r"rank must be >= 1 .*, got 0"):
        LoRA(rank={query: 0}).attach(tiny("bert"))
    with pytest.raises(ValueError, match="rank must map names of modules to ranks, got 'q'"):
        LoRA(rank={"q": 2}).attach(tiny("bert"))


@pytest.mark.parametrize("method", [LoRA, DoRA, PiSSA, AdaLoRA, ALoRA, AutoLoRA, HydraLoRA])
@pytest.mark.parametrize(
    ("field", "allowed", "value"),
    [
        ("alpha", "> 0 and finite in float32", 0.0),
        ("alpha", "> 0 and finite in float32", np.nan),
        ("dropout", r"in \[0, 1\)", 1.0),
    ],
)
def test_scaling_and_dropout_that_cannot_train_are_rejected(method, field, allowed, value):
    with pytest.raises(ValueError, match=f"^{field} must be {allowed}, got {value}$"):
        method(**{field: value})


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [(PiSSA, "init_seed", 3), (PiSSA, "embedding_init", "linear"), (DoRA, "embedding_init", "linear")],
)
def test_fields_of_lora_without_effect_on_a_variant_are_rejected(method, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, because {method.__name__} .*, got '?{value}'?$"):
        method(**{field: value})


@pytest.mark.parametrize("method", [DoRA, FourierFT, PiSSA, VeRA])
def test_embeddings_are_rejected_by_methods_of_linear_layers(method):
    message = rf"^cannot adapt embedding '.*word_embeddings': {method.__name__} supports linear layers"
    with pytest.raises(ValueError, match=message):
        method(targets="embed").attach(tiny("bert"))


PEFT = {
    "linear": ("bert", "all-linear", {}, {}),
    "linear, fp64": ("bert", "all-linear", {}, {"dtype": torch.float64}),
    "roots": ("bert", "all-linear", {"use_rslora": True}, {"rslora": True}),
    "dropout": ("bert", "all-linear", {"lora_dropout": 0.4}, {"dropout": 0.4}),
    "Conv1D": ("gpt2", "all-linear", {"fan_in_fan_out": True}, {}),
    "grouped queries": ("llama", "all-linear", {}, {}),
    "embedding": ("bert", ("embed", "q"), {}, {}),
}


def directions(model: nn.Module) -> torch.Tensor:
    """Compute the gradients of all factors, each divided by its norm."""
    batch = inputs(model)
    batch["input_ids"][:, -2:] = 0
    torch.manual_seed(5)
    model.zero_grad()
    model(**batch).logits.square().mean().backward()
    gradients = [factor.grad for delta in attached_deltas(model).values() for factor in (delta.A, delta.B)]
    return torch.cat([(gradient / gradient.norm()).flatten() for gradient in gradients])


@pytest.mark.parametrize("case", PEFT)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_match_peft(case, autocast):
    family, targets, theirs_only, ours_only = PEFT[case]
    ours_only = dict(ours_only)
    dtype = ours_only.pop("dtype", torch.float32)
    ours, theirs = tiny(family).to(dtype), tiny(family).to(dtype)
    LoRA(targets=targets, rank=3, alpha=5, **ours_only).attach(ours)
    filled(ours)
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(attached_deltas(ours)), **theirs_only}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    pairs = []
    for name, delta in attached_deltas(ours).items():
        layer = theirs.get_base_model().get_submodule(name)
        lookup = "default" in layer.lora_embedding_A
        A, B = (
            getattr(layer, f"lora_embedding_{factor}" if lookup else f"lora_{factor}")["default"] for factor in "AB"
        )
        for mine, other in ((delta.A, A), (delta.B, B)):
            other = other if lookup else other.weight
            other.data.copy_(mine.data)
            pairs.append((mine, other))
    assert len(pairs) == 2 * len(attached_deltas(ours)) >= 4
    batch, losses = inputs(ours), []
    batch["input_ids"][:, -2:] = 0  # the padding row of an embedding has no gradient
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**batch).logits
        losses.append(logits.double().square().mean())
        losses[-1].backward()
    if autocast:
        bound = rounding(torch.bfloat16, depth=6)  # in the order of factors and scale
    else:
        bound = (
            1e-10
            if dtype == torch.float64
            else rounding(terms=TINY, growth=len(pairs) ** 0.5 * amplification(ours, directions))
        )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=bound)
    for mine, other in pairs:
        assert mine.grad.any()
        assert (mine.grad - other.grad).norm() <= bound * other.grad.norm()


def test_model_equals_its_folded_model_under_autocast():
    model = tiny("bert")
    LoRA(targets=SIX).attach(model)
    folded = copy.deepcopy(filled(model))
    fold(folded)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (m(**inputs(m), output_hidden_states=True).hidden_states[-1].double() for m in (model, folded))
    assert 0 < (one - other).norm() / other.norm() < rounding(torch.bfloat16, depth=6)


def test_dropout_affects_only_the_adapter_in_training():
    host = nn.Linear(400, 3)
    x = torch.randn(7, 400)
    base = host(x)
    delta = LoRADelta(host, rank=2, dropout=0.5)
    attach(host, {"": delta})
    assert torch.equal(host(x), base)
    nn.init.ones_(delta.B)
    assert not torch.allclose(host(x), host(x))
    assert torch.equal(host.eval()(x), host(x))
    assert host(x).detach().numpy() == near(base + (x @ delta.A.T) @ delta.B.T, terms=400)


COUNTS = [
    ("roberta", {"hidden_size": 768, "num_hidden_layers": 12}, ("q", "v"), 8, 294_912),
    ("roberta", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, ("q", "v"), 8, 786_432),
    ("deberta-v2", {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24}, ("q", "v"), 8, 2_359_296),
    (
        "deberta-v2",
        {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24},
        ("q", "v"),
        16,
        4_718_592,
    ),
    ("llama", {"hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96}, ("q", "v"), 1, 4_718_592),
    ("llama", {"hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96}, ("q", "v"), 8, 37_748_736),
    ("deberta-v2", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}, SIX, 8, 1_327_104),
    ("deberta-v2", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}, SIX, 2, 331_776),
]


@pytest.mark.parametrize(("family", "sizes", "targets", "rank", "count"), COUNTS)
def test_parameter_counts_match_the_papers(family, sizes, targets, rank, count):
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(family, **sizes))
    LoRA(targets=targets, rank=rank).attach(model)
    assert sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()) == count


def test_full_fine_tuning_trains_everything():
    model = tiny("bert").requires_grad_(False)
    method = Full()
    method.attach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    groups = method.optimizer(model, method.lr, method.head_lr, 0.0).param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert (method.lr, method.head_lr) == (1e-4, 1e-4)
