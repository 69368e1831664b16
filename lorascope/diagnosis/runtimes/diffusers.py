"""diffusers: a tensor belongs to the component of a pipeline that its name starts with.

Source: diffusers 0.42, ``load_lora_weights``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.runtimes.runtime import Target, alteration, find_misfitting_modules, omission, refusal, runtime
from lorascope.files.printable import first_of
from lorascope.formats.image_names import BaseNames

_PREFIX = re.compile(
    r"^((unet|transformer|text_encoder(_[23])?)\.|lora_(unet|te\d?|transformer|prior_unet|prior_te)_|diffusion_model\.)"
)
_MODULE = re.compile(r"\.(lora_.+|alpha|diff|diff_b|w_norm|b_norm|dora_scale)$")
_FLUX = re.compile(r"lora_unet_(double|single)_blocks_|^(diffusion_model\.)?(double|single)_blocks\.")
_FLUX_LOST = re.compile(r"^(lora_unet_|diffusion_model\.)?(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)")
# Keys of kohya for a UNet or a text encoder.
_DOWN = re.compile(r"(?P<module>lora_(?P<component>unet|te[12]?)_[^.]+)\.lora_down\.weight")
_UNET = re.compile(r"lora_unet_(down|mid|up|input|middle|output)_block")
_ATTENTION = re.compile(r"_(to_[qkv]|to_out_0|[qkv]_proj|out_proj)$")
_FILTERED = re.compile(r"^lora_te3_|^text_encoder_3|\.diff_b$|\.w_norm$|\.b_norm$|text_projection|position_embedding")


@runtime("diffusers")
def check_diffusers(target: Target) -> Iterator[Finding]:
    """Find modules that diffusers assigns to no component, and kohya files that it applies with other scales."""
    modules, keys = list(target.files.parts), target.keys
    unprefixed = target.keys_without(_PREFIX)
    stray = modules
    if len(unprefixed) < len(keys):
        # A reader may give modules the names of the base, so the stored names decide.
        stray = target.modules_of(unprefixed)
    if stray:
        names = "their names start with no component (unet, transformer, text_encoder)"
        yield omission(stray, len(modules), f"with a warning, because {names}", "add the component to the names")
    if any(key.endswith(".dora_scale") for key in keys):
        yield alteration("dora_scale is dropped: the adapter is applied as plain LoRA", "convert it to PEFT's DoRA")
    is_flux = any(map(_FLUX.search, keys))
    lost = set()
    for key in keys:
        if _FILTERED.search(key) or (is_flux and _FLUX_LOST.match(key)):
            lost.add(_MODULE.sub("", key))
    if lost:
        yield omission(sorted(lost), len(modules), "with an info line at most", "load the file in ComfyUI")
    yield from _find_uneven_alphas(target)
    if stray:
        return
    absent = _absent_modules(target, lost)
    if absent and len(absent) == len(modules):
        yield refusal("the base has none of its modules", "load it into the pipeline that it was trained on")
    elif absent:
        manner = "with a warning, because the base has no such module"
        yield omission(absent, len(modules), manner, "load it into the pipeline that it was trained on")
    yield from find_misfitting_modules(target)


def _absent_modules(target: Target, lost: Collection[str]) -> list[str]:
    """Return the other modules of the adapter that the base has under none of the names in image models."""
    if target.base is None:
        return []
    absent, names = [], BaseNames(target.base.all_modules())
    for module in target.absent:
        if module not in lost and not names.find(module) and not target.base.has_weight(module):
            absent.append(module)
    return absent


def _find_uneven_alphas(target: Target) -> Iterator[Finding]:
    """Find modules of kohya files for a UNet or text encoders that diffusers applies with another alpha.

    In every component, attention modules and those without an alpha get the most frequent one.
    """
    alphas: dict[str, dict[str, float]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for file in target.files.files:
        for key in file:
            if (match := _DOWN.fullmatch(key)) is None:
                continue
            component, module = match["component"], match["module"]
            ranks.setdefault(component, {})[module] = file.shape(key)[0]
            if f"{module}.alpha" in file:
                alphas.setdefault(component, {})[module] = float(file[f"{module}.alpha"].reshape(-1)[0])
    if "unet" in ranks and not any(map(_UNET.match, ranks["unet"])):
        return  # the converters of transformers scale every module by its own alpha
    for component, own_alphas in alphas.items():
        usual = Counter(own_alphas.values()).most_common(1)[0][0]
        changed = []
        for module, rank in ranks[component].items():
            if (_ATTENTION.search(module) or module not in own_alphas) and own_alphas.get(module, rank) != usual:
                changed.append(module)
        if changed:
            count = f"{len(changed)} of {len(ranks[component])} modules get the most frequent alpha, {usual:g}"
            reason = f"alphas differ between modules: {count}, instead of the stored ones: {first_of(changed)}"
            fix = "store one alpha, and multiply lora_up by what differs, as lorascope export --kohya does"
            yield alteration(reason, fix, modules=len(changed), of=len(ranks[component]), alpha=usual)
