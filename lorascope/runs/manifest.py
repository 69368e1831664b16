"""Schemas of ``run.json``, ``recipe.json`` and snapshot headers, with the values that readers use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lorascope.files.file_names import is_plain
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Count, Finite, read_json, to_typed, unreadable
from lorascope.formats.peft_config import RESIDUAL_INITS, Allocation
from lorascope.runs.layout import Lazy
from lorascope.runs.module_summary import table_of
from lorascope.schema.labels import to_words
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import Quantity
from lorascope.updates.weight_update import form_named

SCHEMA = 1
"""Version of ``run.json``; a file with a higher one is not read."""


@dataclass
class Module:
    """Module of the model in a run's manifest, as in ``module_table.describe``."""

    module: str
    stack: str
    # The column ``layer`` is Int16.
    layer: Annotated[int, msgspec.Meta(ge=0, lt=2**15)] | None
    role: Literal[ROLES]
    out_features: Count | None = None
    in_features: Count | None = None
    tied: str | None = ""


@dataclass
class State:
    """Saved state in a run's manifest: its step, None if it is unknown, and the rank of every adapted module."""

    step: Count | None
    ranks: dict[str, Count]


@dataclass
class Parameters:
    """Numbers of parameters in a run's manifest: trained ones (with the head), all, and those of the head."""

    trained: Count
    total: Count | None = None
    head: Count | None = None


@dataclass
class Start:
    """Start of a run from another adapter, in its manifest: id of that run or folder, and whether with head."""

    run: str
    head: bool


@dataclass
class Fork:
    """Origin of a fork in a run's manifest: id of the run it continues, the step, and what it changes, by name."""

    run: str
    step: Count
    change: dict[str, Any]

    @property
    def description(self) -> str:
        """The change as text, such as "lr 0.0003"."""
        return ", ".join(f"{name} {to_words(value)}" for name, value in self.change.items()) or "no change"


@dataclass
class Test:
    """Test score in a run's manifest: name of the metric, its value, the loss, and the metric of each group.

    ``values`` are all metrics that ``train(metric=)`` named, and ``higher_is_better`` is the direction of the first;
    both are None by default.
    """

    __test__ = False  # not a test of pytest

    name: str
    metric: float
    loss: float
    groups: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] | None = None
    higher_is_better: bool | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower metric is better, as for a perplexity."""
        if self.higher_is_better is None:
            return self.name == "perplexity"
        return not self.higher_is_better


class _Method(Allocation, frozen=True, kw_only=True):
    name: str


class _Settings(msgspec.Struct, frozen=True):
    steps: Count
    batch_size: Count | None = None
    lr: float | None = None
    observers: list[dict[str, Any]] | None = None


class _SavedState(msgspec.Struct, frozen=True):
    step: Count
    ranks: dict[str, Count]


class _RunFile(msgspec.Struct, frozen=True):
    """Fields that ``run.json`` must have, unlike an adapter, and the values in its dictionaries that readers use."""

    status: Literal["running", "done", "broken"]
    recipe: _Method
    method: _Method
    settings: _Settings
    checksums: dict[str, str]
    states: dict[str, _SavedState]


@dataclass(kw_only=True)
class Manifest:
    """Manifest of a run or an adapter: the content of ``run.json``.

    Parameters
    ----------
    id, label : str
        Hash of everything that the run depends on, and the name of the recipe, equal for all seeds.
    method, recipe : dict
        Configuration of the method that ran, and of the one that was passed to ``train``.
    model, task : str
        Names of the base model and of the data; ``task`` is None for an adapter.
    seed : int or None
    status : {"running", "done", "broken", "not trained here"}
    settings : dict
        Settings of the training; empty for an adapter.
    parameters : Parameters
    modules : list of Module
    states : dict of State
        Saved states by name: "last" and, if validation selected one, "best".
    checksums : dict
        SHA-256 of every other file of the folder, by name.
    test : Test or None
        Score of the final state, None before the end.
    parents : list of str
        Folders of earlier phases, relative to this one.
    fork : Fork or None
        Run and step from which ``ls.fork`` continued, and the change.
    start : Start or None
        Run or adapter from which the training started.
    task_options : dict or None
        Arguments of ``tasks.load`` other than the name, such as ``splits``.
    selected_on_test : bool or None
        True if validation and test were the same rows.
    weight_parts : dict or None
        Rows of the adapted parts of fused weights by name, such as ``transformer.h.0.attn.c_attn[q]``: number of equal
        groups of rows, and first and last row (exclusive) in each group. None if only whole weights are adapted.
    peak_memory : int or None
        Peak memory of the training in bytes: what torch allocated on a GPU, or on a CPU the resident memory of the
        process that finished it. None for older runs, and where it is not known.
    facts : dict
        What readers need to know about the method, by ``Method.describe``.
    source : str or None
        Folder of an adapter that was trained elsewhere.

    Notes
    -----
    A field without a value (None) that has a default is not written.
    """

    id: str
    label: str
    method: dict[str, Any]
    recipe: dict[str, Any]
    model: str
    task: str | None
    seed: int | None
    status: Literal["running", "done", "broken", "not trained here"]
    settings: dict[str, Any]
    parameters: Parameters
    modules: list[Module]
    schema: int = SCHEMA
    parents: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    test: Test | None = None
    phase: list[str] | None = None
    labels: list[str] | None = None
    quantities: dict[str, Quantity] | None = None
    hosts: dict[str, str] | None = None
    w0_hash: str | None = None
    data_hash: str | None = None
    fork: Fork | None = None
    start: Start | None = None
    error: str | None = None
    commit: str | None = None
    versions: dict[str, str] | None = None
    device: str | None = None
    processor: str | None = None
    task_kind: str | None = None
    task_type: str | None = None
    task_options: dict[str, Any] | None = None
    selected_on_test: bool | None = None
    eval_overlap: float | None = None
    weight_parts: dict[str, tuple[Count, Count, Count]] | None = None
    left_out: dict[str, str] | None = None
    frozen: dict[str, list[str]] | None = None
    started: int | None = None
    seconds: Finite = 0.0
    total_seconds: Finite = 0.0
    peak_memory: Count | None = None

    @property
    def tested_state(self) -> str:
        """State that was tested as words, empty for the last one; also whether the tested rows selected it."""
        if self.settings.get("test_state", "last") == "last":
            return ""
        return "best state" + ", selected on the reported split" * bool(self.selected_on_test)

    facts: dict[str, Any] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.facts is None:  # of adapters, and of trainings with PEFT
            self.facts = _assumed_facts(self.method)

    def table(self) -> pd.DataFrame:
        """Return the modules, as ``module_table.describe`` does."""
        table = table_of(Module, self.modules)
        return table.assign(tied=[module.tied or "" for module in self.modules])

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``run.json``."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        content["test"] = content["test"] or {}
        for name in ("values", "higher_is_better"):
            if content["test"].get(name) is None:
                content["test"].pop(name, None)
        for entry in fields(self):
            if entry.default is None and content.get(entry.name) is None:
                content.pop(entry.name, None)
        return content


class Axes(msgspec.Struct, frozen=True):
    """Axes of an array in the manifest of a snapshot: their names, if any, and labels along some of them."""

    axes: list[str] = msgspec.field(default_factory=list)
    labels: dict[str, list[str | float | bool | None]] = msgspec.field(default_factory=dict)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array of this shape has these axes and labels."""
        sizes = dict(zip(self.axes, shape, strict=False))
        has_labels = all(len(labels) == sizes.get(axis) for axis, labels in self.labels.items())
        return has_labels and len(self.axes) in (0, len(shape))


class SnapshotAbout(msgspec.Struct, frozen=True):
    """Manifest of a snapshot: the description of its arrays, from its header."""

    factors: dict[str, list[str]]
    scales: dict[str, Finite]
    exact: dict[str, bool]
    axes: dict[str, Axes]
    forms: dict[str, str] = msgspec.field(default_factory=dict)


def _assumed_facts(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a method, from its configuration or PEFT's, for runs of PEFT and adapters."""
    # A run of PEFT is called "peft" and has PEFT's type in ``kind``.
    kinds = {str(method.get(key)).lower() for key in ("name", "kind")}
    if "fourierft" in kinds:
        # "init" is our setting; "init_weights" is PEFT's, whose true value means zeros.
        return {"starts_at_zero": method.get("init") == "zeros" or bool(method.get("init_weights"))}
    if "neft" in kinds:
        scores = {"changed": "selection_cosine", "reversed": "selection_cosine", "probed": "probe_cosine"}
        score, roles = scores.get(str(method.get("select_by"))), method.get("targets")
        if method.get("neurons") is not None:  # given ones, which no score has selected
            score = None
        if not isinstance(roles, list):
            roles = []
        return {"starts_at_zero": True, "neuron_roles": roles, "selection_score": score}
    # False means a random B in PEFT, and the residual types change the base by the initial update.
    starts_nonzero = str(method.get("init_lora_weights", True)).lower().startswith(("false", *RESIDUAL_INITS))
    return {"starts_at_zero": not starts_nonzero, "masks_components": "adalora" in kinds}


def describe_modules(table: pd.DataFrame) -> list[Module]:
    """Return the rows of ``module_table.describe`` as the modules of a run's manifest."""
    rows: Any = table.astype(object).where(table.notna(), None).to_dict("records")
    return [Module(**row) for row in rows]


def read_manifest(file: Path) -> Manifest:
    """Read a run's manifest, ``run.json``; this is the only reader of its schema.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file is broken, a value has the wrong type, a parent is not a sibling folder, or a newer version wrote it.
    """
    content = read_json(file, dict[str, Any])
    # The version comes first, because a newer one may have other fields.
    schema = to_typed(content.get("schema"), int, f"schema of {file}")
    if schema > SCHEMA:
        raise unreadable(file.parent, f"schema must be <= {SCHEMA}, got {schema}; update lorascope")
    to_typed(content, _RunFile, file)
    manifest = to_typed(content | {"test": content.get("test") or None}, Manifest, file)
    module, count = next(iter(Counter(row.module for row in manifest.modules).most_common(1)), ("", 0))
    if count > 1:
        raise unreadable(file, f"modules must have one row each, got {count} rows of {printable(module)}")
    # A file from elsewhere must not open folders other than its siblings.
    for parent in manifest.parents:
        if not is_plain(parent.removeprefix("../")) or not parent.startswith("../"):
            raise unreadable(file, f"a parent must be '../NAME', got {printable(parent)!r}")
    return manifest


def read_about(file: TensorFile) -> SnapshotAbout:
    """Read the manifest of a snapshot's arrays; a ValueError reports where it does not fit them."""
    header = f"the header of {file.path}"
    about = to_typed(file.about, SnapshotAbout, header)
    for module, names in about.factors.items():
        for name in names:
            if f"{module}/{name}" not in file:
                raise unreadable(file.path, f"{printable(module)} has no {printable(name)}")
        if module in about.scales:
            _require_form(file, module, names, about.forms.get(module))
    if about.scales.keys() != about.exact.keys() or not about.scales.keys() <= about.factors.keys():
        raise unreadable(header, "scales and exact must match its factors")
    for name, axes in about.axes.items():
        if name not in file or not axes.fits(file.shape(name)):
            raise unreadable(file.path, f"axes of {printable(name)} must match its array")
    return about


def _require_form(file: TensorFile, module: str, names: list[str], form: str | None) -> None:
    """Raise a ValueError if the factors of a module do not form an update."""
    shapes, floats = {}, {}
    for name in names:
        shapes[name] = file.shape(f"{module}/{name}")
        floats[name] = file.dtype(f"{module}/{name}").startswith(("F", "BF"))
    arrays = Lazy(names, lambda name: file[f"{module}/{name}"])
    try:
        fits = form_named(form, names).fits(shapes, floats, arrays)
    except ValueError:  # no such form
        fits = False
    if not fits:
        factors = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        if form:
            factors += f" of form {form!r}"
        raise unreadable(file.path, f"factors of {printable(module)} must form an update, got {printable(factors)}")
