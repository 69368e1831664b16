"""Contents of one adapter or run, measured per module, with notable findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.diagnosis.case import Case, MeasuredModule
from lorascope.diagnosis.causes import RULES, Finding
from lorascope.files.hub import hub_source, label
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import count_phrase
from lorascope.runs.adapter import Adapter
from lorascope.runs.checkpoint_names import describe_checkpoints
from lorascope.runs.module_summary import table_of
from lorascope.runs.result import Result
from lorascope.schema.module_roles import position

Facts = tuple[tuple[str, str], ...]
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class InspectionReport:
    """Result of ``lorascope inspect``."""

    path: Path | None
    facts: Facts  # name and method, base or model, size
    details: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.facts[0][0]

    @property
    def findings(self) -> tuple[str, ...]:
        """One sentence per finding."""
        return tuple(finding.message for finding in self.details)

    def module_rows(self) -> list[dict[str, Any]]:
        """Return one row per module, in the order of the axes; a layer outside the blocks is None."""
        raise NotImplementedError

    def role_rows(self) -> list[dict[str, Any]]:
        """Return one row per stack and role, in the order of the axes."""
        raise NotImplementedError

    def _json(self, **tables: Any) -> dict[str, Any]:
        """Return the JSON form, with other tables between the facts and the findings."""
        head = {"name": self.name, "path": str(self.path), "kind": self.facts[0][1], "facts": dict(self.facts[1:])}
        details = [finding.to_json() | {"modules": list(finding.modules)} for finding in self.details]
        return json_values(head | tables | {"findings": list(self.findings), "details": details})


@dataclass(frozen=True)
class Inspection(InspectionReport):
    """Result of ``lorascope inspect`` for one adapter or run.

    The columns of ``modules`` are the fields of ``MeasuredModule``.
    """

    measured: list[MeasuredModule]
    run: Result

    @cached_property
    def modules(self) -> pd.DataFrame:
        """One row per module, in the order of the axes."""
        return table_of(MeasuredModule, self.measured)

    def module_rows(self) -> list[dict[str, Any]]:
        return [vars(each) for each in self.measured]

    @property
    def norm(self) -> float:
        """|dW| of all modules, without those with NaN."""
        return pool_norms([each.update_norm for each in self.measured])

    @property
    def has_base(self) -> bool:
        """Whether the norms of some weights are known."""
        return any(not math.isnan(each.relative_update) for each in self.measured)

    def roles(self) -> pd.DataFrame:
        """Return the rows of ``role_rows`` as a table."""
        return pd.DataFrame(self.role_rows()).astype({"least_rank": "Int64", "most_rank": "Int64"})

    def role_rows(self) -> list[dict[str, Any]]:
        """Return one row per stack and role, in the order of the axes.

        Keys are ``stack, role, modules, update_norm, relative_update`` (mean), ``energy, least_rank, most_rank,
        effective_rank`` (mean).
        """
        cells: dict[tuple[str, str], list[MeasuredModule]] = {}
        for each in self.measured:
            cells.setdefault((each.stack, each.role), []).append(each)
        rows = []

        def in_order(item: tuple[tuple[str, str], list[MeasuredModule]]) -> tuple[int, ...]:
            return role_position(*item[0], [each.layer for each in item[1]])

        for (stack, role), cell in sorted(cells.items(), key=in_order):
            ranks = [each.rank for each in cell if each.rank is not None]
            energies = _known(each.energy for each in cell)
            rows.append(
                {
                    "stack": stack,
                    "role": role,
                    "modules": len(cell),
                    "update_norm": pool_norms([each.update_norm for each in cell]),
                    "relative_update": known_mean(each.relative_update for each in cell),
                    "energy": sum(energies) if energies else math.nan,
                    "least_rank": min(ranks, default=None),
                    "most_rank": max(ranks, default=None),
                    "effective_rank": known_mean(each.effective_rank for each in cell),
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        return self._json(update_norm=self.norm, roles=self.role_rows(), modules=self.module_rows())


def inspect(run: Result, spectra: bool = False) -> Inspection:
    """Measure every module of a run or adapter; ``spectra`` also runs full SVDs, see `Case`.

    Raises
    ------
    ValueError
        The run has no update: it is unfinished, or no update was recorded.
    """
    case = Case(run, spectra)
    measured = case.measured
    facts = _adapter_facts(case.run) if isinstance(case.run, Adapter) else _run_facts(run, len(measured))
    found = (finding for rule in RULES if rule.inspected or not rule.fix for finding in rule.findings(case))
    return Inspection(run.path, facts, tuple(found), measured, run)


def role_position(stack: str, role: str, layers: Iterable[int | None]) -> tuple[int, ...]:
    """Return the position of a role on an axis; all of its layers count as the first one."""
    return position(stack, None if all(layer is None for layer in layers) else 0, role)


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def known_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if all are NaN."""
    known = _known(values)
    return sum(known) / len(known) if known else math.nan


def _run_facts(run: Result, count: int) -> Facts:
    meta = run.meta
    name = label(run.path) if run.path else run.id
    done = "" if run.finished else f", {meta.status}"
    facts = [
        (name, run.label + ("" if meta.seed is None else f", seed {meta.seed}") + done),
        ("model", meta.model + ("" if meta.task is None else f" on {meta.task}")),
        ("size", f"{count_phrase(count, 'module')}, {meta.parameters.trained:,} trained parameters"),
    ]
    if meta.test:
        test, steps = meta.test, meta.settings["steps"]
        facts.append(("test", f"{test.name} {test.metric:.4g}, loss {test.loss:.4g} after {steps} steps"))
    return tuple(facts)


def _adapter_facts(run: Adapter) -> Facts:
    parts, config = run.files.parts.values(), run.files.config
    scales, ranks = _range([part.scale for part in parts]), _range([part.rank for part in parts])
    size = f"rank {ranks}, " + (f"scale {scales}{_stated_alpha(config)}" if config else "alpha not saved")
    if run.files.kind == "FourierFT":
        size = f"{_range([part.size for part in parts])} coefficients, scale {scales}"
    stored = describe_files([part.dtype for part in parts], run.files.files)
    source = hub_source(run.files.path)
    return (
        (run.label, f"{run.files.kind}, {size}"),
        *([("hub", f"{source[0]}, commit {source[1]}")] if source else []),
        ("base", f"{run.meta.model} ({'not read' if run.base is None else f'read from {run.base.folder}'})"),
        ("size", f"{count_phrase(len(parts), 'module')}, {run.meta.parameters.trained:,} parameters, {stored}"),
        *([("checkpoints", line)] if (line := describe_checkpoints(run.files.path)) else []),
    )


def _stated_alpha(config: Mapping[str, Any]) -> str:
    """Return the alpha of a configuration in parentheses, or "" if its kind has none."""
    values = [config.get(name) for name in ("lora_alpha", "alpha", "randlora_alpha")]
    default = [8] * (str(config.get("peft_type", "")).upper() == "LORA")
    alpha = next((value for value in [*values, *default] if isinstance(value, int | float)), None)
    return "" if alpha is None else f" (alpha {alpha:g}{', rank-stabilized' * bool(config.get('use_rslora'))})"


def describe_files(dtypes: Iterable[str], files: Sequence[Any]) -> str:
    """Return the dtypes of tensors, and the number of their files."""
    return f"{' and '.join(sorted({DTYPES[dtype] for dtype in dtypes}))}, {count_phrase(len(files), 'file')}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def pool_norms(norms: Iterable[float]) -> float:
    """Return the root of the summed squares, ignoring NaN; NaN if all are NaN."""
    known = _known(norms)
    return math.hypot(*known) if known else math.nan


def in_axis_order(frame: pd.DataFrame, layers: Iterable[Any]) -> pd.DataFrame:
    """Sort rows with a stack and a role by their position on an axis."""
    places = [position(*place) for place in zip(frame["stack"], layers, frame["role"], strict=True)]
    return frame.iloc[sorted(range(len(frame)), key=places.__getitem__)].reset_index(drop=True)


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert a table to JSON values; unknown values are None."""
    return json_values(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def json_values(value: Any) -> Any:
    """Replace NaN and infinity by None in numbers, dicts and lists, since JSON has neither."""
    match value:
        case float():
            return value if np.isfinite(value) else None
        case dict():
            return {key: json_values(inner) for key, inner in value.items()}
        case list():
            return [json_values(inner) for inner in value]
    return value
