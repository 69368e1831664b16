"""Adapprox as a torch optimizer: algorithm 3. Algorithms 1 and 2 are in ``subspace_iteration``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorascope.array_types import Float
from lorascope.methods.field_checks import LARGEST_FLOAT, require, require_at_least, require_choice
from lorascope.methods.optimizers import closure_loss, parameters_with_gradient, subspace_iteration
from lorascope.methods.precision import wide_dtype

DENOMINATORS = ("pre", "post")


class AdapproxOptimizer(torch.optim.Optimizer):
    """Adapprox optimizer for any model; all settings except the seed can differ between parameter groups.

    Parameters
    ----------
    params : iterable
        Parameters, or parameter groups.
    lr, weight_decay : float
        Learning rate, and decoupled weight decay.
    seed : int
        Seed of the sketches; the global generators are not used.
    betas, eps, ..., min_dim
        As the fields of ``lorascope.methods.Adapprox``. ``clip_threshold=math.inf`` disables clipping, ``min_dim=1``
        factors all matrices, and rank rule "fixed" ignores ``max_rank``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip_threshold: float = 1.0,
        iterations: int = 5,
        oversampling: int = 5,
        sketch_multiple: int = 1,
        init_rank: int = 1,
        max_rank: int | None = None,
        tolerance: float = 0.01,
        reselect_every: int = 10,
        rank_rule: str = "restart",
        growth: Sequence[float] = subspace_iteration.LOGISTIC,
        growth_scale: float | None = 1.0,
        denominator: str = "pre",
        cosine: bool = False,
        cosine_floor: float = 0.1,
        min_dim: int | None = 64,
        seed: int = 0,
    ) -> None:
        # Every other argument is an option that a parameter group can override.
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "seed", "__class__")}
        super().__init__(params, options)
        # The first group stores the generator of all groups, so that code which saves optimizers finds it.
        device = self.param_groups[0]["params"][0].device
        self.param_groups[0]["generator"] = torch.Generator(device).manual_seed(seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group after checking its options."""
        settings = SimpleNamespace(**self.defaults | param_group)
        require_at_least(settings, 0, "lr", "weight_decay")
        check_options(settings)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, which may be older than some options."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("sketch_multiple", 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure_loss(closure)
        for _, parameter in parameters_with_gradient(self):
            if parameter.grad.layout != torch.strided:
                shape = tuple(parameter.shape)
                raise ValueError(f"cannot use the sparse gradient of a parameter of shape {shape}: set sparse=False")
        for state in self.state.values():
            state.pop("chosen", None)
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            unfactored = [parameter for parameter in with_gradient if not _is_factored(parameter, group["min_dim"])]
            if unfactored:
                self._update_batch(unfactored, group)
            # One factored matrix after the other, so that only one full V exists at a time.
            for parameter in with_gradient:
                if _is_factored(parameter, group["min_dim"]):
                    self._update_batch([parameter], group)
        return loss

    def _update_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Apply algorithm 3 to all parameters without factors, or to one factored matrix."""
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        states = [self._moment_state(parameter, group) for parameter in parameters]
        G = [_matrix(_promote_to_float32(parameter.grad)) for parameter in parameters if parameter.grad is not None]
        factored = "exp_avg_sq" not in states[0]
        if not factored:
            V = [state["exp_avg_sq"] for state in states]
        elif "Q" in states[0]:
            V = [_product(states[0])]
        else:
            V = [torch.zeros_like(G[0])]
        torch._foreach_mul_(V, beta2)
        torch._foreach_addcmul_(V, G, G, 1 - beta2)
        roots = V
        if factored:
            self._factorize(V[0], states[0], group)
            if group["denominator"] == "post" and "Q" in states[0]:
                roots = [_product(states[0])]
        denominators = torch._foreach_sqrt(roots)
        torch._foreach_add_(denominators, group["eps"])
        # Memory peaks here, so D is written into its denominator.
        D = [torch.div(g, root, out=root) for g, root in zip(G, denominators, strict=True)]
        del V, roots
        lengths = torch._foreach_norm(D)
        for d, length, state in zip(D, lengths, states, strict=True):
            state["rms"] = length / math.sqrt(d.numel())
            d.div_((state["rms"] / group["clip_threshold"]).clamp(min=1))
        S = D
        if beta1:
            M = [state["exp_avg"] for state in states]
            torch._foreach_mul_(M, beta1)
            torch._foreach_add_(M, D, alpha=1 - beta1)
            S = M
            if group["cosine"] or factored:
                for m, d, state in zip(M, D, states, strict=True):
                    state["cosine"] = cosine(m, d)
            if group["cosine"]:
                floor = group["cosine_floor"]  # because D and M are parallel at the first step
                S = [m / (1 - state["cosine"]).clamp(min=floor) for m, state in zip(M, states, strict=True)]
        for parameter, s in zip(parameters, S, strict=True):
            change = s.reshape(parameter.shape)
            if decay:
                change = change.add(_promote_to_float32(parameter), alpha=decay)
            parameter.sub_(lr * change)

    def _moment_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, which is created at its first step."""
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(_matrix(_promote_to_float32(parameter)), memory_format=torch.contiguous_format)
            state["step"] = 0
            if group["betas"][0]:
                state["exp_avg"] = zeros
            if not _is_factored(parameter, group["min_dim"]):
                state["exp_avg_sq"] = zeros.clone()
        state["step"] += 1
        return state

    def _factorize(self, V: Float[Tensor, "m n"], state: dict[str, Any], group: dict[str, Any]) -> None:
        """Store V as its factors, with a newly selected rank if a selection is due."""
        first = "Q" not in state
        unit = V.max()
        # A zero V has no relative error to select by: its factors keep their rank and become zero.
        chooses = (first or (state["step"] - 1) % group["reselect_every"] == 0) and bool(unit != 0)
        if first and not chooses:
            return
        # Without a unit, the products of a tiny V would underflow in float32.
        unit = unit.clamp(min=torch.finfo(V.dtype).tiny)
        A, generator = V / unit, self.param_groups[0]["generator"]
        sizes = group["iterations"], group["oversampling"], group["sketch_multiple"]

        def factor(rank: int) -> tuple[Tensor, Tensor]:
            return subspace_iteration.s_rsi(A, rank, generator, *sizes)

        if chooses:
            negative = (0.0, 0.0) if first else _negative_fractions(state["Q"] @ state["U"].T)
            state["negative"], state["negative_mass"] = negative
            # Wait for earlier work of an accelerator; reading the error waits for all work of the selection.
            float(unit)
            start = time.perf_counter()
            Q, U, state["error"], state["trials"] = subspace_iteration.choose_rank(A, factor, state, group)
            state["seconds"] = time.perf_counter() - start
            state["chosen"] = True  # removed at the next step
        else:
            Q, U = factor(state["Q"].shape[1])
        state["Q"], state["U"] = Q, U.mul_(unit)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in which the generator is a tensor."""
        stored = super().state_dict()
        groups = list(stored["param_groups"])
        groups[0] = groups[0] | {"generator": groups[0]["generator"].get_state()}
        return stored | {"param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; factors and averages keep their own dtype, regardless of the dtype of the weights.

        A state from the CPU can be loaded on an accelerator; its sketches are still drawn on the CPU.

        Raises
        ------
        ValueError
            The state is not from this optimizer, or it is from an accelerator and the weights are on the CPU.
        """
        if "generator" not in state_dict["param_groups"][0]:
            raise ValueError("cannot load this state: it has no sketch generator, so AdapproxOptimizer did not save it")
        generator = torch.Generator(self.param_groups[0]["params"][0].device)
        generator_state = state_dict["param_groups"][0]["generator"].cpu()
        # The length of the state shows whether the CPU or an accelerator drew the sketches.
        if len(generator_state) != len(generator.get_state()):
            generator = torch.Generator()
        if len(generator_state) != len(generator.get_state()):
            raise ValueError("cannot load this state on the CPU: its sketches are drawn on an accelerator. Use one")
        super().load_state_dict(state_dict)
        generator.set_state(generator_state)
        self.param_groups[0]["generator"] = generator
        # The base class casts states to the dtype of the weights: replace them by uncast copies.
        for stored_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for number, parameter in zip(stored_group["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, copy=True)


def cosine(M: Float[Tensor, "..."], D: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Compute cos(D, M) in an Adapprox optimizer step, clamped to [-1, 1]; 0 if D or M is zero."""
    lengths = (D.norm() * M.norm()).clamp(min=torch.finfo(M.dtype).tiny)
    return (torch.dot(D.flatten(), M.flatten()) / lengths).clamp(-1, 1)


def _negative_fractions(product: Float[Tensor, "m n"]) -> tuple[float, float]:
    """Return the fraction of negative entries, and their fraction of the sum of all magnitudes."""
    below = product.clamp(max=0)
    total = product.abs().sum().clamp(min=torch.finfo(product.dtype).tiny)
    return float(below.count_nonzero() / below.numel()), float(below.abs().sum() / total)


def _is_factored(parameter: Tensor, min_dim: int | None) -> bool:
    """Return whether the second moment of a parameter is stored as factors."""
    return min_dim is not None and parameter.ndim > 1 and min(_matrix(parameter).shape) >= min_dim


def _product(state: dict[str, Any]) -> Float[Tensor, "m n"]:
    return (state["Q"] @ state["U"].T).clamp_(min=0)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _promote_to_float32(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor))


def check_options(settings: Any) -> None:
    """Raise a ValueError unless the Adapprox optimizer can train with its options of moments and rank selection."""
    require_choice(settings, "rank_rule", subspace_iteration.RULES)
    require_choice(settings, "denominator", DENOMINATORS)
    require_at_least(settings, 1, "iterations", "sketch_multiple", "init_rank", "max_rank", "reselect_every")
    require_at_least(settings, 0, "eps", "oversampling")  # rejects NaN as well
    for name in ("clip_threshold", "cosine_floor"):
        require(settings, name, "> 0", getattr(settings, name) > 0)
    require(settings, "betas", "two numbers", len(settings.betas) == 2)
    require(settings, "growth", "four numbers (eta, omega, phi, tau)", len(settings.growth) == 4)
    require(settings, "growth", "finite in float32", all(abs(number) <= LARGEST_FLOAT for number in settings.growth))
    scale = settings.growth_scale
    require(settings, "growth_scale", "finite in float32 or None", scale is None or abs(scale) <= LARGEST_FLOAT)
    require(settings, "betas", "in [0, 1)", all(0 <= beta < 1 for beta in settings.betas))
    if settings.cosine and not settings.betas[0]:
        raise ValueError(f"betas[0] must be > 0 with cosine=True, got {settings.betas[0]}")
