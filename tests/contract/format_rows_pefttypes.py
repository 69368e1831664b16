"""One row per reader of PEFT's other types: PEFT writes the adapter and merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contract.format_row import FormatRow, Written

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
TARGETS = ["q_proj", "v_proj"]


def by_peft(kind: str, config: str, base: bool = False, layer: Any = None, **settings: Any) -> FormatRow:
    """Return the row of a format that PEFT writes with this configuration, for two layers of 6 outputs and 4 inputs."""

    def write(folder: Path, base_folder: Path) -> Written:
        import peft
        from peft_oracle import write_with_peft
        from torch import nn

        layers = {module: layer(nn) if layer else nn.Linear(4, 6, bias=False) for module in (Q, V)}
        chosen = getattr(peft, config)(target_modules=TARGETS, **settings)
        return write_with_peft(folder, chosen, layers, base_folder if base else None)

    return FormatRow(write, kind)


def merged(folder: Path, base: Path) -> Written:
    """Write an adapter that only PEFT reads, of a model of transformers."""
    import peft
    from peft_oracle import merged_change
    from tiny import tiny

    model = tiny("llama")
    model.save_pretrained(base)
    config = peft.PeanutConfig(target_modules=rf"{Q}|{V}".replace(".", r"\."), task_type="CAUSAL_LM")
    return merged_change(folder, config, model, [Q, V], 0.5)


ROWS = {
    "read_loha": by_peft("LoHa", "LoHaConfig", r=2, alpha=3),
    "read_lokr": by_peft("LoKr", "LoKrConfig", r=2, alpha=3),
    "read_ia3": by_peft("IA3", "IA3Config", base=True, feedforward_modules=["v_proj"]),
    "read_oft": by_peft("OFT", "OFTConfig", base=True, oft_block_size=2),
    "read_boft": by_peft("BOFT", "BOFTConfig", base=True, boft_block_size=2, boft_n_butterfly_factor=1),
    "read_hra": by_peft("HRA", "HRAConfig", base=True, r=2),
    "read_hira": by_peft("HiRA", "HiraConfig", base=True, r=2),
    "read_merged": FormatRow(merged, "PEANUT"),
    "read_ln_tuning": by_peft("LN_TUNING", "LNTuningConfig", base=True, layer=lambda nn: nn.LayerNorm(6, bias=False)),
}
