"""A small training in one process, or in two that share the weights by FSDP2; started by test_sharded_weights.py.

Usage: python sharded_training.py {lora,full,second_moments,gradients} WORLD RANK FOLDER {recorded,bare}. All processes
have the same batches, so their mean gradient equals that of one process exactly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

import lorascope as ls

STEPS = 5


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_dropout_prob=0.0,
                                                     attention_probs_dropout_prob=0.0, **sizes))  # fmt: skip
    if kind != "lora":
        return model
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=3)
    return peft.get_peft_model(model, config)


def main(kind: str, world: int, rank: int, folder: Path, recorded: bool) -> None:
    torch.set_num_threads(1)
    model = model_of(kind)
    if world > 1:
        distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.modules():
            if type(layer).__name__ == "BertLayer":
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    observers = [ls.observe.norms(every=2), ls.observe.factors(every=2)]
    if kind in ("second_moments", "gradients"):
        observers = [getattr(ls.observe, kind)()]
    recorder = ls.record(model, optimizer, folder / "run", observers, steps=STEPS) if recorded else None
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(0, 50, (4, 7), generator=draw)
        loss = model(input_ids=ids, labels=ids[:, 0] % 2).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # measured only
        optimizer.step()
        if recorder is not None:
            recorder.step(loss=loss, grad_norm=norm)
        optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.state_dict().items()}
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "weights.safetensors")
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "recorded")
