"""The doctor on realistic faults: each yields only its own finding, and healthy runs yield none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from planted import low_rank, plant
from safetensors.numpy import load_file, save
from test_inspect import strictly
from test_kl import few_sentences, overfitted
from torch.utils.data import Subset
from trainers import METHODS
from ward import SETTINGS, Allocating, Bench, adalora

import lorascope as ls
from lorascope.analysis.stored_measurements import DIAL
from lorascope.cli.main import main
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import RULES, DoctorRule, Finding
from lorascope.diagnosis.causes.finding import finding, run_rules
from lorascope.diagnosis.doctor import skipped_checks
from lorascope.diagnosis.training_case import TrainingEvidence
from lorascope.inputs import models
from lorascope.papers.setups import planted_teacher
from lorascope.training.hf_trainer.run_metadata import row_overlap


def saved_too_early(bench: Bench) -> ls.Run:
    return bench.saved(bench.peft())


def without_alpha(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(lora_alpha=0))


def alpha_for_scale(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(lora_alpha=4000), base=True)


def alpha_pattern_forgotten(bench: Bench) -> ls.Run:
    ranks, alphas = {"query": 2, "value": 16}, {"query": 4}
    model = bench.peft(target_modules=["query", "key", "value"], rank_pattern=ranks, alpha_pattern=alphas)
    return bench.trained_and_saved(model)


def misspelt(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(target_modules=["query", "valeu"]))


def allocator_not_called(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(adalora(total_step=6, tinit=1, tfinal=2)))


def schedule_too_long(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(adalora(total_step=60)), others=[Allocating()])


def first_layer_frozen(bench: Bench) -> ls.Run:
    model = bench.peft()
    for name, parameter in model.named_parameters():
        if "layer.0." in name:
            parameter.requires_grad_(False)
    return bench.trained(model)


def rate_of_another_method(bench: Bench) -> ls.Run:
    return bench.by_train(ls.FourierFT(coefficients=16), lr=1e-6)


def rate_too_large(bench: Bench) -> ls.Run:
    return bench.by_train(ls.Full(), lr=10.0, head_lr=10.0, schedule="constant", clip=None)


def trained_too_long(bench: Bench) -> ls.Run:
    return overfitted(bench.out / "run", [ls.observe.kl(every=5, keep=planted_teacher.task(1))])


def learned_by_heart(bench: Bench) -> ls.Run:
    run = overfitted(bench.out / "run", [])
    table = planted_teacher.task(0).table[["text"]]
    fresh_text = ls.tasks.from_frame(table[~table["text"].isin(few_sentences().table["text"])], "fresh sentences")
    options = {"keep": planted_teacher.task(1), "by": "whole", "rows": 400, "progress": False}
    ls.dial(run, planted_teacher.base(), fresh_text, **options).save(bench.out / "run" / DIAL)
    return run


def constant_start(bench: Bench) -> ls.Run:
    model = bench.peft()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.constant_(parameter, 0.02)
    return bench.trained(model)


def both_factors_zero(bench: Bench) -> ls.Run:
    model = bench.peft()
    for name, parameter in model.named_parameters():
        if "layer.0." in name and "lora_A" in name:
            torch.nn.init.zeros_(parameter)
    return bench.trained(model)


def layer_without_gradient(bench: Bench) -> ls.Run:
    model = bench.peft()
    for name, parameter in model.named_parameters():
        if "layer.0." in name and "lora_B" in name:
            parameter.register_hook(lambda gradient: gradient * 1e-14)  # far below Adam's epsilon
    return bench.trained(model)


def overflow(bench: Bench) -> ls.Run:
    return bench.trained(bench.peft(), learning_rate=1e38)


def adapter_switched_off(bench: Bench) -> ls.Run:
    model = bench.peft()
    model.base_model.disable_adapter_layers()
    for parameter in model.base_model.model.classifier.parameters():
        parameter.requires_grad_(True)
    return bench.trained(model)


def both_names(bench: Bench) -> ls.Run:
    model, method = models.load(bench.gpt2), ls.LoRA(targets=("transformer.wte", "lm_head"), lr=1e-3)
    return ls.train(model, bench.task, method, out=bench.out / "run", observe=bench.observe, **SETTINGS)


def training_rows_again(bench: Bench) -> ls.Run:
    settings = {"eval_strategy": "steps", "eval_steps": 3}
    return bench.trained(bench.peft(), eval_dataset=bench.rows[:10], **settings)


def misspelt_pattern(bench: Bench) -> ls.Run:
    return bench.trained_and_saved(bench.peft(rank_pattern={"valeu": 2}))


def compiled_too_early(bench: Bench) -> ls.Run:
    model = bench.peft()
    bench.trained(model)
    model.base_model.model = torch.compile(model.base_model.model)
    return bench.saved(model)


def heads_not_gathered(bench: Bench) -> ls.Run:
    bench.trained_and_saved(bench.peft())
    file = bench.out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.write_bytes(save({name: array[:0] if "classifier" in name else array for name, array in tensors.items()}))
    return ls.load(bench.out / "adapter")


FAULTS: dict[Callable[[Bench], ls.Run], str] = {
    overflow: "LS001",
    without_alpha: "LS002",
    saved_too_early: "LS003",
    adapter_switched_off: "LS004",
    both_factors_zero: "LS005",
    layer_without_gradient: "LS006",
    first_layer_frozen: "LS007",
    misspelt: "LS008",
    misspelt_pattern: "LS009",
    alpha_for_scale: "LS010",
    alpha_pattern_forgotten: "LS011",
    allocator_not_called: "LS012",
    schedule_too_long: "LS013",
    rate_of_another_method: "LS014",
    rate_too_large: "LS015",
    constant_start: "LS016",
    both_names: "LS017",
    training_rows_again: "LS018",
    compiled_too_early: "LS025",
    heads_not_gathered: "LS026",
    trained_too_long: "LS031",
    learned_by_heart: "LS032",
}


@pytest.fixture
def bench(bert, gpt2, task, tmp_path):
    return Bench(bert, gpt2, task, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_yields_only_its_own_finding(fault, bench):
    findings = ls.diagnose(fault(bench))
    assert [finding.id for finding in findings] == [FAULTS[fault]], findings
    assert findings[0].evidence
    assert findings[0].fix
    json.dumps(findings[0].evidence)


def test_every_cause_has_a_fault():
    assert {rule.id for rule in RULES if rule.fix and rule.needs != "training"} == set(FAULTS.values())


HEALTHY = METHODS | {
    "autolora": ls.AutoLoRA(rank=4, lr=1e-2),
    "alora": ls.ALoRA(init_rank=2, prune=5, warm_steps=1, round_steps=1, rounds=3, lr=1e-2),
    "dora": ls.DoRA(rank=4, lr=1e-2, head_lr=1e-2),
    "pissa": ls.PiSSA(rank=4, lr=1e-2, head_lr=1e-2),
    "vera": ls.VeRA(rank=16, lr=1e-1, head_lr=1e-2),
}


@pytest.mark.parametrize("name", ls.METHODS)
def test_healthy_run_yields_no_finding(name, bench):
    assert ls.diagnose(bench.by_train(HEALTHY[name])) == []


def test_healthy_adapter_yields_no_finding(bench):
    model = bench.peft()
    rows, bench.rows = bench.rows[32:], bench.rows[:32]
    run = bench.trained(model, eval_dataset=rows, eval_strategy="steps", eval_steps=3)
    assert run.meta.eval_overlap == 0
    assert ls.diagnose(run) == []
    assert ls.diagnose(bench.saved(model, base=True)) == []


def test_small_rate_of_a_search_is_no_finding(bench):
    run = bench.by_train(ls.AutoLoRA(rank=4, lr=1e-7))
    assert ls.diagnose(run.parents[0]) == []
    assert [finding.cause for finding in ls.diagnose(run)] == ["rate-small"]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def test_overlap_is_found_without_reading_rows(bench):
    data = torch.utils.data.TensorDataset(torch.arange(6))
    assert row_overlap(data, data) == 1
    assert row_overlap(Subset(data, [0, 1, 2]), Subset(data, [2, 3])) == 0.5
    assert row_overlap(Subset(data, [0, 1]), Subset(data, [2, 3])) == 0
    assert row_overlap(Subset(data, [0, 1, 2]), data) == 0.5
    assert row_overlap(data, Subset(data, [4])) == 1
    assert row_overlap(Subset(data, [4]), Subset(Subset(data, [3, 4]), [1])) == 1
    assert row_overlap(data, torch.utils.data.TensorDataset(torch.arange(6))) is None
    stream = Streamed()
    assert row_overlap(stream, stream) is None
    assert row_overlap(bench.rows[:4], bench.rows[2:6]) == 0.5


def test_thresholds_with_planted_numbers(tmp_path, capsys):
    """Planted (3, 4) of (30, 40) is a tenth; a value is reported only beyond its threshold."""
    norms = {"h.0.q": (3.0, 30.0), "h.1.q": (4.0, 40.0)}

    def planted(id, factor, losses):
        values = {("learned_norm", name): {9: moved * factor} for name, (moved, _) in norms.items()}
        values |= {("update_norm", name): {9: moved * factor} for name, (moved, _) in norms.items()}
        values |= {("weight_norm", name): {9: weight} for name, (_, weight) in norms.items()}
        values |= {("loss", ""): dict(enumerate(losses, start=1))}
        about = {"settings": {"steps": 9, "lr": 0.5}, "method": {"name": "lora"}}
        factors = dict.fromkeys(norms, low_rank(3.0, 2.0))
        return ls.diagnose(plant(tmp_path, id, values, factors=factors, **about))

    assert planted("a", 1.0, [1.0, 1.9]) == []
    assert planted("b", 1.1e-3, [1.0, 1.9]) == []
    (finding,) = planted("c", 0.9e-3, [1.0, 1.9])
    assert finding.cause == "rate-small"
    assert finding.evidence == {"moved": pytest.approx(0.9e-4), "threshold": 1e-4, "lr": 0.5}
    (finding,) = planted("d", 1.0, [1.0, 0.5, 2.1])
    assert (finding.cause, finding.evidence["start"], finding.evidence["end"]) == ("diverged", 1.0, 2.1)
    (finding,) = planted("e", 1.0, [1.0, math.nan])
    assert finding.cause == "diverged"
    assert main(["doctor", str(tmp_path / "e"), "--json"]) == 1
    told = strictly(capsys.readouterr().out)
    assert told["findings"][0]["evidence"] == {"start": 1.0, "end": None, "threshold": 1.0, "lr": 0.5}


def wave(*levels: float) -> list[float]:
    """Return levels with noise of 5%, which is the same in all cases."""
    return [level * (1 + 0.05 * math.sin(2.5 * step)) for step, level in enumerate(levels)]


def line(start: float, end: float, steps: int = 20) -> list[float]:
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


LOSSES = {
    "language model, 3 to 10": (wave(*line(3, 10)), True),
    "two classes, 0.7 to 2": (wave(*line(0.7, 2.2)), True),
    "two classes, 0.7 to 2 at once": (wave(0.7, *[2.1] * 19), True),
    "language model, 6 to 10.5 at once": (wave(6, *[10.5] * 19), True),
    "falls, then increases": (wave(*line(3, 1), *line(1, 8)), True),
    "jumps from 0.7 to 50, with noise as large": ([0.7, *[5.0, 200.0, 20.0, 100.0, 30.0] * 4], True),
    "infinite": ([3.0, 3.0, *[math.inf] * 6], True),
    "two classes, learns": (wave(*line(0.7, 0.1)), False),
    "regression with a large last batch": ([435, 300, 283, 224, 228, 441, 349, 969], False),
    "regression with a small first batch": ([100, 420, 250, 600, 180, 390, 510, 230, 440, 310], False),
    "large loss that increases by less than half": (wave(*line(400, 520)), False),
    "negative, as of a policy gradient": ([-0.5, 0.8, -0.3, 1.2, 0.9, 1.4, 1.1, 1.3], False),
    "exactly 0 at first, as of a policy gradient": ([0.0, 0.2, 0.9, 1.4, 1.6, 1.5, 1.2, 1.3], False),
}


@pytest.mark.parametrize("case", LOSSES)
def test_diverged_compares_the_increase_with_the_loss_and_its_noise(case, tmp_path):
    losses, diverged = LOSSES[case]
    run = plant(tmp_path, "run", {("loss", ""): dict(enumerate(losses, start=1))}, settings={"steps": len(losses)})
    assert [finding.cause for finding in ls.diagnose(run)] == ["diverged"] * diverged
    assert in_training(losses) == ["LS015"] * diverged


def in_training(losses):
    live = TrainingEvidence([], dict(enumerate(losses, start=1)), len(losses), 1, None, False, False, [], [], True)
    (rule,) = (rule for rule in RULES if rule.id == "LS015")
    return [finding.id for finding in run_rules([rule], live)]


def test_diverged_needs_ten_losses_or_a_tenfold_one_in_training():
    noisy = [95.4, 169.0, 102.5, 346.0, 341.3]  # the first of a healthy regression with batches of 4
    assert in_training(noisy) == []
    assert in_training([3.0, 9.0, 9.5, 10.0, 9.0]) == []
    assert in_training([3.0, 9.0, 9.5, 10.0, 9.0] * 2) == ["LS015"]
    assert in_training([0.7, 5.4, 288.0]) == ["LS015"]


def test_run_stopped_by_a_nan_loss_is_diverged(bench):
    with pytest.raises(FloatingPointError):
        bench.by_train(ls.Full(), lr=1e30, head_lr=1e30, clip=None)
    (finding,) = ls.diagnose(ls.load(bench.out / "run"))
    assert finding.cause == "diverged"
    assert "became" in finding.message


def test_command_prints_text_and_json(bench, capsys):
    run = saved_too_early(bench)
    assert main(["doctor", str(run.path)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("adapter        1 finding\nLS003 untrained B is still zero in all 4 modules")
    assert "skipped (no training history): unused, late-checkpoint, diverged, leak" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert main(["doctor", str(run.path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(finding["id"], finding["cause"]) for finding in told["findings"]] == [("LS003", "untrained")]
    assert main(["doctor", str(bench.out / "nowhere")]) == 2
    assert main(["doctor"]) == 2
    assert "PATH is required" in capsys.readouterr().err


def test_recorded_run_skips_no_check(tmp_path):
    values = {("update_norm", "h.0.q"): {9: 1.0}, ("weight_norm", "h.0.q"): {9: 1.0}}
    run = plant(tmp_path, "a", values, factors={"h.0.q": low_rank(1.0)}, method={"name": "lora"})
    assert skipped_checks(Case(run)) == {}


def test_rule_is_registered_by_its_definition(tmp_path):
    values = {("update_norm", "h.0.q"): {9: 1.0}, ("weight_norm", "h.0.q"): {9: 1.0}}
    run = plant(tmp_path, "a", values, factors={"h.0.q": low_rank(1.0)}, method={"name": "lora"})
    known = list(RULES)
    try:

        @DoctorRule(fix="use an even rank", suppresses=("frozen",))
        def odd_rank(case):
            yield finding("odd rank", [module.module for module in case.modules], rank=1)

        assert [*known, odd_rank] == RULES
        (diagnosed,) = ls.diagnose(run)
    finally:
        RULES[:] = known
    assert diagnosed == Finding("odd-rank", "odd rank: h.0.q", {"rank": 1}, "use an even rank", modules=("h.0.q",))
