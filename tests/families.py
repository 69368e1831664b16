"""Seven model families: checkpoints with their preprocessors, tasks, and module paths of blocks and roles."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import BAD, FILLER, GOOD, tiny_tokenizer
from tiny import tiny
from transformers import ViTImageProcessor

from lorascope.inputs import tasks

# Options that differ from the usual tiny models. With a tied head, LLaMA has the architecture of SmolLM2.
SIZES = {"llama": {"tie_word_embeddings": True}, "vit": {"num_labels": 2}}

_SPLIT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_in": "mlp.up_proj", "ffn_out": "mlp.down_proj"}
_BART = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_BERT = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}


def _under(path: str, leaves: dict[str, str], prefix: str = "") -> dict[str, str]:
    return {f"{prefix}{role}": f"{path}.{leaf}" for role, leaf in leaves.items()}


_T5_SELF = _under("layer.0.SelfAttention", dict(zip("qkvo", "qkvo", strict=True)))
_T5_CROSS = _under("layer.1.EncDecAttention", dict(zip("qkvo", "qkvo", strict=True)), "cross_")


def _t5_ffn(number: int) -> dict[str, str]:
    return _under(f"layer.{number}.DenseReluDense", {"ffn_in": "wi", "ffn_out": "wo"})


_BART_FFN = {"ffn_in": "fc1", "ffn_out": "fc2"}
# family -> stack -> path of its blocks, and role -> linear layer inside a block; written by hand
PLACES: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "bert": {
        "encoder": (
            "bert.encoder.layer",
            _BERT | {"o": "attention.output.dense", "ffn_in": "intermediate.dense", "ffn_out": "output.dense"},
        )
    },
    "gpt2": {
        "": (
            "transformer.h",
            {"qkv": "attn.c_attn", "o": "attn.c_proj", "ffn_in": "mlp.c_fc", "ffn_out": "mlp.c_proj"},
        )
    },
    "llama": {"": ("model.layers", _under("self_attn", _SPLIT) | _GATED)},
    "phi3": {
        "": (
            "model.layers",
            {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"}
            | {"ffn_in": "mlp.gate_up_proj", "ffn_out": "mlp.down_proj"},
        )
    },
    "t5": {
        "encoder": ("encoder.block", _T5_SELF | _t5_ffn(1)),
        "decoder": ("decoder.block", _T5_SELF | _T5_CROSS | _t5_ffn(2)),
    },
    "bart": {
        "encoder": ("model.encoder.layers", _under("self_attn", _BART) | _BART_FFN),
        "decoder": (
            "model.decoder.layers",
            _under("self_attn", _BART) | _under("encoder_attn", _BART, "cross_") | _BART_FFN,
        ),
    },
    "vit": {"": ("vit.layers", _under("attention", _SPLIT) | {"ffn_in": "mlp.fc1", "ffn_out": "mlp.fc2"})},
}
FAMILIES = tuple(PLACES)
BLOCKS = 2
# Parameters that are new with the task, which all methods train.
HEADS = {"bert": {"classifier.weight", "classifier.bias"}, "vit": {"classifier.weight", "classifier.bias"}}
HALF = 48  # rows of the gate projection in Phi-3's fused gate_up_proj


def modules(family: str, *roles: str) -> dict[str, tuple[str, int, str]]:
    """Return stack, layer and role of the modules with these roles, encoder first; q, k and v match parts of qkv."""
    return {
        f"{path}.{layer}.{leaf}": (stack, layer, role)
        for stack, (path, leaves) in PLACES[family].items()
        for layer in range(BLOCKS)
        for role, leaf in _with_parts(leaves).items()
        if role in roles
    }


def _with_parts(leaves: dict[str, str]) -> dict[str, str]:
    fused = leaves.get("qkv")
    return ({role: f"{fused}[{role}]" for role in "qkv"} if fused else {}) | leaves


def blocks(family: str) -> list[str]:
    """Return the paths of the blocks, encoder first."""
    return [f"{path}.{layer}" for path, _ in PLACES[family].values() for layer in range(BLOCKS)]


def folder(path: Path, family: str) -> str:
    """Save a checkpoint of the family and return its folder; BERT is saved without a classifier head."""
    model = tiny(family, "base" if family == "bert" else None, **SIZES.get(family, {}))
    model.save_pretrained(path)
    if family == "vit":
        size = {"height": model.config.image_size, "width": model.config.image_size}
        ViTImageProcessor(size=size).save_pretrained(path)
    else:
        tiny_tokenizer().save_pretrained(path)
    return str(path)


def task_of(family: str) -> tasks.Task:
    """Return a task: images for ViT, prompts with open responses for encoder-decoders, labeled texts otherwise."""
    draw = random.Random(0)
    if family == "vit":
        noise = np.random.default_rng(0)
        labels = [draw.choice(["left", "right"]) for _ in range(120)]
        return tasks.from_frame(
            pd.DataFrame({"image": [noise_image(noise, label) for label in labels], "label": labels, "group": "all"}),
            "toy",
        )
    rows = []
    for number in range(120):
        words = [draw.choice(FILLER) for _ in range(draw.randint(2, 6))]
        good = draw.random() < 0.5
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if good else BAD))
        label = "positive" if good else "negative"
        if family in ("t5", "bart"):
            reply = " ".join(["very"] * draw.randint(0, 3) + [label])
            rows.append({"prompt": " ".join(words), "response": reply, "group": "ab"[number % 2]})
        else:
            rows.append({"text": " ".join(words), "label": label, "group": "ab"[number % 2]})
    return tasks.from_frame(pd.DataFrame(rows), "toy")


def noise_image(noise: np.random.Generator, label: str, side: int = 20) -> np.ndarray:
    """Return noise of shape (side, side, 3) and dtype uint8 that is brighter in the left or right half."""
    image = noise.integers(0, 120, (side, side, 3), dtype=np.uint8)
    half = slice(0, side // 2) if label == "left" else slice(side // 2, side)
    image[:, half] += 120
    return image
