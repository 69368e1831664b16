"""Time of FourierFT's basis-function form compared with its transform, by width, coefficients and tokens.

FourierFT has two forms of the forward pass. If 4 n (d1 + d2) < d1 d2 (for a square weight: fewer coefficients than an
eighth of its width), it multiplies the activations with the basis functions of its coefficients. Otherwise it adds the
update, computed by an inverse transform, to the weight. Each line gives the time of the first form relative to the
second, forward and backward pass of one square layer of width d on one thread, and names the form that FourierFT uses.
With many tokens, both forms take about the same time near the threshold. With few tokens the basis-function form is
faster at d/4 as well. The default is 4 d coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from measurements import MeasuredLine
from paired import compare, report
from torch import Tensor, nn

from lorascope.adapters.delta import attach
from lorascope.methods import fourierft
from lorascope.methods.fourierft import FourierDelta, use_basis_form
from lorascope.updates.fourier import entries

WIDTHS, TOKENS = (384, 768, 1024, 2048, 4096), (16, 128, 1024)
COEFFICIENTS = {
    "d/32": lambda d: d // 32,
    "d/8 - 1": lambda d: d // 8 - 1,
    "d/4": lambda d: d // 4,
    "4 d": lambda d: 4 * d,
}
SECONDS = 4.0
"""CPU time per line, after which no new pair starts."""


def layer(d: int, n: int) -> nn.Linear:
    """Return a frozen layer of width d with n coefficients."""
    host = nn.Linear(d, d).requires_grad_(False)
    places = torch.from_numpy(entries((d, d), n, 2024))
    attach(host, {"": FourierDelta(torch.randn(n), places, (d, d), 100)})
    return host


def passes(host: nn.Linear, tokens: int, basis_form: bool) -> Callable[[], None]:
    """Return a forward and backward pass of a layer in one of the two forms."""
    x = torch.randn(tokens, host.in_features, requires_grad=True)
    slope: Tensor = torch.randn(tokens, host.out_features)

    def run() -> None:
        with mock.patch.object(fourierft, "use_basis_form", return_value=basis_form):
            host(x).backward(slope)

    return run


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each width, number of coefficients and number of tokens."""
    torch.set_num_threads(1)
    for d in WIDTHS:
        for words, number in COEFFICIENTS.items():
            host, used = layer(d, number(d)), "basis functions" if use_basis_form(number(d), (d, d)) else "transform"
            for tokens in TOKENS:
                ratio = compare(passes(host, tokens, True), passes(host, tokens, False), pairs, 1, SECONDS)
                yield ratio.line(f"width {d}, {words} coefficients ({used} used)", f"{tokens} tokens")


if __name__ == "__main__":
    report(lines, __doc__)
