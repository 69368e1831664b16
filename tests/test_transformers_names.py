"""Names of the module tree: what transformers itself loads, for families of models and by the stored table."""

from __future__ import annotations

import json
from pathlib import Path

import base_families
import pytest
import torch
import write_transformers_names
from base_families import FAMILIES

from lorascope.formats import transformers_names
from lorascope.formats.pretrained_weights import PretrainedWeights

RENAMED = ("vit", "deit", "beit", "dinov2", "dinov2 with SwiGLU", "swin", "llava", "gemma3", "qwen2_vl")


CASES = [pytest.param(family, marks=() if family in RENAMED else pytest.mark.slow) for family in FAMILIES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CASES)
def test_every_module_of_a_family_is_applied_and_merged(family: str, tmp_path: Path) -> None:
    base_families.write(family, tmp_path)
    row = base_families.check(tmp_path)
    assert row.applied == row.merged == row.modules >= 8
    assert row.other_weights == 0
    assert (row.renamed > 0) == (family in RENAMED or family in ("llava with SigLIP and Qwen2", "paligemma"))
    check_values(family, tmp_path)


def check_values(family: str, folder: Path) -> None:
    """Compare all weights with those of the loaded model, bit by bit."""
    import transformers

    model = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder / "base")
    weights = PretrainedWeights(folder / "base")
    for name in base_families.linear_modules(model):
        parameter = model.get_submodule(name).weight.detach()
        W = weights.weight(name, tuple(parameter.shape))
        assert torch.equal(torch.from_numpy(W.copy()), parameter)


@pytest.mark.parametrize("version", [None, "5.0.0"], ids=["not installed", "another version"])
def test_table_and_installed_version_give_the_same_names(version, monkeypatch) -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model"},
        "text_config": {"model_type": "llama"},
    }
    names = [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.bias",
    ]
    monkeypatch.setattr(transformers_names, "_installed_version", lambda: version)
    assert transformers_names.tree(config, names).names == {
        names[0]: ["model.language_model.layers.0.self_attn.q_proj.weight"],
        names[1]: ["lm_head.weight"],
        names[2]: ["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"],
        names[3]: ["model.multi_modal_projector.linear_1.bias"],
    }


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": 3}, {"architectures": [["a"]], "model_type": {}}, {"architectures": [], "text_config": 1}],
)
def test_configuration_of_an_unknown_model_renames_nothing(config: dict) -> None:
    assert transformers_names.tree(config, ["a.weight"]) == ({"a.weight": ["a.weight"]}, frozenset())


@pytest.mark.slow
def test_table_equals_what_its_version_gives() -> None:
    stored = json.loads(transformers_names.TABLE.read_text(encoding="utf-8"))
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != stored["transformers"]:
        pytest.skip(f"the table is of transformers {stored['transformers']}")
    assert write_transformers_names.contents() == stored


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_architectures_are_renamed_as_transformers_renames_them() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    differences, compared = [], 0
    for architecture in json.loads(transformers_names.TABLE.read_text(encoding="utf-8"))["architectures"]:
        model = write_transformers_names.skeleton(architecture)
        transforms = get_model_conversion_mapping(model)
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
        reversed_renamings = [transform.reverse_transform() for transform in reversed(renamings)]
        reversed_converters = [transform.reverse_transform() for transform in reversed(converters)]
        # Names as transformers saves them, and those of the module tree, which it also loads.
        names = {rename_source_key(key, reversed_renamings, reversed_converters, reverse=True)[0]
                 for key in model.state_dict()} | {*model.state_dict()}  # fmt: skip
        config = model.config.to_dict() | {"architectures": [architecture]}
        tree = transformers_names.tree(config, names)
        for name in sorted(names):  # as transformers does: a group of renamings depends on the names before
            if "attn_queries" in name:  # of Inkling2: a vector that has the number of the layer before
                continue
            expected, _ = rename_source_key(name, renamings, converters)
            if expected not in tree.converted:
                compared += 1
                if tree.names[name][0] != expected:
                    differences.append((architecture, name, expected, tree.names[name][0]))
    assert compared > 50_000
    assert not differences, differences[:10]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_page_has_the_present_table() -> None:
    block = base_families.BLOCK.search(base_families.PAGE.read_text(encoding="utf-8"))
    assert block is not None
    assert base_families.table() in block[0]
