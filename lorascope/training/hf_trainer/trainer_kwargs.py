"""Arguments with which transformers' Trainer trains a method of lorascope."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorascope.methods.field_checks import default_if_none
from lorascope.methods.method import Method, task_head
from lorascope.training.hf_trainer.method_callback import MethodCallback
from lorascope.training.settings import Settings


def trainer_kwargs(
    method: Method, model: nn.Module, lr: float | None = None, clip: float | None = 1.0
) -> dict[str, Any]:
    """Attach a method to a model, and return the arguments with which a Trainer trains it.

    The Trainer sets the schedule, but not learning rate, weight decay and clipping. Set ``max_grad_norm`` to 0, because
    the Trainer clips before a method can edit the gradients. The Trainer's ``learning_rate`` and ``weight_decay`` have
    no effect. Factors are drawn from the global generator, so seed it first (``transformers.set_seed``).

    Parameters
    ----------
    method : Method
        Method with one phase that needs no search split, batch loss or held-out text: not AutoLoRA, ALoRA, or NeFT
        without ``neurons``.
    model : Module
        Freshly loaded model, changed in place. For a classifier, ``accepts_loss_kwargs`` is set to False. Its loss is a
        mean over rows, and otherwise the Trainer would not divide it by the number of accumulated micro-batches.
    lr : float, optional
        Learning rate of the adapter; by default that of the method.
    clip : float or None
        Maximum global gradient norm; None disables clipping.

    Returns
    -------
    dict
        ``optimizers`` and ``callbacks``, for ``Trainer(model, args, ..., **trainer_kwargs(method, model))``.

    Raises
    ------
    ValueError
        The method needs more than a Trainer provides, or the model already has adapters.
    """
    settings = Settings(steps=1, lr=default_if_none(lr, method.lr), head_lr=method.head_lr, clip=clip)
    callback = MethodCallback(method, model, settings)
    if task_head(model):
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return {"optimizers": (callback.optimizer, None), "callbacks": [callback]}
