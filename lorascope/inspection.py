"""What one adapter or run holds, measured module by module, and what about it is worth a sentence."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lorascope.adapter_files import pattern_key
from lorascope.checkpoints import AdapterRun, spectra_by_layer
from lorascope.forms import UNTRAINED
from lorascope.roles import position
from lorascope.run import Run
from lorascope.update import energy_rank

_SHARE = 0.9
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Inspection:
    """What ``lorascope inspect`` tells.

    Parameters
    ----------
    run : Run
    name : str
        Name of the folder.
    facts : tuple of (str, str)
        The header: what it is, its base, its size.
    modules : DataFrame
        ``module, stack, layer, role, rank, parameters, update_norm, relative_update, energy, stable_rank,
        effective_rank, energy_rank, exact``, in the order of the axes; ``energy`` is the share of the summed
        |dW|^2, NaN where factors hold NaN.
    findings : tuple of str
        A sentence each.
    """

    run: Run
    name: str
    facts: tuple[tuple[str, str], ...]
    modules: pd.DataFrame
    findings: tuple[str, ...]

    @property
    def norm(self) -> float:
        """|dW| of all modules together, those with NaN left out."""
        return pooled(self.modules["update_norm"])

    def roles(self) -> pd.DataFrame:
        """One row a stack and role: ``modules, update_norm, energy, least_rank, most_rank, effective_rank`` (mean)."""
        cells = self.modules.groupby(["stack", "role"], sort=False, observed=True)
        frame = cells.agg(
            layer=("layer", "min"),
            modules=("module", "size"),
            update_norm=("update_norm", pooled),
            relative_update=("relative_update", "mean"),
            energy=("energy", lambda shares: shares.sum(min_count=1)),
            least_rank=("rank", "min"),
            most_rank=("rank", "max"),
            effective_rank=("effective_rank", "mean"),
        ).reset_index()
        places = zip(frame["stack"], frame["layer"].clip(upper=0), frame["role"], strict=True)
        order = sorted(range(len(frame)), key=dict(enumerate(position(*place) for place in places)).__getitem__)
        return frame.drop(columns="layer").iloc[order].reset_index(drop=True)

    def largest(self, count: int) -> pd.DataFrame:
        """The modules with the largest updates."""
        return self.modules.nlargest(count, "update_norm")

    def plain(self) -> dict[str, Any]:
        """The JSON form; what is unknown is None."""
        return {
            "name": self.name,
            "path": str(self.run.path),
            "kind": self.facts[0][1],
            "facts": dict(self.facts[1:]),
            "update_norm": self.norm,
            "roles": rows(self.roles()),
            "modules": rows(self.modules),
            "findings": list(self.findings),
        }


def inspect(run: Run) -> Inspection:
    """Measure every module of a run or adapter.

    Raises
    ------
    ValueError
        The run holds no update: it is unfinished, or nothing was recorded.
    """
    modules = _modules(run)
    facts, own = (
        (_adapter_facts(run), _adapter_findings(run))
        if isinstance(run, AdapterRun)
        else (_run_facts(run, len(modules)), ())
    )
    return Inspection(run, facts[0][0], facts, modules, (*_findings(run, modules), *own))


def pooled(norms: pd.Series) -> float:
    """Root of summed squares of what is not NaN; NaN if all are."""
    return float(np.sqrt((norms**2).sum(min_count=1)))


def _modules(run: Run) -> pd.DataFrame:
    frame = run.summary()
    if frame.empty:
        raise ValueError(f"run {run.id} recorded no update of any module: train with observe=[ls.observe.norms()]")
    sigmas = _singular_values(run, frame["module"])
    frame["energy_rank"] = [energy_rank(sigmas[m], _SHARE) if m in sigmas else np.nan for m in frame["module"]]
    squares = frame["update_norm"] ** 2
    frame["energy"] = squares / squares.sum() if squares.sum() > 0 else squares
    frame["parameters"] = _parameters(run, frame)
    columns = ["module", "stack", "layer", "role", "rank", "parameters", "update_norm", "relative_update", "energy"]
    return frame[[*columns, "stable_rank", "effective_rank", "energy_rank", "exact"]]


def _parameters(run: Run, frame: pd.DataFrame) -> pd.Series:
    """Values that an adapter stores of a module, or a run trains: by the rank, where nothing else does."""
    if isinstance(run, AdapterRun):
        return frame["module"].map({module: part.size for module, part in run.files.parts.items()})
    outer, inner = _shapes(run, frame["module"]).T
    factored = (frame["rank"] * (outer + inner)).fillna(0)
    counted = factored.where(frame["rank"].notna(), outer * inner).astype("int64")
    held = run.factors()
    if UNTRAINED.isdisjoint(next(iter(held.values()), ())):
        return counted
    sizes = {module: sum(parts[name].size for name in parts.keys() - UNTRAINED) for module, parts in held.items()}
    return frame["module"].map(sizes).fillna(counted).astype("int64")


def _singular_values(run: Run, modules: pd.Series) -> Mapping[str, np.ndarray]:
    """Spectra of the factored updates, and of the dense ones that were recorded at the last step."""
    if isinstance(run, AdapterRun):
        return run.spectra if all(part.thin for part in run.files.parts.values()) else {}
    found = dict(spectra_by_layer(run))
    last = run.meta["states"]["last"]["step"]
    for module in modules:
        name = f"{module}/singular_values"
        if module not in found and last in run.snapshot_steps(name):
            found[module] = run.snapshot(name, last)["value"].to_numpy()
    return found


def _shapes(run: Run, modules: pd.Series) -> Int[np.ndarray, "n 2"]:
    """(out, in) of every module; a second name of a tied weight has no row of its own, its update tells."""
    described = run.modules.set_index("module")[["out_features", "in_features"]]
    known = set(described.index)
    return np.array(
        [described.loc[name] if name in known else run.updates()[name].shape for name in modules], dtype=np.int64
    )


def _adapter_facts(run: AdapterRun) -> tuple[tuple[str, str], ...]:
    parts = run.files.parts.values()
    scales = _range([part.scale for part in parts])
    config = run.files.config
    alpha = f"alpha {config.get('lora_alpha', 8):g}" + (", rank-stabilised" if config.get("use_rslora") else "")
    size = f"rank {_range([part.rank for part in parts])}, scale {scales} ({alpha})"
    if run.files.kind == "FourierFT":
        size = f"{_range([part.size for part in parts])} coefficients, scale {scales}"
    dtypes = sorted({DTYPES[part.dtype] for part in parts})
    files = len(run.files.files)
    stored = f"{' and '.join(dtypes)}, {files} file{'s' * (files > 1)}"
    return (
        (run.label, f"{run.files.kind}, {size}"),
        ("base", f"{run.meta['model']} ({'not read' if run.base is None else f'read from {run.base.folder}'})"),
        ("holds", f"{len(parts)} modules, {run.meta['parameters']['trained']:,} parameters, {stored}"),
    )


def _run_facts(run: Run, count: int) -> tuple[tuple[str, str], ...]:
    meta = run.meta
    name = run.path.resolve().name if run.path else run.id
    facts = [
        (name, f"{run.label}, seed {meta['seed']}" + ("" if run.finished else f", {meta['status']}")),
        ("model", f"{meta['model']} on {meta['task']}"),
        ("holds", f"{count} modules, {meta['parameters']['trained']:,} trained parameters"),
    ]
    if meta["test"]:
        test, steps = meta["test"], meta["settings"]["steps"]
        facts.append(("test", f"{test['name']} {test['metric']:.4g}, loss {test['loss']:.4g} after {steps} steps"))
    return tuple(facts)


def _findings(run: Run, modules: pd.DataFrame) -> Iterator[str]:
    """What holds for any update: NaN, nothing at all, much in few directions."""
    routed = int((~modules["exact"]).sum())
    if routed:
        yield f"{routed} of {len(modules)} modules depend on their input: their updates here are at mean gates"
    broken = modules["module"][modules["update_norm"].isna()]
    if len(broken):
        yield f"{_count(len(broken), modules)} NaN or infinity: {some(broken)}"
    untouched = modules["module"][modules["update_norm"] == 0]
    if len(untouched) == len(modules):
        yield f"all {len(modules)} modules untouched: saved before it was trained?"
    elif len(untouched):
        plural = "s" * (len(untouched) > 1)
        yield f"{len(untouched)} module{plural} untouched: {some(untouched)}{_zero(run, untouched)}"
    sound = modules[modules["update_norm"] > 0]
    known = sound.dropna(subset=["energy_rank", "rank"])
    if len(known) and known["rank"].min() >= 4:
        narrow = int((known["energy_rank"] <= known["rank"] // 4).sum())
        ranks = sorted(set(known["rank"] // 4))
        bound = f"rank {ranks[0]} or less" if len(ranks) == 1 else "a quarter of their rank"
        yield f"{narrow or 'none'} of {len(known)} modules hold {100 * _SHARE:.0f} % of their energy in {bound}"


def _zero(run: Run, modules: pd.Series) -> str:
    """Which factor is zero, where it is the same one in all modules."""
    factors = run.factors()
    zero = {
        tuple(name for name, array in factors[module].items() if not np.any(array)) if module in factors else ()
        for module in modules
    }
    names = zero.pop() if len(zero) == 1 else ()
    return f" ({' and '.join(names)} zero)" if names else ""


def _adapter_findings(run: AdapterRun) -> Iterator[str]:
    """What the files say beside their factors."""
    config, others = run.files.config, run.files.others
    biases = {name.rpartition(".")[0] for name in others if name.endswith(".bias")}
    whole = {name.removesuffix(".weight").removesuffix(".base_layer") for name in others if not name.endswith(".bias")}
    if whole:
        yield f"saved in full beside the factors, not measured: {some(sorted(whole))}"
    if biases - whole:
        yield f"{len(biases - whole)} biases beside the factors, not measured"
    lacking = [module for module in run.files.parts if run.base is not None and not run.base.holds(module)]
    if lacking:
        yield f"not in the base, tied perhaps: {some(lacking)}"
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_RESIDUAL):
        yield f"initialised by {start}: unless converted, it adds to a changed base, and |dW| counts that too"
    for pattern in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(pattern) or {}
        idle = [key for key in patterns if not any(pattern_key([key], module) for module in run.files.parts)]
        if idle:
            yield f"{pattern} names no module of this adapter: {some(idle)}"


def some(names: Any) -> str:
    """One name, and how many others."""
    listed = [str(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def _count(count: int, modules: pd.DataFrame) -> str:
    return f"{count} of {len(modules)} modules hold{'s' * (count == 1)}"


def _range(values: Sequence[float | int]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def rows(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """A table as JSON values; what is unknown is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
