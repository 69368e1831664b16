"""Stack, layer and role of modules in diffusion models, from the names that diffusers, kohya and the authors use.

The blocks of a UNet are in the stacks "down", "mid" and "up"; a layer is one block with all its attentions. Blocks of a
transformer have the stack "", those without separate streams "single", and text encoders "te1", "te2" and "te3".

Names of kohya have underscores instead of dots. They cannot be inverted, so words that are known are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FLATTENED = re.compile(r"(?:lora_(?:unet|te\d?|prior_unet|prior_te|transformer)|lycoris|oft_unet)__?")
"""Prefix of names whose dots are underscores, as kohya, LyCORIS and OneTrainer write them."""
ORDER = {"te1": -3, "te2": -2, "te3": -1, "mid": 1, "up": 2, "single": 1}
"""Position of a stack on an axis; 0 for others."""

_IMAGE = re.compile(
    r"^(?:unet|prior|text_encoder(?:_\d)?|text_encoders|(?:model\.)?diffusion_model)\."
    r"|(?:^|\.)(?:(?:down|up|input|output|double|single|joint|(?:single_)?transformer)_blocks\.\d|(?:mid|middle)_block\.)"
    r"|^transformer\.(?:x_embedder|context_embedder|time_text_embed|norm_out|proj_out)(?:\.|$)"
    r"|\.attn[12]\."
)
_TEXT = re.compile(r"^(?:lora_te(\d?)_|lora_prior_te_|text_encoder(?:_(\d))?\.|text_encoders\.(\w+?)\.)")
_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
_UNET = re.compile(r"(?:^|[._])(?:(down|input|up|output)_blocks\.(\d{1,4})|(mid)(?:dle)?_block)(?=\.|_|$)")
_BLOCK = re.compile(r"(?:^|[._])(single_)?(?:\w+_)?(?:blocks?|layers?|h)\.(\d{1,4})(?=\.|$)")
_STACKS = {"down": "down", "input": "down", "up": "up", "output": "up"}
_CROSS = re.compile(r"attn2|cross_?attn")
# Ends of names; in a flattened one, an underscore precedes them.
_ENDS = {
    "q": r"to_q|add_q_proj|q_proj|(?:attn|attention)[._]q",
    "k": r"to_k|add_k_proj|k_proj|(?:attn|attention)[._]k",
    "v": r"to_v|add_v_proj|v_proj|(?:attn|attention)[._]v",
    "qkv": r"(?:to_|add_)?qkv(?:_proj)?",
    "o": r"to_out(?:\.0)?|to_add_out|o_proj|out_proj|attn\d?[._](?:proj|o)",
    "ffn_in": r"ff\w*[._]net\.0\.proj|proj_mlp|fc1|(?:mlp|ffn)\.0|linear1",
    "ffn_out": r"ff\w*[._]net\.2|fc2|(?:mlp|ffn)\.2|linear2",
}
# Linear layers that scale and shift by the time step, in any block and after the last one.
_MODULATION = re.compile(r"norm\w*[._]linear$|(?:^|[._])\w*mod(?:ulation)?[._](?:lin|1)$", re.IGNORECASE)
_OUTSIDE = {
    "embed": re.compile(r"(?:^|[._])(?:img_in|txt_in|x_embedder|context_embedder)$"),
    "head": re.compile(r"(?:^|\.)proj_out$|final_layer[._]linear$"),
}
_ROLES = {role: re.compile(rf"(?:^|[._])(?:{ends})$", re.IGNORECASE) for role, ends in _ENDS.items()}


def locate_image_module(name: str) -> tuple[str, int | None, str] | None:
    """Return stack, layer and path below the block of an image (diffusion) model's module, None for other names.

    A module outside the blocks has the layer None and its whole name as the path.
    """
    dotted = name
    if "." not in name and (prefix := FLATTENED.match(name)):
        dotted = re.sub(r"_(?=\d+(?:_|$))|(?<=\d)_", ".", name[prefix.end() :])
    elif not _IMAGE.search(name):
        return None
    stack, text = "", _TEXT.match(name)
    if text is not None:
        stack = _text_stack(text)
    elif match := _UNET.search(dotted):
        return _STACKS.get(match[1], "mid"), int(match[2] or 0), dotted[match.end() :].lstrip("._")
    match = _BLOCK.search(dotted)
    if match is None:
        return stack, None, dotted
    if match[1] and not text:
        stack = "single"
    return stack, int(match[2]), dotted[match.end() + 1 :]


def image_role_inside(tail: str) -> str | None:
    """Return the role of an image model's module from its path below the block, None if it is not of such a model."""
    if tail == "proj_out":  # of a block without separate streams, which joins attention and feed-forward
        return "ffn_out"
    role = _role_by_end(tail, _ROLES)
    if role in ("q", "k", "v", "o") and _CROSS.search(tail):
        return f"cross_{role}"
    return role


def image_role_outside(name: str) -> str | None:
    """Return the role of an image model's module outside the blocks, None if its name is not one of these."""
    return _role_by_end(name, _OUTSIDE)


def _role_by_end(name: str, ends: Mapping[str, re.Pattern[str]]) -> str | None:
    if _MODULATION.search(name):
        return "other"
    return next((role for role, end in ends.items() if end.search(name)), None)


def _text_stack(match: re.Match[str]) -> str:
    if match[3]:
        return _ENCODERS.get(match[3], "te1")
    return f"te{match[1] or match[2] or 1}"
