"""Time of ALoRA's ablation scores compared with separate evaluations of the whole model.

The separate evaluations set columns of B to zero, and run the whole model twice for every component. The model is a
BERT of width 128 with random weights, the batch has 32 x 32 tokens. On one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import transformers
from measurements import MeasuredLine
from paired import compare, report
from torch import Tensor, nn

from lorascope.adapters.ablation import ablation_scores
from lorascope.adapters.delta import attached_deltas
from lorascope.methods import ALoRA

AIM = 0.6
WIDTH, SHAPE = 128, (32, 32)
RANKS = {6: 4, 12: 1}
"""Rank by number of blocks."""


def batch_of(size: int, length: int) -> dict[str, Tensor]:
    """Return random token ids without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (size, length), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted_bert(blocks: int, rank: int) -> nn.Module:
    """Return a random BERT with MiniLM's proportions and nonzero adapters on all linears of its blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // 32}
    config = transformers.BertConfig(vocab_size=1000, num_hidden_layers=blocks, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ALoRA(init_rank=rank).attach(model)
    for delta in attached_deltas(model).values():
        nn.init.normal_(delta.B, std=0.2)
    return model


@torch.no_grad()
def one_by_one(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> np.ndarray:
    """Return the scores of the model without each component, and with only that component."""
    columns = [delta.B[:, index] for delta in attached_deltas(model).values() for index in range(delta.rank)]
    values = [column.clone() for column in columns]
    scores = np.empty((2, len(columns)))
    for number, column in enumerate(columns):
        column.zero_()
        scores[0, number] = -float(loss(batch))
        column.copy_(values[number])
    for column in columns:
        column.zero_()
    for number, column in enumerate(columns):
        column.copy_(values[number])
        scores[1, number] = -float(loss(batch))
        column.zero_()
    for column, value in zip(columns, values, strict=True):
        column.copy_(value)
    return scores


def ours(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> np.ndarray:
    """Return the same scores from ``ablation_scores``."""
    found = ablation_scores(model, loss, batch)
    return np.stack([np.concatenate(list(part.values())) for part in (found.without, found.only)])


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each depth; a pair takes minutes, so there are three at most."""
    torch.set_num_threads(1)
    batch = batch_of(*SHAPE)
    for blocks, rank in RANKS.items():
        model = adapted_bert(blocks, rank)

        def loss(batch: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return model(**batch).loss

        mine, theirs = partial(ours, model, loss, batch), partial(one_by_one, model, loss, batch)
        ratio = compare(mine, theirs, min(pairs, 3), warmup=0)
        yield ratio.line("scores of one round / scoring components one by one", f"{blocks} blocks, rank {rank}", AIM)


if __name__ == "__main__":
    report(lines, __doc__)
