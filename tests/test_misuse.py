"""Misuse that once ended in a traceback, a hang or too much memory: each is one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hostile import command, lora, outcome
from PIL import Image
from test_any_loop import Loop

import lorascope as ls
from lorascope.experiments import grid
from lorascope.inputs.images import open_image


def test_number_of_combinations_is_checked_before_they_are_listed(tmp_path: Path) -> None:
    rates = [0.001 * (number + 1) for number in range(20_000)]
    table = {"task": "sentiment", "method": {"name": "lora", "lr": rates, "rank": list(range(1, 20_001))}}
    tracemalloc.start()
    with pytest.raises(ValueError, match="a sweep must have at most 10,000 combinations, got 400,000,000"):
        grid.read(table | {"settings": {"steps": 3}})
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    many = {"steps": list(range(1, 201)), "batch_size": list(range(1, 51))}
    methods = [{"name": "lora", "rank": [1, 2, 3]}]
    with pytest.raises(ValueError, match="at most 10,000 combinations, got 30,000"):
        grid.read({"task": "sentiment", "method": methods, "settings": many})


def test_image_of_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    Image.new("L", (13_000, 13_000)).save(file)
    assert file.stat().st_size < 2**20
    message = outcome(lambda: open_image(file), gigabytes=0.5)
    assert message == "image must have at most 67,108,864 pixels, got 13000 x 13000"
    assert outcome(lambda: open_image(file.read_bytes()), gigabytes=0.5) == message


@pytest.mark.parametrize("digits", [400, 5000])
def test_loss_beyond_the_range_of_floats_raises(tmp_path: Path, digits: int) -> None:
    with Loop(tmp_path / "run").record() as recorder:
        for call in (recorder.step, recorder.evaluate):
            with pytest.raises(ValueError, match=r"loss must be <= 1.8e\+308, got an integer of \d+ bits"):
                call(loss=10**digits)


SPOILED = ("3", '"x"', "null", "[]", "{}", "[3]", '{"a":3}')


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the report card of an adapter."""
    folder = tmp_path_factory.mktemp("card")
    page = folder / "card.html"
    code, errors = command("report", str(lora(folder)), "-o", str(page))
    assert code == 0, errors
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("key", ["facts", "findings", "unchecked", "notes", "subjects", "figures", "versions", "label"])
def test_damaged_card_is_verified_in_one_line(card: str, tmp_path: Path, key: str) -> None:
    page, text = tmp_path / "card.html", card
    start = text.index(f'"{key}":') + len(key) + 3
    _, size = json.JSONDecoder().raw_decode(text[start:])
    for value in SPOILED:
        page.write_text(text[:start] + value + text[start + size :], encoding="utf-8")
        code, errors = command("report", "--verify", str(page))
        assert code <= 2  # 0 where an empty value of another type has the same text
        assert len(errors.splitlines()) == (code == 2), errors


def test_removed_working_directory_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script = f"import os, sys; os.chdir({str(folder)!r}); os.rmdir({str(folder)!r}); "
    script += "from lorascope.cli.main import main; sys.exit(main(['inspect', '/']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lorascope: the working directory was removed: change to another one\n"


def test_output_that_is_a_dangling_link_raises(tmp_path: Path, fresh_bert, task) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "missing")
    for act in (
        Loop(link).record,
        lambda: ls.train(fresh_bert, task, ls.LoRA(), steps=1, out=link),
    ):
        reason = f"it is a symbolic link to {tmp_path}/missing, which does not exist"
        assert outcome(act) == f"cannot use {link}: {reason}"


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (2, 2)])
@pytest.mark.parametrize("every", [1, 3])
def test_weight_that_is_resized_while_it_is_recorded_raises(tmp_path: Path, shape: tuple[int, int], every: int) -> None:
    loop = Loop(tmp_path / "run")
    recorder = loop.record([ls.observe.norms(every=every)])
    for _ in range(every):
        loop.step_and_record(recorder)
    loop.model[0].weight.grad = None
    loop.model[0].weight.data = torch.randn(shape)

    def step_and_record() -> None:
        for _ in range(every):
            loop.optimizer.step()
            recorder.step(loss=1.0)

    reason = f"cannot record a weight that was resized from (3, 4) to {shape}: call ls.record again"
    assert outcome(step_and_record, gigabytes=8) == reason
