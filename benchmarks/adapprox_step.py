"""Time of an Adapprox step of one matrix compared with AdamW, and of a rank selection.

Run ``python benchmarks/adapprox_step.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
from paired import compare

from lorascope.methods.adapprox import AdapproxOptimizer

SIZES = ((128, 128), (256, 256), (384, 384), (384, 1536), (768, 768), (768, 3072))
NEVER = 10**9  # steps between rank selections


def stepping(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """Return a step that cycles through gradients whose rows and columns differ in size."""
    (weight,) = optimizer.param_groups[0]["params"]
    draw = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(side, generator=draw).exp() for side in weight.shape)
    gradients = [torch.outer(rows, columns) * torch.randn(weight.shape, generator=draw) for _ in range(4)]
    cycled = cycle(gradients)

    def step() -> object:
        weight.grad = next(cycled)
        return optimizer.step()

    return step


def weight_of(shape: tuple[int, int]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def factor_size(optimizer: AdapproxOptimizer) -> tuple[int, int]:
    """Return the rank of the factors and their bytes."""
    (state,) = optimizer.state.values()
    return state["Q"].shape[1], state["Q"].nbytes + state["U"].nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8, help="rank of the steps between rank selections")
    parser.add_argument("--oversampling", type=int, default=5)
    parser.add_argument("--backward", type=int, default=512, help="tokens of the layer to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = {"oversampling": arguments.oversampling, "growth_scale": None}
    print("size         rank   bytes of V       step (ms)  ratio to AdamW      selection (ms)  ratio to a layer")
    for shape in SIZES:
        adam = torch.optim.AdamW([weight_of(shape)])
        between = AdapproxOptimizer(
            [weight_of(shape)], reselect_every=NEVER, rank_rule="fixed", init_rank=arguments.rank, **common
        )
        choosing = AdapproxOptimizer([weight_of(shape)], reselect_every=1, **common)
        ratio = compare(stepping(between), stepping(adam), arguments.pairs)
        choice = compare(stepping(choosing), stepping(adam), max(4, arguments.pairs // 8), warmup=1)
        passes = compare(stepping(between), layer(shape, arguments.backward), arguments.pairs)
        rank, size = factor_size(between)
        print(
            f"{shape[0]:>4} x {shape[1]:<5} {rank:>3}   {size / (4 * shape[0] * shape[1]):6.1%} of dense"
            f"   {1e3 * ratio.seconds[0]:8.2f}   {ratio.median:6.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            f"   {1e3 * choice.seconds[0]:8.1f} (rank {factor_size(choosing)[0]})   {passes.median:6.2f}",
            flush=True,
        )


def layer(shape: tuple[int, int], tokens: int) -> Callable[[], object]:
    """Return a forward and backward pass of a linear layer of this size."""
    weight = weight_of(shape)
    x = torch.randn(tokens, shape[1], requires_grad=True)

    def passes() -> object:
        weight.grad = x.grad = None
        (x @ weight.T).sum().backward()
        return weight.grad

    return passes


if __name__ == "__main__":
    main()
