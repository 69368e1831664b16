"""Contents of one adapter or run, measured per module, with notable findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from lorascope.analysis.rank_use import RankUse
from lorascope.diagnosis.case import Case, MeasuredModule, known_rows
from lorascope.diagnosis.causes import RULES, Finding
from lorascope.files.hub import hub_source, label
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import count_phrase
from lorascope.files.typed_json import json_values
from lorascope.formats.stored_update import StoredUpdate
from lorascope.runs.adapter import Adapter
from lorascope.runs.checkpoint_names import describe_checkpoints
from lorascope.runs.module_summary import (
    Row,
    column,
    group_by_role,
    mean_without_nan,
    pool_norms,
    rank_range,
    table_of,
    without_nan,
)
from lorascope.runs.result import Result, describe_training

Facts = tuple[tuple[str, str], ...]
# Names in the header of a safetensors file.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip

_RANK_COLUMNS = ("least_rank", "most_rank", "used_rank", "allocated_rank")


@dataclass(frozen=True)
class InspectionReport:
    """Report of an inspection, as ``lorascope inspect`` shows it; base class of its kinds."""

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

    def module_rows(self) -> list[Row]:
        """Return one row per module, in the order of the axes; a layer outside the blocks is None."""
        raise NotImplementedError

    def role_rows(self) -> list[Row]:
        """Return one row per stack and role, in the order of the axes."""
        raise NotImplementedError

    def _json(self, **tables: Any) -> dict[str, Any]:
        """Return the JSON form, with other tables between the facts and the findings."""
        head = {"name": self.name, "path": str(self.path), "kind": self.facts[0][1], "facts": dict(self.facts[1:])}
        details = [finding.to_json() | {"modules": list(finding.modules)} for finding in self.details]
        return json_values(head | tables | {"findings": list(self.findings), "details": details})


@dataclass(frozen=True)
class Inspection(InspectionReport):
    """Inspection of one adapter or run, as ``lorascope inspect`` shows it.

    The columns of ``modules`` are the fields of ``MeasuredModule``.
    """

    measured: list[MeasuredModule]
    run: Result
    rank_use: RankUse | None  # None unless the updates are products of two factors

    @cached_property
    def modules(self) -> pd.DataFrame:
        """One row per module, in the order of the axes."""
        return table_of(MeasuredModule, self.measured)

    def module_rows(self) -> list[Row]:
        return list(map(vars, self.measured))

    def _adapted_rows(self) -> list[Row]:
        """Return the rows of adapted modules, or all rows without any: exports count no head among their modules."""
        rows = self.module_rows()
        return [row for row in rows if row["rank"] is not None] or rows

    @property
    def norm(self) -> float:
        """|dW| of the adapted modules, or of all modules without any, except for those with NaN."""
        return pool_norms(column(self._adapted_rows(), "update_norm"))

    @property
    def size(self) -> Row:
        """Numbers of the modules of ``norm``: ``modules, parameters, least_rank, most_rank``."""
        rows = self._adapted_rows()
        counts = {"modules": len(rows), "parameters": sum(column(rows, "parameters"))}
        return counts | rank_range(column(rows, "rank"))

    @property
    def has_base(self) -> bool:
        """Whether the norms of some weights are known."""
        return bool(known_rows(self.measured, "relative_update"))

    def roles(self) -> pd.DataFrame:
        """Return the rows of ``role_rows`` as a table."""
        return pd.DataFrame(self.role_rows()).astype(dict.fromkeys(_RANK_COLUMNS, "Int64"))

    def role_rows(self) -> list[Row]:
        """Return one row per stack and role, in the order of the axes.

        Keys are ``stack, role, modules, update_norm, relative_update`` (mean), ``energy, least_rank, most_rank,
        effective_rank`` (mean), and ``used_rank, allocated_rank``: sums over the modules of ``rank_use``, None without.
        """
        uses = {}
        if self.rank_use is not None:
            uses = {module.module: module for module in self.rank_use.modules}
        rows = []
        for (stack, role), modules in group_by_role(self.module_rows()):
            energies = without_nan(column(modules, "energy"))
            of_role = RankUse([uses[name] for name in column(modules, "module") if name in uses])
            rows.append(
                {
                    "stack": stack,
                    "role": role,
                    "modules": len(modules),
                    "update_norm": pool_norms(column(modules, "update_norm")),
                    "relative_update": mean_without_nan(column(modules, "relative_update")),
                    "energy": sum(energies or [math.nan]),  # unknown if the norms of all modules are NaN
                    **rank_range(column(modules, "rank")),
                    "effective_rank": mean_without_nan(column(modules, "effective_rank")),
                    "used_rank": of_role.used if of_role.modules else None,
                    "allocated_rank": of_role.allocated if of_role.modules else None,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        use = self.rank_use and self.rank_use.to_json()
        return self._json(update_norm=self.norm, rank_use=use, roles=self.role_rows(), modules=self.module_rows())


def inspect(run: Result, spectra: bool = False) -> Inspection:
    """Inspect every module of a run or adapter; ``spectra`` also runs full SVDs, see `Case`.

    Raises
    ------
    ValueError
        The run has no update: it is unfinished, or no update was recorded.
    """
    case = Case(run, spectra)
    measured = case.measured
    facts = _adapter_facts(case.run) if isinstance(case.run, Adapter) else _run_facts(run, len(measured))
    findings: list[Finding] = []
    for rule in RULES:
        if rule.inspected or not rule.fix:
            findings += rule.findings(case)
    return Inspection(run.path, facts, tuple(findings), measured, run, case.rank_use)


def run_name(run: Result) -> str:
    """Return the name under which an inspection shows a run: that of its folder, or its id without one."""
    return label(run.path) if run.path else run.id


def _run_facts(run: Result, count: int) -> Facts:
    meta, (training, model) = run.meta, describe_training(run)
    facts = (
        (run_name(run), training),
        ("model", model),
        ("size", f"{count_phrase(count, 'module')}, {meta.parameters.trained:,} trained parameters"),
    )
    if not meta.test:
        return facts
    test, steps = meta.test, meta.settings["steps"]
    return (*facts, ("test", f"{test.name} {test.metric:.4g}, loss {test.loss:.4g} after {steps} steps"))


def _adapter_facts(run: Adapter) -> Facts:
    updates, config = run.files.parts.values(), run.files.config
    scale = f"scale {_range(updates, 'scale')}"
    if run.files.kind == "FourierFT":
        size = f"{_range(updates, 'size')} coefficients, {scale}"
    else:
        if config:
            scale += _stated_alpha(config)
        else:  # the scale is a guess
            scale = "alpha not saved"
        size = f"rank {_range(updates, 'rank')}, {scale}"
    base = "not read"
    if run.base is not None:
        base = "read from the cache" if hub_source(run.base.folder) else f"read from {run.base.folder}"
    stored = describe_files([update.dtype for update in updates], run.files.files)
    facts = [(run.label, f"{run.files.kind}, {size}")]
    source = hub_source(run.files.path)
    if source:
        facts.append(("hub", f"{source[0]}, commit {source[1]}"))
    facts.append(("base", f"{run.meta.model} ({base})"))
    parameters = f"{run.meta.parameters.trained:,} parameters"
    facts.append(("size", f"{count_phrase(len(updates), 'module')}, {parameters}, {stored}"))
    checkpoints = describe_checkpoints(run.files.path)
    if checkpoints:
        facts.append(("checkpoints", checkpoints))
    return tuple(facts)


def _stated_alpha(config: Mapping[str, Any]) -> str:
    """Return the alpha of a configuration in parentheses, or "" if its kind has none."""
    # PEFT names it lora_alpha, or alpha in LoHa and LoKr, or after the method.
    alphas = list(map(config.get, ("lora_alpha", "alpha", "randlora_alpha")))
    if str(config.get("peft_type", "")).upper() == "LORA":
        alphas.append(8)  # the default of PEFT
    alpha = next((alpha for alpha in alphas if isinstance(alpha, int | float)), None)
    if alpha is None:
        return ""
    return f" (alpha {alpha:g}, rank-stabilized)" if config.get("use_rslora") else f" (alpha {alpha:g})"


def describe_files(dtypes: Iterable[str], files: Sequence[Any]) -> str:
    """Return the dtypes of an inspected adapter's tensors, and the number of their files."""
    names = sorted(DTYPES[dtype] for dtype in set(dtypes))
    return f"{' and '.join(names)}, {count_phrase(len(files), 'file')}"


def _range(updates: Iterable[StoredUpdate], name: str) -> str:
    """Return the smallest and the largest value of a field of stored updates."""
    values = list(map(attrgetter(name), updates))
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
