"""FourierFT written as a folder of PEFT, with PEFT as the oracle: its logits, and the coefficients of each module."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from test_cli import complaint, run
from test_export import Nested, by_the_card, distance, trained
from tolerance import TINY, rounding
from torch import nn

from lorascope.export.peft_folder import to_peft
from lorascope.export.peft_fourierft import frequency_pattern
from lorascope.methods import FourierFT
from lorascope.runs.loading import load


def sizes(model: Any) -> dict[str, int]:
    """Coefficients of every module that PEFT adapts."""
    found = model.base_model.model.named_modules()
    return {name: m.fourierft_n_frequency["default"] for name, m in found if hasattr(m, "get_delta_weight")}


@dataclass(kw_only=True)
class Uneven(FourierFT):
    """FourierFT whose modules differ in the number of coefficients and, if given, in seed and scale."""

    seeds: tuple[int, ...] = (2024,)
    alphas: tuple[float, ...] = (30.0,)

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        for number, host in enumerate(m for m in model.modules() if hasattr(m, "delta")):
            spec = FourierFT(
                coefficients=40 + number,
                entry_seed=self.seeds[number % len(self.seeds)],
                alpha=self.alphas[number % len(self.alphas)],
            )
            host.delta = spec.delta("module", host)


def test_to_peft_keeps_the_number_of_coefficients_per_module(
    llama: str, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Uneven(targets=("q", "v", "head"), head_lr=0.05)
    ours, found = trained(llama, task, method, tmp_path / "run")
    out = to_peft(found, tmp_path / "adapter")
    theirs = by_the_card(out, monkeypatch)
    assert sorted(sizes(theirs).values()) == [40, 41, 42, 43, 44]
    assert distance(ours, theirs) < rounding(terms=TINY)
    again = load(out, base=llama).updates()
    assert {name: len(update.coefficients) for name, update in again.items()} == sizes(theirs)


def test_frequency_pattern_of_similar_names_keeps_each_number() -> None:
    """Names that end as others do, including one without a dot, for two choices of the common number."""
    for common in (0, 3):
        model = Nested()
        model.q = nn.Linear(8, 8)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        numbers = {name: 5 if number % 4 == common else 10 + number for number, name in enumerate(names)}
        theirs = peft.get_peft_model(model, peft.FourierFTConfig(target_modules=names, **frequency_pattern(numbers)))
        assert sizes(theirs) == numbers


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (
            Uneven(seeds=(2024, 7)),
            r"entries of .*value must be drawn with seed 2024",
        ),
        (Uneven(alphas=(30.0, 40.0)), r"the same scale, got 30 and 40"),
    ],
    ids=["seeds", "scales"],
)
def test_to_peft_of_different_seeds_or_scales_raises_one_line(
    method: FourierFT, why: str, bert: str, task: Any, tmp_path: Path
) -> None:
    _, found = trained(bert, task, method, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=why) as raised:
        to_peft(found, tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    assert found.id in str(raised.value)
    assert not (tmp_path / "adapter").exists()


def test_export_command_writes_card_and_configuration(
    bert: str, task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = trained(bert, task, FourierFT(), tmp_path / "run", steps=1)
    out = tmp_path / "adapter"
    assert run(capsys, "export", found.path, "--peft", out) == (0, f"{out}\n", "")
    assert "A FourierFT adapter, written by lorascope" in (out / "README.md").read_text(encoding="utf-8")
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["random_loc_seed"], config["scaling"]) == ("FOURIERFT", 2024, 100.0)
    assert (config["n_frequency"], config["n_frequency_pattern"]) == (128, {})
    assert not {"r", "lora_alpha", "lora_dropout"} & config.keys()
    told = complaint(capsys, "export", found.path, "--rank-pattern")
    assert "is not a product B A" in told
