"""The doctor on recorded trainings: PEFT's allocator and scales, healthy and with a fault."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
from planted import low_rank, manifest, plant
from ward import Allocating, Bench, adalora

import lorascope as ls
from lorascope.diagnosis.case import Case, TrainedModule
from lorascope.diagnosis.causes.config import allocator_idle, budget_missed, overscaled
from lorascope.runs.run import Run


@pytest.fixture
def bench(bert, gpt2, task, tmp_path):
    return Bench(bert, gpt2, task, tmp_path)


def causes_of(run):
    return [finding.cause for finding in ls.diagnose(run)]


# Schedules of six steps, with the findings if the allocator is called and if it is not.
SCHEDULES = {
    "whole": ({"total_step": 6, "tinit": 1, "tfinal": 2}, [], ["allocator-idle"]),
    "peft's own": ({"total_step": 6}, [], ["allocator-idle"]),
    "cut short": ({"total_step": 60}, ["budget-missed"], ["allocator-idle"]),
    "still warm": ({"total_step": 60, "tinit": 20}, ["budget-missed"], ["budget-missed"]),
}


@pytest.mark.parametrize("first", [True, False], ids=["recorder first", "allocator first"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peft_allocator_is_judged_by_the_retained_components(schedule, first, bench):
    """Before PEFT masks, the optimizer has changed every component again, so weights at that point are no evidence."""
    options, called, _ = SCHEDULES[schedule]
    model = bench.peft(adalora(**options))
    run = bench.trained(model, others=[Allocating()], recorder_first=first)
    assert causes_of(run) == called
    pattern = model.peft_config["default"].rank_pattern or {}
    kept = {name.partition(".lora_E")[0]: sum(mask) for name, mask in pattern.items()}
    assert run.ranks() == (kept or dict.fromkeys(run.ranks(), 6))
    if kept:  # the last state is saved
        assert {name: int(update.A.any(axis=1).sum()) for name, update in run.updates().items()} == kept
        assert causes_of(bench.saved(model)) == called


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peft_allocator_that_was_not_called_is_found(schedule, bench):
    options, _, forgotten = SCHEDULES[schedule]
    assert causes_of(bench.trained(bench.peft(adalora(**options)))) == forgotten


def case(method, step=None, **columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    modules = [
        TrainedModule(f"h.{number}.q", "", number, "q", row.pop("rank", 1), weight_norm=1.0, **row)
        for number, row in enumerate(rows)
    ]
    meta = manifest(method=method, states={"last": {"step": step, "ranks": {}}})
    given = Case(Run(None, meta))
    given.modules = [replace(each, adapted=each.rank > 0) for each in modules]
    return given


def allocator_causes(given):
    return [finding.cause for rule in (allocator_idle, budget_missed) for finding in rule.findings(given)]


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([4, 4, 0], []),  # the budget is used by two of three modules
        ([12, 12, 0], []),
        ([0, 0, 0], []),
        ([12, 12, 1], ["budget-missed"]),
        ([12, 12, 12], ["allocator-idle"]),
    ],
)
def test_module_without_components_counts_for_the_budget(ranks, found):
    given = case({"name": "peft", "kind": "ADALORA"}, 9, rank=ranks, used=[float(n) for n in ranks])
    assert allocator_causes(given) == found


def test_tail_of_a_schedule_is_not_a_missed_budget():
    """100 modules from rank 12 to 8: of 400 components to prune, 4 may remain with masking every few steps."""
    for extra, found in ((4, []), (5, ["budget-missed"])):
        ranks = [8] * (100 - extra) + [9] * extra
        given = case({"name": "peft", "kind": "ADALORA"}, 9, rank=ranks, used=[float(n) for n in ranks])
        assert allocator_causes(given) == found


def test_pruned_module_is_not_dead(tmp_path):
    """Recorded between the optimizer and PEFT's mask, the module moved by one step at a small rate."""
    norms = {"h.0.q": 1e-6, "h.1.q": 1.0}
    values = {("update_norm", name): {9: norm} for name, norm in norms.items()}
    values |= {("stable_rank", name): {9: 1.0} for name in norms}
    factors = {"h.0.q": low_rank(0.0, 0.0), "h.1.q": low_rank(1.0, 0.5)}
    for kind, rank, found in (("ADALORA", 0, []), ("LORA", 2, ["dead"])):
        states = {"last": {"step": 9, "ranks": {"h.0.q": rank, "h.1.q": 2}}}
        method = {"name": "peft", "kind": kind, "init_r": 2, "target_r": 1}
        run = plant(tmp_path, kind, values, factors=factors, states=states, method=method)
        assert causes_of(run) == found


def test_overscaled_requires_a_large_scale_and_a_large_update():
    """Both at once: a scale above 16, and an update larger than its weight."""
    given = case({"name": "peft"}, scale=[16.0, 64.0, 16.5], relative_update=[40.0, 1.0, 1.01])
    (finding,) = overscaled.findings(given)
    assert finding.evidence["modules"] == 1
    assert (finding.evidence["scale"], finding.evidence["relative_update"]) == (16.5, 1.01)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"r": 1, "lora_alpha": 16}, []),
        ({"r": 4, "lora_alpha": 8}, []),
        ({"r": 4, "lora_alpha": 32, "use_rslora": True}, []),
        ({"r": 4, "lora_alpha": 4000}, ["overscaled"]),
        ({"r": 4, "lora_alpha": 4000, "use_rslora": True}, ["overscaled"]),
    ],
)
def test_scale_of_a_recorded_lora(options, found, bench):
    """At this learning rate, scale 16 makes an update as large as the weight."""
    run = bench.trained(bench.peft(**options), learning_rate=3e-2)
    assert causes_of(run) == found


@pytest.mark.parametrize(("alpha", "found"), [(8, []), (6 * 16, []), (24000, ["overscaled"])])
def test_scale_of_a_recorded_adalora(alpha, found, bench):
    """PEFT divides alpha by the initial rank, 6."""
    model = bench.peft(adalora(total_step=6, tinit=1, tfinal=2, lora_alpha=alpha))
    run = bench.trained(model, others=[Allocating()], learning_rate=3e-2)
    assert causes_of(run) == found


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_prompt_methods_have_no_unused_adapters(config, bench):
    run = bench.trained(bench.peft(config(task_type="SEQ_CLS", num_virtual_tokens=4)))
    assert run.meta.method["name"] == "peft"
    assert causes_of(run) == []
