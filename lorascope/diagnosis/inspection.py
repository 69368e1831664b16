"""What one adapter or run holds, measured module by module, and what about it is worth a sentence."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lorascope.diagnosis.base_comparison import BESIDE, DIRECTIONS, against_base
from lorascope.runs.formats.peft_lora import CONFIG
from lorascope.runs.gated_run import gate_description
from lorascope.runs.loading import AdapterRun, spectra_by_layer
from lorascope.runs.run import Run
from lorascope.schema.module_roles import position
from lorascope.schema.name_patterns import Patterns
from lorascope.updates.factor_formats import RESIDUAL, UNTRAINED
from lorascope.updates.linalg import root_of_squares
from lorascope.updates.low_rank import Pair, effective_rank, energy_rank, stable_rank

_SHARE = 0.9
_DEAD = 1e-6  # of the largest singular value: below it the two ways to find them differ
_COLUMNS = (
    *("module", "stack", "layer", "role", "rank", "scale", "parameters", "update_norm", "relative_update", "energy"),
    *("stable_rank", "effective_rank", "energy_rank", "dead", "exact"),
    *BESIDE,
)


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
        ``module, stack, layer, role, rank, scale, parameters, update_norm, relative_update, energy, stable_rank,
        effective_rank, energy_rank, dead, exact``, in the order of the axes; ``energy`` is the share of the summed
        |dW|^2, NaN where factors hold NaN; ``dead`` counts the components that the rank allows and the update does
        not use, singular values below 1e-6 of its largest. Then what ``against_base`` tells, NaN without a base.
    findings : tuple of str
        A sentence each.
    """

    run: Run
    name: str
    facts: tuple[tuple[str, str], ...]
    modules: pd.DataFrame
    findings: tuple[str, ...]

    @property
    def cautions(self) -> tuple[str, ...]:
        """The findings that change how it is read beside others."""
        own = adapter_cautions(self.run) if isinstance(self.run, AdapterRun) else ()
        return (*_norm_cautions(self.run, self.modules), *_base_findings(self.modules), *own)

    @property
    def norm(self) -> float:
        """|dW| of all modules together, those with NaN left out."""
        return pool_norms(self.modules["update_norm"])

    def roles(self) -> pd.DataFrame:
        """One row a stack and role: ``modules, update_norm, energy, least_rank, most_rank, effective_rank`` (mean)."""
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
        places = zip(frame["stack"], frame["layer"].clip(upper=0), frame["role"], strict=True)
        order = sorted(range(len(frame)), key=dict(enumerate(position(*place) for place in places)).__getitem__)
        return frame.drop(columns="layer").iloc[order].reset_index(drop=True)

    def largest(self, count: int) -> pd.DataFrame:
        """The modules with the largest updates."""
        return self.modules.nlargest(count, "update_norm")

    def to_json(self) -> dict[str, Any]:
        """The JSON form; what is unknown is None."""
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


def inspect(run: Run, spectra: bool = False) -> Inspection:
    """Measure every module of a run or adapter.

    Parameters
    ----------
    run : Run
    spectra : bool
        Also what takes whole matrices apart, and so long: singular values of FourierFT, and of DoRA with its base;
        intruder dimensions in weights of any size.

    Raises
    ------
    ValueError
        The run holds no update: it is unfinished, or nothing was recorded.
    """
    modules = _measure_modules(run, spectra)
    facts, own = (
        (adapter_facts(run), adapter_findings(run))
        if isinstance(run, AdapterRun)
        else (_run_facts(run, len(modules)), ())
    )
    return Inspection(run, facts[0][0], facts, modules, (*_update_findings(run, modules), *own))


def pool_norms(norms: pd.Series) -> float:
    """Root of summed squares of what is not NaN; NaN if all are."""
    known = norms.dropna().to_numpy()
    return root_of_squares(known) if len(known) else np.nan


def _measure_modules(run: Run, spectra: bool) -> pd.DataFrame:
    frame = run.summary()
    if frame.empty:
        raise ValueError(f"run {run.id} recorded no update of any module: train with observe=[ls.observe.norms()]")
    _measure_spectra(frame, _singular_values(run, frame["module"], spectra))
    squares = frame["update_norm"] ** 2
    frame["energy"] = squares / squares.sum() if squares.sum() > 0 else squares
    frame["parameters"] = _parameters(run, frame)
    frame["scale"] = _scales(run, frame["module"])
    beside = against_base(run, spectra).set_index("module") if isinstance(run, AdapterRun) else pd.DataFrame()
    for name in BESIDE:
        frame[name] = frame["module"].map(beside[name]) if name in beside else np.nan
    return frame[list(_COLUMNS)]


def _measure_spectra(frame: pd.DataFrame, sigmas: Mapping[str, np.ndarray]) -> None:
    """What singular values tell, into the table: ranks that are not there yet, the energy's, and what is dead."""
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
    """How many of the components a rank allows are not used; NaN if it is unknown or a value is not finite."""
    if not np.isfinite(sigma).all():
        return np.nan
    return max(rank - np.count_nonzero(sigma > _DEAD * np.max(sigma, initial=0.0)), 0.0)


def _scales(run: Run, modules: pd.Series) -> list[float]:
    """Factor before the product, or before the transform; NaN for a dense update, which has none."""
    if isinstance(run, AdapterRun):
        return [part.scale for part in run.files.parts.values()]
    updates = run.updates()
    return [float(getattr(updates[name], "scale", np.nan)) if name in updates else np.nan for name in modules]


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


def _singular_values(run: Run, modules: pd.Series, spectra: bool) -> Mapping[str, np.ndarray]:
    """Spectra of the factored updates, and of the dense ones that were recorded at the last step."""
    if isinstance(run, AdapterRun):
        return run.spectra if spectra or all(part.has_thin_factors for part in run.files.parts.values()) else {}
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


def _update_findings(run: Run, modules: pd.DataFrame) -> Iterator[str]:
    """What holds for any update: NaN, nothing at all, much in few directions."""
    yield from _norm_cautions(run, modules)
    untouched = modules["module"][modules["update_norm"] == 0]
    if 0 < len(untouched) < len(modules):
        plural, cause = "s" * (len(untouched) > 1), _zero_factor_findings(run, untouched)
        yield f"{len(untouched)} module{plural} untouched: {first_and_count(untouched)}{cause}"
    yield from _dead_component_findings(modules)
    yield from _base_findings(modules)
    sound = modules[modules["update_norm"] > 0]
    known = sound.dropna(subset=["energy_rank", "rank"])
    if len(known) and known["rank"].min() >= 4:
        narrow = int((known["energy_rank"] <= known["rank"] // 4).sum())
        ranks = sorted(set(known["rank"] // 4))
        bound = f"rank {ranks[0]} or less" if len(ranks) == 1 else "a quarter of their rank"
        yield f"{narrow or 'none'} of {len(known)} modules hold {100 * _SHARE:.0f} % of their energy in {bound}"


def _norm_cautions(run: Run, modules: pd.DataFrame) -> Iterator[str]:
    """Norms that are those of a stand-in, or none."""
    routed = int((~modules["exact"]).sum())
    if routed:
        gates = gate_description(run)
        yield f"{routed} of {len(modules)} modules depend on their input: their updates here are at {gates}"
    broken = modules["module"][modules["update_norm"].isna()]
    if len(broken):
        yield f"{_count_modules(len(broken), modules)} NaN or infinity: {first_and_count(broken)}"
    if (modules["update_norm"] == 0).all():
        yield f"all {len(modules)} modules untouched: saved before it was trained?"


def _dead_component_findings(modules: pd.DataFrame) -> Iterator[str]:
    """Components that are there and do nothing, in modules that are not untouched altogether."""
    worn = modules[(modules["dead"] > 0) & (modules["update_norm"] > 0)]
    if len(worn):
        total = int(worn["dead"].sum())
        yield (
            f"{total} component{'s' * (total > 1)} dead (below 1e-6 of the largest): {first_and_count(worn['module'])}"
        )


def _base_findings(modules: pd.DataFrame) -> Iterator[str]:
    """What the base's weights say."""
    known = modules[modules["intruders"].notna()]
    found = known[known["intruders"] > 0]
    if len(found):
        most = found.sort_values("intruders", ascending=False, kind="stable").iloc[0]
        told = f"{found['intruders'].sum():.0f} intruder dimensions in {len(found)} of {len(known)} modules"
        yield f"{told}, most in {most['module']} ({most['intruders']:.0f} of {DIRECTIONS})"
    elif len(known):
        yield f"no intruder dimension among the {DIRECTIONS} leading ones of {len(known)} modules"
    turned = modules[modules["neuron_largest"].notna()]
    if len(turned):
        most = turned.sort_values("neuron_largest", ascending=False, kind="stable").iloc[0]
        told = f"neurons turned by 1 - cos = {turned['neuron_median'].median():.2g} (median over modules)"
        yield f"{told}, at most {most['neuron_largest']:.2g}, in {most['module']}"
        if rest := len(turned) - len(known):
            yield f"intruder dimensions of {rest} large modules not looked for: --spectra does, and takes long"


def _zero_factor_findings(run: Run, modules: pd.Series) -> str:
    """Which factor is zero, where it is the same one in all modules."""
    factors = run.factors()
    zero = {
        tuple(name for name, array in factors[module].items() if not np.any(array)) if module in factors else ()
        for module in modules
    }
    names = zero.pop() if len(zero) == 1 else ()
    return f" ({' and '.join(names)} zero)" if names else ""


def _count_modules(count: int, modules: pd.DataFrame) -> str:
    return f"{count} of {len(modules)} modules hold{'s' * (count == 1)}"


def rows(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """A table as JSON values; what is unknown is None."""
    return json_values(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def json_values(value: Any) -> Any:
    """Numbers, words, dicts and lists with None for what is no number, which JSON has no word for."""
    match value:
        case float():
            return value if np.isfinite(value) else None
        case dict():
            return {key: json_values(inner) for key, inner in value.items()}
        case list():
            return [json_values(inner) for inner in value]
    return value


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NO_ALPHA = "alpha not kept"


def adapter_facts(run: AdapterRun) -> tuple[tuple[str, str], ...]:
    """The header: its method and size, its base, what it holds."""
    parts = run.files.parts.values()
    scales = _range([part.scale for part in parts])
    config = run.files.config
    alpha = f"alpha {config.get('lora_alpha', 8):g}" + (", rank-stabilised" if config.get("use_rslora") else "")
    size = f"rank {_range([part.rank for part in parts])}, " + (f"scale {scales} ({alpha})" if config else _NO_ALPHA)
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


def adapter_cautions(run: AdapterRun) -> Iterator[str]:
    """Where |dW| is not quite that of the update."""
    config = run.files.config
    if not config:
        yield f"no {CONFIG}, so alpha is not known: |dW| is that of B A, to be multiplied by alpha / r"
    if run.files.kind == "DoRA" and any(part.has_thin_factors for part in run.files.parts.values()):
        yield "DoRA: |dW| is that of the direction B A alone; --base DIR gives that of the whole"
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(RESIDUAL):
        yield f"initialised by {start}: unless converted, it adds to a changed base, and |dW| counts that too"


def adapter_findings(run: AdapterRun) -> Iterator[str]:
    """What the files say beside their factors."""
    config, others = run.files.config, run.files.others
    yield from adapter_cautions(run)
    biases = {name.rpartition(".")[0] for name in others if name.endswith(".bias")}
    whole = {name.removesuffix(".weight").removesuffix(".base_layer") for name in others if not name.endswith(".bias")}
    yield from _saved_whole(run, sorted(whole))
    if biases - whole:
        yield f"{len(biases - whole)} biases beside the factors, not measured"
    lacking = [module for module in run.files.parts if run.base is not None and not run.base.has_weight(module)]
    if lacking:
        yield f"not in the base, tied perhaps: {first_and_count(lacking)}"
    for pattern in ("rank_pattern", "alpha_pattern"):
        # AdaLoRA's ranks are masks by parameter.
        if pattern == "rank_pattern" and run.files.kind == "AdaLoRA":
            continue
        idle = Patterns(config.get(pattern) or {}, f"{pattern} of {run.files.path / CONFIG}").unused_keys(
            run.files.parts
        )
        if idle:
            yield f"{pattern} names no module of this adapter: {first_and_count(idle)}"


def _saved_whole(run: AdapterRun, modules: Sequence[str]) -> Iterator[str]:
    """Of modules that are stored as they are, such as new heads: how far from the base, where it has them."""
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
                yield f"saved in full beside the factors, not measured: {module} is {sizes}"
                continue
            change = Pair(base.weight(module, shape), whole)
            share = f"{100 * change.relative_update():.3g} % of |W|"
            yield f"saved in full beside the factors: {module}, |dW| {change.update.norm():.3g} ({share})"
    if rest:
        without = "without a base" if base is None else "as the base has none"
        yield f"saved in full beside the factors, not measured {without}: {first_and_count(rest)}"


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def first_and_count(names: Any) -> str:
    """One name, and how many others."""
    listed = [str(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
