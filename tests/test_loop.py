"""Tests of ``train``: order of the loop, accumulation, phases, identity and invalid input."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny
from tolerance import TEXT, TINY, near, rounding
from trainers import without_dropout

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.inputs import models, tasks
from lorascope.methods import LISA, AdaLoRA, Adapprox, ALoRA, Full, LoRA, NeFT
from lorascope.methods.method import Method, Phase
from lorascope.runs.manifest import State
from lorascope.runs.run import Run
from lorascope.training.settings import Settings

unchecked = pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
FAST = {"steps": 6, "batch_size": 8, "progress": False, "device": "cpu"}


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_full_training_equals_a_plain_torch_loop(fresh_bert, task, tmp_path):
    """Oracle: the same updates in plain torch, on the batches that the loop passes to the method."""
    without_dropout(fresh_bert)
    reference = copy.deepcopy(fresh_bert)
    seen = []

    @dataclass(kw_only=True)
    class StoresBatches(Full):
        def before_step(self, step):
            seen.append({key: value.clone() for key, value in step.batch.items()})

    ls.train(
        fresh_bert,
        task,
        StoresBatches(lr=1e-3, head_lr=1e-2),
        out=tmp_path / "run",
        warmup=0,
        schedule="linear",
        **FAST,
    )

    from lorascope.inputs.classifier_head import draw_new_weights

    draw_new_weights(reference, seed=0)
    head = [p for n, p in reference.named_parameters() if n.startswith("classifier")]
    body = [p for n, p in reference.named_parameters() if not n.startswith("classifier")]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-2}], weight_decay=0.0)
    start = [group["lr"] for group in optimizer.param_groups]
    reference.train()
    for index, batch in enumerate(seen):
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * (6 - index) / 6
        optimizer.zero_grad()
        reference(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(fresh_bert.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


def test_batches_visit_every_row_once_per_epoch(fresh_bert, task, tmp_path):
    rows = []

    @dataclass(kw_only=True)
    class StoresRows(Full):
        def before_step(self, step):
            rows.extend(map(tuple, step.batch["input_ids"].tolist()))

    total = len(task.split("train"))
    run = ls.train(fresh_bert, task, StoresRows(), out=tmp_path / "run", **FAST | {"steps": math.ceil(2 * total / 8)})
    strip = [tuple(token for token in row if token) for row in rows]
    first, second = strip[:total], strip[total : 2 * total]
    assert sorted(first) == sorted(second)
    assert first != second
    assert run.table.query("quantity == 'loss'").shape[0] == math.ceil(2 * total / 8)


def test_accumulation_gives_the_same_update(bert, task, tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        model = without_dropout(models.load(bert, task=task))
        ls.train(model, task, LoRA(lr=1e-2), accumulate=accumulate, out=tmp_path / str(accumulate), **FAST)
        results.append(parameters(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=rounding(terms=TINY, growth=40 * TEXT), atol=1e-6)


def test_accumulation_weights_tokens_equally(gpt2, task, tmp_path):
    """With texts of different lengths, the mean over micro-batches is not the mean over tokens."""
    texts = tasks.from_frame(task.table[["text"]], "texts")
    results = []
    for accumulate in (1, 4):
        model = without_dropout(models.load(gpt2))
        run = ls.train(model, texts, Full(lr=1e-3), accumulate=accumulate, out=tmp_path / str(accumulate), **FAST)
        results.append(run.table.query("quantity == 'loss'")["value"].to_numpy())
    assert results[0] == near(results[1], terms=TINY, growth=FAST["steps"] * TEXT)


def test_hooks_are_called_in_the_documented_order(fresh_bert, task, tmp_path):
    calls = []

    @dataclass(kw_only=True)
    class Ordered(Full):
        def before_step(self, step):
            calls.append(("before", step.index, step.finished))

        def after_backward(self, step):
            assert all(p.grad is not None for p in step.optimizer.param_groups[0]["params"][:1])
            calls.append(("backward", step.index, step.finished))

        def after_step(self, step):
            assert step.optimizer.param_groups[0]["params"][0].grad is not None
            calls.append(("after", step.index, step.finished))

        def records(self, step):
            calls.append(("records", step.index, step.finished))
            return ()

    ls.train(fresh_bert, task, Ordered(), out=tmp_path / "run", **FAST | {"steps": 2})
    assert calls == [
        ("records", -1, 0),
        *[(name, i, i + 1) for i in range(2) for name in ("before", "backward", "after", "records")],
    ]


def test_only_parameters_of_the_optimizer_train(fresh_bert, task, tmp_path):
    @dataclass(kw_only=True)
    class HeadOnly(Method):
        def attach(self, model):
            model.requires_grad_(False)
            model.classifier.requires_grad_(True)

    before = parameters(fresh_bert)
    ls.train(fresh_bert, task, HeadOnly(), out=tmp_path / "run", **FAST)
    changed = {name for name, value in parameters(fresh_bert).items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_penalty_in_after_backward_is_not_in_the_loss(bert, task, tmp_path):
    @dataclass(kw_only=True)
    class Penalized(LoRA):
        strength: float = 0.0

        def after_backward(self, step):
            if self.strength:
                (self.strength * sum(p.square().sum() for p in step.optimizer.param_groups[0]["params"])).backward()

    losses = []
    for strength in (0.0, 1e3):
        model = models.load(bert, task=task)
        run = ls.train(model, task, Penalized(strength=strength), out=tmp_path / str(strength), **FAST | {"clip": None})
        losses.append(run.table.query("quantity == 'loss'")["value"].iloc[0])
    assert losses[0] == losses[1]  # the first loss is computed before the penalty changes a weight


def test_method_with_two_phases_trains_both_from_w0_and_finds_them_again(bert, task, tmp_path):
    """The second phase uses the run of the first."""
    starts, answers = [], []

    @dataclass(kw_only=True)
    class Search(Full):
        def attach(self, model):
            super().attach(model)
            starts.append(parameters(model))

    @dataclass(kw_only=True)
    class TwoPhases(Search):
        def phases(self, base):
            found = yield Phase(Search(lr=1e-2), "search", steps=3)
            answers.append(found)
            largest = found.summary().query("role == 'q'").nlargest(1, "update_norm")["module"].tolist()
            yield Phase(LoRA(rank=2, targets=tuple(largest)), "retrain")

    model = models.load(bert, task=task)
    before = parameters(model)
    run = ls.train(model, task, TwoPhases(), out=tmp_path / "run", **FAST)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text(encoding="utf-8"))["phases"] == [
        "1-search",
        "2-retrain",
    ]
    assert [answers[0].meta.settings["steps"], run.meta.settings["steps"]] == [3, 6]
    assert run.parents[0].id == answers[0].id
    assert run.meta.method["name"] == "lora"
    assert run.meta.recipe["name"] == "twophases"
    assert run.meta.total_seconds == pytest.approx(answers[0].meta.seconds + run.meta.seconds)
    assert ls.load(tmp_path / "run").id == run.id
    adapted = set(delta.attached_deltas(model))
    for name, value in parameters(model).items():
        if ".delta." not in name and not name.startswith("classifier"):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert len(adapted) == 1

    # The same call on a fresh model finds both phases on disk and trains nothing.
    again = models.load(bert, task=task)
    answers.clear()
    starts.clear()
    stored = ls.train(again, task, TwoPhases(), out=tmp_path / "run", **FAST)
    assert stored.id == run.id
    assert starts == []
    for name, value in parameters(again).items():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=0, atol=0)


def test_held_out_text_is_the_first_validation_rows_with_their_groups(bert, task, tmp_path):
    seen = []

    @dataclass(kw_only=True)
    class ReadsHeldOut(LoRA):
        def after_step(self, step):
            seen.append(step.held_out(4))

    model = models.load(bert, task=task)
    ls.train(model, task, ReadsHeldOut(), steps=2, batch_size=4, out=tmp_path / "run", progress=False)
    rows = task.split("validation")
    expected = task.encode(models.tokenizer(model), rows).batch(range(4))
    assert len(seen) == 2
    for found in seen:
        assert found.groups == rows["group"].to_list()[:4]
        assert found.batch.keys() == expected.keys()
        assert all(torch.equal(found.batch[key], expected[key]) for key in expected)


def test_step_loss_is_twice_differentiable_without_side_effects(bert, task, tmp_path):
    """Toy second-order method: Hessian-vector product by autograd against a finite difference of gradients."""
    checks = []

    @dataclass(kw_only=True)
    class SecondOrder(LoRA):
        search_share: float = 0.3

        def before_step(self, step):
            step.model.eval()
            name, weight = next((n, p) for n, p in step.model.named_parameters() if n.endswith("delta.B"))
            validation = step.validation(size=4, fixed=True)
            generator = torch.get_rng_state()
            gradients = [p.grad for p in step.model.parameters()]

            def gradient(value):
                value = value.detach().requires_grad_(True)
                return torch.autograd.grad(step.loss(validation, {name: value}), value)[0]

            direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            value = weight.detach().clone().requires_grad_(True)
            first = torch.autograd.grad(step.loss(validation, {name: value}), value, create_graph=True)[0]
            exact = torch.autograd.grad((first * direction).sum(), value)[0]
            small = 1e-2
            numeric = (gradient(weight + small * direction) - gradient(weight - small * direction)) / (2 * small)
            checks.append((exact, numeric))
            assert torch.equal(step.loss(validation), step.loss(validation, {name: weight}))
            assert torch.equal(generator, torch.get_rng_state())
            assert all(a is b for a, b in zip(gradients, [p.grad for p in step.model.parameters()], strict=True))
            step.model.train()

    model = models.load(bert, task=task)
    model.set_attn_implementation("eager")
    ls.train(model, task, SecondOrder(), out=tmp_path / "run", **FAST | {"steps": 2})
    assert len(checks) == 2
    for exact, numeric in checks:
        assert exact.abs().max() > 0
        torch.testing.assert_close(exact, numeric, rtol=2e-2, atol=1e-4 * float(exact.abs().max()) + 1e-6)


def test_step_loss_with_dropout_does_not_change_the_training(bert, task, tmp_path):
    """In training mode the loss draws dropout masks, but training is bitwise equal with and without the call."""

    @dataclass(kw_only=True)
    class CallsLoss(LoRA):
        calls: bool = True

        def before_step(self, step):
            if self.calls:
                assert step.model.training
                step.loss(step.batch)

    losses = []
    for calls in (True, False):
        model = models.load(bert, task=task)
        run = ls.train(model, task, CallsLoss(calls=calls, dropout=0.3), out=tmp_path / str(calls), **FAST)
        losses.append(run.table.query("quantity == 'loss'")["value"].tolist())
    assert losses[0] == losses[1]


def test_step_validation_without_a_search_split_raises(fresh_bert, task, tmp_path):
    @dataclass(kw_only=True)
    class DrawsValidation(LoRA):
        def before_step(self, step):
            step.validation()

    with pytest.raises(ValueError, match=r"search_share of DrawsValidation .*got 0"):
        ls.train(fresh_bert, task, DrawsValidation(), out=tmp_path / "run", **FAST)


def test_step_validation_draws_search_rows_with_its_own_generator(bert, task, tmp_path):
    drawn = []

    @dataclass(kw_only=True)
    class Drawing(LoRA):
        search_share: float = 0.3
        draws: int = 1

        def before_step(self, step):
            drawn.extend(
                tuple(t for t in row if t) for _ in range(self.draws) for row in step.validation()["input_ids"].tolist()
            )

    runs = []
    for draws in (1, 2):
        model = models.load(bert, task=task)
        runs.append(ls.train(model, task, Drawing(draws=draws), out=tmp_path / str(draws), **FAST))
    tokens = models.tokenizer(model)
    encoded = task.fit(model).encode(tokens, task.split("search", 0.3)).tokens["input_ids"]
    assert set(drawn) <= set(map(tuple, encoded))
    losses = [run.table.query("quantity == 'loss'")["value"].tolist() for run in runs]
    assert losses[0] == losses[1]


def test_growing_factors_preserves_optimizer_and_output(bert, task, tmp_path):
    grown = []

    @dataclass(kw_only=True)
    class Growing(LoRA):
        def after_step(self, step):
            if step.index != 2:
                return
            batch = {key: value for key, value in step.batch.items() if key != "labels"}
            step.model.eval()
            before = step.model(**batch).logits.detach()
            for d in delta.attached_deltas(step.model).values():
                rank = d.A.shape[0]
                delta.resize(d.A, step.optimizer, list(range(rank)), torch.randn(1, d.A.shape[1]), 0)
                delta.resize(d.B, step.optimizer, list(range(rank)), torch.zeros(d.B.shape[0], 1), 1)
            grown.append((before, step.model(**batch).logits.detach()))
            step.model.train()

    model = models.load(bert, task=task)
    run = ls.train(model, task, Growing(rank=2), out=tmp_path / "run", eval_every=0, **FAST)
    before, after = grown[0]
    assert after.numpy() == near(before, terms=TINY, growth=TEXT)
    assert set(run.ranks().values()) == {3}
    other = models.load(bert, task=task)
    run.restore(other, method=Growing(rank=2))
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("method", [Full(), LoRA(targets="all-linear")])
def test_restore_on_conv1d_gives_equal_logits(method, gpt2, task, tmp_path):
    model = models.load(gpt2, task=task)
    run = ls.train(model, task, method, out=tmp_path / "run", **FAST)
    other = models.load(gpt2, task=task)
    ls.load(tmp_path / "run").restore(other)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    with pytest.raises(ValueError, match=r"state must be .*'last', 'best', got 'first'"):
        run.restore(models.load(gpt2, task=task), state="first")


def test_run_id_depends_on_method_settings_and_seed(bert, task, tmp_path):
    def run(name, seed=0, method=None, **settings):
        return ls.train(
            models.load(bert, task=task), task, method or LoRA(), seed=seed, out=tmp_path / name, **FAST | settings
        )

    first = run("a")
    assert run("b").id == first.id
    same = run("c").table.query("quantity != 'seconds'").reset_index(drop=True)
    assert same.equals(first.table.query("quantity != 'seconds'").reset_index(drop=True))
    others = [run("d", seed=1), run("e", lr=1e-2), run("f", method=LoRA(rank=4)), run("g", steps=5)]
    assert len({first.id, *(other.id for other in others)}) == 5
    assert run("h", lr=LoRA().lr).id == first.id
    assert run("i", method=LoRA(alpha=8)).id == first.id


@unchecked
def test_numbers_of_numpy_are_the_same_settings(bert, task, tmp_path):
    runs = [
        ls.train(
            models.load(bert, task=task),
            task,
            LoRA(rank=integer(3), alpha=real(4)),
            observe=[ls.observe.norms(every=integer(5))],
            seed=integer(1),
            out=tmp_path / name,
            **FAST | {"steps": integer(6), "lr": real(0.5)},
        )
        for name, integer, real in (("python", int, float), ("numpy", np.int64, np.float32))
    ]
    assert runs[0].id == runs[1].id
    assert ls.load(runs[1].path).meta.settings == runs[0].meta.settings


def test_new_weights_depend_only_on_the_seed(bert, task):
    torch.manual_seed(1)
    one = models.load(bert, task=task)
    torch.manual_seed(2)
    two = models.load(bert, task=task)
    from lorascope.inputs.classifier_head import draw_new_weights, weights_hash

    draw_new_weights(one, 3)
    draw_new_weights(two, 3)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert weights_hash(one) == weights_hash(two)
    draw_new_weights(two, 4)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert weights_hash(one) == weights_hash(two)
    with torch.no_grad():
        two.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    assert weights_hash(one) != weights_hash(two)


def test_training_does_not_change_the_callers_generator(fresh_bert, task, tmp_path):
    before = torch.get_rng_state()
    ls.train(fresh_bert, task, LoRA(dropout=0.1), out=tmp_path / "run", **FAST)
    assert torch.equal(before, torch.get_rng_state())


def test_same_call_on_a_trained_model_returns_the_run_and_another_raises(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, LoRA(), out=tmp_path / "run", **FAST)
    trained = parameters(fresh_bert)
    again = ls.train(fresh_bert, task, LoRA(), out=tmp_path / "run", **FAST)
    assert again.id == run.id
    assert all(torch.equal(value, trained[name]) for name, value in parameters(fresh_bert).items())
    with pytest.raises(ValueError, match=f"recipe {run.id}"):
        ls.train(fresh_bert, task, LoRA(rank=2), out=tmp_path / "other", **FAST)


def test_model_with_adapters_is_rejected(fresh_bert, task, tmp_path):
    LoRA().attach(fresh_bert)
    with pytest.raises(ValueError, match=r"adapters \(bert\.encoder.*\)"):
        ls.train(fresh_bert, task, LoRA(), out=tmp_path / "run", **FAST)


def test_folder_of_another_run_is_rejected_and_unchanged(bert, task, tmp_path):
    out = tmp_path / "run"
    first = ls.train(models.load(bert, task=task), task, LoRA(), out=out, **FAST)
    with pytest.raises(ValueError, match=f"recipe {first.id}.*overwrite=True"):
        ls.train(models.load(bert, task=task), task, LoRA(rank=2), out=out, **FAST)
    assert ls.load(out).id == first.id
    second = ls.train(models.load(bert, task=task), task, LoRA(rank=2), out=out, overwrite=True, **FAST)
    assert ls.load(out).id == second.id != first.id
    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine.*no run"):
        ls.train(models.load(bert, task=task), task, LoRA(), out=stranger, overwrite=True, **FAST)
    assert (stranger / "thesis.tex").exists()


def test_nan_loss_stops_training_and_leaves_a_readable_broken_run(fresh_bert, task, tmp_path):
    @dataclass(kw_only=True)
    class Exploding(Full):
        def after_step(self, step):
            if step.index == 3:
                step.optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    with pytest.raises(
        FloatingPointError, match=r"step 5 of 6 .*, the weights before it were not finite: lower"
    ) as caught:
        ls.train(fresh_bert, task, Exploding(), out=tmp_path / "run", eval_every=0, **FAST)
    assert "\n" not in str(caught.value)
    run = ls.load(tmp_path / "run")
    assert run.meta.status == "broken"
    assert "step 5" in run.meta.error
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4]
    assert "broken" in repr(run)


def test_loss_of_nan_from_a_batch_is_separated_from_weights_of_nan(fresh_bert, task, tmp_path):
    calls = []

    def spoil(model, inputs, output):
        calls.append(1)
        if model.training and len(calls) == 5:
            output.loss = output.loss * float("nan")
        return output

    fresh_bert.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"nan at step 5 of 6 .*, the weights before it were finite: check"):
        ls.train(fresh_bert, task, Full(), out=tmp_path / "run", eval_every=0, **FAST)
    (finding,) = ls.diagnose(ls.load(tmp_path / "run"))
    assert "loss became nan at step 5 of 6" in finding.message
    assert "the weights before it were finite" in finding.message


@pytest.mark.parametrize("every", [0, -1, pytest.param(2.5, marks=unchecked)])
def test_observer_with_an_invalid_number_of_steps_is_rejected(every):
    for observer in (ls.observe.norms, ls.observe.factors, ls.observe.gradients, ls.observe.alarms):
        with pytest.raises(ValueError, match=f"every must be an integer >= 1, got {every}"):
            observer(every=every)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps .*got 0"),
        ({"lr": -1.0}, r"lr .*got -1\.0"),
        ({"accumulate": 3}, "accumulate .*batch_size=8, got 3"),
        ({"schedule": "step"}, "schedule .*'linear', 'cosine', 'constant', got 'step'"),
        ({"precision": "fp16"}, "precision .*got 'fp16'"),
        ({"clip": 0}, "clip .*got 0"),
        ({"warmup": math.inf}, "warmup must be >= 0 and finite, got inf"),
        ({"eval_size": True}, "eval_size must be an integer >= 1, got True"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer >= 1, got 0"),
        ({"lr": 1e99}, r"lr must be > 0 and finite in float32, got 1e\+99"),
        ({"warmup": 2.5}, r"warmup must be a fraction below 1 or an integer number of steps, got 2\.5"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
        ({"max_length": 10**20}, f"max_length must be at most {2**63 - 1}, got {10**20}"),
        ({"device": "meta"}, "device must be one that torch can use, such as 'cpu', got 'meta': .*meta"),
        ({"device": "hpu"}, "device must be one that torch can use, such as 'cpu', got 'hpu'"),
        ({"device": "gpu"}, "device must be one that torch can use, such as 'cpu', got 'gpu': .*cuda"),
        pytest.param({"seed": 0.5}, r"seed must be an integer from 0 to 4294967295, got 0\.5", marks=unchecked),
        pytest.param({"batch_size": None}, "batch_size must be an integer >= 1, got None", marks=unchecked),
        pytest.param({"steps": 2.0}, r"steps must be an integer >= 1, got 2\.0", marks=unchecked),
        pytest.param({"observe": ls.observe.norms()}, "observe must be a list of observers", marks=unchecked),
        pytest.param({"observe": [ls.observe.norms]}, "observe must be a list of observers", marks=unchecked),
    ],
)
def test_invalid_setting_raises_and_writes_nothing(settings, message, fresh_bert, task, tmp_path):
    with pytest.raises(ValueError, match=message):
        ls.train(fresh_bert, task, LoRA(), out=tmp_path / "run", **FAST | settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [2**40, 2**62])
def test_method_too_large_for_memory_raises_with_its_settings(rank, fresh_bert, task, tmp_path):
    with pytest.raises(ValueError, match=f"cannot attach LoRA, rank {rank}: not enough memory"):
        ls.train(fresh_bert, task, LoRA(rank=rank), out=tmp_path / "run", **FAST)
    assert not (tmp_path / "run" / "run.json").exists()


def test_text_longer_than_the_positions_raises_with_their_number(bert, tmp_path):
    rows = [{"text": "film " * 60, "label": ("bad", "good")[number % 2]} for number in range(80)]
    for number, row in enumerate(rows):
        row["text"] += f"plot {number}"
    task = ls.tasks.from_frame(pd.DataFrame(rows))
    positions = ls.models.load(bert, task=task).config.max_position_embeddings
    message = f"max_length must be at most {positions}, the positions of the model, got 50: a text has 50 tokens"
    with pytest.raises(ValueError, match=message):
        ls.train(bert, task, LoRA(), out=tmp_path / "run", max_length=50, **FAST)
    assert ls.train(bert, task, LoRA(), out=tmp_path / "run", max_length=positions, **FAST).meta.status == "done"


def test_model_without_a_head_raises_with_the_class_to_load(bert, task, tmp_path):
    from transformers import AutoModel

    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        ls.train(AutoModel.from_pretrained(bert), task, LoRA(), out=tmp_path / "run", **FAST)


def test_head_with_other_labels_is_replaced_and_restored(bert, task, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    run = ls.train(model, task, LoRA(), out=tmp_path / "run", **FAST)
    assert model.classifier.out_features == model.config.num_labels == 2
    other = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    run.restore(other)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_bf16_autocast_trains_and_weights_stay_float32(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, LoRA(), precision="bf16", out=tmp_path / "run", **FAST)
    assert {p.dtype for p in fresh_bert.parameters()} == {torch.float32}
    assert run.table.query("quantity == 'loss'")["value"].notna().all()


def test_schedules_have_the_expected_rates():
    from lorascope.training.settings import Settings

    base = Settings(steps=10, lr=1.0, head_lr=1.0, warmup=2)
    rates = {name: replace(base, schedule=name).rate() for name in ("linear", "cosine", "constant")}
    assert [rates["linear"](t) for t in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert [rates["cosine"](t) for t in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert [rates["constant"](t) for t in (0, 5, 9)] == pytest.approx([1 / 3, 1.0, 1.0])
    assert replace(base, warmup=0.25).warmup_steps == 3


def test_schedule_from_zero_equals_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    from lorascope.training.settings import Settings

    rate = Settings(steps=10, lr=1.0, head_lr=1.0, warmup=2, warmup_start="zero").rate()
    parameter = torch.nn.Parameter(torch.zeros(1))
    expected = get_linear_schedule_with_warmup(torch.optim.SGD([parameter], 1.0), 2, 10).lr_lambdas[0]
    assert [rate(step) for step in range(11)] == [expected(step) for step in range(11)]


def test_best_state_is_the_one_with_the_best_validation(fresh_bert, task, tmp_path):
    run = ls.train(
        fresh_bert,
        task,
        LoRA(lr=3e-2, targets="all-linear"),
        eval_every=2,
        out=tmp_path / "run",
        **FAST | {"steps": 12},
    )
    table = run.table.query("quantity in ('eval_metric', 'eval_loss')").pivot(
        index="step", columns="quantity", values="value"
    )
    best = table.drop(0).sort_values(["eval_metric", "eval_loss"], ascending=[False, True]).index[0]
    assert run.meta.states["best"].step == best
    assert run.meta.states["last"].step == 12


def test_best_at_the_last_step_is_stored_once(fresh_bert, bert, task, tmp_path):
    run = ls.train(fresh_bert, task, Full(), out=tmp_path / "run", **FAST | {"eval_every": 0})
    assert [file.name for file in (run.path / "state").iterdir()] == ["last.safetensors"]
    assert run.meta.states["best"] == run.meta.states["last"] == State(FAST["steps"], {})
    best = models.load(bert, task=task)
    run.restore(best, state="best")
    assert all(torch.equal(tensor, best.state_dict()[name]) for name, tensor in fresh_bert.state_dict().items())


def test_repr_of_a_run_shows_its_main_facts(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, LoRA(rank=2), out=tmp_path / "run", **FAST)
    text = repr(run)
    for part in (run.id, "LoRA, rank 2", "toy", "accuracy", "largest", str(tmp_path / "run")):
        assert part in text
    assert "<table>" in run._repr_html_()
    assert isinstance(run, Run)


@pytest.mark.parametrize("method", [
    Full(), Full(optimizer_name="adafactor"), LISA(n_active=1), Adapprox(),
    NeFT(num_neurons=3, select_by="random", targets=("ffn_in",)),
    LoRA(targets="all-linear"), LoRA(targets=r".*relative_attention_bias"), AdaLoRA(), ALoRA(fresh_moments=True),
], ids=lambda method: method.label())  # fmt: skip
def test_position_biases_are_not_decayed(method):
    """The position bias of T5 is an embedding matrix; all other matrices are decayed."""
    model = tiny("t5")
    method.attach(model)
    optimizer = method.optimizer(model, 1e-3, 1e-3, 0.1)
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}
    matrices = {name for name, p in model.named_parameters() if name in decays and p.ndim > 1}
    biases = {name for name in matrices if "relative_attention_bias" in name}
    assert len(biases) == (2 if isinstance(method, Full | LISA | Adapprox) else 4 if "bias" in str(method) else 0)
    assert {name for name, decay in decays.items() if decay == 0.1} == matrices - biases


def test_model_can_be_trained_after_a_call_that_was_rejected(fresh_bert, task, tmp_path):
    with pytest.raises(ValueError, match="querry"):
        ls.train(fresh_bert, task, LoRA(targets="querry"), out=tmp_path / "run", **FAST)
    assert ls.train(fresh_bert, task, LoRA(targets="q"), out=tmp_path / "run", **FAST).finished


@unchecked
def test_arguments_of_another_type_are_named(fresh_bert, task, tmp_path):
    cases = [
        ((fresh_bert, task, LoRA), r"^method must be a name or an object such as ls\.LoRA\(\), got <class"),
        ((fresh_bert, task.table, LoRA()), r"^data must be a name, a file or a Task, such as .*from_frame.*DataFrame"),
        ((3, task, LoRA()), r"^model must be a PyTorch model, a name or a folder, got 3$"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ls.train(*arguments, out=tmp_path / "run", **FAST)
    assert not (tmp_path / "run").exists()


@unchecked
@pytest.mark.parametrize("name", ["lr", "head_lr", "warmup", "weight_decay", "clip"])
def test_settings_that_are_no_numbers_are_named(name):
    with pytest.raises(ValueError, match=f"^{name} must be a number, got '1e-4'$"):
        Settings(**{"steps": 1, "lr": 1e-3, "head_lr": 1e-3, name: "1e-4"})


@pytest.mark.parametrize("value", [0, -1, pytest.param(2.5, marks=unchecked)])
def test_observers_reject_batches_and_rows_below_one(value):
    for make, name in (
        (observe.neurons, "batches"), (observe.neurons, "rows"), (observe.coefficients, "batches"),
        (observe.coefficients, "rows"), (observe.utilization, "size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be an integer >= 1, got {value}$"):
            make(**{name: value})
