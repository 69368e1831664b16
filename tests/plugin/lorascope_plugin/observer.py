"""An observer of the largest entry of every update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorascope.adapters.delta import attached_deltas
from lorascope.methods.method import Step
from lorascope.observe import Observer
from lorascope.schema.records import Quantity, Record, register

register(
    "train with observe=[largest_entries()]",
    largest_entry=Quantity("largest entry of ΔW", definition="max |ΔW_ij|"),
)


@dataclass(kw_only=True)
class largest_entries(Observer):
    """Largest entry of the update of every module."""

    def __call__(self, step: Step) -> Iterator[Record]:
        if self.due(step.finished, step.total):
            for module, delta in attached_deltas(step.model).items():
                yield Record("largest_entry", float(delta.weight().detach().abs().max()), module)
