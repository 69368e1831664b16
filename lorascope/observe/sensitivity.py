"""Observers of the sensitivity of the loss to neurons and coefficients, and of the change of neurons.

One definition is used for all methods: ``|W_ij dL/dW_ij|`` of the effective weight, summed along a row or a column, and
``|c dL/dc|`` for a coefficient. Gradients are averaged over held-out batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas, effective_weight
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.adapters.host_weights import orient_weight, to_host
from lorascope.analysis.neurons import list_groups, neuron_roles
from lorascope.array_types import Float
from lorascope.methods.field_checks import require_integer
from lorascope.methods.method import Batch, Step
from lorascope.methods.neft import distances
from lorascope.observe.observer import Observer
from lorascope.schema import module_table
from lorascope.schema.records import Quantity, Record, register

register(
    "train with observe=[ls.observe.neurons()]",
    neuron_update=Quantity("‖w − w₀‖", "", "neuron", "norm", "displacement of a neuron's weights from W₀ (norm)"),
)
register(
    "train FourierFT with observe=[ls.observe.coefficients()]",
    coefficient_gradient=Quantity(
        "∂L/∂c", "nats", "coefficient", "mean", "gradient of the loss with respect to a coefficient"
    ),
    coefficient_importance=Quantity(
        "|c ∂L/∂c|", "nats", "coefficient", "sum", "sensitivity of the loss to a coefficient, |c dL/dc|"
    ),
)


@dataclass(kw_only=True)
class neurons(Observer):
    """Sensitivity of the loss to every row and column of linear layers, and the change of feed-forward neurons.

    W = W_0 + dW is the effective weight, and G = dL/dW its gradient, averaged over batches of the validation split.
    ``sensitivity_out`` of row i is ``sum_j |W_ij G_ij|``, and ``sensitivity_in`` of column j is ``sum_i |W_ij G_ij|``.
    G is computed from inputs and output gradients of the module, so it is the same for frozen, trained and adapted
    weights. Dropout is off. W includes input-dependent updates (HydraLoRA) at mean gates.

    ``shuffled_sensitivity_out`` and ``shuffled_sensitivity_in`` are their null: the expected values if the entries of G
    are shuffled within the module, ``mean |G| sum_j |W_ij|`` for row i. Feed-forward neurons (rows of inputs and gates,
    columns of outputs) also have ``neuron_cosine`` and ``neuron_update``, under the same indices.

    Parameters
    ----------
    every : int
        Steps between recordings, each of which costs about one training step per batch.
    batches, rows : int
        Number of batches that G is averaged over, and rows per batch.
    targets : str or sequence of str
        Linear modules, selected as in the methods; see ``module_table.match``.
    """

    every: int = 100
    batches: int = 4
    rows: int = 16
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self, 1, "batches", "rows")

    def __call__(self, step: Step) -> Iterable[Record]:
        if not self.due(step.finished, step.total):
            return
        modules = module_table.match(step.modules, self.targets)
        # G is the product of output gradients and inputs, which are ids for an embedding.
        for name in modules:
            if isinstance(step.model.get_submodule(name), nn.Embedding):
                raise ValueError(f"targets must be linear layers, got the embedding {name!r}")
        pieces = _held_out_batches(step, self.batches, self.rows)
        sums: dict[tuple[str, str], Tensor] = {}
        for name, gradient in _weight_gradients(step.model, modules, pieces, step.loss).items():
            sizes, slopes = effective_weight(step.model, name).float().abs(), gradient.abs()
            # The expectation under shuffling is exact, so the null needs no random permutations.
            sensitivity, mean_slope = sizes * slopes, slopes.mean()
            for side, axis in (("out", 1), ("in", 0)):
                sums[f"sensitivity_{side}", name] = sensitivity.sum(axis)
                sums[f"shuffled_sensitivity_{side}", name] = sizes.sum(axis) * mean_slope
        for (quantity, name), values in zip(sums, to_host(list(sums.values())), strict=True):
            yield Record(quantity, values, name)
        yield from _changes(step)


@dataclass(kw_only=True)
class coefficients(Observer):
    """Sensitivity to every FourierFT coefficient: gradient and importance, in the Fourier basis or another one.

    The gradient is averaged over batches of the validation split, without dropout. The importance ``|c dL/dc|`` is the
    size of the first-order change in loss if the coefficient is removed. Each recording has two rows per coefficient,
    which ``analysis.fourier.list_coefficients`` joins with frequency and value.

    Parameters
    ----------
    every : int
        Steps between recordings, each of which costs about one training step per batch.
    batches, rows : int
        Number of batches that the gradient is averaged over, and rows per batch.
    """

    every: int = 100
    batches: int = 4
    rows: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self, 1, "batches", "rows")

    def __call__(self, step: Step) -> Iterable[Record]:
        coefficients = {}
        for module, delta in attached_deltas(step.model).items():
            if "coefficients" in delta.factors():
                coefficients[module] = delta.get_parameter("coefficients")
        if not (coefficients and self.due(step.finished, step.total)):
            return
        pieces = _held_out_batches(step, self.batches, self.rows)
        with evaluation_mode(step.model), torch.enable_grad():
            parameters = list(coefficients.values())
            losses = map(step.loss, pieces)
            batch_gradients = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses]
        tensors: dict[tuple[str, str], Tensor] = {}
        for (module, parameter), *slopes in zip(coefficients.items(), *batch_gradients, strict=True):
            gradient = torch.stack(slopes).mean(0)
            tensors["coefficient_gradient", module] = gradient
            tensors["coefficient_importance", module] = (parameter.detach() * gradient).abs()
        for (quantity, module), values in zip(tensors, to_host(list(tensors.values())), strict=True):
            yield Record(quantity, values, module)


def _held_out_batches(step: Step, batches: int, rows: int) -> list[Batch]:
    """Return the first batches of the held-out rows; the last one may be smaller."""
    text = step.held_out(batches * rows).batch
    count = len(next(iter(text.values())))
    pieces = []
    for start in range(0, count, rows):
        pieces.append({key: value[start : start + rows] for key, value in text.items()})
    return pieces


def _weight_gradients(
    model: nn.Module, modules: Sequence[str], batches: Sequence[Batch], loss: Callable[[Batch], Tensor]
) -> dict[str, Float[Tensor, "out in"]]:
    """Compute dL/dW of linear modules averaged over batches, in evaluation mode, without changing any ``grad``.

    ``loss`` passes a batch through the model. Modules that the model does not call are omitted.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            # The gradient of the output equals the gradient of a zero added to it.
            zero = torch.zeros_like(output).requires_grad_()
            calls.append((name, inputs[0].detach(), zero))
            return output + zero

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    gradients: dict[str, Tensor] = {}
    try:
        with evaluation_mode(model), torch.enable_grad():
            for batch in batches:
                slopes = torch.autograd.grad(loss(batch), [zero for *_, zero in calls], materialize_grads=True)
                for (name, inputs, _), slope in zip(calls, slopes, strict=True):
                    gradient = slope.flatten(0, -2).float().T @ inputs.flatten(0, -2).float() / len(batches)
                    if name in gradients:
                        gradient = gradients[name] + gradient
                    gradients[name] = gradient
                calls.clear()
    finally:
        for handle in hooks:
            handle.remove()
    return gradients


def _changes(step: Step) -> Iterable[Record]:
    """Yield the cosine distance and the displacement of every feed-forward neuron."""
    roles = neuron_roles(step.modules)
    if not roles:
        return
    groups = list_groups(step.modules, roles)
    living = {}
    for group in groups:  # in the layout that the module stores
        host: Any = step.model.get_submodule(group.module)
        living[f"{group.module}.weight"] = orient_weight(host, effective_weight(step.model, group.module))
    for module, rows in distances(step.model, groups, step.base, living).groupby("module", sort=False):
        index = rows["neuron"].to_numpy()
        yield Record("neuron_cosine", rows["cosine_distance"].to_numpy(), str(module), index)
        yield Record("neuron_update", rows["delta_norm"].to_numpy(), str(module), index)
