"""Updates that lose nothing at a smaller scale, by the dial that was measured and kept in the folder of the run."""

from __future__ import annotations

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding


@DoctorRule(
    "LS032",
    severity="caution",
    needs="dial",
    problem="A smaller scale of the update has the same loss and is nearer to the base.",
    evidence="the update learns, and at its best scale, which is below 1, the increase of the loss ends below the "
    "margin (an even share of its learning, at most a tenth), and the distance from the base is smaller, by 95% "
    "intervals over rows (measured by lorascope dial, kept as dial.csv in the folder of the run)",
    fix="export it at that scale (lorascope export RUN --scales whole=SCALE --peft DIR), or train at a lower rate or "
    "with fewer steps",
)
def update_too_strong(case: Case) -> Findings:
    """Find updates with a better scale than 1, by the dial in the folder of a run."""
    # These take longer to import than most folders to diagnose, which have no dial.
    from lorascope.analysis.dial import WHOLE
    from lorascope.analysis.part_verdicts import even_share

    dial = case.stored_dial
    assert dial is not None  # by the need of the rule
    (update,) = dial[dial["part"] == WHOLE].to_dict("records")
    margin = even_share(update["learn"], int((~dial["control"]).sum()) - 1)
    if not (update["best_scale"] < 1 and update["learn_low"] > 0):
        return
    if update["best_loss_high"] < margin and update["best_distance_high"] < 0:
        # Relative to scale 1, at which the user has the update now.
        nearer = -update["best_distance"] / update["forget"]
        message = (
            f"at scale {update['best_scale']:g} the loss changes by {update['best_loss']:+.3f} nats "
            f"[{update['best_loss_low']:.3f}, {update['best_loss_high']:.3f}], margin {margin:.3f}, and the distance "
            f"from the base is {nearer:.0%} smaller"
        )
        names = {"loss": "best_loss", "low": "best_loss_low", "high": "best_loss_high", "distance": "best_distance"}
        numbers = {name: float(update[column]) for name, column in names.items()}
        yield finding(message, scale=float(update["best_scale"]), **numbers, threshold=margin)
