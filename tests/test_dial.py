"""The dial against separate passes, central differences and exact identities, on tiny encoders and decoders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_export import trained
from torch import Tensor, nn

import lorascope as ls
from lorascope.adapters import delta
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis.dial import KEEP, PROBE, TASK, WHOLE, Dial
from lorascope.analysis.domain_probe import DomainProbe
from lorascope.cli.main import main
from lorascope.export.scaled_parts import read_scales
from lorascope.inputs import models, tasks
from lorascope.inputs.text_rows import encode_rows, load_keep
from lorascope.insight import dial as instrument
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.update_parts import (
    PartDirections,
    PartsOfUpdate,
    ScaledUpdates,
    UpdatePart,
    add_random_controls,
    component_parts,
    group_parts,
    intruder_parts,
)
from lorascope.methods import DoRA, Full, HydraLoRA, LoRA, PiSSA
from lorascope.observe.measured_rows import (
    Divergence,
    Drift,
    ProbeDivergence,
    RowMeasure,
    TaskLoss,
    batch_by_length,
    pooled_states,
    state_rows,
)
from lorascope.training.evaluation import evaluate

ROWS = 64
QUIET: dict[str, Any] = {"rows": ROWS, "keep_rows": ROWS, "progress": False}
METHODS = {
    "lora": LoRA(rank=3, alpha=12.0, targets=("q", "ffn_out"), lr=1e-2, head_lr=1e-2),
    "dora": DoRA(rank=2, alpha=8.0, targets=("q", "ffn_out"), lr=1e-2, head_lr=1e-2),
    "pissa": PiSSA(rank=2, alpha=2.0, targets=("q", "ffn_out"), lr=1e-2, head_lr=1e-2),
}


@pytest.fixture(scope="module", params=[*METHODS, "decoder"])
def opened(
    request: Any, bert: str, llama: str, reviews: tasks.Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ls.Run, str]:
    folder = llama if request.param == "decoder" else bert
    method = METHODS.get(request.param, LoRA(rank=3, alpha=12.0, targets=("q", "ffn_out"), lr=1e-2))
    return trained(folder, reviews, method, tmp_path_factory.mktemp("dial") / "run", steps=12)[1], folder


def divide(model: nn.Module, updates: Any, by: str) -> PartsOfUpdate:
    if by == "intruder":
        return intruder_parts(model, updates)
    if by == "component":
        components = component_parts(model, updates)
        return add_random_controls(components, set(components.parts))
    return group_parts(model, updates, by)


def measures(adapted: AdaptedBase, other_text: tasks.Task) -> dict[str, RowMeasure]:
    base = adapted.base
    kept = load_keep(other_text, adapted.task, base)
    distance = Drift if models.missing(base) else Divergence
    return {
        TASK: TaskLoss(base, *encode_rows(base, adapted.task, "validation", ROWS, 128)),
        KEEP: distance(base, *encode_rows(base, kept, "validation", ROWS, 128)),
    }


def test_at_scale_1_the_model_is_the_run_bit_by_bit_and_at_0_the_base(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    run, folder = opened
    adapted = open_adapted(run, folder, reviews, "last")
    axes = measures(adapted, other_text)
    detached = axes[TASK].values()
    assert not axes[KEEP].values().any()  # exactly the base
    delta.attach(adapted.base, adapted.deltas)
    updates = ScaledUpdates(adapted.base, adapted.deltas, {})
    whole = UpdatePart(WHOLE, tuple(adapted.deltas))
    values = {axis: measure.values() for axis, measure in axes.items()}
    assert values[KEEP].min() >= 0
    assert values[KEEP].max() > 0
    for scale, expected in ((1.0, values[TASK]), (0.0, detached)):
        with updates.scaled(whole, scale):
            np.testing.assert_array_equal(axes[TASK].values(), expected)
    with updates.scaled(whole, 0.0):
        assert not axes[KEEP].values().any()
    restored = models.load(folder, task=reviews)
    run.restore(restored)
    rows = encode_rows(adapted.base, adapted.task, "validation", ROWS, 128)
    with evaluation_mode(restored):
        np.testing.assert_array_equal(values[TASK], TaskLoss(restored, *rows).values())
    # Batches of another size round differently.
    np.testing.assert_allclose(values[TASK], evaluate(restored, rows.encoded, batch_size=7).nll, rtol=1e-5, atol=1e-6)


def divisions(number: int, most: list[int]) -> Iterator[list[int]]:
    """Yield every division of sorted rows into batches by their sizes; a batch ending at a row has at most ``most``."""
    if not number:
        yield []
    for size in range(1, min(number, most[number - 1]) + 1) if number else ():
        for division in divisions(number - size, most):
            yield [*division, size]


@pytest.mark.parametrize("seed", range(4))
def test_batches_have_the_least_cost_of_all_divisions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 40, 12) if seed else np.full(12, 9)
    batches = batch_by_length(lengths)
    assert sorted(np.concatenate(batches).tolist()) == list(range(12))
    ends = np.sort(lengths)
    most = (16 * lengths.max() // ends).tolist()

    def cost(sizes: list[int]) -> int:
        last = np.cumsum(sizes) - 1
        return int((np.array(sizes) * ends[last]).sum()) + 32 * len(sizes)

    assert cost(list(map(len, batches))) == min(map(cost, divisions(12, most)))


def test_rows_of_one_length_are_in_batches_of_16() -> None:
    # Such as the patches of images, which would not fit into memory together.
    assert list(map(len, batch_by_length(np.full(40, 197)))) in ([16, 16, 8], [8, 16, 16], [16, 8, 16])
    assert len(batch_by_length(np.zeros(5, int))) == 1


def test_states_do_not_depend_on_the_batches(bert: str, reviews: tasks.Task) -> None:
    model = models.load(bert, task=reviews)
    rows = encode_rows(model, reviews.fit(model), "validation", ROWS, 128)
    with evaluation_mode(model):
        states = state_rows(model, rows.encoded)
        with torch.no_grad():
            single = [pooled_states(model, rows.encoded.batch([row]))[0].numpy() for row in range(len(rows.table))]
    np.testing.assert_allclose(states, single, rtol=1e-4, atol=1e-6)


def test_nothing_of_the_model_changes(opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task) -> None:
    run, folder = opened
    adapted = open_adapted(run, folder, reviews, "last")
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    before = {name: tensor.clone() for name, tensor in adapted.base.state_dict().items()}
    classes = [type(module) for module in adapted.base.modules()]
    parts = group_parts(adapted.base, adapted.updates, "module").parts
    updates = ScaledUpdates(adapted.base, adapted.deltas, {})
    dialed = instrument.DialedModel(updates, axes, instrument.tqdm(disable=True))
    dialed.removals(parts)
    dialed.slopes(parts, 0.5)
    assert [type(module) for module in adapted.base.modules()] == classes
    for module in adapted.base.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, tensor in adapted.base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_removing_parts_equals_separate_passes_with_the_part_subtracted(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    """Subtract the matrix of each part from the weight below the adapter, in float64."""
    run, folder = opened
    adapted = open_adapted(run, folder, reviews, "last")
    adapted.base.double()
    for part_delta in adapted.deltas.values():
        part_delta.double()
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    updates = {name: item.update() for name, item in adapted.deltas.items()}
    for by in ("module", "layer", "role", "component", "intruder"):
        parts, directions = divide(adapted.base, updates, by)
        dialed = instrument.DialedModel(
            ScaledUpdates(adapted.base, adapted.deltas, directions), axes, instrument.tqdm(disable=True)
        )
        removed = {(item.part, item.axis): item.values for item in dialed.removals(parts)}
        assert len(removed) == 2 * len(parts)
        for part in parts:
            matrices = {name: updates[name].dense() for name in part.modules}
            if part.direction is not None:
                matrices = {part.modules[0]: matrix_of(directions[part.modules[0]], part.direction)}
            with subtracted(adapted.base, matrices):
                for axis, measure in axes.items():
                    np.testing.assert_allclose(removed[part.name, axis], measure.values(), rtol=1e-9, atol=1e-12)


def test_curves_equal_separate_passes_of_every_part_and_scale(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    run, folder = opened
    adapted = open_adapted(run, folder, reviews, "last")
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    for by in ("module", "layer", "role", "component"):
        parts, directions = divide(adapted.base, adapted.updates, by)
        updates = ScaledUpdates(adapted.base, adapted.deltas, directions)
        dialed = instrument.DialedModel(updates, axes, instrument.tqdm(disable=True))
        curves = {item[:3]: item.values for item in dialed.curves(parts[:3], (0.25, 1.25))}
        assert len(curves) == 2 * 2 * len(parts[:3])
        for part in parts[:3]:
            for item in dialed.curve(part, (0.25, 1.25)):
                np.testing.assert_allclose(curves[item[:3]], item.values, rtol=1e-4, atol=1e-6)


def test_a_curve_ends_before_the_first_scale_that_is_not_finite(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "run", steps=2)[1]
    adapted = open_adapted(run, bert, reviews, "last")
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    updates = ScaledUpdates(adapted.base, adapted.deltas, {})
    dialed = instrument.DialedModel(updates, axes, instrument.tqdm(disable=True))
    parts = group_parts(adapted.base, adapted.updates, "module").parts[:1]
    assert {item.scale for item in dialed.curves(parts, (0.5, np.nan, 1.25))} == {0.5}


def test_drift_and_probe_come_from_one_pass_and_equal_separate_ones(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path
) -> None:
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "run", steps=6)[1]
    adapted = open_adapted(run, bert, reviews, "last")
    axes = measures(adapted, other_text)
    rows = encode_rows(adapted.base, load_keep(other_text, adapted.task, adapted.base), "validation", ROWS, 128)
    generator = np.random.default_rng(0)
    probe = DomainProbe(generator.normal(size=(adapted.base.config.hidden_size, 3)), np.zeros(3), 1.0, 0.3)
    axes[PROBE] = ProbeDivergence(adapted.base, *rows, probe)
    delta.attach(adapted.base, adapted.deltas)
    updates = ScaledUpdates(adapted.base, adapted.deltas, {})
    dialed = instrument.DialedModel(updates, axes, instrument.tqdm(disable=True))
    calls = []
    hook = adapted.base.base_model.register_forward_hook(lambda *_: calls.append(1))
    separate = {axis: measure.values() for axis, measure in axes.items()}
    assert separate[PROBE].max() > 0
    assert len(calls) == 3 * len(axes[TASK].batches)
    calls.clear()
    joint = dialed.curve(UpdatePart(WHOLE, tuple(adapted.deltas)), [1.0])
    assert len(calls) == 2 * len(axes[TASK].batches)
    hook.remove()
    for item in joint:
        np.testing.assert_array_equal(item.values, separate[item.axis])


def matrix_of(directions: Any, index: int) -> np.ndarray:
    return float(directions.size[index]) * np.outer(directions.U[:, index], directions.V[:, index])


def subtract_output(matrix: Tensor, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output - inputs[0] @ matrix.T


class subtracted:
    """Context in which matrices are subtracted from the output of modules, whose adapters are as they are."""

    def __init__(self, model: nn.Module, matrices: dict[str, np.ndarray]) -> None:
        self.model, self.matrices = model, matrices

    def __enter__(self) -> None:
        self.handles = []
        for name, matrix in self.matrices.items():
            hook = partial(subtract_output, torch.tensor(matrix))
            self.handles.append(self.model.get_submodule(name).register_forward_hook(hook))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("by", ["module", "component", "intruder"])
def test_slopes_equal_central_differences(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task, by: str
) -> None:
    run, folder = opened
    adapted = open_adapted(run, folder, reviews, "last")
    adapted.base.double()
    for part_delta in adapted.deltas.values():
        part_delta.double()
    for module in adapted.base.modules():
        if type(module).__name__.endswith("RMSNorm"):  # casts to float32
            module.forward = lambda x, module=module: (
                module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
            )
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    parts, directions = divide(adapted.base, adapted.updates, by)
    if not parts:
        pytest.skip("the update has no intruder dimension")
    updates = ScaledUpdates(adapted.base, adapted.deltas, directions)
    dialed = instrument.DialedModel(updates, axes, instrument.tqdm(disable=True))
    slopes = dialed.slopes(parts, 1.0)
    step = 1e-4
    for index, part in enumerate(parts):
        for axis, measure in axes.items():
            means = []
            for scale in (1 + step, 1 - step):
                with updates.scaled(part, scale):
                    means.append(measure.values().sum() / measure.counts.sum())
            assert slopes[axis][index] == pytest.approx((means[0] - means[1]) / (2 * step), abs=1e-6)


def test_path_shares_add_up_to_the_effect_of_the_whole(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    run, folder = opened
    for by in ("module", "component", "layer"):
        result = ls.dial(run, folder, reviews, other_text, by=by, exact=1, **QUIET)
        whole = result.summary().iloc[0]
        for name in ("learn", "forget"):
            assert whole[f"{name}_share"] == pytest.approx(whole[name], rel=0.01, abs=1e-6)
            parts = result.summary().query("not control").iloc[1:]
            assert parts[f"{name}_share"].sum() == pytest.approx(whole[f"{name}_share"])


def test_the_whole_update_needs_no_gradients(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(RowMeasure, "slopes")
    assert ls.dial(*opened, reviews, other_text, by=WHOLE, **QUIET).summary().shape[0] == 1


@pytest.mark.parametrize("by", [WHOLE, "intruder"])
def test_parts_that_do_not_divide_the_update_give_the_whole_no_share(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task, by: str
) -> None:
    whole = ls.dial(*opened, reviews, other_text, by=by, **QUIET).summary().iloc[0]
    assert whole["learn"] != 0
    assert np.isnan([whole["learn_share"], whole["forget_share"], whole["learn_slope"], whole["forget_slope"]]).all()


def test_controls_of_components_are_as_large_and_in_the_span_of_the_update(
    opened: tuple[ls.Run, str], reviews: tasks.Task
) -> None:
    adapted = open_adapted(*opened, reviews, "last")
    components = component_parts(adapted.base, adapted.updates)
    parts, directions = add_random_controls(components, set(components.parts[::2]))
    assert [part for part in parts if not part.control] == components.parts
    for component in components.parts[::2]:
        control = parts[parts.index(component) + 1]
        (module,) = component.modules
        assert (control.control, control.modules, control.energy) == (True, component.modules, component.energy)
        drawn, own = directions[module], components.directions[module]
        assert drawn.size[control.direction] == own.size[component.direction]
        for vectors, basis in ((drawn.U, own.U), (drawn.V, own.V)):
            coordinates = basis.T @ vectors[:, control.direction]
            np.testing.assert_allclose(basis @ coordinates, vectors[:, control.direction], atol=1e-5)
            assert coordinates.norm() == pytest.approx(1, abs=1e-5)
            assert coordinates.abs().max() < 0.9999  # no component of the update


def test_a_single_component_has_no_random_control() -> None:
    component = UpdatePart("q 1", ("q",), direction=0)
    update = PartsOfUpdate([component], {"q": PartDirections(torch.ones(4, 1), torch.ones(1), torch.ones(3, 1))})
    assert add_random_controls(update, {component}).parts == [component]


def test_every_removed_component_is_judged_next_to_its_control(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    result = ls.dial(*opened, reviews, other_text, by="component", exact=2, **QUIET)
    summary = result.summary()
    controls = summary[summary["control"]]
    assert len(controls) == 2
    components = summary.loc[controls.index - 1]
    assert (components["part"] + ", control").to_list() == controls["part"].to_list()
    assert components["exact"].all()
    assert controls["exact"].all()
    assert controls["best_scale"].isna().all()
    assert (controls["verdict"] != "").all()
    assert "\n  controls " in repr(result)
    number = (~summary["control"]).sum() - 1
    assert result.learn_margin == pytest.approx(abs(summary["learn"].iloc[0]) / max(number, 10))


def test_drift_is_one_minus_the_cosine(bert: str, reviews: tasks.Task, other_text: tasks.Task) -> None:
    base = models.load(bert, task=reviews)
    rows = encode_rows(base, load_keep(other_text, reviews, base), "validation", ROWS, 128)
    drift = Drift(base, *rows)
    before = torch.cat([pooled_states(base, batch) for batch in map(dict, drift.batches)]).detach()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = torch.cat([pooled_states(base, batch) for batch in map(dict, drift.batches)]).detach()
    cosine = torch.cosine_similarity(before, after, dim=-1).numpy()
    np.testing.assert_allclose(drift.values()[drift.order], 1 - cosine, atol=1e-12)
    assert (drift.values() > 1e-3).any()


def test_divergence_equals_scipy(llama: str, other_text: tasks.Task) -> None:
    from scipy.special import rel_entr, softmax

    base = models.load(llama).double()
    text = load_keep(other_text, other_text.fit(base), base)
    rows = encode_rows(base, text, "validation", ROWS, 128)
    divergence = Divergence(base, *rows)
    before = [base(input_ids=batch["input_ids"]).logits.detach().double() for batch in divergence.batches]
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
    expected = []
    for batch, logits in zip(divergence.batches, before, strict=True):
        changed = base(input_ids=batch["input_ids"]).logits.detach().double()
        for row, mask in enumerate(batch["attention_mask"].bool()):
            old, new = logits[row, mask], changed[row, mask]
            expected.append(rel_entr(softmax(old[:-1].numpy(), -1), softmax(new[:-1].numpy(), -1)).sum())
    np.testing.assert_allclose(divergence.values()[divergence.order], expected, rtol=1e-9)


def test_the_dial_of_a_run_has_every_column_and_a_receipt(
    opened: tuple[ls.Run, str], reviews: tasks.Task, other_text: tasks.Task
) -> None:
    run, folder = opened
    result = ls.dial(run, folder, reviews, other_text, by="module", **QUIET)
    assert isinstance(result, Dial)
    summary = result.summary().set_index("part")
    assert set(summary.index[1:]) == set(run.updates())
    assert summary["exact"].all()
    curve = result.curve()
    assert sorted(curve["scale"].unique()) == list(instrument.SCALES)
    at_zero = curve[(curve["axis"] == TASK) & (curve["scale"] == 0)].iloc[0]
    assert at_zero["change"] == summary.loc[WHOLE, "learn"]
    assert at_zero["low"] == summary.loc[WHOLE, "learn_low"]
    assert result.receipt.run == run.id
    assert str(result.receipt) in repr(result)
    assert "do not cover the seed" in repr(result)
    assert {"parts", "table", "receipt", "margins", "run"} == result.to_json().keys()
    again = ls.dial(run, folder, reviews, other_text, by="module", **QUIET)
    pd.testing.assert_frame_equal(again.summary(), result.summary())


def test_bad_arguments_get_one_line(bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "lora", steps=2)[1]
    for arguments, message in (
        ({"by": "head"}, "by must be one of module, component, layer, role, intruder, whole, got 'head'"),
        ({"exact": 0}, "exact must be an integer >= 1, got 0"),
        ({"scales": (0.5, -1)}, r"scales must be in \[0, 2\], got -1"),
        ({"rows": 8}, "intervals need at least 32 rows, got 8 of its validation split"),
    ):
        with pytest.raises(ValueError, match=message):
            ls.dial(run, bert, reviews, other_text, **QUIET | arguments)
    with pytest.raises(ValueError, match="keep must have other rows than the task, got 64 of 64 in both"):
        ls.dial(run, bert, reviews, reviews, **QUIET)
    full = trained(bert, reviews, Full(lr=1e-3), tmp_path / "full", steps=2)[1]
    with pytest.raises(ValueError, match="has no adapter"):
        ls.dial(full, bert, reviews, other_text, **QUIET)
    hydra = trained(bert, reviews, HydraLoRA(rank=2, targets=("q",), lr=1e-2), tmp_path / "hydra", steps=2)[1]
    with pytest.raises(ValueError, match="it depends on the input"):
        ls.dial(hydra, bert, reviews, other_text, **QUIET)


def test_an_exported_adapter_has_the_dial_of_its_run(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path
) -> None:
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "run", steps=6)[1]
    adapter = ls.load(ls.export.to_peft(run, tmp_path / "adapter"))
    ours, theirs = (ls.dial(item, bert, reviews, other_text, by="module", **QUIET).summary() for item in (run, adapter))
    for name in ("learn", "forget", "learn_share"):
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", [WHOLE, "ffn_out", "encoder layer 1", "component"])
def test_an_export_with_scales_computes_what_the_dial_measured(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path, part: str
) -> None:
    """The losses of the exported adapter equal the losses of the dial at the exported scale."""
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "run", steps=6)[1]
    if part == "component":
        part = f"{next(iter(run.updates()))} 2"
    adapted = open_adapted(run, bert, reviews, "last")
    axes = measures(adapted, other_text)
    delta.attach(adapted.base, adapted.deltas)
    for by in ("role", "layer", "component"):
        parts, directions = divide(adapted.base, adapted.updates, by)
        measured = [item for item in parts if item.name == part] or [UpdatePart(WHOLE, tuple(adapted.deltas))]
        if measured[0].name == part:
            break
    with ScaledUpdates(adapted.base, adapted.deltas, directions).scaled(measured[0], 0.5):
        expected = axes[TASK].values()
    folder = ls.export.to_peft(run, tmp_path / "scaled", scales={part: 0.5})
    for source in (folder, ls.export.to_peft(ls.load(folder), tmp_path / "again", scales={WHOLE: 1.0})):
        scaled = open_adapted(ls.load(source), bert, reviews, "last")
        loss = TaskLoss(scaled.base, *encode_rows(scaled.base, scaled.task, "validation", ROWS, 128))
        delta.attach(scaled.base, scaled.deltas)
        np.testing.assert_allclose(loss.values(), expected, rtol=1e-4, atol=1e-6)


def test_the_command_of_a_receipt_measures_the_same(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for name, item in (("task", reviews), ("keep", other_text)):
        names.append(str(tmp_path / f"{name}.csv"))
        item.table.drop(columns=["draw"]).to_csv(names[-1], index=False)
    run = trained(bert, ls.tasks.load(names[0]), METHODS["lora"], tmp_path / "run", steps=4, seed=3)[1]
    measured = ls.dial(run, bert, *names, by="layer", scales=(0.5,), rows=40, keep_rows=48, progress=False)
    assert measured.receipt.seed == 3
    words = shlex.split(measured.receipt.command)
    assert words[:2] == ["lorascope", "dial"]
    capsys.readouterr()
    assert main([*words[1:], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parts"] == json.loads(json.dumps(measured.to_json()["parts"]))
    assert document["receipt"]["command"] == measured.receipt.command


def test_scales_of_another_run_or_an_unknown_part_are_refused(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path
) -> None:
    first, second = (
        trained(bert, reviews, METHODS["lora"], tmp_path / str(seed), steps=2, seed=seed)[1] for seed in (0, 1)
    )
    table = ls.dial(first, bert, reviews, other_text, by="whole", **QUIET).save(tmp_path / "dial.csv")
    assert read_scales(table, first) in ({}, {WHOLE: read_scales(table, first).get(WHOLE)})
    with pytest.raises(ValueError, match=f"belong to run {first.id}, not to run {second.id}"):
        read_scales(table, second)
    with pytest.raises(ValueError, match="cannot scale 'layer 9' of run"):
        ls.export.to_peft(first, tmp_path / "scaled", scales={"layer 9": 0.5})
    with pytest.raises(ValueError, match="scales cannot be combined with a budget"):
        ls.export.to_peft(first, tmp_path / "scaled", budget=0.5, scales={WHOLE: 0.5})


def test_the_command_prints_verdicts_and_writes_scales(
    bert: str, reviews: tasks.Task, other_text: tasks.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(bert, reviews, METHODS["lora"], tmp_path / "run", steps=4)[1]
    files = {"task": reviews, "keep": other_text}
    for name, item in files.items():
        item.table.drop(columns=["draw"]).to_csv(tmp_path / f"{name}.csv", index=False)
    arguments = ["dial", str(run.path), "--model", bert, "--task", str(tmp_path / "task.csv")]
    arguments += ["--keep", str(tmp_path / "keep.csv"), "--rows", "40", "--keep-rows", "40", "--by", "whole"]
    assert main([*arguments, "-o", str(tmp_path / "dial.csv")]) == 0
    shown = capsys.readouterr().out
    assert "Dial of LoRA, rank 3" in shown
    assert "40 rows" in shown
    assert main(["export", str(run.path), "--scales", str(tmp_path / "dial.csv"), "--peft", str(tmp_path / "out")]) == 0
    assert main(["export", str(run.path), "--scales", "whole=0.5", "--peft", str(tmp_path / "half")]) == 0
    for name, update in ls.load(tmp_path / "half").updates().items():
        np.testing.assert_allclose(update.dense(), run.updates()[name].dense() / 2, rtol=1e-6)
    for wrong, message in (
        (["dial"], "RUN is required"),
        (["dial", str(run.path)], "--model and --task are required"),
        ([*arguments, "--scales", "a"], "--scales must be numbers such as 0.5,0.75,1, got 'a'"),
        ([*arguments, "-o", str(tmp_path / "dial.csv")], "dial.csv"),
        (["export", str(run.path), "--scales", "whole=a", "--peft", "x"], "--scales must be PART=SCALE or a table of"),
        (["export", str(run.path), "--scales", "x.csv", "--rank-pattern"], "--scales requires one run with --peft DIR"),
    ):
        assert main(wrong) != 0
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
