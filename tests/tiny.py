"""Tiny models with random weights, one per supported family: ``from tiny import tiny``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

HEADS = {
    "base": transformers.AutoModel,
    "classification": transformers.AutoModelForSequenceClassification,
    "masked": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "image": transformers.AutoModelForImageClassification,
}

_TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_ENCODER = _TOKENS | _BLOCKS | {"max_position_embeddings": 40}
_DECODER = _ENCODER | {"num_key_value_heads": 2}

# family -> (model_type of transformers, usual head, sizes)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "classification", _ENCODER),
    "roberta": ("roberta", "classification", _ENCODER),
    "deberta-v2": (
        "deberta-v2",
        "classification",
        _ENCODER | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "distilbert": (
        "distilbert",
        "classification",
        _TOKENS | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
    ),
    "electra": ("electra", "classification", _ENCODER | {"embedding_size": 16}),
    "gpt2": ("gpt2", "causal", _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    "gpt-neox": ("gpt_neox", "causal", _ENCODER),
    "opt": (
        "opt",
        "causal",
        _TOKENS
        | {k: v for k, v in _BLOCKS.items() if k != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
    ),
    "llama": ("llama", "causal", _DECODER),
    "mistral": ("mistral", "causal", _DECODER),
    "qwen2": ("qwen2", "causal", _DECODER),
    "qwen3": ("qwen3", "causal", _DECODER | {"head_dim": 8}),
    "gemma": ("gemma", "causal", _DECODER | {"head_dim": 8}),
    "gemma2": ("gemma2", "causal", _DECODER | {"head_dim": 8}),
    "gemma3": ("gemma3_text", "causal", _DECODER | {"head_dim": 8}),
    "phi3": ("phi3", "causal", _DECODER),
    "t5": (
        "t5",
        "seq2seq",
        _TOKENS | {"decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "bart",
        "seq2seq",
        _TOKENS
        | {
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
            "num_labels": 2,
            "d_model": 32,
            "max_position_embeddings": 40,
        }
        | {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))}
        | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    ),
    "vit": ("vit", "image", _BLOCKS | {"image_size": 16, "patch_size": 8}),
}
FAMILIES = tuple(_FAMILIES)


def tiny(family: str, head: str | None = None, seed: int = 0, **config: Any) -> nn.Module:
    """Build a model of width 32 with two blocks, in evaluation mode.

    Parameters
    ----------
    family : str
        One of ``FAMILIES``.
    head : str, optional
        One of ``HEADS``; by default that of the family: encoders are classifiers, decoders causal LMs.
    seed : int
        Seed of the weights; the global generator does not change.
    **config
        Overrides of the family's configuration, such as ``num_labels=3``.
    """
    model_type, usual, sizes = _FAMILIES[family]
    settings = transformers.AutoConfig.for_model(model_type, **(sizes | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS[head or usual].from_config(settings).eval()


def inputs(model: nn.Module, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw random inputs of the model's ``forward``: token ids without padding, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch, model.config.num_channels, side, side, generator=generator)}
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # BART classifies at this token
        given["decoder_input_ids"] = ids
    return given
