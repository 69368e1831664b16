"""Reader of LoRA and LyCORIS files for image and video models, as kohya, LyCORIS, ComfyUI and OneTrainer write them.

Each module has a rank r and an ``alpha``, so the scale is alpha / r; without alpha it is 1. Settings of the trainer in
the header are not used: the tensors decide. Modules may have different algorithms; see ``lycoris``. Differences of
biases (``diff_b``, ``b_norm``) are other tensors, and so are replaced weights (``set_weight``) without their base.

Source: kohya-ss/sd-scripts (``networks``), lycoris-lora 4.1.3, ComfyUI (``comfy/lora.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.fused_rows import split_rows, swap_halves
from lorascope.formats.image_keys import Tensors, group_tensors, is_diffusers, is_image_adapter
from lorascope.formats.image_names import BaseNames, swaps_halves
from lorascope.formats.lycoris import LycorisModule, Scale, read_module
from lorascope.formats.peft_factors import no_factors
from lorascope.formats.pretrained_weights import OptionalBase, base_with_weight
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate

BASE_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
"""Metadata of the header that describes the base model, the most general first."""
# Metadata that describes the training; trainers also write the tags of all images.
_DESCRIPTION = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", *BASE_KEYS)
_MAGNITUDES = {"dora_scale", "magnitude"}
_ROUNDING = 1e-6  # relative difference of two equal values of alpha, which float16 rounds


@reads(
    lambda config, names: is_image_adapter(config, names) and not is_diffusers(config, names),
    "kohya, ComfyUI, OneTrainer and LyCORIS: LoRA, LoCon, LoHa, LoKr, GLoRA, full differences",
)
def read_kohya(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of an image model's file in the format of kohya, which ComfyUI and OneTrainer also write."""
    alphas: list[float] = []

    def scale(module: str, tensors: Tensors) -> Scale:
        factor, alpha = 1.0, 0.0
        if "scalar" in tensors:
            factor = _value(path, tensors["scalar"])
        if "alpha" in tensors:
            alpha = _value(path, tensors["alpha"])
            if "oft_blocks" not in tensors:  # alpha of OFT bounds the rotation
                alphas.append(alpha)
        # kohya and LyCORIS read an alpha of 0 as the rank.
        return lambda rank: factor * alpha / rank if alpha else factor

    adapter = image_adapter(path, config, files, base, scale, "kohya")
    return replace(adapter, notes=(*adapter.notes, *_notes(config, alphas)))


def image_adapter(
    path: Path,
    config: Config,
    files: WeightFiles,
    base: OptionalBase,
    scale: Callable[[str, Tensors], Scale],
    spelling: str,
) -> AdapterFiles:
    """Read the modules of an image model's file, by kohya or diffusers, whose formats differ in the scale.

    Parameters
    ----------
    path, config, files, base
        See `reads`.
    scale : callable
        ``scale(module, parts)`` returns the function from the rank of a module to its scale.
    spelling : str
        Name of the format.
    """
    names = BaseNames(base.all_modules() if base else ())

    def rename(module: str) -> str:
        modules = names.find(module)
        if len(modules) != 1 or swaps_halves(module, modules[0]):
            return module
        return modules[0]

    module_tensors, other_names = group_tensors(files, rename, base)
    updates: dict[str, StoredUpdate] = {}
    kinds: dict[str, None] = {}  # a set in the order of the file
    for name, tensors in module_tensors.items():
        weights = base_with_weight(base, name)
        kind, update = read_module(LycorisModule(path, name, tensors, scale(name, tensors), weights))
        kinds[kind] = None
        fused = names.find(name)
        # The magnitudes of DoRA require the weights of all rows.
        if base is None or weights is not None or not fused or _MAGNITUDES & tensors.keys():
            updates[name] = update
        elif swaps_halves(name, fused[0]):
            updates[fused[0]] = swap_halves(path, update, fused[0], base)
        else:
            updates |= split_rows(path, update, fused, base)
    if not updates:
        raise no_factors(path, "it has no factors", other_names)
    factor_names = set().union(*module_tensors.values())
    if _MAGNITUDES & factor_names and kinds.keys() == {"LoRA"}:
        kinds = {"DoRA": None}
    described = {"spelling": spelling}
    described |= {key: config[key] for key in _DESCRIPTION if isinstance(config.get(key), str)}
    models = [described[key] for key in BASE_KEYS if described.get(key)]
    if models:
        described["base_model_name_or_path"] = models[0]
    needs_base = bool(kinds.keys() & {"IA3", "GLoRA", "OFT"})
    notes = tuple(_magnitude_notes(module_tensors, "DoRA" in kinds, base is not None))
    return AdapterFiles(path, described, updates, other_names, files, " and ".join(kinds), needs_base, notes)


def _value(path: Path, tensor: StoredTensor) -> float:
    """Load a tensor of one value."""
    if tensor.shape != (1, 1):
        raise AdapterFault("shape", path, f"{printable(tensor.name)} must be one number, got shape {tensor.shape}")
    value = float(tensor.read()[0, 0])
    if not np.isfinite(value):
        raise unreadable(path, f"{printable(tensor.name)} must be finite, got {value}")
    return value


def _magnitude_notes(module_tensors: Mapping[str, Tensors], plain: bool, has_base: bool) -> Iterator[str]:
    scaled = [tensors["dora_scale"] for tensors in module_tensors.values() if "dora_scale" in tensors]
    if scaled and not plain and not has_base:
        yield "dora_scale: |dW| is the norm of the direction only; add --base DIR for the whole update"
    if any(tensor.file.shape(tensor.name)[0] > 1 for tensor in scaled):
        yield "ComfyUI divides dora_scale by the row norms of the base instead of base + update, so its update differs"


def _notes(config: Mapping[str, Any], alphas: list[float]) -> Iterator[str]:
    """Yield the known differences between what was trained and what readers of a file apply."""
    arguments = config.get("ss_network_args")
    with suppress(ValueError):
        arguments = parse_json(arguments, "ss_network_args") if isinstance(arguments, str) else {}
    # Values in ss_network_args are text, in any spelling of true.
    if isinstance(arguments, dict) and str(arguments.get("split_qkv")).lower() == "true":
        yield (
            "trained with split_qkv: fused modules have 3 or 4 times the rank at the same alpha, "
            "so all readers apply a third or a quarter of the trained scale there"
        )
    if zeros := alphas.count(0):
        yield f"alpha is 0 in {zeros} modules: kohya and LyCORIS use the rank instead, as here, but ComfyUI uses 0"
    header = np.nan
    if isinstance(stated := config.get("ss_network_alpha"), str):
        with suppress(ValueError):
            header = float(stated)
    if alphas and np.isfinite(header) and not np.isclose(alphas, header, _ROUNDING, 0.0).any():
        values = " to ".join(f"{value:g}" for value in sorted({min(alphas), max(alphas)}))
        yield f"the header says alpha {header:g}, the tensors {values}: the tensors decide"
