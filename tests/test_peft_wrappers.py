"""PEFT's wrappers around modules: names without them, and updates that count once."""

from __future__ import annotations

import peft
import pytest
import torch
from tolerance import TINY, near
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorascope as ls
from lorascope.adapters.delta import adapters
from lorascope.adapters.peft_layers import unreadable_adapters, unwrapped_parameters
from lorascope.schema import module_table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tiny_llama(tied: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = tied
    return LlamaForCausalLM(config)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_adapter_of_tokens_counts_once_under_the_name_of_its_embedding() -> None:
    model = moved(
        peft.get_peft_model(
            tiny_llama(True), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
        )
    )
    names = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert [name for name, _ in ls.deltas(model)] == names
    assert list(adapters(model.get_base_model())) == names
    assert unreadable_adapters(model.get_base_model()) == {}
    assert set(names) <= set(module_table.describe(model)["module"])
    before = {name: parameter.detach().clone() for name, parameter in unwrapped_parameters(model).items()}
    merged = model.merge_and_unload()
    change = merged.get_submodule(names[0]).weight - before[f"{names[0]}.weight"]
    assert dict(ls.deltas(merged, before))[names[0]].dense() == near(change.detach().T, terms=TINY)


def test_copy_of_an_embedding_that_peft_trains_has_the_layout_of_an_embedding() -> None:
    base = tiny_llama(False)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = moved(
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    )
    update = dict(ls.deltas(model, before))["model.embed_tokens"]
    after = model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.detach()
    assert update.dense() == near((after - before["model.embed_tokens.weight"]).T, terms=TINY)


@pytest.mark.parametrize(
    "config",
    [
        peft.LNTuningConfig(target_modules=["norm"]),
        peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    ],
    ids=["norms", "aLoRA"],
)
def test_adapters_without_a_matrix_are_skipped(config: peft.PeftConfig) -> None:
    assert list(ls.deltas(moved(peft.get_peft_model(tiny_llama(False), config)))) == []
