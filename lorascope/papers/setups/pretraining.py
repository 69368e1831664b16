"""Pre-training: GPT-2's architecture from scratch on the bundled sentences as plain text.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

Departs:

- 4 layers of width 128 with 4 heads and 64 positions, and a vocabulary of 2,048 pieces.
- No dropout, because a run of 600 steps of 16 texts sees each text at most once.
- All matrices are drawn with the same standard deviation, 0.02. GPT-2 draws those that write to the residual stream
  smaller, by the square root of twice the number of layers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lorascope.inputs import models, package_assets, sources, tasks

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 2048, 128, 4, 4, 64
"""Sizes of the model; ``LENGTH`` is its number of positions, and must be the ``max_length`` of a training."""
_PADDING, _END = "<pad>", "<end>"  # special tokens get the first ids, 0 and 1, which the configuration names


@cache
def plain_text() -> tasks.Task:
    """Return the text for pre-training: the sentences of the task "sentiment", in the same splits and clusters."""
    rows = sources.sentiment()
    return tasks.from_frame(
        pd.DataFrame({"text": rows["text"], "cluster": sources.clusters(rows)}), "sentiment as text"
    )


def untrained_folder() -> str:
    """Return the folder of the model before pre-training and its tokenizer; the first call writes it."""

    def write(folder: Path) -> None:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        with models.quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            GPT2LMHeadModel(config).save_pretrained(folder)
        train_tokenizer(plain_text().split("train")["text"].to_list()).save_pretrained(folder)

    # The tokenizer depends on the text, so another text gets another folder.
    return str(package_assets.build_once(package_assets.cache() / f"pretraining-{plain_text().hash[:16]}", write))


def untrained_model() -> nn.Module:
    """Return the model before pre-training, with its tokenizer.

    ``train`` draws all its matrices from the seed of the run, as it does for a new head. Both learning rates must
    therefore be equal. Biases are zero and the weights of norms are one.
    """
    model = models.load(untrained_folder())
    models.note_missing(model, [name for name, parameter in model.named_parameters() if parameter.ndim > 1])
    return model


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer for pre-training with ``VOCABULARY`` pieces on texts, by byte pairs as GPT-2's."""
    core = Tokenizer(tokenizer_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # All 256 bytes, so that any text can be encoded without an unknown token.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[_PADDING, _END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PADDING, eos_token=_END)
