"""Parts that only forget, planted in trained adapters: whether the dial finds them, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FILLER, draw_reviews, tiny_tokenizer
from scipy.linalg import eigh
from test_export import trained
from tiny import tiny
from tqdm.auto import tqdm

from lorascope.adapters import delta
from lorascope.analysis.dial import KEEP, TASK, WHOLE, judge_rows
from lorascope.array_types import Float
from lorascope.inputs import tasks
from lorascope.inputs.text_rows import encode_rows, load_keep
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.dial import DialedModel
from lorascope.insight.token_contributions import traced_calls
from lorascope.insight.update_parts import PartDirections, ScaledUpdates, UpdatePart, component_parts
from lorascope.methods import LoRA
from lorascope.observe.measured_rows import Divergence, Drift, RowMeasure, TaskLoss

ROWS = 256
RIDGE = 0.01  # relative to the mean variance of the inputs
METHOD = LoRA(rank=4, alpha=8.0, targets="all-linear", lr=3e-3, head_lr=1e-2)
CAUSAL = LoRA(rank=4, alpha=8.0, targets="all-linear", lr=3e-3)


class Ground(NamedTuple):
    """Model and text in which a part is planted: words of reviews and of other text, and the distance from the base."""

    model: Any
    method: LoRA
    distance: type[Drift] | type[Divergence]
    common: list[str]
    other: list[str]


def grounds() -> dict[str, Ground]:
    """Return an encoder and a decoder with more dimensions than their text has words, as those of usual models."""
    size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
    # Words of the tokenizer that reviews do not have; a decoder answers with some of them.
    answers, half = ["Review", "Sentiment", ":", "positive", "negative"], len(FILLER) // 2
    return {
        "encoder": Ground(tiny("bert", "base", **size), METHOD, Drift, FILLER, answers),
        "decoder": Ground(tiny("llama", **size), CAUSAL, Divergence, FILLER[:half], FILLER[half:]),
    }


def other_text(seed: int, ground: Ground) -> pd.DataFrame:
    """Return sentences with the common words of reviews, and other words than those that decide a review."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(900):
        words = [*generator.choice(ground.common, generator.integers(3, 7)), *generator.choice(ground.other, 2)]
        lines.append(" ".join(generator.permutation(words)))
    return pd.DataFrame({"text": lines})


def split_rows(table: pd.DataFrame, name: str) -> tasks.Task:
    """Return a task with 600 rows for training and selection, and 300 on which parts are measured."""
    return tasks.from_frame(table.assign(split=np.resize(["train", "train", "validation"], len(table))), name)


def second_moment(measure: RowMeasure, module: str) -> Float[np.ndarray, "in in"]:
    """Return the second moment of the inputs of a module over all tokens of some rows."""
    inputs = []
    for batch in measure.batches:
        with traced_calls(measure.model, [module]) as calls, torch.no_grad():
            measure.measure(batch)
        inputs.append(calls[module][0].inputs[batch["attention_mask"].bool()].double())
    tokens = torch.cat(inputs).numpy()
    return tokens.T @ tokens / len(tokens)


def find_directions(
    adapted: AdaptedBase, selection: dict[str, RowMeasure], module: str, sigma: float
) -> PartDirections:
    """Return sigma u v^T: v has most variance in other text per variance in the task, and u raises the distance."""
    task_moment, other_moment = (second_moment(selection[axis], module) for axis in (TASK, KEEP))
    ridge = RIDGE * np.trace(task_moment) / len(task_moment) * np.eye(len(task_moment))
    v = torch.from_numpy(eigh(other_moment, task_moment + ridge)[1][:, -1:]).float()
    v /= v.norm()
    # The slope of the distance in a part e_o v^T is its gradient by output o of the module along v.
    out_features = adapted.updates[module].shape[0]
    outputs = PartDirections(torch.eye(out_features), torch.ones(out_features), v.expand(-1, out_features))
    with ScaledUpdates(adapted.base, adapted.deltas, {module: outputs}).gated(1.0) as gates:
        slopes = dict(zip(gates, selection[KEEP].slopes(list(gates.values())), strict=True))[module]
    return PartDirections((slopes / slopes.norm())[:, None], torch.tensor([sigma]), v)


def judge_planted(ground: Ground, folder: str, out: Path, seed: int) -> str:
    """Train an adapter, add a part as large as a random component of it, and return the verdict on the part."""
    task = split_rows(draw_reviews(seed, ground.common), "reviews")
    run = trained(folder, task, ground.method, out, steps=100, seed=seed)[1]
    adapted = open_adapted(run, folder, task, "last")
    base = adapted.base.eval()
    keep = load_keep(split_rows(other_text(seed, ground), "other"), adapted.task, base)
    axes: dict[str, dict[str, RowMeasure]] = {}
    for split in ("train", "validation"):
        task_rows, keep_rows = (encode_rows(base, text, split, ROWS, 128) for text in (adapted.task, keep))
        axes[split] = {TASK: TaskLoss(base, *task_rows), KEEP: ground.distance(base, *keep_rows)}
    delta.attach(base, adapted.deltas)
    components = component_parts(base, adapted.updates)
    # The pooler and the head of an encoder do not change the drift.
    candidates = [part for part in components.parts if part.layer is not None]
    component: Any = candidates[np.random.default_rng(seed).integers(len(candidates))]
    (module,) = component.modules
    sigma = float(components.directions[module].size[component.direction])
    planted = find_directions(adapted, axes["train"], module, sigma)
    factors: Any = adapted.deltas[module]
    factors.A = torch.nn.Parameter(torch.cat([factors.A, planted.V.T]))
    factors.B = torch.nn.Parameter(torch.cat([factors.B, planted.U * planted.size / factors.scale], 1))
    measured = axes["validation"]
    dialed = DialedModel(ScaledUpdates(base, adapted.deltas, {module: planted}), measured, tqdm(disable=True))
    values = dialed.curve(UpdatePart(WHOLE, tuple(adapted.deltas)), (0.0, 1.0))
    values += dialed.removals([UpdatePart("planted", (module,), direction=0)])
    rows = {axis: measure.rows() for axis, measure in measured.items()}
    return judge_rows(values, rows, len(components.parts) + 1, set())["planted"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_planted_part_only_forgets(name: str, tmp_path: Path) -> None:
    """In at least 18 of 20 trained adapters, by drift in an encoder and by KL in a decoder."""
    ground, folder = grounds()[name], tmp_path / "model"
    ground.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    verdicts = [judge_planted(ground, str(folder), tmp_path / str(seed), seed) for seed in range(20)]
    assert verdicts.count("only forgets") >= 18, verdicts
