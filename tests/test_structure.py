"""Roles from the structure of a model whose names are unknown: invented models, shared weights, adapters."""

from __future__ import annotations

import pandas as pd
import peft
import pytest
import torch
from tiny import tiny
from torch import nn

from lorascope.schema.module_table import describe, match, parse


def _roles(description: pd.DataFrame) -> dict[str, str]:
    return dict(zip(description["module"], description["role"], strict=True))


class _Part(nn.Module):
    """A module with given children, whose class carries no information."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _model(*blocks: nn.Module, **ends: nn.Module) -> nn.Module:
    return _Part(table=nn.Embedding(50, 8), stages=nn.ModuleList(blocks), **ends)


def _linear(outer: int, inner: int) -> nn.Linear:
    return nn.Linear(inner, outer)


def _attention(**children: nn.Module) -> nn.Module:
    return _Part(**{name: _linear(8, 8) for name in ("q", "k", "v", "o")} | children)


def _invented_roles(*parts: dict[str, nn.Module]) -> dict[str, str]:
    """Return the roles inside the first of two equal blocks that consist of the parts."""
    blocks = [_Part(**{name: part for given in parts for name, part in given.items()}) for _ in range(2)]
    description = describe(_model(*blocks, readout=_linear(3, 8)))
    first = description[description["layer"] == 0]
    return {name.removeprefix("stages.0."): role for name, role in _roles(first).items() if role != "block"}


def test_blocks_embedding_and_head_are_found_without_known_names() -> None:
    block = {"a": _linear(20, 8), "b": _linear(8, 20), "scale": nn.LayerNorm(8)}
    model = _model(_Part(**block), _Part(**block), last=nn.LayerNorm(8), squeeze=_linear(8, 8), readout=_linear(3, 8))
    assert _roles(describe(model)) == {
        "table": "embed",
        "stages.0": "block",
        "stages.0.a": "ffn_in",
        "stages.0.b": "ffn_out",
        "stages.0.scale": "norm",
        "stages.1": "block",
        "last": "norm",
        "squeeze": "other",
        "readout": "head",
    }


def test_single_linears_and_unequal_children_are_not_blocks() -> None:
    model = _Part(
        layers=nn.ModuleList([_linear(8, 8), _linear(8, 8)]),
        body=nn.Sequential(_attention(), nn.Sequential(_linear(8, 8), _linear(8, 8))),
        lone=nn.Sequential(_attention()),
    )
    description = describe(model)
    assert description["layer"].isna().all()
    assert "block" not in set(description["role"])
    assert parse("layers.0").role == "block"  # the name is misleading here


def test_only_the_outermost_repetition_is_blocks() -> None:
    experts = nn.ModuleList(_Part(w1=_linear(20, 8), w2=_linear(8, 20)) for _ in range(2))
    assert set(_invented_roles({"attn": _attention(), "experts": experts})) == {
        *(f"attn.{name}" for name in "qkvo"),
        *(f"experts.{i}.{name}" for i in (0, 1) for name in ("w1", "w2")),
    }


def test_head_is_the_declared_output_or_the_last_linear_outside_the_blocks() -> None:
    model = _model(_attention(), _attention())
    assert "head" not in set(describe(model)["role"])
    model.add_module("readout", _linear(3, 8))
    model.add_module("auxiliary", _linear(2, 8))
    assert match(describe(model), "head") == ["auxiliary"]
    model.get_output_embeddings = lambda: model.readout
    assert match(describe(model), "head") == ["readout"]


def test_linear_in_a_block_named_like_a_norm_has_role_other() -> None:
    odd = {"norm_scale": _linear(8, 8), "position": _linear(8, 8), "gain": nn.LayerNorm(8)}
    assert _invented_roles(odd) == {"norm_scale": "other", "position": "other", "gain": "norm"}


def test_packed_weight_has_the_sizes_of_its_module() -> None:
    packed = _linear(6, 8)
    packed.weight = nn.Parameter(torch.zeros(24, 1))
    row = describe(_Part(score=packed)).iloc[0]
    assert (row["out_features"], row["in_features"]) == (6, 8)


def test_single_block_is_found_by_the_name_of_its_container() -> None:
    description = describe(tiny("llama", num_hidden_layers=1))
    assert description.loc[description["role"] == "block", "module"].tolist() == ["model.layers.0"]


@pytest.mark.parametrize(("fused", "role"), [(24, "qkv"), (16, "qkv"), (12, "qkv"), (14, "other"), (32, "other")])
def test_fused_attention_is_found_by_its_size(fused: int, role: str) -> None:
    """Width 8, keys shared by one, two and four heads; 14 would have 3 key columns, 32 more keys than queries."""
    roles = _invented_roles({"attn": _Part(mix=_linear(fused, 8), o_proj=_linear(8, 8))})
    assert roles == {"attn.mix": role, "attn.o_proj": "o"}
    with_others = _invented_roles({"attn": _attention(mix=_linear(fused, 8))})
    assert [with_others[f"attn.{name}"] for name in ("q", "k", "v", "mix")] == ["q", "k", "v", "other"]


def test_projection_of_a_latent_is_not_fused_attention() -> None:
    latent = _Part(squeeze=_linear(4, 8), expand=_linear(24, 4), o_proj=_linear(8, 8))
    assert _invented_roles({"attn": latent}) == {"attn.squeeze": "other", "attn.expand": "other", "attn.o_proj": "o"}


def test_gates_are_found_by_neighboring_linears() -> None:
    pair = _Part(w1=_linear(20, 8), w2=_linear(8, 20))
    trio = _Part(w1=_linear(20, 8), w3=_linear(20, 8), w2=_linear(8, 20))
    unknown = _Part(a=_linear(20, 8), b=_linear(20, 8), c=_linear(8, 20))
    router = _Part(pick=_linear(2, 8))
    odd = _Part(a=_linear(20, 8), b=_linear(6, 20))
    assert _invented_roles({"pair": pair, "trio": trio, "unknown": unknown, "router": router, "odd": odd}) == {
        "pair.w1": "ffn_in",
        "pair.w2": "ffn_out",
        "trio.w1": "ffn_gate",
        "trio.w3": "ffn_in",
        "trio.w2": "ffn_out",
        "unknown.a": "ffn_gate",
        "unknown.b": "ffn_in",
        "unknown.c": "ffn_out",
        "router.pick": "other",
        "odd.a": "other",
        "odd.b": "other",
    }


def test_second_attention_of_a_block_is_cross_attention() -> None:
    roles = _invented_roles({"first": _attention(), "second": _attention(norm=nn.LayerNorm(8))})
    assert [roles[f"first.{name}"] for name in "qkvo"] == ["q", "k", "v", "o"]
    assert [roles[f"second.{name}"] for name in "qkvo"] == ["cross_q", "cross_k", "cross_v", "cross_o"]
    assert roles["second.norm"] == "norm"


def test_repeated_attention_is_not_cross_attention() -> None:
    stage = nn.ModuleList([_Part(attn=_attention()), _Part(attn=_attention())])
    assert {role for name, role in _invented_roles({"depth": stage}).items()} == {"q", "k", "v", "o"}


def test_tied_weights_are_found_by_identity_not_by_value() -> None:
    model = _model(readout=_linear(50, 8), twin=_linear(50, 8))
    with torch.no_grad():
        model.twin.weight.copy_(model.table.weight)
    model.readout.weight = model.table.weight
    description = describe(model)
    assert _roles(description) == {"table": "embed", "twin": "head"}
    assert description["tied"].tolist() == ["readout", ""]

    readout = _linear(50, 8)
    late = _Part(readout=readout, table=nn.Embedding(50, 8))
    late.table.weight = readout.weight
    assert describe(late)[["module", "tied"]].to_numpy().tolist() == [["table", "readout"]]


def test_untied_head_has_a_row() -> None:
    description = describe(tiny("gpt2", tie_word_embeddings=False))
    assert _roles(description)["lm_head"] == "head"
    assert set(description["tied"]) == {""}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads the old name
def test_description_of_an_adapted_model_equals_the_bare_one() -> None:
    model = tiny("roberta")
    bare = describe(model)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["classifier"])
    pd.testing.assert_frame_equal(describe(peft.get_peft_model(model, config)), bare)

    host = tiny("roberta")
    host.classifier.out_proj.add_module("delta", nn.Linear(4, 4))
    pd.testing.assert_frame_equal(describe(host), bare)

    tied = peft.get_peft_model(tiny("gpt-neox"), peft.LoraConfig(target_modules=["lm_head", "embed_in"]))
    pd.testing.assert_frame_equal(describe(tied), describe(tiny("gpt-neox")))
