"""A teacher whose update has a known rank in every layer, and the text that it writes.

A small decoder with random weights is the base of all. A teacher is the base plus, in every linear of its blocks, an
update of a rank drawn from ``RANKS``; its components have the same singular value everywhere, so that no layer is
more important by the size of its update. Students start from the base and learn the teacher's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorascope.adapters.delta import host_weight
from lorascope.inputs import models, package_assets, tasks
from lorascope.methods.base import Step
from lorascope.observe import Observer
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register

VOCABULARY, WIDTH, BLOCKS, LENGTH = 64, 48, 4, 32
RANKS = (0, 1, 3, 4)
"""Ranks of the planted updates, each in a quarter of the modules."""
BUDGET = 2
"""Their mean."""
STRENGTH = 0.75
"""Singular value of a planted component, in units of the largest singular value of the base's weight."""
TEXTS = 3000


register("planted_rank", Quantity("planted rank", pool="sum", definition="rank of the teacher's update"))


@dataclass(kw_only=True)
class planted(Observer):
    """The truth, kept beside what was found.

    Parameters
    ----------
    ranks : mapping module -> rank
    """

    ranks: Mapping[str, int]

    def __call__(self, step: Step) -> list[Item]:
        """Once, before the first step."""
        return [Record("planted_rank", rank, module) for module, rank in self.ranks.items() if not step.finished]


def base() -> str:
    """Folder of the base model and its tokenizer; written on the first call."""
    return str(package_assets.build_once(package_assets.cache() / "planted-base", _write_base))


def _write_base(folder: Path) -> None:
    with models.quiet():
        _random_decoder().save_pretrained(folder)
    words = {_word(token): token for token in range(VOCABULARY)}
    core = Tokenizer(tokenizer_models.WordLevel(words, unk_token=_word(0)))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_word(0)).save_pretrained(folder)


def student() -> nn.Module:
    """A fresh copy of the base."""
    return models.load(base())


@cache
def planted_ranks(seed: int) -> Mapping[str, int]:
    """Rank of the teacher's update in every linear of the blocks."""
    modules = module_table.match(module_table.describe(student()), "all-linear")
    drawn = np.random.default_rng(seed).permutation(np.resize(RANKS, len(modules)))
    return dict(zip(modules, drawn.tolist(), strict=True))


def teacher(seed: int) -> nn.Module:
    """The base with the planted updates in its weights."""
    model = student()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, rank in planted_ranks(seed).items():
            weight = host_weight(model.get_submodule(name))
            size = STRENGTH * torch.linalg.matrix_norm(weight, 2)
            weight.add_(size * _random_directions(weight, rank, generator))
    return model


@cache
def task(seed: int) -> tasks.Task:
    """Text that the teacher of this seed writes."""
    lines = [" ".join(map(_word, row)) for row in _sample_texts(teacher(seed), seed).tolist()]
    return tasks.from_frame(pd.DataFrame({"text": lines}), f"planted ranks, teacher {seed}")


def _random_decoder() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in _decoder_matrices(model):
            # Variances that keep every layer's output at unit size, and logits far enough apart to be told.
            spread = {"embed": 1.0, "lm_head": 2 / WIDTH**0.5}.get(name, weight.shape[1] ** -0.5)
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model


def _decoder_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            yield ("embed" if "embed" in name else "lm_head" if "lm_head" in name else name), weight


def _random_directions(
    weight: Float[Tensor, "out in"], rank: int, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """A random matrix with ``rank`` singular values 1."""
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in weight.shape)
    return left @ right.T


def _sample_texts(model: Any, seed: int) -> Int[Tensor, "texts length"]:
    """Texts drawn token by token from what the model predicts; the first token is uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.randint(1, VOCABULARY, (TEXTS, 1))
        sampling = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_length=LENGTH,
            suppress_tokens=[0],  # padding is no word
            pad_token_id=0,
        )
        return model.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling)


def _word(token: int) -> str:
    return f"w{token}"
