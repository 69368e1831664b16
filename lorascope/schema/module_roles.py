"""Stack, layer and role of a module, parsed from its dotted name, and the order of modules on an axis."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any, NamedTuple

from lorascope.schema import image_roles

ATTENTION = ("q", "k", "v", "o")
CROSS = tuple(f"cross_{role}" for role in ATTENTION)
FFN = ("ffn_in", "ffn_gate", "ffn_out")
ROLES = (*ATTENTION, *CROSS, *FFN, "qkv", "embed", "pos_embed", "head", "norm", "block", "other")
LINEAR = (*ATTENTION, *CROSS, *FFN, "qkv", "other")

# At most four digits: a longer number may not fit the Int16 column ``layer``.
_BLOCK = re.compile(r"(?:^|\.)(?:h|blk|\w*layers?|\w*blocks?)\.(\d{1,4})(?=\.|$)")
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_POSITION = re.compile(r"position|pos_embed|^wpe$|^rel_embed|relative_attention_bias")
_EMBED = re.compile(r"embeddings?$|^embed_(tokens|in)$|^token_embd$|^wte$|^shared$")
_HEAD = re.compile(r"(^|_)head$|^(score|classifier|embed_out|qa_outputs|vocab_projector)$")
_HEAD_PART = re.compile(r"(head|classifier|predictions)\.(out_proj|decoder)$")
_CROSS_ATTENTION = re.compile(r"cross|encdec|encoder_att")
_LEAVES = {
    "q": "q q_proj q_lin q_attn query query_proj wq attn_q",
    "k": "k k_proj k_lin key key_proj wk attn_k",
    "v": "v v_proj v_lin value value_proj wv attn_v",
    "qkv": "attn_qkv qkv qkv_proj wqkv w_pack c_attn query_key_value",
    "o": "o o_proj out_lin attn_output",
    "ffn_in": "up_proj gate_up_proj fc1 fc_in c_fc lin1 linear1 wi wi_1 w3 dense_h_to_4h ffn_up",
    "ffn_gate": "gate_proj wi_0 w1 ffn_gate",
    "ffn_out": "down_proj fc2 fc_out lin2 linear2 w2 dense_4h_to_h ffn_down",
}
_ROLE_OF_LEAF = {leaf: role for role, leaves in _LEAVES.items() for leaf in leaves.split()}


class Location(NamedTuple):
    """Location of a module: stack ("encoder", "decoder" or ""), layer (from 0 in its stack, else None) and role.

    Diffusion models have other stacks; see ``image_roles``.
    """

    stack: str
    layer: int | None
    role: str


def parse(name: str) -> Location:
    """Parse stack, layer and role from a dotted module name.

    The stack is the one that the name contains: "encoder" for BERT's blocks, "decoder" for OPT's, "" for LLaMA's. A
    name does not show whether a head is tied. Unfamiliar names have the role "other".

    Parameters
    ----------
    name : str
        Module name, with or without a prefix such as PEFT's ``base_model.model.``.
    """
    if (image_location := image_roles.locate_image_module(name)) is not None:
        stack, layer, tail = image_location
        if layer is None:
            return Location(stack, None, image_roles.image_role_outside(tail) or role_outside(tail))
        return Location(stack, layer, image_roles.image_role_inside(tail) or role_inside(tail))
    block = _BLOCK.search(name)
    if block is None:
        return Location(stack_of(name), None, role_outside(name))
    return Location(stack_of(name), int(block[1]), role_inside(name[block.end() + 1 :]))


def stack_of(name: str) -> str:
    """Return the stack of a module, but not its role: "encoder" or "decoder" if a parent has that name, else ""."""
    # Skip the last part, the module itself: BERT's masked-LM head ends in a linear called "decoder".
    return next((parent for parent in name.split(".")[:-1] if parent in ("encoder", "decoder")), "")


def role_inside(tail: str) -> str:
    """Return the role of a module from its path below the block, which is "" for the block itself."""
    if not tail:
        return "block"
    above, _, leaf = tail.lower().rpartition(".")
    if _NORM.search(leaf):
        return "norm"
    if _POSITION.search(leaf):
        return "pos_embed"
    role = _ROLE_OF_LEAF.get(leaf, "other")
    if leaf == "in_proj" and "att" in above:  # in other modules it is an input projection
        role = "qkv"
    if leaf in ("dense", "out_proj", "c_proj", "wo"):  # names of both attention and feed-forward outputs
        if "att" in above:
            role = "o"
        elif leaf == "dense":
            role = {"intermediate": "ffn_in", "output": "ffn_out"}.get(above, "other")
        elif leaf == "out_proj":
            role = "other"
        else:
            role = "ffn_out"
    if not _CROSS_ATTENTION.search(above):
        return role
    if role in ATTENTION:
        return f"cross_{role}"
    return "other"


def role_outside(name: str) -> str:
    """Return the role of a module outside the blocks from its whole name."""
    name = name.lower()
    leaf = name.rpartition(".")[2]
    if _NORM.search(leaf):
        return "norm"
    if _POSITION.search(leaf):
        return "pos_embed"
    if _EMBED.search(leaf) or name.endswith("patch_embeddings.projection"):
        return "embed"
    return "head" if _HEAD.search(leaf) or _HEAD_PART.search(name) else "other"


def position(stack: str, layer: Any, role: str) -> tuple[int, int, int, int]:
    """Return the sort key of a module by role: embed, pos_embed, blocks (encoder, then decoder), others, head.

    Parameters
    ----------
    stack, role : str
        Stack and role, as in ``describe``.
    layer : int, None or NA
        Layer, None or NA outside the blocks. A position table inside a block is sorted with its block.
    """
    order = image_roles.ORDER.get(stack, int(stack == "decoder"))
    is_inside = isinstance(layer, Real) and layer == layer  # not None, NA or NaN
    if is_inside:
        return 2, order, int(layer), ROLES.index(role)
    section = {"embed": 0, "pos_embed": 1, "head": 4}.get(role, 3)
    return section, order, -1, ROLES.index(role)
