"""Run folders: reading, checking, copying and displaying them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import killing
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from forks import same
from planted import plant_spectra
from tolerance import TEXT, TINY, near
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.adapters.delta import Delta
from lorascope.cli.main import main
from lorascope.inputs import models, tasks
from lorascope.methods import Full, LoRA
from lorascope.methods.method import Method, Phase, train_adapters
from lorascope.runs.layout import Lazy
from lorascope.runs.manifest import SCHEMA
from lorascope.runs.run import Run

FAST = {"steps": 6, "batch_size": 8, "eval_every": 2, "eval_size": 16, "progress": False, "device": "cpu"}
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    """(model, run) of a LoRA with two ranks, its factors recorded at every third step."""
    model = models.load(bert, task=task)
    names = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")]
    method = LoRA(rank=dict(zip(names, (1, 2, 2, 2), strict=True)), lr=1e-2)
    observers = [observe.norms(every=3), observe.factors(every=3)]
    return model, ls.train(model, task, method, observe=observers, out=tmp_path_factory.mktemp("runs") / "run", **FAST)


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the run's folder that a test may damage."""
    return Path(shutil.copytree(trained[1].path, tmp_path / "run"))


# -- reading --------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(meta | changes))


def test_read_folder_without_run_json_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no run\.json"):
        Run.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere as a run: it has no run\.json"):
        Run.read(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99], ids=["nothing", "a byte", "half", "all but the end"])
def test_read_truncated_run_json_raises_one_line(kept, copied):
    data = (copied / "run.json").read_bytes()
    (copied / "run.json").write_bytes(data[: kept if kept in (0, 1) else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"cannot read .*run\.json") as caught:
        Run.read(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", '"run"', "{}", '{"schema": null}', "\xff"])
def test_read_run_json_of_wrong_content_raises(content, copied):
    (copied / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cannot read .*run\.json"):
        Run.read(copied)


def test_read_newer_schema_raises(copied):
    edit(copied, schema=SCHEMA + 1)
    with pytest.raises(ValueError, match=f"schema must be <= {SCHEMA}, got {SCHEMA + 1}; update"):
        Run.read(copied)


def test_read_module_that_is_listed_twice_raises_one_line(copied, capsys):
    modules = json.loads((copied / "run.json").read_text(encoding="utf-8"))["modules"]
    edit(copied, modules=[*modules, modules[2]])
    with pytest.raises(ValueError, match=f"modules must have one row each, got 2 rows of {modules[2]['module']}$"):
        Run.read(copied)
    assert main(["inspect", str(copied)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


FILES = {
    "records.parquet": lambda run: run.table,
    "snapshots/step-000006.safetensors": lambda run: run.factors(),
    "state/last.safetensors": lambda run: run.restore(nn.Linear(1, 1)),
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("damage", ["a bit", "the end", "missing"])
def test_changed_or_missing_file_is_named_in_the_error(name, damage, copied):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(data if damage == "a bit" else data[:-1])
    expected = {"missing": FileNotFoundError}.get(damage, ValueError)
    message = f"cannot read {name} of run" if damage == "missing" else f"{name}: checksum differs"
    if damage == "missing" and name.startswith("snapshots"):
        expected, message = ValueError, "step must be one of .* got 6"
    with pytest.raises(expected, match=message):
        FILES[name](Run.read(copied))


def test_invalid_table_is_named_in_the_error(copied):
    file = copied / "records.parquet"
    pd.read_parquet(file).drop(columns="role").to_parquet(file)
    edit(copied, checksums={"records.parquet": hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(ValueError, match=r"^cannot read .*records\.parquet: missing columns role; expected"):
        Run.read(copied).table  # noqa: B018


def test_file_without_checksum_is_not_read(copied):
    shutil.copy(copied / "snapshots/step-000006.safetensors", copied / "snapshots/step-000005.safetensors")
    with pytest.raises(FileNotFoundError, match=r"cannot read snapshots/step-000005"):
        Run.read(copied).factors(5)


# -- contents ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Gated(LoRA):
    """LoRA that saves an array with two named axes, one of them with labels."""

    def records(self, step):
        if step.finished % 3 == 0:
            gates = np.arange(6.0).reshape(2, 3) + step.finished
            yield ls.Snapshot("head/gates", gates, ("domain", "expert"), {"domain": ["film", "music"]})
            yield ls.Snapshot("head/plain", np.array([step.finished], dtype=np.int64))


def test_snapshot_is_in_long_form(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, Gated(), out=tmp_path / "run", **FAST)
    long = run.snapshot("head/gates")
    assert list(long.columns) == ["domain", "expert", "step", "value"]
    assert len(long) == 3 * 6
    assert run.snapshot_steps("head/gates") == [0, 3, 6]
    cell = long.query("domain == 'music' and expert == 2 and step == 3")
    assert cell["value"].tolist() == [5 + 3]
    one = run.snapshot("head/gates", step=6)
    assert one["value"].tolist() == [6, 7, 8, 9, 10, 11]
    assert run.snapshot("head/plain", step=3).to_dict("list") == {"axis0": [0], "step": [3], "value": [3]}
    with pytest.raises(ValueError, match=f"unknown snapshot 'head/gate' in run {run.id}; did you mean 'head/gates'"):
        run.snapshot("head/gate")
    with pytest.raises(ValueError, match=r"step must be one of \[0, .*6\].* got 5"):
        run.snapshot("head/gates", step=5)


def test_factors_and_updates_match_the_requested_step(trained):
    model, run = trained
    assert set(run.factors()) == set(run.updates()) == set(delta.attached_deltas(model))
    for module, adapter in delta.attached_deltas(model).items():
        weight = adapter.weight().detach().numpy()
        assert run.updates()[module].dense() == near(weight, terms=8 + 1)
        A, B = (run.factors()[module][name] for name in ("A", "B"))
        assert adapter.scale * B @ A == near(weight, terms=8 + 1)
    assert run.factors(0)[QUERY]["B"].any() == np.False_
    assert run.factors(3)[QUERY]["B"].any()
    with pytest.raises(KeyError, match="unknown module 'query'; expected one of bert"):
        run.factors()["query"]
    assert run.ranks() == {module: adapter.A.shape[0] for module, adapter in delta.attached_deltas(model).items()}


def test_state_file_has_parameter_names_as_keys(trained):
    from safetensors.torch import load_file

    model, run = trained
    stored = load_file(run.path / "state/last.safetensors")
    parameters = dict(model.named_parameters())
    assert (
        {name for name, p in parameters.items() if p.requires_grad}
        <= stored.keys()
        <= parameters.keys() | dict(model.named_buffers()).keys()
    )
    assert all(torch.equal(parameters[name], stored[name]) for name in stored.keys() & parameters.keys())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_config_gives_peft_the_same_adapter(family, task, tmp_path, request):
    """PEFT creates the same modules, shapes and scales; ranks and scales differ between modules."""
    folder = request.getfixturevalue(family)
    model = models.load(folder, task=task)
    found = ls.module_table.match(ls.module_table.describe(model), ("all-linear", "embed"))
    ranks = {name: 2 if number % 3 else 3 + number % 2 for number, name in enumerate(found)}
    run = ls.train(model, task, LoRA(rank=ranks, alpha=6.0), out=tmp_path / "run", **FAST)
    keywords = run.lora_config()
    assert keywords["r"] == 2
    assert json.loads(json.dumps(keywords)) == keywords
    config = peft.LoraConfig(**keywords, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(models.load(folder, task=task), config).base_model.model
    layers = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    assert layers.keys() == delta.attached_deltas(model).keys()
    for name, adapter in delta.attached_deltas(model).items():
        layer = layers[name]
        embedding = "default" in layer.lora_embedding_A
        A = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
        B = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
        assert (A.shape, B.shape) == (adapter.A.shape, adapter.B.shape)
        assert layer.scaling["default"] == adapter.scale


class Shifted(Delta):
    def __init__(self, host):
        super().__init__()
        self.M = nn.Parameter(torch.full(delta.host_weight(host).shape, 0.01))

    def weight(self):
        return self.M


@dataclass(kw_only=True)
class Matrices(Method):
    """Method whose updates have no factors."""

    def attach(self, model):
        delta.attach(model, {QUERY: Shifted(model.get_submodule(QUERY))})
        train_adapters(model)


def test_lora_config_without_factors_raises(bert, task, tmp_path):
    for number, method in enumerate((Full(), Matrices())):
        run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / str(number), **FAST)
        with pytest.raises(ValueError, match="no factored update of rank >= 1"):
            run.lora_config()
    assert run.ranks() == {QUERY: 32}
    assert list(run.factors()[QUERY]) == ["M"]
    assert run.summary().query("role == 'q'")["update_norm"].tolist() == pytest.approx(
        [float(delta.attached_deltas(models_of(run, bert, task))[QUERY].M.detach().norm())]
    )


def models_of(run, folder, task, state="last"):
    model = models.load(folder, task=task)
    run.restore(model, state=state, method=Matrices() if run.meta.method["name"] == "matrices" else None)
    return model


# -- summary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [True, False], ids=["norms recorded", "nothing recorded"])
@pytest.mark.parametrize("state", ["last", "best"])
@pytest.mark.parametrize(
    "method", [LoRA(lr=1e-2, targets=("all-linear", "embed")), Full(lr=1e-2)], ids=["lora", "full"]
)
def test_summary_matches_dense_matrices(method, state, watched, bert, task, tmp_path, monkeypatch):
    from lorascope.training.session import Session

    score = Session._score

    def best_at_two(self, rows):
        """Let the validation get worse after step 2."""
        found = score(self, rows)
        if rows is self.validation:
            found.correct[:] = self.step.finished == 2
        return found

    monkeypatch.setattr(Session, "_score", best_at_two)
    observers = [observe.norms(every=4)] if watched else []
    run = ls.train(models.load(bert, task=task), task, method, observe=observers, out=tmp_path / "run", **FAST)
    assert run.meta.states["best"].step == 2
    assert str(run.path) in repr(run)
    summary = run.summary(state=state).set_index("module")
    everything = run.summary(all=True, state=state)
    assert list(everything["module"]) == list(run.modules.query("role not in ('block', 'norm')")["module"])
    if isinstance(method, Full) and not watched:
        assert summary.empty
        return
    start, model = models.load(bert, task=task), models_of(run, bert, task, state)
    weights = dict(start.named_modules())
    head = ["classifier"] if watched else []
    if isinstance(method, Full):
        assert list(summary.index) == list(everything["module"])
    else:
        assert sorted(summary.index) == sorted([*delta.attached_deltas(model), *head])
    assert summary["exact"].all()
    for module, row in summary.drop(index=head).iterrows():
        before = weights[module].weight.detach().double()
        now = model.get_submodule(module).weight.detach().double()
        change = now - before
        if module in delta.attached_deltas(model):
            assert torch.equal(now, before)
            adapter = delta.attached_deltas(model)[module]
            change = adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()
            change = change.T if change.shape != before.shape else change
            assert row["rank"] == 8
        assert row["update_norm"] == near(change.norm(), terms=TINY, growth=TEXT)
        if watched:
            assert row["weight_norm"] == near((before + change).norm(), terms=TINY)
            assert row["relative_update"] == near(change.norm() / before.norm(), terms=TINY, growth=TEXT)
        sigma = torch.linalg.svdvals(change).numpy()
        if isinstance(method, LoRA) or state == "last":
            p = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
            assert row["stable_rank"] == near((sigma**2).sum() / sigma[0] ** 2, terms=TINY, growth=4 * TEXT)
            assert row["effective_rank"] == near(
                math.exp(-(p * np.log(p)).sum()), terms=TINY, growth=40 * TEXT
            )  # p near 0
        else:
            assert math.isnan(row["stable_rank"])


# -- copying, display -----------------------------------------------------------------------------------------------


def test_save_copies_the_run(trained, bert, task, tmp_path):
    model, run = trained
    saved = run.save(tmp_path / "kept")
    assert saved.path == tmp_path / "kept"
    assert saved.table.equals(run.table)
    other = models.load(bert, task=task)
    ls.load(tmp_path / "kept").restore(other)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    with pytest.raises(FileExistsError, match="kept: it exists"):
        run.save(tmp_path / "kept")


@dataclass(kw_only=True)
class TwoPhases(Full):
    def phases(self, base):
        yield Phase(Full(), "search", steps=2)
        yield Phase(LoRA(), "retrain")


def test_save_copies_a_phase_with_earlier_phases(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, TwoPhases(), out=tmp_path / "run", **FAST)
    saved = run.save(tmp_path / "kept")
    assert [parent.id for parent in saved.parents] == [parent.id for parent in run.parents]
    assert saved.parents[0].path.resolve() == (tmp_path / "kept/1-search").resolve()
    assert ls.load(tmp_path / "kept").id == run.id
    assert run.parents[0].save(tmp_path / "search").finished


def test_unfinished_run_shows_its_status_and_error(copied):
    meta = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    for status, extra in (("running", {}), ("broken", {"error": "the loss became nan at step 5 of 6"})):
        edit(copied, **meta | {"status": status, "states": {}, "checksums": {}, "test": {}} | extra)
        run = Run.read(copied)
        assert f"seed 0, {status}" in repr(run)
        assert extra.get("error", "") in run._repr_html_()
        assert not run.finished
        with pytest.raises(FileNotFoundError, match=f"cannot read records.parquet .* is {status}: the same call"):
            run.table  # noqa: B018
        with pytest.raises(ValueError, match=f"cannot read state 'last' .* is {status}"):
            run.summary()


# -- identity -------------------------------------------------------------------------------------------------------


def test_train_in_another_process_gives_the_same_run(bert, forks, tmp_path):
    """Ids and files are equal although Python hashes strings with another seed."""
    here, there = tmp_path / "here", tmp_path / "there"
    assert forks("lora", there) == 0
    task, method = tasks.load(str(forks.table)), killing.METHODS["lora"]
    ls.train(models.load(bert, task=task), task, method, observe=killing.observers(), out=here, **killing.SETTINGS)
    same(here, there)
    assert len(ls.load(here).id) == 12


def test_lazy_contains_computes_no_value() -> None:
    made: list[str] = []
    lazy = Lazy(["a", "b"], lambda name: made.append(name) or name.upper())
    assert "a" in lazy
    assert "c" not in lazy
    assert not made
    assert lazy.get("b") == "B"
    assert made == ["b"]


def test_snapshot_of_an_unknown_name_or_step_is_named(tmp_path: Path) -> None:
    run = plant_spectra(tmp_path)
    name, step = run.snapshot_names()[0], run.snapshot_steps(run.snapshot_names()[0])[0]
    with pytest.raises(ValueError, match=r"^unknown snapshot 'nope'"):
        run.snapshot("nope", step)
    assert len(run.snapshot(name, step))


def test_only_adapters_are_converted_or_summed(tmp_path: Path) -> None:
    run = plant_spectra(tmp_path)
    only = r"^only adapters are summed or converted, got run .*: export it with to_peft"
    with pytest.raises(ValueError, match=only):
        ls.export.convert(run, tmp_path / "x", "mlx")
    with pytest.raises(ValueError, match=only):
        ls.export.sum_adapters([run, run], tmp_path / "x")
