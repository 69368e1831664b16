"""Rows of the readers of PEFT's LoRA options: adapters of random factors, and their updates as PEFT merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contract.format_row import FormatRow, Written

OUT, IN, RANK = 6, 4, 2
EXPERTS = tuple(f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(3))


def options(kind: str, **config: Any) -> FormatRow:
    """Return the row of a LoRA with an option; its base is written if ``kind`` is KaSA."""

    def write(folder: Path, base: Path) -> Written:
        import numpy as np
        from contract.format_rows import Q, V, as_float64, draw
        from contract.format_rows import write as write_folder
        from safetensors.numpy import save

        factors, found = {}, {}
        for number, module in enumerate((Q, V)):
            A, B = as_float64(draw(number, RANK, IN)), as_float64(draw(number, OUT, RANK))
            stored = {"A.weight": A, "B.weight": B}
            if kind == "BD-LoRA":  # two blocks of B on the diagonal
                stored["B.weight"] = np.vstack([B[: OUT // 2, :1], B[OUT // 2 :, 1:]])
                B[: OUT // 2, 1:] = B[OUT // 2 :, :1] = 0
            if kind == "QALoRA":
                stored["A.weight"] = A[:, ::2]
                A[:, 1::2] = A[:, ::2]
                A *= IN / 2 / 2
            found[module] = 3 / RANK * B @ A
            if kind == "KaSA":
                diagonal, W = draw(number, RANK), as_float64(draw(9 + number, OUT, IN))
                base.mkdir(parents=True, exist_ok=True)
                U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
                removed = U[:, -RANK:] * sigma[-RANK:] @ Vt[-RANK:]
                found[module] = 3 / RANK * B * diagonal @ A - removed
                (base / f"model-{number}.safetensors").write_bytes(save({f"{module}.weight": W.astype("f4")}))
                stored["diag"] = diagonal
            factors |= {f"{module}.lora_{name}": np.asarray(x, "f4") for name, x in stored.items()}
        write_folder(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, **config}, factors)
        return found

    return FormatRow(write, kind)


def experts(folder: Path, base: Path) -> Written:
    from contract.format_rows import as_float64, draw
    from contract.format_rows import write as write_folder

    name, count = "model.layers.0.mlp.experts", len(EXPERTS)
    A, B = draw(1, count * RANK, IN), draw(2, OUT, count * RANK)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_parameters": ["experts.down_proj"]}
    write_folder(folder, config, {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B})
    return {
        module: 3 / RANK * as_float64(B[:, number::count]) @ as_float64(A[number * RANK : (number + 1) * RANK])
        for number, module in enumerate(EXPERTS)
    }


ROWS = {
    "read_experts": FormatRow(experts, "LoRA", modules=EXPERTS),
    "read_bdlora": options("BD-LoRA", use_bdlora={"target_modules_bd_b": ["_proj"], "nblocks": 2}),
    "read_qalora": options("QALoRA", use_qalora=True, qalora_group_size=2),
    "read_kasa": options("KaSA", kasa_config={"beta": 1e-4}),
}
