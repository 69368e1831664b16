"""Export of HydraLoRA to PEFT: rejected with a router, exact at fixed gate weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import complaint, run
from test_export import by_the_card, distance, layers, trained
from test_hydralora_files import write
from tolerance import TINY, rounding

import lorascope as ls
from lorascope.adapters import delta
from lorascope.export import rank_pattern, to_peft
from lorascope.inputs import models
from lorascope.methods import HydraLoRA
from lorascope.runs.run import Run

TEXTS = ["the film was great", "a very boring plot and music", "lovely"]


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "split"])
def hydra(request: pytest.FixtureRequest, bert: str, task: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    method = HydraLoRA(rank=2, shared_a=request.param, lr=0.05, head_lr=0.05)
    return trained(bert, task, method, tmp_path_factory.mktemp("hydra") / "run")[1]


def fixed(run: Run, gates: Any, bert: str, task: Any) -> Any:
    """Return the trained model with a router that gives these gate weights to every token."""
    model = models.load(bert, task=task)
    run.restore(model)
    for name, part in delta.attached_deltas(model).items():
        wanted = torch.tensor(gates[name])
        part.gates = lambda x, wanted=wanted: wanted.to(x.dtype).expand(*x.shape[:-1], -1)
    return model


def test_to_peft_at_fixed_gates_gives_the_logits_of_fixed_routers(
    hydra: Run, bert: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = ls.mean_gates(hydra, TEXTS, base=models.load(bert, task=task))
    for gates in (means, {name: [0.0, 1.0, 0.0] for name in means}):
        out = tmp_path / f"adapter-{gates is means}"
        theirs = by_the_card(to_peft(ls.at_gates(hydra, gates), out), monkeypatch)
        assert {rank for rank, _ in layers(theirs).values()} == {6 if hydra.meta.method["shared_a"] is False else 2}
        free = models.load(bert, task=task)
        hydra.restore(free)
        assert distance(free, theirs) > 1e-4  # the export has no router
        assert distance(fixed(hydra, gates, bert, task), theirs) < rounding(terms=TINY)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "HydraLoRA at given gates, without its routers" in card
        assert "outputs approximate those of the trained model" in card


def test_rank_pattern_at_fixed_gates_has_ranks(hydra: Run, bert: str, task: Any) -> None:
    means = ls.mean_gates(hydra, TEXTS, base=models.load(bert, task=task))
    whole = rank_pattern(ls.at_gates(hydra, means))
    first = next(rank for name, rank in hydra.ranks().items() if name.endswith(whole["target_modules"][0]))
    assert whole["r"] == first
    kept = rank_pattern(ls.at_gates(hydra, means), 3)
    assert len(kept["target_modules"]) <= 3


def test_export_command_with_a_router_suggests_at_gates(hydra: Run, tmp_path: Path, capsys: Any) -> None:
    for words in (("--peft", tmp_path / "adapter"), ("--rank-pattern", "--budget", 0.5)):
        told = complaint(capsys, "export", hydra.path, *words)
        assert "depends on its input, and a LoRA has no router" in told
        assert "ls.at_gates(run, ls.mean_gates(run, texts))" in told
        assert "an approximation" in told
    assert not list(tmp_path.iterdir())


def test_rank_pattern_does_not_require_the_router(hydra: Run, capsys: Any) -> None:
    """A LoRA with these ranks has the rank and scale that one token sees, regardless of its gate weights."""
    code, out, err = run(capsys, "export", hydra.path, "--rank-pattern", "--json")
    assert code == 0
    assert "neither the router nor the experts" in err.replace("\n#   ", " ")  # remarks are wrapped
    keywords = json.loads(out)
    means = {name: [0.2, 0.3, 0.5] for name in hydra.updates()}
    assert keywords == rank_pattern(hydra) == rank_pattern(ls.at_gates(hydra, means))
    scale = {update.scale for update in hydra.updates().values()}
    assert scale == {keywords["lora_alpha"] / keywords["r"]}


def test_to_peft_with_gates_of_some_modules_raises(hydra: Run, tmp_path: Path) -> None:
    first, second, *_ = hydra.updates()
    with pytest.raises(ValueError, match=f"the update of {second} depends on its input"):
        to_peft(ls.at_gates(hydra, {first: [0.2, 0.3, 0.5]}), tmp_path / "adapter")


def test_summary_of_an_unknown_state_at_fixed_gates_raises(hydra: Run) -> None:
    with pytest.raises(ValueError, match="state must be one of 'last', 'best', got 'first'"):
        ls.at_gates(hydra, {}).summary(state="first")


def test_to_peft_of_an_authors_folder_raises(tmp_path: Path) -> None:
    write(tmp_path / "theirs")
    with pytest.raises(ValueError, match="cannot export adapter theirs: PEFT has no HydraLoRA"):
        to_peft(ls.load(tmp_path / "theirs"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "method", [HydraLoRA(num_experts=1), HydraLoRA(shared_a=False, router="uniform")], ids=["one", "even"]
)
def test_to_peft_without_router_exports_a_lora(
    method: HydraLoRA, bert: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, run = trained(bert, task, method, tmp_path / "run")
    theirs = by_the_card(to_peft(run, tmp_path / "adapter"), monkeypatch)
    assert distance(ours, theirs) < rounding(terms=TINY)
    assert "routers" not in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
