"""diffusers: a tensor belongs to the component of a pipeline that its name starts with.

Source: diffusers 0.42, ``load_lora_weights``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.runtimes.runtime import Target, alteration, find_misfitting_modules, omission, runtime

_PREFIX = re.compile(
    r"^((unet|transformer|text_encoder(_[23])?)\.|lora_(unet|te\d?|transformer|prior_unet|prior_te)_|diffusion_model\.)"
)
_MODULE = re.compile(r"\.(lora_.+|alpha|diff|diff_b|w_norm|b_norm|dora_scale)$")
_FLUX = re.compile(r"lora_unet_(double|single)_blocks_|^(diffusion_model\.)?(double|single)_blocks\.")
_FLUX_LOST = re.compile(r"^(lora_unet_|diffusion_model\.)?(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)")
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
    if not is_flux:
        yield from _uneven_alphas(target)
    if not stray:
        yield from find_misfitting_modules(target)


def _uneven_alphas(target: Target) -> Iterator[Finding]:
    """Find kohya files whose modules do not all have one alpha, which diffusers gives to all attention layers."""
    alphas = {}
    for file in target.files.files:
        for key in file:
            if key.endswith(".alpha"):
                alphas[key.removesuffix(".alpha")] = float(file[key].reshape(-1)[0])
    distinct = Counter(alphas.values())
    if distinct and (len(distinct) > 1 or not alphas.keys() >= target.files.parts.keys()):
        usual = distinct.most_common(1)[0][0]
        reason = f"alphas differ between modules: attention layers get the most frequent one, {usual:g}"
        yield alteration(reason, "fold alpha / rank into lora_up, and store one alpha", alphas=len(distinct))
