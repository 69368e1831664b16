"""Schemas of ``run.json``, ``recipe.json`` and snapshot headers, with the values that readers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, is_plain
from lorascope.files.typed_json import Count, Finite, Positive, to_typed
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import Quantity


@dataclass(frozen=True)
class _Module:
    module: str
    stack: str
    layer: Annotated[int, msgspec.Meta(ge=0, lt=2**15)] | None
    role: Literal[ROLES]
    out_features: Count | None = None
    in_features: Count | None = None
    tied: str | None = ""


@dataclass(frozen=True)
class _State:
    step: Count
    ranks: dict[str, Count]


@dataclass(frozen=True)
class Allocation:
    """Budget and schedule of AdaLoRA, under the names of lorascope and of PEFT."""

    kind: str | None = None
    target_rank: Finite = 1
    target_r: Finite = 1
    init_rank: Positive = 1
    init_r: Positive = 1
    tinit: Count = 0
    deltaT: Positive = 1
    tfinal: Count = 0
    total_step: Count | None = None


@dataclass(frozen=True)
class _Method(Allocation):
    name: str = field(kw_only=True)


@dataclass(frozen=True)
class _Settings:
    steps: Count
    batch_size: Count | None = None
    lr: float | None = None
    observers: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Test:
    name: str
    metric: float
    loss: float
    groups: dict[str, float] | None = None


@dataclass(frozen=True)
class _Parameters:
    trained: Count


@dataclass(frozen=True)
class _Run:
    id: str
    label: str
    model: str
    task: str | None
    seed: int | None
    status: Literal["running", "done", "broken"]
    recipe: _Method
    method: _Method
    settings: _Settings
    parents: list[str]
    checksums: dict[str, str]
    states: dict[str, _State]
    modules: list[_Module]
    parameters: _Parameters
    test: dict[str, Any]
    labels: list[str] | None = None
    quantities: dict[str, Quantity] | None = None
    hosts: dict[str, str] | None = None
    w0_hash: str | None = None
    data_hash: str | None = None
    error: str | None = None
    commit: str | None = None
    task_kind: str | None = None
    task_type: str | None = None
    eval_overlap: float | None = None
    seconds: Finite | None = None
    total_seconds: Finite | None = None


@dataclass(frozen=True)
class Recipe:
    """Status of a recipe and the folder names of its phases."""

    status: Literal["running", "done"]
    phases: Annotated[list[str], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class _Axes:
    axes: list[str] = field(default_factory=list)
    labels: dict[str, list[str | float | bool | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """Description of the arrays of a snapshot, from its header."""

    factors: dict[str, list[str]]
    scales: dict[str, Finite]
    exact: dict[str, bool]
    axes: dict[str, _Axes]


def require_run(meta: Mapping[str, Any], file: Path) -> None:
    """Raise a ValueError if a value of ``run.json`` has the wrong type or a parent is not a sibling folder."""
    run = to_typed(meta, _Run, file)
    if run.test:
        to_typed(run.test, _Test, f"test of {file}")
    for parent in run.parents:
        if not is_plain(parent.removeprefix("../")) or not parent.startswith("../"):
            raise ValueError(f"cannot read {printable(file)}: a parent must be '../NAME', got {printable(parent)!r}")


def read_about(file: TensorFile) -> About:
    """Return the description of a snapshot's arrays, after checking it against the arrays.

    Raises
    ------
    ValueError
        A value has the wrong type, or an array is missing or has the wrong shape.
    """
    about = to_typed(file.about, About, f"the header of {file.path}")
    for module, names in about.factors.items():
        lacking = next((name for name in names if f"{module}/{name}" not in file), None)
        if lacking is not None:
            raise ValueError(f"cannot read {printable(file.path)}: {printable(module)} has no {printable(lacking)}")
        if module in about.scales:
            _require_form(file, module, names)
    if about.scales.keys() != about.exact.keys() or not about.scales.keys() <= about.factors.keys():
        raise ValueError(f"cannot read the header of {printable(file.path)}: scales and exact must match its factors")
    for name, axes in about.axes.items():
        sizes = dict(zip(axes.axes, file.shape(name), strict=False)) if name in file else {}
        fits = name in file and len(axes.axes) in (0, len(file.shape(name)))
        if not (fits and all(len(labels) == sizes.get(axis) for axis, labels in axes.labels.items())):
            raise ValueError(f"cannot read {printable(file.path)}: axes of {printable(name)} must match its array")
    return about


def _require_form(file: TensorFile, module: str, names: list[str]) -> None:
    """Raise a ValueError if the factors of a module do not form an update; see ``factor_formats.update_from``."""
    shapes = {name: file.shape(f"{module}/{name}") for name in names}
    floats = {name: file.dtype(f"{module}/{name}").startswith(("F", "BF")) for name in names}
    match shapes:
        case {"coefficients": (n,), "entries": (2, m), "shape": (2,)}:
            (outer, inner), entries = file[f"{module}/shape"].tolist(), file[f"{module}/entries"]
            sides = isinstance(outer, int) and isinstance(inner, int) and 0 < min(outer, inner) <= max(outer, inner)
            # The size is limited because spectra require the whole matrix.
            whole = entries.dtype.kind in "iu" and sides and max(outer, inner) < 2**24 and outer * inner <= 2**31
            fits = n == m and whole and bool(((entries >= 0) & ((outer, inner) > entries.T).T).all())
            fits = fits and floats["coefficients"]
        case {"gates": (heads,), "A": (*number, rank, _), "B": (count, _, width)}:
            fits = heads == count > 0 and rank == width and number in ([], [heads]) and all(floats.values())
        case {"A": (rank, _), "B": (_, width), **rest} if "gates" not in rest:
            fits = rank == width and rest.get("diagonal", (rank,)) == (rank,) and floats["A"] and floats["B"]
        case _:
            fits = False
    if not fits:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"cannot read {printable(file.path)}: factors of {printable(module)} must form an update, "
            f"got {printable(found)}"
        )
