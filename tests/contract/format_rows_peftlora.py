"""Rows of the readers of PEFT's LoRA options."""

from __future__ import annotations

from pathlib import Path

from contract.format_rows import IN, OUT, RANK, FormatRow, Written, as_float64, draw, write

EXPERTS = tuple(f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(3))


def experts(folder: Path, base: Path) -> Written:
    name, count = "model.layers.0.mlp.experts", len(EXPERTS)
    A, B = draw(1, count * RANK, IN), draw(2, OUT, count * RANK)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_parameters": ["experts.down_proj"]}
    write(folder, config, {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B})
    return {
        module: 3 / RANK * as_float64(B[:, number::count]) @ as_float64(A[number * RANK : (number + 1) * RANK])
        for number, module in enumerate(EXPERTS)
    }


ROWS = {"read_experts": FormatRow(experts, "LoRA", modules=EXPERTS)}
