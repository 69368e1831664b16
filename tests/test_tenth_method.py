"""A method with its own form of update is one file of the package, or one of another package, and uses every door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from killing import SETTINGS
from krona import KronA, Kronecker
from temporary_package import build, run_tests

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.cli.main import main
from lorascope.inputs import models
from lorascope.methods import METHODS
from lorascope.schema.records import QUANTITIES
from lorascope.updates import FORMS

# Its class statements registered them for all tests of this process.
KRONA = {"left_norm": QUANTITIES.pop("left_norm")}
del METHODS["krona"], FORMS["krona"]


def test_file_in_the_package_is_found_and_tested_without_another_edit(tmp_path: Path) -> None:
    package = build(tmp_path, {"methods/yours.py": Path(__file__).with_name("krona.py")})
    files = ("contract", "test_families.py", "test_method_registry.py", "test_cli.py", "test_grid.py")
    # Ten of the contract and the families, the options of the command line, the fields of a sweep, and the facade.
    assert run_tests(package, *files, "-k", "krona or test_facade or test_every_public_name") == 14


@pytest.fixture(scope="module", autouse=True)
def registered():
    METHODS["krona"], FORMS["krona"] = KronA, Kronecker
    QUANTITIES.update(KRONA)
    yield
    del METHODS["krona"], FORMS["krona"], QUANTITIES["left_norm"]


@pytest.fixture(scope="module")
def trained(registered, bert, task, tmp_path_factory):
    model = models.load(bert, task=task)
    out = tmp_path_factory.mktemp("krona") / "run"
    observe = [ls.observe.norms(every=1), ls.observe.factors(every=1)]
    return ls.train(model, task, KronA(), out=out, observe=observe, **SETTINGS), model


def test_norms_and_own_quantity_are_recorded(trained) -> None:
    run, model = trained
    table = ls.load(run.path).table
    last = table[table["step"] == run.meta.states["last"].step].set_index(["quantity", "module"])["value"]
    deltas = attached_deltas(model)
    assert deltas
    for module, delta in deltas.items():
        dense = delta.weight().detach().double().numpy()
        assert last["update_norm", module] == pytest.approx(np.linalg.norm(dense), rel=1e-5)
        assert last["left_norm", module] == pytest.approx(float(delta.left.detach().norm()))
        sigma = np.linalg.svd(dense, compute_uv=False)
        assert last["stable_rank", module] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
    first = table[(table["quantity"] == "update_norm") & (table["step"] == 0) & (table["role"] != "block")]
    assert (first["value"] == 0).all()


def test_stored_updates_have_the_form(trained) -> None:
    run, model = trained
    updates = ls.load(run.path).updates()
    assert set(updates) == set(attached_deltas(model))
    for module, update in updates.items():
        assert type(update) is Kronecker
        assert (update.dense() == attached_deltas(model)[module].update().dense()).all()


def test_same_call_returns_the_stored_run(trained, bert, task) -> None:
    run, _ = trained
    observe = [ls.observe.norms(every=1), ls.observe.factors(every=1)]
    again = ls.train(models.load(bert, task=task), task, KronA(), out=run.path, observe=observe, **SETTINGS)
    assert again.meta == run.meta


def test_run_is_drawn_inspected_and_doctored(trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    for name in ("update_norm", "update_norm_heat", "norm_over_steps", "spectrum"):
        chart = getattr(ls.plots, name)(run)
        assert len(chart.data)
        assert chart.plotly().data
        chart.save(tmp_path / f"{name}.svg")
    assert main(["inspect", str(run.path)]) == 0
    assert "KronA" in capsys.readouterr().out
    code = main(["doctor", str(run.path), "--json"])
    assert code == bool(json.loads(capsys.readouterr().out)["findings"])
    assert main(["plot", "update_norm", str(run.path), "-o", str(tmp_path / "cli.svg")]) == 0


def test_export_is_refused_in_one_line(trained, tmp_path: Path) -> None:
    run, _ = trained
    with pytest.raises(ValueError, match="is not a product B A") as raised:
        ls.export.to_peft(run, tmp_path / "adapter")
    assert "\n" not in str(raised.value)
