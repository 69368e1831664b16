"""Module tables compared with the hand-written layout of every model family."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
import torch
from architectures import BLOCKS, ENDS, TIED
from tiny import FAMILIES, HEADS, tiny
from torch import nn

from lorascope.schema.module_table import ROLES, describe, parse, position


def _roles(description: pd.DataFrame) -> dict[str, str]:
    return dict(zip(description["module"], description["role"], strict=True))


def _layer(layer: object) -> int | None:
    return None if pd.isna(layer) else int(layer)


def test_every_family_has_a_hand_written_layout() -> None:
    assert BLOCKS.keys() == set(FAMILIES) == {family for family, _ in ENDS}


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_description_of_a_family_matches_its_layout(family: str, head: str) -> None:
    description = describe(tiny(family, head))
    inside = description[description["layer"].notna()]
    for (stack, layer), rows in inside.groupby(["stack", "layer"]):
        expected = Counter(["block", *BLOCKS[family][stack].split()])
        if family == "t5" and layer == 0:
            expected["pos_embed"] = 1
        assert Counter(rows["role"]) == expected
    assert set(inside[["stack", "layer"]].itertuples(index=False, name=None)) == {
        (stack, layer) for stack in BLOCKS[family] for layer in (0, 1)
    }
    assert _roles(description[description["layer"].isna()]) == ENDS[family, head]
    shared = description[description["tied"] != ""]
    expected_ties = [TIED[family, head]] if (family, head) in TIED else []
    assert list(shared[["module", "tied"]].itertuples(index=False, name=None)) == expected_ties


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_every_weight_has_one_row_with_the_sizes_of_its_linear_map(family: str, head: str) -> None:
    model = tiny(family, head)
    description = describe(model)
    weights = description[description["role"] != "block"]
    uses = [name for row in weights.itertuples() for name in (row.module, *filter(None, row.tied.split(",")))]
    named = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".weight")]
    assert sorted(f"{name}.weight" for name in uses) == sorted(named)
    for row in description.itertuples():
        host = model.get_submodule(row.module)
        if row.role in ("norm", "block"):
            assert pd.isna(row.out_features)
            assert pd.isna(row.in_features)
        elif isinstance(host, nn.Embedding):
            assert (row.out_features, row.in_features) == (host.embedding_dim, host.num_embeddings)
        elif isinstance(host, nn.Conv2d):
            assert (row.out_features, row.in_features) == (32, 3 * 8 * 8)
        else:
            assert host(torch.zeros(1, row.in_features)).shape == (1, row.out_features)


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_parsed_names_agree_with_the_description(family: str, head: str) -> None:
    """They agree on every row of every family, and differ only for tied names.

    ``parse`` returns "head" for "lm_head", while ``describe`` lists a weight once, so a tied head has no row (OPT,
    GPT-2, Gemma, T5, BART and the masked LMs).
    """
    description = describe(tiny(family, head))
    for row in description.itertuples():
        assert parse(row.module) == (row.stack, _layer(row.layer), row.role)
        assert parse(f"base_model.model.{row.module}") == parse(row.module)
    for name in ",".join(description["tied"][description["tied"] != ""]).split(","):
        assert parse(name).role == ("head" if "embed" not in name else "embed") or not name
        assert name not in set(description["module"])


def test_first_rows_of_gpt2() -> None:
    rows = describe(tiny("gpt2"))[["module", "layer", "role", "out_features", "in_features"]].astype(object)
    assert rows.where(rows.notna(), None).iloc[:9].to_numpy().tolist() == [
        ["transformer.wte", None, "embed", 32, 64],
        ["transformer.wpe", None, "pos_embed", 32, 40],
        ["transformer.h.0", 0, "block", None, None],
        ["transformer.h.0.ln_1", 0, "norm", None, None],
        ["transformer.h.0.attn.c_attn", 0, "qkv", 96, 32],
        ["transformer.h.0.attn.c_proj", 0, "o", 32, 32],
        ["transformer.h.0.ln_2", 0, "norm", None, None],
        ["transformer.h.0.mlp.c_fc", 0, "ffn_in", 128, 32],
        ["transformer.h.0.mlp.c_proj", 0, "ffn_out", 32, 128],
    ]


def test_dtypes_are_the_same_for_any_model() -> None:
    for model in (tiny("bert"), nn.Linear(2, 3), nn.ReLU()):
        assert describe(model).dtypes.astype(str).to_dict() == {
            "module": "str",
            "stack": "str",
            "layer": "Int16",
            "role": "str",
            "out_features": "Int64",
            "in_features": "Int64",
            "tied": "str",
        }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("base_model.model.bert.encoder.layer.11.attention.self.query", ("encoder", 11, "q")),
        ("encoder.block.3.layer.1.DenseReluDense.wi_0", ("encoder", 3, "ffn_gate")),
        ("encoder.block.3.layer.1.DenseReluDense.wi_1", ("encoder", 3, "ffn_in")),
        ("encoder.block.3.layer.1.DenseReluDense.wo", ("encoder", 3, "ffn_out")),
        ("decoder.block.3.layer.1.EncDecAttention.o", ("decoder", 3, "cross_o")),
        ("decoder.layers.7.encoder_attn.out_proj", ("decoder", 7, "cross_o")),
        ("bert.encoder.layer.0.crossattention.output.dense", ("encoder", 0, "cross_o")),
        ("transformer.h.5.crossattention.c_attn", ("", 5, "other")),
        ("transformer.h.5.crossattention.q_attn", ("", 5, "cross_q")),
        ("vit.encoder.layer.2.attention.attention.key", ("encoder", 2, "k")),
        ("model.layers.31.mlp.experts.7.w2", ("", 31, "ffn_out")),
        ("model.layers.31.block_sparse_moe.gate", ("", 31, "other")),
        ("backbone.layers.3.mixer.out_proj", ("", 3, "other")),
        ("decoder.layers.0.final_layer_norm", ("decoder", 0, "norm")),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", ("encoder", 0, "pos_embed")),
        ("model.layers.4", ("", 4, "block")),
        ("lm_head.decoder", ("", None, "head")),
        ("classifier.dense", ("", None, "other")),
        ("something.else", ("", None, "other")),
        ("", ("", None, "other")),
    ],
)
def test_parse_returns_stack_layer_and_role(name: str, place: tuple[str, int | None, str]) -> None:
    assert parse(name) == place


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("t5", "embed encoder0 encoder1 decoder0 decoder1 norm norm"),
        ("bart", "embed pos_embed pos_embed encoder0 encoder1 decoder0 decoder1 norm norm"),
        ("vit", "embed 0 1 norm head"),
        ("opt", "embed pos_embed decoder0 decoder1 norm"),
        ("bert", "embed embed pos_embed encoder0 encoder1 norm other head"),
    ],
)
def test_position_orders_modules_from_embedding_to_head(family: str, order: str) -> None:
    rows = describe(tiny(family)).sample(frac=1, random_state=0)
    ends = rows[rows["layer"].isna() | (rows["role"] == "block")]
    places = sorted(((row.stack, row.layer, row.role) for row in ends.itertuples()), key=lambda place: position(*place))
    assert " ".join(role if pd.isna(layer) else f"{stack}{layer}" for stack, layer, role in places) == order


def test_position_accepts_missing_layers_and_orders_roles_within_a_layer() -> None:
    assert position("", None, "head") == position("", pd.NA, "head") == position("", float("nan"), "head")
    keys = [position("", 3, role) for role in ROLES]
    assert keys == sorted(keys)
    assert position("", 9, "q") < position("", 10, "q")
    assert position("decoder", None, "embed") < position("encoder", None, "pos_embed") < position("encoder", 0, "q")


def test_every_head_of_every_family_is_tested() -> None:
    """Untested heads do not exist in transformers, or are causal or masked variants of a tested one."""
    twins = {("bert", "causal"), ("roberta", "causal"), ("electra", "causal"), ("electra", "masked")}
    twins |= {("deberta-v2", "masked"), ("distilbert", "masked"), ("bart", "masked"), ("bart", "causal")}
    for family in FAMILIES:
        for head, auto in HEADS.items():
            known = type(tiny(family).config) in auto._model_mapping
            assert ((family, head) in ENDS or (family, head) in twins) == known
