"""Results and layout of ``lorascope inspect``, for adapters with planted singular values."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from adapter_bits import draw, peft_folder, stored_as
from planted import manifest
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_loading import save, write_run

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis import pair_comparison
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.inspection_screen import inspection_screen
from lorascope.files import text_layout
from lorascope.files.safetensors_io import write_tensors
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import WEIGHTS
from lorascope.runs.loading import load
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Record, Snapshot

LLAMA = {
    "self_attn.q_proj": "q",
    "self_attn.v_proj": "v",
    "mlp.up_proj": "ffn_in",
    "mlp.down_proj": "ffn_out",
}


def plant(folder: Path, spectra: Mapping[str, list[float]], **config: object) -> Path:
    """Write an adapter of scale 2 whose updates have twice the given singular values."""
    tensors = {}
    for number, (module, sigma) in enumerate(spectra.items()):
        draw = np.random.default_rng(number)
        rank = len(sigma)
        left, _ = np.linalg.qr(draw.standard_normal((20, rank)))
        right, _ = np.linalg.qr(draw.standard_normal((12, rank)))
        tensors[f"base_model.model.{module}.lora_B.weight"] = (left * np.array(sigma)).astype("f4")
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(right.T, dtype="f4")
    rank = len(next(iter(spectra.values())))
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "org/base"}
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    write_json(folder / "adapter_config.json", given | config)
    return folder


def llama(layers: int, sigma: list[float]) -> dict[str, list[float]]:
    """Return the same spectrum for every module, times the layer number plus one."""
    return {
        f"model.layers.{layer}.{name}": [value * (layer + 1) for value in sigma]
        for layer in range(layers)
        for name in LLAMA
    }


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True


def plain() -> Console:
    """Return a console for a file."""
    return text_layout.make_console(io.StringIO())


def lines(path: Path, target: Console | None = None) -> list[str]:
    return inspection_screen(inspect(load(path)), target or plain()).splitlines()


def norm_lines(shown: list[str]) -> list[str]:
    """Return the lines of a screen from the strips of norms on."""
    start = next(index for index, line in enumerate(shown) if line.startswith("|dW| by layer"))
    return shown[start:]


def test_inspection_screen_equals_the_expected_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spectra = llama(3, [3.0, 4.0, 0.0, 0.0])
    spectra["model.layers.1.mlp.up_proj"] = [0.0] * 4
    spectra["model.layers.2.mlp.down_proj"] = [10.0] * 4
    del spectra["model.layers.2.self_attn.v_proj"]
    plant(Path("my-adapter"), spectra)
    expected = """\
my-adapter     LoRA, rank 4, scale 2 (alpha 8)
base           org/base (not read)
size           11 modules, 1,408 parameters, float32, 1 file

used rank      0   1   2                           used   rank effective
q              2/4 2/4 2/4                         6/12      4       2.0
v              2/4 2/4                              4/8      4       2.0
ffn_in         2/4 0/4 2/4                         4/12      4       1.3
ffn_out        2/4 2/4 4/4                         8/12      4       2.7
               used components have 90% of the energy of their module

|dW| by layer  0  1  2                             |dW|  energy
q              333555777                           37.4   28.0%
v              333555                              22.4   10.0%
ffn_in         333...777                           31.6   20.0%
ffn_out        333555999                           45.8   42.0%
               9 is 40.0 per layer, . is zero

rank           22 of 44 components have 90% of the energy; random factors: 34
               1.98 of 4 per module (effective rank)
most unused    0 of 4  model.layers.1.mlp.up_proj
               2 of 4  model.layers.0.self_attn.q_proj
               2 of 4  model.layers.0.self_attn.v_proj
               and 7 more of 11 modules with half of their rank or less
full           none of 11 modules; 1 as even as random factors
largest |dW|   40.0   model.layers.2.mlp.down_proj  rank 4.0 of 4
               30.0   model.layers.2.self_attn.q_proj  rank 2.0 of 4
               30.0   model.layers.2.mlp.up_proj  rank 2.0 of 4
findings       1 zero update: model.layers.1.mlp.up_proj (B = 0)
               18 components are unused (below 1e-6 of the largest):
                 model.layers.0.self_attn.q_proj and 8 more
next           lorascope doctor my-adapter"""
    assert "\n".join(lines(Path("my-adapter"))) == expected
    monkeypatch.setenv("NO_COLOR", "1")
    blocks = lines(Path("my-adapter"), text_layout.make_console(Terminal()))
    norms = norm_lines(blocks)
    assert [line[15:24] for line in norms[1:5]] == ["▂▂▂▄▄▄▆▆▆", "▂▂▂▄▄▄   ", "▂▂▂···▆▆▆", "▂▂▂▄▄▄███"]
    assert norms[5].strip() == "█ is 40.0 per layer, · is zero"


def test_modules_have_the_planted_norms_and_ranks(tmp_path: Path) -> None:
    spectra = {"model.layers.0.self_attn.q_proj": [8.0, 4.0, 2.0, 1.0], "model.layers.0.self_attn.v_proj": [1.0] * 4}
    modules = inspect(load(plant(tmp_path / "a", spectra))).modules.set_index("role")
    assert modules.loc["q", "update_norm"] == pytest.approx(2 * 85**0.5)
    assert modules.loc["q", "energy"] == pytest.approx(85 / 89)
    assert modules.loc["q", "stable_rank"] == pytest.approx(85 / 64)
    assert list(modules["energy_rank"]) == [2, 4]
    assert list(modules["scale"]) == [2.0, 2.0]
    assert list(modules["dead"]) == [0, 0]
    assert list(modules["parameters"]) == [4 * 32] * 2
    assert modules.loc["v", "effective_rank"] == pytest.approx(4)


def test_roles_pool_norms_by_squares_and_average_ranks(tmp_path: Path) -> None:
    spectra = {
        "model.layers.0.self_attn.v_proj": [1.0, 0.0],
        "model.layers.1.self_attn.q_proj": [3.0, 0.0],
        "model.layers.2.self_attn.q_proj": [2.0, 2.0],
        "lm_head": [1.0, 0.0],
        "model.embed_tokens": [1.0, 1.0],
    }
    roles = inspect(load(plant(tmp_path / "a", spectra))).roles().set_index("role")
    assert list(roles.index) == ["embed", "q", "v", "head"]
    assert roles.loc["q", "update_norm"] == pytest.approx(2 * 17**0.5)
    assert roles.loc["q", "effective_rank"] == pytest.approx(1.5)
    assert roles.loc["q", "energy"] == pytest.approx(17 / 21)
    assert roles.loc["q", "modules"] == 2


@pytest.mark.parametrize("layers", [1, 2, 6, 11, 17, 24, 30, 32, 33, 80, 126])
def test_screen_fits_45_lines_at_any_depth(tmp_path: Path, layers: int) -> None:
    long = "a-rather-long-name-of-an-adapter-that-somebody-gave-it-in-a-hurry"
    spectra = llama(layers, [1.0, 0.5, 0.1, 0.0])
    spectra["model.layers.0.self_attn.some_unusual_projection_with_a_very_long_name_indeed"] = [1.0, float("nan"), 0, 0]
    config = {"base_model_name_or_path": "/a/" + "very/" * 30 + "deep/path", "alpha_pattern": {"nothing": 3}}
    shown = lines(plant(tmp_path / long, spectra, **config))
    assert max(map(len, shown[:-1])) <= 80
    assert len(shown) < 45
    row = next(line for line in norm_lines(shown) if line.startswith("ffn_in"))
    chart = row[15:47].rstrip()
    assert 1 <= len(chart) <= 32
    assert list(chart) == sorted(chart)
    assert chart[-1] == "9"


def test_column_of_several_layers_shows_their_rms(tmp_path: Path) -> None:
    spectra = {f"model.layers.{layer}.self_attn.q_proj": [1.0] for layer in range(40)}
    spectra["model.layers.0.self_attn.q_proj"] = [7.0]
    shown = norm_lines(lines(plant(tmp_path / "a", spectra)))
    assert shown[1][15:47].rstrip() == "9" + "2" * 19  # 10 (RMS of 14 and 2) against 2
    assert "9 is 10.0 per layer, . is zero, 2 layers per column (RMS)" in shown[2]
    assert shown[0][15:47].rstrip() == "0       16      32 39"


def test_two_stacks_have_separate_rows(tmp_path: Path) -> None:
    spectra = {
        "encoder.block.0.layer.0.SelfAttention.q": [1.0],
        "decoder.block.0.layer.0.SelfAttention.q": [1.9],
        "decoder.block.1.layer.1.EncDecAttention.q": [2.9],
    }
    shown = norm_lines(lines(plant(tmp_path / "a", spectra)))
    assert [line[:21].rstrip() for line in shown[1:4]] == [
        "enc q          444",
        "dec q          666",
        "dec cross_q       999",
    ]


def test_findings_of_broken_and_untrained_adapters(tmp_path: Path) -> None:
    spectra = llama(2, [1.0, 0.1, 0.1, 0.1])
    spectra["model.layers.1.mlp.up_proj"] = [float("nan")] * 4
    config = {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"no.such": 3, "q_proj": 4}}
    item = inspect(load(plant(tmp_path / "a", spectra, **config)))
    broken = "model.layers.1.mlp.up_proj"
    finite = tuple(module for module in spectra if module != broken)
    assert [(finding.severity, finding.modules) for finding in item.details] == [
        ("error", (broken,)),
        ("note", finite),
        ("caution", ()),
        ("caution", ("no.such",)),
    ]
    assert item.findings == (
        "1 of 8 modules contains NaN or infinity: model.layers.1.mlp.up_proj",
        "7 of 28 components have 90% of the energy; random factors: 22; half of the rank or less in 7 of 7 modules: "
        "model.layers.0.self_attn.q_proj and 6 more",
        "initialized by pissa_niter_4: PEFT subtracts components of a randomized SVD of each base weight while "
        "loading, others each time; |dW| is the norm of B A only, not of the change from the original base",
        "rank_pattern matches no module of this adapter: no.such",
    )
    fresh = inspect(load(plant(tmp_path / "b", llama(2, [0.0] * 4)))).findings
    assert fresh == ("all 8 modules have a zero update: saved before training?",)
    off = inspect(load(plant(tmp_path / "c", llama(2, [1.0] * 4), lora_alpha=0))).findings
    assert "all 8 modules have a zero update: their scale is 0" in off


def test_norm_has_three_digits_in_seven_characters() -> None:
    shown = {
        0.0: "0.00",
        1.0: "1.00",
        39.96: "40.0",
        999.4: "999",
        1234.5: "1234",
        1.2e7: "1.2e+07",
        0.00123: "0.00123",
    }
    shown |= {4.56e-5: "4.6e-05", float("nan"): "NaN"}
    assert [text_layout.format_norm(value) for value in shown] == list(shown.values())


def test_nan_module_is_shown_and_excluded_from_totals(tmp_path: Path) -> None:
    spectra = llama(2, [1.0, 0.0])
    spectra["model.layers.1.mlp.up_proj"] = [float("nan")] * 2
    item = inspect(load(plant(tmp_path / "a", spectra)))
    shown = inspection_screen(item, plain()).splitlines()
    assert next(line for line in norm_lines(shown) if line.startswith("ffn_in"))[15:21] == "555!!!"
    assert next(line for line in shown if line.startswith("ffn_in"))[15:22] == "1/2 !  "
    assert item.norm == pytest.approx(2 * (4 + 3 * 4) ** 0.5)
    assert item.modules["energy"].sum() == pytest.approx(1)
    json.dumps(item.to_json(), allow_nan=False)


def test_dense_run_shows_its_recorded_norms(tmp_path: Path) -> None:
    module = {"module": "h.0.q", "stack": "", "layer": 0, "role": "q", "out_features": 3, "in_features": 4, "tied": ""}
    meta = json.loads((write_run(tmp_path / "donor") / "run.json").read_text(encoding="utf-8"))
    states = {"last": {"step": 9, "ranks": {}}}
    changes = {
        "modules": [module],
        "states": states,
        "label": "Full",
        "test": {"name": "accuracy", "metric": 0.75, "loss": 0.5},
    }
    writer = RunWriter(tmp_path / "full", manifest(**meta | changes))
    writer.collect(9, [Record("update_norm", 5.0, "h.0.q"), Record("effective_rank", 1.9, "h.0.q")])
    writer.collect(9, [Snapshot("h.0.q/singular_values", np.array([4.0, 3.0, 0.0]), ("component",))])
    writer.finish("done")
    item = inspect(load(tmp_path / "full"))
    row = item.modules.iloc[0]
    assert (row["update_norm"], row["energy_rank"], row["parameters"]) == (5.0, 2, 12)
    shown = inspection_screen(item, plain()).splitlines()
    assert shown[:4] == [
        "full           Full, seed 0",
        "model          m on t",
        "size           1 module, 12 trained parameters",
        "test           accuracy 0.75, loss 0.5 after 9 steps",
    ]
    assert shown[6].split() == ["q", "999", "5.00", "100.0%", "-", "1.9"]


def test_run_with_factors_is_measured_from_them(tmp_path: Path) -> None:
    item = inspect(load(write_run(tmp_path / "run")))
    assert item.modules["update_norm"].item() == pytest.approx(2**0.5)
    assert item.modules["energy_rank"].item() == 2


def test_second_name_of_a_tied_weight_is_measured(tmp_path: Path) -> None:
    module = json.loads((write_run(tmp_path / "donor") / "run.json").read_text(encoding="utf-8"))["modules"][0]
    modules = [module | {"module": "embed", "role": "embed", "layer": None, "tied": "h.0.q"}]
    item = inspect(load(write_run(tmp_path / "run", modules=modules)))
    row = item.modules.set_index("module").loc["h.0.q"]
    assert (row["energy_rank"], row["parameters"], row["update_norm"]) == (2, 2 * 6, pytest.approx(2**0.5))


@pytest.mark.parametrize(
    ("stream", "variables", "blocks", "color"),
    [
        (Terminal(), {"TERM": "xterm"}, True, True),
        (Terminal("ascii"), {"TERM": "xterm"}, False, True),
        (io.StringIO(), {"TERM": "xterm"}, False, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        (Terminal(), {"TERM": "dumb"}, True, False),
    ],
    ids=["terminal", "ascii", "file", "NO_COLOR", "dumb"],
)
def test_blocks_and_color_are_shown_only_on_capable_terminals(
    stream: io.StringIO,
    variables: dict[str, str],
    blocks: bool,
    color: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = plant(tmp_path / "a", llama(2, [1.0, 0.1, 0.0, 0.0]))
    shown = inspection_screen(inspect(load(folder)), text_layout.make_console(stream))
    assert ("█" in shown) == blocks
    assert ("\033[" in shown) == color
    assert shown.isascii() == (not blocks)


def test_color_changes_only_escape_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    item = inspect(load(plant(tmp_path / "a", llama(2, [1.0, 0.1, 0.0, 0.0]))))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored = inspection_screen(item, text_layout.make_console(Terminal()))
    monkeypatch.setenv("NO_COLOR", "1")
    without = inspection_screen(item, text_layout.make_console(Terminal()))
    assert "\033[" in colored
    stripped = "\n".join(line.rstrip() for line in re.sub(r"\033\[\d+m", "", colored).splitlines())
    assert stripped == without


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["inspect", *map(str, words)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def test_command_with_all_lists_every_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "a", llama(40, [1.0, 0.6]))
    shown = run(capsys, folder, "--all").splitlines()
    assert max(map(len, shown)) <= 80
    assert sum(line.startswith("model.layers.") for line in shown) == 160
    assert shown[5].split() == ["model.layers.0.self_attn.q_proj", "2.33", "0.0%", "2", "1.9", "1.4", "2", "0"]


def test_long_names_show_their_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "bert.encoder.layer.{}.attention.output.dense.of_some_length".format
    shown = run(capsys, plant(tmp_path / "a", {long(layer): [1.0] for layer in (3, 11)}), "--all").splitlines()
    assert shown[4].startswith("module of bert.encoder.layer ")
    assert [line.split(".")[0] for line in shown[5:7]] == ["3", "11"]


def test_long_names_show_their_layers_next_to_a_module_outside_the_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "bert.encoder.layer.{}.attention.output.dense.of_some_length".format
    names = [*map(long, (3, 11)), "classifier"]
    shown = run(capsys, plant(tmp_path / "a", {name: [1.0] for name in names}), "--all").splitlines()
    assert [line.split()[0].split(".")[0] for line in shown[5:8]] == ["3", "11", "classifier"]


def test_command_prints_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = plant(tmp_path / "a", llama(2, [1.0, 0.5]))
    told = json.loads(run(capsys, a, "--json"))
    assert told["name"] == "a"
    assert [row["module"] for row in told["modules"]][:1] == ["model.layers.0.self_attn.q_proj"]
    assert told["roles"][0]["relative_update"] is None
    assert told["facts"]["base"] == "org/base (not read)"
    table = pd.read_csv(io.StringIO(run(capsys, a, "--csv")))
    assert list(table["name"]) == ["a"] * 8
    assert table["update_norm"].iloc[0] == pytest.approx(2 * 1.25**0.5)


def test_command_on_a_broken_run_shows_the_error_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", status="broken", states={}, error="the loss is NaN at step 4")
    assert main(["inspect", str(tmp_path / "run")]) == 1
    assert "the loss is NaN at step 4" in capsys.readouterr().out


def strictly(text: str) -> Any:
    """Parse JSON strictly, without NaN and infinity."""

    def fail(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=fail)


def test_json_contains_neither_nan_nor_infinity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = plant(tmp_path / "broken", llama(1, [float("nan")] * 2))
    sound = plant(tmp_path / "sound", llama(1, [1.0, 0.5]))
    base = tmp_path / "base"
    write_tensors(
        base / "model.safetensors",
        {f"model.layers.0.{name}.weight": np.zeros((20, 12), "f4") for name in LLAMA},
        {},
    )
    told = strictly(run(capsys, broken, "--json"))
    assert told["update_norm"] is told["modules"][0]["update_norm"] is None
    told = strictly(run(capsys, sound, "--base", base, "--json"))
    assert [row["relative_update"] for row in told["modules"]] == [None] * 4
    assert told["roles"][0]["relative_update"] is None
    assert len(strictly(run(capsys, sound, broken, "--base", base, "--json"))) == 2


@pytest.mark.parametrize("largest", [1e152, 1e300, np.inf])
@pytest.mark.parametrize("words", [[], ["--all"], ["--json"], ["--csv"]])
def test_entries_near_the_limit_of_float64_are_shown(
    largest: float, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only in one module, so that others stay finite; NaN comes first in the order of layers."""
    save(tmp_path, target_modules=["q_proj"])
    tensors = {name: tensor.double() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    first, second = list(tensors)[:2], list(tensors)[2:4]
    for name in first:
        tensors[name][:] = largest
    for name in second:
        tensors[name][:] = 2.0
    save_file(tensors, tmp_path / WEIGHTS)
    assert main(["inspect", str(tmp_path), *words]) == 0
    shown = capsys.readouterr().out
    if not words:
        assert {1e152: "e+306", 1e300: "inf", np.inf: "NaN"}[largest] in shown


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_spectra_read_in_tiles_equal_those_of_loaded_factors(tmp_path: Path, dtype: str) -> None:
    """Tall and wide factors of several tiles, with a last tile that is shorter, and columns of any order in memory."""
    sides = {"layers.0.q_proj": (5000, 40), "layers.0.v_proj": (40, 5000), "layers.1.q_proj": (5, 9)}
    modules = {name: (draw(0, out, 12), draw(1, 12, inner)) for name, (out, inner) in sides.items()}
    folder = peft_folder(tmp_path / "adapter", modules, r=12)
    stored_as(folder / "adapter_model.safetensors", dtype)
    adapter = load(folder)
    assert set(adapter.updates()) == set(sides)
    for name, update in adapter.updates().items():
        assert len(adapter.spectra[name]) == min(12, *sides[name])
        assert adapter.spectra[name].tolist() == update.singular_values().tolist()
        expected = np.linalg.svd(update.dense(), compute_uv=False)[: len(adapter.spectra[name])]
        assert adapter.spectra[name] == pytest.approx(expected, rel=1e-9)


def test_many_adapters_have_letters_that_a_terminal_can_show() -> None:
    assert [pair_comparison._letters(place) for place in (0, 25, 26, 51, 52, 701, 702)] == [
        *("a", "z", "aa", "az", "ba", "zz", "aaa")
    ]


def test_norms_have_at_most_seven_characters() -> None:
    assert [text_layout.format_norm(value) for value in (999.4, 999.6, 1000.0, 999_999.4, 999_999.6)] == [
        *("999", "1000", "1000", "999999", "1.0e+06")
    ]


def test_unfinished_run_is_json_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    recorder = ls.record(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["status"], Path(found["path"])) == ("running", tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run"), "--csv"]) == 1
    assert capsys.readouterr().out == ""
    recorder.close()


def test_a_base_in_the_hugging_face_cache_is_shown_by_its_name(tmp_path: Path) -> None:
    base = tmp_path / "models--org--base" / "snapshots" / ("0123456789" * 4)
    weights = {f"{name}.weight": np.ones((20, 12), "f4") for name in llama(1, [1.0])}
    base.mkdir(parents=True)
    write_tensors(base / "model.safetensors", weights, {})
    plant(tmp_path / "a", llama(1, [2.0, 1.0]), base_model_name_or_path=str(base))
    adapter = ls.load(tmp_path / "a", base)
    assert adapter.meta.model == "org/base"
    assert dict(inspect(adapter).facts)["base"] == "org/base (read from the cache)"
