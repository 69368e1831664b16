"""What the files of an adapter say of it: its header, and what beside its factors is worth a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lorascope.runs.formats.peft_lora import CONFIG
from lorascope.runs.loading import AdapterRun
from lorascope.schema.name_patterns import Patterns
from lorascope.updates.factor_formats import RESIDUAL
from lorascope.updates.low_rank import Pair

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
    if run.files.kind == "DoRA" and any(part.thin for part in run.files.parts.values()):
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
    lacking = [module for module in run.files.parts if run.base is not None and not run.base.holds(module)]
    if lacking:
        yield f"not in the base, tied perhaps: {some(lacking)}"
    for pattern in ("rank_pattern", "alpha_pattern"):
        # AdaLoRA's ranks are masks by parameter.
        if pattern == "rank_pattern" and run.files.kind == "AdaLoRA":
            continue
        idle = Patterns(config.get(pattern) or {}, f"{pattern} of {run.files.path / CONFIG}").idle(run.files.parts)
        if idle:
            yield f"{pattern} names no module of this adapter: {some(idle)}"


def _saved_whole(run: AdapterRun, modules: Sequence[str]) -> Iterator[str]:
    """Of modules that are stored as they are, such as new heads: how far from the base, where it has them."""
    base = run.base
    rest = list(modules)
    if base is not None:
        rest = [module for module in modules if not base.holds(module)]
        for module in modules:
            if module in rest:
                continue
            whole, shape = run.files.whole(module), base.shape(module)
            if whole.shape != shape:
                sizes = f"{_size(whole.shape)}, in the base {_size(shape)}"
                yield f"saved in full beside the factors, not measured: {module} is {sizes}"
                continue
            change = Pair(base.weight(module, shape), whole)
            share = f"{100 * change.relative_update():.3g} % of |W|"
            yield f"saved in full beside the factors: {module}, |dW| {change.update.norm():.3g} ({share})"
    if rest:
        without = "without a base" if base is None else "as the base has none"
        yield f"saved in full beside the factors, not measured {without}: {some(rest)}"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def some(names: Any) -> str:
    """One name, and how many others."""
    listed = [str(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def _range(values: Sequence[float | int]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
