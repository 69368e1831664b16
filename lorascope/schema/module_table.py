"""Table of a model's modules with stack, layer, role and sizes, and the selection of modules from it.

``parse`` (from ``module_roles``) needs only a dotted name, because an adapter folder contains no model. ``describe``
inspects a live model, whose structure (sizes, shared weights, repeated blocks) takes precedence over names. Neither
depends on model classes or imports torch.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.schema.fused_parts import PART_ROLES, split_part_name
from lorascope.schema.module_roles import (
    ATTENTION,
    CROSS,
    FFN,
    LINEAR,
    ROLES,
    Location,
    parse,
    position,
    role_inside,
    role_outside,
    stack_of,
)
from lorascope.schema.name_patterns import full_matches

__all__ = ["ROLES", "Location", "describe", "gated_input", "match", "parse", "position"]

_SIZES = {"out_features": "Int64", "in_features": "Int64"}
_DTYPES = {"module": "str", "stack": "str", "layer": "Int16", "role": "str", **_SIZES, "tied": "str"}


class _Block(NamedTuple):
    """Path and layer of a block."""

    path: str
    layer: int


@dataclass
class _Row:
    module: str
    stack: str
    layer: int | None
    role: str
    kind: str
    source: Any
    weight: Any  # a block has none, so it is its own
    outer: int = 0
    inner: int = 0


def describe(model: Any) -> pd.DataFrame:
    """Tabulate every block of a model, and every module with a ``weight`` parameter.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Adapters, from lorascope or PEFT, are skipped: names and sizes are the same as without them. Only
        the adapted parts of fused weights have additional rows, after the row of the weight.

    Returns
    -------
    DataFrame
        One row per block or module, in model order, with the columns module, stack, layer (Int16), role, out_features
        and in_features (Int64), and tied. Sizes refer to the linear map, even if the module stores its transpose. The
        in_features of an embedding is the vocabulary size, and of a convolution the size of the unfolded kernel; norms
        and blocks have NA. A weight used in several places has one row, the embedding's if there is one, else the
        first; ``tied`` lists the other names, separated by commas.
    """
    if hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    rows = list(_collect(model, "", None))
    _assign_end_roles(model, rows)
    uses: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        uses[id(row.weight)].append(row)
    table = []
    for row in rows:
        group = uses[id(row.weight)]
        if row is min(group, key=lambda use: use.kind != "embedding"):  # the first embedding, else the first use
            tied = ",".join(use.module for use in group if use is not row)
            table.append((row.module, row.stack, row.layer, row.role, row.outer or None, row.inner or None, tied))
    return pd.DataFrame(table, columns=list(_DTYPES)).astype(_DTYPES)


def _collect(module: Any, path: str, block: _Block | None) -> Iterator[_Row]:
    """Yield the rows of everything in ``module``; ``block`` is the enclosing one."""
    if split_part_name(path) is not None and hasattr(module, "fused"):
        # Not "linear", because the parts of a weight do not show the role of their neighbors.
        row = _Row(path, stack_of(path), None, module.role, "part", module, weight=module)
        row.layer = None if block is None else block.layer
        row.outer, row.inner = module.out_features, module.in_features
        yield row
        return
    host = _unwrap_peft(module)
    weight = dict(host.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        # Children of a module with a weight are adapters, not part of the model.
        yield _make_row(path, block, module, host, weight)
        return
    blocks = set()
    if block is None:  # numbered modules inside a block belong to it
        blocks = _find_blocks(host, path)
    for name, child in host.named_children():
        below = f"{path}.{name}".lstrip(".")
        if name in blocks:
            start = _Row(below, stack_of(below), int(name), "block", "block", child, weight=child)
            rows = list(_collect(child, below, _Block(below, int(name))))
            _correct_roles(rows)
            yield from (start, *rows)
        else:
            yield from _collect(child, below, block)


def _unwrap_peft(module: Any) -> Any:
    """Return the module inside PEFT's wrappers."""
    for name, child in module.named_children():
        if name in ("base_layer", "original_module", "token_adapter"):
            return _unwrap_peft(child)
    return module


def _find_blocks(host: Any, path: str) -> set[str]:
    """Return the numbered children that are blocks: of one class or with a block's name, and several weights each."""
    children = dict(host.named_children())
    are_numbered = list(children) == list(map(str, range(len(children))))
    are_of_one_class = len(children) > 1 and len(set(map(type, children.values()))) == 1
    if not are_numbered or not (are_of_one_class or parse(f"{path}.0").role == "block"):
        return set()
    return {name for name, child in children.items() if len(list(_collect(child, name, _Block(name, 0)))) > 1}


def _make_row(path: str, block: _Block | None, module: Any, host: Any, weight: Any) -> _Row:
    """Return the row of one weight, with its sizes and a preliminary role from its name and shape."""
    kind = _kind(host, weight)
    role, layer = role_outside(path), None
    if block is not None:
        role, layer = role_inside(path[len(block.path) + 1 :]), block.layer
    if kind == "norm":
        role = "norm"
    elif kind == "embedding":
        if role != "pos_embed":
            role = "embed"
    elif role not in LINEAR:
        role = "other"
    outer, inner = weight.shape[0], math.prod(weight.shape[1:])
    if hasattr(host, "num_embeddings") or hasattr(host, "nf"):  # embeddings and GPT-2's Conv1D store the transpose
        outer, inner = inner, outer
    row = _Row(path, stack_of(path), layer, role, kind, module, weight)
    if kind != "norm":
        # A quantized weight has the shape of its packed storage, so the module's attributes take precedence.
        row.outer, row.inner = getattr(host, "out_features", outer), getattr(host, "in_features", inner)
    return row


def _kind(host: Any, weight: Any) -> str:
    if weight.ndim < 2:
        return "norm"
    if hasattr(host, "num_embeddings"):
        return "embedding"
    if weight.ndim > 2:
        return "conv"
    return "linear"


def _assign_end_roles(model: Any, rows: list[_Row]) -> None:
    """Assign the roles of the head and of patch embeddings (convolutions before the first block)."""
    for row in itertools.takewhile(lambda row: row.role != "block", rows):
        if row.kind == "conv":
            row.role = "embed"
    # The head is the declared output embedding, otherwise the last linear outside the blocks and the base model.
    linears = [row for row in rows if row.kind == "linear" and row.layer is None]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        linears = [row for row in linears if row.source is output]
    elif hasattr(model, "base_model"):  # a model without a head is its own base_model, so no linear remains
        backbone = set(map(id, model.base_model.modules()))
        linears = [row for row in linears if id(row.source) not in backbone]
    if linears:
        linears[-1].role = "head"


def _correct_roles(rows: list[_Row]) -> None:
    """Correct the roles within one block that depend on the sizes of neighboring linears."""
    linears = [row for row in rows if row.kind == "linear"]
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in linears:
        groups[row.module.rpartition(".")[0]].append(row)
    for group in groups.values():
        roles = {row.role for row in group}
        if not roles & {"q", "k", "v", "qkv"} and "o" in roles:
            # A fused projection has as many outputs as "o" has inputs, plus twice a divisor of that (GQA).
            o = next(row for row in group if row.role == "o")
            for row in group:
                twice_kv = row.outer - o.inner
                if row.role == "other" and row.inner == o.outer and twice_kv > 0 and 2 * o.inner % twice_kv == 0:
                    row.role = "qkv"
        elif not roles & {*ATTENTION, *CROSS, "qkv"}:
            _find_feed_forward(group)
    _find_cross(linears)


def _find_feed_forward(group: list[_Row]) -> None:
    """Assign feed-forward roles that names do not show.

    A gate without an input projection becomes the input. If no name is known and one linear narrows, it is the output,
    and the one or two linears that widen are gate and input.
    """
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
    """Assign cross-attention roles: the second of two attention modules in a block reads the other stack."""
    queries = [row.module.split(".") for row in linears if row.role == "q"]
    if len(queries) != 2:
        return
    shared = next(i for i, (a, b) in enumerate(zip(*queries, strict=False)) if a != b)
    second = queries[1][: shared + 1]
    if second[-1].isdigit():  # numbered modules are repetitions, such as the blocks within a stage
        return
    for row in linears:
        if row.module.split(".")[: shared + 1] == second and row.role in ATTENTION:
            row.role = f"cross_{row.role}"


def match(description: pd.DataFrame, targets: str | Sequence[str], called: str = "targets") -> list[str]:
    """Select modules of the module table by role, name or regular expression.

    Parameters
    ----------
    description : DataFrame
        ``describe(model)``.
    targets : str or sequence of str
        "all-linear" (every linear inside the blocks), a role, or a regular expression that matches a whole module name;
        or a sequence of roles and exact module names. "q", "k" and "v" also select a fused qkv, or only its part if the
        table has parts, as for the targets of a method. "ffn_gate" selects a fused gate and input. A tied weight can be
        selected by any of its names.
    called : str
        Name of the argument in error messages.

    Returns
    -------
    list of str
        Module names in model order.

    Raises
    ------
    ValueError
        A target matches no module, the sequence is empty, or the regular expression is invalid or takes too long.
    """
    selection: set[str] = set()
    is_pattern = isinstance(targets, str)
    if isinstance(targets, str):
        targets = [targets]
    for target in targets:
        names = _matching_names(description, target, is_pattern, called)
        if not names:
            raise ValueError(f"{called}: {target!r} matches no module {_suggest_names(description, target)}")
        selection.update(names)
    if not selection:
        raise ValueError(f"{called} must not be empty {_suggest_names(description, '')}")
    return [name for name in _all_names(description) if name in selection]


def _matching_names(description: pd.DataFrame, target: str, pattern: bool, called: str) -> list[str]:
    role, is_part = description["role"], description["module"].str.endswith("]")
    if target == "all-linear":
        return description["module"][description["layer"].notna() & role.isin(LINEAR) & ~is_part].tolist()
    if target in ROLES:
        mask = role == target
        if target in PART_ROLES:
            split = description["module"][is_part].str.replace(r"\[\w+\]$", "", regex=True)
            mask = mask | ((role == "qkv") & ~description["module"].isin(split))
        elif target == "ffn_gate":
            mask = mask | gated_input(description)
        return description["module"][mask].tolist()
    if not pattern:
        return [target] if target in _all_names(description) else []
    matrices = description[description["out_features"].notna() & ~is_part]
    try:
        return full_matches(target, _all_names(matrices))
    except ValueError as error:
        raise ValueError(f"{called} must be a role or a regular expression, got {target!r}: {error}") from None


def _all_names(description: pd.DataFrame) -> list[str]:
    """Return all module names; the tied names of a row follow its own."""
    names: list[str] = []
    for module, tied in zip(description["module"], description["tied"], strict=True):
        names += [module, *filter(None, tied.split(","))]
    return names


def gated_input(description: pd.DataFrame) -> pd.Series:
    """Return whether each row of the module table is a fused gate and input matrix (in this order).

    Such a matrix has twice as many outputs as the ``ffn_out`` with the same parent has inputs.
    """
    parent = description["module"].str.rpartition(".")[0]
    is_output = description["role"] == "ffn_out"
    width = parent.map(dict(zip(parent[is_output], description["in_features"][is_output], strict=True)))
    return (description["role"] == "ffn_in") & (description["out_features"] == 2 * width)


def _suggest_names(description: pd.DataFrame, target: str) -> str:
    """Return the model's roles and the closest names, as the end of an error message."""
    present = set(description["role"])
    roles = [role for role in ROLES if role in present]
    suggestions = dict(zip(roles, roles, strict=True))
    for name, role in zip(description["module"], description["role"], strict=True):
        suggestions.setdefault(name.rpartition(".")[2], f"{name} (role {role})")
        suggestions.setdefault(name, name)
    text = f"(roles in this model: {' '.join(roles)})"
    if close := difflib.get_close_matches(target, suggestions, n=3):
        text += f"; did you mean {', '.join(suggestions[name] for name in close)}?"
    return text


def __dir__() -> list[str]:
    return __all__
