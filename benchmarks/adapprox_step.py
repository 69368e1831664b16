"""Time of an Adapprox step of one matrix compared with AdamW, and of a rank selection.

Adapprox is faster than AdamW at no size. The pass of a layer is its forward and backward pass on 512 tokens. On one
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from measurements import MeasuredLine
from paired import compare, report

from lorascope.methods.adapprox import AdapproxOptimizer

SIZES = ((128, 128), (256, 256), (768, 768), (768, 3072))
RANK, TOKENS = 8, 512
OVERSAMPLING = {5: "oversampling 5", 8: "oversampling 8"}
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


def layer(shape: tuple[int, int], tokens: int) -> Callable[[], object]:
    """Return a forward and backward pass of a linear layer of this size."""
    weight = weight_of(shape)
    x = torch.randn(tokens, shape[1], requires_grad=True)

    def passes() -> object:
        weight.grad = x.grad = None
        (x @ weight.T).sum().backward()
        return weight.grad

    return passes


def fixed(shape: tuple[int, int], oversampling: int) -> AdapproxOptimizer:
    """Return an optimizer that keeps its rank."""
    options = {"reselect_every": NEVER, "rank_rule": "fixed", "init_rank": RANK, "growth_scale": None}
    return AdapproxOptimizer([weight_of(shape)], oversampling=oversampling, **options)


def selecting(shape: tuple[int, int]) -> AdapproxOptimizer:
    """Return an optimizer that selects the rank at each step."""
    return AdapproxOptimizer([weight_of(shape)], reselect_every=1, growth_scale=None)


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratios for each size, and the memory of the second moment."""
    torch.set_num_threads(1)
    cases = {f"{rows} x {columns}": (rows, columns) for rows, columns in SIZES}
    for oversampling, words in OVERSAMPLING.items():
        for case, shape in cases.items():
            steps = stepping(fixed(shape, oversampling)), stepping(torch.optim.AdamW([weight_of(shape)]))
            yield compare(*steps, pairs).line(f"step of one matrix at rank {RANK}, {words} / AdamW's", case)
    for case, shape in cases.items():
        ratio = compare(stepping(fixed(shape, 5)), layer(shape, TOKENS), pairs)
        yield ratio.line(f"step of one matrix at rank {RANK}, {OVERSAMPLING[5]} / pass of the layer", case)
    for case, shape in cases.items():
        chooser = selecting(shape)
        ratio = compare(stepping(chooser), stepping(fixed(shape, 5)), max(4, pairs // 8), warmup=1)
        yield ratio.line("step that selects a rank / step that does not", f"{case}, rank {factor_size(chooser)[0]}")
    for case, shape in cases.items():
        optimizer = fixed(shape, 5)
        stepping(optimizer)()
        percent = 100 * factor_size(optimizer)[1] / (4 * shape[0] * shape[1])
        yield MeasuredLine(
            what=f"bytes of the second moment at rank {RANK} / of a dense one",
            case=case,
            value=percent,
            unit="%",
            pairs=1,
        )


if __name__ == "__main__":
    report(lines, __doc__)
