"""Configuration and files of an adapter: rank, alpha, initialization, patterns, scale, budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import multimode
from typing import Any, NamedTuple

from lorascope.analysis.rank_use import LEVEL, SHARE
from lorascope.diagnosis.case import Case, TrainedModule, known_rows, largest_rows
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding, inflect, module_names
from lorascope.diagnosis.training_case import Evidence
from lorascope.files.printable import count_phrase
from lorascope.formats.peft_config import CONFIG
from lorascope.formats.peft_experts import ExpertPart
from lorascope.formats.stored_update import COMPILED, FLAT_COMPILED, plain_name, stored_tensors, uncompiled_name
from lorascope.runs.adapter import Adapter
from lorascope.schema.image_roles import FLATTENED
from lorascope.schema.name_patterns import Ends, Patterns

REPLACING = 1.0  # fraction of |W|: an update as large as the weight replaces the pretrained weight
HABIT = 16.0  # alpha / r: alpha 16 is common down to rank 1, so only a larger scale is called a cause
UNEVEN = 2.0  # ratio of scales: alpha is usually r or 2 r, so a larger ratio of two modules is not intended
NEARLY = 0.01  # fraction of the components to prune: masking every few steps may miss the end of the schedule
_UNMATCHED = "compare with model.named_modules(): PEFT matches the end of a name, and ignores other keys"


@DoctorRule(
    "LS104",
    name="unused-rank",
    problem="Components of the rank have little energy.",
    evidence=f"number of components with {SHARE:.0%} of the energy of their module, and of modules that use half of "
    "their rank or less; loss of a cut to half the rank, if lorascope price measured it (price.json in the folder)",
)
def unused_rank(case: Case) -> Findings:
    """Count the components in use, and the modules that use half of their rank or less."""
    use = case.rank_use
    if use and use.used:
        names = module_names(use.half_unused)
        count = f"{len(names) or 'none'} of {count_phrase(len(use.modules), 'module')}"
        message = f"{use.describe()}; half of the rank or less in {count}"
        evidence: dict[str, Any] = {"used": use.used, "allocated": use.allocated, "random": use.random}
        evidence |= {"modules": len(names), "of": len(use.modules)}
        if case.stored_price is not None:
            cut = evidence["cut"] = _cut_to_half(case.stored_price)
            message += (
                f"; cut to rank {cut['rank']}: loss {cut['loss']:+.3f} nats [{cut['low']:.3f}, {cut['high']:.3f}]"
            )
        yield finding(message, names, **evidence)


def _cut_to_half(price: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss of a cut to half the rank, which is always among the cuts, with its interval and tolerance."""
    rank = price["rank"] // 2
    row = next(row for row in price["table"] if row["rank"] == rank)
    numbers = {"loss": row["cut"], "low": row["cut_low"], "high": row["cut_high"]}
    return {"rank": rank, **numbers, "tolerance": price["tolerance"]}


@DoctorRule(
    "LS113",
    name="full-rank",
    problem="Modules use all of their rank, unlike random factors.",
    evidence=f"they need as many components for {SHARE:.0%} of their energy as random factors of their shape, and have "
    f"a lower effective rank than these (false discovery rate {LEVEL:.0%})",
)
def full_rank(case: Case) -> Findings:
    """Count the modules that use all of their rank and are not random factors."""
    use = case.rank_use
    if use and use.full:
        yield finding(use.describe_full(), module_names(use.full), modules=len(use.full), of=len(use.modules))


@DoctorRule(
    "LS105",
    needs="config",
    problem="Modules are experts that are stored in one tensor.",
    evidence="number of experts per parameter",
)
def experts(case: Case) -> Findings:
    """Count the modules that are experts of one parameter, by the configuration and files of an adapter."""
    updates = case.stored_updates.values()
    counts = [update.experts for update in updates if isinstance(update, ExpertPart) and update.experts > 1]
    if counts:
        number = " or ".join(map(str, sorted({*counts})))
        yield finding(f"{len(counts)} of {len(updates)} modules are experts in one tensor, {number} per parameter")


@DoctorRule(
    "LS106",
    severity="caution",
    problem="|dW| is not exactly the norm of the update.",
    evidence="alpha is not saved, DoRA was read without its base, or a note of the format",
)
def incomplete_norms(case: Case) -> Findings:
    """Find configurations that make |dW| only approximately the norm of the update, such as a missing alpha."""
    incomplete = case.run.incomplete_updates()
    unknown = [row for row in case.measured if row.module in incomplete and math.isnan(row.effective_rank)]
    if unknown:
        count = count_phrase(len(unknown), "module")
        yield finding(f"the ranks of dW are unknown in {count}: train with observe=[ls.observe.norms()]")
    if not isinstance(case.run, Adapter):
        return
    if not case.files.config:
        yield finding(f"no {CONFIG}, so alpha is unknown: |dW| is the norm of B A, without the factor alpha / r")
    if case.files.kind == "DoRA" and any(update.has_thin_factors for update in case.stored_updates.values()):
        yield finding("DoRA: |dW| is the norm of B A only; add --base DIR for the whole update")
    yield from map(finding, case.notes)


@DoctorRule(
    "LS008",
    "unmatched",
    "caution",
    needs="config",
    problem="An entry of target_modules names no module.",
    evidence="no module name ends with it, so PEFT ignores it",
    fix=_UNMATCHED,
)
def unmatched_targets(case: Case) -> Findings:
    """Find ``target_modules`` of a configuration that are the end of no module's name, which PEFT does not report."""
    targets, names = case.files.config.get("target_modules") or (), {*case.configured.values()}
    # PEFT rejects a single pattern that matches nothing.
    if not isinstance(targets, str):
        ends = Ends(names)
        unmatched = [key for key in targets if key not in names and not any(ends.names_with_end(f".{key}"))]
        yield from _unmatched_keys(case, "target_modules", unmatched)


@DoctorRule(
    "LS009",
    "unmatched",
    "caution",
    needs="config",
    problem="A key of rank_pattern or alpha_pattern names no module.",
    evidence="the key matches the name of no adapted module, so PEFT ignores it",
    fix=_UNMATCHED,
    inspected=True,
)
def unmatched_patterns(case: Case) -> Findings:
    """Find keys of ``rank_pattern`` or ``alpha_pattern`` of a configuration that match no module."""
    # AdaLoRA's ranks are masks per parameter.
    for field in ("rank_pattern", "alpha_pattern")[case.masks_components :]:
        keys = Patterns(case.files.config.get(field) or {}, f"{field} of {case.files.path / CONFIG}")
        yield from _unmatched_keys(case, field, keys.unused_keys(case.configured.values()))


def _unmatched_keys(case: Case, field: str, keys: list[str]) -> Findings:
    if keys:
        message, count = f"{field} matches no module of this adapter", len(case.stored_updates)
        yield finding(message, keys, field=field, keys=keys, modules=count)


@DoctorRule(
    "LS025",
    severity="caution",
    needs="config",
    problem="Tensors have the names of a compiled model, so programs do not find their modules.",
    evidence=f"names with {COMPILED}, which torch.compile adds ({FLAT_COMPILED} in those of kohya); programs leave out "
    "these tensors, PEFT without naming them",
    fix=f"rename the tensors: remove {COMPILED} from their names, or {FLAT_COMPILED} from those of kohya; next time, "
    "adapt the model before torch.compile",
)
def compiled_names(case: Case) -> Findings:
    """Find adapters of a compiled model, whose names a model that is not compiled lacks."""
    names: list[str] = []
    flat_modules: dict[str, None] = {}  # a set in the order of the file; the base may have other names for them
    for tensor in stored_tensors(case.files.files):
        if uncompiled_name(tensor.name) == tensor.name:
            continue
        names.append(plain_name(tensor.name))
        if FLATTENED.match(tensor.name):
            flat_modules[names[-1].partition(".")[0]] = None
    if not names:
        return
    updates, modules = case.stored_updates, list(flat_modules)
    segment, program = FLAT_COMPILED, "programs leave"
    if not modules:
        segment, program = COMPILED, "PEFT leaves"
        for module in updates:
            if any(name.startswith(f"{module}.") for name in names):
                modules.append(module)
    # Experts in one tensor have other names than their tensors.
    modules = modules or list(updates)
    evidence = {"modules": len(modules), "of": len(updates)}
    names_of = inflect(len(modules), "has a name", "have names")
    message = f"{len(modules)} of {len(updates)} modules {names_of} with {segment}, so {program} them out"
    yield finding(message, modules, **evidence)


@DoctorRule(
    "LS010",
    severity="caution",
    needs="weights",
    problem="The update outweighs the weights: its scale is too large.",
    evidence=f"the update is larger than the weight, at a scale above {HABIT:g}",
    fix="set lora_alpha to r or 2 r: the scale is alpha / r (alpha / sqrt(r) for rsLoRA), not alpha",
    suppresses=("diverged", "rate-large"),
    live_from=2,
)
def overscaled(case: Evidence) -> Findings:
    """Find configurations with an unusually large scale, at which updates are larger than the weights."""
    adapted = case.adapted
    if huge := [module for module in adapted if module.relative_update > REPLACING and module.scale > HABIT]:
        (worst,) = largest_rows(huge, "relative_update")
        update, scale = worst.relative_update, worst.scale
        message = f"the update is larger than the weight in {len(huge)} of {len(adapted)} modules"
        message = f"{message}, up to {update:.3g} |W| in {worst.module}, at scale {scale:.4g}"
        evidence = {"modules": len(huge), "relative_update": update, "threshold": REPLACING, "scale": scale}
        yield finding(message, **evidence, habit=HABIT)


@DoctorRule(
    "LS011",
    severity="caution",
    needs="config",
    problem="Modules with their own rank have another scale.",
    evidence="modules of rank_pattern have no entry in alpha_pattern, and their scale differs from the others "
    f"by a factor of {UNEVEN:g} or more",
    fix="add the keys of rank_pattern to alpha_pattern, with alpha = scale x rank",
)
def uneven_scale(case: Case) -> Findings:
    """Find modules with another rank that are missing in ``alpha_pattern`` of a configuration."""
    config, adapted = case.meta.method, case.adapted
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # Without an alpha_pattern the scale is alpha / r, which AutoLoRA intends.
    scaled = known_rows(adapted, "scale")
    if case.masks_components or not ranks or not alphas or not scaled:
        return
    rank_keys, alpha_keys = Patterns(ranks, "rank_pattern"), Patterns(alphas, "alpha_pattern")
    groups: dict[tuple[bool, bool], list[TrainedModule]] = {}
    for module in scaled:
        name = case.configured[module.module]
        has_patterns = rank_keys.first(name) is not None, alpha_keys.first(name) is not None
        groups.setdefault(has_patterns, []).append(module)
    # A scale that alpha_pattern sets for a module of the usual rank is meant to be unusual.
    usual_modules = groups.get((False, False)) or groups.get((True, True))
    if not usual_modules:
        return
    usual = min(multimode(module.scale for module in usual_modules))
    ranked = groups.get((True, False), [])
    if uneven := [module for module in ranked if module.scale >= UNEVEN * usual or module.scale <= usual / UNEVEN]:
        scale, names = uneven[0].scale, module_names(uneven)
        verb = inflect(len(uneven), "has", "have")
        patterns = f"{verb} an entry in rank_pattern but none in alpha_pattern"
        message = f"{len(uneven)} of {len(adapted)} modules {patterns}, so scale {scale:.4g} instead of {usual:.4g}"
        yield finding(message, names, modules=names, scale=scale, usual=usual, threshold=UNEVEN)


@DoctorRule(
    "LS012",
    severity="caution",
    problem="AdaLoRA never removed a component.",
    evidence="all components are still in use at a step at which some should have been removed",
    fix="call model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
)
def allocator_idle(case: Case) -> Findings:
    """Find AdaLoRA configurations whose adapter was never pruned, although it should have been."""
    use = _component_use(case)
    if use and use.is_idle:
        in_use = f"all {use.initial} components are still in use, the budget is {use.budget}"
        yield finding(f"{in_use}: the allocator never removed one", **use.evidence())


@DoctorRule(
    "LS013",
    severity="caution",
    problem="AdaLoRA exceeds its budget: the schedule was cut short.",
    evidence=f"more components are in use than the budget, by over {NEARLY:.0%} of those to remove",
    fix="set total_step to the number of steps in training, and tinit + tfinal well below it",
)
def budget_missed(case: Case) -> Findings:
    """Find AdaLoRA configurations whose adapter was pruned too little, or not yet."""
    use = _component_use(case)
    if use and not use.is_idle:
        in_use = f"{use.components} of {use.initial} components are in use, the budget is {use.budget}"
        yield finding(f"{in_use}: the schedule did not finish", **use.evidence())


class _ComponentUse(NamedTuple):
    """Components of an AdaLoRA adapter that exceeds its budget.

    ``is_idle``: it removed no component by the last step, although it should have.
    """

    components: int
    budget: int
    initial: int
    is_idle: bool

    def evidence(self) -> dict[str, float]:
        return {"components": self.components, "budget": self.budget, "of": self.initial, "threshold": NEARLY}


def _component_use(case: Case) -> _ComponentUse | None:
    """Return the components of an AdaLoRA adapter that exceeds its budget, None for any other."""
    if not case.masks_components:
        return None
    method, components, count = case.meta.method, 0, 0
    for module in case.modules:
        if module.rank is None:
            continue
        # A module without components counts, because the others received its part of the budget.
        count += 1
        used = module.rank
        if not math.isnan(module.used):
            used = min(used, int(module.used))
        components += used
    # A folder is already masked, so only the configuration has the initial rank; 8 and 12 are PEFT's defaults.
    target_rank = method.get("target_rank", method.get("target_r", 8))
    initial_rank = method.get("init_rank", method.get("init_r", 12))
    budget, initial = round(target_rank * count), initial_rank * count
    if components - budget <= NEARLY * (initial - budget):
        return None
    return _ComponentUse(components, budget, initial, components == initial and _has_pruning_step(case))


def _has_pruning_step(case: Case) -> bool:
    """Return whether AdaLoRA should have removed components by the last step; True if the step is unknown."""
    method, steps = case.meta.method, case.meta.states["last"].step
    if steps is None:
        return True
    warmup, interval = method.get("tinit", 0), method.get("deltaT", 1)
    final = (method.get("total_step") or steps) - method.get("tfinal", 0)
    return bool(steps - 1 >= final or (steps - 1) // interval * interval > warmup)
