"""Trainings that continued after their loss had stopped falling, and moved away from the base meanwhile."""

from __future__ import annotations

from lorascope.analysis.forgetting_course import forgetting_course
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding

FARTHER = 1.25  # times the distance of the step to keep: adjacent recordings of a finished training differ by less
LEAST = 0.01  # nats, or drift: states with a mean cosine of 0.99 to those of the base are not called forgetting


@DoctorRule(
    "LS031",
    severity="caution",
    needs="history",
    problem="An earlier checkpoint has the same loss and is nearer to the base.",
    evidence=f"the last distance from the base exceeds that of an earlier step by {FARTHER:g} times and {LEAST:g}, and "
    "the loss of that step is within one paired standard error of the lowest (recorded by observe.kl)",
    fix="keep the checkpoint of that step, or train no longer than that",
)
def late_checkpoint(case: Case) -> Findings:
    """Find trainings of which an earlier step should be kept, by the rows that ``observe.kl`` records."""
    if not case.has_gauge:
        return
    course = forgetting_course(case.run)
    (nearest,) = course[course["keep"]].to_dict("records")
    last = course.iloc[-1]
    # A rule of one standard error often chooses an earlier step, which matters only if the distance grew meanwhile.
    if last["distance"] > max(FARTHER * nearest["distance"], nearest["distance"] + LEAST):
        message = (
            f"step {nearest['step']} is at distance {nearest['distance']:.3g} from the base, with a loss within one "
            f"standard error of the lowest; the last step, {last['step']:g}, is at distance {last['distance']:.3g}"
        )
        evidence = {"step": nearest["step"], "distance": nearest["distance"], "last_distance": float(last["distance"])}
        yield finding(message, **evidence, above=nearest["above"], error=nearest["error"], threshold=FARTHER)
