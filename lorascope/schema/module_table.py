"""Every module of a model with its stack, layer, role and sizes, and the choice of modules by them.

``parse`` (from ``module_roles``) needs a dotted name only, as adapter folders have no more. ``describe`` reads a live
model and lets the structure (sizes, shared weights, repeated blocks) overrule the name. Neither knows any class or
needs torch.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorascope.schema.module_roles import (
    ATTENTION,
    CROSS,
    FFN,
    LINEAR,
    ROLES,
    Place,
    parse,
    position,
    role_inside,
    role_outside,
    stack_of,
)

__all__ = ["ROLES", "Place", "describe", "gated_input", "match", "parse", "position"]

_DTYPES = {
    "module": "str",
    "stack": "str",
    "layer": "Int16",
    "role": "str",
    "out_features": "Int64",
    "in_features": "Int64",
    "tied": "str",
}


@dataclass
class _Row:
    module: str
    stack: str
    layer: int | None
    role: str
    kind: str
    source: Any
    weight: Any = None
    outer: int = 0
    inner: int = 0


def describe(model: Any) -> pd.DataFrame:
    """List every block, and every module that has a weight of its own.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; adapters inside it (ours or PEFT's) are looked through, names are those of the bare model.

    Returns
    -------
    DataFrame
        In model order, columns module, stack, layer (Int16), role, out_features, in_features (Int64), tied. Sizes are
        those of the linear map, also where the host stores its transpose; an embedding maps a one-hot, so its
        in_features is the vocabulary; a convolution counts its unfolded kernel; norms and blocks have NA. A weight
        used in several places is one row, under the embedding; ``tied`` has the other names, joined by commas.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = list(_collect(model, "", None))
    _settle_ends(model, rows)
    return pd.DataFrame(_drop_tied(rows), columns=list(_DTYPES)).astype(_DTYPES)


def _drop_tied(rows: list[_Row]) -> Iterator[tuple[Any, ...]]:
    """Table rows, one for each weight: the embedding's where it has one, else that of the first use."""
    uses: dict[int, list[_Row]] = {}
    for row in rows:
        uses.setdefault(id(row if row.weight is None else row.weight), []).append(row)
    for row in rows:
        group = uses[id(row if row.weight is None else row.weight)]
        if row is next((use for use in group if use.kind == "embedding"), group[0]):
            others = ",".join(use.module for use in group if use is not row)
            yield row.module, row.stack, row.layer, row.role, row.outer or None, row.inner or None, others


def _collect(module: Any, path: str, block: tuple[str, int] | None) -> Iterator[_Row]:
    """Rows of everything under `module`, `block` being the path and layer of the block around it."""
    host = _unwrap_peft(module)
    weight = dict(host.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        # What hangs below a weight is an adapter, not the model.
        yield _make_row(path, block, module, host, weight)
        return
    blocks = _find_blocks(host, path) if block is None else set()
    for name, child in host.named_children():
        below = f"{path}.{name}".lstrip(".")
        if name in blocks:
            start = _Row(below, stack_of(below), int(name), "block", "block", child)
            rows = list(_collect(child, below, (below, int(name))))
            _correct_roles(rows)
            yield from (start, *rows)
        else:
            yield from _collect(child, below, block)


def _unwrap_peft(module: Any) -> Any:
    """The module inside PEFT's wrappers."""
    for name, child in module.named_children():
        if name in ("base_layer", "original_module"):
            return _unwrap_peft(child)
    return module


def _find_blocks(host: Any, path: str) -> set[str]:
    """The numbered children of a container that are blocks: alike, or called so, and more than one weight each."""
    children = dict(host.named_children())
    if not children or list(children) != [str(i) for i in range(len(children))]:
        return set()
    alike = len(children) > 1 and len({type(child) for child in children.values()}) == 1
    if not alike and parse(f"{path}.0").role != "block":
        return set()
    return {name for name, child in children.items() if sum(1 for _ in _collect(child, name, (name, 0))) > 1}


def _make_row(path: str, block: tuple[str, int] | None, module: Any, host: Any, weight: Any) -> _Row:
    """One weight with its sizes and the role that name and shape allow; heads and context are settled later."""
    embedding = hasattr(host, "num_embeddings")
    kind = "norm" if weight.ndim < 2 else "embedding" if embedding else "conv" if weight.ndim > 2 else "linear"
    role = role_outside(path) if block is None else role_inside(path[len(block[0]) + 1 :])
    if kind == "norm":
        role = "norm"
    elif kind == "embedding":
        role = "pos_embed" if role == "pos_embed" else "embed"
    elif role not in LINEAR:
        role = "other"
    outer, inner = weight.shape[0], math.prod(weight.shape[1:])
    if embedding or hasattr(host, "nf"):  # tables, and the Conv1D of GPT-2, store the transpose of their map
        outer, inner = inner, outer
    # The shape of a quantised weight is that of its packing, so a module's own word comes first.
    sizes = getattr(host, "out_features", outer), getattr(host, "in_features", inner)
    layer = None if block is None else block[1]
    return _Row(path, stack_of(path), layer, role, kind, module, weight, *((0, 0) if kind == "norm" else sizes))


def _settle_ends(model: Any, rows: list[_Row]) -> None:
    """Find the head, and patch embeddings: the convolutions before the first block.

    The head is the linear that the model declares as its output, else the last one outside blocks and backbone.
    """
    for row in itertools.takewhile(lambda row: row.role != "block", rows):
        if row.kind == "conv":
            row.role = "embed"
    linears = [row for row in rows if row.kind == "linear" and row.layer is None]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        linears = [row for row in linears if row.source is output]
    elif hasattr(model, "base_model"):  # a bare backbone is its own base_model: nothing is left
        backbone = {id(module) for module in model.base_model.modules()}
        linears = [row for row in linears if id(row.source) not in backbone]
    if linears:
        linears[-1].role = "head"


def _correct_roles(rows: list[_Row]) -> None:
    """Settle, within one block, the roles that only the neighbours' sizes tell."""
    linears = [row for row in rows if row.kind == "linear"]
    groups: dict[str, list[_Row]] = {}
    for row in linears:
        groups.setdefault(row.module.rpartition(".")[0], []).append(row)
    for group in groups.values():
        roles = {row.role for row in group}
        if not roles & {"q", "k", "v", "qkv"} and "o" in roles:
            _find_fused(group)
        elif not roles & {*ATTENTION, *CROSS, "qkv"}:
            _find_feed_forward(group)
    _find_cross(linears)


def _find_fused(group: list[_Row]) -> None:
    """q, k and v in one matrix: as wide as the attention's output reads, plus twice a divisor of it (GQA)."""
    output = next(row for row in group if row.role == "o")
    for row in group:
        twice_kv = row.outer - output.inner
        if row.role == "other" and row.inner == output.outer and twice_kv > 0 and 2 * output.inner % twice_kv == 0:
            row.role = "qkv"


def _find_feed_forward(group: list[_Row]) -> None:
    """A gate needs an input beside it; where no name is known, one narrowing linear closes one or two widening."""
    roles = [row.role for row in group]
    if "ffn_gate" in roles and "ffn_in" not in roles:
        group[roles.index("ffn_gate")].role = "ffn_in"
    narrow = [row for row in group if row.outer < row.inner]
    wide = [row for row in group if row.outer > row.inner]
    if set(roles) & set(FFN) or len(narrow) != 1 or len(wide) not in (1, 2):
        return
    if all((row.inner, row.outer) == (narrow[0].outer, narrow[0].inner) for row in wide):
        narrow[0].role, wide[0].role, wide[-1].role = "ffn_out", "ffn_gate", "ffn_in"


def _find_cross(linears: list[_Row]) -> None:
    """Of two attentions in one block the second reads the other stack."""
    queries = [row.module.split(".") for row in linears if row.role == "q"]
    if len(queries) != 2:
        return
    shared = next(i for i, (a, b) in enumerate(zip(*queries, strict=False)) if a != b)
    second = queries[1][: shared + 1]
    if second[-1].isdigit():  # a numbered one is a repetition, such as the blocks inside a stage
        return
    for row in linears:
        if row.module.split(".")[: shared + 1] == second and row.role in ATTENTION:
            row.role = f"cross_{row.role}"


def match(description: pd.DataFrame, targets: str | Sequence[str], called: str = "targets") -> list[str]:
    """Choose modules, to be adapted for one.

    Parameters
    ----------
    description : DataFrame
        ``describe(model)``.
    targets : str or sequence of str
        "all-linear" (every linear inside the blocks), a role, or a regular expression that covers a whole module name;
        or a sequence of roles and exact module names. "q", "k" and "v" also choose a fused qkv, "ffn_gate" a fused
        gate and input. A tied weight goes by any of its names.
    called : str
        What messages call ``targets``: the argument that it was given as.

    Returns
    -------
    list of str
        Module names in model order.

    Raises
    ------
    ValueError
        The targets, or one of a sequence, choose nothing.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        found = _choose_modules(description, target, isinstance(targets, str), called)
        if not found:
            raise ValueError(f"{called}: {target!r} matches no module; {_suggest_names(description, target)}")
        chosen.update(found)
    if not chosen:
        raise ValueError(f"{called} is empty; {_suggest_names(description, '')}")
    return [name for name in _all_names(description) if name in chosen]


def _choose_modules(description: pd.DataFrame, target: str, pattern: bool, called: str) -> list[str]:
    role = description["role"]
    if target == "all-linear":
        return description["module"][description["layer"].notna() & role.isin(LINEAR)].tolist()
    if target in ROLES:
        fused = role == "qkv" if target in ("q", "k", "v") else gated_input(description) & (target == "ffn_gate")
        return description["module"][(role == target) | fused].tolist()
    if not pattern:
        return [target] if target in _all_names(description) else []
    try:
        return [
            name for name in _all_names(description[description["out_features"].notna()]) if re.fullmatch(target, name)
        ]
    except re.error as error:
        raise ValueError(f"{called}: {target!r} is neither a role nor a regular expression: {error}") from None


def _all_names(description: pd.DataFrame) -> list[str]:
    """Every module name, tied ones behind the name they are listed under."""
    pairs = zip(description["module"], description["tied"], strict=True)
    return [name for module, tied in pairs for name in (module, *filter(None, tied.split(",")))]


def gated_input(description: pd.DataFrame) -> pd.Series:
    """Where gate and input are one matrix, in this order: twice as many outputs as the ffn_out beside it reads."""
    parent = description["module"].str.rpartition(".")[0]
    closing = description["role"] == "ffn_out"
    width = parent.map(dict(zip(parent[closing], description["in_features"][closing], strict=True)))
    return (description["role"] == "ffn_in") & (description["out_features"] == 2 * width)


def _suggest_names(description: pd.DataFrame, target: str) -> str:
    """What may have been meant, and the roles there are."""
    present = [role for role in ROLES if role in set(description["role"])]
    meant = {role: role for role in present}
    for name, role in zip(description["module"], description["role"], strict=True):
        meant.setdefault(name.rpartition(".")[2], f"{name} (role {role})")
        meant.setdefault(name, name)
    close = difflib.get_close_matches(target, meant, n=3)
    hint = f"near: {', '.join(meant[name] for name in close)}; " if close else ""
    return f"{hint}roles here: {' '.join(present)}"
