"""Ranks of a run as text, by role and layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorascope.files.lazy_pandas import pandas as pd

_WIDTH = 96  # of a line, which leaves room for the sign of a comment
_GAP = 2


def rank_grid(
    modules: pd.DataFrame, ranks: Mapping[str, int], kept_ranks: Mapping[str, int] | None = None
) -> list[str]:
    """Return lines with one row per role and one column per layer, such as ``8 -> 3`` for a kept rank.

    Parameters
    ----------
    modules : DataFrame
        ``module, stack, layer, role`` of the run.
    ranks : mapping module -> int
        Rank of every adapted module.
    kept_ranks : mapping module -> int, optional
        Rank that it has in the next LoRA; by default the same.
    """
    cells: dict[str, dict[str, str]] = {}
    for module, stack, number, role in modules[["module", "stack", "layer", "role"]].itertuples(index=False):
        if module in ranks:
            role = f"{stack} {role}".strip()
            layer = "-" if pd.isna(number) else str(number)
            cell = str(ranks[module]) if kept_ranks is None else f"{ranks[module]} -> {kept_ranks.get(module, 0)}"
            of_role = cells.setdefault(role, {})
            # Modules of one role and layer are experts, or have names without a known role.
            of_role[layer] = f"{of_role[layer]}, {cell}" if layer in of_role else cell
    layers = list(dict.fromkeys(layer for row in cells.values() for layer in row))
    layers.sort(key=lambda layer: -1 if layer == "-" else int(layer))
    return list(_lines(cells, layers))


def _lines(cells: Mapping[str, Mapping[str, str]], layers: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the grid, in blocks of as many layers as fit."""
    label_width = max(map(len, ("layer", *cells)))
    block: list[str] = []
    widths: dict[str, int] = {}
    for layer in layers:
        widths[layer] = max([len(layer), *(len(row.get(layer, "")) for row in cells.values())]) + _GAP
        if block and label_width + sum(widths[name] for name in (*block, layer)) > _WIDTH:
            yield from _block_lines(cells, block, widths, label_width)
            block = []
        block.append(layer)
    yield from _block_lines(cells, block, widths, label_width)


def _block_lines(
    cells: Mapping[str, Mapping[str, str]], layers: Sequence[str], widths: Mapping[str, int], label_width: int
) -> Iterator[str]:
    rows = {"layer": {layer: layer for layer in layers}} | dict(cells)
    for label, row in rows.items():
        columns = [row.get(layer, "").rjust(widths[layer]) for layer in layers]
        yield "".join([label.ljust(label_width), *columns]).rstrip()
