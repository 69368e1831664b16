"""Use of the allocated rank: counts by brute force, the screen against JSON, and a null that names nothing full."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_inspect import lines, llama, norm_lines, plant
from test_next_command import next_words

import lorascope as ls
from lorascope.analysis.rank_use import ModuleUse, RankUse, random_spectra, used_components
from lorascope.analysis.stored_measurements import PRICE
from lorascope.cli.main import main
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.doctor import completed_checks, observe_ranks
from lorascope.diagnosis.inspection import Inspection, inspect
from lorascope.updates import effective_rank, energy_rank

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
# With the energies in percent, the components in use follow by hand: 91 is enough, 89 is not.
SPECTRA = {1: [91.0, 5.0, 3.0, 1.0], 2: [89.0, 9.0, 1.5, 0.5], 3: [50.0, 30.0, 15.0, 5.0], 4: [40.0, 25.0, 20.0, 15.0]}


def planted_adapter(folder: Path, layers: int) -> tuple[Path, dict[str, int]]:
    """Write an adapter, and return it with the number of components in use of each module."""
    spectra, used = {}, {}
    for layer in range(layers):
        for place, role in enumerate(ROLES):
            name = f"model.layers.{layer}.self_attn.{role}"
            used[name] = 1 + (layer + place) % 4
            spectra[name] = [energy**0.5 for energy in SPECTRA[used[name]]]
    empty = f"model.layers.{layers - 1}.self_attn.v_proj"
    spectra[empty], used[empty] = [0.0] * 4, 0
    return plant(folder, spectra), used


def use_of(inspection: Inspection) -> RankUse:
    assert inspection.rank_use is not None
    return inspection.rank_use


def brute_force(run: Any, module: str) -> int:
    """Count the components with 90% of the energy from the dense update."""
    energies = np.linalg.svd(run.updates()[module].dense(), compute_uv=False) ** 2
    if not energies.any():
        return 0
    return next(k for k in range(1, len(energies) + 1) if energies[:k].sum() >= 0.9 * energies.sum() - 1e-6)


@pytest.mark.parametrize("layers", [1, 6, 32])
def test_used_components_equal_those_planted_and_those_of_a_dense_svd(layers: int, tmp_path: Path) -> None:
    folder, used = planted_adapter(tmp_path / "a", layers)
    run = ls.load(folder)
    use = use_of(inspect(run))
    assert {module.module: module.used for module in use.modules} == used
    assert {module: brute_force(run, module) for module in used} == used
    assert (use.used, use.allocated) == (sum(used.values()), 4 * len(used))


def test_screen_sums_equal_those_of_json_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, used = planted_adapter(tmp_path / "a", 6)
    shown = lines(folder)
    assert main(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder), "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["module"]: float(row["energy_rank"]) for row in table} == used
    start = next(index for index, line in enumerate(shown) if line.startswith("used rank"))
    for row, line in zip(told["roles"], shown[start + 1 :], strict=False):
        role, *cells, total, rank, _ = line.split()
        counts = [tuple(map(int, cell.split("/"))) for cell in cells]
        assert (role, rank) == (row["role"], "4")
        assert total == f"{row['used_rank']}/{row['allocated_rank']}"
        assert tuple(map(sum, zip(*counts, strict=True))) == (row["used_rank"], row["allocated_rank"])
        assert [first for first, _ in counts] == [used[m["module"]] for m in told["modules"] if m["role"] == role]
    sums = told["rank_use"]
    assert sums["used"] == sum(row["used_rank"] for row in told["roles"]) == sum(used.values())
    assert f"{sums['used']} of {sums['allocated']} components have 90% of the energy" in "\n".join(shown)
    wasted = [name for name, count in used.items() if 2 * count <= 4]
    assert sorted(module["module"] for module in sums["half_unused"]) == sorted(wasted)
    first = next(index for index, line in enumerate(shown) if line.startswith("most unused"))
    assert shown[first][15:] == "0 of 4  model.layers.5.self_attn.v_proj"
    assert all(line[15:].startswith("1 of 4  ") for line in shown[first + 1 : first + 3])
    assert shown[first + 3].split()[:2] == ["and", str(len(wasted) - 3)]


def deep_adapter(folder: Path) -> Path:
    """Write an adapter of 32 layers and 7 roles, whose ranks differ."""
    roles = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    roles += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    spectra = {}
    for layer in range(32):
        for place, role in enumerate(roles):
            spectra[f"model.layers.{layer}.{role}"] = [1.0] * (1 + (layer + place) % 4) + [0.01] * (layer % 3)
    spectra["model.layers.7.mlp.up_proj"] = [0.0] * 4
    ranks = {name: len(sigma) for name, sigma in spectra.items()}
    return plant(folder, spectra, rank_pattern=ranks, alpha_pattern=ranks)


def test_deep_adapter_of_different_ranks_shows_both_strips_in_80_columns(tmp_path: Path) -> None:
    folder = deep_adapter(tmp_path / "a")
    inspection = inspect(ls.load(folder))
    uses = {module.module: module for module in use_of(inspection).modules}
    shown = lines(folder)
    assert max(map(len, shown[:-1])) <= 80
    assert len(shown) < 45
    used = next(index for index, line in enumerate(shown) if line.startswith("used rank"))
    most = max(module.rank for module in uses.values())
    for number, row in enumerate(inspection.role_rows(), start=1):
        cells = [module.module for module in inspection.measured if module.role == row["role"]]
        fractions = [uses[name].used / uses[name].rank for name in cells]
        expected = "".join("." if part == 0 else str(min(9, 1 + int(9 * part))) for part in fractions)
        assert shown[used + number][15:47] == expected
        ranks = "".join(str(min(9, 1 + int(9 * uses[name].rank / most))) for name in cells)
        assert shown[used + number][48:80] == ranks
    assert "right: 9 is rank " in shown[used + 9]
    for row, line in zip(inspection.role_rows(), norm_lines(shown)[1:], strict=False):
        assert line.split()[-2:] == [f"{row['used_rank']}/{row['allocated_rank']}", f"{row['effective_rank']:.1f}"]
    assert shown[used + 5][15 + 7] == "."  # the empty module


def test_usual_adapter_fits_45_lines(tmp_path: Path) -> None:
    roles = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    roles += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    spectra = {f"model.layers.{layer}.{role}": [4.0, 2.0, 1.0, 0.5] for layer in range(32) for role in roles}
    shown = lines(plant(tmp_path / "a", spectra))
    assert len(shown) < 45
    assert max(map(len, shown[:-1])) <= 80


def random_use(seed: int, uniform: bool, zero: bool = False) -> RankUse:
    """Return the use of rank by 28 modules of independent random factors, as an adapter that was not trained."""
    draw = np.random.default_rng(seed)
    modules = []
    for number in range(28):
        outer, inner, rank = [(48, 48, 4), (96, 48, 4), (48, 24, 8), (48, 48, 2)][number % 4]
        if uniform:
            B, A = draw.uniform(-1, 1, (outer, rank)), draw.uniform(-1, 1, (rank, inner))
        else:
            B, A = draw.standard_normal((outer, rank)), draw.standard_normal((rank, inner))
        sigma = np.linalg.svd(B @ A * (not zero), compute_uv=False)[:rank]
        modules.append(ModuleUse(str(number), rank, int(energy_rank(sigma)), effective_rank(sigma), (outer, inner)))
    return RankUse(modules)


@pytest.mark.parametrize("uniform", [False, True], ids=["normal", "uniform"])
def test_random_factors_are_not_full(uniform: bool) -> None:
    """At most 5% of adapters are expected with a full module, so 24 of 300 are above 95% of their distribution."""
    uses = [random_use(seed, uniform) for seed in range(300)]
    assert all(len(use.candidates) >= 14 for use in uses)  # by their count, most of them would be full
    assert sum(bool(use.full) for use in uses) <= 24


def test_initial_factors_use_nothing_and_are_not_full() -> None:
    use = random_use(0, uniform=True, zero=True)
    assert (use.used, use.candidates, use.full) == (0, [], [])


def test_mean_of_random_factors_equals_that_of_dense_products() -> None:
    draw = np.random.default_rng(0)
    counts = []
    for _ in range(400):
        B, A = draw.standard_normal((48, 8)), draw.standard_normal((8, 24))
        counts.append(energy_rank(np.linalg.svd(B @ A, compute_uv=False)[:8]))
    use = RankUse([ModuleUse("a", 8, 4, 3.0, (48, 24)), ModuleUse("b", 1, 1, 1.0, (48, 24))])
    error = np.std(counts) * (1 / 400 + 1 / 199) ** 0.5
    assert use.random - 1 == pytest.approx(np.mean(counts), abs=4 * error)


def test_used_components_of_many_spectra_equal_those_of_each() -> None:
    spectra = random_spectra((30, 20), 6, 50, np.random.default_rng(0))
    assert used_components(spectra).tolist() == [energy_rank(sigma) for sigma in spectra]
    assert used_components(np.ones((1, 10))).tolist() == [9]


def test_module_that_needs_all_of_its_rank_unevenly_is_full() -> None:
    """Random factors of rank 4 on a wide matrix need 4 components, as do energies of 40, 25, 20 and 15 percent."""
    shape = (1024, 1024)
    (even,) = random_spectra(shape, 4, 1, np.random.default_rng(3))
    spectra = {"full": np.sqrt(SPECTRA[4]), "random": even, "narrow": np.sqrt(SPECTRA[1]), "three": np.sqrt(SPECTRA[3])}
    modules = []
    for name, sigma in spectra.items():
        modules.append(ModuleUse(name, 4, int(energy_rank(sigma)), effective_rank(sigma), shape))
    use = RankUse(modules)
    assert [module.module for module in use.candidates] == ["full", "random"]
    assert [module.module for module in use.full] == ["full"]
    assert [module.module for module in use.half_unused] == ["narrow"]
    assert use.to_json()["as_random"] == ["random"]
    assert use.random == 16


@pytest.mark.parametrize("name", ["lora", "adalora", "alora", "hydralora", "adapter"])
def test_screen_and_representation_state_the_same_effective_ranks(name: str) -> None:
    run = ls.example(name)
    (stated,) = re.findall(r"^rank +(.+)$", repr(run), re.MULTILINE)
    screen = lines(Path(run.path))
    start = next(index for index, line in enumerate(screen) if line.startswith("rank   "))
    assert stated in " ".join(line[15:] for line in screen[start : start + 3])


@pytest.mark.parametrize("name", ["full", "fourierft", "neft"])
def test_updates_without_factors_have_no_allocated_rank(name: str) -> None:
    run = ls.example(name)
    assert inspect(run).rank_use is None
    assert inspect(run).to_json()["rank_use"] is None
    assert len(norm_lines(lines(Path(run.path)))[0].split()) > 6  # ranks are next to the norms


@pytest.mark.parametrize("name", ["adalora", "alora"])
def test_allocation_by_layer_is_on_the_screen(name: str) -> None:
    run = ls.example(name)
    shown = lines(Path(run.path))
    ranks = run.ranks()
    for row in inspect(run).measured:
        line = next(line for line in shown[5:] if line.startswith(f"{row.role} "))
        cell = line[15:][4 * row.layer :].split()[0]
        assert cell.endswith(f"/{ranks[row.module]}")
    assert shown[-1].split()[2:4] == ["plot", "rank_allocation"]


def next_of(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Return the words of the command that the screen of an adapter ends with."""
    assert main(["inspect", str(folder), *options]) == 0
    return next_words(capsys.readouterr().out)


def test_next_command_prices_half_the_rank_if_it_is_unused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant(tmp_path / "a", llama(2, [10.0, 4.0, 0.1, 0.1]))
    words = next_of(folder, capsys)
    assert words[0] == "price"
    assert words[2:] == ["--model", "NAME", "--task", "NAME", "--ranks", "2"]
    received: list[Any] = []

    def price(*arguments: Any, **options: Any) -> str:
        received.extend(arguments)
        return "priced"

    monkeypatch.setattr("lorascope.insight.price.price", price)
    assert main(words) == 0
    assert received[1:] == ["NAME", "NAME", [2], 1280, 0]


def test_next_command_with_a_base_is_the_dial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from lorascope.papers.setups import planted_teacher

    shutil.copytree(ls.example("adapter").path, tmp_path / "adapter")
    base = str(planted_teacher.base())
    words = next_of(tmp_path / "adapter", capsys, "--base", base)
    assert words[0] == "dial"
    assert Path(words[3]).resolve() == Path(base).resolve()
    received: list[Any] = []

    def dial(*arguments: Any, **options: Any) -> Any:
        received.extend(arguments)
        raise ValueError("read up to here")

    monkeypatch.setattr("lorascope.insight.dial.dial", dial)
    assert main(words) == 2
    assert "read up to here" in capsys.readouterr().err
    assert received[1:] == [words[3], "NAME", None]


def test_doctor_says_what_it_checked_and_what_needs_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "a", llama(2, [10.0, 4.0, 0.1, 0.1]))
    assert main(["doctor", str(folder)]) == 0  # unused rank is not a fault
    shown = " ".join(capsys.readouterr().out.split())
    case = Case(ls.load(folder))
    checked = completed_checks(case)
    assert f"checked {len(checked)} causes: nan, " in shown
    assert {"unused-rank", "full-rank", "untrained"} <= set(checked)
    assert not {"diverged", "overscaled", "rate-zero"} & set(checked)
    assert len(checked) == len(set(checked))
    assert "LS104 unused-rank 16 of 32 components have 90% of the energy" in shown
    assert "needs a model loss at a smaller rank (lorascope price)" in shown
    assert main(["doctor", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checked"] == checked
    assert [found["cause"] for found in told["observations"]] == [found.cause for found in observe_ranks(case)]
    assert told["observations"][0]["evidence"]["used"] == 16


def test_doctor_shows_a_measured_price_as_evidence_of_unused_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plant(tmp_path / "a", llama(2, [10.0, 4.0, 0.1, 0.1]))
    run = ls.load(folder)
    rows = [{"rank": None, "cut": 0.5, "cut_low": 0.4, "cut_high": 0.6}]  # a budget
    rows.append({"rank": 2.0, "cut": 0.002, "cut_low": -0.001, "cut_high": 0.005})
    document = {"rank": 4, "table": rows, "verdict": "wasteful", "tolerance": 0.01, "receipt": {"run": run.id}}
    (folder / PRICE).write_text(json.dumps(document), encoding="utf-8")
    (use, *_) = observe_ranks(Case(run))
    assert "; cut to rank 2: loss +0.002 nats [-0.001, 0.005]" in use.message
    assert use.evidence["cut"] == {"rank": 2, "loss": 0.002, "low": -0.001, "high": 0.005, "tolerance": 0.01}
    assert main(["doctor", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss +0.002 nats" in shown
    # What was measured needs no model any more.
    assert shown.endswith("needs a model what each part learns and forgets (lorascope dial)")
    (folder / PRICE).write_text(json.dumps(document | {"receipt": {"run": "another"}}), encoding="utf-8")
    (use, *_) = observe_ranks(Case(run))
    assert "cut" not in use.evidence


def test_doctor_lists_no_check_of_ranks_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(ls.example("full").path)]) == 0
    shown = capsys.readouterr().out
    assert "unused-rank" not in shown
    assert "needs a model" not in shown
