"""Arms and kept tables that only figures show: registered labels, equal sizes, and tables from made-up runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import tiny
from torch import nn

from lorascope.adapters.host_weights import host_weight
from lorascope.analysis import neurons
from lorascope.inputs import models
from lorascope.papers import registry, variants
from lorascope.papers.arms import Arm
from lorascope.papers.judging import registered_study
from lorascope.papers.judging import truth_names as names
from lorascope.papers.setups import planted_teacher, planted_truths
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.module_roles import FFN
from lorascope.updates.low_rank import LowRank

SEED = 9001
ARMS = {arm.label: arm for arm in registry.study_arms()}


def test_every_arm_of_a_figure_is_registered_with_three_seeds(tmp_path: Path) -> None:
    labels = {arm.label for arm in variants.study_arms()}
    registered, file = registered_study.read(), registered_study.STUDY_FILE
    (tmp_path / file.name).write_bytes(file.read_bytes())
    assert labels == registered.arms.keys() - registered_study.read(tmp_path / file.name).arms.keys()
    assert {registered.arms[label].seeds for label in labels} == {3}
    # No claim reads them.
    read = {arm for claim in registered.claims.values() for arms in claim.labels().values() for arm in arms}
    assert not labels & read


def trained_parameters(label: str, model: nn.Module) -> int:
    """Return the number of parameters that an arm trains on a model."""
    arm = ARMS[label]
    assert isinstance(arm, Arm)
    # Only its method is read, and a teacher's text takes a second.
    method = arm.of_seed(SEED).method
    method.attach(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_truths, "sampled_task", lambda *args: "text")


@pytest.mark.usefixtures("no_text")
def test_placements_have_the_parameters_of_rank_2_everywhere() -> None:
    def size(name: str) -> int:
        return trained_parameters(f"{name}, {names.RANK_2}", planted_teacher.student())

    everywhere = size("LoRA, rank 2")
    sizes = {role: size(f"LoRA, {name} only") for role, name in variants.TYPES.items()}
    assert [sizes[role] for role in "qkvo"] == [everywhere] * 4
    assert [sizes[role] for role in ("ffn_in", "ffn_gate", "ffn_out")] == pytest.approx(
        [0.97 * everywhere] * 3, rel=1e-3
    )
    several = [size(f"LoRA, {name} only") / everywhere for name in variants.SEVERAL]
    assert several == pytest.approx([16 / 17] * 3)
    assert [size(f"LoRA, block {block} only") for block in range(4)] == [everywhere] * 4


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("truth", [names.OWN_ENTRIES, names.ATTENTION_RANK_2])
def test_coefficients_are_as_many_as_the_parameters_of_lora(truth: str) -> None:
    for number, rank in variants.COEFFICIENTS.items():
        fourier = f"FourierFT, {number} coefficients from zero, {truth}"
        sizes = [trained_parameters(fourier, planted_teacher.student())]
        if rank:
            sizes.append(trained_parameters(f"LoRA, rank {rank}, attention, {truth}", planted_teacher.student()))
        assert set(sizes) == {16 * number}


@pytest.mark.usefixtures("no_text")
def test_neurons_at_both_ends_are_as_many_as_at_one() -> None:
    for more in variants.MORE_NEURONS:
        counts = []
        for is_reversed in (False, True):
            arm = ARMS[f"{variants.few_neurons(more, is_reversed)}, {names.FEW_NEURONS}"]
            assert isinstance(arm, Arm)
            method: Any = arm.of_seed(SEED).method
            model = planted_teacher.student()
            method._groups = neurons.list_groups(module_table.describe(model), FFN)
            scores = neurons.unscored_neurons(method._groups)
            method._scores = scores.assign(cosine_distance=np.random.default_rng(0).random(len(scores)))
            chosen = method._choose(sum(parameter.numel() for parameter in model.parameters()))
            counts.append(sum(map(len, chosen.values())))
        assert counts == [variants.NEURONS + more] * 2


@pytest.mark.usefixtures("no_text")
def test_runs_on_one_teacher_differ_only_in_their_training_seed() -> None:
    label = f"AutoLoRA, from rank 4, teacher 2, {names.UNEVEN}"
    arm = ARMS[label]
    assert isinstance(arm, Arm)
    teachers = {seed: arm.of_seed(seed).settings["observe"][0].seed for seed in (200, 201)}
    assert teachers == {200: variants.TEACHERS[1], 201: variants.TEACHERS[1]}
    assert "seed" not in arm.of_seed(200).settings  # the job gives it


def test_runs_with_other_starts_never_share_a_seed() -> None:
    seeds = []
    for label in (variants.LOW, variants.HIGH, variants.OTHER_HIGH):
        for seed in (200, 201, 202):
            arm = ARMS[label]
            assert isinstance(arm, Arm)
            of_seed = arm.of_seed(seed)
            method: Any = of_seed.method
            assert method.init_seed == of_seed.settings["seed"]
            seeds.append(method.init_seed)
    assert len(set(seeds)) == 9


class MadeUpRun(Run):
    """Run with given attributes."""

    table: Any = None
    meta: Any = None
    modules: Any = None
    updates: Any = None
    ranks: Any = None

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def records(**columns: Any) -> Any:
    table = pd.DataFrame(columns).assign(run="r")
    for name in ("quantity", "role", "module"):
        if name in table:
            table[name] = table[name].astype("category")
    return MadeUpRun(table=table, meta=SimpleNamespace(seed=SEED))


def test_penalties_of_two_matrices_of_the_first_block_are_kept() -> None:
    run = records(
        quantity=["penalty_left", "penalty_right", "penalty_left", "penalty_left", "rank"],
        role=["o", "ffn_out", "q", "o", "o"],
        layer=[0, 0, 0, 1, 0],
        step=[5, 5, 5, 5, 5],
        value=[1.0, 2.0, 3.0, 4.0, 5.0],
    )
    table = variants.keep_penalties(run)
    assert table.to_numpy().tolist() == [["o", "P", 5, 1.0], ["ffn_out", "Q", 5, 2.0]]


def test_validation_and_utilization_are_read_from_the_records() -> None:
    run = records(
        quantity=["eval_loss", "eval_loss", "utilisation", "utilisation", "utilisation", "selected"],
        module=["", "", "m", "m", "m", "m"],
        stack="",
        layer=0,
        role=["", "", "ffn_in", "ffn_in", "ffn_in", "ffn_in"],
        step=[0, 20, 0, 20, 20, 0],
        index=[None, None, 0, 0, 1, 1],
        value=[4.0, 3.0, 0.1, 0.2, 0.3, 1.0],
    )
    assert variants.keep_validation(run).to_numpy().tolist() == [[0, 4], [20, 3]]
    table = variants.keep_neuron_utilization(run)
    assert table["value"].tolist() == pytest.approx([0.2, 0.3])
    assert table["trained"].tolist() == [False, True]
    assert table["neuron"].tolist() == [0, 1]


def test_ranks_of_removed_modules_are_zero() -> None:
    planted = planted_truths.uneven_ranks(planted_teacher.student(), SEED)
    first, second, *_ = planted
    run: Any = MadeUpRun(meta=SimpleNamespace(seed=SEED), ranks=lambda: {first: 3})
    table = variants.keep_planted_ranks(run).set_index("module")
    assert table["planted"].to_dict() == planted
    assert (table.loc[first, "rank"], table.loc[second, "rank"]) == (3, 0)
    other = planted_truths.uneven_ranks(planted_teacher.student(), 300)
    assert variants.keep_planted_ranks(run, 300).set_index("module")["planted"].to_dict() == other


def lora_run(model: nn.Module, rank: int, draw: int) -> Any:
    """Return a made-up run of LoRA on the queries and values of a model."""
    rng = np.random.default_rng(draw)
    modules = module_table.describe(model)
    modules = modules[modules["role"].isin(["q", "v"])]
    updates: Mapping[str, LowRank] = {
        name: LowRank(rng.normal(size=(32, rank)), rng.normal(size=(rank, 32))) for name in modules["module"]
    }
    meta = SimpleNamespace(model="tiny", seed=SEED)
    return MadeUpRun(modules=modules.assign(layer=modules["layer"] * 2), updates=lambda: updates, meta=meta)


def test_overlaps_are_squared_cosines_of_subspaces() -> None:
    model = tiny("bert")
    low, high, other = (lora_run(model, rank, draw) for draw, rank in enumerate((2, 4, 4)))
    table = variants.keep_overlaps(low, high, other)
    assert set(zip(table["pair"], table["layer"], strict=True)) == {
        ("ranks 8 and 64", 0), ("ranks 8 and 64", 2), ("two starts of rank 64", 2)
    }  # fmt: skip
    name = low.modules.loc[(low.modules["layer"] == 2) & (low.modules["role"] == "q"), "module"].item()
    first, second = (np.linalg.svd(run.updates()[name].low_rank.A)[2] for run in (low, high))
    expected = np.linalg.norm(first[:2] @ second[:3].T) ** 2 / 2
    cell = table.query("pair == 'ranks 8 and 64' and layer == 2 and role == 'q' and i == 2 and j == 3")
    assert cell["phi"].item() == pytest.approx(expected, rel=2e-3)


def test_amplification_compares_the_weight_along_three_kinds_of_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    monkeypatch.setattr(models, "load", lambda name: model)
    run = lora_run(model, 2, 0)
    table = variants.keep_update_amplification(run)
    name = run.modules["module"].iloc[0]
    weight = host_weight(model.get_submodule(name)).detach().double().numpy()
    update = run.updates()[name].dense()
    left, _, right = np.linalg.svd(update)
    row = table.iloc[0]
    assert row["update"] == pytest.approx(np.linalg.norm(update))
    assert row["weight"] == pytest.approx(np.linalg.norm(weight))
    assert row["along_update"] == pytest.approx(np.linalg.norm(left[:, :2].T @ weight @ right[:2].T))
    assert row["along_weight"] == pytest.approx(np.linalg.norm(np.linalg.svd(weight)[1][:2]))
    assert row["along_random"] == pytest.approx(2 * np.linalg.norm(weight) / 32)
    overlaps = variants.keep_weight_overlaps(run)
    assert sorted(set(overlaps["i"])) == [*range(4, 33, 4)]
    assert overlaps.loc[overlaps["i"] == 32, "phi"].tolist() == pytest.approx([1.0, 1.0])


def test_moments_are_means_over_the_matrices_of_a_layer() -> None:
    run = records(
        quantity=["moment_sigma", "moment_sigma", "factor_rank", "factor_rank", "loss"],
        layer=[0, 0, 0, 0, None],
        role=["q", "k", "q", "k", ""],
        step=10,
        index=[1, 1, None, None, None],
        value=[0.2, 0.4, 3.0, 5.0, 1.0],
    )
    table = variants.keep_moments(run).set_index(["quantity", "role"])["value"]
    assert table.to_dict() == pytest.approx(
        {("factor_rank", "k"): 5, ("factor_rank", "q"): 3, ("moment_sigma", ""): 0.3}
    )


def test_guidance_is_the_only_change_of_its_arms() -> None:
    for truth in (names.MOMENTS_RANK_4, names.MOMENTS_UNSTRUCTURED):
        arm, plain = ARMS[variants.guided(truth)], ARMS[f"Adapprox, {truth}"]
        method: Any = plain.method
        assert arm.method == replace(method, cosine=True)
