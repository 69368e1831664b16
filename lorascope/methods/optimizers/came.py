"""CAME: Adafactor with a first moment, divided by the instability of the direction.

::

    R_t = beta_2 R_{t-1} + (1 - beta_2) rowmean(G_t^2 + eps_1),    C_t the same by column
    D_t = G_t / sqrt(R_t C_t / mean(R_t)),    D_t <- D_t / max(1, RMS(D_t) / d)
    M_t = beta_1 M_{t-1} + (1 - beta_1) D_t
    S_t = R'_t C'_t / mean(R'_t), with R'_t and C'_t as R_t and C_t, but from (D_t - M_t)^2 + eps_2 with beta_3
    W_t = W_{t-1} - alpha (M_t / sqrt(S_t) + lambda W_{t-1})

Source: CAME (arXiv 2307.02047), algorithm 2. Vectors have a second moment without factors and are updated by M_t, as in
the authors' code. CAME is only a baseline here: ``Full(optimizer_name="came")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorascope.array_types import Float
from lorascope.methods.optimizers import closure_loss, parameters_with_gradient


class CAME(torch.optim.Optimizer):
    """CAME optimizer: Adafactor with a first moment, divided by the instability of the direction.

    ``betas`` are the decays of first moment, second moment and instability, ``eps`` is added to the squared gradient
    and to the squared instability, and ``clip_threshold`` is the maximum RMS of a direction D_t.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999, 0.9999),
        eps: Sequence[float] = (1e-30, 1e-16),
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
    ) -> None:
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_threshold": clip_threshold}
        super().__init__(params, {"lr": lr} | options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group, parameter in parameters_with_gradient(self):
            (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
            state, G = self.state[parameter], parameter.grad.float()
            D = G * _update_average(state, "exp_avg_sq", G.square() + eps1, beta2)
            D.div_((D.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1))
            M = state.setdefault("exp_avg", torch.zeros_like(D)).lerp_(D, 1 - beta1)
            # The authors' code has no instability of vectors.
            confident = M if M.ndim < 2 else M * _update_average(state, "exp_avg_res", (D - M).square() + eps2, beta3)
            parameter.sub_(group["lr"] * (confident + group["weight_decay"] * parameter))
        return loss


def _update_average(
    state: dict[str, Any], name: str, squares: Float[Tensor, "..."], beta: float
) -> Float[Tensor, "..."]:
    """Update the average of squares, by row and column for a matrix; return its inverse square root."""
    if squares.ndim < 2:
        return state.setdefault(name, torch.zeros_like(squares)).lerp_(squares, 1 - beta).rsqrt()
    for side, dim in (("row", -1), ("col", -2)):
        mean = squares.mean(dim)
        state.setdefault(f"{name}_{side}", torch.zeros_like(mean)).lerp_(mean, 1 - beta)
    # Roots of R_t / mean(R_t) and of C_t, because the product of small squares would underflow.
    row, column = state[f"{name}_row"], state[f"{name}_col"]
    return (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
