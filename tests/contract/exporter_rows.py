"""One row per exporter of runs: a method for any architecture, and the words of its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from examples import EXAMPLES

from lorascope import methods
from lorascope.methods.method import Method

Targets = tuple[str, ...]


@dataclass(frozen=True)
class ExporterRow:
    """Expectations of one exporter.

    Parameters
    ----------
    method : callable (targets) -> Method
        Method whose updates it writes, for models of any architecture.
    refuses : mapping of str to (Method, str)
        Methods whose runs match it but cannot be written, and words of the error.
    """

    method: Callable[[Targets], Method]
    refuses: Mapping[str, tuple[Method, str]] = field(default_factory=dict)


def of_rows(**words: str) -> dict[str, tuple[Method, str]]:
    """Return methods of ``examples`` that are refused with these words."""
    return {name: (EXAMPLES[name], line) for name, line in words.items()}


WHOLE = "as LoRA: it trained the weights themselves"
RATES = {"lr": 0.05, "head_lr": 0.05}
ROWS = {
    "LoRA": ExporterRow(
        lambda targets: methods.LoRA(rank=3, alpha=5.0, targets=targets, **RATES),
        of_rows(
            full=WHOLE,
            lisa=WHOLE,
            neft=WHOLE,
            adapprox=WHOLE,
            hydralora=r"depends on its input, and a LoRA has no router; use ls\.at_gates",
        ),
    ),
    "DoRA": ExporterRow(lambda targets: methods.DoRA(rank=3, alpha=5.0, targets=targets, **RATES)),
    "FourierFT": ExporterRow(
        lambda targets: methods.FourierFT(targets=targets, alpha=30.0, entry_seed=5, **RATES),
        {
            "band": (methods.FourierFT(center=4.0, width=6.0), r"center must be None .*, got 4 for .*query"),
            "random": (methods.FourierFT(basis="random"), "basis must be 'fourier', got 'random'"),
            "orthogonal": (methods.FourierFT(basis="orthogonal"), "basis must be 'fourier', got 'orthogonal'"),
        },
    ),
    "VeRA": ExporterRow(lambda targets: methods.VeRA(rank=8, targets=targets, **RATES)),
}
