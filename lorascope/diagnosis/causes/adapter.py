"""Updates that are NaN, zero, unchanged, or unused; components, and comparison with the base weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

import numpy as np

from lorascope.diagnosis.case import UNUSED, Case, MeasuredModule, TrainedModule, known_rows, largest_rows
from lorascope.diagnosis.causes.finding import (
    DoctorRule,
    Findings,
    finding,
    finding_if_any,
    inflect,
    module_names,
    power_of_ten,
)
from lorascope.diagnosis.change_from_base import DIRECTIONS, SIDE
from lorascope.diagnosis.training_case import Evidence
from lorascope.files.printable import count_phrase, first_of
from lorascope.runs.gated_run import gate_description

FAINT = 1e-3  # fraction of the median change per layer: layers of healthy runs differ by less than a hundredfold


@DoctorRule(
    "LS101",
    severity="caution",
    problem="Norms depend on the input.",
    evidence="the update is evaluated at gate weights",
)
def input_dependent_norms(case: Case) -> Findings:
    """Find adapters whose update norms depend on the input."""
    if routed := sum(not module.exact for module in case.measured):
        gates = f"their updates are evaluated at {gate_description(case.run)}"
        yield finding(f"{routed} of {len(case.measured)} modules depend on their input: {gates}")


@DoctorRule("LS108", severity="error", problem="Norms are NaN.", evidence="the norm of the update of a module is NaN")
def nan_norms(case: Case) -> Findings:
    """Find update norms of an adapter that are NaN."""
    if broken := [module for module in case.measured if math.isnan(module.update_norm)]:
        verb = inflect(len(broken), "contains", "contain")
        yield finding(f"{len(broken)} of {len(case.measured)} modules {verb} NaN or infinity", module_names(broken))


@DoctorRule(
    "LS001",
    severity="error",
    problem="The update contains NaN or infinity.",
    evidence="the norm of the update of a module is NaN or infinite",
    fix="check the batch and the loss function if the loss was not finite first; else train with bf16 instead of fp16, "
    "a lower learning rate or clipping; this adapter cannot be repaired",
    suppresses=("diverged", "overscaled", "rate-small", "rate-large", "dead", "collapsed"),
    live_from=0,
)
def nan(case: Evidence) -> Findings:
    """Find updates of an adapter whose norm is NaN or infinite."""
    broken = [module for module in case.modules if not math.isfinite(module.update_norm)]
    order = f" ({case.nonfinite})" if broken and case.nonfinite else ""
    return finding_if_any(broken, case.modules, f"NaN or infinity{order}")


@DoctorRule(
    "LS002",
    severity="error",
    problem="The scale is 0, so the adapter has no output and no gradient.",
    evidence="the scale of a module is 0, for example because lora_alpha is 0",
    fix="set lora_alpha above 0 (r or 2 r are common), and train again",
    suppresses=("unused", "untrained"),
    live_from=0,
)
def scale_zero(case: Evidence) -> Findings:
    """Find adapters whose update is zero because their scale is 0."""
    mute = [module for module in case.adapted if module.scale == 0]
    return finding_if_any(mute, case.adapted, "scale 0, so no output and no gradient", scale=0.0)


@DoctorRule(
    "LS003",
    severity="error",
    needs="config",
    problem="The adapter equals its initialization.",
    evidence="B (E in AdaLoRA) is zero in all modules of a saved adapter",
    fix="save after training, and save the adapter that was trained (PEFT saves each adapter name separately)",
    suppresses=("rate-small",),
)
def untrained(case: Case) -> Findings:
    """Find adapters that equal their initialization."""
    count = len(case.adapted)
    if 0 < count == len(case.unchanged_adapters):
        factor = "B"
        if case.masks_components:  # PEFT's AdaLoRA initializes E with zeros, and B randomly
            factor = "E"
        zero = f"{factor} is still zero in all {count} modules"
        yield finding(f"{zero}, so it has no effect", modules=count, update_norm=0.0)


@DoctorRule(
    "LS004",
    severity="error",
    needs="history",
    problem="Training did not change any adapter.",
    evidence="B is zero in all modules after the recorded steps, or no PEFT adapter was active",
    fix="train with the adapter enabled (set_adapter, no disable_adapter) and requires_grad of its parameters, on "
    "modules that the forward pass uses",
    suppresses=("rate-small",),
    live_from=2,
)
def unused(case: Evidence) -> Findings:
    """Find adapters that a training run did not use, so that none changed."""
    count, steps = len(case.adapted), case.steps
    if not case.expects_adapters or len(case.unchanged_adapters) < count:
        return
    state = "no adapter was active"
    if count:
        state = f"all {count} adapters are unchanged"
    reason = "they are disabled, frozen, or on modules that the forward pass does not use"
    if frozen_names := _describe_frozen(case, case.unchanged_adapters):
        reason = frozen_names
    yield finding(f"{state} after {steps} steps: {reason}", modules=count, update_norm=0.0, steps=steps)


@DoctorRule(
    "LS005",
    severity="error",
    problem="All factors are zero, so their gradients are zero as well.",
    evidence="A and B of a module are both zero, and its scale is not",
    fix="initialize one factor randomly and the other with zeros, as PEFT does, and train again",
    suppresses=("unused", "untrained"),
    live_from=0,
)
def dead(case: Evidence) -> Findings:
    """Find adapters that no gradient can change, since all their factors are zero."""
    empty = [module for module in case.adapted if module.empty and module.scale != 0]
    return finding_if_any(empty, case.adapted, "zeros in all factors, so their gradients are zero")


@DoctorRule(
    "LS006",
    "dead",
    "caution",
    problem="A layer changed far less than the others.",
    evidence=f"the learned update of a layer is below {power_of_ten(FAINT)} of the median layer, and not zero",
    fix="check these layers for a separate learning rate, a mask, or a branch without gradient",
    suppresses=("unused", "untrained"),
    live_from=2,
)
def dead_layers(case: Evidence) -> Findings:
    """Find layers of an adapter that changed far less than the others."""
    module_norms: dict[tuple[str, int], list[float]] = {}
    for module in case.modules:
        if module.layer is not None and not math.isnan(module.moved):
            module_norms.setdefault((module.stack, module.layer), []).append(module.moved)
    moved: dict[str, float] = {}
    for (stack, layer), norms in sorted(module_norms.items()):
        norm = math.hypot(*norms)
        if norm > 0:
            moved[f"{stack} {layer}".strip()] = norm
    if not moved:
        return
    usual = median(moved.values())  # a mean would follow a single layer that moved far
    faint = [name for name, norm in moved.items() if norm < FAINT * usual]
    if faint:
        fraction = min(moved.values()) / usual
        changed = f"{len(faint)} of {len(moved)} layers changed by less than {FAINT:g} of the median layer"
        message = f"{changed}: {first_of(faint)} ({fraction:.1e})"
        yield finding(message, layers=faint, share=fraction, threshold=FAINT)


@DoctorRule(
    "LS007",
    severity="caution",
    problem="Some adapters did not change while others did.",
    evidence="the update is exactly zero in some modules but not in others (not checked for AdaLoRA, which may prune)",
    fix="make them trainable (requires_grad, groups of the optimizer), or remove them from the targets",
    live_from=2,
)
def frozen(case: Evidence) -> Findings:
    """Find adapters that did not change while others did."""
    unchanged, adapted = case.unchanged_adapters, case.adapted
    # AdaLoRA may remove all components of a module, which is not a fault.
    if len(unchanged) == len(adapted) or case.masks_components:
        return
    if any(module.update_norm > 0 for module in adapted):
        zero = "an update of exactly zero while others changed"
        if frozen_names := _describe_frozen(case, unchanged):
            zero = f"{zero} ({frozen_names})"
        yield from finding_if_any(unchanged, adapted, zero, modules=module_names(unchanged), update_norm=0.0)


def _describe_frozen(case: Evidence, modules: Iterable[TrainedModule]) -> str:
    """Return which parameters of adapters have no ``requires_grad``, "" if none are known."""
    names_of_modules, paths = [], []
    for module in module_names(modules):
        if names := case.frozen.get(module):
            names_of_modules.append(tuple(names))
            paths += [f"{module}.{name}" for name in names]
    if not paths:
        return ""
    if len(set(names_of_modules)) == 1:
        count = count_phrase(len(names_of_modules), "module")
        return f"{' and '.join(names_of_modules[0])} of {count} without requires_grad"
    return f"{first_of(paths)} without requires_grad"


@DoctorRule("LS109", severity="caution", problem="All updates are zero.", evidence="|dW| is 0 in all modules")
def no_update(case: Case) -> Findings:
    """Find adapters without any update."""
    unchanged = _zero_updates(case)
    if len(unchanged) == len(case.measured):
        reason = "saved before training?"
        if all(module.scale == 0 for module in unchanged):
            reason = "their scale is 0"
        yield finding(f"all {len(unchanged)} modules have a zero update: {reason}")


def _zero_updates(case: Case) -> list[MeasuredModule]:
    return [module for module in case.measured if module.update_norm == 0]


@DoctorRule(
    "LS102",
    problem="Some updates are zero.",
    evidence="|dW| is 0 in some modules of rank 1 or more, and not in others",
)
def zero_updates(case: Case) -> Findings:
    """Find zero updates of an adapter among others, and the factor that is zero."""
    # An allocator that gave a module no rank did not fail there.
    names = module_names(module for module in _zero_updates(case) if module.rank != 0)
    count = len(names)
    if 0 < count < len(case.measured):
        factors = case.run.factors()
        zeros = [_zero_factors(factors.get(name, {})) for name in names]
        reason = ""
        if zeros[0] and zeros.count(zeros[0]) == count:
            reason = f" ({' = '.join(zeros[0])} = 0)"
        yield finding(f"{count} zero update{'s' * (count > 1)}: {first_of(names)}{reason}")


def _zero_factors(factors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names of the factors that are zero."""
    return tuple(name for name, factor in factors.items() if not np.any(factor))


@DoctorRule(
    "LS110",
    problem="Components are unused.",
    evidence=f"a singular value within the rank is below {power_of_ten(UNUSED)} of the largest",
)
def unused_components(case: Case) -> Findings:
    """Count unused components of an adapter's updates that are not zero."""
    worn = [module for module in case.measured if module.dead > 0 and module.update_norm > 0]
    if total := int(sum(module.dead for module in worn)):
        components = inflect(total, "component is", "components are")
        yield finding(f"{total} {components} unused (below {power_of_ten(UNUSED)} of the largest)", module_names(worn))


@DoctorRule(
    "LS103",
    severity="caution",
    needs="base",
    problem="The update adds intruder dimensions.",
    evidence=f"singular vectors among the {DIRECTIONS} leading ones with a cosine below 0.5 to all of the base's",
)
def intruders(case: Case) -> Findings:
    """Count the intruder dimensions of an adapter."""
    measured = known_rows(case.measured, "intruders")
    if intruded := [module for module in measured if module.intruders > 0]:
        (worst,) = largest_rows(intruded, "intruders")
        count = sum(module.intruders for module in intruded)
        total = f"{count:.0f} intruder dimensions in {len(intruded)} of {len(measured)} modules"
        yield finding(f"{total}, most in {worst.module} ({worst.intruders:.0f} of {DIRECTIONS})")
    elif measured:
        vectors = f"the {DIRECTIONS} leading singular vectors of {len(measured)} modules"
        yield finding(f"no intruder dimensions among {vectors}")


@DoctorRule(
    "LS111", severity="caution", needs="base", problem="The update rotates neurons.", evidence="1 - cos of neurons"
)
def neuron_rotation(case: Case) -> Findings:
    """Measure how far the update of an adapter rotates the neurons."""
    if rotated := known_rows(case.measured, "neuron_largest"):
        (worst,) = largest_rows(rotated, "neuron_largest")
        usual = median(module.neuron_median for module in rotated)
        rotation = f"neuron rotation: 1 - cos = {usual:.2g} (median over modules)"
        yield finding(f"{rotation}, at most {worst.neuron_largest:.2g}, in {worst.module}")


@DoctorRule(
    "LS112",
    severity="caution",
    needs="base",
    problem="Intruder dimensions of large modules are not computed.",
    evidence=f"the smaller side of their weight is above {SIDE}",
)
def intruders_unknown(case: Case) -> Findings:
    """Count the modules of an adapter whose intruder dimensions take long, and were not requested."""
    rotated = known_rows(case.measured, "neuron_largest")
    if count := len(rotated) and len(rotated) - len(known_rows(case.measured, "intruders")):
        yield finding(f"intruder dimensions of {count} large modules not computed: add --spectra (slow)")
