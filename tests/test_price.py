"""The price of rank against exact identities, brute force and drawn labels, on tiny encoders and decoders."""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BAD, FILLER, GOOD
from test_export import trained
from torch.nn import functional as F
from tqdm.auto import tqdm

import lorascope as ls
from lorascope.adapters import delta
from lorascope.adapters.host_weights import orient_weight
from lorascope.analysis.gradient_signal import count_directions
from lorascope.analysis.paired_rows import estimate_rows
from lorascope.analysis.rank_prices import Evidence, Price
from lorascope.cli.main import main
from lorascope.export import RankBudget
from lorascope.inputs import tasks
from lorascope.inputs.text_rows import encode_rows
from lorascope.inputs.tokenization import token_losses
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.cut_updates import cut_updates
from lorascope.insight.missing_directions import (
    CONTROL,
    DIRECTIONS,
    REAL,
    draw_labels,
    find_signals,
    leading_directions,
    reach_of,
)
from lorascope.insight.price import _next_training, make_blocks
from lorascope.insight.update_parts import component_parts
from lorascope.methods import AdaLoRA, DoRA, Full, LoRA, PiSSA, VeRA
from lorascope.observe.measured_rows import TaskLoss
from lorascope.updates import LowRank

ROWS = 256
QUIET: dict[str, Any] = {"rows": ROWS, "progress": False}
TARGETS = ("q", "ffn_out")
METHODS = {
    "lora": LoRA(rank=4, alpha=12.0, targets=TARGETS, lr=1e-2, head_lr=1e-2),
    "pissa": PiSSA(rank=2, alpha=2.0, targets=TARGETS, lr=1e-2, head_lr=1e-2),
}


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    """Reviews with 256 validation rows, each of them twice in a row, so that half of them has the same mean."""
    draw = random.Random(0)
    tables = []
    for split, number in (("train", 200), ("validation", ROWS // 2), ("test", 40)):
        rows = []
        for _ in range(number):
            label = draw.choice(["negative", "positive"])
            words = draw.choices(FILLER, k=draw.randint(3, 9))
            words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "positive" else BAD))
            rows.append({"text": " ".join(words), "label": label, "split": split})
        tables.append(pd.DataFrame(rows))
    tables.insert(2, tables[1])
    return tasks.from_frame(pd.concat(tables, ignore_index=True), "reviews")


@pytest.fixture(scope="module", params=[*METHODS, "decoder"])
def opened(
    request: Any, bert: str, llama: str, task: tasks.Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ls.Run, str]:
    folder = llama if request.param == "decoder" else bert
    method = METHODS.get(request.param, LoRA(rank=4, alpha=12.0, targets=TARGETS, lr=1e-2))
    return trained(folder, task, method, tmp_path_factory.mktemp("price") / "run", steps=12)[1], folder


def open_attached(run: ls.Run, folder: str, task: tasks.Task) -> tuple[AdaptedBase, TaskLoss, list[Any]]:
    adapted = open_adapted(run, folder, task, "last")
    text = encode_rows(adapted.base, adapted.task, "validation", ROWS, 128)
    loss = TaskLoss(adapted.base, *text)
    delta.attach(adapted.base, adapted.deltas)
    adapted.base.eval()
    return adapted, loss, make_blocks(text, loss.clusters)


def test_projections_are_orthogonal_to_every_step_of_the_factors() -> None:
    rng = np.random.default_rng(0)
    B, A = rng.normal(size=(12, 3)), rng.normal(size=(3, 9))
    B[:, 2] = B[:, 0]  # dependent columns span less
    reach = reach_of(LowRank(B, A, 0.5))
    assert (reach.U.shape, reach.V.shape) == ((12, 2), (9, 3))
    G, H = torch.from_numpy(rng.normal(size=(2, 12, 9)))
    M = reach.project_out(G)
    torch.testing.assert_close(reach.project_out(M), M, rtol=0, atol=1e-12)  # idempotent
    assert float((M * H).sum()) == pytest.approx(float((G * reach.project_out(H)).sum()), abs=1e-12)  # symmetric
    step = B @ rng.normal(size=(3, 9)) + rng.normal(size=(12, 3)) @ A
    assert abs(float((M * torch.from_numpy(step)).sum())) < 1e-12
    assert float(M.norm()) > 1


def test_reach_before_the_first_step_has_only_the_rows_of_A() -> None:
    reach = reach_of(LowRank(np.zeros((5, 2)), np.eye(2, 4)))
    assert (reach.U.shape, reach.V.shape) == ((5, 0), (4, 2))


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_leading_directions_are_singular_vectors(shape: tuple[int, int]) -> None:
    M = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
    U, V = leading_directions(M, 4)
    expected = torch.linalg.svd(M)
    torch.testing.assert_close(((U.T @ M) * V.T).sum(1), expected.S[:4])
    torch.testing.assert_close((U.T @ expected.U[:, :4]).abs(), torch.eye(4, dtype=M.dtype))
    low_rank = M[:, :2] @ M[:2, : shape[1]] if shape[0] >= 2 else M
    assert leading_directions(low_rank, 4)[0].shape[1] == 2


def test_cut_to_the_full_rank_is_the_run_and_to_0_the_base_bit_by_bit(
    opened: tuple[ls.Run, str], task: tasks.Task
) -> None:
    run, folder = opened
    adapted, loss, _ = open_attached(run, folder, task)
    with_adapter = loss.values()
    delta.detach(adapted.base)
    difference = loss.values() - with_adapter
    present = max(update.svd()[1].size for update in run.updates().values())
    result = ls.price(run, folder, task, ranks=(0, 1, present), **QUIET)
    table = result.table.set_index("rank")
    assert result.rank == present
    assert (table.loc[present, ["cut", "cut_low", "cut_high"]] == 0).all()
    assert table.loc[0, "cut"] == difference.sum() / loss.counts.sum()
    assert table.loc[0, "components"] == 0
    assert table.loc[present, "parameters"] == sum(
        len(result.sigma[name]) * sum(update.shape) for name, update in run.updates().items()
    )


def test_cuts_equal_pruned_losses(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    """``pruned_losses`` evaluates every other row of the validation split, which has each row twice."""
    run, folder = opened
    total = sum(len(sigma) for sigma in ls.price(run, folder, task, ranks=(1,), **QUIET).sigma.values())
    result = ls.price(run, folder, task, ranks=(1, 2, 3), budgets=(total - 3, 2), **QUIET)
    assert {1, 2, 3} <= set(result.table["rank"].dropna())
    for row in result.table.itertuples():
        ranks = dict.fromkeys(result.sigma, row.rank) if pd.notna(row.rank) else result.ranks(row.components)
        kept = {name: np.arange(len(sigma)) < ranks[name] for name, sigma in result.sigma.items()}
        cut = RankBudget(result.sigma, kept, dict.fromkeys(kept, 1))
        losses = ls.component_importance.pruned_losses(run, cut, folder, task, rows=ROWS)
        assert row.cut == pytest.approx(losses.after - losses.before, abs=1e-6)
        assert row.components == sum(map(np.sum, kept.values()))


def test_placed_cuts_are_paired_by_row_with_uniform_ones(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    run, folder = opened
    result = ls.price(run, folder, task, ranks=(1, 2), **QUIET)
    adapted, loss, _ = open_attached(run, folder, task)
    components = component_parts(adapted.base, adapted.updates).directions
    for row in result.table.dropna(subset="placed").itertuples():
        values = []
        for ranks in (result.ranks(row.components), dict.fromkeys(components, int(row.rank))):
            with torch.no_grad(), cut_updates(adapted.base, components, ranks):
                values.append(loss.values())
        estimate = estimate_rows(values[0] - values[1], loss.counts, loss.clusters)
        assert (row.placed, row.placed_low, row.placed_high) == estimate.interval(0.025)[:3]
    assert result.table["placed"].notna().sum() >= 1


def test_budgets_keep_the_components_that_the_export_selects(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=6)[1]
    result = ls.price(run, bert, task, **QUIET)
    assert result.ranks(7) == ls.export.select_components(run, 7).ranks
    with pytest.raises(ValueError, match="budget must be a number of components from 1 to 16, got 17"):
        result.ranks(17)


def test_nothing_of_the_model_changes(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    run, folder = opened
    adapted, loss, blocks = open_attached(run, folder, task)
    before = {name: tensor.clone() for name, tensor in adapted.base.state_dict().items()}
    find_signals(adapted.base, dict(run.updates()), loss, blocks[:16], tqdm(disable=True))
    for module in adapted.base.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
    assert not any(
        parameter.requires_grad for name, parameter in adapted.base.named_parameters() if "delta" not in name
    )
    for name, tensor in adapted.base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_expected_gradient_with_drawn_labels_is_zero(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    """Weight every label by its probability, in float64; with real labels, it is not zero."""
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=6)[1]
    adapted, loss, blocks = open_attached(run, bert, task)
    adapted.base.double()
    weights = [adapted.base.get_submodule(name).weight.requires_grad_(True) for name in adapted.deltas]
    logits, labels = loss.target_logits(blocks[0])
    probabilities = logits.detach().softmax(-1)
    expected = 0.0
    for label in range(logits.shape[-1]):
        losses = F.cross_entropy(logits, torch.full_like(labels, label), reduction="none")
        expected = expected + (probabilities[:, label] * losses).sum()
    gradients = torch.autograd.grad(expected, weights, retain_graph=True)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-14
    real = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), weights)
    assert max(float(gradient.abs().max()) for gradient in real) > 1e-4


def test_drawn_labels_follow_the_prediction_and_ignored_positions_stay() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(40, 500, 3)
    labels = torch.zeros(40, 500, dtype=torch.long)
    labels[:, ::2] = -100
    drawn = draw_labels(logits, labels, 3)
    assert (drawn[:, ::2] == -100).all()
    frequencies = torch.bincount(drawn[:, 1::2].flatten(), minlength=3) / 10_000
    torch.testing.assert_close(frequencies, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.02)
    assert torch.equal(drawn, draw_labels(logits, labels, 3))
    assert not torch.equal(drawn, draw_labels(logits, labels, 4))


def test_signals_equal_projected_gradients_of_every_block(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    """Project the gradient of every block by itself, from the loss that autograd differentiates by the weight."""
    run, folder = opened
    adapted, loss, blocks = open_attached(run, folder, task)
    blocks = blocks[:16]
    signals = find_signals(adapted.base, dict(run.updates()), loss, blocks, tqdm(disable=True))
    scale = len(blocks) / loss.counts.sum()
    name = next(iter(run.updates()))
    host: Any = adapted.base.get_submodule(name)
    host.weight.requires_grad_(True)
    gradients: dict[str, list[torch.Tensor]] = {REAL: [], CONTROL: []}
    for index, block in enumerate(blocks):
        logits, labels = loss.target_logits(block)
        for kind, targets in ((REAL, labels), (CONTROL, draw_labels(logits, labels, index))):
            total = token_losses(logits, targets).sum() * scale
            (gradient,) = torch.autograd.grad(total, [host.weight], retain_graph=True)
            gradients[kind].append(orient_weight(host, gradient).double())
    reach = reach_of(run.updates()[name])
    for kind, of_blocks in gradients.items():
        signal = signals[kind][name]
        M = torch.stack([reach.project_out(gradient) for gradient in of_blocks])
        inside = torch.stack(of_blocks) - M
        first, second = M[:8].mean(0), M[8:].mean(0)
        size = float((first * first).sum())
        assert signal.signal == pytest.approx(float((first * second).sum()), abs=1e-5 * size)
        np.testing.assert_allclose(signal.outside[1], (M[8:] * first).sum((1, 2)), atol=1e-5 * size)
        expected = (inside[8:] * inside[:8].mean(0)).sum((1, 2))
        np.testing.assert_allclose(signal.inside[1], expected, atol=1e-5 * float(expected.abs().max()))
        U, _, Vh = torch.linalg.svd(first)
        z = torch.einsum("oj,boi,ji->bj", U[:, :DIRECTIONS], M[8:], Vh[:DIRECTIONS])
        assert signal.projections[1].shape == z.shape
        np.testing.assert_allclose(signal.projections[1], z, atol=1e-4 * float(z.abs().max()))


def test_only_real_labels_have_missing_directions(llama: str, task: tasks.Task, tmp_path: Path) -> None:
    """A decoder with a random base lacks the frequencies of the words after two steps."""
    text = tasks.from_frame(task.table[["text", "split"]], "text")
    run = trained(llama, text, LoRA(rank=1, targets="all-linear", lr=1e-3), tmp_path / "run", steps=2)[1]
    adapted, loss, blocks = open_attached(run, llama, text)
    signals = find_signals(adapted.base, dict(run.updates()), loss, blocks, tqdm(disable=True))
    assert sum(count_directions(signals[REAL]).values()) > 5
    assert sum(count_directions(signals[CONTROL]).values()) == 0


def test_blocks_contain_whole_clusters(bert: str, task: tasks.Task) -> None:
    base = ls.models.load(bert, task=task)
    text = encode_rows(base, task.fit(base), "validation", ROWS, 128)
    clusters = np.random.default_rng(0).integers(0, 100, ROWS)
    blocks = make_blocks(text, pd.factorize(clusters)[0])
    assert sum(len(block["labels"]) for block in blocks) == ROWS
    assert len(blocks) > 16
    with pytest.raises(ValueError, match="8 validation rows or more are required, got 256 rows in 10 clusters"):
        make_blocks(text, np.arange(ROWS) % 10)


def test_price_has_every_column_and_a_receipt(opened: tuple[ls.Run, str], task: tasks.Task) -> None:
    run, folder = opened
    result = ls.price(run, folder, task, ranks=(1, 2, 99), **QUIET)
    assert isinstance(result, Price)
    summary = result.summary()
    assert set(summary["module"]) == set(run.updates())
    assert (summary["unused"] <= summary["rank"]).all()
    assert summary["signal_p"].between(0, 1).all()
    assert pd.isna(result.table.set_index("rank").loc[99, "cut"])
    assert result.receipt.run == run.id
    text = repr(result)
    assert "after retraining: not measured" in text
    assert "do not cover the seed" in text
    assert str(result.receipt) in text
    json.dumps(result.to_json())
    again = ls.price(run, folder, task, ranks=(1, 2, 99), **QUIET)
    pd.testing.assert_frame_equal(again.summary(), summary)
    pd.testing.assert_frame_equal(again.table, result.table)


def test_bad_arguments_get_one_line(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "lora", steps=2)[1]
    for arguments, message in (
        ({"ranks": ()}, "ranks must be different integers >= 0, got none"),
        ({"ranks": (2, -1)}, "ranks must be different integers >= 0, got 2, -1"),
        ({"ranks": (0, 1), "retrain": 2}, "ranks must be >= 1 for retraining, got 0"),
        ({"retrain": -1}, "retrain must be a number of seeds >= 0, got -1"),
        ({"tolerance": 0.0}, "tolerance must be > 0, got 0"),
        ({"budgets": (0,)}, "budget must be a number of components from 1 to 16, got 0"),
        ({"rows": 100}, "16 blocks of 8 validation rows or more are required, got 100 rows in 100 clusters"),
    ):
        with pytest.raises(ValueError, match=message):
            ls.price(run, bert, task, **QUIET | arguments)
    for method, kind in ((DoRA(rank=2, lr=1e-3), "WeightDecomposed"), (VeRA(rank=2, lr=1e-3), "RandomProjection")):
        other = trained(bert, task, method, tmp_path / kind, steps=2)[1]
        with pytest.raises(ValueError, match=f"price requires low-rank updates B A, got {kind} in "):
            ls.price(other, bert, task, **QUIET)
    full = trained(bert, task, Full(lr=1e-3), tmp_path / "full", steps=2)[1]
    with pytest.raises(ValueError, match=r"price requires low-rank updates, but .* has none"):
        ls.price(full, bert, task, **QUIET)
    adalora = trained(bert, task, AdaLoRA(lr=1e-2), tmp_path / "adalora", steps=8)[1]
    with pytest.raises(ValueError, match=r"cannot retrain at another rank: adalora of .* has no single rank"):
        ls.price(adalora, bert, task, retrain=2, **QUIET)
    adapter = ls.load(ls.export.to_peft(run, tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"cannot retrain at another rank: .* was not trained by ls.train"):
        ls.price(adapter, bert, task, retrain=2, **QUIET)
    other_rows = tasks.from_frame(task.table.drop(columns="draw").iloc[1:], "fewer")
    with pytest.raises(ValueError, match="the rows of fewer are not those of reviews"):
        ls.price(run, bert, other_rows, retrain=2, **QUIET)


def test_an_exported_adapter_has_the_price_of_its_run(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=6)[1]
    adapter = ls.load(ls.export.to_peft(run, tmp_path / "adapter"))
    ours, theirs = (ls.price(item, bert, task, **QUIET) for item in (run, adapter))
    np.testing.assert_allclose(theirs.table["cut"], ours.table["cut"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(theirs.summary()["signal"], ours.summary()["signal"], rtol=1e-2, atol=1e-9)


def test_retraining_pairs_runs_by_seed_and_adds_to_the_record(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]
    result = ls.price(run, bert, task, ranks=(2, 4, 8), retrain=3, placed=True, **QUIET)
    runs = result.runs[result.runs["placed"] == 0].set_index(["rank", "lr", "seed"])
    assert len(runs) == 3 * (2 * 3)  # rank 4 at the same rate is the reference
    assert (runs.loc[4, 0.01]["change"] == 0).all()
    table = result.table.set_index(["rank", "lr"])
    same = table.loc[4, 0.01]
    assert same["retrained"] == same["retrained_low"] == same["retrained_high"] == 0  # the same runs, bit by bit
    assert table.loc[2, 0.03]["seeds"] == 3
    changes = runs.loc[2, 0.01]["loss"] - runs.loc[4, 0.01]["loss"]
    assert table.loc[2, 0.01]["retrained"] == pytest.approx(changes.mean())
    assert table.loc[2, 0.01]["cut"] == table.loc[2, 0.03]["cut"]
    entries = [json.loads(line) for line in (tmp_path / "prices.jsonl").read_text().splitlines()]
    (entry,) = entries
    assert (entry["rank"], entry["to"], entry["seeds"]) == (4, 2, 3)
    assert entry["retrained"] == pytest.approx(changes.mean())
    assert result.runs["placed"].sum() == 3 * 2  # only the smaller rank has another placement
    placed = []
    for path in (tmp_path / "run-retrained").rglob("run.json"):
        rank = ls.load(path.parent).meta.recipe["rank"]
        if isinstance(rank, dict):
            placed.append(rank)
    assert placed == 6 * [result.ranks(8)]
    repeated = ls.price(run, bert, task, ranks=(2, 4, 8), retrain=3, placed=True, **QUIET)
    pd.testing.assert_frame_equal(repeated.runs, result.runs)  # finished runs are opened again
    assert len((tmp_path / "prices.jsonl").read_text().splitlines()) == 1
    assert "at lr 0.03 (3 seeds)" in repr(result)


def test_the_next_command_can_be_pasted(bert: str, task: tasks.Task, tmp_path: Path) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]
    result = ls.price(run, bert, task, **QUIET)
    command = ["lorascope", "price", str(tmp_path / "run"), "--model", bert, "--task", "reviews", "--ranks", "2"]
    assert shlex.split(result.next_command) == [*command, "--retrain", "3"]
    assert result.next_cost.endswith("runs, less than a minute")


def test_a_rank_that_loses_nothing_is_retrained_at_half_even_if_directions_are_missing(
    bert: str, task: tasks.Task, tmp_path: Path
) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]
    losses = estimate_rows(np.zeros(2), np.ones(2), np.arange(2))
    evidence = Evidence([], losses, directions=37, control=0, doubled=None, inside_p=0.001)
    assert "--ranks 2 " in _next_training(run, bert, task, evidence, "wasteful")["next_command"]
    assert "--ranks 8 " in _next_training(run, bert, task, evidence, "not finished")["next_command"]


def test_command_prints_prices(bert: str, task: tasks.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]
    task.table.drop(columns=["draw"]).to_csv(tmp_path / "task.csv", index=False)
    arguments = ["price", str(run.path), "--model", bert, "--task", str(tmp_path / "task.csv"), "--rows", "128"]
    assert main([*arguments, "--ranks", "1,2"]) == 0
    output = capsys.readouterr().out
    for start in (
        "rank 4 -> 1    cut now ",
        "rank 4 -> 2    cut now ",
        "beyond rank 4  signal in ",
        "next           lorascope",
    ):
        assert f"\n{start}" in output
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 4
    for wrong, message in (
        (["price"], "RUN is required: lorascope price runs/lora"),
        (["price", str(run.path), "--model", bert], "--model and --task are required"),
        ([*arguments, "--ranks", "1,b"], "--ranks must be integers such as 1,2,4, got '1,b'"),
        ([*arguments, "--ranks", "1,1"], "ranks must be different integers >= 0, got 1, 1"),
        ([*arguments[:-1], "64"], "got 64 rows in 64 clusters"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_figure_draws_the_table(opened: tuple[ls.Run, str], task: tasks.Task, tmp_path: Path) -> None:
    run, folder = opened
    result = ls.price(run, folder, task, ranks=(1, 2), **QUIET)
    drawn = ls.plots.price(result)
    cuts, cells = drawn.panels
    assert cuts.data["cut"].to_list() == result.table["cut"].to_list()
    assert cells.data["signal"].sum() == pytest.approx(result.summary()["signal"].sum())
    false = replace(result, modules=result.modules.assign(control=1))
    hatched = ls.plots.price(false).panels[1]
    assert hatched.data["signal"].isna().all()
    assert f"the control found directions in {len(hatched.data)} of {len(hatched.data)} cells" in hatched.caption
    drawn.save(tmp_path / "price.png", width="column")
    drawn.plotly()
