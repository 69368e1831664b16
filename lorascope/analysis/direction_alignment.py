"""Alignment of components with directions such as steering vectors, against random directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.component_blocks import ComponentBlock, component_blocks
from lorascope.analysis.reading import Reading
from lorascope.array_types import Float
from lorascope.runs.result import Result


class _Side(NamedTuple):
    """Singular vectors of one side, and random directions (draws, n) of that space."""

    name: str
    vectors: Float[np.ndarray, "n k"]
    random: Float[np.ndarray, "draws n"]


def align(
    run: Result | Reading,
    directions: Mapping[int | str, Float[np.ndarray, "_"]],
    draws: int = 1000,
    *,
    seed: int = 0,
    state: str = "last",
) -> pd.DataFrame:
    """Compare components with directions, such as those of a probe or of a steering vector, against random directions.

    The p-value is the fraction of random directions with a cosine of at least this size, and at least 1 / (draws + 1).
    Random outputs are uniform on the sphere. Random inputs have the covariance of the module's inputs, since most
    activations vary in few directions; only a reading has recorded them.

    Parameters
    ----------
    run : Run, Adapter or Reading
        Update whose components are compared, or the result of ``ls.read``.
    directions : mapping component -> array (n,)
        The component is a name such as ``"encoder.layer.0.attention.self.query 1"``, or a number from 1: the card of a
        reading, or the place by singular value among all components of a run. A direction as long as the module's
        output is compared with u, one as long as its input with v, and one of a square module with both.
    draws : int
        Number of random directions, 1000 by default.
    seed : int
        Seed of the random directions, 0 by default.
    state : {"last", "best"}
        Saved parameters of a run.

    Returns
    -------
    DataFrame
        ``module, component, side`` ("u" or "v"), ``cosine`` (its absolute value; of several components with nearly
        equal singular values, the cosine of the angle to their span) and ``p``.

    Raises
    ------
    ValueError
        A component is unknown, a direction has another length, is zero or not finite, or ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be an integer >= 1, got {draws}")
    blocks = _list_blocks(run, state)
    # Only a reading has seen rows.
    inputs: Mapping[str, Float[np.ndarray, "tokens in"]] = {}
    if isinstance(run, Reading):
        inputs = run.inputs
    generator = np.random.default_rng(seed)
    rows = []
    for key, values in directions.items():
        block = _select_block(blocks, key)
        direction = np.asarray(values, dtype=np.float64)
        for side in _sides(block, direction, key, inputs, draws, generator):
            cosine = float(_cosines(direction[None], side.vectors)[0])
            # The direction counts as one of the draws, so that no p-value is 0.
            above = int((_cosines(side.random, side.vectors) >= cosine).sum())
            rows.append((block.module, block.component, side.name, cosine, (1 + above) / (draws + 1)))
    return pd.DataFrame(rows, columns=["module", "component", "side", "cosine", "p"])


def _list_blocks(run: Result | Reading, state: str) -> list[ComponentBlock]:
    """Return the blocks of a reading in the order of its cards, or those of a run, the largest first."""
    if isinstance(run, Reading):
        return [card.block for card in run.cards]
    blocks = []
    for module, update in run.updates(state=state).items():
        blocks += component_blocks(module, update)
    return sorted(blocks, key=lambda block: -block.norm)


def _select_block(blocks: list[ComponentBlock], key: int | str) -> ComponentBlock:
    if isinstance(key, str):
        for block in blocks:
            first, _, last = block.component.partition("-")
            module, _, number = key.rpartition(" ")
            if block.name == key:
                return block
            if block.module == module and number.isdecimal() and int(first) <= int(number) <= int(last or first):
                return block
    elif 1 <= key <= len(blocks):
        return blocks[key - 1]
    names = f"1 to {len(blocks)}, or a name such as {blocks[0].name!r}" if blocks else "none, since the update is zero"
    raise ValueError(f"component must be {names}, got {key!r}")


def _sides(
    block: ComponentBlock,
    direction: Float[np.ndarray, "_"],
    key: int | str,
    inputs: Mapping[str, Float[np.ndarray, "tokens in"]],
    draws: int,
    generator: np.random.Generator,
) -> list[_Side]:
    """Return the sides of a block that a direction can be compared with."""
    lengths = {"output": len(block.U), "input": len(block.V)}
    if direction.shape not in [(length,) for length in lengths.values()]:
        options = " or ".join(f"({length},), as the {side} of {block.module}" for side, length in lengths.items())
        raise ValueError(f"direction of {key} must have shape {options}; got {direction.shape}")
    if not np.isfinite(direction).all() or not direction.any():
        raise ValueError(f"direction of {key} must be finite and not zero")
    sides = []
    # A direction of a square module may be of either space.
    if len(direction) == lengths["output"]:
        sides.append(_Side("u", block.U, generator.standard_normal((draws, len(block.U)))))
    if len(direction) == lengths["input"] and block.module in inputs:
        sample = inputs[block.module].astype(np.float64)
        # A sum of centered inputs with normal weights has their covariance.
        sides.append(_Side("v", block.V, generator.standard_normal((draws, len(sample))) @ sample))
    if not sides:
        raise ValueError(
            f"cannot compare direction {key} with the inputs of {block.module}: their covariance was not "
            "measured. Pass a reading of the component: ls.align(ls.read(run, model, rows), ...)"
        )
    return sides


def _cosines(directions: Float[np.ndarray, "m n"], vectors: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "m"]:
    """Return the cosine of each direction with the span of orthonormal vectors."""
    return np.linalg.norm(directions @ vectors, axis=1) / np.linalg.norm(directions, axis=1)
