"""One row per reader of PEFT's other types: PEFT writes the adapter and merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contract.format_row import FormatRow, Written
from safetensors.numpy import load_file, save

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
TARGETS = ["q_proj", "v_proj"]


def by_peft(
    kind: str, config: str, base: bool = False, layer: Any = None, spare: str = "", **settings: Any
) -> FormatRow:
    """Return the row of a format that PEFT writes with this configuration, for two layers of 6 outputs and 4 inputs."""

    def write(folder: Path, base_folder: Path) -> Written:
        import peft
        from peft_oracle import write_with_peft
        from torch import nn

        layers = {module: layer(nn) if layer else nn.Linear(4, 6, bias=False) for module in (Q, V)}
        chosen = getattr(peft, config)(target_modules=TARGETS, **settings)
        return write_with_peft(folder, chosen, layers, base_folder if base else None)

    return FormatRow(write, kind, spare=spare)


def merged(folder: Path, base: Path) -> Written:
    """Write an adapter that only PEFT reads, of a model of transformers."""
    import peft
    from peft_oracle import merged_change
    from tiny import tiny

    model = tiny("llama")
    model.save_pretrained(base)
    config = peft.PeanutConfig(target_modules=rf"{Q}|{V}".replace(".", r"\."), task_type="CAUSAL_LM")
    return merged_change(folder, config, model, [Q, V], 0.5)


def bone(folder: Path, base: Path) -> Written:
    """Write MiSS by the names that PEFT used before 0.19; it no longer writes Bone."""
    expected = ROWS["read_miss"].write(folder, base)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(config.read_text(encoding="utf-8").replace('"MISS"', '"BONE"'), encoding="utf-8")
    weights.write_bytes(save({k.replace("miss_block", "bone_block"): v for k, v in load_file(weights).items()}))
    return expected


ROWS = {
    "read_loha": by_peft("LoHa", "LoHaConfig", r=2, alpha=3),
    "read_lokr": by_peft("LoKr", "LoKrConfig", r=2, alpha=3),
    "read_ia3": by_peft("IA3", "IA3Config", base=True, feedforward_modules=["v_proj"]),
    "read_oft": by_peft("OFT", "OFTConfig", base=True, oft_block_size=2),
    "read_boft": by_peft("BOFT", "BOFTConfig", base=True, boft_block_size=2, boft_n_butterfly_factor=1),
    "read_hra": by_peft("HRA", "HRAConfig", base=True, r=2),
    "read_hira": by_peft("HiRA", "HiraConfig", base=True, r=2),
    "read_c3a": by_peft("C3A", "C3AConfig", block_size=2),
    "read_shira": by_peft("SHiRA", "ShiraConfig", base=True, r=1),
    "read_miss": by_peft("MiSS", "MissConfig", base=True, r=2),
    "read_bone": FormatRow(bone, "Bone"),
    "read_delora": by_peft("DeLoRA", "DeloraConfig", r=2),
    "read_vblora": by_peft("VB-LoRA", "VBLoRAConfig", r=2, num_vectors=5, vector_length=2, topk=2),
    "read_randlora": by_peft("RandLoRA", "RandLoraConfig", base=True, spare=r"_proj\.randlora_[AB]$", r=2),
    "read_gralora": by_peft("GraLoRA", "GraloraConfig", r=2, gralora_k=1, hybrid_r=1),
    "read_road": by_peft("RoAd", "RoadConfig", base=True, group_size=2),
    "read_waveft": by_peft("WaveFT", "WaveFTConfig", base=True, n_frequency=4),
    "read_unilora": by_peft("Uni-LoRA", "UniLoraConfig", r=2, theta_d_length=8, save_indices=True),
    "read_glora": by_peft("GLoRA", "GloraConfig", base=True, spare=r"glora_[C-E]\.", r=2),
    "read_supertuning": by_peft("SuperTuning", "SupertuningConfig", base=True, sparsity=0.5, r=2, lora_alpha=3),
    "read_trainable_tokens": by_peft("TRAINABLE_TOKENS", "TrainableTokensConfig", base=True, token_indices=[4, 1]),
    "read_merged": FormatRow(merged, "PEANUT"),
    "read_ln_tuning": by_peft("LN_TUNING", "LNTuningConfig", base=True, layer=lambda nn: nn.LayerNorm(6, bias=False)),
}
