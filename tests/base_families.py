"""Small random models of transformers, saved, adapted and merged with PEFT: ``doctor`` must apply every module of them.

python tests/base_families.py    write the table of docs/doctor.md
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorascope.diagnosis.merge import check_merge
from lorascope.diagnosis.runtimes.runtime import apply_adapter
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load_adapter

PAGE = Path(__file__).parents[1] / "docs/doctor.md"
BLOCK = re.compile(r"(<!-- base families -->\n).*?(<!-- /base families -->)", re.DOTALL)

_TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BLOCKS = _LAYERS | {"intermediate_size": 48}
_ENCODER = _TOKENS | _BLOCKS | {"max_position_embeddings": 40}
_DECODER = _ENCODER | {"num_key_value_heads": 2}
_HEAD_DIM = _DECODER | {"head_dim": 8}
_SEQ2SEQ = _TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_IMAGE = _BLOCKS | {"image_size": 16, "patch_size": 8, "num_channels": 3}
_SIGLIP = _IMAGE | {"model_type": "siglip_vision_model"}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", _ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        _TOKENS | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
    ),
    "electra": ("ElectraForSequenceClassification", _ENCODER | {"embedding_size": 16}),
    "albert": ("AlbertForSequenceClassification", _ENCODER | {"embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        _ENCODER | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": ("MPNetForSequenceClassification", _ENCODER),
    "modernbert": ("ModernBertForSequenceClassification", _ENCODER),
    "gpt2": ("GPT2LMHeadModel", _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    "gpt_neox": ("GPTNeoXForCausalLM", _ENCODER),
    "opt": (
        "OPTForCausalLM",
        _TOKENS | _LAYERS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
    ),
    "bloom": ("BloomForCausalLM", _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", _TOKENS | _LAYERS),
    "llama": ("LlamaForCausalLM", _DECODER),
    "mistral": ("MistralForCausalLM", _DECODER),
    "mixtral": ("MixtralForCausalLM", _DECODER | {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", _HEAD_DIM),
    "gemma2": ("Gemma2ForCausalLM", _HEAD_DIM),
    "phi3": ("Phi3ForCausalLM", _DECODER),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ | {"max_position_embeddings": 40}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
    ),
    "vit": ("ViTForImageClassification", _IMAGE),
    "deit": ("DeiTForImageClassification", _IMAGE),
    "beit": ("BeitForImageClassification", _IMAGE),
    "dinov2": ("Dinov2ForImageClassification", _IMAGE),
    "dinov2 with SwiGLU": ("Dinov2ForImageClassification", _IMAGE | {"use_swiglu_ffn": True}),
    "swin": (
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
        },
    ),
    "clip": (
        "CLIPModel",
        {"text_config": _ENCODER | {"projection_dim": 16}, "vision_config": _IMAGE, "projection_dim": 16},
    ),
    "siglip": ("SiglipModel", {"text_config": _ENCODER | {"projection_size": 32}, "vision_config": _IMAGE}),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": _DECODER | {"model_type": "llama"},
            "vision_config": _IMAGE | {"model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "llava with SigLIP and Qwen2": (
        "LlavaForConditionalGeneration",
        {"text_config": _DECODER | {"model_type": "qwen2"}, "vision_config": _SIGLIP, "image_token_index": 5},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _HEAD_DIM | {"model_type": "gemma3_text"},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _DECODER | _MROPE,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": _HEAD_DIM | {"model_type": "gemma"},
            "vision_config": _SIGLIP | {"projection_dim": 32},
            "projection_dim": 32,
            "hidden_size": 32,
        },
    ),
}
"""Family -> class of transformers and the sizes of its configuration."""


class Row(NamedTuple):
    """Numbers of modules of a sound adapter of one family, as lorascope reports them."""

    modules: int
    renamed: int
    applied: int
    merged: int
    other_weights: int


def linear_modules(model: nn.Module) -> list[str]:
    """Return the names of all linear layers but the output head, which may be tied to the embedding."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def write(family: str, folder: Path) -> None:
    """Write a base, an adapter of its linear layers with random factors, and PEFT's merge of both."""
    class_name, sizes = FAMILIES[family]
    architecture = getattr(transformers, class_name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architecture(architecture.config_class(**sizes)).save_pretrained(folder / "base")
        model = architecture.from_pretrained(folder / "base")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linear_modules(model)))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "merged")


def check(folder: Path) -> Row:
    """Return what lorascope says about the adapter and the merge in a folder."""
    adapter = load_adapter(folder / "adapter", folder / "base")
    assert adapter.base is not None
    stored_names = set(adapter.base.all_modules())
    merge = check_merge(adapter, PretrainedWeights(folder / "merged"))
    modules = adapter.files.parts
    return Row(
        len(modules),
        len(modules.keys() - stored_names),
        apply_adapter(adapter.files, adapter.base, "peft").applied,
        sum(module.verdict in ("merged", "consistent") for module in merge.modules),
        sum(tensor.verdict != "kept" for tensor in merge.tensors),
    )


def table() -> str:
    """Return the table of all families in Markdown."""
    lines = [
        "| model | class | modules | named otherwise in the file | applied | merged |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for family, (class_name, _) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(family, Path(folder))
            row = check(Path(folder))
        lines.append(f"| {family} | {class_name} | {row.modules} | {row.renamed} | {row.applied} | {row.merged} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda match: match[1] + table() + match[2], page), encoding="utf-8")
