"""A format that the package does not know, with its own form of update, is read through every door for adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.format_rows import draw
from safetensors.numpy import save

import lorascope as ls
from lorascope.cli.main import main
from lorascope.formats import READERS, AdapterFiles, StoredTensor, StoredUpdate, group_factors, reads
from lorascope.updates import FORMS, LowRank, Update

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
_FACTOR = re.compile(r"(?P<module>.+)\.lokr_(?P<factor>w1|w2)")


@pytest.fixture(autouse=True)
def registered():
    """Register form and reader for one test."""

    @dataclass(frozen=True, eq=False)
    class Kronecker(Update, form="test_kronecker"):
        """The update scale * kron(w1, w2)."""

        w1: np.ndarray
        w2: np.ndarray
        scale: float = 1.0
        required = frozenset({"w1", "w2"})

        @property
        def shape(self) -> tuple[int, int]:
            return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

        def dense(self) -> np.ndarray:
            return self.scale * np.kron(self.w1.astype(np.float64), self.w2.astype(np.float64))

        def to_factors(self) -> dict[str, Any]:
            return {"w1": self.w1, "w2": self.w2}

        @classmethod
        def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Kronecker:
            return cls(factors["w1"], factors["w2"], scale)

    @dataclass(frozen=True)
    class KroneckerPart(StoredUpdate):
        w1: StoredTensor
        w2: StoredTensor
        scale: float
        transposed: bool = False
        has_thin_factors = False

        @property
        def shape(self) -> tuple[int, int]:
            return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

        @property
        def rank(self) -> int:
            return min(self.shape)

        def factors(self) -> dict[str, Any]:
            return {"w1": self.w1.read(), "w2": self.w2.read()}

    @reads(lambda config, names: any(name.endswith(".lokr_w1") for name in names))
    def read_test_kronecker(path: Path, config: Mapping[str, Any], files: Any, base: Any) -> AdapterFiles:
        found, others = group_factors(files, _FACTOR)
        scale = float(config.get("strength", 1.0))
        parts = {module: KroneckerPart(each["w1"], each["w2"], scale) for module, each in found.items()}
        return AdapterFiles(path, dict(config), parts, others, files, "Kronecker")

    yield
    del FORMS["test_kronecker"], READERS["read_test_kronecker"]


FACTORS = {module: (draw(number, 2, 3), draw(number, 4, 5)) for number, module in enumerate((Q, V))}
DENSE = {module: 0.5 * np.kron(w1.astype(np.float64), w2.astype(np.float64)) for module, (w1, w2) in FACTORS.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    tensors = {f"{module}.lokr_w{i + 1}": factor for module, pair in FACTORS.items() for i, factor in enumerate(pair)}
    (folder / "weights.safetensors").write_bytes(save(tensors))
    (folder / "adapter_config.json").write_text(json.dumps({"strength": 0.5}))
    return folder


def test_adapter_is_loaded_with_its_norms_and_spectra(adapter: Path) -> None:
    found = ls.load(adapter)
    assert found.summary()["module"].tolist() == [Q, V]
    assert found.summary()["update_norm"].tolist() == pytest.approx([np.linalg.norm(DENSE[m]) for m in (Q, V)])
    assert found.summary()["role"].tolist() == ["q", "v"]
    for module, dense in DENSE.items():
        assert found.updates()[module].dense() == pytest.approx(dense)
        assert found.spectra[module] == pytest.approx(np.linalg.svd(dense, compute_uv=False), abs=1e-7)
    difference = found.updates()[Q] - LowRank(DENSE[Q], np.eye(15))
    assert np.abs(difference.dense()).max() < 1e-12
    assert found.updates()[Q].inner(LowRank(DENSE[Q], np.eye(15))) == pytest.approx((DENSE[Q] ** 2).sum())


def test_adapter_passes_inspect_doctor_and_plot(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter), "--json", "--spectra"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["module"] for row in shown["modules"]] == [Q, V]
    assert shown["modules"][0]["update_norm"] == pytest.approx(np.linalg.norm(DENSE[Q]))
    assert main(["inspect", str(adapter)]) == 0
    assert "Kronecker" in capsys.readouterr().out
    assert main(["doctor", str(adapter)]) == 0
    assert main(["plot", "update_norm_heat", str(adapter), "-o", str(tmp_path / "heat.svg")]) == 0
    assert (tmp_path / "heat.svg").exists()


def test_conversion_to_lora_is_refused_in_one_line(adapter: Path) -> None:
    with pytest.raises(ValueError, match=f"the update of {Q} is not a product B A"):
        ls.load(adapter).lora_config()


def test_reader_that_is_registered_last_wins(adapter: Path) -> None:
    @reads(lambda config, names: True)
    def read_nothing(path: Path, config: Mapping[str, Any], files: Any, base: Any) -> AdapterFiles:
        return AdapterFiles(path, {}, {}, (), files, "Nothing")

    try:
        assert ls.load(adapter).files.kind == "Nothing"
    finally:
        del READERS["read_nothing"]
    assert ls.load(adapter).files.kind == "Kronecker"
