"""Time of ALoRA's ablation scores compared with separate evaluations of the whole model.

Run ``python benchmarks/alora_scoring.py``. The separate evaluations set columns of B to zero, and run the whole model
twice for every component.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import transformers
from paired import compare
from torch import Tensor, nn

from lorascope.adapters.ablation import ablation_scores
from lorascope.adapters.delta import attached_deltas
from lorascope.methods import ALoRA

TARGET = 0.6


def batch_of(size: int, length: int) -> dict[str, Tensor]:
    """Return random token ids without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (size, length), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted_bert(blocks: int, width: int, rank: int) -> nn.Module:
    """Return a random BERT with MiniLM's proportions and nonzero adapters on all linears of its blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
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


def _swapped(mine: np.ndarray, theirs: np.ndarray) -> int:
    """Count the pairs of components whose order differs."""
    one, other = (np.sign(np.subtract.outer(importance, importance)) for importance in (mine, theirs))
    return int((one * other < 0).sum() // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 30])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shape", default="32x32", help="rows x tokens of the scoring batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = batch_of(*map(int, arguments.shape.split("x")))
    for blocks in arguments.blocks:
        model = adapted_bert(blocks, arguments.width, arguments.rank)

        def loss(batch: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return model(**batch).loss

        mine, theirs = ours(model, loss, batch), one_by_one(model, loss, batch)
        worst = np.abs(mine - theirs).max()
        assert worst < 1e-5, f"scores differ by {worst}"
        ratio = compare(
            lambda: ours(model, loss, batch),  # noqa: B023
            lambda: one_by_one(model, loss, batch),  # noqa: B023
            arguments.pairs,
            warmup=0,
        )
        what = f"scores / one by one, {blocks} blocks of {arguments.width}, {arguments.shape}, rank {arguments.rank}"
        print(ratio.row(what, TARGET), flush=True)
        mixed = _swapped(mine[1] - mine[0], theirs[1] - theirs[0])
        print(f"  largest difference of a score {worst:.1e}; pairs of components in a different order: {mixed}")


if __name__ == "__main__":
    main()
