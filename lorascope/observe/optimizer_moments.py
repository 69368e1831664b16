"""Observers of second moments: spectra, errors of factorization methods, and the drift of Adapprox's factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lorascope.adapters.host_weights import to_array
from lorascope.analysis import optimizer_moments
from lorascope.array_types import Float
from lorascope.methods.method import Step
from lorascope.methods.optimizers.subspace_iteration import relative_error, s_rsi
from lorascope.observe.observer import Observer
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import Dense, spectra

# Ranks at which errors are recorded, and the number of singular values recorded.
RANKS = (1, 2, 4, 8, 16, 32, 64)
MAX_SIGMAS = 64

Pair: TypeAlias = tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]

_OF_V = "of Adam's second moment V, as a matrix"
_OF_RANDOM = "of a random matrix with the row and column sums of V"
_ERROR = "‖V − V̂‖ / ‖V‖"
_BEST_ERROR = "best error (SVD) at the same rank"
register(
    'train Full(optimizer_name="adamw") with observe=[ls.observe.second_moments()]',
    moment_sigma=Quantity("σᵢ / σ₁", index="component", definition=f"singular values {_OF_V}"),
    moment_sigma_dealt=Quantity("σᵢ / σ₁", index="component", definition=f"singular values {_OF_RANDOM}"),
    moment_error=Quantity(_ERROR, index="rank", definition=f"best rank-k error (SVD) {_OF_V}"),
    moment_error_dealt=Quantity(_ERROR, index="rank", definition=f"best rank-k error (SVD) {_OF_RANDOM}"),
    moment_error_s_rsi=Quantity(_ERROR, index="rank", definition=f"error of S-RSI with l = p = 5 {_OF_V}"),
    moment_error_rank_one=Quantity(_ERROR, definition=f"error of Adafactor's rank-one factors {_OF_V}"),
)
register(
    "train with Adapprox and observe=[ls.observe.factor_drift()]",
    factor_drift=Quantity(
        "‖E − QUᵀ‖ / ‖E‖", definition="error of Adapprox's factors of E, the exact average of squared gradients"
    ),
    factor_drift_least=Quantity("‖E − Eₖ‖ / ‖E‖", definition=_BEST_ERROR),
    factor_drift_rank_one=Quantity("‖E − E₁‖ / ‖E‖", definition="error of Adafactor's rank-one factors of E"),
)
register(
    "train with Adapprox and observe=[ls.observe.factor_optimum()]",
    factor_step_error=Quantity(
        "‖V − QUᵀ‖ / ‖V‖", definition="error of the factors of this step's V, formed from the previous factors"
    ),
    factor_step_error_least=Quantity("‖V − Vₖ‖ / ‖V‖", definition=_BEST_ERROR),
)


def svd_lowrank(V: Float[Tensor, "m n"], rank: int, generator: torch.Generator) -> Pair:
    """Factorize second moments with torch's randomized SVD, by default iterations and oversampling of S-RSI."""
    with torch.random.fork_rng([V.device] if V.is_cuda else []):  # it only supports the global generator
        torch.manual_seed(generator.initial_seed())
        left, sigma, right = torch.svd_lowrank(V, min(rank + 5, *V.shape), niter=5)
    return (left * sigma)[:, :rank], right[:, :rank]


# Factorization methods: S-RSI with l power iterations and oversampling p, and torch's randomized SVD.
FACTORIZATIONS: dict[str, Callable[[Tensor, int, torch.Generator], Pair]] = {
    "l1_p5": partial(s_rsi, iterations=1, oversampling=5),
    "l2_p5": partial(s_rsi, iterations=2, oversampling=5),
    "l5_p0": partial(s_rsi, iterations=5, oversampling=0),
    "l5_p5": partial(s_rsi, iterations=5, oversampling=5),
    "svd_lowrank": svd_lowrank,
}
for _way in (*FACTORIZATIONS, "svd"):
    _error = Quantity(_ERROR, "", "rank", "mean", f"error by {_way}, {_OF_V}")
    _seconds = Quantity("time per factorization", "s", "rank", "sum", f"wall-clock time of {_way}")
    register(
        'train Full(optimizer_name="adamw") with observe=[ls.observe.factorings()]',
        **{f"factoring_error_{_way}": _error, f"factoring_seconds_{_way}": _seconds},
    )


@dataclass(kw_only=True)
class second_moments(Observer):
    """Observer of AdamW's second moments in blocks: singular values, and low-rank approximation errors.

    Both are also recorded for a random matrix with the same row and column sums. Each recording costs two SVDs and a
    few factorizations per matrix.
    """

    every: int = 100

    def __call__(self, step: Step) -> Iterator[Item]:
        """Return the records of a step; none at step 0, where no moments exist yet."""
        if step.finished == 0 or not self.due(step.finished, step.total):
            return
        for module, state in _block_matrices(step, "exp_avg_sq"):
            V = state["exp_avg_sq"].double().flatten(1)
            if not V.any():
                continue
            V = V / V.max()  # second moments are tiny; all recorded values are relative
            exact, ranks = to_array(V), _ranks_below_full(V)
            for matrix, suffix in ((exact, ""), (optimizer_moments.same_marginals(exact, seed=0), "_dealt")):
                sigma = spectra([Dense(matrix)])[0]
                first = sigma[:MAX_SIGMAS] / sigma[0]
                yield Record(f"moment_sigma{suffix}", first, module, np.arange(1, len(first) + 1))
                yield Record(f"moment_error{suffix}", _best_errors(sigma, ranks), module, ranks)
            generator = torch.Generator(V.device).manual_seed(0)
            wide = V.float()  # the optimizer factorizes in float32
            s_rsi_errors = [relative_error(wide, *s_rsi(wide, rank, generator)) for rank in ranks]
            yield Record("moment_error_s_rsi", np.array(s_rsi_errors), module, ranks)
            rank_one_error = optimizer_moments.frobenius_error(exact, optimizer_moments.rank_one(exact))
            yield Record("moment_error_rank_one", rank_one_error, module)


@dataclass(kw_only=True)
class factorings(Observer):
    """Observer of error and time of each method to factorize AdamW's second moments.

    The methods are S-RSI with few and many power iterations, with and without oversampling, ``torch.svd_lowrank``, and
    the exact SVD.

    Parameters
    ----------
    every : int
        Steps between recordings, each of which factorizes every matrix twice for every rank and method.
    layer : int
        Layer whose matrices are factorized. Time depends on their shapes, which are the same in all layers.
    """

    every: int = 100
    layer: int = 0

    @torch.no_grad()
    def __call__(self, step: Step) -> Iterator[Item]:
        """Return the records of a step; none at step 0, where no moments exist yet."""
        if step.finished == 0 or not self.due(step.finished, step.total):
            return
        inside = set(step.modules.loc[step.modules["layer"] == self.layer, "module"])
        for module, state in _block_matrices(step, "exp_avg_sq"):
            if module not in inside or not state["exp_avg_sq"].any():
                continue
            V = state["exp_avg_sq"].float().flatten(1)
            V, ranks = V / V.max(), _ranks_below_full(V)
            (_, sigma, _), seconds = _time_decomposition(lambda: torch.linalg.svd(V, full_matrices=False))  # noqa: B023
            yield Record("factoring_error_svd", _best_errors(to_array(sigma.double()), ranks), module, ranks)
            yield Record("factoring_seconds_svd", np.full(len(ranks), seconds), module, ranks)
            for name, factorize in FACTORIZATIONS.items():
                errors, times = [], []
                for rank in ranks:
                    generator = torch.Generator(V.device)
                    pair, seconds = _time_decomposition(lambda: factorize(V, rank, generator.manual_seed(0)))  # noqa: B023
                    errors.append(relative_error(V, *pair))
                    times.append(seconds)
                yield Record(f"factoring_error_{name}", np.array(errors), module, ranks)
                yield Record(f"factoring_seconds_{name}", np.array(times), module, ranks)


def _ranks_below_full(V: Float[Tensor, "m n"]) -> list[int]:
    return [rank for rank in RANKS if rank < min(V.shape)]


def _best_errors(sigma: Float[np.ndarray, "k"], ranks: Sequence[int]) -> Float[np.ndarray, "ranks"]:
    return np.array([optimizer_moments.tail_error(sigma, rank) for rank in ranks])


def _time_decomposition(decompose: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], float]:
    """Return the result and the shorter of two times, because the first call may load a library."""
    durations = []
    for _ in range(2):
        start = time.perf_counter()
        factors = decompose()
        float(factors[0][0, 0])  # waits for an accelerator to finish
        durations.append(time.perf_counter() - start)
    return factors, min(durations)


@dataclass(kw_only=True)
class factor_drift(Observer):
    """Observer of second moments: error of Adapprox's factors compared with the exact average of squared gradients.

    The exact average is stored for this, which costs the memory that the method saves. The error that Adapprox records
    comes from one step's factorization, which starts from the previous factors; this observer records the accumulated
    error.
    """

    every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exact_: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, step: Step) -> Iterator[Item]:
        """Update the average with this step's gradients, and return the errors if they are due."""
        for module, state, gradient, beta2 in _factored_matrices(step):
            squares = gradient.to(state["Q"].dtype).flatten(1).square()
            exact = self.exact_.setdefault(module, torch.zeros_like(squares)).lerp_(squares, 1 - beta2)
            if self.due(step.finished, step.total) and exact.any():
                E = to_array(exact.double())
                yield from _factor_errors("factor_drift", module, E, state)
                rank_one_error = optimizer_moments.frobenius_error(E, optimizer_moments.rank_one(E))
                yield Record("factor_drift_rank_one", rank_one_error, module)


@dataclass(kw_only=True)
class factor_optimum(Observer):
    """Observer of the error of one step's factorization of second moments, and the best error at its rank.

    The factors of the previous step are stored for this. Each recording costs one SVD per matrix.
    """

    every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.before_: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, step: Step) -> Iterator[Item]:
        """Recompute V and return its errors if they are due; store the factors for the next step."""
        for module, state, gradient, beta2 in _factored_matrices(step):
            if self.due(step.finished, step.total):
                V = (1 - beta2) * gradient.double().flatten(1).square()
                if module in self.before_:
                    before = self.before_[module]
                    V += beta2 * (before["Q"].double() @ before["U"].double().T).clamp(min=0)  # as in Adapprox
                if V.any():
                    yield from _factor_errors("factor_step_error", module, to_array(V), state)
        for module, state in _block_matrices(step, "Q"):
            self.before_[module] = {"Q": state["Q"], "U": state["U"]}


def _factored_matrices(step: Step) -> Iterator[tuple[str, dict[str, Any], Tensor, float]]:
    """Yield module, Adapprox's state, gradient and beta2 of the factored weights that have a gradient."""
    group_of: dict[Tensor, dict[str, Any]] = {}
    for group in step.optimizer.param_groups:
        group_of |= dict.fromkeys(group["params"], group)
    for module, state in _block_matrices(step, "Q"):
        weight = step.model.get_parameter(f"{module}.weight")
        if weight.grad is not None:  # without a gradient, the optimizer has skipped the weight
            yield module, state, weight.grad, group_of[weight]["betas"][1]


def _factor_errors(name: str, module: str, V: Float[np.ndarray, "m n"], state: dict[str, Any]) -> Iterator[Record]:
    """Yield the error of Adapprox's factors of V, and the best one at their rank."""
    product = to_array(state["Q"].double() @ state["U"].double().T)
    yield Record(name, optimizer_moments.frobenius_error(V, product), module)
    yield Record(f"{name}_least", optimizer_moments.tail_error(spectra([Dense(V)])[0], state["Q"].shape[1]), module)


def _block_matrices(step: Step, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield module and optimizer state of the weights in blocks whose state contains ``key``."""
    inside = set(step.modules.loc[step.modules["layer"].notna(), "module"])
    for name, parameter in step.model.named_parameters():
        module = name.removesuffix(".weight")
        state = step.optimizer.state.get(parameter, {})
        if module in inside and parameter.ndim > 1 and key in state:
            yield module, state
