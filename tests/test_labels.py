"""Labels of methods and jobs, which are short and the same in every process."""

from __future__ import annotations

import ast
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorascope
from lorascope.analysis.recipe_tests import name_recipes
from lorascope.experiments.sweep import Job, SweepResult
from lorascope.inputs import models
from lorascope.methods import METHODS
from lorascope.methods.method import Method, config, from_config
from lorascope.schema.labels import to_words

NAMES = tuple(f"model.layers.{layer}.self_attn.{leaf}" for layer in range(18) for leaf in ("q_proj", "v_proj"))
LISTED = [name for name, method in METHODS.items() if "targets" in method.__dataclass_fields__ and name != "neft"]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def student() -> None:
    """Represent a function that builds a model."""


class Schedule:
    """An object whose ``repr`` is its address."""


class Custom(Method):
    """A method with arbitrary fields."""

    def __init__(self, **fields: Any) -> None:
        self.lr = self.head_lr = 1e-4
        self.search_share = 0.0


@pytest.mark.parametrize("name", LISTED)
def test_long_list_of_modules_is_shown_by_its_length(name: str) -> None:
    assert METHODS[name](targets=NAMES).label().endswith(", targets 36 modules")
    assert METHODS[name](targets=("q", "k", "v")).label().endswith(", targets q k v")


def test_other_fields_with_many_modules_are_short() -> None:
    assert METHODS["adapprox"](dense=NAMES).label().endswith(", dense 36 modules")
    chosen = {name: list(range(50)) for name in NAMES}
    assert METHODS["neft"](neurons=chosen).label() == "NeFT, neurons by module"
    assert METHODS["lora"](rank=dict.fromkeys(NAMES, 4)).label() == "LoRA, rank by module"


@pytest.mark.parametrize(
    ("name", "fields", "shown"),
    [
        ("lora", {"rank": {"a.b": 3}, "targets": ("q",)}, "LoRA, rank by module, targets q"),
        ("lora", {"dropout": 0.1, "targets": "all-linear"}, "LoRA, dropout 0.1, targets all-linear"),
        ("lisa", {"n_active": 0, "weights": (1.5, 2)}, "LISA, n_active 0, weights 1.5 2"),
        ("neft", {"neurons": {"a.b": [0, 3]}, "tune_lr": 1e-4}, "NeFT, neurons by module, tune_lr 0.0001"),
        ("adapprox", {"betas": (0.0, 0.99), "min_dim": None}, "Adapprox, betas 0 0.99, min_dim None"),
        ("hydralora", {"num_experts": 7, "shared_a": False}, "HydraLoRA, num_experts 7, shared_a False"),
    ],
)
def test_fields_of_every_type_are_labeled_and_survive_json(name: str, fields: dict[str, Any], shown: str) -> None:
    method = METHODS[name](**fields)
    assert method.label() == shown
    assert from_config(json.loads(json.dumps(config(method)))) == method


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (student, "student"),
        (partial(models.load, "minilm", blocks=2), "load(minilm, blocks=2)"),
        (partial(student), "student()"),
        (lambda: None, "<lambda>"),
        (Schedule, "Schedule"),
        (Schedule(), "Schedule"),
        (Schedule().__eq__, "object.__eq__"),
        ("minilm", "minilm"),
        (None, "None"),
        (torch.float16, "torch.float16"),
        (8, "8"),
    ],
    ids=range(11),  # the default contains addresses, which differ between the processes of the suite
)
def test_objects_are_described_without_addresses(value: object, shown: str) -> None:
    assert to_words(value) == shown


def test_fields_of_a_method_show_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorascope.methods import method as module

    shown = {"builder": student, "schedule": Schedule(), "mask": {"array": "0123456789abcdef"}, "long": list(range(99))}
    monkeypatch.setattr(module, "config", lambda each: shown if each is mine else {})
    mine = Custom()
    assert mine.label() == "Custom, builder student, schedule Schedule, mask array 01234567, long 99 values"


def test_array_in_a_method_is_shown_by_its_hash() -> None:
    mine = METHODS["lora"](rank=8)
    mine.rank = np.arange(8)  # type: ignore[assignment]
    assert mine.label() == f"LoRA, rank array {config(mine)['rank']['array'][:8]}"


def test_jobs_on_several_models_are_named_by_their_builders() -> None:
    lora = METHODS["lora"]()
    jobs = [Job(model, "sentiment", lora, {}) for model in (student, partial(models.load, "minilm", blocks=2))]
    assert SweepResult(jobs).names == ["LoRA, student, seed 0", "LoRA, load(minilm, blocks=2), seed 0"]


def test_recipes_with_long_fields_are_short_and_distinct() -> None:
    fields = [{"neurons": {name: [number] for name in NAMES}} for number in (0, 1)] + [{"neurons": NAMES}]
    found = name_recipes(["NeFT"] * 3, fields)
    assert len(set(found)) == 3
    assert all(one.startswith("NeFT, neurons 36 values (") and len(one) < 40 for one in found)
    assert name_recipes(["LoRA"] * 2, [{"rank": {"q": 1}}, {"rank": {"q": 2}}]) == [
        'LoRA, rank {"q": 1}',
        'LoRA, rank {"q": 2}',
    ]


@pytest.mark.parametrize("folder", ["plots", "papers", "schema", "observe"])
def test_labels_and_captions_write_the_update_as_the_glossary(folder: str) -> None:
    """W − W₀, and ΔW only with ΔW₀, where it is the learned update; formulas of docstrings may have W_0."""
    texts = []
    for file in sorted((Path(lorascope.__file__).parent / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
                texts.append((file.name, node.value))
    wrong = [(file, text) for file, text in texts if re.search(r"W_0|\|dW\||ΔW(?! [−=]|₀)|W - W", text)]
    assert wrong == []
