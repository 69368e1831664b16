"""Teacher model whose update has a known rank in every module, and text sampled from it.

The base is a small decoder with random weights. A teacher is the base plus an update of a rank drawn from ``RANKS`` in
every linear layer of the blocks. All components of the updates have the same singular value relative to the base
weight. No layer is more important because of the size of its components. Students start from the base and learn the
teacher's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorascope.adapters.delta import host_weight
from lorascope.array_types import Int
from lorascope.inputs import models, package_assets, tasks
from lorascope.methods.method import Step
from lorascope.observe import Observer
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register

VOCABULARY, WIDTH, BLOCKS, LENGTH = 64, 48, 4, 32
RANKS = (0, 1, 3, 4)
"""Ranks of the planted updates; each is used in a quarter of the modules."""
BUDGET = 2
"""Mean of ``RANKS``: the mean rank per module of all students with a budget."""
STRENGTH = 0.75
"""Singular value of a planted component, relative to the largest singular value of the base weight."""
TEXTS = 3000
"""Number of sampled examples."""

_PLANTED_RANK = Quantity("planted rank", pool="sum", definition="rank of the teacher's update")
register("train on the text of a planted teacher, with observe=[planted()]", planted_rank=_PLANTED_RANK)


@dataclass(kw_only=True)
class planted(Observer):
    """Observer that records the ranks of the planted teacher once, before the first step.

    Parameters
    ----------
    ranks : mapping module -> rank
        Planted rank of each module.
    """

    ranks: Mapping[str, int]

    def __call__(self, step: Step) -> list[Item]:
        """Return the planted ranks at step 0, and no records later."""
        return [Record("planted_rank", rank, module) for module, rank in self.ranks.items() if not step.finished]


def base(blocks: int = BLOCKS) -> str:
    """Return the folder of the planted teacher's base model and tokenizer; the first call writes it."""

    def write(folder: Path) -> None:
        with models.quiet():
            _random_decoder(blocks).save_pretrained(folder)
        words = {token_word(token): token for token in range(VOCABULARY)}
        core = Tokenizer(tokenizer_models.WordLevel(words, unk_token=token_word(0)))
        core.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=core, pad_token=token_word(0)).save_pretrained(folder)

    name = "planted-base" if blocks == BLOCKS else f"planted-base-{blocks}"
    return str(package_assets.build_once(package_assets.cache() / name, write))


def student(blocks: int = BLOCKS) -> nn.Module:
    """Load a fresh student of the planted teacher: a copy of the base model."""
    return models.load(base(blocks))


@cache
def planted_ranks(seed: int) -> Mapping[str, int]:
    """Return the rank of the planted teacher's update in every linear layer of the blocks."""
    modules = module_table.match(module_table.describe(student()), "all-linear")
    # Every rank is equally frequent, so all teachers have the same total rank.
    drawn = np.random.default_rng(seed).permutation(np.resize(RANKS, len(modules)))
    return dict(zip(modules, drawn.tolist(), strict=True))


def teacher(seed: int) -> nn.Module:
    """Build the planted teacher of a seed: the base with the planted updates merged into its weights."""
    model = student()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, rank in planted_ranks(seed).items():
            weight = host_weight(model.get_submodule(name))
            size = STRENGTH * torch.linalg.matrix_norm(weight, 2)
            # A random matrix whose singular values are 1.
            left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in weight.shape)
            weight.add_(size * (left @ right.T))
    return model


@cache
def task(seed: int) -> tasks.Task:
    """Sample the text of a seed's planted teacher, as a task."""
    lines = [" ".join(map(token_word, row)) for row in _sample_texts(teacher(seed), seed).tolist()]
    return tasks.from_frame(pd.DataFrame({"text": lines}), f"planted ranks, teacher {seed}")


def _random_decoder(blocks: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
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
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # These variances keep the output of every layer at unit scale and give a peaked distribution of tokens.
                fan_in = weight.shape[1] ** -0.5
                spread = 1.0 if "embed" in name else 2 / WIDTH**0.5 if "lm_head" in name else fan_in
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model


def _sample_texts(model: Any, seed: int) -> Int[Tensor, "texts length"]:
    """Sample examples token by token from the model; the first token is uniform over all except padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.randint(1, VOCABULARY, (TEXTS, 1))
        sampling = GenerationConfig(
            do_sample=True,
            top_k=0,  # the default samples from the 50 most likely tokens only
            max_length=LENGTH,
            suppress_tokens=[0],  # never sample the padding token
            pad_token_id=0,
        )
        return model.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling)


def token_word(token: int) -> str:
    """Return the word of a token."""
    return f"w{token}"
