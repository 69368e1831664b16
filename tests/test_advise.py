"""Advice against the instruments that it joins, on worked dials and prices and on tiny trained models."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
from test_export import trained
from test_price import METHODS, task  # noqa: F401  # a fixture
from test_rank_prices import estimate, made_price
from test_reader import sentences

import lorascope as ls
from lorascope.analysis import advice, advice_rules
from lorascope.analysis.advice import CONFIRM, MEASURED, Action, Subject
from lorascope.analysis.dial import KEEP, TASK, WHOLE, MeasuredRows, RowValues, dial_of_rows
from lorascope.analysis.forgetting_course import forgetting_course
from lorascope.analysis.rank_prices import RUNS, CutPrice, tabulate_prices
from lorascope.cli.main import main
from lorascope.inputs import models
from lorascope.inputs.tasks import Task, from_frame
from lorascope.inputs.text_rows import encode_rows
from lorascope.insight.advise import Adviser, Plan, _Costs
from lorascope.insight.instrument_costs import MeasurementCost
from lorascope.insight.repeated_advice import repeat
from lorascope.methods import Full, HydraLoRA, LoRA
from lorascope.papers.setups import planted_teacher
from lorascope.runs.lora_config import next_lora_keywords
from lorascope.runs.receipt import Receipt

SUBJECT = Subject("runs/lora", "minilm", "reviews")
ROWS = 200
NOISE = np.where(np.arange(ROWS) % 2, 1.0, -1.0)


def made_dial(loss_at_half: float, spread: float) -> Any:
    """Return a dial whose whole update learns 1 nat and forgets 2, and keeps half of that at half the scale."""
    rows = {
        TASK: MeasuredRows("nats", np.ones(ROWS), np.arange(ROWS)),
        KEEP: MeasuredRows("nats", np.ones(ROWS), np.arange(ROWS)),
    }
    measured = []
    for scale, loss, distance in ((0.0, 2.0, 0.0), (0.5, 1.0 + loss_at_half, 1.0), (1.0, 1.0, 2.0)):
        noise = spread * NOISE if scale == 0.5 else 0
        measured.append(RowValues(WHOLE, scale, TASK, np.full(ROWS, loss) + noise))
        measured.append(RowValues(WHOLE, scale, KEEP, np.full(ROWS, distance)))
    part = {"part": WHOLE, "module": None, "layer": None, "role": None, "component": None, "energy": 1.0}
    shares = dict.fromkeys(["learn_share", "forget_share", "learn_slope", "forget_slope"], np.nan)
    parts = pd.DataFrame([part | {"control": False} | shares])
    receipt = Receipt(run="abc", base="minilm", rows={"task": f"{ROWS} rows 5f2a1c"}, call={"by": "whole"})
    return dial_of_rows("runs/lora", measured, rows, parts, None, receipt)


def test_a_scale_within_the_margin_is_an_action_and_one_that_touches_it_says_confirm() -> None:
    (action,) = advice_rules.actions_of_dial(made_dial(0.01, 0.1), SUBJECT)
    assert action.verdict == MEASURED
    assert action.estimate == pytest.approx(0.01)
    assert action.command == "lorascope export runs/lora --scales whole=0.5 --peft scaled"
    assert "KL -50%" in action.change
    assert action.weight == pytest.approx(5)  # half of the whole, in tenths
    (action,) = advice_rules.actions_of_dial(made_dial(0.01, 1.0), SUBJECT)
    assert action.verdict == CONFIRM
    # The margin is a tenth of the learning, 0.1, and the interval reaches 1.97 standard errors from the mean.
    half = action.high - 0.01
    rows = math.ceil(ROWS * (half / 0.09) ** 2)
    assert action.command == f"lorascope dial runs/lora --model minilm --task reviews --by whole --rows {rows}"


def test_more_rows_than_the_split_has_are_a_question_without_a_command() -> None:
    spread = made_dial(0.01, 1.0)
    (action,) = advice_rules.actions_of_dial(spread, SUBJECT)
    rows = int(action.command.split()[-1])
    assert list(advice_rules.actions_of_dial(spread, SUBJECT._replace(rows=rows))) == [action]
    few = SUBJECT._replace(rows=rows - 1)
    assert not list(advice_rules.actions_of_dial(spread, few))
    (question,) = advice_rules.questions_of_dial(spread, few)
    assert (question.rows_needed, question.command) == (rows, "")
    assert f"the validation split has {rows - 1} rows" in question.question
    open_price = made_price(verdict="undecided", rows_needed=500.0)
    for available, command in ((499, ""), (500, "lorascope price runs/lora --model minilm --task reviews --rows 500")):
        question = next(advice_rules.questions_of_price(open_price, SUBJECT._replace(rows=available)))
        assert question.command == command


def test_a_scale_that_needs_far_more_rows_is_a_question_and_a_costly_one_is_neither() -> None:
    hard = made_dial(0.09, 1.0)
    assert not list(advice_rules.actions_of_dial(hard, SUBJECT))
    (question,) = advice_rules.questions_of_dial(hard, SUBJECT)
    assert question.rows_needed > 20 * ROWS
    costly = made_dial(0.5, 0.1)
    assert not list(advice_rules.actions_of_dial(costly, SUBJECT))
    assert not list(advice_rules.questions_of_dial(costly, SUBJECT))


def test_an_update_that_is_not_shown_to_learn_is_a_question_with_the_rows_that_decide() -> None:
    # Loss without the update minus loss with it: mean 0.1, standard error 1 / sqrt(199), so the interval contains 0.
    rows = {
        TASK: MeasuredRows("nats", np.ones(ROWS), np.arange(ROWS)),
        KEEP: MeasuredRows("nats", np.ones(ROWS), np.arange(ROWS)),
    }
    measured = []
    for scale, loss, noise, distance in ((0.0, 1.1, NOISE, 0.0), (1.0, 1.0, 0, 1.0)):
        measured.append(RowValues(WHOLE, scale, TASK, np.full(ROWS, loss) + noise))
        measured.append(RowValues(WHOLE, scale, KEEP, np.full(ROWS, distance)))
    shown = made_dial(0.0, 0.0)
    columns = [*shown.parts.columns.intersection(["part", "module", "layer", "role", "component", "energy", "control"])]
    shares = dict.fromkeys(["learn_share", "forget_share", "learn_slope", "forget_slope"], np.nan)
    dial = dial_of_rows("runs/lora", measured, rows, shown.parts[columns].assign(**shares), None, shown.receipt)
    assert advice_rules.is_learning_shown(shown)
    assert not advice_rules.is_learning_shown(dial)
    question = next(advice_rules.questions_of_dial(dial, SUBJECT))
    assert question.question.startswith("cannot tell whether the update learns: +0.100 nats [")
    whole = dial.parts.iloc[0]
    assert question.rows_needed == math.ceil(ROWS * ((whole["learn"] - whole["learn_low"]) / whole["learn"]) ** 2)
    assert f"--rows {question.rows_needed}" in question.command
    # At that many rows with this spread, the interval would end at 0.
    assert (whole["learn"] - whole["learn_low"]) * math.sqrt(ROWS / question.rows_needed) <= whole["learn"]


def test_no_rank_follows_from_an_update_that_does_not_learn() -> None:
    run = ls.example("adapter")
    base, other = planted_teacher.base(), planted_teacher.task(1)
    # The adapter was trained on another teacher's text, so it raises the loss here.
    told = ls.advise(run, base, other, planted_teacher.task(0), budget=1000, progress=False)
    assert "half the rank" not in {fact.name for fact in told.facts}
    assert [item.name for item in told.skipped if "not shown to learn" in item.reason] == ["price"]
    assert not [action for action in told.actions if "rank" in action.change or "cut" in action.change]


def test_rows_with_the_tokenizer_of_another_model_are_one_line(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    model = models.load(bert, task=task)
    vocabulary = models.tokenizer(model).get_vocab()
    word = max(vocabulary, key=vocabulary.__getitem__)
    size = vocabulary[word]
    model.resize_token_embeddings(size)
    rows = pd.DataFrame({"text": [f"{word} {number}" for number in range(600)], "label": ["a", "b"] * 300})
    other = from_frame(rows, "other")
    with pytest.raises(ValueError, match=f"it has a token {size}, but the model has embeddings of {size} tokens"):
        encode_rows(model, other, "validation", 40, 16)


def test_actions_are_ordered_by_effect_over_margin_and_three_remain() -> None:
    weights = (1.0, 5.0, 0.5, math.inf)
    actions = [Action(MEASURED, str(weight), 0.0, 0.0, 0.0, "nats", "", weight) for weight in weights]
    assert [action.weight for action in advice.order_actions(actions)] == [math.inf, 5.0, 1.0]


def test_the_smallest_budget_without_loss_is_cut() -> None:
    cuts = [CutPrice(None, 4, 400, estimate(0.02)), CutPrice(None, 6, 600, estimate(0.001)),
            CutPrice(None, 7, 700, estimate(0.0)), CutPrice(2, 4, 400, estimate(0.02), estimate(0.0))]  # fmt: skip
    price = made_price(table=tabulate_prices(cuts, pd.DataFrame(columns=RUNS)))
    (action,) = advice_rules.actions_of_price(price, SUBJECT)
    assert action.command == "lorascope export runs/lora --budget 6 --peft cut"
    assert (action.estimate, action.verdict) == (0.001, MEASURED)
    facts = {fact.name: fact.text for fact in advice_rules.facts_of_price(price)}
    assert facts["placement"].startswith("not shown to differ from a uniform rank")
    assert facts["half the rank"].startswith("rank 2 of 4 costs: cut +0.020 nats")


@pytest.mark.parametrize(
    ("difference", "words"),
    [(-0.1, "better than"), (0.1, "worse than"), (0.0, "not shown to differ from")],
)
def test_placement_is_compared_with_its_uniform_control(difference: float, words: str) -> None:
    runs = []
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        runs += [(2, 0, 0.1, seed, 1.0, 0.0), (2, 1, 0.1, seed, 1.0 + difference + noise, 0.0)]
    table = pd.DataFrame(runs, columns=RUNS)
    cuts = [CutPrice(2, 8, 800, estimate(0.02))]
    facts = list(advice_rules.facts_of_price(made_price(table=tabulate_prices(cuts, table), runs=table)))
    (fact,) = [fact for fact in facts if fact.name == "placement"]
    assert f"{words} a uniform rank" in fact.text
    assert fact.value == pytest.approx(difference)


def test_a_smaller_scale_and_an_unfinished_training_contradict_each_other() -> None:
    actions = list(advice_rules.actions_of_dial(made_dial(0.01, 0.1), SUBJECT))
    (question,) = advice_rules.find_contradictions(actions, made_price(verdict="not finished"))
    assert question.question.startswith("contradiction")
    assert not list(advice_rules.find_contradictions(actions, made_price(verdict="wasteful")))


@pytest.fixture(scope="module")
def keep(task: Task) -> Task:  # noqa: F811
    rows = [f"the {word} goes {count} times around" for word in ("dog", "cat", "fox") for count in range(60)]
    labels = [("negative", "positive")[row % 2] for row in range(len(rows))]
    splits = [("train", "validation", "test")[row % 3] for row in range(len(rows))]
    return ls.tasks.from_frame(pd.DataFrame({"text": rows, "label": labels, "split": splits}), "other text")


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the few steps of a tiny model as learning, so that the rank is priced."""
    monkeypatch.setattr(advice_rules, "is_learning_shown", lambda dial: True)


@pytest.mark.usefixtures("learned")
def test_numbers_equal_those_of_dial_and_price(bert: str, task: Task, keep: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=12)[1]
    told = ls.advise(run, bert, task, keep, budget=1000, progress=False)
    dialed = ls.dial(run, bert, task, keep, by="module", progress=False)
    priced = ls.price(run, bert, task, (1, 2), progress=False)
    facts = {fact.name: fact for fact in told.facts}
    assert facts["learn"].value == dialed.summary().loc[0, "learn"]
    assert facts[{"nats": "KL"}.get(dialed.unit, "drift")].value == dialed.summary().loc[0, "forget"]
    half = priced.table.set_index("rank").loc[2]
    assert facts["half the rank"][3:6] == (half["cut"], half["cut_low"], half["cut_high"])
    assert facts["placement"].value == half["placed"]
    assert len(told.actions) <= 3
    assert told.config == {}  # nothing was retrained
    assert told.receipt.call["plan"]["by"] == "module"
    document = json.loads(json.dumps(told.to_json()))
    with pytest.raises(ValueError, match="the receipt is of run other"):
        repeat(document | {"receipt": document["receipt"] | {"run": "other"}}, run)


def test_the_task_of_an_advice_is_loaded_once(
    bert: str, task: Task, keep: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    words = write_texts(tmp_path, task=task)
    run = trained(bert, ls.tasks.load(words[1]), METHODS["lora"], tmp_path / "run", steps=2)[1]
    names, load = [], ls.tasks.load

    def load_and_note(name: Any, *arguments: Any, **options: Any) -> Task:
        names.append(str(name))
        return load(name, *arguments, **options)

    monkeypatch.setattr("lorascope.inputs.tasks.load", load_and_note)
    ls.advise(run, bert, words[1], keep, budget=1000, progress=False)
    assert names.count(words[1]) == 1


def write_texts(folder: Path, **texts: Task) -> list[str]:
    """Write texts as CSV files, and return the options of ``lorascope advise`` that name them."""
    words = []
    for name, text in texts.items():
        file = folder / f"{name}.csv"
        text.table.drop(columns=["draw", "cluster"], errors="ignore").to_csv(file, index=False)
        words += [f"--{name}", str(file)]
    return words


def test_an_advice_is_repeated_to_the_digit_and_a_changed_one_is_noticed(
    bert: str, task: Task, keep: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=12)[1]
    receipt, page = tmp_path / "advice.json", tmp_path / "card.html"
    words = [str(run.path), "--model", bert, *write_texts(tmp_path, task=task, keep=keep)]
    assert main(["advise", *words, "-o", str(receipt), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "where did the rank go" in printed
    assert "What to change" in page.read_text(encoding="utf-8")
    assert ls.load(str(run.path)).id == run.id  # no file of the run changed
    assert main(["advise", "--verify", str(receipt)]) == 0
    assert capsys.readouterr().out.endswith("no differences\n")
    document = json.loads(receipt.read_text(encoding="utf-8"))
    (learn,) = [fact for fact in document["facts"] if fact["name"] == "learn"]
    learn["value"] += 1e-5
    receipt.write_text(json.dumps(document), encoding="utf-8")
    assert main(["advise", "--verify", str(receipt)]) == 1
    assert "learn: value kept" in capsys.readouterr().out


def test_an_advice_on_a_series_is_verified_on_its_last_checkpoint(
    bert: str, task: Task, keep: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    series, receipt = tmp_path / "series", tmp_path / "advice.json"
    for steps in (6, 12):
        run = trained(bert, task, METHODS["lora"], tmp_path / str(steps), steps=steps)[1]
        ls.export.to_peft(run, series / f"checkpoint-{steps}")
    words = ["--model", bert, *write_texts(tmp_path, task=task, keep=keep)]
    assert main(["advise", str(series), *words, "-o", str(receipt)]) == 0
    document = json.loads(receipt.read_text(encoding="utf-8"))
    last = series / "checkpoint-12"
    assert document["receipt"]["run"] == ls.load(last).id
    (learn,) = [fact["value"] for fact in document["facts"] if fact["name"] == "learn"]
    measured = ls.dial(ls.load(last), bert, task, keep, by=document["receipt"]["call"]["plan"]["by"], progress=False)
    assert learn == measured.summary().loc[0, "learn"]
    capsys.readouterr()
    # The receipt names the series, and its last checkpoint is the same adapter.
    for subject in ([], [str(last)]):
        assert main(["advise", *subject, "--verify", str(receipt)]) == 0
        assert capsys.readouterr().out.endswith("no differences\n")
    assert main(["advise", str(series / "checkpoint-6"), "--verify", str(receipt)]) == 2
    assert f"the receipt is of run {ls.load(last).id}, got" in capsys.readouterr().err


@pytest.mark.usefixtures("learned")
def test_retraining_gives_a_configuration_only_if_it_is_as_good(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=12)[1]
    told = ls.advise(run, bert, task, budget=1000, retrain=3, progress=False)
    priced = ls.price(run, bert, task, (2,), retrain=3, placed=True, progress=False)
    placement = priced.placement(2)
    assert placement is not None
    (fact,) = [fact for fact in told.facts if fact.name == "placement" and "retrained" in fact.text]
    assert fact.value == placement.mean
    if priced.verdict == "enough":
        assert told.config["lr"] in set(priced.runs["lr"])
        assert told.config["r"] in (1, 2, 3, 4)
    else:
        assert told.config == {}


@pytest.mark.usefixtures("learned")
@pytest.mark.slow
def test_what_is_printed_can_be_pasted(
    bert: str,
    task: Task,  # noqa: F811
    keep: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write_texts(tmp_path, task=task, keep=keep)
    run = trained(bert, ls.tasks.load(words[1]), METHODS["lora"], tmp_path / "run", steps=12)[1]
    assert main(["advise", str(run.path), "--model", bert, *words, "--budget", "1000"]) == 0
    lines = list(map(str.strip, capsys.readouterr().out.splitlines()))
    commands = dict.fromkeys(line for line in lines if line.startswith("lorascope "))
    assert any("--retrain 3" in command for command in commands)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


@pytest.mark.usefixtures("learned")
@pytest.mark.slow
@pytest.mark.parametrize("state", ["last", "best"])
def test_every_number_is_measured_again_by_its_command(
    state: str,
    bert: str,
    keep: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    words = write_texts(tmp_path, task=ls.tasks.from_frame(sentences(), "reviews"), keep=keep)
    gauge = ls.observe.kl(every=2, rows=40, keep=keep)
    run = trained(
        bert, ls.tasks.load(words[1]), LoRA(rank=3, targets=("q", "ffn_out"), lr=0.1, head_lr=0.1), tmp_path / "run",
        steps=12, seed=2, eval_every=2, observe=[gauge],
    )[1]  # fmt: skip
    options = ["--budget", "1000", "--read", "--rows", "48", "--keep-rows", "40", "--state", state]
    arguments = [str(run.path), "--model", bert, *words, *options]
    assert main(["advise", *arguments, "-o", str(tmp_path / "advice.json")]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    document = json.loads((tmp_path / "advice.json").read_text(encoding="utf-8"))
    assert document["receipt"]["seed"] == 2
    assert "seed 2, " in printed[-1]
    facts = {fact["name"]: fact for fact in document["facts"]}
    assert {"energy", "learn", "half the rank", "words", "step to keep"} <= set(facts)
    documents: dict[str, Any] = {}
    for fact in document["facts"]:
        assert fact["command"] in printed
        if fact["command"] not in documents:
            command = shlex.split(fact["command"])[1:]
            # The table of a figure is a file.
            code = main(command if command[0] == "plot" else [*command, "--json"])
            assert code == (1 if command[0] == "doctor" else 0), fact
            documents[fact["command"]] = capsys.readouterr().out
    for fact in document["facts"]:
        numbers = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", documents[fact["command"]])
        if fact["name"] == "step to keep":
            numbers = [f"{step:g}" for step in pd.read_csv(tmp_path / "kl.csv").select_dtypes("number").to_numpy().flat]
        if fact["value"] is not None and fact["name"] not in ("energy", "unused"):
            assert any(abs(float(number)) == pytest.approx(abs(fact["value"]), abs=1e-6) for number in numbers), fact
    modules = json.loads(documents[facts["energy"]["command"]])["modules"]
    assert sum(module["energy_rank"] for module in modules if module["energy_rank"]) == facts["energy"]["value"]
    priced = json.loads(documents[facts["unused"]["command"]])
    assert sum(module["unused"] for module in priced["modules"]) == facts["unused"]["value"]
    # The command of the whole advice plans by the speed of the machine, but measures the same with this budget.
    assert main([*shlex.split(document["receipt"]["command"])[1:], "--json"]) == 0
    repeated = json.loads(capsys.readouterr().out)
    assert [fact["value"] for fact in repeated["facts"]] == pytest.approx(
        [fact["value"] for fact in document["facts"]], abs=1e-6, nan_ok=True
    )


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
UNSTABLE = re.compile(r"lorascope \d\S*, \d+ CPU s")  # version and time


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    """Return the words of each line without numbers, and all numbers; hashes are words."""
    words, numbers = [], []
    for line in UNSTABLE.sub("", text).strip().splitlines():
        parts = []
        for word in line.split():
            # A hash mixes digits and letters.
            if re.search(r"[a-z_]\w*\d|\d\w*[a-z]", word):
                parts.append(word)
                continue
            parts.append(NUMBER.sub("#", word))
            numbers += [float(number.replace(",", "")) for number in NUMBER.findall(word)]
        words.append(" ".join(parts))
    return words, numbers


@pytest.mark.slow
def test_the_sample_of_the_guide_is_what_is_measured() -> None:
    page = (Path(__file__).parents[1] / "docs" / "advise.md").read_text(encoding="utf-8")
    (sample,) = re.findall(r"In a terminal, this is printed:\n\n```text\n(.*?)```", page, re.DOTALL)
    adapter = ls.example("adapter")
    told = ls.advise(adapter, planted_teacher.base(), planted_teacher.task(0), planted_teacher.task(1), progress=False)
    words, numbers = words_and_numbers(repr(told).replace(str(adapter.path), "adapter"))
    sample_words, sample_numbers = words_and_numbers(sample)
    assert words == sample_words
    assert len(numbers) > 60
    # Half of the last digit that is printed, and 2% for rows that would decide, which rounding enlarges.
    np.testing.assert_allclose(numbers, sample_numbers, rtol=0.02, atol=0.0011)


def test_numbers_and_words_of_a_sample_are_compared() -> None:
    line = "  learn  +0.607 nats [0.568, 0.645]: o 34% of 1,228 rows 725574 layers.2.o 7cc2 lorascope 0.2.0, 15 CPU s"
    words, numbers = words_and_numbers(line)
    assert words == ["learn +# nats [#, #]: o #% of # rows # layers.#.o 7cc2"]
    assert numbers == [0.607, 0.568, 0.645, 34, 1228, 725574, 2]


@pytest.mark.slow
def test_the_printed_configuration_trains_the_ranks(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=2)[1]
    ranks = {module: 1 + number % 3 for number, module in enumerate(run.updates())}
    config = next_lora_keywords(run, ranks, run.updates()) | {"lr": 0.01}
    receipt = Receipt(run=run.id, base=bert, rows={"task": "192 rows 5f2a1c"})
    printed = repr(advice.Advice("run", "LoRA", (), (), (), (), config, receipt))
    (line,) = [line.strip() for line in printed.splitlines() if line.strip().startswith("LoraConfig(")]
    model = peft.get_peft_model(ls.models.load(bert, task), eval(line, {"LoraConfig": peft.LoraConfig}))
    trained_ranks = {}
    for name, tensor in model.named_parameters():
        if ".lora_A." in name:
            trained_ranks[name.removeprefix("base_model.model.").partition(".lora_A")[0]] = len(tensor)
    assert trained_ranks == ranks


def test_the_step_to_keep_comes_from_the_gauge(bert: str, task: Task, keep: Task, tmp_path: Path) -> None:  # noqa: F811
    method = LoRA(rank=2, lr=0.3, head_lr=0.3)  # so high a rate that the last step is not the best
    gauge = ls.observe.kl(every=2, rows=40, keep=keep)
    run = trained(bert, task, method, tmp_path / "run", steps=20, observe=[gauge])[1]
    course = forgetting_course(run)
    facts = [fact for fact in ls.advise(run).facts if fact.name == "step to keep"]
    kept = int(course.loc[course["keep"], "step"].iloc[0])
    assert kept < course["step"].max()
    assert [fact.value for fact in facts] == [kept]


def test_without_a_model_the_files_are_read(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]
    told = ls.advise(run)
    assert [measurement.name for measurement in told.skipped] == ["dial", "price"]
    (energy,) = [fact for fact in told.facts if fact.name == "energy"]
    counted = 0
    for update in run.updates().values():
        squares = update.svd()[1] ** 2
        counted += int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.9 - 1e-12)) + 1
    assert energy.value == counted
    assert not [action for action in told.actions if action.verdict == MEASURED]


@pytest.mark.parametrize("method", [Full(lr=1e-3), HydraLoRA(rank=2, lr=1e-3, head_lr=1e-3)], ids=["full", "hydra"])
def test_a_run_that_cannot_be_scaled_says_why(method: Any, bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, method, tmp_path / "run", steps=2)[1]
    told = ls.advise(run, bert, task, progress=False)
    assert told.skipped[0].name == "dial, price"


@pytest.mark.usefixtures("learned")
def test_an_adapter_that_cannot_be_retrained_keeps_its_cuts(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=2)[1]
    adapter = ls.load(ls.export.to_peft(run, tmp_path / "adapter"))
    told = ls.advise(adapter, bert, task, budget=1000, retrain=2, progress=False)
    assert "half the rank" in {fact.name for fact in told.facts}
    (skipped,) = [item for item in told.skipped if item.name == "retraining"]
    assert "was not trained by ls.train" in skipped.reason


def test_a_small_budget_names_what_it_skips(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=2)[1]
    told = ls.advise(run, bert, task, budget=1e-9, reads=True, progress=False)
    assert [measurement.name for measurement in told.skipped] == ["dial --by whole", "price", "read"]
    assert "--rows reviews" in told.skipped[2].command  # read has no --task
    for measurement in told.skipped:
        assert "CPU seconds do not fit into the budget" in measurement.reason
        assert measurement.command.startswith("lorascope ")
    assert "Intervals" not in repr(told)  # nothing was measured


def plan_with(run: ls.Run, bert: str, task: Task, budget: float, per_row: float) -> Any:  # noqa: F811
    """Return the plan of a machine that takes ``per_row`` seconds per unit of cost, and what it skips."""
    adviser = Adviser(run, bert, task, task, 192, 192, "last", progress=False)
    costs = {by: MeasurementCost(0.0, per_row * passes, 192, 32) for by, passes in DIAL_PASSES.items()}
    price = MeasurementCost(0.0, per_row * 20, 1280, 128)
    adviser.began = time.process_time()
    adviser._estimate_costs = lambda: _Costs(costs, price, (160, 320, 640, 1280), costs[WHOLE])  # type: ignore[method-assign]
    return adviser.choose(budget, False), adviser.skipped


DIAL_PASSES = {WHOLE: 20.0, "layer": 110.0, "module": 150.0}


def test_the_plan_keeps_the_budget_and_offers_rows_that_fit(bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=2)[1]
    # The whole curve takes 38.4 of 120 seconds, 320 rows of the price take 64, and the difference to layers is 172.8.
    plan, skipped = plan_with(run, bert, task, 120, 0.01)
    assert plan == Plan(WHOLE, 320)
    (module,) = skipped
    assert module.name == "dial --by module"
    assert module.reason.startswith("about 288 CPU seconds do not fit into the budget of 120; 80 rows take about 120")
    assert module.command.endswith("--by module --rows 80 --keep-rows 80")
    # With 20 times as slow a model, 24 rows would fit, which are too few for an interval.
    plan, skipped = plan_with(run, bert, task, 120, 0.2)
    assert plan == Plan()
    assert [measurement.name for measurement in skipped] == ["dial --by whole", "price"]
    assert not any("rows take" in measurement.reason for measurement in skipped)
    # Five times as slow, the curve fits with fewer rows, and 128 rows of the price do not.
    plan, skipped = plan_with(run, bert, task, 120, 0.05)
    assert skipped[0].command.endswith("--by whole --rows 120 --keep-rows 120")
    assert skipped[1].reason.endswith("into the budget of 120")
    assert plan_with(run, bert, task, 1000, 0.01) == (Plan("module", 1280), [])


def test_advice_without_an_action_says_whether_measurements_were_skipped() -> None:
    receipt = Receipt(run="abc", base="minilm", rows={"task": "192 rows 5f2a1c"})
    skipped = advice.SkippedMeasurement("price", "about 151 CPU seconds do not fit into the budget")
    complete = advice.Advice("runs/lora", "LoRA", (), (), (), (), {}, receipt)
    assert complete.sections()["what to do"] == ["  nothing: no change was shown to be better"]
    (line,) = replace(complete, skipped=(skipped,)).sections()["what to do"]
    assert line.startswith("  nothing yet: ")
    (line,) = replace(complete, receipt=replace(receipt, rows={})).sections()["what to do"]
    assert line == "  nothing was measured"


def test_bad_arguments_get_one_line(bert: str, task: Task, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    run = trained(bert, task, LoRA(rank=2, lr=1e-3), tmp_path / "run", steps=2)[1]
    for arguments, message in (
        ({"model": bert}, "model and task are required together"),
        ({"model": bert, "task": task, "budget": 0}, "budget must be > 0 CPU seconds, got 0"),
        ({"retrain": 2}, "retrain requires a model and a task"),
    ):
        with pytest.raises(ValueError, match=message):
            ls.advise(run, **arguments)
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    for words, message in (
        ([], "RUN is required: lorascope advise runs/lora"),
        (["x", "--model", "minilm"], "--model and --task require each other"),
        (["x", "--retrain", "3"], "--retrain requires --model and --task"),
        (["--verify", str(other)], "--verify requires a file that lorascope advise -o wrote"),
        (["--verify", str(other), "--retrain", "3"], "--verify takes everything but RUN from its file"),
    ):
        assert main(["advise", *words]) != 0
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(ValueError, match="advice must be on the run of the card"):
        ls.report(ls.example("adapter"), tmp_path / "card.html", advice=ls.advise(run))
