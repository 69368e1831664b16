"""Contents of one adapter or run, measured per module, with notable findings."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lorascope.diagnosis.base_comparison import BASE_COLUMNS, DIRECTIONS, compare_with_base
from lorascope.runs.adapter import Adapter
from lorascope.runs.formats.peft_lora import CONFIG, RESIDUAL
from lorascope.runs.gated_run import gate_description
from lorascope.runs.result import Result, spectra_by_layer
from lorascope.schema.module_roles import position
from lorascope.schema.name_patterns import Patterns
from lorascope.updates import Pair, constant_factors, effective_rank, energy_rank, stable_rank
from lorascope.updates.linalg import root_of_squares

_SHARE = 0.9
_DEAD = 1e-6  # fraction of the largest singular value, below which the two ways to compute them differ
_COLUMNS = (
    *("module", "stack", "layer", "role", "rank", "scale", "parameters", "update_norm", "relative_update", "energy"),
    *("stable_rank", "effective_rank", "energy_rank", "dead", "exact"),
    *BASE_COLUMNS,
)


@dataclass(frozen=True)
class Inspection:
    """Result of ``lorascope inspect`` for one adapter or run.

    Parameters
    ----------
    run : Run
        The inspected run or adapter.
    name : str
        Name of the folder.
    facts : tuple of (str, str)
        Header: method, base, size.
    modules : DataFrame
        ``module, stack, layer, role, rank, scale, parameters, update_norm, relative_update, energy, stable_rank,
        effective_rank, energy_rank, dead, exact``, in the order of the axes. ``energy`` is the fraction of the summed
        |dW|^2, NaN if factors contain NaN. ``dead`` counts unused components: those within the rank whose singular
        value is below 1e-6 of the largest. The columns of ``compare_with_base`` follow, NaN without a base.
    findings : tuple of str
        One sentence per finding.
    """

    run: Result
    name: str
    facts: tuple[tuple[str, str], ...]
    modules: pd.DataFrame
    findings: tuple[str, ...]

    @property
    def cautions(self) -> tuple[str, ...]:
        """Findings that affect its comparison with other inspections."""
        own = adapter_cautions(self.run) if isinstance(self.run, Adapter) else ()
        return (*_norm_cautions(self.run, self.modules), *_base_findings(self.modules), *own)

    @property
    def norm(self) -> float:
        """|dW| of all modules, without those with NaN."""
        return pool_norms(self.modules["update_norm"])

    def roles(self) -> pd.DataFrame:
        """Return one row per stack and role.

        Columns are ``modules, update_norm, relative_update`` (mean), ``energy, least_rank, most_rank, effective_rank``
        (mean).
        """
        cells = self.modules.groupby(["stack", "role"], sort=False, observed=True)
        frame = cells.agg(
            layer=("layer", "min"),
            modules=("module", "size"),
            update_norm=("update_norm", pool_norms),
            relative_update=("relative_update", "mean"),
            energy=("energy", lambda shares: shares.sum(min_count=1)),
            least_rank=("rank", "min"),
            most_rank=("rank", "max"),
            effective_rank=("effective_rank", "mean"),
        ).reset_index()
        # All layers count as the first one: only stack and role determine the order.
        places = zip(frame["stack"], frame["layer"].clip(upper=0), frame["role"], strict=True)
        order = sorted(range(len(frame)), key=dict(enumerate(position(*place) for place in places)).__getitem__)
        return frame.drop(columns="layer").iloc[order].reset_index(drop=True)

    def largest(self, count: int) -> pd.DataFrame:
        """Return the modules with the largest updates."""
        return self.modules.nlargest(count, "update_norm")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        return {
            "name": self.name,
            "path": str(self.run.path),
            "kind": self.facts[0][1],
            "facts": dict(self.facts[1:]),
            "update_norm": json_values(self.norm),
            "roles": rows(self.roles()),
            "modules": rows(self.modules),
            "findings": list(self.findings),
        }


def inspect(run: Result, spectra: bool = False) -> Inspection:
    """Measure every module of a run or adapter.

    Parameters
    ----------
    run : Run
        Run or adapter.
    spectra : bool
        Also run full SVDs (slow): singular values of FourierFT and of DoRA with its base, intruder dimensions in
        weights of any size. Default False.

    Raises
    ------
    ValueError
        The run has no update: it is unfinished, or no update was recorded.
    """
    modules = _measure_modules(run, spectra)
    facts, own = (
        (adapter_facts(run), adapter_findings(run)) if isinstance(run, Adapter) else (_run_facts(run, len(modules)), ())
    )
    return Inspection(run, facts[0][0], facts, modules, (*_update_findings(run, modules), *own))


def pool_norms(norms: pd.Series) -> float:
    """Return the root of the summed squares, ignoring NaN; NaN if all are NaN."""
    known = norms.dropna().to_numpy()
    return root_of_squares(known) if len(known) else np.nan


def _measure_modules(run: Result, spectra: bool) -> pd.DataFrame:
    frame = run.summary()
    if frame.empty:
        raise ValueError(
            f"cannot inspect run {run.id}: no update was recorded. Train with observe=[ls.observe.norms()]"
        )
    _measure_spectra(frame, _singular_values(run, frame["module"], spectra))
    squares = frame["update_norm"] ** 2
    # Zero updates have no energy to divide by.
    frame["energy"] = squares / squares.sum() if squares.sum() > 0 else squares
    frame["parameters"] = _parameters(run, frame)
    frame["scale"] = _scales(run, frame["module"])
    compared = compare_with_base(run, spectra).set_index("module") if isinstance(run, Adapter) else pd.DataFrame()
    for name in BASE_COLUMNS:
        frame[name] = frame["module"].map(compared[name]) if name in compared else np.nan
    return frame[list(_COLUMNS)]


def _measure_spectra(frame: pd.DataFrame, sigmas: Mapping[str, np.ndarray]) -> None:
    """Add columns from singular values to the table: missing ranks, energy ranks, unused components."""
    missing = set(frame["module"][frame["effective_rank"].isna()]) & sigmas.keys()
    for name, rank in {"stable_rank": stable_rank, "effective_rank": effective_rank}.items():
        frame[name] = frame[name].fillna(frame["module"].map({module: rank(sigmas[module]) for module in missing}))
    ranks = frame["rank"].to_numpy("float64", na_value=np.nan)
    frame["energy_rank"] = [energy_rank(sigmas[m], _SHARE) if m in sigmas else np.nan for m in frame["module"]]
    frame["dead"] = [
        _dead_components(sigmas[m], rank) if m in sigmas else np.nan
        for m, rank in zip(frame["module"], ranks, strict=True)
    ]


def _dead_components(sigma: np.ndarray, rank: float) -> float:
    """Count the unused components within a rank; NaN if it is unknown or a value is not finite."""
    if not np.isfinite(sigma).all():
        return np.nan
    return max(rank - np.count_nonzero(sigma > _DEAD * np.max(sigma, initial=0.0)), 0.0)


def _scales(run: Result, modules: pd.Series) -> list[float]:
    """Return the scale of each product or transform; NaN for a dense update, which has none."""
    if isinstance(run, Adapter):
        return [part.scale for part in run.files.parts.values()]
    updates = run.updates()
    return [float(getattr(updates[name], "scale", np.nan)) if name in updates else np.nan for name in modules]


def _parameters(run: Result, frame: pd.DataFrame) -> pd.Series:
    """Count the values per module that an adapter stores or a run trains, from the rank if not stored."""
    if isinstance(run, Adapter):
        return frame["module"].map({module: part.size for module, part in run.files.parts.items()})
    outer, inner = _shapes(run, frame["module"]).T
    factored = (frame["rank"] * (outer + inner)).fillna(0)
    counted = factored.where(frame["rank"].notna(), outer * inner).astype("int64")
    held, constants = run.factors(), constant_factors()
    if constants.isdisjoint(next(iter(held.values()), ())):
        return counted
    sizes = {module: sum(parts[name].size for name in parts.keys() - constants) for module, parts in held.items()}
    return frame["module"].map(sizes).fillna(counted).astype("int64")


def _singular_values(run: Result, modules: pd.Series, spectra: bool) -> Mapping[str, np.ndarray]:
    """Return spectra of the factored updates, and of the dense ones recorded at the last step."""
    if isinstance(run, Adapter):
        return run.spectra if spectra or all(part.has_thin_factors for part in run.files.parts.values()) else {}
    found = dict(spectra_by_layer(run.updates()))
    last = run.meta.states["last"].step
    for module in modules:
        name = f"{module}/singular_values"
        if module not in found and last in run.snapshot_steps(name):
            found[module] = run.snapshot(name, last)["value"].to_numpy()
    return found


def _shapes(run: Result, modules: pd.Series) -> Int[np.ndarray, "n 2"]:
    """Return (out, in) per module, from the update if it is the second name of a tied weight, which has no row."""
    described = run.modules.set_index("module")[["out_features", "in_features"]]
    known = set(described.index)
    return np.array(
        [described.loc[name] if name in known else run.updates()[name].shape for name in modules], dtype=np.int64
    )


def _run_facts(run: Result, count: int) -> tuple[tuple[str, str], ...]:
    meta = run.meta
    name = run.path.resolve().name if run.path else run.id
    facts = [
        (name, f"{run.label}, seed {meta.seed}" + ("" if run.finished else f", {meta.status}")),
        ("model", f"{meta.model} on {meta.task}"),
        ("holds", f"{count} modules, {meta.parameters.trained:,} trained parameters"),
    ]
    if meta.test:
        test, steps = meta.test, meta.settings["steps"]
        facts.append(("test", f"{test.name} {test.metric:.4g}, loss {test.loss:.4g} after {steps} steps"))
    return tuple(facts)


def _update_findings(run: Result, modules: pd.DataFrame) -> Iterator[str]:
    """Yield findings for any update: NaN, zero, unused components, concentrated energy."""
    yield from _norm_cautions(run, modules)
    untouched = modules["module"][modules["update_norm"] == 0]
    if 0 < len(untouched) < len(modules):
        plural, cause = "s" * (len(untouched) > 1), _zero_factor_findings(run, untouched)
        yield f"{len(untouched)} zero update{plural}: {first_and_count(untouched)}{cause}"
    yield from _dead_component_findings(modules)
    yield from _base_findings(modules)
    sound = modules[modules["update_norm"] > 0]
    known = sound.dropna(subset=["energy_rank", "rank"])
    if len(known) and known["rank"].min() >= 4:
        narrow = int((known["energy_rank"] <= known["rank"] // 4).sum())
        ranks = sorted(set(known["rank"] // 4))
        bound = f"rank {ranks[0]} or less" if len(ranks) == 1 else "a quarter of their rank"
        yield f"{narrow or 'none'} of {len(known)} modules have {100 * _SHARE:.0f}% of their energy in {bound}"


def _norm_cautions(run: Result, modules: pd.DataFrame) -> Iterator[str]:
    """Yield cautions about norms that depend on the input, are NaN, or are all zero."""
    routed = int((~modules["exact"]).sum())
    if routed:
        gates = gate_description(run)
        yield f"{routed} of {len(modules)} modules depend on their input: their updates are evaluated at {gates}"
    broken = modules["module"][modules["update_norm"].isna()]
    if len(broken):
        yield f"{_count_modules(len(broken), modules)} NaN or infinity: {first_and_count(broken)}"
    if (modules["update_norm"] == 0).all():
        yield f"all {len(modules)} modules have a zero update: saved before training?"


def _dead_component_findings(modules: pd.DataFrame) -> Iterator[str]:
    """Yield a finding about unused components in modules with a nonzero update."""
    worn = modules[(modules["dead"] > 0) & (modules["update_norm"] > 0)]
    if len(worn):
        total = int(worn["dead"].sum())
        are = "components are" if total > 1 else "component is"
        yield f"{total} {are} unused (below 1e-6 of the largest): {first_and_count(worn['module'])}"


def _base_findings(modules: pd.DataFrame) -> Iterator[str]:
    """Yield findings from the comparison with the base weights."""
    known = modules[modules["intruders"].notna()]
    found = known[known["intruders"] > 0]
    if len(found):
        most = found.sort_values("intruders", ascending=False, kind="stable").iloc[0]
        total = f"{found['intruders'].sum():.0f} intruder dimensions in {len(found)} of {len(known)} modules"
        yield f"{total}, most in {most['module']} ({most['intruders']:.0f} of {DIRECTIONS})"
    elif len(known):
        yield f"no intruder dimensions among the {DIRECTIONS} leading singular vectors of {len(known)} modules"
    rotated = modules[modules["neuron_largest"].notna()]
    if len(rotated):
        most = rotated.sort_values("neuron_largest", ascending=False, kind="stable").iloc[0]
        median = f"neuron rotation: 1 - cos = {rotated['neuron_median'].median():.2g} (median over modules)"
        yield f"{median}, at most {most['neuron_largest']:.2g}, in {most['module']}"
        if rest := len(rotated) - len(known):
            yield f"intruder dimensions of {rest} large modules not computed: add --spectra (slow)"


def _zero_factor_findings(run: Result, modules: pd.Series) -> str:
    """Return which factors are zero, if they are the same in all modules."""
    factors = run.factors()
    zero = {
        tuple(name for name, array in factors[module].items() if not np.any(array)) if module in factors else ()
        for module in modules
    }
    names = zero.pop() if len(zero) == 1 else ()
    return f" ({' = '.join(names)} = 0)" if names else ""


def _count_modules(count: int, modules: pd.DataFrame) -> str:
    return f"{count} of {len(modules)} modules contain{'s' * (count == 1)}"


def rows(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
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


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NO_ALPHA = "alpha not saved"


def adapter_facts(run: Adapter) -> tuple[tuple[str, str], ...]:
    """Return the header: method and rank, base, size."""
    parts = run.files.parts.values()
    scales = _range([part.scale for part in parts])
    config = run.files.config
    alpha = f"alpha {config.get('lora_alpha', 8):g}" + (", rank-stabilized" if config.get("use_rslora") else "")
    size = f"rank {_range([part.rank for part in parts])}, " + (f"scale {scales} ({alpha})" if config else _NO_ALPHA)
    if run.files.kind == "FourierFT":
        size = f"{_range([part.size for part in parts])} coefficients, scale {scales}"
    dtypes = sorted({DTYPES[part.dtype] for part in parts})
    files = len(run.files.files)
    stored = f"{' and '.join(dtypes)}, {files} file{'s' * (files > 1)}"
    return (
        (run.label, f"{run.files.kind}, {size}"),
        ("base", f"{run.meta.model} ({'not read' if run.base is None else f'read from {run.base.folder}'})"),
        ("holds", f"{len(parts)} modules, {run.meta.parameters.trained:,} parameters, {stored}"),
    )


def adapter_cautions(run: Adapter) -> Iterator[str]:
    """Yield cautions if |dW| is not exactly the norm of the update."""
    config = run.files.config
    if not config:
        yield f"no {CONFIG}, so alpha is unknown: |dW| is the norm of B A, without the factor alpha / r"
    if run.files.kind == "DoRA" and any(part.has_thin_factors for part in run.files.parts.values()):
        yield "DoRA: |dW| is the norm of B A only; add --base DIR for the whole update"
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(RESIDUAL):
        yield f"initialized by {start}: unless converted, it requires a modified base, which |dW| includes"


def adapter_findings(run: Adapter) -> Iterator[str]:
    """Yield findings about the files: cautions, saved modules, biases, unmatched patterns."""
    config, others = run.files.config, run.files.others
    yield from adapter_cautions(run)
    biases = {name.rpartition(".")[0] for name in others if name.endswith(".bias")}
    whole = {name.removesuffix(".weight").removesuffix(".base_layer") for name in others if not name.endswith(".bias")}
    yield from _saved_whole(run, sorted(whole))
    if biases - whole:
        yield f"{len(biases - whole)} biases in addition to the factors, not measured"
    lacking = [module for module in run.files.parts if run.base is not None and not run.base.has_weight(module)]
    if lacking:
        yield f"not in the base, perhaps tied: {first_and_count(lacking)}"
    for pattern in ("rank_pattern", "alpha_pattern"):
        # AdaLoRA's ranks are masks per parameter.
        if pattern == "rank_pattern" and run.files.kind == "AdaLoRA":
            continue
        idle = Patterns(config.get(pattern) or {}, f"{pattern} of {run.files.path / CONFIG}").unused_keys(
            run.files.parts
        )
        if idle:
            yield f"{pattern} matches no module of this adapter: {first_and_count(idle)}"


def _saved_whole(run: Adapter, modules: Sequence[str]) -> Iterator[str]:
    """Yield findings about modules saved as full weights, such as new heads, with their distance from the base."""
    base = run.base
    rest = list(modules)
    if base is not None:
        rest = [module for module in modules if not base.has_weight(module)]
        for module in modules:
            if module in rest:
                continue
            whole, shape = run.files.whole(module), base.shape(module)
            if whole.shape != shape:
                sizes = f"{_format_shape(whole.shape)}, in the base {_format_shape(shape)}"
                yield f"saved as full weights, not measured: {module} is {sizes}"
                continue
            change = Pair(base.weight(module, shape), whole)
            share = f"{100 * change.relative_update():.3g}% of |W|"
            yield f"saved as full weights: {module}, |dW| {change.update.norm():.3g} ({share})"
    if rest:
        without = "without a base" if base is None else "because they are not in the base"
        yield f"saved as full weights, not measured {without}: {first_and_count(rest)}"


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def first_and_count(names: Any) -> str:
    """Return the first name, and the number of the others."""
    listed = [str(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
