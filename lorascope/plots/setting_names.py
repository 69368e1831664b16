"""Present names of the method settings that runs store under their old names."""

from __future__ import annotations

from typing import Any

# Method -> old -> new name of a setting. A renamed setting keeps its old name in run.json, because the id of a run is
# computed from it. The list is repeated here because importing the methods would import torch.
RENAMED: dict[str, dict[str, str]] = {
    "autolora": {"lora_alpha": "alpha"},
    "full": {"rule": "optimizer_name"},
    "hydralora": {"heads": "shared_a", "number": "num_experts"},
    "lisa": {"moments": "moment_policy"},
    "neft": {"k": "num_neurons", "mode": "select_by", "share": "parameter_share", "tuned": "reference"},
}
# Values that were renamed with their setting.
VALUES: dict[tuple[str, str], dict[str, Any]] = {("hydralora", "heads"): {"shared": True, "split": False}}


def present_setting(method: str, name: str, value: Any) -> tuple[str, Any]:
    """Return the present name and value of a stored setting of a method ("" if unknown)."""
    values = VALUES.get((method, name), {})
    return RENAMED.get(method, {}).get(name, name), values.get(value, value) if values else value


def present_label(label: str, method: str) -> str:
    """Return the label of a run, such as "HydraLoRA, number 4", with the present names of its method's settings."""
    name, *settings = label.split(", ")
    pairs = [setting.partition(" ") for setting in settings]
    shown = [" ".join(map(str, present_setting(method, key, value))) if space else key for key, space, value in pairs]
    return ", ".join([name, *shown])
