"""HydraLoRA's mean gates on a text of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lorascope.adapters.delta import attach, attached_deltas
from lorascope.inputs import models
from lorascope.methods.hydralora import RoutedDelta
from lorascope.methods.hydralora_routing import Gates, stack_gates, watch
from lorascope.runs.export import base_of
from lorascope.runs.loading import AdapterRun
from lorascope.runs.run import Run


def mean_gates(
    trained: nn.Module | Run,
    texts: Sequence[str],
    *,
    base: nn.Module | None = None,
    tokenizer: Any = None,
    max_length: int = 128,
    batch_size: int = 32,
) -> dict[str, Float[np.ndarray, "heads"]]:
    """Mean gates of every router over the tokens of a text, and the update at these.

    They are set on the model (``mean_gates_``), so that ``deltas`` and whatever else asks for its updates gets those on
    this text. A run stays as it is: ``at_gates(run, gates)`` is the run seen at them.

    Parameters
    ----------
    trained : Module or Run
        A model that carries HydraLoRA, or a run of it or a folder of its adapter, which is put into ``base``.
    texts : sequence of str
        As the tokenizer encodes them, the ends of long ones left out. Every token counts alike.
    base : Module, optional
        What to put a run into: its base, freshly loaded. By default it is loaded by its name.
    tokenizer : optional
        Of transformers, with a padding token; by default the model's own.
    max_length : int
        Tokens of a text.
    batch_size : int
        Texts at once.

    Returns
    -------
    dict module -> array (heads,)

    Raises
    ------
    ValueError
        There is no text or no token in it, the model has no router, or it does not read plain text.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is one string: give a list of texts, [{texts[:20]!r}]")
    if not len(texts):
        raise ValueError("texts is empty: gates are looked at on one text or more")
    model = _restore_trained(trained, base)
    routed = {name: delta for name, delta in attached_deltas(model).items() if isinstance(delta, RoutedDelta)}
    if not routed:
        raise ValueError(
            f"{type(model).__name__} has no router: its gates are on no text; "
            "train HydraLoRA with 2 heads or more and router='learned'"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, not text: its run has the gates on images"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, which reads pairs: texts alone are not enough")
    seen = _watch_texts(model, routed, list(texts), tokenizer or models.tokenizer(model), max_length, batch_size)
    for name, delta in routed.items():
        delta.mean_gates_.copy_(torch.from_numpy(seen[name]))
    return seen


def _restore_trained(trained: nn.Module | Run, base: nn.Module | None) -> Any:
    if isinstance(trained, nn.Module):
        if base is not None:
            raise ValueError("base= goes with a run, and this is a model: leave it out")
        return trained
    if base is None:
        name, blocks = base_of(trained)
        base = models.load(name, blocks=blocks)
    if isinstance(trained, AdapterRun):
        attach(base, _routers(trained, base))
    else:
        trained.restore(base)
    return base


def _routers(folder: AdapterRun, base: nn.Module) -> dict[str, RoutedDelta]:
    """The heads of an adapter's folder, with their routers."""
    found = {}
    for module, held in folder.factors().items():
        if "router" in held:
            number, outer, rank = held["B"].shape
            scale = folder.files.parts[module].scale
            found[module] = delta = RoutedDelta(base.get_submodule(module), rank, number, scale)
            parts = {"A": held["A"], "B": held["B"].transpose(1, 0, 2).reshape(outer, -1), "router": held["router"]}
            with torch.no_grad():
                for name, part in parts.items():
                    delta.get_parameter(name).copy_(torch.tensor(part))
    return found


def _watch_texts(
    model: Any, routed: dict[str, RoutedDelta], texts: list[str], tokenizer: Any, max_length: int, batch_size: int
) -> dict[str, Float[np.ndarray, "heads"]]:
    parts: dict[str, list[Gates]] = {name: [] for name in routed}
    routers = {name: delta.gates for name, delta in routed.items()}
    device = next(model.parameters()).device
    for start in range(0, len(texts), batch_size):
        chosen = texts[start : start + batch_size]
        batch = tokenizer(chosen, truncation=True, max_length=max_length, padding=True, return_tensors="pt").to(device)
        if not batch["input_ids"].numel():
            raise ValueError(f"texts hold no token: the tokenizer makes nothing of {chosen[0]!r}")
        for name, gates in watch(model, routers, batch, partial(model, **batch)).items():
            parts[name].append(gates)
    return {name: stack_gates(found).mean for name, found in parts.items()}
