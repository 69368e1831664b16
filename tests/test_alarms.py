"""Alarms: faults that are seeded in live runs are named early, healthy runs give none, and stops are readable."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import test_doctor as doctor
import torch
from test_doctor import HEALTHY
from trainers import by_trainer
from ward import Bench

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis.causes import RULES
from lorascope.diagnosis.causes.finding import DoctorRule, finding
from lorascope.diagnosis.kinds import KINDS
from lorascope.observe import fault_alarms


def rate_zero(bench: Bench) -> None:
    bench.trained(bench.peft(), learning_rate=0.0)


def optimizer_of_the_head(bench: Bench) -> None:
    model = bench.peft()
    head = [p for name, p in model.named_parameters() if "classifier" in name]
    by_trainer(
        model,
        bench.rows,
        bench.out,
        recorder=ls.TrainerRecorder(observe=bench.observe),
        optimizer=torch.optim.AdamW(head, lr=1e-2),
    )


def own_loop(bench: Bench, model, loss_of: Callable, lr=1e-2, optimizer=None, steps=10) -> None:
    """Train in a plain loop, on the first rows in turn."""
    own = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with ls.record(model, own, bench.out / "loop", bench.observe) as recorder:
        for step in range(steps):
            rows = bench.rows[8 * (step % 6) :][:8]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            loss = loss_of(model(**batch))
            loss.backward()
            own.step()
            recorder.step(loss=loss)
            own.zero_grad()
            if recorder.stopped:
                break


def loss_of_other_parameters(bench: Bench) -> None:
    anchor = torch.zeros((), requires_grad=True)
    own_loop(bench, bench.peft(), lambda out: out.loss.detach() + anchor)


def constant_loss(bench: Bench) -> None:
    own_loop(bench, bench.peft(), lambda out: 0.7 + out.loss - out.loss.detach(), lr=1e-3)


def weights_replaced(bench: Bench) -> None:
    bench.by_train(ls.LoRA(rank=4), lr=5.0, schedule="constant", clip=None)


def one_module_at_another_rate(bench: Bench) -> None:
    model = bench.peft()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast = {name: p for name, p in named.items() if "layer.0" in name and "query" in name}
    slow = [p for name, p in named.items() if name not in fast]
    groups = [{"params": slow, "lr": 1e-6}, {"params": list(fast.values()), "lr": 1e-3}]
    own_loop(bench, model, lambda out: out.loss, optimizer=torch.optim.AdamW(groups))


def too_far_from_the_base(bench: Bench) -> None:
    gauge = ls.observe.kl(every=1, rows=32, keep="sentiment/tweets")
    bench.observe = [gauge, ls.observe.alarms(every=1, kl=1e-4)]
    own_loop(bench, bench.peft(), lambda out: out.loss)


def loss_of_nan(bench: Bench) -> None:
    own_loop(bench, bench.peft(), lambda out: out.loss * float("nan"))


def spoil_loss(optimizer, loss):
    return loss * float("nan")


def spoil_gradients(optimizer, loss):
    """Return a finite loss, the gradient of which is infinity times 0."""
    return loss + torch.sqrt(optimizer.param_groups[0]["params"][0] * 0).sum()


def spoil_weights(optimizer, loss):
    optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0]["params"][0].data.fill_(float("nan")))
    return loss


ORDERS = {
    spoil_loss: "the weights were finite before step 5, its loss was not",
    spoil_gradients: "the loss of step 5 was finite, its gradients were not",
    spoil_weights: "the loss of step 5 was finite, the weights after it were not",
}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("spoil", ORDERS, ids=lambda spoil: spoil.__name__)
def test_alarm_and_doctor_name_what_was_not_finite_first(spoil, every, watched):
    watched.observe = [ls.observe.alarms(every=every), ls.observe.norms(every=1)]
    model, steps = watched.peft(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss_of(output):
        steps.append(1)
        return spoil(optimizer, output.loss) if len(steps) == 5 else output.loss

    with pytest.warns(UserWarning, match="LS001") as caught:
        own_loop(watched, model, loss_of, optimizer=optimizer)
    text = next(str(warning.message) for warning in caught if "LS001" in str(warning.message))
    (finding,) = (finding for finding in ls.diagnose(run_of(watched)) if finding.cause == "nan")
    assert ORDERS[spoil] in text
    if spoil is not spoil_gradients:  # the loop passes no gradient norm
        assert ORDERS[spoil] in finding.message


FAULTS: dict[Callable[[Bench], object], str] = {
    doctor.without_alpha: "LS002",
    doctor.adapter_switched_off: "LS004",
    doctor.both_factors_zero: "LS005",
    doctor.layer_without_gradient: "LS006",
    doctor.first_layer_frozen: "LS007",
    doctor.alpha_for_scale: "LS010",
    doctor.rate_too_large: "LS015",
    doctor.constant_start: "LS016",
    doctor.both_names: "LS017",
    doctor.overflow: "LS001",
    loss_of_nan: "LS001",
    rate_zero: "LS019",
    weights_replaced: "LS020",
    loss_of_other_parameters: "LS021",
    optimizer_of_the_head: "LS022",
    constant_loss: "LS023",
    one_module_at_another_rate: "LS024",
    too_far_from_the_base: "LS030",
}


@pytest.fixture
def watched(bert, gpt2, task, tmp_path):
    bench = Bench(bert, gpt2, task, tmp_path)
    bench.observe = [ls.observe.alarms(every=1)]
    return bench


def ids_in(caught: list) -> list[str]:
    return [found[0] for each in caught if (found := re.match(r"LS\d{3}", str(each.message)))]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_named_within_ten_recorded_steps(fault, watched):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fault(watched)
    (folder,) = (file.parent for file in watched.out.rglob("records.parquet"))
    table = ls.load(folder).table
    alarms = table[table["quantity"] == "alarm"]
    # A rate that is far too large replaces the weights before the loss has increased.
    others = {"LS020"} if fault is doctor.rate_too_large else set()
    assert set(ids_in(caught)) - others == {FAULTS[fault]}
    assert set(alarms["value"]) == {KINDS[id].number for id in ids_in(caught)}
    named = alarms[alarms["value"] == KINDS[FAULTS[fault]].number]
    assert named["step"].min() <= 10


@pytest.mark.filterwarnings("ignore:LS0")
@pytest.mark.parametrize(
    ("fault", "ids"),
    [
        (weights_replaced, ["LS020"]),
        (rate_zero, ["LS019"]),
        (doctor.first_layer_frozen, ["LS007"]),  # which the doctor finds as well
        (doctor.rate_too_large, ["LS015"]),  # replaced weights follow from it
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_doctor_repeats_the_recorded_alarms_once(
    fault: Callable[[Bench], object], ids: list[str], watched: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    fault(watched)
    run = run_of(watched)
    findings = ls.diagnose(run)
    # The doctor has further findings about these runs, such as an unused adapter.
    live = [each.id for each in findings if each.id in {"LS007", "LS015", "LS019", "LS020"}]
    assert live == ids
    alarms = run.table[run.table["quantity"] == "alarm"]
    for alarm in findings:
        if alarm.message.startswith("alarm at step"):
            rows = alarms[alarms["value"] == KINDS[alarm.id].number]
            assert alarm.evidence == {"steps": sorted({*rows["step"]}), "modules": [*filter(None, rows["module"])]}
            assert alarm.fix == KINDS[alarm.id].fix
    capsys.readouterr()  # what the Trainer printed
    assert main(["doctor", str(run.path), "--json"]) == 1
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["findings"]] == [each.id for each in findings]


def test_every_rule_that_alarms_check_has_a_fault():
    assert {rule.id for rule in RULES if rule.live_from is not None} == set(FAULTS.values())


def run_of(bench: Bench) -> ls.Run:
    (folder,) = (file.parent for file in bench.out.rglob("records.parquet"))
    return ls.load(folder)


@pytest.mark.parametrize("name", ls.METHODS)
def test_healthy_run_gives_no_alarm(name, watched):
    watched.by_train(HEALTHY[name], steps=12)  # warnings are errors


def test_healthy_trainings_elsewhere_give_no_alarm(watched, tmp_path):
    watched.trained(watched.peft(), warmup_steps=3, max_steps=12)
    watched.trained(watched.peft(doctor.adalora(total_step=6, tinit=1, tfinal=2)), others=[doctor.Allocating()])
    own_loop(watched, watched.peft(), lambda out: out.loss, lr=1e-3, steps=12)


def test_alarm_is_a_warning_once_and_a_record_at_each_module(watched):
    with pytest.warns(UserWarning, match=r"LS007 frozen: .*; fix: make them trainable") as caught:
        doctor.first_layer_frozen(watched)
    assert ids_in(caught) == ["LS007"]
    table = run_of(watched).table
    rows = table[table["quantity"] == "alarm"]
    assert sorted(rows["module"]) == sorted(
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")
    )
    assert set(rows["layer"]) == {0}
    assert rows["step"].nunique() == 1


@pytest.mark.parametrize("layers", ["layer.0.", "layer."])
@pytest.mark.parametrize("factors", [["lora_B"], ["lora_A", "lora_B"]])
def test_alarm_and_doctor_name_the_frozen_parameters(factors, layers, watched):
    model, names = watched.peft(), set()
    for name, parameter in model.named_parameters():
        if layers in name and any(factor in name for factor in factors):
            parameter.requires_grad_(False)
            names.add(name.partition("self.")[2].partition(".")[2])
    with pytest.warns(UserWarning, match="LS00[47]") as caught:
        run = watched.trained(model)
    (text,) = (str(warning.message) for warning in caught if "LS00" in str(warning.message))
    (finding,) = ls.diagnose(run)
    count = 2 if layers == "layer.0." else 4
    expected = f"{' and '.join(sorted(names))} of {count} modules without requires_grad"
    assert expected in text
    assert expected in finding.message


def zero(out):
    """Return a loss that is 0 and has a gradient, as GRPO's at its first step on each batch."""
    return out.loss - out.loss.detach()


def test_loss_of_0_with_moving_weights_is_not_flat(watched):
    own_loop(watched, watched.peft(), zero, lr=1e-3)  # warnings are errors


@pytest.mark.filterwarnings("ignore:LS0(04|21)")  # the adapters rest as well
def test_loss_of_0_with_resting_weights_is_flat(watched, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    with pytest.warns(UserWarning, match="LS023"):
        own_loop(watched, watched.peft(), zero)


def test_second_training_in_a_process_warns_again(watched):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python shows equal warnings of one place once
        rate_zero(watched)
        rate_zero(watched)
    assert ids_in(caught) == ["LS019", "LS019"]


@pytest.mark.filterwarnings("ignore:LS020")  # the weights are replaced before the loss has increased
def test_stop_leaves_a_readable_broken_run_of_train(watched):
    watched.observe = [ls.observe.alarms(every=1, stop=("LS015", "nan")), ls.observe.norms(every=1)]
    with (
        pytest.warns(UserWarning, match="LS015"),
        pytest.raises(RuntimeError, match=r"alarm at step \d: LS015 diverged.*records"),
    ):
        doctor.rate_too_large(watched)
    run = run_of(watched)
    assert (run.meta.status, run.finished) == ("broken", False)
    assert "LS015 diverged" in run.meta.error
    table = run.table
    assert table[table["quantity"] == "alarm"]["step"].max() == table["step"].max() < 6
    assert [finding.id for finding in ls.diagnose(run)] == ["LS015"]


def test_stop_ends_a_trainer_and_saves_the_state(watched):
    watched.observe = [ls.observe.alarms(every=1, stop=("frozen",))]
    with pytest.warns(UserWarning, match="LS007"):
        run = doctor.first_layer_frozen(watched)
    assert run.table["step"].max() == run.meta.states["last"].step == 2
    assert run.meta.status == "broken"
    assert "LS007 frozen" in run.meta.error
    assert [finding.cause for finding in ls.diagnose(run)] == ["frozen"]


def test_stop_is_shown_to_an_own_loop(watched):
    watched.observe = [ls.observe.alarms(every=1, stop=("loss-flat",))]
    with pytest.warns(UserWarning, match="LS023"):
        constant_loss(watched)
    run = run_of(watched)
    assert run.meta.states["last"].step == 5
    assert "LS023 loss-flat" in run.meta.error


@pytest.mark.filterwarnings("ignore")  # those of Lightning
def test_stop_ends_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch")
    import test_lightning_recorder as lightning

    module = lightning.Module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.0)
    alarms = ls.observe.alarms(every=1, stop=("rate-zero",))
    with pytest.warns(UserWarning, match="LS019"):
        lightning.fit(module, lightning.LightningRecorder(tmp_path / "run", [alarms]), tmp_path)
    run = ls.load(tmp_path / "run")
    assert run.table["step"].max() == 3
    assert run.meta.status == "broken"


def test_unknown_stop_is_rejected_in_one_line():
    with pytest.raises(ValueError, match=r"unknown alarm 'divergd'; did you mean 'diverged'\?"):
        ls.observe.alarms(stop=("divergd",))
    with pytest.raises(ValueError, match="unknown alarm 'LS014'"):
        ls.observe.alarms(stop=("LS014",))  # needs the end of the training
    assert ls.observe.alarms(stop="nan") == ls.observe.alarms(stop=["nan"])


def test_limit_of_the_distance_from_the_base_requires_its_recording_before_the_alarms(watched):
    with pytest.raises(ValueError, match=r"kl must be .* > 0, got 0"):
        ls.observe.alarms(kl=0)
    watched.observe = [ls.observe.alarms(kl=0.5), ls.observe.kl(rows=32, keep="sentiment/tweets")]
    with pytest.raises(ValueError, match=r"alarms\(kl=0.5\) requires ls.observe.kl\(\)"):
        own_loop(watched, watched.peft(), lambda out: out.loss)


def test_runs_with_alarms_keep_their_identity_without_a_limit():
    assert ls.observe.alarms().config() == {"name": "alarms", "every": 10, "stop": ()}


def test_stop_of_several_processes_is_rejected(watched, monkeypatch):
    for name, value in {"is_available": True, "is_initialized": True, "get_world_size": 2}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    watched.observe = [ls.observe.alarms(stop=("nan",))]
    with pytest.raises(ValueError, match="stop must be empty with several processes"):
        own_loop(watched, watched.peft(), lambda out: out.loss)


def planted_alarms(monkeypatch, folder, rules, steps, every):
    """Train three or more steps with planted rules, id -> findings by number of steps, and return the warnings."""
    own = [DoctorRule(id=id) for id in rules]
    for rule, find in zip(own, rules.values(), strict=True):
        rule.find = partial(lambda find, case: iter(find(case.steps)), find)
    monkeypatch.setattr(fault_alarms, "_rules", lambda moving: own)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ls.record(model, optimizer, folder, [ls.observe.alarms(every=every)], steps=steps) as recorder:
            for _ in range(steps):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                recorder.step(loss=1.0)
    return caught


def test_two_faults_of_one_place_at_the_last_step_are_both_named(monkeypatch, tmp_path):
    def find(steps):
        return [finding("a fault")] * (steps == 3)

    caught = planted_alarms(monkeypatch, tmp_path / "run", {"LS006": find, "LS015": find}, steps=3, every=10)
    assert ids_in(caught) == ["LS006", "LS015"]


def test_record_of_a_second_fault_of_a_place_follows_at_the_next_check(monkeypatch, tmp_path):
    def find(steps):
        return [finding("a fault")] * (steps > 0)

    caught = planted_alarms(monkeypatch, tmp_path / "run", {"LS006": find, "LS015": find}, steps=3, every=1)
    assert ids_in(caught) == ["LS006", "LS015"]
    table = ls.load(tmp_path / "run").table
    rows = table[table["quantity"] == "alarm"]
    assert dict(zip(rows["step"], rows["value"], strict=True)) == {1: 6, 2: 15}


def test_fault_of_a_growing_set_of_modules_is_not_repeated(monkeypatch, tmp_path):
    def find(steps):
        return [finding("a fault", ("0", "1")[: 1 + steps % 2])] * (steps > 0)

    caught = planted_alarms(monkeypatch, tmp_path / "run", {"LS016": find}, steps=4, every=1)
    assert len(caught) == 1
    table = ls.load(tmp_path / "run").table
    assert sorted(table.loc[table["quantity"] == "alarm", "module"]) == ["0", "1"]
