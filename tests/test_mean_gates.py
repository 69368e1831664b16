"""Mean gate weights on a text, compared with token-by-token gates, and runs evaluated at fixed gate weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_hydralora import restored
from tiny import inputs, tiny
from tolerance import TEXT, TINY, near, rounding
from torch import nn

import lorascope as ls
from lorascope import observe, plots
from lorascope.adapters.delta import attached_deltas, deltas
from lorascope.inputs import models
from lorascope.methods import HydraLoRA, LoRA
from lorascope.runs.run import Run

FAST = {"steps": 4, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory) -> Run:
    """Train HydraLoRA for four steps, with a learning rate at which the router depends on the text."""
    model = models.load(bert, task=task)
    return ls.train(
        model, task, HydraLoRA(lr=3e-2), out=tmp_path_factory.mktemp("runs") / "run",
        observe=[observe.norms(every=2), observe.factors(every=2)], **FAST,
    )  # fmt: skip


def token_by_token(model: nn.Module, texts: list[str]) -> dict[str, np.ndarray]:
    """Average the softmax of W_g x over all tokens, one text at a time, so that there is no padding."""
    tokenizer = models.tokenizer(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in attached_deltas(model)}

    def note(name, router, _, given):
        found[name] += [torch.softmax(router.double() @ x.double(), 0).numpy() for x in given[0][0]]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(note, name, delta.router.detach()))
        for name, delta in attached_deltas(model).items()
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {name: np.mean(gates, axis=0) for name, gates in found.items()}


TEXTS = ["the film was great", "a very boring plot and music", "lovely", "rather poor it was and dreadful music"]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_mean_gates_average_over_the_tokens_of_all_texts(run, bert, task, batch_size):
    model = restored(run, bert, task).train()
    expected = token_by_token(model.eval(), TEXTS)
    model.train()
    generator = torch.get_rng_state()
    found = ls.mean_gates(model, TEXTS, batch_size=batch_size)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(found) == list(attached_deltas(model))
    for name, delta in attached_deltas(model).items():
        assert found[name] == near(expected[name], terms=TINY, growth=TEXT)
        assert delta.mean_gates_.numpy() == near(expected[name], terms=TINY, growth=TEXT)
        at_gates = delta.weight(gates=torch.tensor(found[name]).float()).detach().numpy()
        assert dict(deltas(model))[name].dense() == near(at_gates, terms=12 + 2)


def test_mean_gates_on_the_recorded_text_match_the_records(run, bert, task):
    held_out = task.split("validation").head(16)["text"].tolist()
    table = run.table
    last = table[(table["quantity"] == "gate") & (table["step"] == 4)].set_index(["module", "index"])["value"]
    for source in (restored(run, bert, task), run):
        found = ls.mean_gates(source, held_out)
        assert set(found) == set(last.index.get_level_values("module"))
        for name, gates in found.items():
            assert gates == near(last[name].sort_index().to_numpy(), terms=TINY, growth=TEXT)


def test_mean_gates_of_a_decoder_with_a_given_base(gpt2, task, tmp_path):
    found = ls.train(models.load(gpt2, task=task), task, HydraLoRA(lr=3e-2), out=tmp_path / "run", **FAST)
    base = models.load(gpt2, task=task)
    gates = ls.mean_gates(found, TEXTS, base=base)
    assert all(np.array_equal(attached_deltas(base)[name].mean_gates_, gates[name].astype("f4")) for name in gates)
    for name, expected in token_by_token(base, TEXTS).items():
        assert gates[name] == near(expected, terms=TINY, growth=TEXT)
    longer = ls.mean_gates(base, ["the film was great " * 9], max_length=4)
    shorter = ls.mean_gates(base, ["the film was great"])
    assert all(longer[name] == near(shorter[name], terms=TINY, growth=TEXT) for name in gates)


def test_mean_gates_and_at_gates_with_invalid_arguments_raise(run, bert, task, tmp_path):
    model = restored(run, bert, task)
    plain = models.load(bert, task=task)
    LoRA().attach(plain)
    even = models.load(bert, task=task)
    HydraLoRA(router="uniform").attach(even)
    twin, eyes = tiny("t5"), tiny("vit")
    HydraLoRA().attach(twin)
    HydraLoRA().attach(eyes)
    refused = [
        (partial(ls.mean_gates, model, "the film was great"), "texts must be .* got the string 'the film was great'"),
        (partial(ls.mean_gates, model, []), r"texts must have at least one text, got \[\]"),
        (partial(ls.mean_gates, model, [""]), "texts must contain at least one token, got ''"),
        (partial(ls.mean_gates, model, TEXTS, base=even), "base must be None for a model, got BertFor"),
        (partial(ls.mean_gates, plain, TEXTS), "has no router.*num_experts >= 2"),
        (partial(ls.mean_gates, even, TEXTS), "has no router"),
        (partial(ls.mean_gates, eyes, TEXTS), "ViTForImageClassification on text: its input is pixel_values"),
        (partial(ls.mean_gates, twin, TEXTS), "T5ForConditionalGeneration .* encoder-decoder"),
        (partial(ls.at_gates, run, {"no.such": [1, 0, 0]}), "unknown module 'no.such' in gates; .* bert"),
        (partial(ls.at_gates, run, {next(iter(attached_deltas(model))): [0.5, 0.5]}), "must have 3 values.* got 2"),
        (partial(ls.at_gates, run, {next(iter(attached_deltas(model))): [1, np.nan, 0]}), "must be finite.* nan"),
    ]
    for call, reason in refused:
        with pytest.raises(ValueError, match=reason) as raised:
            call()
        assert "\n" not in str(raised.value)


def sharp(run: Run, head: int) -> dict[str, list[float]]:
    """Return gate weights that select a single expert in every module."""
    return {name: [float(number == head) for number in range(3)] for name in run.ranks()}


def test_at_gates_changes_the_updates_and_the_quantities_computed_from_them(run):
    moved = ls.at_gates(run, sharp(run, 1), "gates of head 1")
    assert moved.id != run.id
    assert (moved.label, moved.ranks(), moved.input_dependent_modules()) == (
        run.label,
        run.ranks(),
        run.input_dependent_modules(),
    )
    summary, before = (found.summary().set_index("module") for found in (moved, run))
    for name, held in run.factors().items():
        scale = run.updates()[name].scale
        dense = scale * held["B"][1].astype(float) @ held["A"]
        assert moved.updates()[name].dense() == pytest.approx(dense, abs=1e-12)
        assert moved.factors()[name]["gates"].tolist() == [0, 1, 0]
        row = summary.loc[name]
        sigma = np.linalg.svd(dense, compute_uv=False)
        assert row["update_norm"] == pytest.approx(np.linalg.norm(dense))
        assert row["stable_rank"] == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2)
        base = before.loc[name, "update_norm"] / before.loc[name, "relative_update"]
        assert row["relative_update"] == pytest.approx(np.linalg.norm(dense) / base)
        assert not row["exact"]
    table = moved.table
    assert set(table["run"]) == {moved.id}
    at_end = table[table["quantity"] == "learned_norm"].set_index("module")["value"]
    blocks = [name for name in at_end.index if name.endswith(("layer.0", "layer.1"))]
    assert len(blocks) == 2
    for block in blocks:
        inside = [summary.loc[name, "update_norm"] for name in run.ranks() if name.startswith(block)]
        assert at_end[block] == pytest.approx(np.linalg.norm(inside))
    # Quantities that depend on the gates only exist at the end; all others keep their history.
    assert set(table.loc[table["quantity"] == "update_norm", "step"]) == {4}
    assert not {"weight_norm", "step_norm"} & set(table["quantity"])
    for quantity in ("adapter_norm", "gate", "rank"):
        pair = [found[found["quantity"] == quantity]["value"].tolist() for found in (table, run.table)]
        assert pair[0] == pair[1]


def test_at_gates_with_the_recorded_gates_changes_nothing(run):
    own = {name: held["gates"] for name, held in run.factors().items()}
    moved = ls.at_gates(run, own)
    kept = ["stable_rank", "effective_rank", "update_norm", "relative_update"]
    assert np.allclose(moved.summary()[kept], run.summary()[kept], rtol=rounding(terms=TINY), equal_nan=True)
    one = next(iter(own))
    partly = ls.at_gates(run, {one: [0.0, 0, 1]})
    for name, update in run.updates().items():
        assert np.array_equal(partly.updates()[name].dense(), update.dense()) == (name != one)


def test_figures_compare_the_updates_on_two_texts(run, bert, task):
    model = restored(run, bert, task)
    found = {"film": ls.mean_gates(model, ["film film film"]), "music": ls.mean_gates(model, ["music music"])}
    views = {f"on {kind}": ls.at_gates(run, gates, f"mean gates on {kind}") for kind, gates in found.items()}
    panels = plots.atlas(views)
    angles = panels.rows()[1][0].data.set_index(["row", "column"])["angle"]
    assert angles["on film", "on music"] > 0.1
    for caption in {chart.caption for row in panels.rows() for chart in row}:
        assert "Updates of on film at mean gates on film. Updates of on music at mean gates on music." in caption
    assert "at given gates" in plots.spectrum(ls.at_gates(run, sharp(run, 0))).caption
    with pytest.raises(ValueError, match="update_norm at more than one step"):
        plots.norm_over_steps(views["on film"])


def test_restore_of_a_run_at_gates_loads_the_trained_state(run, bert, task):
    model = models.load(bert, task=task)
    ls.at_gates(run, sharp(run, 2)).restore(model)
    batch = inputs(model)
    assert torch.equal(model(**batch).logits, restored(run, bert, task)(**batch).logits)
