"""Tables that the evidence keeps of finished runs: what the statistics read from them equals the value of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from killing import SETTINGS
from planted import blocks, low_rank, plant
from planted_claims import row
from scipy.stats import kendalltau, spearmanr
from test_hydralora_asymmetry import planted_runs
from torch.nn import functional as F

import lorascope as ls
from lorascope import observe, updates
from lorascope.analysis import norms, rank_allocations, selected_neurons
from lorascope.analysis.factor_embeddings import factored_updates
from lorascope.analysis.factor_sharing import measure_sharing
from lorascope.analysis.neuron_utilization import rank_shift_of_run
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, Full, HydraLoRA, LoRA, NeFT
from lorascope.methods.method import Method
from lorascope.papers import (
    adalora,
    adapprox,
    alora,
    autolora,
    fourierft_expressiveness,
    hydralora,
    hydralora_asymmetry,
    lisa,
    lora,
    neft,
    planted_ranks,
    rank_tables,
    score_agreement,
)
from lorascope.papers.adapprox import keep_tails
from lorascope.papers.judging.kept_runs import ROW_COLUMNS, Evidence, add_run, read
from lorascope.papers.planted_ranks import keep_recovery
from lorascope.papers.rank_tables import keep_ranks
from lorascope.papers.registry import PAIRS
from lorascope.papers.setups import planted_teacher
from lorascope.runs.run import Run

Kept = Mapping[tuple[str, str], Sequence[pd.DataFrame]]


@pytest.fixture
def train(bert, task, tmp_path):
    """Return a function that trains the tiny BERT by a method with given seeds."""

    def train(method: Method, seeds: Sequence[int] = (0,), observers: Sequence[observe.Observer] = ()) -> list[Run]:
        settings = SETTINGS | {"observe": list(observers)}
        number = len(list(tmp_path.iterdir()))
        return [
            ls.train(
                models.load(bert, task=task), task, method, out=tmp_path / f"{number}-{seed}", seed=seed, **settings
            )
            for seed in seeds
        ]

    return train


def evidence(folder: Path, kept: Kept) -> Evidence:
    """Store tables by name and arm, one per seed from 0, and read them."""
    folder.mkdir()
    pd.DataFrame(columns=list(ROW_COLUMNS)).to_parquet(folder / "rows.parquet")
    for arm in {arm for _, arm in kept}:
        tables = {name: of for (name, other), of in kept.items() if other == arm}
        for seed in range(max(map(len, tables.values()))):
            run = f"{len(list(folder.rglob('*.parquet')))}"
            add_run(folder, row(run, arm, seed), {}, {name: of[seed] for name, of in tables.items()})
    return read(folder)


def value(claim: str, side: int, found: Evidence, seeds: Sequence[int] = (0,)) -> np.ndarray:
    """Compute statistic (side 0) or control (side 1) of a claim."""
    return PAIRS[claim][side](found, seeds)


def fraction(run: Run, *groups: str, by: str = "role") -> float:
    """Compute the fraction of the total rank in roles, or in thirds of the depth."""
    shares = rank_allocations.rank_shares(rank_allocations.current_ranks(run.table), by)
    return float(shares.loc[shares[by].astype("str").isin(groups), "share"].sum())


def test_ranks_of_allocators_give_fractions_spread_and_agreement(train, tmp_path):
    ada = train(AdaLoRA(lr=1e-1, init_rank=3, target_rank=1, initial_steps=0, final_steps=2, mask_every=1), (0, 1))
    (auto,) = train(AutoLoRA(lr=1e-2, rank=4, selection_lr=1.0, targets="all-linear"))
    kept = {
        (rank_tables.RANKS, adalora.ADAPTED): list(map(keep_ranks, ada)),
        (rank_tables.RANKS, autolora.ADAPTED): [keep_ranks(auto)],
    }
    found = evidence(tmp_path / "e", kept)
    shares = {
        "adalora.ffn": [fraction(run, "ffn_in", "ffn_out") for run in ada],
        "adalora.top": [fraction(run, "top", by="third") for run in ada],
    }
    for claim, share in shares.items():
        assert value(claim, 0, found, (0, 1)) == pytest.approx(share)
    assert len({*shares["adalora.ffn"], *shares["adalora.top"]}) > 1
    tau = kendalltau(*([run.ranks()[module] for module in ada[0].ranks()] for run in ada)).statistic
    assert value("adalora.stable", 0, found, (0, 1))[0, 1] == pytest.approx(tau)
    assert 0 < abs(tau) < 1
    spread = np.std(list(auto.ranks().values()), ddof=1)
    assert value("autolora.spread", 0, found) == pytest.approx(spread)
    assert spread > 0
    assert set(keep_ranks(auto)["module"]) == set(auto.ranks())


def test_directions_give_phi_of_the_runs(train, tmp_path):
    runs = {
        arm: train(LoRA(rank=rank, targets="all-linear", lr=1e-2), (0, 1, 2), [observe.factors(every=5)])
        for arm, rank in ((lora.LOW, 2), (lora.HIGH, 5))
    }
    kept = {(lora.DIRECTIONS, arm): list(map(lora.keep_directions, of)) for arm, of in runs.items()}
    found = evidence(tmp_path / "e", kept)
    for side, step in ((0, None), (1, 0)):
        phi = value("lora.direction", side, found, (0, 1, 2))
        for low, high in permutations(range(3), 2):
            one, two = runs[lora.LOW][low].factors(step), runs[lora.HIGH][high].factors(step)
            mean = np.mean([updates.phi(one[name]["A"], two[name]["A"], 1, 1) for name in one])
            assert phi[low, high] == pytest.approx(mean, rel=2e-3)


def test_amplification_gives_the_norm_of_the_base_weight_between_directions(train, bert, tmp_path):
    (run,) = train(LoRA(rank=4, targets="all-linear", lr=1e-2))
    found = evidence(tmp_path / "e", {(lora.AMPLIFICATION, lora.LOW): [lora.keep_amplification(run)]})
    base, rng = dict(models.load(bert).named_parameters()), np.random.default_rng(0)
    between, drawn = [], []
    for module, update in run.updates().items():
        weight = base[f"{module}.weight"].detach().double().numpy()
        U, _, Vt = np.linalg.svd(update.dense())
        between.append(np.log10(np.linalg.norm(U[:, :4].T @ weight @ Vt[:4].T)))
        left, right = (np.linalg.qr(rng.standard_normal((500, side, 4)))[0] for side in weight.shape)
        norm = np.linalg.norm(left.transpose(0, 2, 1) @ weight @ right, axis=(1, 2))
        drawn.append([np.log10((norm**2).mean()) / 2, np.log10(norm).mean()])
    assert value("lora.amplify", 0, found) == pytest.approx(np.mean(between))
    square, logarithm = np.mean(drawn, axis=0)
    assert value("lora.amplify", 1, found) == pytest.approx(square, abs=2e-3)
    assert value("lora.amplify", 1, found) == pytest.approx(logarithm, abs=0.38 / 20)


def test_layer_norms_give_the_skew_of_every_recorded_norm(train, tmp_path):
    (run,) = train(LoRA(rank=2, targets=("all-linear", "embed"), lr=1e-2), observers=[observe.norms(every=2)])
    table = lisa.keep_layer_norms(run)
    assert set(table["quantity"]) == {"update_norm", "factor_change", "adapter_norm"}
    found = evidence(tmp_path / "e", {(lisa.NORMS, lisa.SMALL): [table], (lisa.NORMS, lisa.ADAPTED): [table]})
    layers = norms.mean_over_steps(norms.pool_modules(norms.select_quantity(run.table, "update_norm")))
    pooled = layers.set_index("place")["value"]
    ratio = pooled["embed"] / pooled[layers["layer"].notna().to_numpy()].median()
    assert value("lisa.embed", 0, found) == pytest.approx(np.log10(ratio))
    change = run.table[run.table["quantity"] == "factor_change"]
    by_hand = change[change["step"] > 0].assign(square=lambda rows: rows["value"] ** 2)
    layers = (
        by_hand.groupby(["layer", "step"], dropna=False)["square"].sum().pow(0.5).groupby("layer", dropna=False).mean()
    )
    skew = np.log10(layers[layers.index.isna()].item() / layers[layers.index.notna()].median())
    assert value("lisa.learned", 0, found) == pytest.approx(skew)
    (full,) = train(Full(lr=1e-2), observers=[observe.norms(every=2)])
    assert set(lisa.keep_layer_norms(full)["quantity"]) == {"update_norm"}


def test_replays_have_the_mean_that_equal_modules_imply(train, tmp_path):
    """All modules start with the same rank, so each expects the same fraction of the total."""
    (run,) = train(ALoRA(init_rank=2, score_rows=4, rounds=3, warm_steps=1, round_steps=1, lr=1e-2))
    table = alora.keep_replays(run)
    assert table["draws"].tolist() == [1000, 1000]
    assert table["error"].between(1e-4, 1e-2).all()
    kept = {(alora.REPLAYS, alora.ADAPTED): [table], (rank_tables.RANKS, alora.ADAPTED): [keep_ranks(run)]}
    found = evidence(tmp_path / "e", kept)
    errors = table.set_index("group")["error"]
    assert value("alora.attention", 1, found) == pytest.approx(4 / 6, abs=4 * errors["attention"])
    assert value("alora.queries", 1, found) == pytest.approx(0, abs=4 * errors["q and k less v and o"])
    share = {role: fraction(run, role) for role in "qkvo"}
    assert value("alora.attention", 0, found) == pytest.approx(sum(share.values()))
    assert value("alora.queries", 0, found) == pytest.approx(share["q"] + share["k"] - share["v"] - share["o"])


def test_scores_give_correlations_with_the_loss_increase_on_both_halves(bert, task, tmp_path, monkeypatch):
    for name, size in {"EXAMPLES": 4, "SCORED": 16, "JUDGED": 8, "REMOVED": 1}.items():
        monkeypatch.setattr(score_agreement, name, size)
    task.table[["text", "label", "group"]].to_csv(tmp_path / "toy.csv", index=False)
    method = LoRA(rank=2, targets="all-linear", lr=1e-2)
    run = ls.train(bert, tmp_path / "toy.csv", method, out=tmp_path / "run", **SETTINGS)
    table = score_agreement.keep_scores(run)
    of_components = table[table["component"] >= 0]
    measured = of_components.pivot(index=["module", "component"], columns="score", values="value")
    assert set(table["score"]) >= {*score_agreement.HALVES, "AutoLoRA kept"}
    found = evidence(tmp_path / "e", {(score_agreement.SCORES, lora.LOW): [table]})
    truth = measured[list(score_agreement.HALVES)].mean(axis=1)
    for claim, score in (
        ("adalora", "AdaLoRA importance"),
        ("autolora", "AutoLoRA alpha"),
        ("size.alora", "ALoRA importance"),
    ):
        rho = spearmanr(measured[score], truth).statistic
        assert value(f"agreement.{claim}", 0, found) == pytest.approx(rho, abs=1e-3)
    rho = spearmanr(measured["singular value"], truth).statistic
    assert value("agreement.size.alora", 1, found) == pytest.approx(rho, abs=1e-3)


def test_gate_information_gives_the_information_of_groups_at_start_and_end(train, tmp_path):
    (run,) = train(HydraLoRA(lr=1e-1, rank=2, gate_rows=16))
    kept = hydralora.keep_gate_information(run)
    found = evidence(tmp_path / "e", {(hydralora.INFORMATION, hydralora.ROUTED): [kept]})
    for side, step in ((0, run.table["step"].max()), (1, 0)):
        rows = run.table[run.table["step"] == step]
        mean = rows.groupby("quantity", observed=True)["value"].mean()
        assert value("hydralora.tasks", side, found) == pytest.approx(mean["gate_information"] - mean["gate_chance"])
    assert value("hydralora.tasks", 0, found) != value("hydralora.tasks", 1, found)


def test_similarities_give_the_sharing_of_sets_of_runs(tmp_path):
    runs = {label: of[0] for label, of in planted_runs(tmp_path, learned=True, spread=1.0, replicates=1).items()}
    # The set of quarters has other runs than the shared one, so that a mix-up shows.
    runs |= dict(
        zip(hydralora_asymmetry.QUARTERS, reversed([runs[label] for label in hydralora_asymmetry.OWN]), strict=True)
    )
    kept, tables = {}, {}
    for arms, cosines in hydralora_asymmetry.COSINES.items():
        *others, last = (runs[label] for label in arms)
        table = hydralora_asymmetry.keep_similarities(last, *others, cosines=cosines)
        assert len(table) == len(cosines) * 96 * 95 / 2
        kept[hydralora_asymmetry.SIMILARITIES, arms[-1]] = [table]
        members = [str(number) for number in range(8)]
        domains = {member: str(int(member) // 2) for member in members}
        for when, step in (("start", 0), ("end", None)):
            factored = {m: factored_updates(runs[label].updates(step)) for m, label in zip(members, arms, strict=True)}
            factors = ("A",) if when == "start" else ("A", "B")
            found = measure_sharing(factored, domains, factors, ("raw", "space"), draws=1)
            tables[arms, when] = found.set_index(["factor", "view"])
    found = evidence(tmp_path / "e", kept)
    own, common, quarters = (tables[arms, "end"] for arms in hydralora_asymmetry.COSINES)
    shared, nearest = "sharedness", "neighbour"
    expected = {
        ("asymmetry.space", 0): own[shared]["A", "space"],
        ("asymmetry.space", 1): own[shared]["B", "space"],
        ("asymmetry.picture", 0): common[shared]["A", "raw"],
        ("asymmetry.picture", 1): own[shared]["A", "raw"],
        ("asymmetry.meeting", 0): own[shared]["A", "space"],
        ("asymmetry.meeting", 1): tables[hydralora_asymmetry.OWN, "start"][shared]["A", "space"],
        ("asymmetry.apart", 0): common[nearest]["B", "raw"],
        ("asymmetry.apart_space", 0): own[nearest]["B", "space"],
        ("asymmetry.same_text", 0): common[nearest]["B", "raw"] - 1 / 7,
        ("asymmetry.same_text", 1): quarters[nearest]["B", "raw"] - 1 / 7,
    }
    for (claim, side), number in expected.items():
        assert value(claim, side, found) == pytest.approx(number, abs=0.01), claim
    assert len({round(number, 2) for number in expected.values()}) > 4


@pytest.mark.parametrize("label", [fourierft_expressiveness.FOURIER, fourierft_expressiveness.FAST])
def test_course_table_gives_accuracy_and_epochs(tmp_path, label, monkeypatch):
    course = fourierft_expressiveness.learn(label, 100, epochs=60)
    monkeypatch.setattr(fourierft_expressiveness, "learn", lambda *given: course)
    table, accuracy, loss = fourierft_expressiveness.course_table(label, 100)
    x, y = fourierft_expressiveness.points(100)
    logits = course.network(x)
    assert accuracy == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert loss == pytest.approx(F.cross_entropy(logits, y).item())
    arms = [*fourierft_expressiveness.ADAPTERS]
    found = evidence(tmp_path / "e", {(fourierft_expressiveness.COURSE, arm): [table] for arm in arms})
    assert value("expressiveness.more", 0, found) == max(course.accuracy)
    assert value("expressiveness.frequencies", 0, found) == pytest.approx(-np.log10(len(course.accuracy) - 1))
    assert set(arms) == set(fourierft_expressiveness.ADAPTERS)


def test_selected_neurons_give_overlaps_and_their_chance(train, tmp_path):
    runs = train(NeFT(lr=1e-2, num_neurons=60, tune_steps=2), (0, 1))
    found = evidence(tmp_path / "e", {(neft.SELECTED, neft.CHANGED): list(map(neft.keep_selected, runs))})
    chosen = [selected_neurons.to_set(selected_neurons.list_selected(run)) for run in runs]
    sizes = selected_neurons.count_selectable(runs[0])
    both = selected_neurons.compare_selections(*chosen, sizes.total())
    expected = {("neft.stable", 0): both["overlap"], ("neft.stable", 1): both["chance"]}
    expected["neft.layers", 1] = selected_neurons.compute_expected_overlap(*chosen, sizes)
    for (claim, side), number in expected.items():
        assert value(claim, side, found, (0, 1))[0, 1] == pytest.approx(number), claim
    assert 0 < both["overlap"] < 1


def test_utilization_ranks_give_shifts_between_runs(train, tmp_path):
    observers = [observe.utilization(every=5, size=8)]
    arms = {neft.FEW: Full(lr=1e-3), neft.REVERSED: Full(lr=3e-2), neft.CHANGED: Full(lr=2e-3)}
    runs = {arm: train(method, observers=observers)[0] for arm, method in arms.items()}
    kept = {(neft.UTILIZATION, arm): [neft.keep_utilization(run)] for arm, run in runs.items()}
    found = evidence(tmp_path / "e", kept)
    for side, arm in enumerate((neft.REVERSED, neft.CHANGED)):
        table = rank_shift_of_run(runs[arm].table, selected_neurons.list_trained(runs[arm]), runs[neft.FEW].table)
        sizes = table.groupby("role")["rank_1"].transform("size")
        assert value("neft.use", side, found) == pytest.approx((table["d_rank"].abs() / sizes).mean())
    assert value("neft.use", 0, found) > value("neft.use", 1, found) > 0


def test_tails_give_the_energy_beyond_eight_singular_values(train, tmp_path):
    (run,) = train(Full(lr=1e-2), observers=[observe.second_moments(every=2)])
    found = evidence(tmp_path / "e", {(adapprox.TAILS, adapprox.ADAMW): [keep_tails(run)]})
    end = run.table[run.table["step"] == SETTINGS["steps"]]
    energy = {}
    for quantity in ("moment_sigma", "moment_sigma_dealt"):
        sigma = end[end["quantity"] == quantity].pivot(index="module", columns="index", values="value").to_numpy()
        energy[quantity] = (sigma[:, 8:] ** 2).sum(1) / (sigma**2).sum(1)
    ratio = np.log10(energy["moment_sigma_dealt"] / energy["moment_sigma"]).mean()
    assert value("adapprox.tail", 0, found) == pytest.approx(ratio)
    assert abs(ratio) > 0.01


def test_agreement_beyond_role_and_layer_is_kendalls_tau_of_the_residuals():
    """The residuals are those of least squares on indicators of roles and layers, whose effects cancel."""
    draw = np.random.default_rng(0)
    places = [(f"{layer}.{role}", role, layer) for layer in range(5) for role in ("q", "v", "up")]
    table = pd.DataFrame(places, columns=["module", "role", "layer"])
    indicators = pd.get_dummies(table[["role", "layer"]].astype("str")).to_numpy(np.float64)
    own = draw.standard_normal((2, len(table))) + draw.standard_normal(len(table))
    effects = indicators @ draw.normal(0, 9, (indicators.shape[1], 2))  # of the two runs, far larger
    first, second = (table.assign(value=value) for value in own + effects.T)
    residuals = [each - indicators @ np.linalg.lstsq(indicators, each, rcond=None)[0] for each in own]
    expected = kendalltau(*residuals).statistic
    assert rank_tables.residual_tau(first, second.sample(frac=1, random_state=0)) == pytest.approx(expected)
    assert 0.1 < expected < 0.9
    assert abs(rank_tables.tau(first, second) - expected) > 0.1


def test_residuals_that_are_equal_but_for_rounding_have_no_order():
    """A sum of effects of roles and layers leaves no residual, so nothing is left to agree on."""
    places = [(f"{layer}.{role}", role, layer, of_role * 0.1 + layer * 0.7) for layer in range(4)
              for of_role, role in enumerate(("q", "v", "up"))]  # fmt: skip
    table = pd.DataFrame(places, columns=["module", "role", "layer", "value"])
    assert rank_tables.residual_tau(table, table) == 0


def test_fixed_controls_equal_those_of_their_null(tmp_path):
    """Even ranks in six of the roles and layers of thirds; rank 2 in place of 0, 1, 3 and 4; ranks by random logits."""
    even = pd.DataFrame(blocks(6)).assign(value=4.0)
    uniform = pd.DataFrame({"planted": planted_teacher.RANKS, "found": float(planted_teacher.BUDGET)})
    kept = {(rank_tables.RANKS, adalora.ADAPTED): [even]}
    found = evidence(
        tmp_path / "e", kept | {(planted_ranks.RECOVERY, arm): [uniform] for arm in planted_ranks.ALLOCATORS.values()}
    )
    for claim in ("adalora.ffn", "adalora.top", *(f"planted.{name}_distance" for name in planted_ranks.ALLOCATORS)):
        assert value(claim, 0, found).item() == pytest.approx(value(claim, 1, found).item()), claim
    logits = np.random.default_rng(0).standard_normal((200_000, 12, 8), dtype=np.float32)
    deviations = (logits >= logits.mean(2, keepdims=True)).sum(2).std(1, ddof=1)
    error = deviations.std() / len(deviations) ** 0.5
    assert value("autolora.spread", 1, found).item() == pytest.approx(deviations.mean(), abs=4 * error)


def test_recovery_gives_correlation_and_distance_of_ranks(tmp_path):
    truth = {"h.0.q": 1, "h.0.up": 3, "h.1.q": 0, "h.1.up": 4}
    planted_rank = {("planted_rank", module): {0: float(rank)} for module, rank in truth.items()}
    factors = {"h.0.q": low_rank(1), "h.0.up": low_rank(1, 1), "h.1.q": low_rank(1, 1, 1)}
    run = plant(tmp_path, "a", planted_rank, factors=factors)
    found = evidence(tmp_path / "e", {(planted_ranks.RECOVERY, planted_ranks.ADALORA): [keep_recovery(run)]})
    assert value("planted.adalora_correlation", 0, found) == pytest.approx(
        spearmanr([1, 3, 0, 4], [1, 2, 3, 0]).statistic
    )
    assert value("planted.adalora_distance", 0, found) == pytest.approx(-(0 + 1 + 3 + 4) / 4)
