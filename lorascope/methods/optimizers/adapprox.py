"""Adapprox as a torch optimizer: algorithm 3. Algorithms 1 and 2 are in ``subspace_iteration``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.methods.optimizers import subspace_iteration

DENOMINATORS = ("pre", "post")


class AdapproxOptimizer(torch.optim.Optimizer):
    """Adapprox optimizer for any model; all settings except the seed can differ between parameter groups.

    Parameters
    ----------
    params : iterable
        Parameters, or parameter groups.
    lr : float
    betas : (float, float)
        Decay of first and second moment; no first moment is stored if its decay is 0.
    eps : float
        Number added to the square root of the second moment.
    weight_decay : float
        Decoupled weight decay.
    clip_threshold : float
        Maximum RMS of a direction G / (sqrt(V) + eps); ``math.inf`` disables clipping.
    iterations, oversampling : int
        Power iterations of S-RSI, and sketch columns beyond the rank.
    sketch_multiple : int
        The number of sketch columns is rounded up to a multiple of it, up to the smaller side of the matrix.
    init_rank : int
        Rank at which every selection of "restart" starts; with "fixed", the rank itself.
    max_rank : int or None
        Largest rank of a selection; None is a quarter of the smaller side.
    tolerance : float
        Relative error up to which a rank is accepted.
    reselect_every : int
        Steps between two rank selections.
    rank_rule : {"restart", "colnorm", "ema", "fixed"}
        See ``subspace_iteration``; "fixed" uses ``init_rank`` and ignores ``max_rank``.
    growth : (float, float, float, float)
        eta, omega, phi, tau of f, the rank increment of "restart".
    growth_scale : float or None
        Factor of f; None is (k_max - 1) / 191, for matrices narrower than the paper's.
    denominator : {"pre", "post"}
        Whether the step divides by V before factoring, or by the product of its factors.
    cosine, cosine_floor : bool, float
        Whether guidance divides M by 1 - cos(D, M), and the minimum of that divisor.
    min_dim : int or None
        Matrices with a side below it store V without factors; 1 factors all matrices, None no matrix.
    seed : int
        Seed of the sketches; the global generators are not used.
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
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, which may be older than some options."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("sketch_multiple", 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Returns
        -------
        Any
            Result of ``closure``; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_gradients(self.param_groups)
        for state in self.state.values():
            state.pop("chosen", None)
        for group in self.param_groups:
            for together in _parameter_batches(group):
                self._update_batch(together, group)
        return loss

    def _update_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Apply algorithm 3 to all parameters without factors, or to one factored matrix."""
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        states = [self._moment_state(parameter, group) for parameter in parameters]
        G = [_matrix(_promote_to_float32(parameter.grad)) for parameter in parameters if parameter.grad is not None]
        V = [self._previous_moment(state, g) for state, g in zip(states, G, strict=True)]
        torch._foreach_mul_(V, beta2)
        torch._foreach_addcmul_(V, G, G, 1 - beta2)
        roots, needs_cosine = V, group["cosine"] or "exp_avg_sq" not in states[0]
        if "exp_avg_sq" not in states[0]:
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
            if needs_cosine:
                for m, d, state in zip(M, D, states, strict=True):
                    state["cosine"] = cosine(m, d)
            S = M
            if group["cosine"]:
                S = [
                    guide_direction(m, state["cosine"], group["cosine_floor"])
                    for m, state in zip(M, states, strict=True)
                ]
        for parameter, s in zip(parameters, S, strict=True):
            change = s.reshape(parameter.shape)
            parameter.sub_(lr * (change.add(_promote_to_float32(parameter), alpha=decay) if decay else change))

    def _moment_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, which is created at its first step."""
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(_matrix(_promote_to_float32(parameter)), memory_format=torch.contiguous_format)
            state["step"] = 0
            if group["betas"][0]:
                state["exp_avg"] = zeros
            if not is_factored(parameter, group["min_dim"]):
                state["exp_avg_sq"] = zeros.clone()
        state["step"] += 1
        return state

    def _previous_moment(self, state: dict[str, Any], G: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return V of the previous step: the stored average, or the product of its factors."""
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"]
        return _product(state) if "Q" in state else torch.zeros_like(G)

    def _factorize(self, V: Float[Tensor, "m n"], state: dict[str, Any], group: dict[str, Any]) -> None:
        """Store V as its factors, with a newly selected rank if a selection is due."""
        first = "Q" not in state
        unit = V.max()
        # A zero V has no relative error to select by: its factors keep their rank and become zero.
        chooses = (first or (state["step"] - 1) % group["reselect_every"] == 0) and bool(unit != 0)
        if first and not chooses:
            return
        unit = unit.clamp(min=torch.finfo(V.dtype).tiny)
        A = V / unit
        generator = self.param_groups[0]["generator"]
        factor = subspace_iteration.factoring(
            A, generator, group["iterations"], group["oversampling"], group["sketch_multiple"]
        )
        if chooses:
            state["negative"], state["negative_mass"] = (
                (0.0, 0.0) if first else negative_fractions(state["Q"] @ state["U"].T)
            )
            # Wait for earlier work of an accelerator; reading the error waits for all work of the selection.
            float(unit)
            start = time.perf_counter()
            Q, U, state["error"], state["trials"] = subspace_iteration.choose(A, factor, state, group)
            state["seconds"] = time.perf_counter() - start
            state["chosen"] = True  # removed at the next step
        else:
            Q, U = factor(state["Q"].shape[1])
        state["Q"], state["U"] = Q, U.mul_(unit)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in which the generator is a tensor."""
        stored = super().state_dict()
        first, *others = stored["param_groups"]
        return stored | {"param_groups": [first | {"generator": first["generator"].get_state()}, *others]}

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
        drawn = state_dict["param_groups"][0]["generator"].cpu()
        # The length of the state shows whether the CPU or an accelerator drew the sketches.
        if len(drawn) != len(generator.get_state()):
            generator = torch.Generator()
        if len(drawn) != len(generator.get_state()):
            raise ValueError("cannot load this state on the CPU: its sketches are drawn on an accelerator. Use one")
        super().load_state_dict(state_dict)
        generator.set_state(drawn)
        self.param_groups[0]["generator"] = generator
        # The base class casts states to the dtype of the weights: replace them by uncast copies.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                own = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][key] = own


def cosine(M: Float[Tensor, "..."], D: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Compute cos(D, M), clamped to [-1, 1]; 0 if D or M is zero."""
    lengths = (D.norm() * M.norm()).clamp(min=torch.finfo(M.dtype).tiny)
    return (torch.dot(D.flatten(), M.flatten()) / lengths).clamp(-1, 1)


def guide_direction(M: Float[Tensor, "..."], cosine: Float[Tensor, ""], floor: float) -> Float[Tensor, "..."]:
    """Compute M / max(1 - cos(D, M), floor)."""
    return M / (1 - cosine).clamp(min=floor)


def negative_fractions(product: Float[Tensor, "m n"]) -> tuple[float, float]:
    """Return the fraction of negative entries, and their fraction of the sum of all magnitudes."""
    below = product.clamp(max=0)
    total = product.abs().sum().clamp(min=torch.finfo(product.dtype).tiny)
    return float(below.count_nonzero() / below.numel()), float(below.abs().sum() / total)


def is_factored(parameter: Tensor, min_dim: int | None) -> bool:
    """Return whether the second moment of a parameter is stored as factors."""
    return min_dim is not None and parameter.ndim > 1 and min(_matrix(parameter).shape) >= min_dim


def _parameter_batches(group: dict[str, Any]) -> Iterator[list[Tensor]]:
    """Yield all parameters without factors, then each factored matrix, so that only one full V exists at a time."""
    live = [parameter for parameter in group["params"] if parameter.grad is not None]
    dense = [parameter for parameter in live if not is_factored(parameter, group["min_dim"])]
    if dense:
        yield dense
    yield from ([parameter] for parameter in live if is_factored(parameter, group["min_dim"]))


def _product(state: dict[str, Any]) -> Float[Tensor, "m n"]:
    return (state["Q"] @ state["U"].T).clamp_(min=0)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _promote_to_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_gradients(groups: list[dict[str, Any]]) -> None:
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            shape = tuple(parameter.shape)
            raise ValueError(f"cannot use the sparse gradient of a parameter of shape {shape}: set sparse=False")


def _check_group(group: dict[str, Any]) -> None:
    for name, known in (("rank_rule", subspace_iteration.RULES), ("denominator", DENOMINATORS)):
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {group[name]!r}")
    for name in ("iterations", "sketch_multiple", "init_rank", "max_rank", "reselect_every"):
        if group[name] is not None and group[name] < 1:
            raise ValueError(f"{name} must be >= 1, got {group[name]}")
    for name in ("lr", "eps", "weight_decay", "oversampling"):
        if not group[name] >= 0:  # rejects NaN as well
            raise ValueError(f"{name} must be >= 0, got {group[name]}")
    for name in ("clip_threshold", "cosine_floor"):
        if not group[name] > 0:
            raise ValueError(f"{name} must be > 0, got {group[name]}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {tuple(group['betas'])}")
    if len(group["growth"]) != 4:
        raise ValueError(f"growth must be four numbers (eta, omega, phi, tau), got {tuple(group['growth'])}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {tuple(group['betas'])}")
    if group["cosine"] and not group["betas"][0]:
        raise ValueError(f"betas[0] must be > 0 with cosine=True, got {group['betas'][0]}")
