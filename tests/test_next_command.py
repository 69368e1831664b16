"""The command at the end of a screen of ``inspect``: a shell reads its paths, and it follows from the findings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import planted
import pytest
from test_advise import made_dial
from test_inspect import llama, plant

import lorascope as ls
from lorascope.analysis.stored_measurements import DIAL, PRICE, READING
from lorascope.cli.main import main

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
NAMES = [
    "plain",
    "two words",
    'it\'s "quoted" `here` $HOME',
    "-dash",
    "--json",
    "new\nline",
    "tab\tand\x1b[31mcolor",
    "back\\slash",
    "back\\slash'\n",
    "\u202eright to left",
    "~",
    "naïve 日本",
    "long " * 20,
    os.fsdecode(b"not \xff text"),
]


def next_words(screen: str) -> list[str]:
    """Return the words that bash passes for the last line of a screen."""
    label, command = screen.splitlines()[-1][:15].strip(), screen.splitlines()[-1][15:]
    assert label == "next"
    script = "lorascope() { printf '%s\\0' \"$@\"; }; " + command
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    return [os.fsdecode(word) for word in output.split(b"\0")[:-1]]


@pytest.mark.skipif(shutil.which("bash") is None, reason="requires bash")
@pytest.mark.parametrize("name", NAMES)
def test_command_can_be_pasted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / name, llama(1, [2.0, 1.0]))
    assert main(["inspect", str(tmp_path / name)]) == 0
    screen = capsys.readouterr().out
    assert screen.replace("\n", "").isprintable()
    words = next_words(screen)
    path = f"./{name}" if name.startswith(("-", "~")) else name
    assert words == ["plot", "spectrum", path, "-o", "spectrum.pdf"]
    words[-1] = str(tmp_path / "spectrum.csv")
    assert main(words) == 0


@pytest.mark.parametrize(
    ("spectra", "config", "command"),
    [
        ({Q: [2.0, 1.0], V: [2.0, 1.0]}, {}, "plot"),
        ({Q: [0.0, 0.0], V: [0.0, 0.0]}, {}, "doctor"),  # no update
        ({Q: [2.0, 1.0], V: [0.0, 0.0]}, {}, "doctor"),  # an update of zero
        ({Q: [np.nan, 1.0], V: [2.0, 1.0]}, {}, "doctor"),
        ({Q: [2.0, 1.0], V: [2.0, 1.0]}, {"rank_pattern": {"k_proj": 4}}, "doctor"),  # a key without a module
    ],
)
def test_command_explains_what_was_found(
    spectra: dict[str, list[float]],
    config: dict[str, object],
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(tmp_path / "a", spectra, **config)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    words = next_words(capsys.readouterr().out)
    assert words[0] == command
    assert main([word.replace("spectrum.pdf", str(tmp_path / "a.csv")) for word in words]) == (command == "doctor")


def test_command_of_a_run_with_the_gauge_draws_the_step_to_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {0: [2.0, 3.0, 4.0, 5.0], 5: [1.0, 2.2, 3.1, 4.0], 10: [1.1, 1.9, 3.0, 4.1]}
    values = {("row_loss", ""): {step: np.array(rows) for step, rows in losses.items()}}
    values |= {("kl_keep", ""): {0: 0.0, 5: 0.2, 10: 0.5}, ("update_norm", "h.0.q"): {10: 1.0}}
    run = planted.plant(tmp_path, "a", values, factors={"h.0.q": planted.low_rank(2.0, 1.0)})
    assert main(["inspect", str(run.path)]) == 0
    words = next_words(capsys.readouterr().out)
    assert (words[:2], words[3:]) == (["plot", "kl"], ["-o", "kl.pdf"])
    assert main([*words[:-1], str(tmp_path / "kl.csv")]) == 0


def test_command_follows_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unused rank is priced, then words are read after a dial, and then only figures are left."""
    folder = tmp_path / "a"
    plant(folder, llama(2, [10.0, 4.0, 0.1, 0.1]))
    id = ls.load(folder).id

    def shown() -> list[str]:
        assert main(["inspect", str(folder)]) == 0
        return next_words(capsys.readouterr().out)

    made_dial(0.5, 0.1).summary().assign(run=id).to_csv(folder / DIAL, index=False)
    assert shown()[0] == "price"
    rows = [{"rank": 2, "cut": 0.1, "cut_low": 0.0, "cut_high": 0.2}]
    document = {"rank": 4, "table": rows, "tolerance": 0.1, "cards": [], "receipt": {"run": id}}
    (folder / PRICE).write_text(json.dumps(document), encoding="utf-8")
    words = shown()
    assert (words[0], words[2:]) == ("read", ["--model", "NAME", "--rows", "NAME"])
    (folder / READING).write_text(json.dumps(document), encoding="utf-8")
    assert shown()[0] == "plot"


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("minilm", "sentiment/movies", ["minilm", "sentiment/movies"]),
        ("minilm, first 2 blocks", "my rows.csv", ["NAME", "my rows.csv"]),
    ],
)
def test_command_of_a_run_names_its_model_and_task(
    model: str, task: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"h.0.q": planted.low_rank(10.0, 0.1, 0.1, 0.1)}
    values = {("update_norm", "h.0.q"): {10: 1.0}}
    run = planted.plant(tmp_path, "a", values, factors=factors, model=model, task=task)
    assert main(["inspect", str(run.path)]) == 0
    words = next_words(capsys.readouterr().out)
    assert words[0] == "price"
    assert [words[3], words[5]] == expected


def test_command_after_a_sweep_plots_its_rates_and_after_seeds_their_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Shown paths are relative to the working directory where that is shorter.
    monkeypatch.chdir(tmp_path)
    for lr in (0.1, 0.3):
        for seed in (0, 1):
            values = {(name, ""): {0: 2.0, 9: 1.0} for name in ("loss", "eval_loss", "test_loss")}
            recipe, settings = {"name": "lora", "rank": 2}, {"steps": 9, "lr": lr}
            planted.plant(
                Path("sweep"), f"{lr}-{seed}", values, factors={"h.0.q": planted.low_rank(2.0, 1.0)}, seed=seed,
                recipe=recipe, settings=settings,
            )  # fmt: skip
    folders = sorted(map(str, Path("sweep").iterdir()))
    labeled = [f"LoRA rank 2 at {Path(folder).name[:3]}={folder}" for folder in folders]
    for paths, figure, runs in ((folders, "learning_rates", labeled), (folders[:2], "training_curves", folders[:2])):
        assert main(["inspect", *paths]) == 0
        words = next_words(capsys.readouterr().out)
        assert words == ["plot", figure, *runs, "-o", f"{figure}.pdf"]
        assert main([*words[:-1], f"{figure}.csv"]) == 0
        capsys.readouterr()
    # The folder of a sweep is its runs.
    assert main(["inspect", "sweep"]) == 0
    assert next_words(capsys.readouterr().out)[1:-2] == ["learning_rates", *labeled]
