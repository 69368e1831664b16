"""Checks of one method on one family: which parameters changed, by how much, their roles, and reloading.

The oracle does not use the stored form of an update. It passes the identity through the trained modules, compares with
copies of the initial weights, and takes the roles of a family from a hand-written table (``families``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import pandas as pd
import pytest
import torch
from tolerance import TEXT, TINY, rounding
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.adapters.host_weights import orient_weight
from lorascope.inputs import models
from lorascope.methods.method import AdapterMethod, Method
from lorascope.schema.module_roles import CROSS, FFN

STEPS = 4
ROLES = ("q", "k", "v", "o", *CROSS, *FFN)


@dataclass(kw_only=True)
class Start(observe.Observer):
    """Observer that copies the base's tensors before the first step of every phase."""

    kept: list = field(default_factory=list)

    def config(self):
        return {"name": "Start"}

    def __call__(self, step):
        if step.finished == 0:
            self.kept.append({name: step.model.get_parameter(name).detach().clone() for name in step.base})
        return ()


@dataclass
class Cell:
    """A run and its model, with the freshly loaded ``base`` and W_0 of every phase (``start``)."""

    family: str
    method: Method
    base: nn.Module
    task: Any
    run: ls.Run
    model: nn.Module
    start: list[dict[str, torch.Tensor]]

    def restored(self, run: ls.Run) -> nn.Module:
        """Return a copy of the base with a run restored into it."""
        model = copy.deepcopy(self.base)
        run.restore(model)
        return model.eval()


def check(family: str, method: Method, base: nn.Module, task: Any, out: Path, **settings: Any) -> None:
    """Train a copy of a freshly loaded model and compare the result with the oracle."""
    model, start = copy.deepcopy(base), Start(every=1)
    observers = [observe.norms(every=STEPS), start]
    quiet = {"steps": STEPS, "eval_every": 0, "progress": False, "device": "cpu"}
    run = ls.train(model, task, method, observe=observers, out=out, **quiet, **settings)
    cell = Cell(family, method, base, task, run, model.eval(), start.kept)
    check_start_of_phases(cell)
    check_changed_parameters(cell)
    for phase, before in zip([*run.parents, run], start.kept, strict=True):
        check_norms(cell, phase, before)
    check_reloaded_run(cell)
    check_order_and_roles(cell)


def check_start_of_phases(cell):
    stored = dict(cell.base.named_parameters())
    for base in cell.start:
        assert base.keys() == stored.keys()
        for name, parameter in stored.items():
            assert name in models.missing(cell.base) or torch.equal(parameter, base[name]), name


def check_changed_parameters(cell):
    """Check bitwise which parameters the run itself (the last phase) changed."""
    base = cell.start[-1]
    now = {name: parameter for name, parameter in cell.model.named_parameters() if ".delta." not in name}
    moved = {name for name in base if not torch.equal(now[name], base[name])}
    head = families.HEADS.get(cell.family, set())
    carriers = set(delta.attached_deltas(cell.model))
    if isinstance(cell.method, AdapterMethod):
        assert moved == head
        # HydraLoRA has no default targets, because not all families have a gate projection.
        if cell.method.targets == "all-linear":  # a fused weight as a whole
            expected = {name for name in families.modules(cell.family, "qkv", *ROLES) if "[" not in name}
        else:
            expected = set(families.modules(cell.family, *(cell.method.targets or FFN)))
        assert carriers == expected
        return
    assert carriers == set()
    if cell.method.name == "lisa":
        active = cell.run.table.query("quantity == 'active' and value == 1")["module"].unique()
        still = [block for block in families.blocks(cell.family) if block not in set(active)]
        assert len(still) == len(families.blocks(cell.family)) - len(active) > 0
        assert moved == {name for name in base if not name.startswith(tuple(f"{block}." for block in still))}
    elif cell.method.name == "neft":
        chosen = neurons_of(cell)
        assert moved == head | {f"{module}.weight" for module in chosen}
        assert sum(map(len, chosen.values())) == cell.method.num_neurons
        if cell.family == "phi3":  # gate and input are fused, and only inputs are targets
            fused = [number for module, numbers in chosen.items() if "gate_up" in module for number in numbers]
            assert families.HALF <= min(fused) < max(fused) < 2 * families.HALF
        known = families.modules(cell.family, "ffn_in", "ffn_out")
        for module, numbers in chosen.items():
            host, across = cell.model.get_submodule(module), 0 if known[module][2] == "ffn_out" else 1
            differs = orient_weight(host, now[f"{module}.weight"] != base[f"{module}.weight"])
            assert differs.any(across).nonzero().flatten().tolist() == numbers
    else:
        assert moved == set(base)


def neurons_of(cell) -> dict[str, list[int]]:
    """Return the neurons that the run recorded as selected, by module."""
    rows = cell.run.table.query("quantity == 'selected' and value == 1")
    return {str(module): part["index"].tolist() for module, part in rows.groupby("module", observed=True)}


def changes(cell, run, base) -> dict[str, torch.Tensor]:
    """Compute W - W_0 of every tensor and adapted module of a restored model, in float64."""
    model = cell.restored(run)
    gates = mean_gates(cell, model) if cell.method.name == "hydralora" else {}
    model = copy.deepcopy(model).double()
    found = {name: model.get_parameter(name).detach() - base[name].double() for name in base}
    for module, adapter in delta.attached_deltas(model).items():
        host: Any = model.get_submodule(module)
        if module in gates:  # not a linear map: s sum_i w_i B_i A at mean gates, by definition
            heads = adapter.B.detach().chunk(adapter.number, dim=1)
            found[module] = adapter.scale * sum(
                w * B @ adapter.A.detach() for w, B in zip(gates[module], heads, strict=True)
            )
            continue
        fused, bracket, _ = module.partition("[")
        if bracket:
            weight = host.take(orient_weight(host.fused, base[f"{fused}.weight"])).double()
        else:
            weight = orient_weight(host, base[f"{module}.weight"]).double()
        with torch.no_grad():
            unit = torch.eye(weight.shape[1], dtype=torch.float64)
            found[module] = (host(unit) - host(torch.zeros_like(unit))).T - weight
    return found


@torch.no_grad()
def mean_gates(cell, model) -> dict[str, torch.Tensor]:
    """Average softmax(W_g x) over all tokens of the first validation rows, one row per pass and so without padding."""
    task = cell.task.fit(model)
    longest = cell.run.meta.settings["max_length"]
    rows = task.encode(models.processor(model), task.split("validation").head(cell.method.gate_rows), longest)
    seen: dict[str, list] = {name: [] for name in delta.attached_deltas(model)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda host, given, kept=kept: kept.append((given[0] @ host.delta.router.T).softmax(-1).flatten(0, -2))
        )
        for name, kept in seen.items()
    ]
    for row in range(len(rows)):
        model(**rows.batch([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(kept).double().mean(0) for name, kept in seen.items()}


def check_norms(cell, run, base):
    """Check the recorded update_norm of every module and block after the last step."""
    found = changes(cell, run, base)
    adapted = {module for module in found if module not in base}
    phase = run.meta.method["name"]
    if phase in ("full", "lisa", "adapprox"):
        trained = set(base)
    else:
        trained = families.HEADS.get(cell.family, set()) | {
            f"{name}.weight" for name in neurons_of(cell) if phase == "neft"
        }
    wanted = {module: found[module].norm().item() for module in adapted}
    wanted |= {name.removesuffix(".weight"): found[name].norm().item() for name in trained if name.endswith(".weight")}
    for block in families.blocks(cell.family):
        inside = {name for name in trained | adapted if name.startswith(f"{block}.")}
        if inside:
            wanted[block] = torch.stack([found[name].norm() for name in inside]).norm().item()
    rows = run.table[(run.table["quantity"] == "update_norm") & (run.table["step"] == run.table["step"].max())]
    recorded = dict(zip(rows["module"].astype(str), rows["value"], strict=True))
    assert recorded.keys() == wanted.keys()
    for module, norm in wanted.items():
        near = pytest.approx(norm, rel=rounding(terms=TINY, growth=4 * TEXT), abs=1e-9)  # a small difference
        assert recorded[module] == near, module
    moved = [norm for module, norm in wanted.items() if norm > 1e-4]
    assert len(moved) > len(wanted) / 4  # otherwise the comparison would be weak


@torch.no_grad()
def check_reloaded_run(cell):
    loaded = ls.load(cell.run.path)
    pd.testing.assert_frame_equal(loaded.table, cell.run.table)
    pd.testing.assert_frame_equal(loaded.summary(), cell.run.summary())
    task = cell.task.fit(cell.model)
    batch = task.encode(models.processor(cell.model), task.split("test")).batch(range(5))
    assert torch.equal(cell.restored(loaded)(**batch).logits, cell.model(**batch).logits)


def check_order_and_roles(cell):
    """Check stack, layer and role of each module, and that the encoder and lower layers come first."""
    known = families.modules(cell.family, "qkv", "q", "k", "v", "o", *CROSS, *FFN)
    summary = cell.run.summary()
    rows = [row for row in summary.itertuples() if row.module in known]
    assert rows
    for row in rows:
        assert (row.stack, row.layer, row.role) == known[row.module], row.module
    places = [(list(families.PLACES[cell.family]).index(row.stack), row.layer) for row in rows]
    assert places == sorted(places)
    stacks = list(families.PLACES[cell.family])
    layers = [(stack, layer) for stack in stacks for layer in range(families.BLOCKS)]
    held = {known[row.module][:2] for row in rows}
    chart = ls.plots.update_norm_heat(cell.run)
    assert list(chart.x.order) == [
        f"{stack} {layer}" if len(stacks) > 1 else f"{layer}" for stack, layer in layers if (stack, layer) in held
    ]
