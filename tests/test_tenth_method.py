"""A method with its own form of update, defined in this file, uses every door without an edit of the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import SETTINGS
from tiny import inputs
from torch import Tensor, nn

import lorascope as ls
from lorascope.adapters.delta import Delta, attached_deltas, fold, host_weight, to_array
from lorascope.cli.main import main
from lorascope.inputs import models
from lorascope.methods import METHODS
from lorascope.methods.method import AdapterMethod, Step, config, from_config
from lorascope.schema.records import QUANTITIES, Item, Quantity, Record, register
from lorascope.updates import FORMS, Update


@dataclass(frozen=True, eq=False)
class Kronecker(Update, form="krona"):
    """The update kron(left, right)."""

    left: np.ndarray
    right: np.ndarray
    required = frozenset({"left", "right"})

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    def dense(self) -> np.ndarray:
        return np.kron(self.left.astype(np.float64), self.right.astype(np.float64))

    def to_factors(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Kronecker:
        return cls(factors["left"], factors["right"])


@dataclass(kw_only=True)
class KronA(AdapterMethod, name="krona"):
    """Update that is a Kronecker product of a small and a large factor."""

    size: int = 4
    targets: str | tuple[str, ...] = ("q", "v")
    lr: float = 1e-2
    head_lr: float = 1e-2

    def delta(self, name: str, host: nn.Module) -> KronDelta:
        return KronDelta(host, self.size)

    def records(self, step: Step) -> Iterable[Item]:
        for module, delta in attached_deltas(step.model).items():
            yield Record("left_norm", float(delta.left.detach().norm()), module)


class KronDelta(Delta):
    def __init__(self, host: nn.Module, size: int) -> None:
        super().__init__()
        outer, inner = host_weight(host).shape
        self.left = nn.Parameter(torch.randn(size, size) / size)
        self.right = nn.Parameter(torch.zeros(outer // size, inner // size))

    def weight(self) -> Tensor:
        return torch.kron(self.left, self.right)

    def update(self) -> Kronecker:
        return Kronecker(to_array(self.left), to_array(self.right))


# The statements above registered both, for all tests of this process.
del METHODS["krona"], FORMS["krona"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    METHODS["krona"], FORMS["krona"] = KronA, Kronecker
    register(
        "train the tenth method",
        left_norm=Quantity("norm of the small factor", definition="Frobenius norm of the left factor"),
    )
    yield
    del METHODS["krona"], FORMS["krona"], QUANTITIES["left_norm"]


@pytest.fixture(scope="module")
def trained(registered, bert, task, tmp_path_factory):
    model = models.load(bert, task=task)
    out = tmp_path_factory.mktemp("krona") / "run"
    observe = [ls.observe.norms(every=1), ls.observe.factors(every=1)]
    return ls.train(model, task, KronA(), out=out, observe=observe, **SETTINGS), model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def test_method_survives_json() -> None:
    assert from_config(json.loads(json.dumps(config(KronA(size=2))))) == KronA(size=2)
    assert ls.METHODS["krona"] is KronA


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


def test_run_is_restored_and_folded(trained, bert, task) -> None:
    run, model = trained
    again = models.load(bert, task=task)
    ls.load(run.path).restore(again)
    assert torch.equal(logits(again), logits(model))
    again.double()
    before = logits(again)
    fold(again)
    assert torch.allclose(logits(again), before, rtol=0, atol=1e-10)


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
