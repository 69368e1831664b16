"""Test the selection of modules to adapt."""

from __future__ import annotations

import pytest
from architectures import ENDS
from tiny import tiny
from torch import nn

from lorascope.schema.module_table import describe, match, parse


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
def test_match_of_a_fused_role_returns_the_fused_module(family: str, fused: str, role: str) -> None:
    assert [name.rpartition(".")[2] for name in _matches(family, [role, "q"])] == [fused, fused]


def test_match_of_a_fused_gate_returns_the_fused_module() -> None:
    fused = [f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1)]
    assert _matches("phi3", "ffn_gate") == _matches("phi3", "ffn_in") == fused
    with pytest.raises(ValueError, match="'ffn_gate' matches no module"):
        _matches("bert", "ffn_gate")


@pytest.mark.parametrize(("family", "head"), ENDS)
def test_all_linear_matches_every_linear_inside_the_blocks(family: str, head: str) -> None:
    model = tiny(family, head)
    expected = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and parse(name).layer is not None
    ]
    assert match(describe(model), "all-linear") == expected


def test_match_by_regex_uses_the_whole_name_and_only_matrices() -> None:
    assert _matches("bert", r".*\.1\.attention\..*") == [
        f"bert.encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")
    ]
    with pytest.raises(ValueError, match="matches no module"):
        _matches("bert", "attention")
    with pytest.raises(ValueError, match=r"targets.*got 'attention\('"):
        _matches("bert", "attention(")


@pytest.mark.parametrize("pattern", ["a{99999999999}", "((a{99}){99}){99}", "x" * 1001])
def test_hostile_pattern_is_rejected_within_its_limits(pattern: str) -> None:
    with pytest.raises(ValueError, match="targets must be a role or a regular expression, got '") as caught:
        _matches("bert", pattern)
    assert "\n" not in str(caught.value)


def test_backtracking_pattern_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="matches no module"):
        _matches("bert", "(.*)*(.*)*(.*)*x")
    monkeypatch.setattr("lorascope.schema.name_patterns.MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"targets must be .*too long"):
        _matches("bert", ".*x")


def test_match_accepts_names_of_tied_modules() -> None:
    assert _matches("gpt2", ["lm_head"]) == _matches("gpt2", "lm_head") == ["lm_head"]
    assert _matches("gpt2", ["transformer.wte"]) == ["transformer.wte"]
    assert _matches("t5", r".*embed_tokens") == ["encoder.embed_tokens", "decoder.embed_tokens"]


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        ("querry", r"'querry' matches no module .*attention\.self\.query \(role q\)\?"),
        (["q", "cross_q"], r"'cross_q' matches no module \(.*: q k v o ffn_in ffn_out embed"),
        (["q", "bert.encoder.layer.7"], r"'bert.encoder.layer.7' matches no module .*bert\.encoder\.layer\.[01]"),
        (["q", "ffn_inn"], r"'ffn_inn' matches no module .*ffn_in\?"),
        (["q", ".*key"], r"'\.\*key' matches no module"),  # in a sequence, names are exact
        ([], "targets must not be empty .*: q k"),
    ],
)
def test_unmatched_target_error_suggests_close_names(targets: str | list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        _matches("bert", targets)
    assert "\n" not in str(caught.value)
