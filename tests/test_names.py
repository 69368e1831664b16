"""Names and structure: hand-written layouts of every family, invented models, and the choice of modules."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import peft
import pytest
import torch
from tiny import FAMILIES, HEADS, tiny
from torch import nn

from lorascope.names import ROLES, describe, match, parse, position

_BERT = "q k v o ffn_in ffn_out norm norm"
_LLAMA = "q k v o ffn_gate ffn_in ffn_out norm norm"
# family -> stack -> roles of one block, written from the architectures
BLOCKS = {
    "bert": {"encoder": _BERT},
    "roberta": {"encoder": _BERT},
    "deberta-v2": {"encoder": f"{_BERT} other other"},  # projections of the relative positions
    "distilbert": {"": _BERT},
    "electra": {"encoder": _BERT},
    "gpt2": {"": "qkv o ffn_in ffn_out norm norm"},
    "gpt-neox": {"": "qkv o ffn_in ffn_out norm norm"},
    "opt": {"decoder": _BERT},
    "llama": {"": _LLAMA},
    "mistral": {"": _LLAMA},
    "qwen2": {"": _LLAMA},
    "qwen3": {"": f"{_LLAMA} norm norm"},
    "gemma": {"": _LLAMA},
    "gemma2": {"": f"{_LLAMA} norm norm"},
    "gemma3": {"": f"{_LLAMA} norm norm norm norm"},
    "phi3": {"": "qkv o ffn_in ffn_out norm norm"},
    "t5": {"encoder": _BERT, "decoder": f"{_BERT} cross_q cross_k cross_v cross_o norm"},
    "bart": {"encoder": _BERT, "decoder": f"{_BERT} cross_q cross_k cross_v cross_o norm"},
    "vit": {"": _BERT},
}
_BERT_INPUT = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.token_type_embeddings": "embed",
    "embeddings.LayerNorm": "norm",
}
_DEBERTA = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.LayerNorm": "norm",
    "encoder.rel_embeddings": "pos_embed",
}
_DISTIL = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.LayerNorm": "norm",
}
_GPT2 = {"wte": "embed", "wpe": "pos_embed", "ln_f": "norm"}
_NEOX = {"embed_in": "embed", "final_layer_norm": "norm"}
_OPT = {
    "decoder.embed_tokens": "embed",
    "decoder.embed_positions": "pos_embed",
    "decoder.final_layer_norm": "norm",
}
_LLAMA_ENDS = {"embed_tokens": "embed", "norm": "norm"}
_T5 = {"shared": "embed", "encoder.final_layer_norm": "norm", "decoder.final_layer_norm": "norm"}
_BART = {
    "shared": "embed",
    "encoder.embed_positions": "pos_embed",
    "encoder.layernorm_embedding": "norm",
    "decoder.embed_positions": "pos_embed",
    "decoder.layernorm_embedding": "norm",
}
_VIT = {"embeddings.patch_embeddings.projection": "embed", "layernorm": "norm"}
_DENSE_HEAD = {"classifier.dense": "other", "classifier.out_proj": "head"}


def _under(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": role for name, role in names.items()}


# (family, head) -> everything outside the blocks
ENDS = {
    ("bert", "base"): {**_BERT_INPUT, "pooler.dense": "other"},
    ("bert", "classification"): {
        **_under("bert", {**_BERT_INPUT, "pooler.dense": "other"}),
        "classifier": "head",
    },
    ("bert", "masked"): {
        **_under("bert", _BERT_INPUT),
        "cls.predictions.transform.dense": "other",
        "cls.predictions.transform.LayerNorm": "norm",
    },
    ("roberta", "base"): {**_BERT_INPUT, "pooler.dense": "other"},
    ("roberta", "classification"): {**_under("roberta", _BERT_INPUT), **_DENSE_HEAD},
    ("roberta", "masked"): {
        **_under("roberta", _BERT_INPUT),
        "lm_head.dense": "other",
        "lm_head.layer_norm": "norm",
    },
    ("deberta-v2", "base"): _DEBERTA,
    ("deberta-v2", "classification"): {
        **_under("deberta", _DEBERTA),
        "pooler.dense": "other",
        "classifier": "head",
    },
    ("distilbert", "base"): _DISTIL,
    ("distilbert", "classification"): {
        **_under("distilbert", _DISTIL),
        "pre_classifier": "other",
        "classifier": "head",
    },
    ("electra", "base"): {**_BERT_INPUT, "embeddings_project": "other"},
    ("electra", "classification"): {
        **_under("electra", {**_BERT_INPUT, "embeddings_project": "other"}),
        **_DENSE_HEAD,
    },
    ("gpt2", "base"): _GPT2,
    ("gpt2", "classification"): {**_under("transformer", _GPT2), "score": "head"},
    ("gpt2", "causal"): _under("transformer", _GPT2),
    ("gpt-neox", "base"): _NEOX,
    ("gpt-neox", "classification"): {**_under("gpt_neox", _NEOX), "score": "head"},
    ("gpt-neox", "causal"): {**_under("gpt_neox", _NEOX), "lm_head": "head"},
    ("opt", "base"): _OPT,
    ("opt", "classification"): {**_under("model", _OPT), "score": "head"},
    ("opt", "causal"): _under("model", _OPT),
    ("t5", "base"): _T5,
    ("t5", "classification"): {
        **_under("transformer", _T5),
        "classification_head.dense": "other",
        "classification_head.out_proj": "head",
    },
    ("t5", "seq2seq"): _T5,
    ("bart", "base"): _BART,
    ("bart", "classification"): {
        **_under("model", _BART),
        "classification_head.dense": "other",
        "classification_head.out_proj": "head",
    },
    ("bart", "seq2seq"): _under("model", _BART),
    ("vit", "base"): {**_VIT, "pooler.dense": "other"},
    ("vit", "image"): {**_under("vit", _VIT), "classifier": "head"},
}
for _family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"):
    _tied = _family.startswith("gemma")
    ENDS[_family, "base"] = _LLAMA_ENDS
    ENDS[_family, "classification"] = {**_under("model", _LLAMA_ENDS), "score": "head"}
    ENDS[_family, "causal"] = _under("model", _LLAMA_ENDS) | ({} if _tied else {"lm_head": "head"})

# (family, head) -> embedding and the names that share its weight
TIED = {
    ("bert", "masked"): ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ("roberta", "masked"): ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    ("gpt2", "causal"): ("transformer.wte", "lm_head"),
    ("opt", "causal"): ("model.decoder.embed_tokens", "lm_head"),
    ("gemma", "causal"): ("model.embed_tokens", "lm_head"),
    ("gemma2", "causal"): ("model.embed_tokens", "lm_head"),
    ("gemma3", "causal"): ("model.embed_tokens", "lm_head"),
    ("t5", "base"): ("shared", "encoder.embed_tokens,decoder.embed_tokens"),
    ("t5", "classification"): (
        "transformer.shared",
        "transformer.encoder.embed_tokens,transformer.decoder.embed_tokens",
    ),
    ("t5", "seq2seq"): ("shared", "encoder.embed_tokens,decoder.embed_tokens,lm_head"),
    ("bart", "base"): ("shared", "encoder.embed_tokens,decoder.embed_tokens"),
    ("bart", "classification"): ("model.shared", "model.encoder.embed_tokens,model.decoder.embed_tokens"),
    ("bart", "seq2seq"): ("model.shared", "model.encoder.embed_tokens,model.decoder.embed_tokens,lm_head"),
}


def _roles(description: pd.DataFrame) -> dict[str, str]:
    return dict(zip(description["module"], description["role"], strict=True))


def _layer(layer: object) -> int | None:
    return None if pd.isna(layer) else int(layer)


def test_every_family_has_an_oracle() -> None:
    assert BLOCKS.keys() == set(FAMILIES) == {family for family, _ in ENDS}


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_a_family_is_described_as_its_architecture_says(family: str, head: str) -> None:
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
def test_every_weight_stands_in_one_row_with_the_sizes_of_its_map(family: str, head: str) -> None:
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
def test_name_and_structure_agree(family: str, head: str) -> None:
    """They agree on every row of every family. They differ on tied names only: to `parse` "lm_head" is a head, while
    `describe` lists a weight once, so a tied head has no row (OPT, GPT-2, Gemma, T5, BART and the masked LMs)."""
    description = describe(tiny(family, head))
    for row in description.itertuples():
        assert parse(row.module) == (row.stack, _layer(row.layer), row.role)
        assert parse(f"base_model.model.{row.module}") == parse(row.module)
    for name in ",".join(description["tied"][description["tied"] != ""]).split(","):
        assert parse(name).role == ("head" if "embed" not in name else "embed") or not name
        assert name not in set(description["module"])


def test_exact_rows_of_gpt2() -> None:
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
        ("decoder.layers.0.final_layer_norm", ("decoder", 0, "norm")),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", ("encoder", 0, "pos_embed")),
        ("model.layers.4", ("", 4, "block")),
        ("lm_head.decoder", ("", None, "head")),
        ("classifier.dense", ("", None, "other")),
        ("something.else", ("", None, "other")),
        ("", ("", None, "other")),
    ],
)
def test_parse(name: str, place: tuple[str, int | None, str]) -> None:
    assert parse(name) == place


class _Part(nn.Module):
    """A module with the children it is given; the class says nothing."""

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
    """Roles inside the first of two equal blocks made of the parts."""
    blocks = [_Part(**{name: part for given in parts for name, part in given.items()}) for _ in range(2)]
    description = describe(_model(*blocks, readout=_linear(3, 8)))
    first = description[description["layer"] == 0]
    return {name.removeprefix("stages.0."): role for name, role in _roles(first).items() if role != "block"}


def test_blocks_embedding_and_head_of_a_model_with_unknown_names() -> None:
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


def test_blocks_are_neither_leaves_nor_unlike_children() -> None:
    model = _Part(
        layers=nn.ModuleList([_linear(8, 8), _linear(8, 8)]),
        body=nn.Sequential(_attention(), nn.Sequential(_linear(8, 8), _linear(8, 8))),
    )
    description = describe(model)
    assert description["layer"].isna().all()
    assert "block" not in set(description["role"])
    assert parse("layers.0").role == "block"  # the name alone is mistaken here


def test_a_single_block_is_known_by_its_container() -> None:
    description = describe(tiny("llama", num_hidden_layers=1))
    assert description.loc[description["role"] == "block", "module"].tolist() == ["model.layers.0"]


@pytest.mark.parametrize(("fused", "role"), [(24, "qkv"), (16, "qkv"), (12, "qkv"), (14, "other"), (32, "other")])
def test_fused_attention_is_known_by_its_size(fused: int, role: str) -> None:
    """Width 8 with one, two and four times shared keys; 14 leaves 3 key columns, 32 more keys than queries."""
    roles = _invented_roles({"attn": _Part(mix=_linear(fused, 8), o_proj=_linear(8, 8))})
    assert roles == {"attn.mix": role, "attn.o_proj": "o"}


def test_fused_attention_reads_the_blocks_input() -> None:
    latent = _Part(squeeze=_linear(4, 8), expand=_linear(24, 4), o_proj=_linear(8, 8))
    assert _invented_roles({"attn": latent}) == {"attn.squeeze": "other", "attn.expand": "other", "attn.o_proj": "o"}


def test_gates_are_known_by_their_neighbours() -> None:
    pair = _Part(w1=_linear(20, 8), w2=_linear(8, 20))
    trio = _Part(w1=_linear(20, 8), w3=_linear(20, 8), w2=_linear(8, 20))
    unknown = _Part(a=_linear(20, 8), b=_linear(20, 8), c=_linear(8, 20))
    router = _Part(pick=_linear(2, 8))
    assert _invented_roles({"pair": pair, "trio": trio, "unknown": unknown, "router": router}) == {
        "pair.w1": "ffn_in",
        "pair.w2": "ffn_out",
        "trio.w1": "ffn_gate",
        "trio.w3": "ffn_in",
        "trio.w2": "ffn_out",
        "unknown.a": "ffn_gate",
        "unknown.b": "ffn_in",
        "unknown.c": "ffn_out",
        "router.pick": "other",
    }


def test_the_second_attention_of_a_block_is_cross_attention() -> None:
    roles = _invented_roles({"first": _attention(), "second": _attention(norm=nn.LayerNorm(8))})
    assert [roles[f"first.{name}"] for name in "qkvo"] == ["q", "k", "v", "o"]
    assert [roles[f"second.{name}"] for name in "qkvo"] == ["cross_q", "cross_k", "cross_v", "cross_o"]
    assert roles["second.norm"] == "norm"


def test_tied_weights_are_known_by_identity_not_by_value() -> None:
    model = _model(readout=_linear(50, 8), twin=_linear(50, 8))
    with torch.no_grad():
        model.twin.weight.copy_(model.table.weight)
    model.readout.weight = model.table.weight
    description = describe(model)
    assert _roles(description) == {"table": "embed", "twin": "head"}
    assert description["tied"].tolist() == ["readout", ""]


def test_an_untied_head_is_listed() -> None:
    description = describe(tiny("gpt2", tie_word_embeddings=False))
    assert _roles(description)["lm_head"] == "head"
    assert set(description["tied"]) == {""}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for the old name
def test_adapters_are_looked_through() -> None:
    model = tiny("roberta")
    bare = describe(model)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["classifier"])
    pd.testing.assert_frame_equal(describe(peft.get_peft_model(model, config)), bare)

    host = tiny("roberta")
    host.classifier.out_proj.add_module("delta", nn.Linear(4, 4))
    pd.testing.assert_frame_equal(describe(host), bare)

    tied = peft.get_peft_model(tiny("gpt-neox"), peft.LoraConfig(target_modules=["lm_head", "embed_in"]))
    pd.testing.assert_frame_equal(describe(tied), describe(tiny("gpt-neox")))


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
def test_axes_run_from_the_embedding_to_the_head(family: str, order: str) -> None:
    rows = describe(tiny(family)).sample(frac=1, random_state=0)
    ends = rows[rows["layer"].isna() | (rows["role"] == "block")]
    places = sorted(((row.stack, row.layer, row.role) for row in ends.itertuples()), key=lambda place: position(*place))
    assert " ".join(role if pd.isna(layer) else f"{stack}{layer}" for stack, layer, role in places) == order


def test_position_takes_any_missing_layer_and_orders_roles_within_a_layer() -> None:
    assert position("", None, "head") == position("", pd.NA, "head") == position("", float("nan"), "head")
    keys = [position("", 3, role) for role in ROLES]
    assert keys == sorted(keys)
    assert position("", 9, "q") < position("", 10, "q")


def _matches(family: str, targets: str | list[str], head: str | None = None) -> list[str]:
    return match(describe(tiny(family, head)), targets)


def test_match_by_role_follows_model_order() -> None:
    expected = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    assert _matches("llama", ["v", "q"]) == expected
    assert _matches("llama", "ffn_gate") == [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
    assert _matches("bert", ["head", "embed"]) == [
        "bert.embeddings.word_embeddings",
        "bert.embeddings.token_type_embeddings",
        "classifier",
    ]


@pytest.mark.parametrize(
    ("family", "fused"), [("gpt2", "c_attn"), ("gpt-neox", "query_key_value"), ("phi3", "qkv_proj")]
)
@pytest.mark.parametrize("role", ["q", "k", "v", "qkv"])
def test_match_takes_a_fused_module_whole(family: str, fused: str, role: str) -> None:
    assert [name.rpartition(".")[2] for name in _matches(family, [role, "q"])] == [fused, fused]


def test_match_finds_a_gate_fused_with_the_input() -> None:
    fused = [f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1)]
    assert _matches("phi3", "ffn_gate") == _matches("phi3", "ffn_in") == fused
    with pytest.raises(ValueError, match="'ffn_gate' matches no module"):
        _matches("bert", "ffn_gate")


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_all_linear_is_every_linear_inside_the_blocks(family: str, head: str) -> None:
    model = tiny(family, head)
    expected = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and parse(name).layer is not None
    ]
    assert match(describe(model), "all-linear") == expected


def test_match_by_regex_covers_the_whole_name_and_chooses_matrices_only() -> None:
    assert _matches("bert", r".*\.1\.attention\..*") == [
        f"bert.encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")
    ]
    with pytest.raises(ValueError, match="matches no module"):
        _matches("bert", "attention")
    with pytest.raises(ValueError, match="neither a role nor a regular expression"):
        _matches("bert", "attention(")


def test_match_takes_tied_names() -> None:
    assert _matches("gpt2", ["lm_head"]) == _matches("gpt2", "lm_head") == ["lm_head"]
    assert _matches("gpt2", ["transformer.wte"]) == ["transformer.wte"]
    assert _matches("t5", r".*embed_tokens") == ["encoder.embed_tokens", "decoder.embed_tokens"]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("querry", r"'querry' matches no module; near: .*attention\.self\.query \(role q\)"),
        (["q", "cross_q"], "'cross_q' matches no module; roles here: q k v o ffn_in ffn_out embed"),
        (["q", "bert.encoder.layer.7"], r"'bert.encoder.layer.7' matches no module; near: bert\.encoder\.layer\.[01]"),
        (["q", "ffn_inn"], "'ffn_inn' matches no module; near: ffn_in"),
        (["q", ".*key"], r"'\.\*key' matches no module"),  # within a sequence a name is exact
        ([], "targets is empty; roles here: q"),
    ],
)
def test_match_says_what_was_probably_meant(targets: str | list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        _matches("bert", targets)
    assert "\n" not in str(caught.value)


def test_every_head_of_every_family_is_covered() -> None:
    """The heads left out are those that transformers has not, and causal or masked twins of a tested one."""
    twins = {("bert", "causal"), ("roberta", "causal"), ("electra", "causal"), ("electra", "masked")}
    twins |= {("deberta-v2", "masked"), ("distilbert", "masked"), ("bart", "masked"), ("bart", "causal")}
    for family in FAMILIES:
        for head, auto in HEADS.items():
            known = type(tiny(family).config) in auto._model_mapping
            assert ((family, head) in ENDS or (family, head) in twins) == known
