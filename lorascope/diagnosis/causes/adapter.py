"""Updates that are NaN, zero, unchanged, or unused; components, and comparison with the base weights."""

from __future__ import annotations

import math
from statistics import median

import numpy as np

from lorascope.diagnosis.case import Case, largest
from lorascope.diagnosis.causes.finding import DoctorRule, Found, caution, first_and_count, found, names_of, some_have
from lorascope.diagnosis.change_from_base import DIRECTIONS
from lorascope.diagnosis.training_case import Evidence
from lorascope.runs.gated_run import gate_description

FAINT = 1e-3  # fraction of the median change per layer: layers of healthy runs differ by less than a hundredfold


@DoctorRule(id="LS101")
def special_norms(case: Case) -> Found:
    """Find norms that depend on the input, and those that are NaN."""
    count = len(case.measured)
    if routed := sum(not each.exact for each in case.measured):
        gates = f"their updates are evaluated at {gate_description(case.run)}"
        yield caution(f"{routed} of {count} modules depend on their input: {gates}")
    if broken := [each.module for each in case.measured if math.isnan(each.update_norm)]:
        contain = "contains" if len(broken) == 1 else "contain"
        yield caution(f"{len(broken)} of {count} modules {contain} NaN or infinity", broken, "error")


@DoctorRule(
    id="LS001", suppresses=("diverged", "overscaled", "rate-small", "rate-large", "dead", "collapsed"), live_from=0
)
def nan(case: Evidence) -> Found:
    """Find updates whose norm is NaN or infinite."""
    broken = [each for each in case.modules if not math.isfinite(each.update_norm)]
    return some_have(broken, case.modules, "NaN or infinity")


@DoctorRule(id="LS002", suppresses=("unused", "untrained"), live_from=0)
def scale_zero(case: Evidence) -> Found:
    """Find adapters with scale 0."""
    mute = [each for each in case.adapted if each.scale == 0]
    return some_have(mute, case.adapted, "scale 0, so no output and no gradient", scale=0.0)


@DoctorRule(id="LS003", suppresses=("rate-small",))
def untrained(case: Case) -> Found:
    """Find adapters that equal their initialization."""
    count = len(case.adapted)
    if 0 < count == len(case.unchanged_adapters):
        zero = f"{'E' if case.masks_components else 'B'} is still zero in all {count} modules"
        yield found(f"{zero}, so it has no effect", modules=count, update_norm=0.0)


@DoctorRule(id="LS004", suppresses=("rate-small",), live_from=2)
def unused(case: Evidence) -> Found:
    """Find training runs that did not use the adapters."""
    steps = case.steps
    if not case.expects_adapters or len(case.unchanged_adapters) < len(case.adapted):
        return
    state = f"all {len(case.adapted)} adapters are unchanged" if len(case.adapted) else "no adapter was active"
    why = "they are disabled, frozen, or on modules that the forward pass does not use"
    yield found(f"{state} after {steps} steps: {why}", modules=len(case.adapted), update_norm=0.0, steps=steps)


@DoctorRule(id="LS005", suppresses=("unused", "untrained"), live_from=0)
def dead(case: Evidence) -> Found:
    """Find modules that no gradient can change."""
    empty = [each for each in case.adapted if each.empty and each.scale != 0]
    return some_have(empty, case.adapted, "zeros in all factors, so their gradients are zero")


@DoctorRule(id="LS006", suppresses=("unused", "untrained"), live_from=2)
def dead_layers(case: Evidence) -> Found:
    """Find layers that changed far less than the others."""
    norms: dict[tuple[str, int], list[float]] = {}
    for each in case.modules:
        if each.layer is not None and not math.isnan(each.moved):
            norms.setdefault((each.stack, each.layer), []).append(each.moved)
    moved = {layer: norm for layer in sorted(norms) if (norm := math.hypot(*norms[layer])) > 0}
    usual = median(moved.values()) if moved else 0.0
    faint = {layer: norm for layer, norm in moved.items() if norm < FAINT * usual}
    if faint:
        names, share = [f"{stack} {layer}".strip() for stack, layer in faint], min(faint.values()) / usual
        changed = f"{len(faint)} of {len(moved)} layers changed by less than {FAINT:g} of the median layer"
        message = f"{changed}: {first_and_count(names)} ({share:.1e})"
        yield found(message, layers=names, share=share, threshold=FAINT)


@DoctorRule(id="LS007", live_from=2)
def frozen(case: Evidence) -> Found:
    """Find adapters that did not change while others did."""
    resting, adapted = case.unchanged_adapters, case.adapted
    # AdaLoRA may remove all components of a module, which is not a fault.
    if len(resting) < len(adapted) and any(each.update_norm > 0 for each in adapted) and not case.masks_components:
        zero, names = "an update of exactly zero while others changed", names_of(resting)
        yield from some_have(resting, adapted, zero, modules=names, update_norm=0.0)


@DoctorRule(id="LS102")
def zero_updates(case: Case) -> Found:
    """Find zero updates, and the factor that is zero; and unused components of the others."""
    names = [each.module for each in case.measured if each.update_norm == 0]
    count = len(names)
    if count == len(case.measured):
        why = "their scale is 0" if all(each.scale == 0 for each in case.measured) else "saved before training?"
        yield caution(f"all {count} modules have a zero update: {why}")
    elif count:
        held = case.run.factors()
        zeros = {tuple(name for name, array in held.get(each, {}).items() if not np.any(array)) for each in names}
        same = zeros.pop() if len(zeros) == 1 else ()
        why = f" ({' = '.join(same)} = 0)" if same else ""
        yield found(f"{count} zero update{'s' * (count > 1)}: {first_and_count(names)}{why}")
    worn = [each for each in case.measured if each.dead > 0 and each.update_norm > 0]
    if total := int(sum(each.dead for each in worn)):
        are = "components are" if total > 1 else "component is"
        yield found(f"{total} {are} unused (below 1e-6 of the largest)", names_of(worn))


@DoctorRule(id="LS103")
def base_weights(case: Case) -> Found:
    """Count the intruder dimensions, and measure how far the update rotates the neurons."""
    known = [each for each in case.measured if not math.isnan(each.intruders)]
    rotated = [each for each in case.measured if not math.isnan(each.neuron_largest)]
    if intruded := [each for each in known if each.intruders > 0]:
        (most,) = largest(intruded, "intruders")
        count = sum(each.intruders for each in intruded)
        total = f"{count:.0f} intruder dimensions in {len(intruded)} of {len(known)} modules"
        yield caution(f"{total}, most in {most.module} ({most.intruders:.0f} of {DIRECTIONS})")
    elif known:
        among = f"among the {DIRECTIONS} leading singular vectors of {len(known)} modules"
        yield caution(f"no intruder dimensions {among}")
    if rotated:
        (most,) = largest(rotated, "neuron_largest")
        usual = median(each.neuron_median for each in rotated)
        turned = f"neuron rotation: 1 - cos = {usual:.2g} (median over modules)"
        yield caution(f"{turned}, at most {most.neuron_largest:.2g}, in {most.module}")
    if rest := len(rotated) and len(rotated) - len(known):
        message = f"intruder dimensions of {rest} large modules not computed: add --spectra (slow)"
        yield caution(message)
