"""Models by name on the hub, against a local server that answers as the hub does."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_tokenizer
from test_hub import Hub
from tiny import tiny

# Prints what the configuration and the weights say about their commit.
LOAD = """
import sys
from lorascope.inputs import models
try:
    model = models.load(sys.argv[1])
    models.tokenizer(model)
    print(model.config.layer_norm_eps, float(model.bert.embeddings.LayerNorm.bias[0]))
except (ValueError, FileNotFoundError) as error:
    print(type(error).__name__, error)
"""


def model_files(folder: Path, mark: float) -> dict[str, bytes]:
    """Return the files of a tiny BERT whose configuration and weights contain the same number."""
    model = tiny("bert", layer_norm_eps=mark)
    model.bert.embeddings.LayerNorm.bias.data.fill_(mark)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 2, 3, 4])
def test_model_is_of_one_commit_if_another_is_pushed_in_between(tmp_path: Path, requests: int) -> None:
    old, new = model_files(tmp_path / "old", 0.25), model_files(tmp_path / "new", 0.5)
    hub = Hub({"a/b": new, "a/b@old": old, "a/b@new": new})
    hub.pushed["a/b"] = ["old"] * requests + ["new"]
    done = hub.run(tmp_path, "-c", LOAD, "a/b", LORASCOPE_CACHE=str(tmp_path))
    assert done.stdout in ("0.25 0.25\n", "0.5 0.5\n"), done.stderr
    offline = hub.run(tmp_path, "-c", LOAD, "a/b", HF_HUB_OFFLINE="1")
    hub.close()
    assert offline.stdout == done.stdout, offline.stderr


# Shortens the time limits.
SHORT = """
from lorascope.files import hub_answers
hub_answers.ANSWER_SECONDS = hub_answers._SLOW_SECONDS = 0.5
hub_answers._MOST_BYTES = 2**20
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", ["", "H", "slow headers", "slow body", "endless body"])
@pytest.mark.parametrize("answered", [0, 1, 2, 3, 5])
def test_hub_that_stops_answering_is_one_line(tmp_path: Path, answered: int, after: str) -> None:
    hub = Hub({"a/b": model_files(tmp_path / "model", 0.5)})
    hub.silent_after, hub.after = answered, after
    done = hub.run(tmp_path, "-c", SHORT + LOAD, "a/b", HF_HUB_DOWNLOAD_TIMEOUT="1")
    hub.close()
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith(("FileNotFoundError cannot load 'a/b'", "ValueError cannot load a tokenizer from a/b"))
    # The first request without an answer is the last, except for a file whose headers had come.
    assert len(hub.requested) <= answered + 2
