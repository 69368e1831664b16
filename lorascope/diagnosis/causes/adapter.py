"""Updates that are NaN, zero, unchanged, or unused; components, and comparison with the base weights."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.base_comparison import DIRECTIONS
from lorascope.diagnosis.causes.base import Found, Rule, caution, first_and_count, found, some_have
from lorascope.diagnosis.evidence import Case
from lorascope.runs.gated_run import gate_description

FAINT = 1e-3  # fraction of the median change per layer: layers of healthy runs differ by less than a hundredfold


@Rule()
def special_norms(case: Case) -> Found:
    """Find norms that depend on the input, and those that are NaN."""
    norms, count = case.measured["update_norm"], len(case.measured)
    if routed := int((~case.measured["exact"]).sum()):
        gates = f"their updates are evaluated at {gate_description(case.run)}"
        yield caution(f"{routed} of {count} modules depend on their input: {gates}")
    if broken := int(norms.isna().sum()):
        contain = "contains" if broken == 1 else "contain"
        names = case.measured["module"][norms.isna()]
        yield caution(f"{broken} of {count} modules {contain} NaN or infinity", names, "error")


@Rule(
    "train again with bf16 instead of fp16, a lower learning rate or clipping; this adapter cannot be repaired",
    suppresses=("diverged", "overscaled", "rate-small", "dead", "collapsed"),
)
def nan(case: Case) -> Found:
    """Find updates whose norm is NaN or infinite."""
    broken = case.modules[~np.isfinite(case.modules["update_norm"])]
    return some_have(broken, case.modules, "NaN or infinity")


@Rule("set lora_alpha above 0 (r or 2 r are common), and train again", suppresses=("unused", "untrained"))
def scale_zero(case: Case) -> Found:
    """Find adapters with scale 0."""
    mute = case.adapted[case.adapted["scale"] == 0]
    return some_have(mute, case.adapted, "scale 0, so no output and no gradient", scale=0.0)


@Rule("save after training, and save the adapter that was trained (PEFT saves each adapter name separately)", "config")
def untrained(case: Case) -> Found:
    """Find adapters that equal their initialization."""
    count = len(case.adapted)
    if 0 < count == len(case.unchanged_adapters):
        zero = f"{'E' if case.masks_components else 'B'} is still zero in all {count} modules"
        yield found(f"{zero}, so it has no effect", modules=count, update_norm=0.0)


@Rule(
    "train with the adapter enabled (set_adapter, no disable_adapter), on modules that the forward pass uses", "history"
)
def unused(case: Case) -> Found:
    """Find training runs that did not use the adapters."""
    method, steps = case.meta.method, int(case.losses.index.max() if len(case.losses) else 0)
    # PEFT's prompt and prefix methods adapt no module; the others have target_modules.
    promised = (method.get("name") == "peft" and method.get("target_modules")) or len(case.adapted)
    # Parameters that trained in a module that is left out are in no update.
    idle = len(case.unchanged_adapters) == len(case.adapted) and not case.meta.left_out
    if not case.meta.states or not idle or not promised:
        return
    state = f"all {len(case.adapted)} adapters are unchanged" if len(case.adapted) else "no adapter was active"
    why = "they are disabled, frozen, or on modules that the forward pass does not use"
    yield found(f"{state} after {steps} steps: {why}", modules=len(case.adapted), update_norm=0.0, steps=steps)


@Rule(
    "initialize one factor randomly and the other with zeros, as PEFT does, and train again",
    suppresses=("unused", "untrained"),
)
def dead(case: Case) -> Found:
    """Find modules that no gradient can change."""
    empty = case.adapted[case.adapted["empty"] & (case.adapted["scale"] != 0)]
    return some_have(empty, case.adapted, "zeros in all factors, so their gradients are zero")


@Rule(
    "check these layers for a separate learning rate, a mask, or a branch without gradient",
    suppresses=("unused", "untrained"),
    name="dead",
)
def dead_layers(case: Case) -> Found:
    """Find layers that changed far less than the others."""
    layers = case.modules.dropna(subset=["layer"])
    moved = (layers["moved"] ** 2).groupby([layers["stack"], layers["layer"]], observed=True).sum() ** 0.5
    moved = moved[moved > 0]
    faint = moved[moved < FAINT * moved.median()]
    if len(faint):
        names, share = [f"{stack} {layer}".strip() for stack, layer in faint.index], float(faint.min() / moved.median())
        changed = f"{len(faint)} of {len(moved)} layers changed by less than {FAINT:g} of the median layer"
        message = f"{changed}: {first_and_count(names)} ({share:.1e})"
        yield found(message, layers=names, share=share, threshold=FAINT)


@Rule("make them trainable (requires_grad, groups of the optimizer), or remove them from the targets")
def frozen(case: Case) -> Found:
    """Find adapters that did not change while others did."""
    resting, adapted = case.unchanged_adapters, case.adapted
    # AdaLoRA may remove all components of a module, which is not a fault.
    if len(resting) < len(adapted) and (adapted["update_norm"] > 0).any() and not case.masks_components:
        zero, names = "an update of exactly zero while others changed", list(resting["module"])
        yield from some_have(resting, adapted, zero, modules=names, update_norm=0.0)


@Rule()
def zero_updates(case: Case) -> Found:
    """Find zero updates, and the factor that is zero; and unused components of the others."""
    zero = case.measured["update_norm"] == 0
    names, count = case.measured["module"][zero], int(zero.sum())
    if zero.all():
        yield caution(f"all {count} modules have a zero update: saved before training?")
    elif count:
        held = case.run.factors()
        zeros = {tuple(name for name, array in held.get(each, {}).items() if not np.any(array)) for each in names}
        same = zeros.pop() if len(zeros) == 1 else ()
        why = f" ({' = '.join(same)} = 0)" if same else ""
        yield found(f"{count} zero update{'s' * (count > 1)}: {first_and_count(names)}{why}")
    worn = case.measured[(case.measured["dead"] > 0) & (case.measured["update_norm"] > 0)]
    if total := int(worn["dead"].sum()):
        are = "components are" if total > 1 else "component is"
        yield found(f"{total} {are} unused (below 1e-6 of the largest)", worn["module"])


@Rule()
def base_weights(case: Case) -> Found:
    """Count the intruder dimensions, and measure how far the update rotates the neurons."""
    known, rotated = (case.measured.dropna(subset=[name]) for name in ("intruders", "neuron_largest"))
    intruded = known[known["intruders"] > 0]
    if len(intruded):
        most = intruded.nlargest(1, "intruders").iloc[0]
        total = f"{intruded['intruders'].sum():.0f} intruder dimensions in {len(intruded)} of {len(known)} modules"
        yield caution(f"{total}, most in {most['module']} ({most['intruders']:.0f} of {DIRECTIONS})")
    elif len(known):
        among = f"among the {DIRECTIONS} leading singular vectors of {len(known)} modules"
        yield caution(f"no intruder dimensions {among}")
    if len(rotated):
        most = rotated.nlargest(1, "neuron_largest").iloc[0]
        median = f"neuron rotation: 1 - cos = {rotated['neuron_median'].median():.2g} (median over modules)"
        yield caution(f"{median}, at most {most['neuron_largest']:.2g}, in {most['module']}")
    if rest := len(rotated) and len(rotated) - len(known):
        message = f"intruder dimensions of {rest} large modules not computed: add --spectra (slow)"
        yield caution(message)
