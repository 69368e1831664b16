"""Mean gate weights of HydraLoRA on your own text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lorascope.adapters.delta import attach, attached_deltas
from lorascope.array_types import Float
from lorascope.export import base_of
from lorascope.inputs import models
from lorascope.methods.hydralora import RoutedDelta
from lorascope.methods.hydralora_routing import Routing, stack_gates, watch
from lorascope.runs.adapter import Adapter
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.training.run_spec import reload_model


def mean_gates(
    trained: nn.Module | Result,
    texts: Sequence[str],
    *,
    base: nn.Module | None = None,
    tokenizer: Any = None,
    max_length: int = 128,
    batch_size: int = 32,
) -> dict[str, Float[np.ndarray, "heads"]]:
    """Compute the mean gate weights of every router over the tokens of texts.

    They are set on the model (``mean_gates_``): ``deltas`` and other functions then evaluate updates at these gates. A
    run does not change: ``at_gates(run, gates)`` is a view of the run at these gates.

    Parameters
    ----------
    trained : Module or Run
        A model with HydraLoRA, or a run or loaded adapter folder of HydraLoRA, which is put into ``base``.
    texts : sequence of str
        Texts to tokenize; long ones are truncated. Every token has the same weight.
    base : Module, optional
        Freshly loaded base model for a run. By default it is loaded by name.
    tokenizer : optional
        Tokenizer of transformers with a padding token; by default the tokenizer of the model.
    max_length : int
        Maximum number of tokens per text, default 128.
    batch_size : int
        Texts per batch, default 32.

    Returns
    -------
    dict module -> array (heads,)
        Mean gate weight of each expert.

    Raises
    ------
    ValueError
        There is no text or no token, the model has no router, or it does not read plain text.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings, got the string {texts[:20]!r}")
    if not len(texts):
        raise ValueError(f"texts must have at least one text, got {texts!r}")
    model = _restore_trained(trained, base)
    routed = {name: delta for name, delta in attached_deltas(model).items() if isinstance(delta, RoutedDelta)}
    if not routed:
        raise ValueError(
            f"cannot compute gates of {type(model).__name__}: it has no router. "
            "Train HydraLoRA with num_experts >= 2 and router='learned'"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"cannot compute gates of {type(model).__name__} on text: its input is {model.main_input_name}. "
            "Its run contains the gates on images"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"cannot compute gates of {type(model).__name__} on single texts: an encoder-decoder reads pairs"
        )
    tokenizer = tokenizer or models.tokenizer(model)
    device = next(model.parameters()).device
    routers = {name: delta.gates for name, delta in routed.items()}
    routings: dict[str, list[Routing]] = defaultdict(list)
    for start in range(0, len(texts), batch_size):
        batch_texts = list(texts[start : start + batch_size])
        batch = tokenizer(batch_texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        batch = batch.to(device)
        models.require_positions(model, batch["input_ids"].shape[1], max_length)
        if not batch["input_ids"].numel():
            raise ValueError(f"texts must contain at least one token, got {batch_texts[0]!r}")
        for name, gates in watch(model, routers, batch, partial(model, **batch)).items():
            routings[name].append(gates)
    means = {name: stack_gates(recorded).mean for name, recorded in routings.items()}
    for name, delta in routed.items():
        delta.mean_gates_.copy_(torch.from_numpy(means[name]))
    return means


def _restore_trained(trained: nn.Module | Result, base: nn.Module | None) -> Any:
    if isinstance(trained, nn.Module):
        if base is not None:
            raise ValueError(f"base must be None for a model, got {type(base).__name__}: it is only used with a run")
        return trained
    if base is None:
        name, blocks = base_of(trained)
        base = reload_model(trained, name, blocks=blocks)
    if isinstance(trained, Adapter):
        attach(base, _routers(trained, base))
    else:
        cast(Run, trained).restore(base)
    return base


def _routers(folder: Adapter, base: nn.Module) -> dict[str, RoutedDelta]:
    """Return the experts of an adapter folder, with their routers."""
    deltas = {}
    for module, factors in folder.factors().items():
        if "router" in factors:
            number, outer, rank = factors["B"].shape
            scale = folder.files.parts[module].scale
            deltas[module] = delta = RoutedDelta(base.get_submodule(module), rank, number, scale)
            # Adapter folders store one B per expert, RoutedDelta all of them side by side.
            B = factors["B"].transpose(1, 0, 2).reshape(outer, -1)
            arrays = {"A": factors["A"], "B": B, "router": factors["router"]}
            with torch.no_grad():
                for name, array in arrays.items():
                    delta.get_parameter(name).copy_(torch.tensor(array))
    return deltas
