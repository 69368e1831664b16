"""Report to the trackers of a Trainer: those of its ``report_to``, through their callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lorascope.training.curve_report import HostReport
from lorascope.training.hf_trainer.step_loss import running_trainer


class TrainerReport(HostReport):
    """Report to a Trainer's callbacks, as if the Trainer had logged the values.

    ``Trainer.log`` would also print them, and store them in every checkpoint.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState, callbacks: Sequence[TrainerCallback]) -> None:
        super().__init__()
        self.args, self.state, self.callbacks = args, state, callbacks

    def send_to_host(self, values: dict[str, float], step: int) -> None:
        for callback in self.callbacks:
            # A callback sets flags of its control, which must not change those of the Trainer.
            log = partial(callback.on_log, self.args, self.state, TrainerControl(), logs=dict(values))
            self.attempt(type(callback).__name__, log)


def reporting_callbacks() -> list[TrainerCallback]:
    """Return the callbacks to report to: those of ``report_to`` of the Trainer that calls the current callback."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    callbacks: list[TrainerCallback] = running_trainer().callback_handler.callbacks
    return [callback for callback in callbacks if isinstance(callback, kinds)]
