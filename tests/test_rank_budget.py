"""Rank budgets: energy and error compared with matrices, and the output of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import SPECTRA, low_rank, plant, plant_spectra
from test_cli import complaint, run

import lorascope as ls
from lorascope.export import RankBudget, rank_pattern, select_components


@pytest.fixture
def spectral(tmp_path: Path) -> ls.Run:
    return plant_spectra(tmp_path)


@pytest.fixture
def drawn(tmp_path: Path) -> ls.Run:
    draw = np.random.default_rng(0)
    sizes = {"h.0.q": (6, 5, 3), "h.0.up": (9, 5, 4), "h.1.q": (6, 5, 2)}
    pairs = {name: (draw.standard_normal((o, r)), draw.standard_normal((r, i))) for name, (o, i, r) in sizes.items()}
    return plant(tmp_path, "drawn", {}, factors=pairs)


def truncated(run: ls.Run, chosen: RankBudget) -> dict[str, np.ndarray]:
    """Return every update as a matrix of its kept singular components."""
    found = {}
    for name, update in run.updates().items():
        U, sigma, Vt = np.linalg.svd(update.dense(), full_matrices=False)
        mask = np.zeros(len(sigma))
        mask[: len(chosen.kept[name])] = chosen.kept[name]
        found[name] = (U * (sigma * mask)) @ Vt
    return found


@pytest.mark.parametrize("budget", [0.1, 0.34, 0.5, 7, 1.0])
def test_error_and_energy_match_the_matrices(budget: float, drawn: ls.Run) -> None:
    chosen = select_components(drawn, budget)
    whole = {name: update.dense() for name, update in drawn.updates().items()}
    lost = {name: np.linalg.norm(whole[name] - part) for name, part in truncated(drawn, chosen).items()}
    norms = {name: np.linalg.norm(matrix) for name, matrix in whole.items()}
    all_lost, all_norms = np.linalg.norm(list(lost.values())), np.linalg.norm(list(norms.values()))
    assert chosen.error == pytest.approx(all_lost / all_norms, abs=1e-7)
    assert chosen.energy == pytest.approx(1 - (all_lost / all_norms) ** 2, abs=1e-12)
    table = chosen.modules.set_index("module")
    for name in whole:
        assert table.loc[name, "error"] == pytest.approx(lost[name] / norms[name], abs=1e-7)
        assert table.loc[name, "share"] == pytest.approx(1 - (lost[name] / norms[name]) ** 2, abs=1e-12)
    sides = {name: sum(matrix.shape) for name, matrix in whole.items()}
    assert table["parameters"].to_dict() == {name: drawn.ranks()[name] * sides[name] for name in whole}
    assert table["parameters_kept"].to_dict() == {name: chosen.ranks[name] * sides[name] for name in whole}


def test_kept_components_have_the_smallest_error_at_their_ranks(drawn: ls.Run) -> None:
    """Eckart-Young: compare with the best matrix of the kept rank, by alternating least squares from several starts."""
    chosen, draw = select_components(drawn, 0.5), np.random.default_rng(1)
    assert 0 < sum(chosen.ranks.values()) < sum(drawn.ranks().values())
    for name, update in drawn.updates().items():
        matrix, rank = update.dense(), chosen.ranks[name]
        best = np.inf
        for _ in range(5 * bool(rank)):
            right = draw.standard_normal((rank, matrix.shape[1]))
            for _ in range(300):
                left = np.linalg.lstsq(right.T, matrix.T, rcond=None)[0].T
                right = np.linalg.lstsq(left, matrix, rcond=None)[0]
            best = min(best, float(np.linalg.norm(matrix - left @ right)))
        error = float(chosen.modules.set_index("module").loc[name, "error"])
        assert error * np.linalg.norm(matrix) == pytest.approx(best if rank else np.linalg.norm(matrix), rel=1e-6)


def test_select_components_by_scores_ignores_singular_values(spectral: ls.Run) -> None:
    scores = {
        "h.0.q": np.array([0.1, 0.9, 0.2]),
        "h.0.up": np.array([0.3, -1.0]),
        "h.1.q": np.array([0.8, 0.7]),
        "h.1.up": np.array([0.0]),  # shorter: singular values of 0 have no score
    }
    chosen = select_components(spectral, 4, scores=scores)
    assert {name: kept.tolist() for name, kept in chosen.kept.items()} == {
        "h.0.q": [False, True, False],
        "h.0.up": [True, False],
        "h.1.q": [True, True],
        "h.1.up": [False, False, False],
    }
    energy = 1.0**2 + 4.0**2 + 0.1**2 + 0.05**2
    assert chosen.energy == pytest.approx(energy / sum(s**2 for sigma in SPECTRA.values() for s in sigma))
    keywords = rank_pattern(spectral, 4, scores=scores)
    assert sorted(keywords["target_modules"]) == ["h.0.up", "q"]  # all modules that are called q, and one called up
    assert keywords["rank_pattern"] == {r"^h\.1\.q": 2}


@pytest.mark.parametrize("wrong", [{}, {"h.0.q": [1.0, np.nan, 0.0]}, {"h.0.q": [1.0] * 4}])
def test_select_components_with_invalid_scores_raises(wrong: dict[str, Any], spectral: ls.Run) -> None:
    scores = {name: np.ones(len(sigma)) for name, sigma in SPECTRA.items() if name != "h.0.q"}
    with pytest.raises(ValueError, match=r"^scores of h\.0\.q must be 0 to 3 finite numbers, got "):
        select_components(spectral, 2, scores=scores | {name: np.array(values) for name, values in wrong.items()})


def test_zero_update_has_no_error(tmp_path: Path) -> None:
    idle = plant(tmp_path, "idle", {}, factors={"h.0.q": low_rank(0.0), "h.1.q": low_rank(2.0)})
    table = select_components(idle, 0.5).modules.set_index("module")
    assert table["share"].to_dict() == {"h.0.q": 1.0, "h.1.q": 1.0}
    assert table["error"].to_dict() == {"h.0.q": 0.0, "h.1.q": 0.0}


def test_export_command_prints_energy_and_error(spectral: ls.Run, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: singular values 5, 4, 3 and the first 1 are kept, of energies 26.25, 17, 0.0125 and 11."""
    _, out, _ = run(capsys, "export", spectral.path, "--rank-pattern", "--budget", 4)
    comments = out[out.index("# Kept") :]
    remarks = comments.replace("\n#   ", " ").splitlines()
    assert remarks[:-2] == [
        "# Kept: 4 of 10 components, in 3 of 4 modules; 36 of 90 parameters.",
        "# Energy kept (squared singular values): 94.0%; lowest in h.1.q: 0.0%.",
        "# Relative error of the pruned adapter (Frobenius): 24.5%, the minimum for these ranks; "
        "100.0% in that module.",
        "# Every module keeps its alpha, so its scale alpha / rank grows as its rank falls.",
        "# Singular values do not show the effect on the task: measure the loss with --model NAME --task NAME.",
    ]
    assert remarks[-2].startswith("# Published results of LoRAs trained at a smaller rank from the start: ")
    assert "none of the adapters was pruned" in remarks[-1]
    assert all(word not in out.lower() for word in ("accuracy", "expect"))
    _, out, err = run(capsys, "export", spectral.path, "--rank-pattern", "--budget", 4, "--json")
    assert err == comments
    assert "#" not in out


def test_export_command_wrong_use_of_budget_options_fails(spectral: ls.Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("export", spectral.path, "--rank-pattern")
    assert "requires --model NAME and --task NAME" in complaint(capsys, *words, "--budget", 4, "--by", "ablation")
    assert "--model and --task require each other" in complaint(capsys, *words, "--budget", 4, "--model", "m")
    assert "--model requires --budget" in complaint(capsys, *words, "--model", "m", "--task", "t")
    assert "--by" in complaint(capsys, *words, "--budget", 4, "--by", "size")


def test_residual_has_all_its_components(fresh_bert: Any, task: Any, tmp_path: Path) -> None:
    """The update of PiSSA has twice the rank that trains."""
    settings = {"steps": 3, "batch_size": 4, "progress": False, "device": "cpu", "eval_size": 8}
    run = ls.train(fresh_bert, task, ls.PiSSA(rank=2, lr=1e-2), out=tmp_path / "run", **settings)
    whole = {name: update.dense() for name, update in run.updates().items()}
    for budget in (0.3, 0.8, 1.0):
        chosen = select_components(run, budget)
        lost = [np.linalg.norm(whole[name] - part) for name, part in truncated(run, chosen).items()]
        total = np.linalg.norm([np.linalg.norm(matrix) for matrix in whole.values()])
        assert chosen.error == pytest.approx(np.linalg.norm(lost) / total, abs=1e-6)
    exported = ls.load(ls.export.to_peft(run, tmp_path / "peft", budget=1.0))
    for name, update in exported.updates().items():
        assert update.dense() == pytest.approx(whole[name], abs=1e-6 * np.abs(whole[name]).max())
