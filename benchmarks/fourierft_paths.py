"""Time of FourierFT's two forms of the adapted product, by width, coefficients and tokens.

Run ``python benchmarks/fourierft_paths.py``. It times the forward and backward pass of one square layer. The sum form
adds the update, computed by a transform, to the weight. The basis-function form applies the cosines and sines of each
coefficient to the activations. Ratios are medians over pairs of process CPU times. Cells with slow passes have fewer
pairs, because each cell has a time limit. The last column is the form that FourierFT uses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from paired import compare
from torch import Tensor, nn

from lorascope.adapters.delta import attach
from lorascope.methods import fourierft
from lorascope.methods.fourierft import FourierDelta, use_basis_form
from lorascope.updates.fourier import entries

SHARES = {"d/32": 1 / 32, "d/8 - 1": 1 / 8, "d/4": 1 / 4, "4 d": 4}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="CPU seconds per cell, after which no new pair starts"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--coefficients", nargs="+", choices=list(SHARES), default=list(SHARES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'width':>6} {'n':>6} {'tokens':>7} {'basis / sum':>12} {'interval':>16} {'ms':>17} {'pairs':>6}  used")
    for d in arguments.widths:
        for label in arguments.coefficients:
            n = int(d * SHARES[label]) - label.count("- 1")
            host, used = layer(d, n), "basis" if use_basis_form(n, (d, d)) else "sum"
            for tokens in arguments.tokens:
                basis, dense = (passes(host, tokens, basis_form) for basis_form in (True, False))
                ratio = compare(basis, dense, arguments.pairs, 1, arguments.seconds)
                times = "/".join(f"{1e3 * seconds:.1f}" for seconds in ratio.seconds)
                interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
                print(
                    f"{d:6} {n:6} {tokens:7} {ratio.median:12.2f} {interval:>16} {times:>17} {ratio.pairs:6}  {used}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
