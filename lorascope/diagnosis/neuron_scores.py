"""Scores of every neuron between two whole checkpoints on disk, read tile by tile; no model is built.

Modules are found by the names of their weights. The shapes of neighboring weights in a block show whether a weight is
stored transposed.

Source: NeFT (arXiv 2403.11621), equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorascope.analysis import neurons
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.module_summary import in_axis_order
from lorascope.schema.module_roles import FFN, parse
from lorascope.updates import neuron_change


def neuron_scores(original: str | Path, tuned: str | Path, roles: Sequence[str] = FFN) -> pd.DataFrame:
    """Score every feed-forward neuron between two checkpoints of one model.

    Every weight of both is read once, in tiles. Memory never exceeds one weight of each.

    Parameters
    ----------
    original, tuned : path
        Folders written by ``save_pretrained``, or safetensors files, of any float dtype, in one file or in shards.
    roles : sequence of {"ffn_in", "ffn_gate", "ffn_out"}
        Roles to score, if the model has them. Default all.

    Returns
    -------
    DataFrame
        ``module, stack, layer, role, neuron, cosine_distance, norm_original, norm_tuned, delta_norm`` as in
        ``analysis.neurons.score_neurons``, to a relative error of 1e-5, in the order of the axes.

    Raises
    ------
    FileNotFoundError
        A checkpoint, or a shard of it, does not exist.
    ValueError
        A file is broken, the two are not of one model, or a weight contains NaN or infinity.
    """
    unknown = sorted(set(roles) - set(FFN))
    if unknown:
        raise ValueError(f"roles must be from {', '.join(map(repr, FFN))}, got {unknown[0]!r}")
    before, after = PretrainedWeights(original), PretrainedWeights(tuned)
    modules = _describe_checkpoint(after)
    present = [role for role in neurons.neuron_roles(modules) if role in roles]
    if not present:
        raise ValueError(f"cannot score {after.folder}: no feed-forward weights with a known name ({', '.join(roles)})")
    groups = neurons.list_groups(modules, present)
    scores = pd.concat([_score_group(group, before, after) for group in groups], ignore_index=True)
    return scores.astype(dict.fromkeys(("module", "stack", "role"), "category"))


def _describe_checkpoint(model: PretrainedWeights) -> pd.DataFrame:
    """Describe feed-forward modules like ``module_table.describe``, from the headers of a checkpoint."""
    rows = []
    for module in model.modules():
        stack, layer, role = parse(module)
        if layer is not None and role in FFN:
            rows.append((module, stack, layer, role, *model.shape(module, model.transposed), ""))
    columns = ["module", "stack", "layer", "role", "out_features", "in_features", "tied"]
    frame = pd.DataFrame(rows, columns=columns).astype({"layer": "Int16"})
    # A gate without an input next to it is itself the input.
    parent = frame["module"].str.replace(r"\.[^.]*$", "", regex=True)
    single = (frame["role"] == "ffn_gate") & ~parent.isin(parent[frame["role"] == "ffn_in"])
    frame["role"] = frame["role"].mask(single, "ffn_in")
    return in_axis_order(frame, frame["layer"])


def _score_group(group: neurons.NeuronGroup, original: PretrainedWeights, tuned: PretrainedWeights) -> pd.DataFrame:
    """Return the scores of one group, after checking that its two weights belong together."""
    module = group.module
    if not original.has_weight(module):
        raise ValueError(
            f"cannot score {module}: {original.folder} has no weight of it, unlike {tuned.folder}. "
            "They are of different models, or it is tied in only one of them"
        )
    before, after = original.unread(module), tuned.unread(module)
    if before.shape != after.shape:
        raise ValueError(
            f"cannot score {module}: it has shape {before.shape} in {original.folder} and {after.shape} in "
            f"{tuned.folder}, so they are not of one model"
        )
    slices, axis = group.slices, group.axis
    if tuned.transposed:
        slices, axis = slices[::-1], 1 - axis
    # Differences of smaller floats are exact enough in float32, of which a tile takes half the memory.
    dtype = np.float64 if np.float64 in (before.dtype, after.dtype) else np.float32
    change = neuron_change(before[slices], after[slices], axis, dtype)
    for model, norms in ((original, change.norm_original), (tuned, change.norm_tuned)):
        if broken := int((~np.isfinite(norms)).sum()):
            raise ValueError(
                f"cannot score {model.folder}: {broken} of {group.count} neurons of {module} contain NaN or infinity"
            )
    return neurons.tabulate_change(group, change)
