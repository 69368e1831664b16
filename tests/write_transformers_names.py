"""Write the table of names that transformers gives to the tensors of checkpoints while loading them.

    python tests/write_transformers_names.py

The table is for machines without transformers, or with another version; ``test_transformers_names`` recomputes it. It
has the renamings of the installed version, and for every architecture the models that it consists of, because a
renaming belongs to the part of the names that such a model owns.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from lorascope.formats.transformers_names import TABLE, describe_transforms


def renamings() -> dict[str, list[list[Any]]]:
    """Return the renamings by class or type of model."""
    return {
        owner: describe_transforms(transforms) for owner, transforms in _build_checkpoint_conversion_mapping().items()
    }


def architectures(owners: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return base-model prefix and models of the architectures that have renamings, or may have with other parts."""
    table = {}
    for name in sorted(set(architecture_names())):
        try:
            model = skeleton(name)
        except Exception:  # default configurations of some are incomplete, or require another package
            continue
        parts = [list(part) for part in models(model)]
        if any(owner in owners or kind in owners or section for _, owner, kind, section in parts):
            table[name] = {"prefix": model.base_model_prefix, "models": parts}
    return table


def architecture_names() -> Iterator[str]:
    for mapping in dir(modeling_auto):
        if mapping.startswith("MODEL") and mapping.endswith("MAPPING_NAMES"):
            for names in getattr(modeling_auto, mapping).values():
                yield from [names] if isinstance(names, str) else names


def skeleton(name: str) -> PreTrainedModel:
    """Build an architecture without memory, with two layers if its configuration allows it."""
    architecture = getattr(transformers, name)
    config = architecture.config_class()
    with torch.device("meta"):
        try:
            return architecture._from_config(shortened(config))
        except Exception:  # the number of layers must fit a list of layers
            return architecture._from_config(architecture.config_class())


def shortened(config: Any) -> Any:
    """Return a configuration with two layers, also in the configurations of its parts."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            shortened(value)
        elif type(value) is int and value > 2 and key.endswith(("layers", "n_layer", "depth", "num_blocks")):
            setattr(config, key, 2)
    return config


def models(model: PreTrainedModel) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield path, class, model type and configuration of the models in a model, whose root has the path ""."""
    sections = {id(value): key for key, value in vars(model.config).items() if hasattr(value, "model_type")}
    written = model.config.to_dict()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            section, kind = sections.get(id(module.config)), module.config.model_type
            # The class of one architecture may have another type in the file than in memory.
            if section and written[section].get("model_type") != kind:
                section = None
            yield path, type(module).__name__, kind, section


def contents() -> dict[str, Any]:
    """Return the table."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    owners = renamings()
    bases = {kind: names for kind, names in modeling_auto.MODEL_MAPPING_NAMES.items() if isinstance(names, str)}
    return {
        "transformers": transformers.__version__,
        "renamings": owners,
        "classes": {kind: name for kind, name in bases.items() if name in owners},
        "architectures": architectures(owners),
    }


def main() -> None:
    """Write the table, one line per entry."""
    sections = []
    for title, content in contents().items():
        if isinstance(content, dict):
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(content.items())]
            sections.append(f"{json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n}")
        else:
            sections.append(f"{json.dumps(title)}: {json.dumps(content)}")
    TABLE.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
