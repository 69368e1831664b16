"""Names of modules in a pipeline of several models: the component, and the name inside it.

diffusers starts a name with its component, such as ``unet``. A PEFT folder adapts one model, so its names have none;
the names of the blocks show a UNet or a transformer, and any other component is named by the user. Names of kohya have
underscores instead of dots, which cannot be inverted: they are resolved by reading the file with its base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorascope.export.lora_layers import LoraLayer, WritableLora
from lorascope.files.printable import printable
from lorascope.runs.adapter import Adapter
from lorascope.schema.image_roles import FLATTENED

PIPELINE = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
"""Components of diffusers."""
AUTHORS = "diffusion_model"
"""Prefix of the denoiser with the names of the model's authors."""
_PREFIX = re.compile(rf"(?s)({'|'.join(PIPELINE)}|{AUTHORS}|text_encoders\.\w+)\.(.+)")
_IMAGE = ("kohya", "diffusers")  # spellings of readers whose names may have a component
# Names of blocks that only one component has.
_BLOCKS = {
    "unet": re.compile(r"(?:down_blocks|up_blocks)\.\d|mid_block\."),
    "transformer": re.compile(r"(?:single_)?transformer_blocks\.\d"),
}


@dataclass(frozen=True)
class PipelineLayer:
    """Layer of a module in a pipeline, by its ``path`` in the adapter and its name in a component.

    ``component`` is "" if it is not known; ``flat`` means that the name has underscores for dots.
    """

    path: str
    component: str
    name: str
    layer: LoraLayer
    flat: bool = False


def split_name(config: Mapping[str, Any], module: str) -> tuple[str, str]:
    """Return the pipeline component of a module's name, "" if it has none, and the name inside it."""
    if config.get("spelling") in _IMAGE and (match := _PREFIX.fullmatch(module)):
        return match[1], match[2]
    return "", module


def pipeline_layers(lora: WritableLora) -> list[PipelineLayer]:
    """Return the layers of an adapter by pipeline component and name."""
    modules = []
    is_image = lora.config.get("spelling") in _IMAGE
    for path, layer in lora.layers.items():
        component, name = split_name(lora.config, path)
        if is_image and "." not in path and FLATTENED.match(path):
            modules.append(PipelineLayer(path, "", name, layer, flat=True))
        else:
            modules.append(PipelineLayer(path, component or lora.component or "", name, layer))
    return modules


def named_layers(lora: WritableLora, format: str) -> list[PipelineLayer]:
    """Return the layers of an adapter with a pipeline component for each, except of flat names.

    Raises
    ------
    ValueError
        The component is not known, or is not one of a pipeline.
    """
    if lora.component not in (None, *PIPELINE):
        raise lora.error(format, f"component must be one of {', '.join(PIPELINE)}, got {printable(lora.component)}")
    modules = pipeline_layers(lora)
    if lora.component and all(module.component != lora.component for module in modules):
        raise lora.error(format, f"its modules have names of components, so --component {lora.component} is not used")
    names = [module.name for module in modules if not (module.component or module.flat)]
    if not names:
        return modules
    component = next((component for component, block in _BLOCKS.items() if any(map(block.match, names))), None)
    if component is None:
        fix = f"pass --component, one of {', '.join(PIPELINE)}"
        raise lora.error(format, f"the component that {printable(names[0])} belongs to is not known; {fix}")
    for number, module in enumerate(modules):
        if not (module.component or module.flat):
            modules[number] = replace(module, component=component)
    return modules


def refuse_flat(lora: WritableLora, modules: Collection[PipelineLayer], format: str) -> None:
    """Raise a ValueError if the name of a module in a pipeline has underscores instead of dots."""
    for module in modules:
        if module.flat:
            hint = "pass the base model of the adapter, --base DIR"
            raise lora.error(format, f"{printable(module.path)} has underscores instead of dots; {hint}")


def naming(adapter: Adapter) -> str:
    """Return how an adapter names its modules: flat, with a component of a pipeline, or as in one model."""
    config = adapter.files.config
    modules = list(adapter.files.parts)
    if config.get("spelling") in _IMAGE and "." not in "".join(modules):
        return "names with underscores"
    if any(split_name(config, module)[0] for module in modules):
        return "names of a pipeline"
    return "names of one model"
