"""transformers' Trainer: our methods under it, and a recorder of whatever it trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorascope.driving import MethodCallback
from lorascope.method import Method, task_head
from lorascope.settings import Settings


def trainer_kwargs(
    method: Method, model: nn.Module, lr: float | int | None = None, clip: float | int | None = 1.0
) -> dict[str, Any]:
    """Attach a method to a model, and give what a Trainer needs to train it.

    The schedule is the Trainer's. Rate and clipping are not: ``max_grad_norm`` must be 0, since the Trainer clips
    before a method has edited the gradients, and ``learning_rate`` and ``weight_decay`` are not asked. Factors are
    drawn from the global generator, so seed it first (``transformers.set_seed``).

    Parameters
    ----------
    method : Method
        Of one phase, which needs no batch, loss or held-out text of its own: Full, LoRA, AdaLoRA, FourierFT, HydraLoRA,
        LISA, Adapprox, and NeFT with ``neurons``.
    model : Module
        Freshly loaded; changed in place. Of a classifier ``accepts_loss_kwargs`` is set to False: its loss is a mean
        over rows, which the Trainer would else not divide by the number of accumulated parts.
    lr : float, optional
        The method's by default.
    clip : float or None
        Largest norm of all trained gradients together.

    Returns
    -------
    dict
        ``optimizers`` and ``callbacks``, for ``Trainer(model, args, ..., **trainer_kwargs(method, model))``.

    Raises
    ------
    ValueError
        The method needs more than a Trainer gives, or the model carries adapters already.
    """
    settings = Settings(steps=1, lr=method.lr if lr is None else lr, head_lr=method.head_lr, clip=clip)
    callback = MethodCallback(method, model, settings)
    if task_head(model):
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return {"optimizers": (callback.optimizer, None), "callbacks": [callback]}
